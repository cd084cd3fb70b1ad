"""Loads a Hugging Face or GGUF model from a folder, a file or the hub, with errors that name the cause."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import torch

from sqft.errors import SqftError, UsageError, first_line, shown
from sqft.models.bounds import check_config, check_decoder, check_size
from sqft.models.experts import unstack
from sqft.models.gguf import parsed_once, read_layout
from sqft.models.reader import SafetensorsReader
from sqft.models.types import PreTrainedModel, Tokenizer
from sqft.strict import plain_path, read_object

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_dense(source: str | Path, dtype: str = "auto") -> PreTrainedModel:
    """A causal language model in eval mode. Weights on a disk are mapped, not read: a page is read when touched.

    ``source`` is a Hugging Face folder, a folder with one GGUF file, a ``.gguf`` file (de-quantized) or a hub name.
    Raises SqftError for a missing or corrupt source.
    """
    from transformers import AutoConfig

    folder, gguf = locate(source)
    layout = None if gguf is None else read_layout(Path(folder) / gguf)
    if gguf is None and Path(folder).is_dir():
        layout = SafetensorsReader(folder).layout  # every file is whole
        check_config(folder, layout)
        if (method := quant_method(folder)) is not None:
            raise SqftError(f"{folder} is quantized ({method}): this needs the float model that it was made from")
    try:
        with parsed_once(source):
            config = AutoConfig.from_pretrained(folder, gguf_file=gguf, trust_remote_code=False)
            kind = auto_class(config)
            if layout is not None:
                with torch.device("meta"):
                    check_size(kind.from_config(config, trust_remote_code=False), folder, layout, packed=False)
            model, found = kind.from_pretrained(folder, gguf_file=gguf, dtype=DTYPES[dtype], trust_remote_code=False,
                                                output_loading_info=True)  # fmt: skip
        if missing := sorted(found["missing_keys"]):  # transformers draws them at random
            raise SqftError(f"{source} is incomplete: it lacks {missing[0]}, of {len(missing)} weights that its "
                            "configuration asks for")  # fmt: skip
    except SqftError:
        raise
    except Exception as error:  # transformers raises many kinds; each is a source that cannot be loaded
        raise SqftError(f"cannot load a model from {source}: {reason(error, source)}") from error
    if gguf is not None:
        model = _without_gguf_config(model)
    unstack(model)
    return model.eval()


def auto_class(config: Any) -> Any:
    """transformers' auto class that a configuration's model is loaded by: of one that sees, the whole model. Raises
    SqftError for an encoder-decoder."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    check_decoder(config)
    sees = hasattr(config, "vision_config") and type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def skeleton(source: str | Path) -> Any:
    """The model of a folder, .gguf file or hub name without weights. Code that comes with a model is not run. Raises
    SqftError if there is no configuration to be had, or it is not of a causal language model."""
    from transformers import AutoConfig

    folder, gguf = locate(source)
    check_config(folder)
    layout = None if gguf is None else read_layout(Path(folder) / gguf)
    try:
        config = AutoConfig.from_pretrained(folder, gguf_file=gguf, trust_remote_code=False)
        vars(config).pop("quantization_config", None)
        dtype = torch.float32 if gguf else getattr(config, "dtype", None) or torch.float32
        with torch.device("meta"):
            model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
        if layout is not None:
            check_size(model, source, layout, packed=False)
        return model
    except SqftError:
        raise
    except Exception as error:  # transformers raises many kinds; each means that there is nothing to count
        raise SqftError(f"the configuration of {source} is not here: {first_line(error)}") from error


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer that belongs to ``source``; it pads with its end-of-text token if it has no padding token."""
    from transformers import AutoTokenizer

    folder, gguf = locate(source)
    if gguf is not None:
        read_layout(Path(folder) / gguf)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf, trust_remote_code=False)
    except Exception as error:
        raise SqftError(f"cannot load a tokenizer from {source}: {reason(error, source)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_settings(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Everything of a Hugging Face folder but the weights: configuration, generation settings, tokenizer."""
    if not model.config.architectures:  # servers choose their class by it
        model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    source = Path(model.name_or_path or "")
    for file in (
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
    ):  # of what it sees
        if (source / file).is_file():
            shutil.copyfile(source / file, folder / file)


def locate(source: str | Path) -> tuple[str, str | None]:
    """(folder or hub name, GGUF file name or None). Raises UsageError for a path that holds no model."""
    if not plain_path(str(source)):
        raise UsageError(f"{shown(source)} is no path or name")
    path = Path(source)
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), path.name
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if (path / "config.json").is_file():
            return str(path), None
        if len(ggufs) > 1:
            raise UsageError(f"{path} holds {len(ggufs)} GGUF files: name one, e.g. {ggufs[0]}")
        if ggufs:
            return str(path), ggufs[0].name
        raise UsageError(f"{path} is not a model folder: it has neither config.json nor a .gguf file")
    text = str(source)
    if path.exists():
        raise UsageError(f"{path} is not a model: give a folder, a .gguf file or a hub name")
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1:
        raise UsageError(f"there is no folder {path}, and it is not a hub name (owner/name)")
    return text, None


def quant_method(folder: str | Path) -> str | None:
    """What a folder's config says that its weights are quantized by, or None."""
    try:
        return str(read_object(Path(folder) / "config.json", data=True)["quantization_config"]["quant_method"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def reason(error: Exception, source: str | Path) -> str:
    """The first line of what transformers says, or what it means."""
    if "trust_remote_code" in str(error):
        return (
            "it brings Python code of its own (auto_map), which sqft does not run; transformers has to know its family"
        )
    if "sqft-compact" in str(error):
        return "it is in compact form: unpack it first (sqft unpack)"
    first = first_line(error)
    if not Path(source).exists() and (huggingface_hub.is_offline_mode() or "connect" in str(error).lower()):
        first += " (the hub cannot be reached; a local folder would work)"
    return first


def _without_gguf_config(model: Any) -> Any:
    """The same weights in a model that ``save_pretrained`` accepts: its config no longer says 'quantized by gguf'."""
    from accelerate import init_empty_weights

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    with init_empty_weights(include_buffers=False):
        clean = type(model)(config)
    clean.load_state_dict(model.state_dict(), assign=True)
    clean.tie_weights()
    clean.generation_config = model.generation_config
    return clean

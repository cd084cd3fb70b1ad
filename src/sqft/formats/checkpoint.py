"""Packed folders: which format a folder has, and a folder to and from a live model with ``QuantLinear`` layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sqft.errors import SqftError
from sqft.formats.gptq import GPTQ
from sqft.formats.settings import Format, Settings
from sqft.models import experts
from sqft.models.bounds import check_config, check_size
from sqft.models.dense import DTYPES, auto_class, quant_method, reason, save_settings
from sqft.models.discover import describe
from sqft.models.embeddings import exact_dtypes, widen_embeddings
from sqft.models.experts import unstack
from sqft.models.reader import Reader, SafetensorsReader
from sqft.models.tensors import ModelWriter, layout, same
from sqft.models.types import PreTrainedModel, Tokenizer
from sqft.models.weights import Weight, is_linear, put_module, stored_state
from sqft.quantization.linear import QuantLinear
from sqft.registry import FORMATS

Change = Callable[[str, QuantLinear], QuantLinear]  # a layer that is written in the place of the one of this name


def packed_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The packed layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def count_parameters(model: nn.Module) -> int:
    """Of a model, packed weights as the weights that they are."""
    packed = sum(layer.in_features * layer.out_features for layer in packed_layers(model).values())
    return packed + sum(p.numel() for p in model.parameters())


def resolve(format: str, symmetric: bool) -> tuple[Format, str]:
    """The format and version of a format option; 'auto' is what most tools read: GPTQ v1 of symmetric grids, and
    compressed-tensors of others."""
    if format == "auto":
        format = "gptq" if symmetric else "compressed-tensors"
    if format in GPTQ.versions:
        return GPTQ, format
    found: Format = FORMATS[format]
    return found, found.versions[0]


def quantization_config(model: nn.Module, layers: Mapping[str, QuantLinear], format: str) -> dict[str, Any]:
    """What goes into config.json: of ``layers`` by name; the model's other linear layers of blocks stay float."""
    others = [name for name in describe(model).names() if name not in layers]
    coder, version = resolve(format, next(iter(layers.values())).symmetric)
    return coder.make_config(layers, others, version)


def encoded(
    module: nn.Module, format: str, prefix: str = "", change: Change | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The state dict of a module, its packed layers (what ``change`` makes of them) in the checkpoint's format."""
    layers = packed_layers(module)
    for name, layer in layers.items():
        layer = change(name, layer) if change else layer
        coder, version = resolve(format, layer.symmetric)
        for leaf, tensor in coder.encode(layer, version).items():
            yield f"{prefix}{name}.{leaf}", tensor
    for name, tensor in stored_state(module, prefix):
        if name.removeprefix(prefix).rpartition(".")[0] not in layers:
            yield name, tensor


def plan_tensors(model: PreTrainedModel, layers: Mapping[str, QuantLinear], format: str,
                 dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:  # fmt: skip
    """Names, shapes and dtypes of the checkpoint in which ``layers`` (shapes suffice) are packed; ``dtypes`` of tensors
    that are stored in another one than the model's."""
    whole = experts.planned(model, layout(model), layers)
    planned = {name: t.to(dtypes.get(name, t.dtype)) for name, t in whole.items()
               if name.rpartition(".")[0] not in layers}  # fmt: skip
    for name, layer in layers.items():
        coder, version = resolve(format, layer.symmetric)
        planned.update({f"{name}.{leaf}": t.to("meta") for leaf, t in coder.encode(layer, version).items()})
    return planned


def mark_packed(model: Any, format: str) -> None:
    """Notes on a live packed model in which format it is to be saved. Its config describes its state dict, which is
    always GPTQ version 2: so ``save_pretrained`` is right as well."""
    model.config.quantization_config = quantization_config(model, packed_layers(model), "gptq_v2")
    model.sqft_format = format


def save_packed(model: Any, tokenizer: Tokenizer, folder: Path, max_shard_size: int,
                change: Change | None = None) -> None:  # fmt: skip
    """Writes a live packed model and its tokenizer in the format noted on it; of its packed layers, by name, what
    ``change`` makes of them, one after the other."""
    layers = packed_layers(model)
    dtypes = exact_dtypes(model)
    writer = ModelWriter(plan_tensors(model, layers, model.sqft_format, dtypes), folder, max_shard_size)
    for name, tensor in encoded(model, model.sqft_format, change=change):
        writer.add(name, tensor, same if name in dtypes else None)
    writer.close()
    live = model.config.quantization_config
    model.config.quantization_config = stored = quantization_config(model, layers, model.sqft_format)
    try:
        save_settings(model, tokenizer, folder)
    finally:
        model.config.quantization_config = live
    write_quantize_config(stored, folder)


def write_quantize_config(config: Mapping[str, Any], folder: Path) -> None:
    """``quantize_config.json``, which some GPTQ loaders read instead of config.json."""
    if config["quant_method"] == "gptq":
        (folder / "quantize_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def is_packed_folder(folder: str | Path) -> bool:
    """Whether a folder's config says that its weights are quantized in a format that is read here."""
    return quant_method(folder) in FORMATS


def load_packed(folder: str | Path, dtype: str = "auto") -> PreTrainedModel:
    """``load_weights`` of a packed folder."""
    return load_weights(SafetensorsReader(folder), dtype)


def load_weights(reader: Reader, dtype: str = "auto", settings: Mapping[str, Any] | None = None,
                 ready: Mapping[str, nn.Module] | None = None) -> PreTrainedModel:  # fmt: skip
    """A causal language model in eval mode, of a reader's tensors. Weights that are packed, as the model's
    ``quantization_config`` says, are ``QuantLinear`` layers.

    ``dtype`` of what is not packed; ``settings``: instead of the folder's ``config.json``; ``ready``: modules, by name,
    that are put in instead of being read. Raises SqftError for a format that is not read, or a checkpoint that does
    not fit.
    """
    model, packed = _empty(reader, settings)
    for name, module in (ready or {}).items():
        put_module(model, name, module)
    state = {n: reader.get(n) for n in reader.layout if n.rpartition(".")[0] not in (ready or ())}
    format = ""
    if packed:
        format = packed["quant_method"]
        coder: Format = FORMATS[format]
        read = coder.read_config(packed)
        format = read.version if coder is GPTQ else format
        state = _take_packed(model, state, coder, read)
    tied = set(model.all_tied_weights_keys or ())
    try:
        result = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:  # a shape is another
        raise SqftError(f"{reader.folder} does not fit its config.json: {error}") from None
    layers = packed_layers(model)
    known = {*layers, *(ready or ())}
    missing = [n for n in result.missing_keys if n not in tied and n.rpartition(".")[0] not in known]
    if missing or result.unexpected_keys:
        wrong = f"lacks {missing[0]}" if missing else f"has {result.unexpected_keys[0]}, which the model does not"
        raise SqftError(f"{reader.folder} does not fit its config.json: the checkpoint {wrong}")
    model.tie_weights()
    widen_embeddings(model)
    for parameter in model.parameters():
        parameter.requires_grad_(not layers)
    if format and not ready:
        mark_packed(model, format)
    model.name_or_path = str(reader.folder)
    return (model if dtype == "auto" else model.to(DTYPES[dtype])).eval()  # pyright: ignore[reportArgumentType]


def _empty(reader: Reader, settings: Mapping[str, Any] | None) -> tuple[Any, dict[str, Any] | None]:
    """The model of a folder's settings, without weights, and its ``quantization_config``."""
    from accelerate import init_empty_weights
    from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig

    folder = reader.folder
    check_config(folder, reader.layout)
    try:
        config: Any = (AutoConfig.from_pretrained(folder, trust_remote_code=False) if settings is None
                       else CONFIG_MAPPING[settings["model_type"]].from_dict(dict(settings)))  # fmt: skip
        packed = config.__dict__.pop("quantization_config", None)
        with torch.device("meta"):
            check_size(auto_class(config).from_config(config, trust_remote_code=False), folder, reader.layout, True)
        with init_empty_weights(include_buffers=False):
            model = auto_class(config).from_config(config, trust_remote_code=False)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except SqftError:
        raise
    except Exception as error:  # transformers raises many kinds; each is a source that cannot be loaded
        raise SqftError(f"cannot load a model from {folder}: {reason(error, folder)}") from error
    unstack(model)
    if packed is not None and not isinstance(packed, dict):
        raise SqftError(f"{folder}: quantization_config of config.json is no mapping")
    return model, packed


def _take_packed(model: nn.Module, state: dict[str, Tensor], coder: Format, settings: Settings) -> dict[str, Tensor]:
    """Puts ``QuantLinear`` layers where the checkpoint has packed weights; returns the other tensors."""
    modules = dict(model.named_modules())
    for name in [key.removesuffix("." + coder.key) for key in state if key.endswith("." + coder.key)]:
        linear = modules.get(name)
        if linear is None or not is_linear(linear):
            raise SqftError(f"the checkpoint has {name}.{coder.key}, but the model has no linear module there")
        own = {key.rpartition(".")[2]: state.pop(key) for key in [k for k in state if k.rpartition(".")[0] == name]}
        layer = coder.decode(name, own, settings)
        found, wanted = (layer.out_features, layer.in_features), Weight(name, linear).shape
        if found != wanted:
            raise SqftError(f"{name} is {list(found)} in the checkpoint and {list(wanted)} in the model")
        put_module(model, name, layer)
    return state


@torch.no_grad()
def unpack_model(model: nn.Module) -> None:
    """Puts ``nn.Linear`` layers with the de-quantized weights in the place of packed ones: the same results, faster, in
    the memory of a float model."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    for name, layer in packed_layers(model).items():
        put_module(model, name, unpack_layer(layer, dtype))


def unpack_layer(layer: QuantLinear, dtype: torch.dtype) -> nn.Linear:
    """The ``nn.Linear`` of a packed layer's de-quantized weight."""
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.in_features, linear.out_features = layer.in_features, layer.out_features
    linear.weight = nn.Parameter(layer.dequantize(dtype).contiguous(), requires_grad=False)
    linear.register_parameter("bias", layer.bias)
    return linear

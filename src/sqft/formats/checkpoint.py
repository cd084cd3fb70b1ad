"""Packed folders: which format a folder has, and a folder to and from a live model with ``QuantLinear`` layers."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sqft.errors import SqftError
from sqft.formats import compressed_tensors, gptq
from sqft.formats.settings import Settings
from sqft.models.dense import DTYPES, check_weights, save_settings
from sqft.models.discover import describe
from sqft.models.tensors import ModelWriter, layout, read_tensors
from sqft.models.weights import stored_state
from sqft.quantization.linear import QuantLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMATS: dict[str, Any] = {"gptq": gptq, "compressed-tensors": compressed_tensors}


def packed_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The packed layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def resolve(format: str, symmetric: bool) -> tuple[Any, str]:
    """The module and version of a format option; 'auto' is GPTQ, v1 if symmetric (more tools read it), else v2."""
    if format == "compressed-tensors":
        return compressed_tensors, compressed_tensors.VERSION
    return gptq, ("gptq" if symmetric else "gptq_v2") if format == "auto" else format


def quantization_config(model: nn.Module, layers: Mapping[str, QuantLinear], format: str) -> dict[str, Any]:
    """What goes into config.json: of ``layers`` by name; the model's other linear layers of blocks stay float."""
    others = [name for name in describe(model).names() if name not in layers]
    module, version = resolve(format, next(iter(layers.values())).symmetric)
    return module.make_config(layers, others, version)


def format_option(config: Mapping[str, Any]) -> str:
    """The format option that gives this ``quantization_config``."""
    method = config["quant_method"]
    return method if method == "compressed-tensors" else gptq.read_config(config).version


def encoded(module: nn.Module, format: str, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The state dict of a module, its packed layers in the checkpoint's format."""
    layers = packed_layers(module)
    for name, layer in layers.items():
        coder, version = resolve(format, layer.symmetric)
        for leaf, tensor in coder.encode(layer, version).items():
            yield f"{prefix}{name}.{leaf}", tensor
    for name, tensor in stored_state(module, prefix):
        if name.removeprefix(prefix).rpartition(".")[0] not in layers:
            yield name, tensor


def plan_tensors(model: PreTrainedModel, layers: Mapping[str, QuantLinear], format: str) -> dict[str, Tensor]:
    """Names, shapes and dtypes of the checkpoint in which ``layers`` (shapes suffice) are packed."""
    planned = {name: t for name, t in layout(model).items() if name.rpartition(".")[0] not in layers}
    for name, layer in layers.items():
        coder, version = resolve(format, layer.symmetric)
        planned.update({f"{name}.{leaf}": t.to("meta") for leaf, t in coder.encode(layer, version).items()})
    return planned


def mark_packed(model: Any, format: str) -> None:
    """Notes on a live packed model in which format it is to be saved.

    Its config describes its state dict, which is always GPTQ version 2: so ``save_pretrained`` is right as well.
    """
    model.config.quantization_config = quantization_config(model, packed_layers(model), "gptq_v2")
    model.sqft_format = format


def save_packed(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, max_shard_size: int) -> None:
    """Writes a live packed model and its tokenizer in the format noted on it."""
    layers = packed_layers(model)
    writer = ModelWriter(plan_tensors(model, layers, model.sqft_format), folder, max_shard_size)
    for name, tensor in encoded(model, model.sqft_format):
        writer.add(name, tensor)
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


def packed_config(config: Any) -> dict[str, Any]:
    """``quantization_config`` of a model's config as a dict; empty if there is none."""
    values = getattr(config, "quantization_config", None) or {}
    return dict(values) if isinstance(values, Mapping) else values.to_dict()


def is_packed(folder: str | Path) -> bool:
    """Whether a folder's config says that its weights are quantized in a format that is read here."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        return config["quantization_config"]["quant_method"] in FORMATS
    except (OSError, ValueError, KeyError, TypeError):
        return False


def load_packed(folder: str | Path, dtype: str = "auto") -> PreTrainedModel:
    """A causal language model in eval mode whose packed weights are ``QuantLinear`` layers.

    ``dtype`` of what is not packed. Raises SqftError for a format that is not read, or a file that is incomplete.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    folder = Path(folder)
    check_weights(folder)
    config = AutoConfig.from_pretrained(folder)
    settings = packed_config(config)
    coder = FORMATS[settings["quant_method"]]
    plain = copy.deepcopy(config)
    del plain.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(plain)
    state = _take_packed(model, read_tensors(folder), coder, coder.read_config(settings))
    tied = set(model.all_tied_weights_keys or ())
    result = model.load_state_dict(state, strict=False, assign=True)
    layers = packed_layers(model)
    missing = [n for n in result.missing_keys if n not in tied and n.rpartition(".")[0] not in layers]
    if missing or result.unexpected_keys:
        wrong = f"lacks {missing[0]}" if missing else f"has {result.unexpected_keys[0]}, which the model does not"
        raise SqftError(f"{folder} does not fit its config.json: the checkpoint {wrong}")
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    mark_packed(model, format_option(settings))
    model.name_or_path = str(folder)
    return (model if dtype == "auto" else model.to(DTYPES[dtype])).eval()  # pyright: ignore[reportArgumentType]


def _take_packed(model: nn.Module, tensors: Iterable[tuple[str, Tensor]], coder: Any,
                 settings: Settings) -> dict[str, Tensor]:  # fmt: skip
    """Puts ``QuantLinear`` layers where the checkpoint has packed weights; returns the other tensors."""
    state = dict(tensors)
    modules = dict(model.named_modules())
    for name in [key.removesuffix("." + coder.KEY) for key in state if key.endswith("." + coder.KEY)]:
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise SqftError(f"the checkpoint has {name}.{coder.KEY}, but the model has no linear module there")
        own = {key.rpartition(".")[2]: state.pop(key) for key in [k for k in state if k.rpartition(".")[0] == name]}
        layer = coder.decode(name, own, settings)
        if (layer.in_features, layer.out_features) != (linear.in_features, linear.out_features):
            raise SqftError(f"{name} is [{layer.out_features}, {layer.in_features}] in the checkpoint and "
                            f"[{linear.out_features}, {linear.in_features}] in the model")  # fmt: skip
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    return state


@torch.no_grad()
def unpack_model(model: nn.Module) -> dict[str, QuantLinear]:
    """Puts ``nn.Linear`` layers with the de-quantized weights in the place of packed ones; returns the packed ones.

    The model gives the same results, faster, in the memory of a float model. ``repack`` undoes it.
    """
    layers = packed_layers(model)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    for name, layer in layers.items():
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.in_features, linear.out_features = layer.in_features, layer.out_features
        linear.weight = nn.Parameter(layer.dequantize(dtype).contiguous(), requires_grad=False)
        linear.register_parameter("bias", layer.bias)
        _put(model, name, linear)
    return layers


def repack(model: nn.Module, layers: Mapping[str, QuantLinear]) -> None:
    """Undoes ``unpack_model``."""
    for name, layer in layers.items():
        _put(model, name, layer)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)

"""Everything that can be added from outside, by name: what comes with sqft, and what packages declare as entry points.

A name stands for "module:attribute" (or a module) and is imported when it is first used. A package adds to a registry
by an entry point in its group: ``[project.entry-points."sqft.sparsifiers"] mine = "my_package:mine"``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from sqft.errors import SqftError, UsageError, did_you_mean


class Registry:
    """Names of one kind of thing. ``kind`` is the word used in messages, ``group`` that of entry points."""

    def __init__(self, kind: str, group: str, entries: Mapping[str, str]) -> None:
        self.kind, self.group = kind, group
        self._entries = dict(entries)

    @cached_property
    def _plugins(self) -> dict[str, EntryPoint]:
        """Those of other packages; they do not replace sqft's own."""
        return {point.name: point for point in entry_points(group=self.group) if point.name not in self._entries}

    def __iter__(self) -> Iterator[str]:
        return iter([*self._entries, *self._plugins])

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._plugins

    def __getitem__(self, name: str) -> Any:
        """The registered object. Raises UsageError, with the near miss, for an unknown name, and SqftError for a
        package that does not load."""
        if name in self._entries:
            module, _, attribute = self._entries[name].partition(":")
            found = import_module(module)
            return getattr(found, attribute) if attribute else found
        if name not in self._plugins:
            raise UsageError(f"unknown {self.kind} '{name}': {did_you_mean(name, self)}")
        point = self._plugins[name]
        try:
            return point.load()
        except Exception as error:  # another package's import: anything may happen
            raise SqftError(f"{self.kind} '{name}' ({point.value}) does not load: {error}") from error


class OneOf:
    """Several groups of names as the choices of one option."""

    def __init__(self, *groups: Iterable[str]) -> None:
        self._groups = groups

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for group in self._groups for name in group))


SPARSIFIERS = Registry("sparsity method", "sqft.sparsifiers", {
    "magnitude": "sqft.sparsity.magnitude:magnitude", "wanda": "sqft.sparsity.wanda:wanda",
    "sparsegpt": "sqft.sparsity.sparsegpt:sparsegpt",
})  # fmt: skip
QUANTIZERS = Registry("quantization method", "sqft.quantizers", {
    "gptq": "sqft.quantization.gptq:gptq", "gptaq": "sqft.quantization.gptq:gptaq", "rtn": "sqft.quantization.rtn:rtn",
})  # fmt: skip
_FAMILIES = {  # rows of models/tables.py that several types share
    "LLAMA": ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "stablelm", "cohere",
              "cohere2", "olmo", "olmo2", "olmo3", "granite", "helium", "ernie4_5", "hunyuan_v1_dense", "seed_oss",
              "exaone4", "ministral3", "diffllama", "vaultgemma"),
    "VISION": ("gemma3", "qwen2_5_vl", "llava"), "UNGATED": ("arcee", "apertus", "nemotron"), "GLM": ("glm", "glm4"),
    "BLOOM": ("bloom", "falcon"), "GPT2": ("gpt2", "gpt_bigcode"), "LLAMA4": ("llama4_text",),
    "MOE": ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "gpt_oss", "glm4_moe"),
    "DEEPSEEK": ("deepseek_v2", "deepseek_v3"),
    **{name.upper(): (name,) for name in (
        "phi", "phi3", "opt", "xglm", "biogpt", "gpt_neox", "persimmon", "gptj", "codegen", "gpt_neo", "mpt",
        "starcoder2", "falcon_h1", "bamba", "mamba2", "nemotron_h", "lfm2", "granitemoe", "qwen3_next", "jamba",
        "mllama", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text")},
}  # fmt: skip
FAMILIES = Registry("model family", "sqft.families", {  # by config.model_type
    name: f"sqft.models.tables:{row}" for row, names in _FAMILIES.items() for name in names
})  # fmt: skip
FORMATS = Registry("checkpoint format", "sqft.formats", {  # by quantization_config's quant_method
    "gptq": "sqft.formats.gptq:GPTQ", "compressed-tensors": "sqft.formats.compressed_tensors:COMPRESSED_TENSORS",
})  # fmt: skip
EXPORTERS = Registry("exporter", "sqft.exporters", {
    "transformers": "sqft.exporters.transformers:Transformers", "vllm": "sqft.exporters.servers:Vllm",
    "awq": "sqft.exporters.servers:Awq", "mlx": "sqft.exporters.servers:Mlx", "gguf": "sqft.exporters.gguf:Gguf",
    "openvino": "sqft.exporters.openvino:OpenVino", "onnx": "sqft.exporters.onnx:Onnx",
})  # fmt: skip
RUNTIMES = Registry("runtime", "sqft.runtimes", {  # modules with PACKAGE, EXPORT and Session
    "sqft": "sqft.benching.runtimes.own", "transformers": "sqft.benching.runtimes.transformers",
    "openvino": "sqft.benching.runtimes.openvino", "onnx": "sqft.benching.runtimes.onnx",
    "llama.cpp": "sqft.benching.runtimes.llama_cpp", "vllm": "sqft.benching.runtimes.vllm",
})  # fmt: skip
PARTS = Registry("part of the report", "sqft.report_parts", {  # by title: a Section to its Table and Figures
    "Speed": "sqft.benching.table:part",
})  # fmt: skip
KINDS = Registry("adapter", "sqft.adapter_kinds", {
    "sparse-peft": "sqft.adapters.kinds:SPARSE_PEFT", "qa-sparse-peft": "sqft.adapters.kinds:QA_SPARSE_PEFT",
    "lora": "sqft.adapters.kinds:LORA", "sqft": "sqft.adapters.kinds:SQFT", "scales": "sqft.adapters.kinds:SCALES",
    "sparse-full": "sqft.adapters.kinds:SPARSE_FULL",
})  # fmt: skip
TASKS = Registry("task", "sqft.tasks", {  # a Task, a TaskSpec, or the path of a task's YAML file
    "arithmetic": "sqft.tasks.arithmetic:ARITHMETIC",
})  # fmt: skip
KERNELS = Registry("kernel", "sqft.kernels", {  # "operator", or "operator.device" for one type of device
    "masked_weight": "sqft.kernels.reference:masked_weight",
    "masked_gradients": "sqft.kernels.reference:masked_gradients",
    "dequantized": "sqft.kernels.reference:dequantized",
    "quant_aware_weight": "sqft.kernels.reference:quant_aware_weight",
    "quant_aware_gradients": "sqft.kernels.reference:quant_aware_gradients",
    "round_columns": "sqft.kernels.columns:round_columns",
    "masked_weight.cuda": "sqft.kernels.triton.weights:masked_weight",
    "masked_gradients.cuda": "sqft.kernels.triton.gradients:masked_gradients",
    "dequantized.cuda": "sqft.kernels.triton.weights:dequantized",
    "quant_aware_weight.cuda": "sqft.kernels.triton.weights:quant_aware_weight",
    "quant_aware_gradients.cuda": "sqft.kernels.triton.gradients:quant_aware_gradients",
    "round_columns.cuda": "sqft.kernels.triton.columns:round_columns",
    "compact_linear": "sqft.kernels.compact:linear", "compact_linear.cpu": "sqft.kernels.cpu.library:compact_linear",
    "compact_linear.cuda": "sqft.kernels.triton.products:compact_linear",
    "product": "torch.nn.functional:linear", "product.cpu": "sqft.kernels.dispatch:cpu_product",
})  # fmt: skip

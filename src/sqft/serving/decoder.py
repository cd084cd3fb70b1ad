"""One token at a time by the C++ decoder (``kernels/cpu/decoder.h``): transformers reads the prompts, this goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sqft.serving.layers import CompactLinear

# model types whose blocks are RMS norms, rotary positions, grouped-query attention and SwiGLU, in this order
TYPES = ("llama", "mistral", "qwen2", "qwen3")
WEIGHTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
VECTORS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")


class Decoder:
    """A prepared model's decoder, which shares its weights. ``takes`` says whether there is one for a model."""

    def __init__(self, model: Any) -> None:
        config, blocks = model.config, model.model.layers
        self._model, self._inner = model, torch.classes.sqft_cpu.Decoder()
        rotary = model.model.rotary_emb
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        self._inner.configure(heads, config.num_key_value_heads, size, config.rms_norm_eps,
                              float(rotary.attention_scaling), model.model.embed_tokens.weight.detach(),
                              rotary.inv_freq)  # fmt: skip
        for block in blocks:
            for name in WEIGHTS:
                self._add(block.get_submodule(name))
            for name in VECTORS:
                norm = _get(block, name)
                self._inner.add_vector(torch.zeros(0) if norm is None else norm.weight.detach())
        self._inner.add_vector(model.model.norm.weight.detach())
        self._add(model.lm_head)

    @staticmethod
    def takes(model: Any) -> bool:
        config = model.config
        if not isinstance(model.get_output_embeddings(), CompactLinear):  # not prepared, or a base with adapters
            return False
        if config.model_type not in TYPES or getattr(config, "hidden_act", "silu") != "silu":
            return False
        if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
            return False
        if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
            return False
        if "dynamic" in (kind := model.model.rotary_emb.rope_type) or kind == "longrope":  # frequencies by length
            return False
        layers = [block.get_submodule(name) for block in model.model.layers for name in WEIGHTS]
        return all(isinstance(layer, CompactLinear) for layer in layers)

    def _add(self, layer: CompactLinear) -> None:
        bias = torch.zeros(0) if layer.bias is None else layer.bias
        self._inner.add_weight(layer.mask, layer.values, layer.starts, layer.scale, layer.zero, layer.bits, layer.group,
                               bias)  # fmt: skip

    @torch.no_grad()
    def read(self, prompts: Sequence[Sequence[int]], room: int) -> Tensor:
        """Logits [N, V] after each prompt, which transformers reads; there is room for so many more tokens of each."""
        lengths, longest = [len(prompt) for prompt in prompts], max(map(len, prompts))
        padded_NT = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask_NT = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths])
        out = self._model(input_ids=padded_NT, attention_mask=mask_NT, use_cache=True, logits_to_keep=1,
                          position_ids=(mask_NT.cumsum(-1) - 1).clamp(min=0))  # fmt: skip
        self._inner.reserve(len(prompts), longest + room)
        keys, values = self._inner.keys(), self._inner.values()
        for index, layer in enumerate(out.past_key_values.layers):
            for row, length in enumerate(lengths):
                keys[index, row, :, :length] = layer.keys[row, :, longest - length :]
                values[index, row, :, :length] = layer.values[row, :, longest - length :]
        return out.logits[:, -1].float()

    def step(self, rows: list[int], tokens: list[int], positions: list[int]) -> Tensor:
        """Logits [T, V] after a token of each of T prompts (``rows``), at the position after those that were read."""
        return self._inner.step(rows, tokens, positions)

    def generate(self, prompts: Sequence[Sequence[int]], most: int, pick: Callable[[Tensor], int],
                 stop: set[int]) -> Iterator[dict[int, int]]:  # fmt: skip
        """Up to ``most`` times the next token of each prompt by its number, ``pick(logits_V)``; a prompt that got a
        token of ``stop`` is done."""
        logits_NV, rows = self.read(prompts, most), list(range(len(prompts)))
        for number in range(most):
            tokens = {row: pick(logits_V) for row, logits_V in zip(rows, logits_NV, strict=True)}
            yield tokens
            rows = [row for row, token in tokens.items() if token not in stop]
            if not rows or number + 1 == most:
                return
            logits_NV = self.step(rows, [tokens[row] for row in rows], [len(prompts[row]) + number for row in rows])


def _get(module: nn.Module, name: str) -> Any:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None

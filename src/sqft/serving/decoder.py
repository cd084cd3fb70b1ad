"""One token at a time by the C++ decoder (``kernels/cpu/decoder.h``): transformers reads the prompt, this goes on."""

from __future__ import annotations

from collections.abc import Iterator
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
    def read(self, tokens_1T: Tensor, room: int) -> Tensor:
        """Logits [V] after the prompt, which transformers reads; there is room for so many more tokens."""
        length = tokens_1T.shape[1]
        self._inner.reserve(length + room)
        out = self._model(input_ids=tokens_1T, use_cache=True, logits_to_keep=1)
        keys, values = self._inner.keys(), self._inner.values()
        for index, layer in enumerate(out.past_key_values.layers):
            keys[index, :, :length] = layer.keys[0]
            values[index, :, :length] = layer.values[0]
        return out.logits[0, -1].float()

    def step(self, token: int, position: int) -> Tensor:
        """Logits [V] after a token at a position, the next after those that were read."""
        return self._inner.step(token, position)

    def generate(self, tokens_1T: Tensor, most: int, pick: Any, stop: set[int]) -> Iterator[int]:
        """Up to ``most`` tokens, each ``pick(logits)``, until one of ``stop``, which is the last."""
        logits, position = self.read(tokens_1T, most), tokens_1T.shape[1]
        for number in range(most):
            token = pick(logits)
            yield token
            if token in stop or number + 1 == most:
                return
            logits = self.step(token, position)
            position += 1


def _get(module: nn.Module, name: str) -> Any:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None

"""One row a model family: where its decoder blocks are and which linear weights a block has.

To add a family, add a row (and a pico model in ``tests/pico.py``); ``discover.describe`` checks the row against the
live model, so a wrong row is an error and never a silently skipped weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """``linears`` are a block's linear modules in execution order, named relative to the block.

    ``targets`` are the names of the modules that adapters go to by default: the paper's q, k, v, up and down, or what
    holds them where a family fuses them. ``fused`` maps a usual name to the module that holds it here.
    """

    model_types: tuple[str, ...]
    blocks: str
    linears: tuple[str, ...]
    targets: tuple[str, ...]
    fused: dict[str, str] = field(default_factory=dict)


ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")  # they share a rank, where ranks are elastic
_LLAMA_LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
_LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")

FAMILIES = (
    Family(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3"),
        blocks="model.layers",
        linears=_LLAMA_LINEARS,
        targets=_LLAMA_TARGETS,
    ),
    Family(
        ("phi3",),
        blocks="model.layers",
        linears=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
        targets=("qkv_proj", "gate_up_proj", "down_proj"),
        fused={
            "q_proj": "qkv_proj",
            "k_proj": "qkv_proj",
            "v_proj": "qkv_proj",
            "gate_proj": "gate_up_proj",
            "up_proj": "gate_up_proj",
        },
    ),
    Family(
        ("opt",),
        blocks="model.decoder.layers",
        linears=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"),
        targets=("q_proj", "k_proj", "v_proj", "fc1", "fc2"),
        fused={"o_proj": "out_proj", "up_proj": "fc1", "down_proj": "fc2"},
    ),
    Family(
        ("bloom",),
        blocks="transformer.h",
        linears=(
            "self_attention.query_key_value",
            "self_attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        ),
        targets=("query_key_value", "dense_h_to_4h", "dense_4h_to_h"),
        fused={
            "q_proj": "query_key_value",
            "k_proj": "query_key_value",
            "v_proj": "query_key_value",
            "o_proj": "dense",
            "up_proj": "dense_h_to_4h",
            "down_proj": "dense_4h_to_h",
        },
    ),
)

BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}

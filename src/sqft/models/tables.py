"""One row a model family: where its decoder blocks are and which linear weights a block has.

To add a family, add a row, its model types to ``registry.FAMILIES`` (or, from another package, an entry point in the
group ``sqft.families``) and a pico model in ``tests/pico.py``; ``discover.describe`` checks the row against the live
model, so a wrong row is an error and never a silently skipped weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """``linears`` are a block's linear modules in execution order, named relative to the block.

    ``targets`` are the names of the modules that adapters go to by default: the paper's q, k, v, up and down, or what
    holds them where a family fuses them. ``fused`` maps a usual name to the module that holds it here.
    """

    name: str
    blocks: str
    linears: tuple[str, ...]
    targets: tuple[str, ...]
    fused: dict[str, str] = field(default_factory=dict)


ATTENTION_INPUTS: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")  # they share a rank, where ranks are elastic
_LLAMA_LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
LLAMA = Family("llama", "model.layers", _LLAMA_LINEARS, ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"))
PHI3 = Family(
    "phi3", "model.layers",
    linears=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    targets=("qkv_proj", "gate_up_proj", "down_proj"),
    fused=dict.fromkeys(ATTENTION_INPUTS, "qkv_proj") | {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"},
)  # fmt: skip
OPT = Family(
    "opt", "model.decoder.layers",
    linears=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"),
    targets=("q_proj", "k_proj", "v_proj", "fc1", "fc2"),
    fused={"o_proj": "out_proj", "up_proj": "fc1", "down_proj": "fc2"},
)  # fmt: skip
BLOOM = Family(
    "bloom", "transformer.h",
    linears=("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    targets=("query_key_value", "dense_h_to_4h", "dense_4h_to_h"),
    fused=dict.fromkeys(ATTENTION_INPUTS, "query_key_value")
    | {"o_proj": "dense", "up_proj": "dense_h_to_4h", "down_proj": "dense_4h_to_h"},
)  # fmt: skip

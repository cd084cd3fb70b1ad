"""One row a model family: where its decoder blocks are and which linear weights a block has.

To add a family, add a row, its model types to ``registry.FAMILIES`` (or, from another package, an entry point in the
group ``sqft.families``) and a pico model in ``tests/pico.py``; ``discover.describe`` checks the row against the live
model, so a wrong row is an error and never a silently skipped weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Family:
    """``linears`` are the linear modules of every block in execution order, named relative to the block; ``either`` are
    those of blocks that differ: lists of which a block has each as a whole or not at all. A ``*`` stands for every
    expert. ``kept`` are linear modules that no stage touches: routers, and what makes a state.

    ``targets`` are the names of the modules that adapters go to by default: the paper's q, k, v, up and down, or what
    holds them where a family fuses them. ``fused`` maps a usual name to the module that holds it here. ``banned`` are
    modules that PEFT does not adapt. ``cross_attention`` is the module by which some blocks attend to an image: text
    does not run these blocks, and they stay whole.
    """

    name: str
    blocks: str
    linears: tuple[str, ...]
    targets: tuple[str, ...]
    fused: dict[str, str] = field(default_factory=dict)
    either: tuple[tuple[str, ...], ...] = ()
    banned: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    cross_attention: str = ""


ATTENTION_INPUTS: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")  # they share a rank, where ranks are elastic


def _in(parent: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{parent}.{name}" for name in names)


_ATTENTION = _in("self_attn", *ATTENTION_INPUTS, "o_proj")
_GATED = _in("mlp", "gate_proj", "up_proj", "down_proj")
_USUAL = (*ATTENTION_INPUTS, "up_proj", "down_proj")
_FC = (*ATTENTION_INPUTS, "fc1", "fc2")
_FC_NAMES = {"up_proj": "fc1", "down_proj": "fc2"}

LLAMA = Family("llama", "model.layers", _ATTENTION + _GATED, _USUAL)
VISION = replace(LLAMA, name="vision-language", blocks="model.language_model.layers")  # not what it sees with
MLLAMA = replace(VISION, name="mllama", cross_attention="cross_attn")
UNGATED = Family("ungated", "model.layers", _ATTENTION + _GATED[1:], _USUAL)
STARCODER2 = Family(
    "starcoder2", "model.layers", _ATTENTION + _in("mlp", "c_fc", "c_proj"), (*ATTENTION_INPUTS, "c_fc", "c_proj"),
    fused={"up_proj": "c_fc", "down_proj": "c_proj"},
)  # fmt: skip
GLM = Family(
    "glm", "model.layers", _ATTENTION + _in("mlp", "gate_up_proj", "down_proj"),
    (*ATTENTION_INPUTS, "gate_up_proj", "down_proj"),
    fused={"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"},
)  # fmt: skip
PHI = Family(
    "phi", "model.layers", _in("self_attn", *ATTENTION_INPUTS, "dense") + _in("mlp", "fc1", "fc2"), _FC,
    fused={"o_proj": "dense", **_FC_NAMES},
)  # fmt: skip
PHI3 = Family(
    "phi3", "model.layers",
    _in("self_attn", "qkv_proj", "o_proj") + _in("mlp", "gate_up_proj", "down_proj"),
    ("qkv_proj", "gate_up_proj", "down_proj"),
    fused=dict.fromkeys(ATTENTION_INPUTS, "qkv_proj") | {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"},
)  # fmt: skip
OPT = Family(
    "opt", "model.decoder.layers", (*_in("self_attn", *ATTENTION_INPUTS, "out_proj"), "fc1", "fc2"), _FC,
    fused={"o_proj": "out_proj", **_FC_NAMES},
)  # fmt: skip
XGLM, BIOGPT = replace(OPT, name="xglm", blocks="model.layers"), replace(OPT, name="biogpt", blocks="biogpt.layers")
BLOOM = Family(
    "bloom", "transformer.h",
    _in("self_attention", "query_key_value", "dense") + _in("mlp", "dense_h_to_4h", "dense_4h_to_h"),
    ("query_key_value", "dense_h_to_4h", "dense_4h_to_h"),
    fused=dict.fromkeys(ATTENTION_INPUTS, "query_key_value")
    | {"o_proj": "dense", "up_proj": "dense_h_to_4h", "down_proj": "dense_4h_to_h"},
)  # fmt: skip
GPT_NEOX = replace(BLOOM, name="gpt_neox", blocks="gpt_neox.layers",
                   linears=_in("attention", "query_key_value", "dense") + BLOOM.linears[2:])  # fmt: skip
PERSIMMON = replace(BLOOM, name="persimmon", blocks="model.layers",
                    linears=_in("self_attn", "query_key_value", "dense") + BLOOM.linears[2:])  # fmt: skip
GPT2 = Family(  # of GPT-2 they are Conv1D, of GPT-BigCode Linear
    "gpt2", "transformer.h", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    ("attn.c_attn", "mlp.c_fc", "mlp.c_proj"),
    fused=dict.fromkeys(ATTENTION_INPUTS, "c_attn")
    | {"o_proj": "attn.c_proj", "up_proj": "c_fc", "down_proj": "mlp.c_proj"},
)  # fmt: skip
GPTJ = Family(
    "gptj", "transformer.h", _in("attn", *ATTENTION_INPUTS, "out_proj") + _in("mlp", "fc_in", "fc_out"),
    (*ATTENTION_INPUTS, "fc_in", "fc_out"),
    fused={"o_proj": "out_proj", "up_proj": "fc_in", "down_proj": "fc_out"},
)  # fmt: skip
CODEGEN = replace(
    GPTJ, name="codegen", linears=_in("attn", "qkv_proj", "out_proj") + GPTJ.linears[4:],
    targets=("qkv_proj", "fc_in", "fc_out"), fused=GPTJ.fused | dict.fromkeys(ATTENTION_INPUTS, "qkv_proj"),
)  # fmt: skip
GPT_NEO = Family(
    "gpt_neo", "transformer.h", _in("attn.attention", *ATTENTION_INPUTS, "out_proj") + _in("mlp", "c_fc", "c_proj"),
    (*ATTENTION_INPUTS, "c_fc", "c_proj"),
    fused={"o_proj": "out_proj", "up_proj": "c_fc", "down_proj": "c_proj"},
)  # fmt: skip
MPT = Family(
    "mpt", "transformer.blocks", _in("attn", "Wqkv", "out_proj") + _in("ffn", "up_proj", "down_proj"),
    ("Wqkv", "up_proj", "down_proj"), fused={**dict.fromkeys(ATTENTION_INPUTS, "Wqkv"), "o_proj": "out_proj"},
)  # fmt: skip

# Hybrids and state-space models: convolutions and what is of the state are no linear weights and stay as they are. PEFT
# does not adapt an output projection that the scan's kernel multiplies by itself.
_MAMBA = _in("mamba", "in_proj", "out_proj")
_FORWARD = _in("feed_forward", "gate_proj", "up_proj", "down_proj")
FALCON_H1 = Family("falcon_h1", "model.layers", _MAMBA + _ATTENTION + _FORWARD, ("in_proj", *_USUAL),
                   banned=("mamba.out_proj",))  # fmt: skip
BAMBA = replace(FALCON_H1, name="bamba", linears=_FORWARD, either=(_MAMBA, _ATTENTION))
MAMBA2 = Family(
    "mamba2", "backbone.layers", _in("mixer", "in_proj", "out_proj"), ("in_proj",), banned=("mixer.out_proj",)
)
NEMOTRON_H = Family(
    "nemotron_h", "model.layers", (), ("in_proj", *_USUAL), banned=("mixer.out_proj",),
    either=(_in("mixer", "in_proj", "out_proj"), _in("mixer", *ATTENTION_INPUTS, "o_proj"),
            _in("mixer", "up_proj", "down_proj"), _in("mixer", "fc1_latent_proj", "fc2_latent_proj"),
            _in("mixer.experts.*", "up_proj", "down_proj"), _in("mixer.shared_experts", "up_proj", "down_proj")),
)  # fmt: skip
LFM2 = Family(
    "lfm2", "model.layers", _in("feed_forward", "w1", "w3", "w2"), ("in_proj", *ATTENTION_INPUTS, "w3", "w2"),
    fused={"o_proj": "out_proj", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    either=(_in("conv", "in_proj", "out_proj"), _in("self_attn", *ATTENTION_INPUTS, "out_proj")),
)  # fmt: skip

# Experts (models/experts.py), in every block or after the first ones; beside them, experts that all tokens take.
_EXPERTS = _in("mlp.experts.*", "gate_up_proj", "down_proj")
_EXPERT_TARGETS = (*_USUAL, "gate_up_proj")
MOE = Family(
    "experts", "model.layers", _ATTENTION, _EXPERT_TARGETS,
    either=(_GATED, _EXPERTS, _in("mlp.shared_expert", "gate_proj", "up_proj", "down_proj"),
            _in("mlp.shared_experts", "gate_proj", "up_proj", "down_proj")),
    kept=("mlp.router", "mlp.shared_expert_gate"),
)  # fmt: skip
GRANITEMOE = replace(MOE, name="granitemoe", either=(_in("block_sparse_moe.experts.*", "gate_up_proj", "down_proj"),))
LLAMA4 = replace(
    MOE, name="llama4", kept=("feed_forward.router",),
    either=(_FORWARD, _in("feed_forward.shared_expert", "gate_proj", "up_proj", "down_proj"),
            _in("feed_forward.experts.*", "gate_up_proj", "down_proj")),
)  # fmt: skip
DEEPSEEK = replace(
    MOE, name="deepseek", linears=_in("self_attn", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    either=(_in("self_attn", "q_proj"), _in("self_attn", "q_a_proj", "q_b_proj"), *MOE.either),
    targets=("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", *_EXPERT_TARGETS[3:]),
)  # fmt: skip
QWEN3_NEXT = replace(
    MOE, name="qwen3_next", linears=(), targets=("in_proj_qkvz", *_EXPERT_TARGETS), banned=("linear_attn.out_proj",),
    either=(_in("linear_attn", "in_proj_qkvz", "out_proj"), _ATTENTION, *MOE.either),
    kept=("linear_attn.in_proj_ba", *MOE.kept),
)  # fmt: skip
JAMBA = Family(
    "jamba", "model.layers", (), ("in_proj", *_EXPERT_TARGETS), banned=("mamba.out_proj",),
    either=(_MAMBA, _ATTENTION, _FORWARD, _in("feed_forward.experts.*", "gate_up_proj", "down_proj")),
    kept=("mamba.x_proj", "mamba.dt_proj", "feed_forward.router"),
)  # fmt: skip

# Later blocks take keys and values of earlier ones; every block takes a vector of its own for each token. What mixes
# AltUp's streams routes; LAuReL's factors, a quarter of a percent of a block, have a rank (64) below a usual group.
GEMMA3N_TEXT = Family(
    "gemma3n", "model.layers",
    _in("self_attn", "q_proj", "o_proj") + _GATED + ("per_layer_input_gate", "per_layer_projection"), _USUAL,
    either=(_in("self_attn", "k_proj", "v_proj"),),
    kept=(*_in("altup", "modality_router", "prediction_coefs", "correction_coefs"),
          *_in("laurel", "linear_left", "linear_right")),
)  # fmt: skip
GEMMA4_TEXT = Family(  # in blocks of full attention values may be the keys; beside the MLP, experts
    "gemma4", "model.layers", _in("self_attn", "q_proj", "o_proj") + _GATED, _EXPERT_TARGETS,
    either=(_in("self_attn", "k_proj"), _in("self_attn", "v_proj"), _in("experts.*", "gate_up_proj", "down_proj"),
            ("per_layer_input_gate", "per_layer_projection")),
    kept=("router.proj",),
)  # fmt: skip
GEMMA3N, GEMMA4 = (replace(row, blocks=VISION.blocks) for row in (GEMMA3N_TEXT, GEMMA4_TEXT))

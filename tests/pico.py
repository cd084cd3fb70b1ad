"""Pico models of every family, built on the spot: no network, a few thousand weights, every structural feature."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from sqft.models.dense import auto_class

VOCABULARY = 260  # 256 bytes and four special tokens

_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 258, "bos_token_id": 257, "eos_token_id": 256}
_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "max_position_embeddings": 512, **_TOKENS}  # fmt: skip
_HEAD = {"head_dim": 8}
FAMILIES: dict[str, dict[str, object]] = {  # on which every test of families runs
    "llama": {**_SIZES, "tie_word_embeddings": True},
    "mistral": {**_SIZES, "sliding_window": 16},
    "qwen2": {**_SIZES},
    "qwen3": {**_SIZES, **_HEAD},
    "gemma": {**_SIZES, **_HEAD},
    "gemma2": {**_SIZES, **_HEAD, "sliding_window": 16},
    "gemma3_text": {**_SIZES, **_HEAD, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": {**_SIZES},
    "phi3": {**_SIZES, "sliding_window": None},
    "opt": {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32,
            "max_position_embeddings": 512, **_TOKENS},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, **_TOKENS},
}  # fmt: skip
_WIDE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    **_TOKENS,
}  # wide enough for 32:64
_GROUPED = {**_WIDE, "num_key_value_heads": 2}
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_inner": 128, **_TOKENS}
_STATE = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 64,
           "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}  # fmt: skip
_LATENT = {"num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 16,
           "qk_rope_head_dim": 16, "v_head_dim": 16}  # fmt: skip
_SEES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
_LATER = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
          "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 64, "sliding_window": 16}  # fmt: skip
_ROTARY, _HEADS, _SLIDING = {"rotary_dim": 4}, {"head_dim": 16}, {"sliding_window": 16}
_GEMMA3N = {**_GROUPED, **_HEADS, **_LATER, "intermediate_size": [128, 128, 64, 128], "laurel_rank": 8,
            "altup_num_inputs": 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]}  # fmt: skip
_GEMMA4 = {**_GROUPED, **_HEADS, **_LATER, "global_head_dim": 32, "attention_k_eq_v": True,
           "num_global_key_value_heads": 1, "use_double_wide_mlp": True}  # fmt: skip
MORE: dict[str, dict[str, object]] = {  # which go through all stages
    **dict.fromkeys(("gpt_neox", "persimmon", "biogpt", "falcon"), _WIDE),
    **dict.fromkeys(("stablelm", "starcoder2", "cohere", "olmo", "olmo2", "granite", "arcee", "apertus", "phi"), _GROUPED),
    **dict.fromkeys(("glm", "glm4", "helium", "ernie4_5", "hunyuan_v1_dense", "seed_oss", "nemotron", "ministral3", "diffllama"), _GROUPED | _HEADS),
    **dict.fromkeys(("olmo3", "exaone4"), _GROUPED | _SLIDING),
    **dict.fromkeys(("cohere2", "vaultgemma"), _GROUPED | _HEADS | _SLIDING),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), _GPT), **dict.fromkeys(("gptj", "codegen"), _GPT | _ROTARY),
    "gpt_neo": {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 128, "window_size": 16,
                "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 512, **_TOKENS},
    "xglm": {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 128, "max_position_embeddings": 512,
             **_TOKENS},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 512, **_TOKENS},
    "falcon_h1": {**_GROUPED, **_HEADS, **_STATE, "mamba_d_ssm": 128},
    "bamba": {**_GROUPED, **_STATE, "attn_layer_indices": [1]},
    "mamba2": {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1,
               "expand": 2, **_TOKENS},
    "nemotron_h": {**_GROUPED, **_HEADS, "num_hidden_layers": 4, "hybrid_override_pattern": "M*-E", "mamba_num_heads": 8,
                   "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "n_routed_experts": 4,
                   "moe_intermediate_size": 64, "moe_latent_size": 64, "moe_shared_expert_intermediate_size": 64},
    **{name: {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2} for name in ("mixtral", "phimoe", "granitemoe")},
    "olmoe": {**_GROUPED, **_EXPERTS}, "qwen2_moe": {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {**_GROUPED, **_HEADS, **_EXPERTS, "mlp_only_layers": [0]},
    "gpt_oss": {**_GROUPED, **_HEADS, **_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {**_GROUPED, **_HEADS, "num_local_experts": 4, "intermediate_size_mlp": 128,
                    "interleave_moe_layer_step": 2},
    **{name: {**_GROUPED, **_LATENT, **_ROUTED} for name in ("deepseek_v2", "deepseek_v3")},
    "glm4_moe": {**_GROUPED, **_HEADS, **_ROUTED},
    "qwen3_next": {**_GROUPED, **_HEADS, **_EXPERTS, "shared_expert_intermediate_size": 64, "linear_num_key_heads": 2,
                   "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
                   "layer_types": ["linear_attention", "full_attention"]},
    "jamba": {**_GROUPED, **_EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False},
    "gemma3": {"text_config": {**_GROUPED, **_HEADS, **_SLIDING}, "vision_config": {**_SEES, "patch_size": 14},
               "mm_tokens_per_image": 4, "image_token_index": 5},
    "qwen2_5_vl": {"text_config": {**_GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                                   "mrope_section": [2, 3, 3]}},
                   "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
                                     "out_hidden_size": 64, "patch_size": 14},
                   "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7},
    "llava": {"text_config": {**_GROUPED, **_HEADS, "model_type": "llama"}, "image_token_index": 5,
              "vision_config": {**_SEES, "patch_size": 14, "model_type": "clip_vision_model", "projection_dim": 32}},
    "lfm2": {**_GROUPED, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "mllama": {"text_config": {**_GROUPED, "num_hidden_layers": 3, "cross_attention_layers": [1],
                               "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
               "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                                 "num_global_layers": 1, "attention_heads": 2, "vision_output_dim": 64,
                                 "image_size": 28, "patch_size": 14, "intermediate_layers_indices": [0]},
               "image_token_index": 5},
    "gemma3n_text": _GEMMA3N,
    "gemma3n": {"text_config": _GEMMA3N, "image_token_id": 5, "audio_token_id": 6,
                "vision_config": {"architecture": "test_efficientnet", "hidden_size": 32, "vocab_size": 4,
                                  "vocab_offset": VOCABULARY},
                "audio_config": {"hidden_size": 32, "vocab_size": 4, "vocab_offset": VOCABULARY + 4, "input_feat_size": 16,
                                 "conf_num_hidden_layers": 1, "conf_num_attention_heads": 2,
                                 "sscp_conv_channel_size": [4, 4]}},
    "gemma4_text": {**_GEMMA4, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
                    "moe_intermediate_size": 64},
    "gemma4": {"text_config": _GEMMA4, "image_token_id": 5, "video_token_id": 6, "audio_token_id": 7,
               "vision_config": {**_SEES, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4,
                                 "position_embedding_size": 64, "pooling_kernel_size": 2}},
}  # fmt: skip


def here(family: str) -> bool:
    """Whether a model of the family can be made: transformers takes what Gemma 3n sees with from timm."""
    return family != "gemma3n" or find_spec("timm") is not None


def pico_model(
    family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **options: object
) -> PreTrainedModel:
    """A seeded random model of the family; norms, biases and embeddings are random too, so that nothing is neutral.

    ``options`` go into its config.
    """
    config = AutoConfig.for_model(family, **{**FAMILIES, **MORE}[family] | options)
    torch.manual_seed(seed)
    model = auto_class(config).from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def pico_tokenizer(merges: Sequence[tuple[str, str]] = ()) -> PreTrainedTokenizerFast:
    """One token a byte, and one a merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*alphabet, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"eos_token": "<eos>", "bos_token": "<bos>", "pad_token": "<pad>", "unk_token": "<unk>"})
    return fast


def pico_folder(
    path: Path, family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **options: object
) -> Path:
    """The model and tokenizer as a Hugging Face folder."""
    pico_model(family, dtype, seed, **options).save_pretrained(path)
    pico_tokenizer().save_pretrained(path)
    return path

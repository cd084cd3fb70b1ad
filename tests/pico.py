"""Pico models of every family, built on the spot: no network, a few thousand weights, every structural feature."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 260  # 256 bytes and four special tokens

_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 512, "pad_token_id": 258,
          "bos_token_id": 257, "eos_token_id": 256}  # fmt: skip
_HEAD = {"head_dim": 8}
FAMILIES: dict[str, dict[str, object]] = {
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
            "vocab_size": VOCABULARY, "max_position_embeddings": 512, "pad_token_id": 258, "bos_token_id": 257,
            "eos_token_id": 256},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "pad_token_id": 258,
              "bos_token_id": 257, "eos_token_id": 256},
}  # fmt: skip


def pico_model(
    family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **options: object
) -> PreTrainedModel:
    """A seeded random model of the family; norms, biases and embeddings are random too, so that nothing is neutral.

    ``options`` go into its config.
    """
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **options})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def pico_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"eos_token": "<eos>", "bos_token": "<bos>", "pad_token": "<pad>", "unk_token": "<unk>"})
    return fast


def pico_folder(path: Path, family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """The model and tokenizer as a Hugging Face folder."""
    pico_model(family, dtype, seed).save_pretrained(path)
    pico_tokenizer().save_pretrained(path)
    return path

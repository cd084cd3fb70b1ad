"""What a GGUF file says beside its weights: sizes, tokenizer, chat template, in llama.cpp's names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sqft.errors import SqftError
from sqft.exporters.source import Source
from sqft.strict import read_object

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # llama.cpp's, by model_type
# How llama.cpp calls the ways to split text before byte-pair encoding, by what tokenizer.json says.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = ("ByteLevel", True)
SPLITS: dict[tuple[Any, ...], str] = {
    (_BYTES,): "gpt-2", (("Digits", True), _BYTES): "smollm",
    (("Split", _WORDS % r"\p{N}"), ("ByteLevel", False)): "qwen2",
    (("Split", _WORDS % r"\p{N}{1,3}"), ("ByteLevel", False)): "llama-bpe",
}  # fmt: skip
NORMAL, CONTROL, USER, BYTE = 1, 3, 4, 6  # kinds of tokens


def heads_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Attention heads, and those of keys and values."""
    heads = config["num_attention_heads"]
    return heads, config.get("num_key_value_heads") or heads


def write_settings(source: Source, writer: Any) -> None:
    """Adds all keys to a ``gguf.GGUFWriter``; None: only checks. Raises SqftError for what llama.cpp would not do
    as the model does it."""
    config, tokenizer = source.config, _tokenizer(source)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", None):
        raise SqftError(f"rotary embeddings of kind '{kind}' are not written to GGUF yet")
    if config.get("sliding_window") and config.get("use_sliding_window", config["model_type"] == "mistral"):
        raise SqftError("this model has a sliding window, which llama.cpp would not apply: its answers would differ")
    if config.get("hidden_act", "silu") != "silu":
        raise SqftError(f"llama.cpp computes this architecture with silu, and the model with {config['hidden_act']}")
    if writer is None:
        return
    heads, kv_heads = heads_of(config)
    size = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_name(source.reader.folder.resolve().name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(_file_type(source))
    writer.add_quantization_version(2)
    for name, value in tokenizer.items():
        getattr(writer, f"add_{name}")(value)
    _special(source, writer)


def _tokenizer(source: Source) -> dict[str, Any]:
    """What ``GGUFWriter.add_*`` is to be called with."""
    file = source.reader.folder / "tokenizer.json"
    try:
        content = read_object(file)
        model, added = content["model"], {token["id"]: token for token in content.get("added_tokens", [])}
        by_id = {index: token for token, index in model["vocab"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SqftError(f"{file} cannot be read as a byte-pair tokenizer ({error}), and GGUF has to hold it") from None
    by_id |= {index: token["content"] for index, token in added.items()}
    size = source.config["vocab_size"]
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(size)]
    kinds = [CONTROL if index in added and added[index]["special"] else USER if index in added
             else NORMAL if index in by_id else 5 for index in range(size)]  # fmt: skip
    found: dict[str, Any] = {"token_list": tokens, "token_types": kinds}
    if model.get("byte_fallback"):  # SentencePiece's: a merge's rank is its token's score
        made = {_joined(merge): rank for rank, merge in reversed(list(enumerate(model["merges"])))}
        scores = [-float(made.get(token, len(made) + index)) for index, token in enumerate(tokens)]
        found["token_types"] = [BYTE if len(token) == 6 and token.startswith("<0x") else kind
                                for token, kind in zip(tokens, kinds, strict=True)]  # fmt: skip
        spaced = "Prepend" in json.dumps(content.get("normalizer")) or '"prepend_scheme": "first"' in json.dumps(
            content.get("pre_tokenizer"))  # fmt: skip
        return {"tokenizer_model": "llama", "tokenizer_pre": "default", "token_scores": scores,
                "add_space_prefix": spaced, **found}  # fmt: skip
    split = tuple(_steps(content.get("pre_tokenizer") or {}))
    if split not in SPLITS:
        raise SqftError(
            "the tokenizer splits text in a way that has no name here (pre_tokenizer in tokenizer.json), so llama.cpp "
            "would see other tokens: only gpt-2's, smollm's, qwen2's and llama 3's are written"
        )
    return {"tokenizer_model": "gpt2", "tokenizer_pre": SPLITS[split], **found}


def _joined(merge: Any) -> str:
    return "".join(merge.split(" ", 1) if isinstance(merge, str) else merge)


def _steps(pre: Mapping[str, Any]) -> list[tuple[str, Any]]:
    if pre.get("type") == "Sequence":
        return [step for each in pre["pretokenizers"] for step in _steps(each)]
    told = {"ByteLevel": pre.get("use_regex", True), "Digits": pre.get("individual_digits"),
            "Split": (pre.get("pattern") or {}).get("Regex")}  # fmt: skip
    kind = str(pre.get("type"))
    return [(kind, told.get(kind))]


def _special(source: Source, writer: Any) -> None:
    """Merges, special tokens and the chat template, as gguf-py finds them; without a beginning-of-text token by default
    unless the tokenizer adds it."""
    import gguf
    from transformers import AutoTokenizer

    gguf.SpecialVocab(source.reader.folder, load_merges=True, n_vocab=source.config["vocab_size"]).add_to_gguf(
        writer, quiet=True
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(source.reader.folder, trust_remote_code=False)
    begins = bool((ids := tokenizer("a")["input_ids"]) and ids[0] == tokenizer.bos_token_id)
    writer.kv_data[0].pop("tokenizer.ggml.add_bos_token", None)
    writer.add_add_bos_token(begins)


def _file_type(source: Source) -> int:
    """What most weights are, in llama.cpp's numbers: a hint that some readers want."""
    import gguf

    packed = {8: gguf.LlamaFileType.MOSTLY_Q8_0}
    if source.settings is not None:
        return packed.get(source.settings.bits, gguf.LlamaFileType.MOSTLY_Q4_0)
    return gguf.LlamaFileType.MOSTLY_F16

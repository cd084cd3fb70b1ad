"""Which GPU holds which stage of Llama-shaped models of 1, 8 and 70 billion parameters, as ``sqft inspect`` computes it:
the table of docs/scale.md.

    python benchmarks/table_of_gpus.py
"""

from __future__ import annotations

import tempfile

from transformers import AutoConfig

from sqft.inspection import inspect
from sqft.measuring.size import human

COMMON = {"vocab_size": 128256, "dtype": "bfloat16", "num_key_value_heads": 8, "max_position_embeddings": 8192}
MODELS = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}  # fmt: skip


def main() -> None:
    found = {}
    for name, sizes in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            AutoConfig.for_model("llama", **COMMON, **sizes).save_pretrained(folder)
            found[name] = {row["stage"]: row for row in inspect(folder)["gpu"]}
    print("| stage | " + " | ".join(found) + " |")
    print("|---" * (len(found) + 1) + "|")
    for stage in next(iter(found.values())):
        cells = [f"{human(rows[stage]['memory_bytes'])}: {rows[stage]['fits'] or 'none'}" for rows in found.values()]
        print(f"| {stage} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

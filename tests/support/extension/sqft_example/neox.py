"""A model family: GPT-NeoX Japanese."""

from sqft.models.tables import Family

GPT_NEOX = Family(
    "gpt_neox_japanese", "gpt_neox_japanese.layers",
    linears=("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    targets=("query_key_value", "dense_h_to_4h", "dense_4h_to_h"),
)  # fmt: skip

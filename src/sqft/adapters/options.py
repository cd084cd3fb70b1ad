"""Which of ``LoraConfig``'s options go with sqft's layers. Those that are not listed are refused by name."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from peft import LoraConfig

from sqft.errors import UsageError

_ALLOWED = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices",
    "ensure_weight_tying",
}  # fmt: skip
_INITIALISATIONS = (True, False, "gaussian")
_REWRITE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_WHY = {
    "use_dora": "its magnitudes scale the whole weight, not the masked product",
    "lora_bias": "the bias of B is outside the masked product",
    "alora_invocation_tokens": "it acts on some tokens only, so there is no weight to merge",
    "arrow_config": "it routes each token to other adapters, so there is no weight to merge",
    "use_qalora": "use quantization_aware=True",
}


def check_options(config: LoraConfig) -> None:
    """Raises UsageError for an option that sqft's layers would ignore or that would change the base."""
    check_initialisation(config)
    if config.init_lora_weights not in _INITIALISATIONS:
        raise UsageError(f"init_lora_weights='{config.init_lora_weights}' is not made for masked, INT or elastic "
                         "adapters: use True, False or 'gaussian'")  # fmt: skip
    for option in fields(LoraConfig):
        value: Any = getattr(config, option.name)
        if option.name in _ALLOWED or option.name == "init_lora_weights" or value == _default(option):
            continue
        why = _WHY.get(option.name, "their layers do not know it")
        raise UsageError(f"{option.name} does not go with masked, INT or elastic adapters ({why}): leave it out")


def check_initialisation(config: LoraConfig) -> None:
    """Raises UsageError for an option by which PEFT changes the base's weights when the adapter is made."""
    name = str(config.init_lora_weights).lower()
    if name.startswith(_REWRITE) or config.kasa_config is not None:
        option = "kasa_config" if config.kasa_config is not None else f"init_lora_weights='{name}'"
        raise UsageError(f"{option} rewrites the base's weights, which fills the zeros of a sparse model and leaves "
                         "the grid of an INT one: use True, False or 'gaussian'")  # fmt: skip


def _default(option: Any) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()

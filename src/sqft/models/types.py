"""Types of transformers and PEFT, for signatures of modules that do not import these libraries when they are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel as PeftModel
    from transformers import PreTrainedModel as PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    PeftModel = PreTrainedModel = Tokenizer = Any

"""What a model computes on a few fixed tokens: kept beside a trained adapter, so that loading another is noticed.

Merging proves that the merged model equals the adapter that was loaded. The probe proves that what was loaded is what
was trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sqft.calibration.data import token_blocks
from sqft.errors import SqftError, VerificationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "probe.json"
SAMPLE_SHAPE = (4, 64)  # windows and tokens


def sample_tokens(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """int64 [4, 64]: from the built-in text, or seeded random ids without a tokenizer."""
    windows, length = SAMPLE_SHAPE
    if tokenizer is not None:
        return token_blocks(tokenizer, "builtin", windows, length, seed=0)
    return torch.randint(model.config.vocab_size, SAMPLE_SHAPE, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    """Logits [N, T, vocabulary] in eval mode, on the CPU."""
    was_training = model.training
    model.eval()
    out = model(input_ids=tokens.to(next(model.parameters()).device), use_cache=False).logits.cpu()
    model.train(was_training)
    return out


def tolerance(values: Tensor, dtype: torch.dtype) -> float:
    """How far equal computations in another order of summation may lie apart."""
    return (1e-3 if dtype == torch.float32 else 5e-2) * float(values.abs().max())


def write_probe(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the largest logit at each of the sample's positions."""
    largest = logits(model, sample_tokens(model, tokenizer)).float().amax(-1)
    (folder / PROBE).write_text(json.dumps({"largest_logits": largest.tolist()}))


def check_probe(before: Tensor, folder: Path) -> float | None:
    """Compares ``before``, the logits of a loaded adapter on the sample, with the probe that was written beside it.

    Returns the largest difference, None where there is no probe. Raises VerificationError if it is too large.
    """
    path = folder / PROBE
    if not path.is_file():
        return None
    try:
        expected = torch.tensor(json.loads(path.read_text())["largest_logits"])
        difference = float((before.float().amax(-1) - expected).abs().max())
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise SqftError(f"{path} is corrupt ({error}): train again") from None
    allowed = tolerance(expected, before.dtype)
    if not difference <= allowed:
        raise VerificationError(
            f"adapter {folder} does not compute what it did when it was trained (logits differ by {difference:.3g}, "
            f"allowed are {allowed:.3g}): its base or its files have changed"
        )
    return difference

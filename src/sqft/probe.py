"""What a model computes on a few fixed tokens, kept beside a trained adapter: it proves that what was loaded is what
was trained. (Merging proves that the merged model equals the adapter that was loaded.)"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.operations import ConvertOutputsToFp32
from torch import Tensor, nn

from sqft.calibration.data import read_texts, token_blocks
from sqft.errors import SqftError, VerificationError
from sqft.kernels.halves import fast_halves
from sqft.models.types import Tokenizer
from sqft.strict import read_object

PROBE = "probe.json"
SAMPLE_SHAPE = (4, 64)  # windows and tokens


def sample_tokens(model: Any, tokenizer: Tokenizer | None) -> Tensor:
    """int64 [4, 64]: from the built-in text, or seeded random ids without a tokenizer."""
    windows, length = SAMPLE_SHAPE
    if tokenizer is not None:
        return token_blocks(tokenizer, read_texts("builtin"), windows, length, seed=0)
    return torch.randint(
        model.config.get_text_config().vocab_size, SAMPLE_SHAPE, generator=torch.Generator().manual_seed(0)
    )


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    """Logits [N, T, vocabulary] in eval mode, in the weights' own precision, on the CPU."""
    device = next(model.parameters()).device
    with _as_served(model), torch.autocast(device.type, enabled=False):
        return model(input_ids=tokens.to(device), use_cache=False).logits.cpu()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Holds a model in eval mode; afterwards each module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with fast_halves(model):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _as_served(model: nn.Module) -> Iterator[None]:
    """Eval mode, and without the autocast that Accelerate (so Trainer, and TRL) leaves on what it has trained."""
    wrapped = {module: module.forward for module in model.modules() if "_original_forward" in vars(module)}
    for module in wrapped:
        module.forward = _own_forward(module)
    try:
        with evaluating(model):
            yield
    finally:
        for module, forward in wrapped.items():
            module.forward = forward


def _own_forward(module: Any) -> Callable[..., Any]:
    forward = module._original_forward
    while isinstance(getattr(forward, "__wrapped__", None), ConvertOutputsToFp32):  # trained more than once
        inner = forward.__wrapped__.model_forward.__wrapped__
        forward = inner.__get__(module) if hasattr(forward, "__func__") else inner
    return forward


def tolerance(values: Tensor, dtype: torch.dtype) -> float:
    """How far equal computations in another order of summation may lie apart."""
    return (1e-3 if dtype == torch.float32 else 5e-2) * float(values.abs().max())


def probe(model: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    """The largest logit at each of the sample's positions, as ``PROBE`` holds it."""
    return {"largest_logits": logits(model, sample_tokens(model, tokenizer)).float().amax(-1).tolist()}


def write_probe(probed: dict[str, Any], folder: Path) -> None:
    """Writes what ``probe`` gave."""
    (folder / PROBE).write_text(json.dumps(probed))


def check_probe(before: Tensor, folder: Path) -> None:
    """Compares ``before``, the logits of a loaded adapter on the sample, with the probe that was written beside it, if
    there is one. Raises VerificationError if they differ by too much."""
    path = folder / PROBE
    if not path.is_file():
        return
    try:
        expected = torch.tensor(read_object(path, data=True)["largest_logits"])
        difference = float((before.float().amax(-1) - expected).abs().max())
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise SqftError(f"{path} is corrupt ({error}): train again") from None
    allowed = tolerance(expected, before.dtype)
    if not difference <= allowed:
        raise VerificationError(
            f"adapter {folder} does not compute what it did when it was trained (logits differ by {difference:.3g}, "
            f"allowed are {allowed:.3g}): its base or its files have changed"
        )

"""``sqft.generate``: a model of any stage answers a prompt, token by token."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqft.deployment import GenerateConfig
from sqft.errors import UsageError, shown
from sqft.folders import is_adapter, load
from sqft.limits import each
from sqft.models.discover import input_device
from sqft.serving.decoder import Decoder
from sqft.serving.prepare import load_prepared

CHAT_TEMPLATE = "the model's chat template: "


@torch.no_grad()
def generate(model: str | Path, prompt: str, config: GenerateConfig | None = None, *,
             say: Callable[[str], Any] = lambda piece: None) -> dict[str, Any]:  # fmt: skip
    """The answer of a model folder, adapter, .gguf file or hub name, and how fast it came.

    ``say`` gets the text piece by piece. A model is made ready by ``serving.prepare`` first, unless
    ``config.exact``. Raises UsageError for an empty prompt, SqftError for a model that cannot be loaded.
    """
    config = config or GenerateConfig()
    if not prompt.strip():
        raise UsageError("the prompt is empty: there is nothing to answer")
    fast = not (config.exact or is_adapter(model))
    live, tokenizer = (load_prepared if fast else load)(model, dtype=config.dtype, device=config.device)
    tokens = _tokens(tokenizer, prompt, config).to(input_device(live))
    torch.manual_seed(config.seed)
    clock = _Clock(tokenizer, say)
    (_decode if Decoder.takes(live) else _generate)(live, tokenizer, tokens, config, clock)
    return {"text": clock.text, "prompt_tokens": tokens.shape[1], **clock.speed()}


def _generate(model: Any, tokenizer: Any, tokens: Tensor, config: GenerateConfig, clock: _Clock) -> None:
    """By transformers."""
    hot = config.temperature > 0
    sampling = {"do_sample": hot, "temperature": config.temperature if hot else None, "top_k": None,
                "top_p": config.top_p if hot else None}  # fmt: skip
    model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=config.max_new_tokens,
                   streamer=clock, pad_token_id=tokenizer.pad_token_id, **sampling)  # fmt: skip


def _decode(model: Any, tokenizer: Any, tokens: Tensor, config: GenerateConfig, clock: _Clock) -> None:
    """By the C++ decoder."""
    end = model.generation_config.eos_token_id
    stop = set(end if isinstance(end, list) else [end])
    clock.put(tokens)
    chosen = partial(pick, temperature=config.temperature, top_p=config.top_p)
    for found in Decoder(model).generate(tokens.tolist(), config.max_new_tokens, chosen, stop):
        clock.put(torch.tensor([found[0]]))
    clock.end()


def pick(logits_V: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0) -> int:
    """The most probable token, or with a temperature one that is drawn from the ``top_k`` first, and of these from
    those that make up ``top_p``."""
    if not temperature:
        return int(logits_V.argmax())
    logits, order = (logits_V / temperature).sort(descending=True)
    shares = logits[: top_k or None].softmax(-1)
    shares = shares.masked_fill(shares.cumsum(-1) - shares > top_p, 0.0)  # the first one always stays
    return int(order[shares.multinomial(1)])


def _tokens(tokenizer: Any, prompt: str, config: GenerateConfig) -> Tensor:
    """[1, T]: the prompt in the model's chat template, if it has one and is not told otherwise."""
    if tokenizer.chat_template and not config.plain:
        render = partial(tokenizer.apply_chat_template, add_generation_prompt=True, tokenize=False)
        messages = [{"role": "user", "content": prompt}]
        try:
            (text,) = each(lambda: partial(rendered, render), [{"conversation": messages}], CHAT_TEMPLATE)
        except UsageError as error:
            raise UsageError(f"{error}: use --plain") from None
        return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return tokenizer(prompt, return_tensors="pt")["input_ids"]


def rendered(render: Callable[..., str], given: dict[str, Any]) -> str:
    """A chat template's text. Raises UsageError for whatever a stranger's template raises."""
    try:
        return render(**given)
    except (MemoryError, RecursionError):
        raise
    except Exception as error:
        raise UsageError(f"{CHAT_TEMPLATE}it does not work ({shown(error)})") from None


class _Clock:
    """What ``generate`` of transformers gives its tokens to: it says them, and looks at the clock."""

    def __init__(self, tokenizer: Any, say: Callable[[str], Any]) -> None:
        from transformers import TextIteratorStreamer

        self._inner: Any = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._inner.on_finalized_text = self._on_text
        self._say, self.text, self._times = say, "", []

    def _on_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self._say(text)

    def put(self, value: Tensor) -> None:
        self._times.append(time.perf_counter())  # the first is the prompt's
        self._inner.put(value)

    def end(self) -> None:
        self._inner.end()

    def speed(self) -> dict[str, Any]:
        """Tokens, seconds to the first one, and tokens a second after it."""
        first, *later = self._times[1:]
        rate = len(later) / (later[-1] - first) if later else None
        return {"tokens": len(self._times) - 1, "seconds_to_first": round(first - self._times[0], 3),
                "tokens_per_second": rate and round(rate, 2)}  # fmt: skip

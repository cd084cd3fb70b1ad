"""``sqft.serve``: the OpenAI-compatible server of transformers, with a model of any stage plugged in."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from sqft.deployment import ServeConfig
from sqft.errors import SqftError, UsageError
from sqft.folders import is_adapter, load
from sqft.limits import Apart
from sqft.serving.decoder import Decoder
from sqft.serving.generate import CHAT_TEMPLATE, pick, rendered
from sqft.serving.prepare import load_prepared

# What ``_answer`` does not do: such requests go to transformers' own ``generate``.
_OTHERS = ("stop_strings", "sequence_bias", "bad_words_ids", "forced_eos_token_id", "constraints")


def serve(model: str | Path, config: ServeConfig | None = None, *, say: Callable[[str], Any] = print) -> None:
    """Serves ``/v1/chat/completions``, ``/v1/completions`` and ``/v1/models`` until it is interrupted.

    Raises SqftError for a model that cannot be loaded, a port that is taken, or where the server is not installed.
    """
    config = config or ServeConfig()
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise SqftError("serving needs transformers' server: pip install 'sqft[serve]' (fastapi, uvicorn, openai)")
    _check_port(config)
    fast = not (config.exact or is_adapter(model))
    live, tokenizer = (load_prepared if fast else load)(model, dtype=config.dtype, device=config.device)
    if Decoder.takes(live):
        use_decoder(live)
    name = config.name or Path(model).resolve().name.removesuffix(".gguf")
    say(f"serving {name} at http://{config.host}:{config.port}/v1 (Ctrl-C stops)")
    with confined(tokenizer):
        _start(live, tokenizer, name, config)


def _start(live: Any, tokenizer: Any, name: str, config: ServeConfig) -> None:
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager

    class Plugged(model_manager.ModelManager):
        """Has one model, which is there already."""

        @staticmethod
        def process_model_name(model_id: str) -> str:
            return model_id

        def _load_processor(self, *args: Any, **kwargs: Any) -> Any:
            return tokenizer

        def _load_model(self, *args: Any, **kwargs: Any) -> Any:
            return live

        @staticmethod
        def get_gen_models(  # pyright: ignore[reportIncompatibleVariableOverride]
            cache_dir: str | None = None,
        ) -> list[dict[str, Any]]:
            return [{"id": name, "object": "model", "created": 0, "owned_by": "sqft"}]

    original, model_manager.ModelManager = model_manager.ModelManager, Plugged  # where Serve takes it from
    try:
        Serve(force_model=name, device="cpu", host=config.host, port=config.port, log_level="error")
    finally:
        model_manager.ModelManager = original


def _check_port(config: ServeConfig) -> None:
    with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((config.host, config.port))
        except OSError as error:
            raise SqftError(f"cannot listen at {config.host}:{config.port} ({error.strerror or error}): choose another "
                            "--port, or stop what listens there") from None  # fmt: skip


@contextlib.contextmanager
def confined(tokenizer: Any) -> Iterator[None]:
    """Lets ``tokenizer.apply_chat_template`` render within the limits of templates; what goes beyond them, and what the
    template refuses, is a bad request. To be entered before the server has threads."""
    from fastapi import HTTPException

    whole = tokenizer.apply_chat_template
    render = Apart(lambda: partial(rendered, partial(whole, tokenize=False)), CHAT_TEMPLATE)

    def apply(self: Any, conversation: Any, *, return_tensors: str | None = None, return_dict: bool = True,
              tokenize: bool = True, **more: Any) -> Any:  # fmt: skip
        try:
            text = render({"conversation": conversation, **more})
        except UsageError as error:
            raise HTTPException(400, str(error)) from None
        if not tokenize:
            return text
        found = self(text, add_special_tokens=False, return_tensors=return_tensors)
        return found if return_dict else found["input_ids"]

    tokenizer.apply_chat_template = MethodType(apply, tokenizer)
    try:
        yield
    finally:
        tokenizer.apply_chat_template = whole
        render.close()


def use_decoder(live: Any) -> None:
    """Lets ``live.generate`` answer by the C++ decoder what that can: prompts (padded on the left) greedily or by
    temperature, top-p and top-k; the rest stays transformers'."""
    decoder, by_transformers = Decoder(live), live.generate

    @torch.no_grad()
    def generate(self: Any, input_ids: Tensor, generation_config: Any = None, streamer: Any = None,
                 attention_mask: Tensor | None = None, **others: Any) -> Any:  # fmt: skip
        given = generation_config or self.generation_config
        mask_NT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        plain = given.max_new_tokens and (given.num_beams or 1) == 1 and given.repetition_penalty in (None, 1.0) and (
            not any(getattr(given, name, None) for name in _OTHERS) and not set(others) - {"tokenizer"}
            and (mask_NT.diff() >= 0).all() and mask_NT[:, -1].all())  # fmt: skip
        if not plain:
            return by_transformers(input_ids=input_ids, generation_config=generation_config, streamer=streamer,
                                   attention_mask=attention_mask, **others)  # fmt: skip
        chosen = partial(pick, temperature=(given.temperature or 1.0) if given.do_sample else 0.0,
                         top_p=given.top_p or 1.0, top_k=given.top_k or 0)  # fmt: skip
        end = given.eos_token_id if given.eos_token_id is not None else []
        stop = set(end if isinstance(end, list) else [end])
        prompts = [row[mask.bool()].tolist() for row, mask in zip(input_ids, mask_NT, strict=True)]
        fill = given.pad_token_id if given.pad_token_id is not None else min(stop, default=0)
        answers: list[Tensor] = []
        if streamer is not None:
            streamer.put(input_ids)
        for found in decoder.generate(prompts, given.max_new_tokens, chosen, stop):
            answers.append(torch.tensor([found.get(row, fill) for row in range(len(prompts))]))
            if streamer is not None:
                streamer.put(answers[-1])
        if streamer is not None:
            streamer.end()
        return torch.cat([input_ids, torch.stack(answers, -1).to(input_ids.dtype)], -1)

    live.generate = MethodType(generate, live)

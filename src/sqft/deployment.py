"""Options of what is done with a model that is ready: measure, answer, serve, export, pack."""

from __future__ import annotations

from dataclasses import dataclass

from sqft.config import OnDevice
from sqft.errors import UsageError
from sqft.options import check_positive, option
from sqft.registry import EXPORTERS


@dataclass(frozen=True)
class MeasureConfig(OnDevice):
    """Measure what would be served: bytes on disk and decode speed."""

    tokens: int = option(32, "tokens to generate")
    rounds: int = option(3, "times to do so; the median counts")

    def __post_init__(self) -> None:
        check_positive(self, "tokens", "rounds")


@dataclass(frozen=True)
class GenerateConfig(OnDevice):
    """Let a model answer a prompt."""

    max_new_tokens: int = option(256, "stop after N tokens")
    temperature: float = option(0.0, "of sampling; 0: always the most probable token")
    top_p: float = option(1.0, "sample from the most probable tokens that together have this probability")
    seed: int = option(0, "of sampling")
    plain: bool = option(False, "take the prompt as it is, without the model's chat template")
    exact: bool = option(False, "multiply as evaluation does, instead of by the fastest kernels that are here")
    dtype: str = option("auto", "of what is not packed", ("auto", "float32", "bfloat16", "float16"))

    def __post_init__(self) -> None:
        check_positive(self, "max_new_tokens", "top_p")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature is {self.temperature}: it has to be 0 or more")


@dataclass(frozen=True)
class ServeConfig(OnDevice):
    """Serve a model at an OpenAI-compatible address."""

    host: str = option("127.0.0.1", "address to listen at", kind="machine")
    port: int = option(8000, "port to listen at", kind="machine")
    name: str | None = option(None, "what requests call the model; default: the folder's name")
    exact: bool = option(False, "multiply as evaluation does, instead of by the fastest kernels that are here")
    dtype: str = option("auto", "of what is not packed", ("auto", "float32", "bfloat16", "float16"))

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise UsageError(f"port is {self.port}: it has to lie between 1 and 65535")


@dataclass(frozen=True)
class BenchConfig:
    """Measure models in the runtimes that are here."""

    runtimes: list[str] = option(help="some of them; default: all that are installed", factory=list)
    batch: list[int] = option(help="prompts at a time, e.g. 1,4,16", factory=lambda: [1])
    prompt: list[int] = option(help="tokens of a prompt, e.g. 32,512", factory=lambda: [32])
    tokens: int = option(64, "tokens to generate")
    rounds: int = option(3, "times to do so, after one that warms up; the median counts")
    threads: int = option(2, "threads of each runtime")
    text: str | None = option(None, "perplexity of each model too, by sqft: 'builtin', a .txt/.jsonl file or a "
                              "datasets name", kind="text")  # fmt: skip
    max_tokens: int = option(4096, "of the text")
    allow_lossy: bool = option(False, "export to runtimes that cannot hold a model exactly, too")

    def __post_init__(self) -> None:
        check_positive(self, "tokens", "rounds", "threads", "max_tokens")
        for name, values in (("batch", self.batch), ("prompt", self.prompt)):
            if not values or min(values) < 1:
                raise UsageError(f"{name} is {values}: give numbers of 1 or more")


@dataclass(frozen=True)
class ExportConfig:
    """Write a model as another tool wants it."""

    to: str = option("transformers", "for which tool", EXPORTERS)
    allow_lossy: bool = option(False, "write it although the target cannot hold the model exactly")


@dataclass(frozen=True)
class PackConfig:
    """Write a sparse model in compact form."""


@dataclass(frozen=True)
class UnpackConfig:
    """Write a compact model as it was."""

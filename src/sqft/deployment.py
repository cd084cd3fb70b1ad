"""Options of what is done with a model that is ready: measure, answer, serve, export, pack."""

from __future__ import annotations

from dataclasses import dataclass

from sqft.config import OnDevice
from sqft.errors import UsageError
from sqft.options import COUNT, SEED, Options, option
from sqft.registry import EXPORTERS


@dataclass(frozen=True)
class MeasureConfig(OnDevice):
    """Measure what would be served: bytes on disk and decode speed."""

    tokens: int = option(32, "tokens to generate", within=COUNT)
    rounds: int = option(3, "times to do so; the median counts", within=COUNT)


@dataclass(frozen=True)
class GenerateConfig(OnDevice):
    """Let a model answer a prompt."""

    max_new_tokens: int = option(256, "stop after N tokens", within=COUNT)
    temperature: float = option(0.0, "of sampling; 0: always the most probable token", within="[0, 100]")
    top_p: float = option(
        1.0, "sample from the most probable tokens that together have this probability", within="(0, 1]"
    )
    seed: int = option(0, "of sampling", within=SEED)
    plain: bool = option(False, "take the prompt as it is, without the model's chat template")
    exact: bool = option(False, "multiply as evaluation does, instead of by the fastest kernels that are here")
    dtype: str = option("auto", "of what is not packed", ("auto", "float32", "bfloat16", "float16"))


@dataclass(frozen=True)
class ServeConfig(OnDevice):
    """Serve a model at an OpenAI-compatible address."""

    host: str = option("127.0.0.1", "address to listen at", kind="machine")
    port: int = option(8000, "port to listen at", kind="machine", within="[1, 65535]")
    name: str | None = option(None, "what requests call the model; default: the folder's name")
    exact: bool = option(False, "multiply as evaluation does, instead of by the fastest kernels that are here")
    dtype: str = option("auto", "of what is not packed", ("auto", "float32", "bfloat16", "float16"))


@dataclass(frozen=True)
class BenchConfig(Options):
    """Measure models in the runtimes that are here."""

    runtimes: list[str] = option(help="some of them; default: all that are installed", factory=list)
    batch: list[int] = option(help="prompts at a time, e.g. 1,4,16", factory=lambda: [1], within=COUNT)
    prompt: list[int] = option(help="tokens of a prompt, e.g. 32,512", factory=lambda: [32], within=COUNT)
    tokens: int = option(64, "tokens to generate", within=COUNT)
    rounds: int = option(3, "times to do so, after one that warms up; the median counts", within=COUNT)
    threads: int = option(2, "threads of each runtime", within="(0, 1024]")
    text: str | None = option(None, "perplexity of each model too, by sqft: 'builtin', a .txt/.jsonl file or a "
                              "datasets name", kind="text")  # fmt: skip
    max_tokens: int = option(4096, "of the text", within="[2, 1e9]")
    allow_lossy: bool = option(False, "export to runtimes that cannot hold a model exactly, too")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.batch or not self.prompt:
            raise UsageError("batch and prompt are lists of numbers: give one or more, e.g. 1,4")


@dataclass(frozen=True)
class ExportConfig(Options):
    """Write a model as another tool wants it."""

    to: str = option("transformers", "for which tool", EXPORTERS)
    allow_lossy: bool = option(False, "write it although the target cannot hold the model exactly")


@dataclass(frozen=True)
class PackConfig(Options):
    """Write a sparse model in compact form."""


@dataclass(frozen=True)
class UnpackConfig(Options):
    """Write a compact model as it was."""

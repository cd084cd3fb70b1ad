"""One frozen dataclass a stage: the single definition of its options. A field's ``help`` is its flag's help text."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from sqft.errors import UsageError
from sqft.options import COUNT, SEED, Options, check_within, option, parse_pattern, parse_size
from sqft.registry import FORMATS, KINDS, QUANTIZERS, SPARSIFIERS, OneOf

TASK = "a built-in task (gsm8k, say), several (piqa+boolq), or a task's YAML file"
DATA_DIR = "folder with the tasks' data; default: from the hub"
RANKS = "of an elastic adapter: a heuristic (median, say) or a YAML file of ranks; default: the largest"


@dataclass(frozen=True)
class OnDevice(Options):
    """Of stages that compute."""

    device: str = option("auto", "where to compute: cpu, cuda, cuda:1, xpu, mps; auto: an accelerator if there is one",
                         kind="machine")  # fmt: skip


def even(count: int, most: int) -> int:
    """The largest size up to ``most`` of which ``count`` things make whole batches."""
    return next(size for size in range(min(count, most), 0, -1) if count % size == 0)


@dataclass(frozen=True)
class Compressing(OnDevice):
    """Of stages that change a model's weights block by block."""

    calibration: str = option("builtin", "text of activations: builtin, a .txt/.jsonl file, a datasets name, a task; "
                              "several share the blocks: gsm8k+c4.jsonl, gsm8k=1+c4.jsonl=3",
                              kind="texts")  # fmt: skip
    data_dir: str | None = option(None, DATA_DIR, kind="data_dir")
    samples: int = option(128, "number of calibration blocks", within=COUNT)
    length: int = option(512, "tokens a calibration block", within="[2, 1e9]")
    batch_size: int = option(4, "calibration blocks a forward pass", within=COUNT)
    seed: int = option(0, "seed of the choice of calibration blocks", within=SEED)
    spill: str | None = option(None, "a folder, on a disk, that holds the calibration's activations instead of memory",
                               kind="machine")  # fmt: skip
    repair: str = option("none", "let the weights that stay make good what is changed: in each layer's outputs or, by "
                         "training after that, each block's (sparsify)", ("none", "layer", "block"))  # fmt: skip
    dtype: str = option("auto", "of the written float weights", ("auto", "float32", "bfloat16", "float16"))


# Of 'sparsify --then quantize' they are for both, unless given again.
SHARED = tuple(spec.name for spec in fields(Compressing) if spec.name != "repair")


@dataclass(frozen=True)
class SparsifyConfig(Compressing):
    """Prune the decoder's linear weights. Embeddings and the language-model head are never touched."""

    method: str = option("wanda", "pruning criterion", SPARSIFIERS)
    sparsity: float = option(0.5, "share of every weight matrix to prune, in (0, 1); per output row", within="(0, 1)")
    pattern: str | None = option(None, "N:M, e.g. 2:4 keeps 2 of every 4 neighbours; replaces --sparsity")
    mask: str | None = option(None, "instead of a method, masks that are there: a .safetensors file of them, or "
                              "the folder of a sparse model", kind="folder")  # fmt: skip
    overrides: dict[str, float] = option(help="module pattern=sparsity, e.g. '*.down_proj=0.4'", factory=dict)
    exclude: list[str] = option(help="module patterns that stay dense, e.g. 'model.layers.0.*'", factory=list)
    repair_epochs: int = option(8, "repair block: the most passes over the calibration text a block", within=COUNT)
    repair_rate: float = option(1e-3, "repair block: learning rate", within="(0, 10]")
    repair_precision: str = option("auto", "repair block: of products; auto follows the weights", ("auto", "bfloat16"))

    def __post_init__(self) -> None:
        for name, value in self.overrides.items():
            check_within(f"override '{name}'", value, "(0, 1)")
        if self.pattern is not None:
            parse_pattern(self.pattern)
        super().__post_init__()


@dataclass(frozen=True)
class QuantizeConfig(Compressing):
    """Quantize the decoder's linear weights to integers. Every pruned weight stays exactly zero."""

    method: str = option("gptq", "how to round (rtn: to nearest; gptaq: towards the un-quantized model's outputs)",
                         QUANTIZERS)  # fmt: skip
    bits: int = option(4, "bits a weight: 2, 3, 4 or 8", within="[2, 8]")
    group_size: int | None = option(None, "neighbours that share a scale: 32, 64, 128, or -1 for a whole row; default: "
                                    "the largest of 128, 64, 32 that divides every width",
                                    within="[-1, 128]")  # fmt: skip
    symmetric: bool = option(False, "zero points in the middle, instead of where minimum and maximum put them")
    clip: str = option("mse", "clip the largest weights where that gives the least error (mse: of weights, hessian: of "
                       "outputs), or never", ("none", "mse", "hessian"))  # fmt: skip
    scale_bits: int = option(
        7, "round scales to N significant bits: 7 are exact in every export, 11 are float16's", within="[1, 11]"
    )
    min_zero: int = option(
        1, "smallest zero point of asymmetric grids: 1 for kernels that store zero - 1, or 0", within="[0, 1]"
    )
    act_order: bool = option(True, "quantize the most active inputs first (groups stay contiguous)")
    true_sequential: bool = option(True, "quantize o after q,k,v with the inputs that these then give, and so on")
    keep_fractions: bool = option(False, "write what rounding took away of each weight (a byte) beside the masks; "
                                  "training of qa-sparse-peft then starts from it")  # fmt: skip
    exclude: list[str] = option(help="module patterns that stay float, e.g. 'model.layers.0.*'", factory=list)
    embeddings: str = option("auto", "what embeddings and head are stored in; auto: half precision (float32 is rounded "
                             "to float16); int8: that, and every row integers times a scale, which compact folders and "
                             "GGUF store in a byte", ("auto", "keep", "float16", "bfloat16", "int8"))  # fmt: skip
    format: str = option("auto", "of the checkpoint; auto: gptq (v1) if symmetric, else compressed-tensors",
                         OneOf(("auto", "gptq_v2"), FORMATS))  # fmt: skip

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise UsageError(f"bits is {self.bits}: choose 2, 3, 4 or 8")
        if self.group_size not in (None, 32, 64, 128, -1):
            raise UsageError(f"group_size is {self.group_size}: choose 32, 64, 128, or -1 for a whole row")
        if self.format == "gptq" and not self.symmetric:
            raise UsageError("format gptq (v1) is for symmetric grids: other tools refuse asymmetric v1; use gptq_v2")
        if self.repair == "block":
            raise UsageError("repair block trains float weights: give it to sparsify, and repair layer to quantize")
        super().__post_init__()


@dataclass(frozen=True)
class TrainConfig(OnDevice):
    """Fine-tune low-rank adapters with the paper's defaults (SQFT, appendix: rank 32, alpha 64, q,k,v,up,down)."""

    adapter: str = option("sparse-peft", "masked adapters on a float or (qa-) a packed base, which merge; LoRA on a "
                          "float (lora) or packed (sqft) base, which does not; or none: sparse-full trains the kept "
                          "weights of a float model, of a dense one all, and writes a model", KINDS,
                          alias="pipeline")  # fmt: skip
    base: str | None = option(None, "qa-sparse-peft: folder of the sparse model before quantization (in a recipe: "
                              "sparsify), to add the adapter to instead of what the integers mean",
                              kind="folder")  # fmt: skip
    mask: str | None = option(None, "zeros: take the zeros of a packed model that has no masks as pruned", ("zeros",))
    units: str = option("weight", "qa-sparse-peft: what the adapter counts in, weights or steps of the grid",
                        ("weight", "step"))  # fmt: skip
    learn_scales: bool = option(False, "qa-sparse-peft: train the grid's scales too")
    scale_learning_rate: float | None = option(None, "of the scales; default: a tenth of learning_rate (of adapter "
                                               "scales, all of it)", within="(0, 10]")  # fmt: skip
    start_from: str | None = option(None, "folder of an adapter of the same rank and modules, whose weights to start "
                                    "from, say of one that was trained on the float model", kind="folder")  # fmt: skip
    task: str | None = option(None, TASK, kind="task")
    data_dir: str | None = option(None, DATA_DIR, kind="data_dir")
    data: str | None = option(None, "instead of a task: a .txt/.jsonl file or a datasets name", kind="text")
    prompt: str = option("", "template over a record's fields, e.g. 'Question: {question}\\nAnswer:'")
    completion: str = option("{text}", "template of what is to be learnt, e.g. ' {answer}'")
    eval_data: str | None = option(None, "file or datasets name to evaluate on while training", kind="text")
    limit: int | None = option(None, "use the first N training examples", within=COUNT)
    eval_limit: int | None = option(200, "use the first N evaluation examples while training", within="[0, 1e9]")
    r: int = option(32, "rank of the adapters; with a search space, its largest is used", within=COUNT)
    search_space: list[int] = option(help="elastic rank (NLS): ranks that sub-adapters may have, e.g. 32,24,16",
                                     factory=list, within=COUNT)  # fmt: skip
    rank_groups: list[str] = option(help="modules that share an elastic rank: 'module', 'layer', or e.g. "
                                    "q_proj+k_proj up_proj=32/16; default: q,k,v share", factory=list)  # fmt: skip
    rank_strategy: str = option("uniform", "ranks of a step: drawn; largest, smallest, drawn in turn; or drawn with a "
                                "preference for large ones", ("uniform", "sandwich", "weighted"))  # fmt: skip
    rank_every: str = option("step", "set ranks anew for each", ("step", "micro-batch"))
    rank_scaling: str = option("largest", "scale sub-adapters of rank r as the largest, by alpha / R, or by their own "
                               "rank, alpha / r", ("largest", "own"))  # fmt: skip
    distill_ranks: bool = option(False, "strategy sandwich: train the largest, the smallest and a drawn sub-adapter in "
                                 "every step, the latter two by the largest's predictions")  # fmt: skip
    lora_alpha: int = option(64, "the adapter is scaled by alpha / r", within=COUNT)
    rslora: bool = option(False, "scale by alpha / sqrt(r) instead (rsLoRA)")
    lora_dropout: float = option(0.0, "dropout on the adapter's input", within="[0, 1)")
    init: str = option("default", "A at random, or along the gradient of the loss on a few batches; B is zero",
                       ("default", "gradient"))  # fmt: skip
    target_modules: list[str] = option(help="modules to adapt; default: the family's q,k,v,up,down; all: all linear "
                                       "weights of the blocks", factory=list)  # fmt: skip
    train_norms: bool = option(False, "train the norms beside the adapters; they are merged too")
    learning_rate: float | None = option(None, "peak learning rate of AdamW; default: 3e-4, of qa-sparse-peft 1e-3, of "
                                         "scales 1e-5, of sparse-full 5e-5", within="(0, 10]")  # fmt: skip
    scheduler: str = option("cosine", "learning-rate schedule", ("cosine", "linear", "constant_with_warmup"))
    warmup_steps: int = option(100, "steps of linear warm-up; at most a tenth of all steps is used", within="[0, 1e9]")
    weight_decay: float = option(0.0, "of AdamW", within="[0, 100]")
    epochs: float = option(3.0, "passes over the data", within="(0, 1e6]")
    max_steps: int = option(-1, "stop after N optimiser steps; -1: after the epochs", within="[-1, 1e9]")
    batch_size: int = option(16, "sequences a step, of all processes together", within=COUNT)
    gradient_accumulation: int = option(1, "steps whose gradients are summed", within=COUNT)
    auto_batch: bool = option(False, "when memory runs out, begin again with half as many sequences at a time, twice "
                              "as often: a step is of the same ones", kind="machine")  # fmt: skip
    parallel: str = option("ddp", "of several processes: each holds the model, or a share of every weight (FSDP2)",
                           ("ddp", "fsdp"), kind="machine")  # fmt: skip
    gradient_checkpointing: bool = option(False, "recompute activations in backward to save memory")
    max_length: int = option(512, "longer sequences are cut", within="[2, 1e9]")
    completion_only: bool = option(True, "no loss on the prompt")
    packing: bool = option(False, "concatenate examples into blocks of max_length")
    group_by_length: bool = option(True, "batch sequences of like length (without packing)")
    precision: str = option("auto", "of products: auto follows the weights", ("auto", "float32", "bfloat16", "float16"))
    attention: str | None = option(None, "how transformers computes attention while training, e.g. eager, which is "
                                   "faster in bfloat16 on a CPU; default: as the model is loaded",
                                   ("eager", "sdpa"))  # fmt: skip
    eval_steps: int = option(0, "evaluate every N steps; 0: at the end of an epoch", within="[0, 1e9]")
    save_steps: int = option(100, "checkpoint every N steps, to resume from after an interruption", within=COUNT)
    logging_steps: int = option(10, "log every N steps", within=COUNT)
    distill: str | None = option(None, "teacher to learn from: a model or adapter folder (dense + LoRA, say), or "
                                 "hub name; in a recipe: model", kind="folder")  # fmt: skip
    distill_loss: float = option(1.0, "weight of the labels' loss beside the teacher's terms", within="[0, 1e6]")
    distill_logits: float = option(1.0, "weight of KL(teacher || model) of the predicted tokens", within="[0, 1e6]")
    distill_blocks: float | None = option(None, "weight of the relative error of the blocks' outputs; default: 1, "
                                          "with a cache 0", within="[0, 1e6]")  # fmt: skip
    distill_temperature: float = option(1.0, "of both distributions in KL", within="(0, 1000]")
    distill_tokens: str = option("all", "KL on all tokens, or on the completion's", ("all", "completion"))
    distill_cache: int = option(0, "keep the teacher's K most probable tokens of every training row on disk, "
                                "computed once, instead of a teacher in memory; 0: no", within="[0, 1e6]")  # fmt: skip
    tensorboard: bool = option(False, "write TensorBoard event files to OUT/logs")
    seed: int = option(42, "seed of initialisation, order and dropout", within=SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_steps == 0:
            raise UsageError("max_steps is 0: give a number of 1 or more, or -1 to stop after the epochs")
        kind = KINDS[self.adapter]
        if (self.base or self.learn_scales or self.units != "weight") and not kind.quantization_aware:
            raise UsageError(f"base, units and learn_scales go with adapter qa-sparse-peft, not {self.adapter}")
        if self.scale_learning_rate and not (self.learn_scales or kind.scales_only):
            raise UsageError("scale_learning_rate goes with learn_scales")
        if self.start_from and self.units != "weight":
            raise UsageError("an adapter to start from counts in weights: leave units out")
        if kind.scales_only and (self.base or self.start_from or self.search_space):
            raise UsageError(f"adapter {self.adapter} trains no factors: leave base, start_from, search_space out")
        if kind.whole:
            default = TrainConfig()
            for name in _OF_LAYERS:
                if getattr(self, name) != getattr(default, name):
                    raise UsageError(f"{name} is about adapters, and {self.adapter} has none: leave it out")
        if self.auto_batch and (self.rank_every == "micro-batch" or self.init == "gradient"):
            raise UsageError("auto_batch cuts the batches that rank_every micro-batch and init gradient go by: leave "
                             "one of them out")  # fmt: skip
        if self.rank_groups and not self.search_space:
            raise UsageError("rank_groups go with a search_space, e.g. 32,24,16")
        if self.rank_scaling != "largest" and not self.search_space:
            raise UsageError("rank_scaling goes with a search_space, e.g. 32,24,16")
        if self.task and self.data:
            raise UsageError("task and data exclude each other: give one of them")
        if self.parallel == "fsdp" and (kind.whole or self.distill or self.distill_ranks or self.init == "gradient"):
            raise UsageError("parallel fsdp trains adapters by labels: distillation, init gradient and adapter "
                             "sparse-full need ddp")  # fmt: skip
        check_distillation(self)


# What says how adapters look: nothing to a kind that trains the weights themselves.
_OF_LAYERS = ("r", "search_space", "rank_groups", "rank_strategy", "rank_every", "rank_scaling", "distill_ranks",
              "lora_alpha", "rslora", "lora_dropout", "init", "start_from", "target_modules",
              "train_norms")  # fmt: skip


def for_kind(config: TrainConfig, adapter: str) -> TrainConfig:
    """The options with another kind of adapter; what does not go with it is the default's, and so is the learning rate
    between factors, whole weights and scales. Raises UsageError for an unknown kind."""
    kind, default = KINDS[adapter], TrainConfig()
    dropped = () if kind.quantization_aware else ("base", "learn_scales", "scale_learning_rate", "units")
    dropped += _OF_LAYERS if kind.whole else ()
    if kind.scales_only:
        dropped += ("base", "start_from", "search_space", "rank_groups", "rank_scaling", "distill_ranks")
    of_another = KINDS[config.adapter]
    if (kind.whole, kind.scales_only) != (of_another.whole, of_another.scales_only):
        dropped += ("learning_rate",)
    return replace(config, adapter=adapter, **{name: getattr(default, name) for name in dropped})


@dataclass(frozen=True)
class SearchConfig(OnDevice):
    """Find the best sub-adapter of an elastic adapter (NLS), by a validation split."""

    strategy: str = option("hill-climb", "a heuristic, or a search", ("maximal", "minimal", "median", "most-frequent",
                           "min-loss", "random", "hill-climb", "nsga2"))  # fmt: skip
    start: str = option("median", "sub-adapter that a search starts from; it also tries the largest and the smallest",
                        ("maximal", "minimal", "median", "most-frequent", "min-loss"))  # fmt: skip
    evaluations: int = option(20, "sub-adapters to try", within=COUNT)
    pick: str = option("best", "of what was tried: best, knee (of the Pareto front) or 'smallest-within 1%'")
    task: str | None = option(None, TASK, kind="task")
    data_dir: str | None = option(None, DATA_DIR, kind="data_dir")
    split: str = option("validation", "split to choose by; the test split is refused")
    limit: int | None = option(100, "score on the first N problems", within=COUNT)
    metric: str = option("accuracy", "accuracy, or loss of the completions (faster, finer)",
                         ("accuracy", "loss"))  # fmt: skip
    cost: str = option("parameters", "what the second axis is: adapter parameters, or seconds of a forward pass",
                       ("parameters", "latency"))  # fmt: skip
    screen: int | None = option(
        None, "score on the first N problems first; go on with the most promising only", within=COUNT
    )
    screen_keep: float = option(0.5, "share of the screened sub-adapters to go on with", within="(0, 1]")
    batch_size: int = option(32, "problems a forward pass", within=COUNT)
    workers: int = option(1, "processes that share the search", kind="machine", within="(0, 1024]")
    storage: str | None = option(None, "keep the trials in journal:PATH or a database (sqlite:///PATH), which other "
                                 "machines may share; default: a journal beside OUT until it is done",
                                 kind="machine")  # fmt: skip
    seed: int = option(0, "of the proposals", within=SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.screen is not None and not self.screen < (self.limit or self.screen + 1):
            raise UsageError(f"screen is {self.screen}: it has to be smaller than limit, {self.limit}")


@dataclass(frozen=True)
class ExtractConfig(Options):
    """Write one sub-adapter of an elastic adapter as an adapter of its own."""

    choice: str = option("median", "a heuristic, a YAML file of ranks, or of a search best, knee, 'smallest-within 1%'",
                         kind="ranks", alias="config")  # fmt: skip


@dataclass(frozen=True)
class MergeConfig(OnDevice):
    """Merge an adapter into its base, verify the result, write one model."""

    ranks: str | None = option(None, RANKS, kind="ranks")
    allow_dense: bool = option(False, "merge plain LoRA although it fills the pruned weights")
    tolerance: float = option(1e-4, "largest difference allowed between merged and un-merged logits", within="[0, 1]")
    max_shard_size: str = option("5GB", "split the weights into files of at most this size")
    compact: bool = option(False, "write the compact form, as 'sqft pack' does")

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_size(self.max_shard_size)


@dataclass(frozen=True)
class EvaluateConfig(OnDevice):
    """Score a model: accuracy on a task, perplexity of a text, or both."""

    task: str | None = option(None, TASK, kind="task")
    data_dir: str | None = option(None, DATA_DIR, kind="data_dir")
    split: str = option("test", "split of the task")
    limit: int | None = option(None, "use the first N problems", within=COUNT)
    text: str | None = option(None, "perplexity of: 'builtin', a .txt/.jsonl file or a datasets name", kind="text")
    length: int = option(1024, "window of the perplexity in tokens", within="[2, 1e9]")
    max_tokens: int | None = option(None, "use the first N tokens of the text", within="[2, 1e9]")
    batch_size: int = option(32, "problems, or windows, a forward pass", within=COUNT)
    unpack: bool = option(True, "hold a packed model's weights de-quantized while scoring: the same results, faster")
    dtype: str = option("auto", "load the weights as", ("auto", "float32", "bfloat16", "float16"))
    ranks: str | None = option(None, RANKS, kind="ranks")
    engine: str = option("quick", "sqft's own scorer of tasks, or lm-evaluation-harness: the same scores and, besides, "
                         "its few-shot examples and results.json", ("quick", "lm-eval"))  # fmt: skip
    fewshot: int = option(
        0, "with engine lm-eval: solved examples of the train split before each problem", within="[0, 1000]"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.task or self.text):
            raise UsageError("nothing to evaluate: give a task (e.g. arithmetic) or a text")
        if self.engine == "lm-eval" and not self.task:
            raise UsageError("engine lm-eval scores tasks: give one (e.g. arithmetic), or leave engine out")
        if self.fewshot and self.engine != "lm-eval":
            raise UsageError("few-shot examples are lm-eval's: add engine lm-eval (--engine lm-eval)")


@dataclass(frozen=True)
class CompareConfig(Options):
    """Which methods a comparison runs, and at which sparsities."""

    sparsities: list[float] = option(help="e.g. 0.3,0.5,0.7; default: that of sparsify", factory=list, within="(0, 1)")
    methods: list[str] = option(help="some of the table's rows; default: all", factory=list)
    reference: str = option("lora", "method whose accuracy the others' is compared with, problem by problem")


def check_distillation(config: TrainConfig) -> None:
    """Raises UsageError for options of distillation that do not go together."""
    weights = (config.distill_loss, config.distill_logits, config.distill_blocks or 0)
    if not max(weights) > 0:
        raise UsageError("distill_loss, distill_logits and distill_blocks are 0: one of them has to be more")
    if config.distill_cache and not config.distill:
        raise UsageError("distill_cache is a number of tokens (32, say) that are kept of a teacher: name one (distill)")
    if config.distill_cache and config.distill_blocks:
        raise UsageError("distill_blocks needs the teacher itself: leave it or distill_cache out")
    if config.distill_ranks and not (config.search_space and config.rank_strategy == "sandwich"):
        raise UsageError("distill_ranks goes with a search_space and rank_strategy sandwich")

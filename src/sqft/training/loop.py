"""The train stage: adapters on a sparse model, or its weights, by Hugging Face's Trainer, resumable in the middle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from sqft import artifact
from sqft.adapters.config import SqftConfig
from sqft.adapters.kinds import Kind, layer_kind
from sqft.adapters.peft_bridge import adapter_layers, attach, start_from
from sqft.config import TrainConfig
from sqft.elastic.handle import RECORDS, Elastic
from sqft.elastic.scheduler import RankScheduler
from sqft.errors import Note, SqftError, UsageError, is_out_of_memory
from sqft.folders import is_adapter, load, write_files
from sqft.formats.checkpoint import packed_layers
from sqft.kernels.dispatch import peak_memory, pick_device, release_memory
from sqft.kernels.halves import fast_halves
from sqft.models.types import Tokenizer
from sqft.models.weights import linear_weights
from sqft.probe import probe, write_probe
from sqft.processes import alone, count, is_main_process, join
from sqft.registry import KINDS
from sqft.sparsity.masks import collect_masks, count_zeros
from sqft.tasks.base import Example
from sqft.training import whole
from sqft.training.callbacks import Attention, Finished, Guard, ProgressBar, Stopwatch, checkpoints, last_checkpoint
from sqft.training.data import TrainingData, collate, load_examples, padding, tokenize_all
from sqft.training.distill import TERMS
from sqft.training.initial import from_gradient
from sqft.training.sharding import gather, held_bytes, is_sharded, shard
from sqft.training.teachers import distillation_of
from sqft.training.trainer import SqftTrainer, share

_TIMES = ("_runtime", "_per_second")  # not the same in two runs
SCALES_SLOWER = 0.1  # the learning rate of scales beside the factors': as NNCF's quantization-aware training


def adapter_config(config: TrainConfig, base: Any) -> SqftConfig:
    """The adapters that a training config asks for; plain LoRA for 'lora'. On an INT base without masks those of
    the quantization-aware kinds change every weight."""
    dense = KINDS[config.adapter].quantization_aware and not collect_masks(base)
    return SqftConfig(
        sparse_adapter=not dense,
        r=config.r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, task_type="CAUSAL_LM",
        target_modules=list(config.target_modules) or None, kind=config.adapter,
        search_space=config.search_space or None, rank_groups=config.rank_groups or None,
        rank_scaling=config.rank_scaling, use_rslora=config.rslora, train_norms=config.train_norms,
        learn_scales=config.learn_scales, units=config.units,
        float_base=str(Path(config.base).absolute()) if config.base else None,
    )  # fmt: skip


def train(model: Any, config: TrainConfig | None = None, data: Sequence[Example] | None = None, *,
          tokenizer: Tokenizer | None = None, eval_data: Sequence[Example] = (),
          out: str | Path | None = None, overwrite: bool = False) -> dict[str, Any]:  # fmt: skip
    """Fine-tunes adapters, or with the adapter kind 'sparse-full' the kept weights themselves.

    Args:
        model: a ``PeftModel`` from ``attach``, or for 'sparse-full' a ``transformers`` model (trained in place; needs
            ``tokenizer``), or the folder of a sparse model (then ``out`` is needed: adapters are attached, trained and
            written there, or the trained model). A folder's training leaves checkpoints beside ``out`` and resumes from
            them after an interruption, with the same result, bit for bit.
        data, eval_data: examples, instead of the config's task or data.

    Returns metrics: loss, eval_loss, steps, seconds, trainable parameters. Raises UsageError for options
    that do not fit the model or data.
    """
    config = config or TrainConfig()
    join()
    training_device(config)
    share(config)
    examples = load_examples(config) if data is None else TrainingData(data, eval_data, {})
    if isinstance(model, (str, Path)):
        if out is None:
            raise UsageError("training a model folder needs an output folder")
        given = {}
        if data is not None:
            given["examples"] = hashlib.sha256(repr([*data, *eval_data]).encode()).hexdigest()
        return _train_folder(str(model), config, examples, given, Path(out), overwrite)
    if config.auto_batch:
        raise UsageError("auto_batch trains a folder, which it can begin anew from: give that, or a smaller batch_size")
    if tokenizer is None or out is not None:
        raise UsageError("a live model is trained in place with its tokenizer, and written with sqft.save")
    if config.parallel == "fsdp" and count() > 1:
        raise UsageError("parallel fsdp would leave a live model in pieces: train its folder, or leave parallel out")
    kind = KINDS[config.adapter]
    if kind.whole != (getattr(model, "peft_config", None) is None):
        raise UsageError(f"this model carries adapters, and adapter {kind.name} trains one without: merge them first"
                         if kind.whole else "this model has no adapters: sqft.attach them first, or train its own "
                         "weights (adapter='sparse-full')")  # fmt: skip
    if kind.whole:
        check_kind(model, kind, "this model")
        config = whole.precision_of(model, config)
    if config.start_from:
        start_from(model, config.start_from)
    with _opened(model, kind), tempfile.TemporaryDirectory() as work:  # Trainer makes it even if it writes nothing
        trainer = make_trainer(model, tokenizer, config, examples, Path(work), checkpoints=False)
        return _run(trainer, model, None, config) | examples.notes


@contextlib.contextmanager
def _opened(model: Any, kind: Kind) -> Iterator[None]:
    """Holds what is not an adapter ready for training; afterwards the model uses its cache as before, which Trainer
    switches off in its config, to be saved."""
    cache = getattr(model.config, "use_cache", None)
    try:
        with whole.trainable(model) if kind.whole else contextlib.nullcontext():
            yield
    finally:
        if cache is not None:
            model.config.use_cache = cache


def _train_folder(source: str, config: TrainConfig, data: TrainingData, given: dict[str, Any], out: Path,
                  overwrite: bool) -> dict[str, Any]:  # fmt: skip
    if config.auto_batch and count() > 1:
        raise UsageError("auto_batch is for one process: the others would not know that memory ran out in one")
    with artifact.stage("train", config, out, source, given=given, overwrite=overwrite) as made:
        if is_adapter(source):
            raise UsageError(f"{source} is an adapter: give the sparse model that it belongs to")
        pieces = 1
        while not _attempt(source, config, data, made, pieces):
            clear_device_cache(garbage_collection=True)
            release_memory()
            pieces = next(n for n in range(2 * pieces, config.batch_size + 1) if config.batch_size % n == 0)
            made.metrics["micro_batch"] = config.batch_size // pieces
            warnings.warn(f"out of memory: again, with {config.batch_size // pieces} sequences at a time and "
                          f"{config.gradient_accumulation * pieces} times a step, which is of the same "
                          f"{config.gradient_accumulation * config.batch_size}", Note, stacklevel=2)  # fmt: skip
    return made.metrics


def _attempt(source: str, config: TrainConfig, data: TrainingData, made: artifact.Writing, pieces: int) -> bool:
    """Trains a folder and writes the result, each batch in ``pieces`` that are accumulated. False if memory ran out,
    and with more pieces it may not."""
    base, tokenizer = load(source, mask=config.mask)
    kind = KINDS[config.adapter]
    check_kind(base, kind, source)
    set_seed(config.seed)
    model: Any = base if kind.whole else attach(base, adapter_config(config, base))
    if config.start_from:
        start_from(model, config.start_from)
    config = whole.precision_of(model, config) if kind.whole else config
    work = made.work("training")
    checkpoint = alone(lambda: _start(work))
    if config.parallel == "fsdp" and count() > 1:
        if checkpoint:
            start_from(model, checkpoint)
        shard(model, training_device(config))
        made.metrics["held_bytes"] = held_bytes(model)
    with _opened(model, kind):
        trainer = make_trainer(model, tokenizer, config, data, work, pieces=pieces)
        if pieces > 1 and not trainer.model_accepts_loss_kwargs:
            raise SqftError("out of memory, and this model's loss is a mean of each piece of a batch: pieces would "
                            "change the result; lower batch_size")  # fmt: skip
        try:
            made.metrics.update(_run(trainer, model, checkpoint and Path(checkpoint), config) | data.notes)
        except (RuntimeError, MemoryError) as error:
            if config.auto_batch and pieces < config.batch_size and is_out_of_memory(error):
                return False
            raise
    probed = {} if kind.whole else probe(model, tokenizer)
    if is_sharded(model):
        gather(model)
    if is_main_process():
        _write(trainer, model, tokenizer, config, work, made, probed)
    return True


def _start(work: Path) -> str | None:
    """The checkpoint to go on from. Those beyond it are removed: Trainer keeps the two of the highest steps, and would
    remove what it writes before them."""
    found = last_checkpoint(work)
    for path in checkpoints(work):
        if path == found:
            break
        shutil.rmtree(path, ignore_errors=True)
    return found and str(found)


def _write(trainer: Trainer, model: Any, tokenizer: Tokenizer, config: TrainConfig, work: Path,
           made: artifact.Writing, probed: dict[str, Any]) -> None:  # fmt: skip
    if KINDS[config.adapter].whole:
        made.metrics.update(whole.write_verified(model, tokenizer, made.folder))
    else:
        write_files(model, tokenizer, made.folder)
        write_probe(probed, made.folder)
    if config.tensorboard:
        shutil.copytree(work / "logs", made.folder, dirs_exist_ok=True)
    _write_logs(trainer, made.folder)


def check_kind(base: nn.Module, kind: Kind, source: str) -> None:
    """Raises UsageError if a kind for packed bases meets a float one, or the other way round."""
    packed = bool(packed_layers(base))
    if packed == kind.packed:
        return
    if packed:
        raise UsageError(f"{source} is an INT model: adapter {kind.name} is for float ones; use qa-sparse-peft "
                         "(merges) or sqft (INT base and float LoRA)")  # fmt: skip
    raise UsageError(f"{source} is a float model: adapter {kind.name} is for INT ones; quantize it first (sqft "
                     "quantize), or use sparse-peft or lora")  # fmt: skip


def _recomputing(config: TrainConfig) -> dict[str, Any]:
    """TrainingArguments of activation checkpointing, by the name that this transformers has for it."""
    if not config.gradient_checkpointing:
        return {}
    new = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def make_trainer(model: Any, tokenizer: Tokenizer, config: TrainConfig, data: TrainingData,
                 work: Path, checkpoints: bool = True, pieces: int = 1) -> Trainer:  # fmt: skip
    """A Hugging Face Trainer with this config; ``work`` takes event files and, unless switched off, checkpoints. Each
    batch is taken in ``pieces``."""
    device = training_device(config)
    rows = tokenize_all(data.examples, tokenizer, config, data.notes)
    eval_rows = tokenize_all(data.evaluation, tokenizer, config) if data.evaluation else None
    rows, distilling = distillation_of(config, model, tokenizer, rows, work, device)
    steps_an_epoch = math.ceil(len(rows) / (config.batch_size * config.gradient_accumulation))
    steps = config.max_steps if config.max_steps > 0 else math.ceil(steps_an_epoch * config.epochs)
    layers = adapter_layers(model)
    kind = next(map(layer_kind, layers.values()), KINDS[config.adapter])
    arguments = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=share(config) // pieces,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation * pieces,
        **_recomputing(config),
        learning_rate=config.learning_rate or kind.learning_rate,
        lr_scheduler_type=config.scheduler,
        warmup_steps=min(config.warmup_steps, steps // 10),
        weight_decay=config.weight_decay,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        bf16=config.precision == "bfloat16",
        fp16=config.precision == "float16",
        # Not "epoch": that evaluates after the checkpoint, and a run resumed from it would not have this evaluation.
        eval_strategy="no" if eval_rows is None else "steps",
        eval_steps=config.eval_steps or steps_an_epoch,
        save_strategy="steps" if checkpoints else "no",
        save_steps=config.save_steps,
        save_total_limit=2,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        report_to=[],
        seed=config.seed,
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        ddp_broadcast_buffers=False,  # all of an INT base, in every step
        ddp_find_unused_parameters=any(".experts." in name for name in layers),  # some get no token
        dataloader_pin_memory=device.type != "cpu",
    )
    callbacks: list[Any] = [Guard(config.learn_scales)]
    if config.attention:
        callbacks.append(Attention(config.attention))
    if layers and Elastic(model).groups:
        callbacks.append(RankScheduler(config.rank_strategy, config.rank_every == "micro-batch", config.seed))
    trainer = SqftTrainer(
        config=config, model=model, args=arguments, train_dataset=rows, eval_dataset=eval_rows, callbacks=callbacks,  # pyright: ignore
        data_collator=partial(collate, fill=padding(tokenizer)), **distilling,
    )  # fmt: skip
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressBar())
    if config.tensorboard and is_main_process():
        trainer.add_callback(_tensorboard(work / "logs"))
    own_rate_of_scales(trainer, kind, config.scale_learning_rate)
    return trainer


def own_rate_of_scales(trainer: Trainer, kind: Kind, rate: float | None) -> None:
    """Makes the optimizer of a model with learnt scales, these in a group of their own: with the learning rate that is
    given, or that goes with the kind, and without weight decay, which would pull a grid to nothing."""
    named = trainer.model.named_parameters()  # pyright: ignore[reportOptionalMemberAccess]
    scales = {id(p): p for name, p in named if ".lora_scales." in name and p.requires_grad}
    if not scales:
        return
    optimizer = trainer.create_optimizer()
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in scales]
    rate = rate or trainer.args.learning_rate * (1 if kind.scales_only else SCALES_SLOWER)
    optimizer.add_param_group({"params": list(scales.values()), "lr": rate, "weight_decay": 0.0})


def training_device(config: TrainConfig) -> torch.device:
    """Raises UsageError for one that is not there, or that does not go with the config's precision."""
    device = pick_device(config.device)
    if config.precision == "float16" and device.type == "cpu":
        raise UsageError("precision float16 needs an accelerator: on a CPU train in bfloat16 or float32")
    return device


def _tensorboard(folder: Path) -> TensorBoardCallback:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("TensorBoard is not installed: pip install tensorboard, or leave --tensorboard out") from None
    return TensorBoardCallback(SummaryWriter(log_dir=str(folder)))


def _run(trainer: Trainer, model: nn.Module, checkpoint: Path | None, config: TrainConfig) -> dict[str, Any]:
    watch = Stopwatch(checkpoint)
    trainer.add_callback(watch)
    with peak_memory() as peak, _forward_kept(model), fast_halves(model):
        try:
            if config.init == "gradient" and checkpoint is None:  # a checkpoint has what it led to
                from_gradient(trainer, config)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except Finished:
            trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
    model.eval()
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return {
        "loss": mean_loss(trainer.state.log_history),
        **{name: mean_loss(trainer.state.log_history, name) for name in TERMS if _is_logged(trainer, name)},
        "eval_loss": evaluations[-1] if evaluations else None,
        "learning_rate": trainer.args.learning_rate,
        "steps": trainer.state.global_step,
        "trainable_parameters": trainable_parameters(model),
        "peak_bytes": peak.bytes,
        "seconds": round(watch.seconds, 2),
    }


def trainable_parameters(model: nn.Module) -> int:
    """Those that a step can change: of a weight that is trained itself the pruned ones do not count."""
    pruned = (weight.mask for weight in linear_weights(model) if not weight.packed and weight.parameter.requires_grad)
    return (sum(p.numel() for p in model.parameters() if p.requires_grad)
            - sum(count_zeros(mask_OI) for mask_OI in pruned if mask_OI is not None))  # fmt: skip


@contextlib.contextmanager
def _forward_kept(model: nn.Module) -> Iterator[None]:
    """Takes off what Accelerate puts around the forward (autocast, float32 logits) and leaves there: a merge and scores
    are in the weights' own precision."""
    names = ("forward", "_original_forward", "_is_accelerate_prepared")
    before = {name: value for name, value in vars(model).items() if name in names}
    try:
        yield
    finally:
        for name in names:
            vars(model).pop(name, None)
        vars(model).update(before)


def _is_logged(trainer: Trainer, name: str) -> bool:
    return any(name in entry for entry in trainer.state.log_history)


def mean_loss(log: Sequence[dict[str, Any]], name: str = "loss") -> float:
    """Of all steps of a whole run, those before an interruption included: an entry is the mean since the one before."""
    total, last = 0.0, 0
    for entry in log:
        if name in entry:  # a sum is a float32
            total += torch.tensor(entry[name] * (entry["step"] - last), dtype=torch.float32).item()
            last = entry["step"]
    return total / last


def _write_logs(trainer: Trainer, folder: Path) -> None:
    """Adds the trainer's log, one JSON object a line, and record of ranks to the folder."""
    entries = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]  # not of a whole run
    kept = ({k: v for k, v in sorted(entry.items()) if not k.endswith(_TIMES)} for entry in entries)
    lines = "".join(json.dumps(entry) + "\n" for entry in kept)
    (folder / "training_log.jsonl").write_text(lines)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, RankScheduler):
            (folder / RECORDS).write_text(json.dumps({"records": callback.records}))

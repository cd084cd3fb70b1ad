"""``sqft.search``: the best sub-adapter of a super-adapter, by a validation split."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

import torch
import transformers
import yaml
from optuna.study import Study

from sqft import artifact
from sqft.adapters.groups import Ranks
from sqft.config import SearchConfig
from sqft.drawing import standalone
from sqft.elastic.handle import Elastic, get_ranks, set_ranks
from sqft.elastic.heuristics import HEURISTICS, Records, heuristic, read_rank_records
from sqft.errors import SqftError, UsageError
from sqft.folders import base_of, is_adapter, load
from sqft.models.infer import allow, allowed
from sqft.models.types import Tokenizer
from sqft.options import recorded
from sqft.outputs import work_folder
from sqft.searching.choose import TRIALS, write_sub_adapter
from sqft.searching.evaluator import Evaluator, Scorer
from sqft.searching.owners import OWNER, Owners
from sqft.searching.picking import Evaluated, pareto_front, pick
from sqft.searching.plots import plots
from sqft.searching.strategies import SEARCHES, ranks_of
from sqft.searching.study import EVALUATED, PURPOSE, SCREENED, SECONDS, Search, open_study, reachable

logger = logging.getLogger(__name__)


def search(adapter: Any, config: SearchConfig | None = None, scorer: Scorer | None = None, *,
           tokenizer: Tokenizer | None = None, records: Records = (), out: str | Path | None = None,
           overwrite: bool = False) -> Any:  # fmt: skip
    """Searches the best sub-adapter.

    Args:
        adapter: a live super-adapter (``PeftModel``; returns the chosen ranks, and leaves them set), or the folder of
            one (then ``out`` is needed: the chosen sub-adapter is written there, ready to merge, with ``search.json``,
            ``ranks.yaml`` and two plots; returns the metrics). A folder's search that was killed goes on where it was.
        scorer: of a live model: a function of the model that gives a score, instead of the config's task.
        records: of a live model's training (``RankScheduler.records``), for heuristics that need them.

    Raises UsageError if the adapter's rank is fixed, or the split that is searched by shares problems with test.
    """
    config = config or SearchConfig()
    pick([Evaluated(0, {}, 0, 0)], config.pick)  # a wrong one is an error before any work
    if isinstance(adapter, (str, Path)):
        if out is None or scorer is not None:
            raise UsageError("searching an adapter folder needs an output folder, and scores by a task")
        return _search_folder(Path(adapter), config, Path(out), overwrite)
    if out is not None or config.workers > 1 or config.storage:
        raise UsageError("a live model is searched in memory by one process: give its folder for an output, workers or "
                         "a storage")  # fmt: skip
    searcher = _searcher(open_study, adapter, tokenizer, config, records, scorer)
    before = get_ranks(adapter)
    try:
        searcher.run()
    except BaseException:
        set_ranks(adapter, before)
        raise
    chosen = pick(_points(searcher, config, records), config.pick)
    set_ranks(adapter, chosen.ranks)
    return chosen.ranks


def _searcher(study: Callable[[], Study], model: Any, tokenizer: Tokenizer | None, config: SearchConfig,
              records: Records, scorer: Scorer | None = None,
              owners: Callable[[], Owners | None] = lambda: None) -> Search:  # fmt: skip
    """The search; its storage is opened when all else is known to be right."""
    space = Elastic(model).space
    judge = Evaluator(model, tokenizer, config, space, scorer)
    names = (config.start, "maximal", "minimal") if config.strategy in SEARCHES else (config.strategy,)
    anchors: list[Ranks] = []
    for name in names:
        ranks = heuristic(name, space, records)
        if ranks not in anchors:
            anchors.append(ranks)
    evaluations = config.evaluations if config.strategy in SEARCHES else 1
    return Search(study(), space, config.strategy, anchors, evaluations, config.seed, judge.score, judge.cost,
                  judge.screen if config.screen else None, config.screen_keep, owners())  # fmt: skip


def _study_name(config: SearchConfig, key: str) -> str:
    return artifact.stage_key("search", replace(config, pick="best"), key)[:16]  # pick only looks at what was tried


def trials_folder(out: Path, config: SearchConfig, key: str) -> Path:
    """Where a search of the adapter of this key keeps its trials until it is done."""
    return work_folder(out, "searching", _study_name(config, key))


def _search_folder(adapter: Path, config: SearchConfig, out: Path, overwrite: bool) -> dict[str, Any]:
    base = base_of(adapter) if is_adapter(adapter) else ""
    with artifact.stage("search", config, out, adapter, base=base, overwrite=overwrite) as made:
        if not base:
            raise UsageError(f"{adapter} is not an adapter folder: give the folder that 'sqft train' wrote")
        name = _study_name(config, made.manifest.parent_key)
        work = trials_folder(out, config, made.manifest.parent_key)
        url = config.storage or f"journal:{work / 'journal.log'}"
        model, tokenizer = load(adapter, device=config.device)
        records = read_rank_records(adapter)
        with reachable(url):
            searcher = _searcher(partial(open_study, url, name), model, tokenizer, config, records,
                                 owners=partial(Owners, url, work))  # fmt: skip
            owners = cast(Owners, searcher.owners)
            left = owners.take_over(searcher.study)
            if config.workers > 1 and searcher.evaluations > 1:
                _share(adapter, replace(config, storage=url), name, searcher, left, work)
            else:
                searcher.run(left)
            owners.leave()
            points = _points(searcher, config, records)
        chosen = pick(points, config.pick)
        made.metrics.update(_summary(searcher, points, chosen, config), **searcher.space.cost(chosen.ranks))
        _write_trials(made.folder, searcher.study, points, chosen, made.metrics, config)
        write_sub_adapter(model, tokenizer, chosen.ranks, made.folder)
    return made.metrics


def _share(adapter: Path, config: SearchConfig, name: str, searcher: Search, left: list[int], work: Path) -> None:
    """Runs the search in several processes. One that is killed is replaced, as often as there are processes. Raises
    SqftError if one fails."""
    owners = cast(Owners, searcher.owners)
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // config.workers)
    workers: dict[BaseProcess, list[int]] = {}  # and what each has to finish first

    def begin(left: list[int], first: bool = False) -> None:
        worker = context.Process(target=_work, args=(adapter, config, name, left, first, threads, allowed(), work))
        worker.start()
        workers[worker] = left

    begin(left, first=True)
    for _ in range(1, config.workers):
        begin([])
    replaced = 0
    try:
        while workers:
            wait([worker.sentinel for worker in workers])
            for worker in [worker for worker in workers if not worker.is_alive()]:
                left, code = workers.pop(worker), worker.exitcode or 0
                if code > 0 or (code and replaced == config.workers):
                    raise SqftError("a search process failed: the same command goes on with what was tried")
                if code:  # by a signal: memory that ran out, say
                    logger.error("a search process was killed (signal %d): another one takes its place", -code)
                    replaced += 1
                    begin(searcher.unfinished(left) + owners.take_over(searcher.study))
    finally:
        for worker in workers:
            worker.terminate()


def _work(adapter: Path, config: SearchConfig, name: str, left: list[int], first: bool, threads: int,
          infer: bool, work: Path) -> None:  # fmt: skip
    """One process's share of a folder's search; it ends when the process that began it does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    allow(infer)
    transformers.utils.logging.disable_progress_bar()
    try:
        assert config.storage is not None
        model, tokenizer = load(adapter, device=config.device)
        with reachable(config.storage):
            owners = Owners(config.storage, work)
            _searcher(partial(open_study, config.storage, name), model, tokenizer, config, read_rank_records(adapter),
                      owners=lambda: owners).run(left, quiet=not first)  # fmt: skip
            owners.leave()
    except SqftError as error:
        print(f"sqft: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # the parent says so
        sys.exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _points(searcher: Search, config: SearchConfig, records: Records) -> list[Evaluated]:
    """The evaluated configurations, with the heuristics named. Raises SqftError if there is none."""
    known, space = {}, searcher.space
    for name in HEURISTICS:
        if name in ("maximal", "minimal", "median") or name in (config.start, config.strategy):
            known.setdefault(space.encode(heuristic(name, space, records)), name)
    points = [Evaluated(t.number, ranks_of(t), t.values[0], t.values[1], known.get(space.encode(ranks_of(t)), ""))
              for t in searcher.study.get_trials(deepcopy=False)
              if t.values and t.user_attrs.get(PURPOSE) == EVALUATED]  # fmt: skip
    if not points:
        raise SqftError("the search evaluated no configuration: raise --evaluations")
    return points


def _summary(searcher: Search, points: list[Evaluated], chosen: Evaluated, config: SearchConfig) -> dict[str, Any]:
    screened = sum(t.user_attrs.get(PURPOSE) == SCREENED for t in searcher.study.get_trials(deepcopy=False))
    return {
        "score": chosen.score, "cost": chosen.cost, "ranks": chosen.ranks, "trial": chosen.number,
        "configurations": searcher.space.size, "evaluated": len(points), "full_evaluations_saved": screened,
        "scored_on": f"{config.task} {config.split} ({config.metric}, first {config.limit or 'all'} problems)",
    }  # fmt: skip


def _write_trials(folder: Path, study: Study, points: list[Evaluated], chosen: Evaluated, metrics: dict[str, Any],
                  config: SearchConfig) -> None:  # fmt: skip
    noted = {t.number: {k: v for k, v in t.user_attrs.items() if k not in (OWNER, SECONDS)}  # the same in every run
             for t in study.get_trials(deepcopy=False)}  # fmt: skip
    trials = [{"number": t.number, "ranks": ranks_of(t), "values": t.values, **noted[t.number]}
              for t in study.get_trials(deepcopy=False)]  # fmt: skip
    result = {**metrics, "chosen": asdict(chosen), "points": [asdict(p) for p in points], "trials": trials,
              "front": [p.number for p in pareto_front(points)], "config": recorded(config)}  # fmt: skip
    (folder / TRIALS).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "ranks.yaml").write_text(yaml.safe_dump(chosen.ranks, sort_keys=False), encoding="utf-8")
    for name, chart in plots(points, chosen.number, config.metric, config.cost).items():
        (folder / f"{name}.svg").write_text(standalone(chart), encoding="utf-8")

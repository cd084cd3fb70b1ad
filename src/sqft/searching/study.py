"""A search as an Optuna study: stored, so that it resumes after a kill and several processes share it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import DatabaseError, SQLAlchemyError
from tqdm.auto import tqdm

from sqft.adapters.groups import Ranks
from sqft.elastic.handle import SearchSpace
from sqft.errors import SqftError, UsageError, first_line
from sqft.options import without_password
from sqft.searching.owners import Owners
from sqft.searching.strategies import PATIENCE, Exhausted, is_whole, ranks_of, sampler

# What a trial notes besides its ranks and values.
PURPOSE, SECONDS, FIRST = "purpose", "seconds", "score on the first problems"
EVALUATED, SCREENED, REPEATED = "evaluated", "screened out", "repeated"
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SECONDS_TO_DRAW = 5.0  # a process that takes longer to draw its ranks is taken for dead


class Journal(JournalFileBackend):
    """Optuna's, with another way of adding entries. The lock is one that dies with its owner (Optuna's is a link that
    the next one waits half a minute for). What a killed process, or a full disk, left of a last line goes; in the
    middle of a line Ctrl-C waits."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with uninterrupted(), open(self._file_path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
            file.truncate(_whole_lines(file))
            file.seek(0, os.SEEK_END)
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())


def _whole_lines(file: BinaryIO) -> int:
    """Bytes up to the end of the last whole line."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds interrupts back until the end of the block. Only the main thread receives them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = {each: signal.signal(each, lambda number, frame: held.append(number)) for each in _INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if held:
        signal.raise_signal(held[0])


def open_storage(url: str) -> BaseStorage:
    """'journal:PATH' (a file that processes of one machine or network file system share) or a database URL as in
    'sqlite:///PATH'. Raises UsageError if it cannot be opened."""
    try:
        if url.startswith("journal:"):
            path = Path(url.removeprefix("journal:"))
            path.parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(Journal(str(path)))
        return _database(url)
    except Exception as error:  # Optuna and SQLAlchemy raise many kinds
        reason = without_password(first_line(error))
        raise UsageError(f"cannot open storage '{without_password(url)}' ({reason}): write journal:PATH or "
                         "sqlite:///PATH") from None  # fmt: skip


@contextlib.contextmanager
def reachable(url: str) -> Iterator[None]:
    """Raises SqftError when a database server is lost in between."""
    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        cause = error.__cause__
        reason = without_password(first_line(cause if isinstance(cause, Exception) else error))
        raise SqftError(f"the storage {without_password(url)} cannot be reached any more ({reason}): when it is there "
                        "again the same command goes on with what was tried") from error  # fmt: skip


def _database(url: str) -> RDBStorage:
    """Of processes that make a new database's tables at the same time all but one fail, and find them there later."""
    for pause in (0.1, 0.3, 1.0):
        try:
            return RDBStorage(url)
        except DatabaseError:
            time.sleep(pause)
    return RDBStorage(url)


def open_study(url: str | None = None, name: str | None = None) -> Study:
    """The study of that name, made if it is new (in memory without a ``url``): more score and less cost are better."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(storage=open_storage(url) if url else None, study_name=name,
                               directions=["maximize", "minimize"], load_if_exists=True)  # fmt: skip


@dataclass
class Search:
    """One process's part in a study.

    ``score`` gives a configuration's score, ``cost`` what it costs; ``anchors`` are tried first; at most
    ``evaluations`` different configurations are tried by all processes together.

    With ``screen``, a cheap score, only configurations among the best ``keep`` of those screened before them are scored
    in full (successive halving with one rung). ``owners``: of a storage that processes share.
    """

    study: Study
    space: SearchSpace
    strategy: str
    anchors: Sequence[Ranks]
    evaluations: int
    seed: int
    score: Callable[[Ranks], float]
    cost: Callable[[Ranks], float]
    screen: Callable[[Ranks], float] | None = None
    keep: float = 0.5
    owners: Owners | None = None

    def run(self, left: Sequence[int] = (), quiet: bool = False) -> None:
        """Tries configurations until the budget is spent or nothing new is found. ``left``: trials to finish first."""
        budget = min(self.evaluations, self.space.size)
        with tqdm(total=budget, desc="Search", unit="sub-adapter", disable=quiet or None) as bar:
            for number in left:
                self._try(self._resume(number))
            repeated = 0
            while (count := self._count()) < budget and repeated < PATIENCE:
                bar.update(count - bar.n)
                try:
                    repeated = repeated + 1 if self._try(self._ask()) == REPEATED else 0
                except Exhausted:
                    return
            bar.update(self._count() - bar.n)

    def unfinished(self, numbers: Sequence[int]) -> list[int]:
        """Those of the trials that are not finished."""
        trials = self.study.get_trials(deepcopy=False)
        return [number for number in numbers if trials[number].state == TrialState.RUNNING]

    def _count(self, before: int | None = None) -> int:
        """Different configurations that were tried or are being tried."""
        return sum(
            trial.state == TrialState.RUNNING or trial.user_attrs.get(PURPOSE) in (EVALUATED, SCREENED)
            for trial in self.study.get_trials(deepcopy=False)
            if before is None or trial.number < before
        )

    def _ask(self) -> Trial:
        number = len(self.study.get_trials(deepcopy=False))
        self.study.sampler = self._sampler(number)
        trial = self.owners.begin(self.study) if self.owners else self.study.ask()
        if trial.number != number:  # another process came first: draw again, as the number asks for
            trial = self._resume(trial.number)
        return trial

    def _sampler(self, number: int) -> Any:
        return sampler(self.strategy, self.space, self.anchors, number, self.seed, self.evaluations)

    def _resume(self, number: int) -> Trial:
        """A trial that was begun, with the ranks that it had or would have had."""
        self.study.sampler = self._sampler(number)
        frozen = self.study.get_trials(deepcopy=False)[number]
        return Trial(self.study, frozen._trial_id)

    def _try(self, trial: Trial) -> str:
        """Scores one trial and tells the study; returns what became of it."""
        try:
            for group in self.space.groups:
                trial.suggest_categorical(group.name, group.choices)
        except Exhausted:
            self.study.tell(trial, state=TrialState.FAIL)
            raise
        ranks = ranks_of(trial)
        same = any(ranks_of(t) == ranks for t in self._earlier(trial.number))
        if same or self._count(trial.number) >= self.evaluations:
            trial.set_user_attr(PURPOSE, REPEATED)
            self.study.tell(trial, state=TrialState.FAIL)  # complete ones would crowd NSGA-II's population
            return REPEATED
        started = time.perf_counter()
        if self.screen is not None and not self._is_promising(trial, self.screen(ranks)):
            trial.set_user_attr(PURPOSE, SCREENED)
            self.study.tell(trial, state=TrialState.FAIL)
            return SCREENED
        score = self.score(ranks)
        trial.set_user_attr(PURPOSE, EVALUATED)
        trial.set_user_attr(SECONDS, round(time.perf_counter() - started, 3))
        self.study.tell(trial, [score, self.cost(ranks)])
        return EVALUATED

    def _is_promising(self, trial: Trial, value: float) -> bool:
        trial.set_user_attr(FIRST, value)
        others = [t.user_attrs[FIRST] for t in self._earlier(trial.number) if FIRST in t.user_attrs]
        return sum(other > value for other in others) < max(1, self.keep * (len(others) + 1))

    def _earlier(self, number: int) -> Iterator[FrozenTrial]:
        """Trials before one, when each of them has drawn its ranks: then no two processes evaluate the same ones."""
        waited = time.monotonic()
        while True:
            trials = [t for t in self.study.get_trials(deepcopy=False) if t.number < number]
            drawing = [t for t in trials if t.state == TrialState.RUNNING and not is_whole(t, self.space)]
            if not drawing or time.monotonic() - waited > SECONDS_TO_DRAW:
                return iter([t for t in trials if is_whole(t, self.space)])
            time.sleep(0.02)

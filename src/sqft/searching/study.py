"""A search as an Optuna study: stored, so that it resumes after a kill and several processes share it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from tqdm.auto import tqdm

from sqft.adapters.groups import Ranks
from sqft.elastic.handle import SearchSpace
from sqft.errors import UsageError, first_line
from sqft.options import without_password
from sqft.searching.strategies import PATIENCE, Exhausted, is_whole, ranks_of, sampler

# What a trial notes besides its ranks and values.
OWNER, PURPOSE, SECONDS, FIRST = "owner", "purpose", "seconds", "score on the first problems"
EVALUATED, SCREENED, REPEATED = "evaluated", "screened out", "repeated"
SECONDS_TO_DRAW = 5.0  # a process that takes longer to draw its ranks is taken for dead


class Journal(JournalFileBackend):
    """Optuna's, but Ctrl-C waits until an entry is written: in the middle, Optuna's lock would raise another error or
    stay locked."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with uninterrupted():
            super().append_logs(logs)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds an interrupt (SIGINT) back until the end of the block. Only the main thread receives interrupts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        signal.raise_signal(signal.SIGINT)


def open_storage(url: str) -> BaseStorage:
    """'journal:PATH' (a file that processes of one machine or network file system share) or a database URL as in
    'sqlite:///PATH'. Raises UsageError if it cannot be opened."""
    try:
        if url.startswith("journal:"):
            path = Path(url.removeprefix("journal:"))
            path.parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(Journal(str(path)))
        return RDBStorage(url)
    except Exception as error:  # Optuna and SQLAlchemy raise many kinds
        reason = without_password(first_line(error))
        raise UsageError(f"cannot open storage '{without_password(url)}' ({reason}): write journal:PATH or "
                         "sqlite:///PATH") from None  # fmt: skip


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
    in full (successive halving with one rung).
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
        trial = self.study.ask()
        if trial.number != number:  # another process came first: draw again, as the number asks for
            trial = self._resume(trial.number)
        trial.set_user_attr(OWNER, owner())
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


def owner() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def left_over(study: Study) -> list[int]:
    """Trials that a process of this machine began and did not live to finish."""
    numbers = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        host, _, pid = trial.user_attrs.get(OWNER, "").rpartition(":")
        if not host or (host == socket.gethostname() and not _alive(int(pid))):
            numbers.append(trial.number)
    return numbers


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True

"""Which process works on a trial, for all that share a storage: each holds the lock of a file of its own, which the
system lets go of when the process dies, on whatever machine that was."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from optuna.study import Study
from optuna.trial import Trial, TrialState
from sqlalchemy.engine import make_url

from sqft.outputs import hold

OWNER = "owner"


class Owners:
    """Those who work on the trials of one storage, and this process, ``me``, among them.

    Their files lie in one folder, beside the storage's file. A database server has none: there they lie in ``work``,
    and whether those whose file is not there are dead is not known: their trials stay theirs.
    """

    def __init__(self, url: str, work: Path) -> None:
        file = storage_file(url)
        self._all_seen = file is not None
        self._folder = (work / "owners") if file is None else file.with_name(f"{file.name}.owners")
        self.me, self._held = uuid.uuid4().hex, None
        while self._held is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # the last of others just left
                self._held = hold(self._folder / self.me)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """One process at a time: a trial is begun and given an owner in one step."""
        handle = None
        while handle is None:
            handle = hold(self._folder / "lock", wait=True)
        try:
            yield
        finally:
            os.close(handle)

    def begin(self, study: Study) -> Trial:
        """A new trial, which is this process's."""
        with self.alone():
            trial = study.ask()
            trial.set_user_attr(OWNER, self.me)
        return trial

    def take_over(self, study: Study) -> list[int]:
        """Trials that a process began and did not live to finish; they are this one's from now on."""
        with self.alone():
            left = [trial for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
                    if not self._alive(trial.user_attrs.get(OWNER))]  # fmt: skip
            for trial in left:
                study._storage.set_trial_user_attr(trial._trial_id, OWNER, self.me)
        return [trial.number for trial in left]

    def _alive(self, owner: str | None) -> bool:
        if owner is None:  # trials are begun alone
            return False
        if not (self._folder / owner).exists():
            return not self._all_seen
        try:
            handle = hold(self._folder / owner)
        except BlockingIOError:
            return True
        if handle is not None:
            os.close(handle)
        return False

    def leave(self) -> None:
        """When this process's trials are all finished: removes its file, and of the last one the folder."""
        with self.alone():
            (self._folder / self.me).unlink(missing_ok=True)
            if [path.name for path in self._folder.iterdir()] == ["lock"]:
                (self._folder / "lock").unlink()
        if self._held is not None:
            os.close(self._held)
        with contextlib.suppress(OSError):  # others are there
            self._folder.rmdir()


def storage_file(url: str) -> Path | None:
    """The file that a storage keeps its trials in; None for a database server."""
    if url.startswith("journal:"):
        return Path(url.removeprefix("journal:"))
    found = make_url(url)
    return Path(found.database) if found.get_backend_name() == "sqlite" and found.database else None

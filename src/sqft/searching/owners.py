"""Which process works on a trial, for all that share a storage, on whatever machine: each holds a lock of its own."""

from __future__ import annotations

import uuid
from pathlib import Path

from optuna.study import Study
from optuna.trial import Trial, TrialState
from sqlalchemy.engine import make_url

from sqft.searching.locks import Files, Locks, Sessions

OWNER = "owner"


class Owners:
    """Those who work on the trials of one storage, and this process, ``me``, among them.

    They know each other by files beside the storage's file, or by sessions of a PostgreSQL server; by files in ``work``
    with another server: there whether those who work elsewhere are dead is not known, and their trials stay theirs.
    """

    def __init__(self, url: str, work: Path) -> None:
        self.me, file = uuid.uuid4().hex, storage_file(url)
        if file is None and make_url(url).get_backend_name() == "postgresql":
            self._locks: Locks = Sessions(self.me, url)
        else:
            folder = (work / "owners") if file is None else file.with_name(f"{file.name}.owners")
            self._locks = Files(self.me, folder, all_seen=file is not None)

    def begin(self, study: Study) -> Trial:
        """A new trial, which is this process's: it is begun and given an owner in one step."""
        with self._locks.alone():
            trial = study.ask()
            trial.set_user_attr(OWNER, self.me)
        return trial

    def take_over(self, study: Study) -> list[int]:
        """Trials that a process began and did not live to finish; they are this one's from now on."""
        with self._locks.alone():
            running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            owned = [(trial, trial.user_attrs.get(OWNER)) for trial in running]
            left = [trial for trial, owner in owned if owner is None or not self._locks.alive(owner)]
            for trial in left:
                study._storage.set_trial_user_attr(trial._trial_id, OWNER, self.me)
        return [trial.number for trial in left]

    def leave(self) -> None:
        """When this process's trials are all finished."""
        self._locks.leave()


def storage_file(url: str) -> Path | None:
    """The file that a storage keeps its trials in; None for a database server."""
    if url.startswith("journal:"):
        return Path(url.removeprefix("journal:"))
    found = make_url(url)
    return Path(found.database) if found.get_backend_name() == "sqlite" and found.database else None

"""How a search proposes sub-adapters: each strategy is a function of what has been tried and of a seeded generator.
NSGA-II is Optuna's; hill climbing is the paper's (SQFT, arXiv 2410.03750, section 3.2; Shears, arXiv 2404.10934)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler, NSGAIISampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from sqft.adapters.groups import Ranks
from sqft.elastic.handle import SearchSpace

PATIENCE = 200  # draws, or repeated trials, until a strategy gives up finding something new
POPULATION = 16  # of NSGA-II, at most

Tried = Sequence[tuple[Ranks, float | None]]  # configurations in order, and their scores where they have one
Propose = Callable[[SearchSpace, Tried, random.Random], "Ranks | None"]


def propose_random(space: SearchSpace, tried: Tried, rng: random.Random) -> Ranks | None:
    """Any configuration that was not tried."""
    return _new(lambda: {group.name: rng.choice(group.choices) for group in space.groups}, tried)


def propose_neighbour(space: SearchSpace, tried: Tried, rng: random.Random) -> Ranks | None:
    """Hill climbing: the best so far with one group, sometimes a few more, moved to a neighbouring rank."""
    scored = [(score, ranks) for ranks, score in tried if score is not None]
    best = max(scored, key=lambda pair: pair[0])[1] if scored else tried[0][0]
    movable = [group for group in space.groups if len(group.choices) > 1]

    def mutate() -> Ranks:
        count = 1
        while count < len(movable) and rng.random() < 0.5:
            count += 1
        changed = dict(best)
        for group in rng.sample(movable, count):
            place = group.choices.index(best[group.name])
            steps = [p for p in (place - 1, place + 1) if 0 <= p < len(group.choices)]
            changed[group.name] = group.choices[rng.choice(steps)]
        return changed

    return _new(mutate, tried) if movable else None


def _new(draw: Callable[[], Ranks], tried: Tried) -> Ranks | None:
    seen = [ranks for ranks, _ in tried]
    for _ in range(PATIENCE):
        ranks = draw()
        if ranks not in seen:
            return ranks
    return None


PROPOSALS: dict[str, Propose] = {"random": propose_random, "hill-climb": propose_neighbour}
SEARCHES = (*PROPOSALS, "nsga2")


class Exhausted(Exception):
    """A strategy has nothing new to propose."""


def distributions(space: SearchSpace) -> dict[str, Any]:
    return {group.name: CategoricalDistribution(group.choices) for group in space.groups}


class _Nsga2(NSGAIISampler):
    """Optuna's, told the space instead of working it out from all trials each time."""

    def __init__(self, space: SearchSpace, population: int, seed: int) -> None:
        super().__init__(population_size=population, seed=seed)
        self._space = distributions(space)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, Any]:
        return self._space


@dataclass
class _Proposing(BaseSampler):
    """Optuna's interface around one proposal."""

    space: SearchSpace
    propose: Callable[[Study, FrozenTrial], Ranks | None]

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, Any]:
        return distributions(self.space)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        return self.propose(study, trial) or {}

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any) -> Any:
        raise Exhausted


def sampler(strategy: str, space: SearchSpace, anchors: Sequence[Ranks], number: int, seed: int,
            evaluations: int) -> BaseSampler:  # fmt: skip
    """What proposes trial ``number``: first the anchors, then the strategy, seeded by the number. So a proposal depends
    on the trials before it and on nothing else, and a search that was killed goes on as if it had not been."""
    if number < len(anchors):
        return _Proposing(space, lambda study, trial: anchors[number])
    mixed = random.Random(f"{seed}/{number}")
    if strategy == "nsga2":
        return _Nsga2(space, max(4, min(POPULATION, evaluations // 4)), mixed.randrange(2**32))
    return _Proposing(space, lambda study, trial: PROPOSALS[strategy](space, tried(study, space, trial), mixed))


def tried(study: Study, space: SearchSpace, before: FrozenTrial | None = None) -> Tried:
    """All configurations in the order of their numbers, with the scores of those that have one."""
    return [
        (ranks_of(trial), trial.values[0] if trial.state == TrialState.COMPLETE else None)
        for trial in study.get_trials(deepcopy=False)
        if is_whole(trial, space) and (before is None or trial.number < before.number)
    ]


def is_whole(trial: FrozenTrial, space: SearchSpace) -> bool:
    """Whether all of a trial's ranks are drawn."""
    return len(trial.params) == len(space.groups)


def ranks_of(trial: FrozenTrial | Trial) -> Ranks:
    return {name: int(rank) for name, rank in trial.params.items()}

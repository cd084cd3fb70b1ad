"""A search space whose optimum is known, for tests that run in processes of their own too."""

from __future__ import annotations

import random

from sqft.adapters.groups import RankGroup
from sqft.elastic.handle import SearchSpace
from sqft.searching.study import Search


def make_space(groups=6, choices=(32, 24, 16, 8)):
    made = tuple(RankGroup(f"{i}.qkv", (f"layers.{i}.q_proj",), tuple(choices)) for i in range(groups))
    return SearchSpace(made, {g.name: 10 + i for i, g in enumerate(made)})


SPACE = make_space()
BEST = {g.name: g.choices[random.Random(i).randrange(4)] for i, g in enumerate(SPACE.groups)}


def score(ranks):
    return -sum(((ranks[name] - BEST[name]) / 8) ** 2 for name in ranks)


def searcher(study, strategy, evaluations, score=score, seed=0, space=SPACE, **options):
    anchors = [{g.name: rank for g in space.groups} for rank in (16, 32, 8)]
    return Search(
        study, space, strategy, anchors, evaluations, seed, score, lambda r: float(space.parameters(r)), **options
    )

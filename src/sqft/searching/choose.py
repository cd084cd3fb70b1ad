"""From a super-adapter and ranks to a folder with that sub-adapter alone."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from sqft import artifact
from sqft.adapters.groups import Ranks
from sqft.adapters.lora import active_rank, scale_of
from sqft.adapters.peft_bridge import in_order
from sqft.config import ExtractConfig
from sqft.elastic.handle import Elastic
from sqft.elastic.heuristics import resolve_ranks
from sqft.errors import SqftError, UsageError
from sqft.folders import base_of, is_adapter, load
from sqft.probe import probe, write_probe
from sqft.searching.picking import PICKS, Evaluated, pick
from sqft.strict import read_object

TRIALS = "search.json"  # in the folder that a search writes: every trial, and which was chosen


def read_points(folder: str | Path) -> list[Evaluated]:
    """The evaluated configurations of a search's folder. Raises UsageError if it is none, SqftError if corrupt."""
    path = Path(folder) / TRIALS
    if not path.is_file():
        raise UsageError(f"{folder} was not written by a search: it has no {TRIALS}")
    try:
        return [Evaluated(**point) for point in read_object(path, data=True)["points"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SqftError(f"{path} is corrupt ({error}): search again") from None


def extract(adapter: str | Path, choice: str | ExtractConfig, out: str | Path, *,
            overwrite: bool = False) -> dict[str, Any]:  # fmt: skip
    """Writes one sub-adapter as an adapter folder of its own.

    Args:
        adapter: folder of a super-adapter, or what a search wrote (its super-adapter is then found through it).
        choice: a heuristic, a YAML file of ranks, or of a search 'best', 'knee' or 'smallest-within 1%'.

    A sub-adapter of plain LoRA is plain LoRA and loads in PEFT. Returns its ranks and cost. Raises UsageError.
    """
    config = choice if isinstance(choice, ExtractConfig) else ExtractConfig(choice)
    folder = Path(adapter)
    if not is_adapter(folder):
        raise UsageError(f"{folder} is not an adapter folder: give what 'sqft train' or 'sqft search' wrote")
    artifact.check_input(folder)
    ranks: Ranks | None = None
    if config.choice.split()[:1] and config.choice.split()[0] in PICKS:
        ranks = pick(read_points(folder), config.choice).ranks
    if (folder / TRIALS).is_file():
        folder = Path(artifact.resolve_parent(folder, artifact.read_manifest(folder).parent or ""))
        if not is_adapter(folder):
            raise SqftError(f"the super-adapter of {adapter} is gone: its manifest names {folder}")
    with artifact.stage("extract", config, out, folder, base=base_of(folder), overwrite=overwrite) as made:
        model, tokenizer = load(folder)
        ranks = ranks or resolve_ranks(model, config.choice, folder)
        made.metrics.update(ranks=ranks, **Elastic(model).space.cost(ranks))
        write_sub_adapter(model, tokenizer, ranks, made.folder)
    return made.metrics


def write_sub_adapter(model: Any, tokenizer: Any, ranks: Ranks, folder: Path) -> None:
    """Writes a super-adapter's weights cut to ``ranks``, with a config that has no search space but a rank and an alpha
    for each module (``rank_pattern``, ``alpha_pattern``), so that every module keeps the scale that it has
    at these ranks, which stay set. Beside them: tokenizer and probe."""
    elastic = Elastic(model)
    elastic.set(ranks)
    name, layers, state = elastic.adapter, elastic.layers, elastic.slice(ranks)
    config = copy.deepcopy(model.peft_config[name])
    config.search_space, config.rank_groups, config.rank_scaling = None, None, "largest"
    config.use_rslora = False  # alpha by rank says its scaling too
    config.rank_pattern = {path: active_rank(layer, name) for path, layer in layers.items()}
    config.alpha_pattern = {p: alpha_for(scale_of(layer, name), config.rank_pattern[p]) for p, layer in layers.items()}
    config.inference_mode = True
    config.save_pretrained(str(folder))
    in_order(folder)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_probe(probe(model, tokenizer), folder)
    tokenizer.save_pretrained(folder)


def alpha_for(scaling: float, rank: int) -> float:
    """The alpha whose quotient by the rank is nearest to the scaling: equal, or off by the last bits of float64."""
    alpha = scaling * rank
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    best = min(near, key=lambda candidate: abs(candidate / rank - scaling))
    return round(best) if math.isclose(best, round(best), rel_tol=1e-14) else best

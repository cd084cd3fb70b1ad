"""Search on synthetic spaces whose optimum is known, its resume after a kill, and its sharing by processes."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError
from support import postgres
from synthetic import BEST, SPACE, make_space, score, searcher

import sqft
from sqft.elastic.heuristics import heuristic
from sqft.options import without_password
from sqft.searching import stage as search_module
from sqft.searching.owners import Owners
from sqft.searching.picking import Evaluated, pareto_front, pick
from sqft.searching.strategies import ranks_of
from sqft.searching.study import EVALUATED, PURPOSE, SCREENED, Search, open_study


def trials(study) -> list[tuple]:
    return [(t.number, t.state, ranks_of(t), t.values, t.user_attrs.get(PURPOSE)) for t in study.get_trials()]


def evaluated(study) -> list[tuple[int, ...]]:
    return [SPACE.encode(ranks_of(t)) for t in study.get_trials() if t.user_attrs.get(PURPOSE) == EVALUATED]


def test_the_space() -> None:
    assert SPACE.size == 4**6
    for choices in itertools.product(range(4), repeat=6):
        ranks = {group.name: group.choices[i] for group, i in zip(SPACE.groups, choices, strict=True)}
        assert SPACE.encode(ranks) == choices
    ranks = dict(zip((group.name for group in SPACE.groups), (32, 24, 16, 8, 32, 24), strict=True))
    expected = sum((10 + i) * r for i, r in enumerate((32, 24, 16, 8, 32, 24)))
    assert SPACE.cost(ranks) == {"parameters": expected, "bytes": 4 * expected, "flops": 2 * expected}
    with pytest.raises(sqft.UsageError, match="not a configuration"):
        SPACE.encode({**ranks, "0.qkv": 7})


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("strategy", "groups", "evaluations"), [("hill-climb", 6, 100), ("nsga2", 4, 128)])
def test_the_known_optimum_is_found(strategy: str, groups: int, evaluations: int, seed: int) -> None:
    """Of 4096 and of 256 configurations; a random search finds it with a chance of 2 % and of 50 %."""
    study = optuna.create_study(directions=["maximize", "minimize"])
    space = make_space(groups)
    searcher(study, strategy, evaluations, seed=seed, space=space).run()
    found = max((t for t in study.get_trials() if t.values), key=lambda t: t.values[0])
    best = {group.name: BEST[group.name] for group in space.groups}
    assert ranks_of(found) == best and found.values == [0.0, float(space.parameters(best))]
    seen = [space.encode(ranks_of(t)) for t in study.get_trials() if t.user_attrs.get(PURPOSE) == EVALUATED]
    assert len(seen) == len(set(seen)) <= evaluations


def test_a_small_space_is_tried_once_and_then_the_search_ends(tmp_path: Path) -> None:
    space = make_space(2, (2, 1))
    for strategy in ("random", "hill-climb", "nsga2"):
        study = open_study(f"journal:{tmp_path / strategy}", "s")
        anchors = [heuristic(name, space) for name in ("maximal", "minimal")]
        Search(study, space, strategy, anchors, 50, 0, lambda r: sum(r.values()), lambda r: 0.0).run()
        assert sorted(space.encode(ranks_of(t)) for t in study.get_trials() if t.user_attrs[PURPOSE] == EVALUATED) == [
            (0, 0), (0, 1), (1, 0), (1, 1)
        ]  # fmt: skip


def process(body: str) -> subprocess.Popen:
    head = f"import os, signal, sys, time; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
    head += "from pathlib import Path\nfrom sqft.searching.owners import Owners\n"
    head += "from sqft.searching.study import open_study\nfrom synthetic import *\n"
    return subprocess.Popen([sys.executable, "-c", head + textwrap.dedent(body)])


@pytest.fixture(scope="module")
def database() -> Iterator[Callable[[], str]]:
    if postgres.programs() is None:
        pytest.skip("no PostgreSQL server (apt-get install postgresql) or no driver of it (psycopg)")
    with postgres.server() as found:
        yield found


@pytest.fixture(params=["journal:{}/log", "sqlite:///{}/trials.db", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new storage of each kind."""
    return request.getfixturevalue("database")() if request.param == "postgresql" else request.param.format(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["random", "hill-climb", "nsga2"])
def test_a_killed_search_goes_on_as_if_it_had_not_been(url: str, strategy: str, tmp_path: Path) -> None:
    body = f"""
        calls = []
        def dying(ranks):
            calls.append(ranks)
            if len(calls) == 12:
                os.kill(os.getpid(), signal.SIGKILL)
            return score(ranks)
        owners = Owners({url!r}, Path({str(tmp_path)!r}))
        searcher(open_study({url!r}, "killed"), {strategy!r}, 30, dying, owners=owners).run()
    """
    assert process(body).wait() == -9
    study, owners = open_study(url, "killed"), Owners(url, tmp_path)
    left = owners.take_over(study)
    assert len(left) == 1 and Owners(url, tmp_path).take_over(study) == []
    searcher(study, strategy, 30, owners=owners).run(left)
    straight = open_study(url, "straight")
    searcher(straight, strategy, 30).run()
    assert trials(study) == trials(straight) and len(evaluated(study)) == 30


def test_a_trial_is_its_owners_while_that_lives(tmp_path: Path) -> None:
    """Whatever its number or its machine: the system lets go of a dead one's lock."""
    url = f"journal:{tmp_path / 'log'}"
    study, mine, other = open_study(url, "s"), Owners(url, tmp_path), Owners(url, tmp_path)
    mine.begin(study), other.begin(study), study.ask()  # and one that was killed before it said whose it is
    assert mine.take_over(study) == [2] and other.take_over(study) == []
    os.close(other._locks._held)  # what the system does of a process that dies
    other._locks._held = None
    assert mine.take_over(study) == [1] and mine.take_over(study) == []
    other.leave(), mine.leave()
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_what_other_machines_left_in_a_database_is_not_known_to_be_dead(tmp_path: Path) -> None:
    study, owners = open_study(), Owners("mysql://host/db", tmp_path)
    study.ask().set_user_attr("owner", "another")
    assert owners.take_over(study) == [] and [path.name for path in tmp_path.iterdir()] == ["owners"]


def test_a_torn_last_line_of_a_journal_is_dropped(tmp_path: Path) -> None:
    """Wherever it was torn, however long it is; the trials before it are there, and it goes on."""
    file = tmp_path / "log"
    study = open_study(f"journal:{file}", "s")
    study.ask().set_user_attr("long", "x" * 9000)
    whole = file.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for cut in (last + 1, last + 4000, len(whole) - 1):
        file.write_bytes(whole[:cut])
        again = open_study(f"journal:{file}", "s")
        assert [trial.user_attrs for trial in again.get_trials()] == [{}]
        assert again.ask().number == 1 and len(open_study(f"journal:{file}", "s").get_trials()) == 2
        assert file.read_bytes().startswith(whole[:last]) and b"xx" not in file.read_bytes()


@pytest.mark.slow
def test_a_trial_in_a_database_server_is_its_owners_while_that_is_connected(database, tmp_path: Path) -> None:
    """Wherever it works: a folder of its own knows nothing of the others."""
    url = database()
    study = open_study(url, "s")
    body = f"""
        owners = Owners({url!r}, Path({str(tmp_path / "other")!r}))
        owners.begin(open_study({url!r}, "s"))
        open({str(tmp_path / "begun")!r}, "w").close()
        signal.pause()
    """
    other = process(body)
    while not (tmp_path / "begun").exists():
        assert other.poll() is None
        time.sleep(0.05)
    mine = Owners(url, tmp_path / "mine")
    mine.begin(study)
    assert mine.take_over(study) == []
    other.kill(), other.wait()
    while not (left := mine.take_over(study)):  # the server hears of it a moment later
        time.sleep(0.05)
    assert left == [0] and mine.take_over(study) == [] and not (tmp_path / "mine").exists()
    third = Owners(url, tmp_path / "third")
    with create_engine(url).connect() as one:  # as when the server is started anew: its locks are gone
        one.execute(text("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"))
    assert mine.begin(study).number == 2 and third.take_over(study) == []
    mine.leave()
    assert third.take_over(study) == [0, 1, 2]
    third.leave()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["random", "hill-climb", "nsga2"])
def test_two_processes_share_a_search_without_repeating_each_other(url: str, strategy: str, tmp_path: Path) -> None:
    open_study(url, "shared")
    body = f"""
        def slow(ranks):
            with open({str(tmp_path)!r} + "/evaluations", "a") as log:
                log.write(f"{{os.getpid()}} {{SPACE.encode(ranks)}}\\n")
            time.sleep(0.05)
            return score(ranks)
        owners = Owners({url!r}, Path({str(tmp_path)!r}))
        searcher(open_study({url!r}, "shared"), {strategy!r}, 40, slow, owners=owners).run()
        owners.leave()
    """
    both = [process(body) for _ in range(2)]
    assert [p.wait(timeout=120) for p in both] == [0, 0]
    lines = [line.split(" ", 1) for line in (tmp_path / "evaluations").read_text().splitlines()]
    assert len(lines) == 40 and len({ranks for _, ranks in lines}) == 40 and len({pid for pid, _ in lines}) == 2
    assert len(evaluated(open_study(url, "shared"))) == 40


def test_screening_saves_full_evaluations_and_still_finds_the_optimum(tmp_path: Path) -> None:
    calls: list[dict] = []

    def full(ranks):
        calls.append(ranks)
        return score(ranks)

    runs = []
    for name in ("a", "b"):
        study = open_study(f"journal:{tmp_path / name}", "s")
        options = {"screen": lambda ranks: score(ranks) + 0.1 * ranks["0.qkv"] / 32, "keep": 0.4}
        searcher(study, "hill-climb", 60, full, **options).run()
        searcher(study, "hill-climb", 200, full, **options).run()  # goes on where it was
        runs.append(trials(study))
    purposes = [purpose for *_, purpose in runs[0]]
    assert purposes.count(SCREENED) + purposes.count(EVALUATED) == 200
    assert purposes.count(EVALUATED) == len(calls) // 2 < 120
    assert BEST in calls and runs[0] == runs[1]


POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


@settings(deadline=None)
@given(POINTS, st.integers(0, 99))
def test_picks(pairs: list[tuple[int, int]], percent: int) -> None:
    points = [Evaluated(i, {"g": i}, float(score), float(cost)) for i, (score, cost) in enumerate(pairs)]
    front = pareto_front(points)
    for point in points:
        beaten = any(
            (o.score >= point.score and o.cost <= point.cost and (o.score, o.cost) != (point.score, point.cost))
            for o in points
        )
        assert any((f.score, f.cost) == (point.score, point.cost) for f in front) != beaten
    top = max(p.score for p in points)
    best = pick(points, "best")
    assert best.score == top and best.cost == min(p.cost for p in points if p.score == top)
    small = pick(points, f"smallest-within {percent}%")
    good = [p for p in points if p.score >= top - percent / 100 * abs(top)]
    assert small in good and small.cost == min(p.cost for p in good)
    assert pick(points, "knee") in front


def test_the_knee_is_where_the_front_bends() -> None:
    points = [Evaluated(i, {}, score, cost) for i, (score, cost) in enumerate([(0, 0), (0.9, 2), (0.95, 6), (1, 10)])]
    assert pick(points, "knee").number == 1
    for wrong in ("bset", "smallest-within x", "smallest-within 200%"):
        with pytest.raises(sqft.UsageError):
            pick(points, wrong)


def test_heuristics() -> None:
    space = make_space(2, (4, 3, 2, 1))
    assert list(heuristic("maximal", space).values()) == [4, 4]
    assert list(heuristic("minimal", space).values()) == [1, 1]
    assert list(heuristic("median", space).values()) == [2, 2]
    # Losses fall from step to step; beside that, rank 3 of the first group is good, rank 2 of the second is bad.
    rng = random.Random(0)
    records = []
    for step in range(200):
        a, b = rng.choices(range(4), [1, 2, 1, 1])[0], rng.choices(range(4), [1, 1, 1, 3])[0]
        records.append(([a, b], 5 - 0.02 * step - 0.2 * (a == 1) + 0.2 * (b == 2)))
    assert heuristic("most-frequent", space, records) == {"0.qkv": 3, "1.qkv": 1}
    least = heuristic("min-loss", space, records)
    assert least["0.qkv"] == 3 and least["1.qkv"] != 2
    with pytest.raises(sqft.UsageError, match="needs the records"):
        heuristic("min-loss", space)
    with pytest.raises(sqft.UsageError, match="did you mean 'median'"):
        heuristic("medain", space)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_the_entry_that_is_being_written(number: int, tmp_path: Path, monkeypatch) -> None:
    study = open_study(f"journal:{tmp_path / 'journal.log'}", "s")
    fsync = os.fsync
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as on the command line
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: (signal.raise_signal(number), fsync(handle)))
        with pytest.raises(KeyboardInterrupt):
            study.ask()
    assert [path.name for path in tmp_path.iterdir()] == ["journal.log"]  # and no lock
    again = open_study(f"journal:{tmp_path / 'journal.log'}", "s")
    assert len(again.get_trials()) == 1 and again.ask().number == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.signal(signal.SIGTERM, before) is signal.default_int_handler


def test_storage_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    for url in ("nonsense", f"sqlite:///{tmp_path}/no/such/folder/x.db"):
        with pytest.raises(sqft.UsageError, match="cannot open storage"):
            open_study(url, "s")


def test_the_search_key_is_that_of_what_is_tried() -> None:
    name = search_module._study_name(sqft.SearchConfig(task="arithmetic"), "k")
    assert name == search_module._study_name(sqft.SearchConfig(task="arithmetic", workers=2, pick="knee"), "k")
    assert name != search_module._study_name(sqft.SearchConfig(task="arithmetic", seed=1), "k")


def test_a_storages_password_is_neither_written_nor_shown(tmp_path: Path, monkeypatch, sparse: Path) -> None:
    for url, shown in [
        ("postgresql://me:S3CRET@host:5432/db", "postgresql://me:***@host:5432/db"),
        ("postgresql+psycopg2://me:S3@CR:ET'/x@host/db", "postgresql+psycopg2://me:***@host/db"),
        ("mysql://host/db?user=me&password=S3CRET&x=1", "mysql://host/db?user=me&password=***&x=1"),
        ("sqlite:///trials.db", "sqlite:///trials.db"),
        ("journal:a@b:c", "journal:a@b:c"),
    ]:
        assert without_password(url) == shown
    with pytest.raises(sqft.UsageError, match="cannot open storage") as found:
        open_study("mysqll://me:S3CRET@host/db", "s")
    assert "S3CRET" not in str(found.value) and "me:***@host" in str(found.value) and found.value.__cause__ is None
    model, tokenizer = sqft.load(sparse)
    model = sqft.attach(model, sqft.SqftConfig(search_space=[4, 2]))
    sqft.save(model, tokenizer, tmp_path / "adapter", parent=sparse)
    monkeypatch.setattr(search_module, "open_study", lambda url, name: open_study(f"journal:{tmp_path / 'log'}", name))
    config = sqft.SearchConfig(
        task="arithmetic", metric="loss", limit=2, evaluations=1, storage="mysql://me:S3CRET@host/db"
    )
    sqft.search(tmp_path / "adapter", config, out=tmp_path / "out")
    assert not [path for path in (tmp_path / "out").iterdir() if b"S3CRET" in path.read_bytes()]
    assert "mysql://me:***@host/db" in (tmp_path / "out" / "search.json").read_text()


def test_a_database_that_another_process_is_just_making_is_opened_later(tmp_path: Path, monkeypatch) -> None:
    """Of two that make its tables at once one fails: "table trial_values already exists"."""
    import sqft.searching.study as module

    real, failing = module.RDBStorage, [OperationalError("", {}, Exception("table trials already exists"))] * 2
    monkeypatch.setattr(
        module, "RDBStorage", lambda url: (_ for _ in ()).throw(failing.pop()) if failing else real(url)
    )
    assert open_study(f"sqlite:///{tmp_path}/trials.db", "s").study_name == "s" and not failing
    monkeypatch.setattr(
        module, "RDBStorage", lambda url: (_ for _ in ()).throw(OperationalError("", {}, Exception("no")))
    )
    with pytest.raises(sqft.UsageError, match="cannot open storage"):
        open_study(f"sqlite:///{tmp_path}/trials.db", "s")

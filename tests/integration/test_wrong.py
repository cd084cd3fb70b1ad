"""Wrong command lines and data, one by one: the exit code, one sentence, nothing made; docs/errors.md has what is said."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.wrong import CASES, HEAD, prepare, row, said

DOCUMENT = Path(__file__).parents[2] / "docs" / "errors.md"
ALL = [case for cases in CASES.values() for case in cases]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    prepare(folder)
    return folder


@pytest.mark.parametrize(("command", "code", "expected"), ALL, ids=[case[0].replace("x" * 300, "long") for case in ALL])
def test_wrong(command: str, code: int, expected: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    before = sorted(path.name for path in here.iterdir())
    got, err = said(command)
    assert got == code and expected in err, err
    assert (
        err.startswith("sqft: ") and err.count("\n") == 1 and "unexpected" not in err.replace("unexpected argument", "")
    ), err
    assert sorted(path.name for path in here.iterdir()) == before
    if sys.version_info[:2] == (3, 11):  # other versions word their parts of a message otherwise
        assert row(command, got, err) in DOCUMENT.read_text().splitlines()


def test_the_table_has_nothing_else() -> None:
    text = DOCUMENT.read_text()
    assert text.startswith(HEAD) and len(ALL) >= 80 and len(set(ALL)) == len(ALL)
    assert sum(line.startswith("| `") for line in text.splitlines()) == len(ALL)
    assert f"has {len(ALL)} wrong" in (DOCUMENT.parent / "reliability.md").read_text()

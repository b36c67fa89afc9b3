"""Launches and syncs of an optimizer step, counted on the CPU by bench/launches.py.

A change that adds some for each layer or tensor fails here.
"""

import pytest

from conftest import ROOT


@pytest.fixture
def launches(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import launches

    return launches


def test_a_step_of_ours_waits_for_nothing_and_launches_little(launches):
    """77 launches a layer, and with 24 layers fewer than 2,500 in a step."""
    two, four = (launches.row("ours", layers) for layers in (2, 4))
    totals = [sum(result["launches"].values()) for result in (two, four)]
    a_layer = (totals[1] - totals[0]) / 2
    assert a_layer <= 77, four["operations"]
    assert totals[0] - 2 * a_layer + launches.LAYERS * a_layer <= launches.LIMIT
    assert two["syncs"] == four["syncs"] <= launches.SYNC_LIMIT, four["where"]  # none of them for each layer or tensor


def test_syncs_of_the_textbook_are_seen(launches):
    """DeepSpeed's fp16 at stage 0 looks at each tensor for an overflow."""
    textbook = launches.row("textbook", 2)
    assert textbook["syncs"] > 30 and textbook["launches"]["optimizer"] > 400


def test_what_counts(launches):
    """A mask as an index and .item() make the CPU wait; views and empty tensors launch nothing."""
    import torch

    counting = launches.Counting()
    counting.part = "rest"
    x = torch.arange(4.0)
    with counting:
        x[x > 1].sum().item()
        x.t().view(2, 2)
        torch.empty(3)
    assert counting.syncs == {"index in rest": 1, "_local_scalar_dense in rest": 1}
    assert counting.launches["rest"] == {"gt": 1, "index": 1, "sum": 1, "_local_scalar_dense": 1}

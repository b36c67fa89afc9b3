"""The bill: each second of each slot is under one cause."""

import types

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.experiment import Trial

import bill

STATES = [Trial.RUNNING, Trial.PAUSED, Trial.PENDING, Trial.TERMINATED, Trial.ERROR]


def make(slots, num_samples=34, at_a_time=0, iterations=()):
    record = types.SimpleNamespace(iterations=list(iterations), num_samples=num_samples, trials={})
    made = bill.Bill(record, {"cpu": 1, "gpu": 1}, at_a_time)
    made.slots = slots
    return made


def trials(*states):
    return [types.SimpleNamespace(status=state) for state in states]


ROW = {"trial_id": "a", "training_iteration": 1, "started_at": 0.0, "ended_at": 6.0}


@pytest.mark.parametrize(
    "iterations, states, num_samples, at_a_time, expected",
    [
        ([], "R", 34, 0, {"running": 10, "start-up": 30}),
        ([ROW], "RRPP", 34, 0, {"running": 20, "rungs": 20}),
        ([ROW], "RPT", 3, 0, {"running": 10, "tail": 30}),
        ([ROW], "RPPPP", 5, 0, {"running": 10, "rungs": 30}),  # the paused ones will need their slots
        ([ROW], "RPPPP", 34, 2, {"running": 10, "rungs": 10, "not asked for": 20}),
        ([ROW], "RRRR", 34, 0, {"running": 40}),
    ],
)
def test_what_keeps_a_slot_idle(iterations, states, num_samples, at_a_time, expected):
    names = {"R": Trial.RUNNING, "P": Trial.PAUSED, "T": Trial.TERMINATED}
    made = make(4, num_samples, at_a_time, iterations)
    made.record.trials = dict.fromkeys(range(len(states)))
    made.add(10, trials(*(names[s] for s in states)))
    assert {name: seconds for name, seconds in made.spent.items() if seconds} == expected


@given(st.lists(st.tuples(st.floats(0, 9), st.lists(st.sampled_from(STATES), max_size=9)), max_size=9), st.integers(9, 12), st.integers(0, 9))
def test_nothing_is_left_out(steps, slots, at_a_time):
    """The parts add up to slots times time."""
    made = make(slots, at_a_time=at_a_time, iterations=[ROW])
    for seconds, states in steps:
        made.add(seconds, trials(*states))
    assert made.minutes()["allocated"] == pytest.approx(slots * sum(seconds for seconds, _ in steps) / 60)


def test_iterations_that_were_run_again_are_told():
    made = make(1, iterations=[ROW, {**ROW, "started_at": 10.0, "ended_at": 13.0}])
    made.spent["running"] = 10.0
    minutes = made.minutes()
    assert (minutes["training"], minutes["run again"], minutes["change-over"]) == (pytest.approx(0.1), pytest.approx(0.05), pytest.approx(1 / 60))
    assert "run again 0.1 (30%)" in bill.text(minutes, 2, 16, 34)


def test_the_state_is_taken_up():
    first, second = make(1), make(1)
    first.add(10, trials(Trial.RUNNING))
    second.set_state(first.get_state())
    second.add(5, trials(Trial.RUNNING))
    assert second.spent["running"] == 15

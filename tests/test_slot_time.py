"""Slot time: each second of each slot is under one cause."""

import types

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.experiment import Trial

from hpo.cluster import idle_nodes
from hpo.results import slot_time

STATES = [Trial.RUNNING, Trial.PAUSED, Trial.PENDING, Trial.TERMINATED, Trial.ERROR]


def make(slots, num_samples=34, at_a_time=0, heard=True):
    log = types.SimpleNamespace(num_samples=num_samples, trials={})
    made = slot_time.SlotTime(log, {"cpu": 1, "gpu": 1}, at_a_time)
    made.slots, made.heard = slots, heard
    return made


def tell(made, iteration, took, **more):
    result = {"training_iteration": iteration, "started_at": 100.0, "ended_at": 100.0 + took, "node_ip": "10.0.0.1", **more}
    made.on_trial_result(0, [], types.SimpleNamespace(trial_id="a"), result)


def trials(*states):
    return [types.SimpleNamespace(status=state) for state in states]


@pytest.mark.parametrize(
    "heard, states, num_samples, at_a_time, expected",
    [
        (False, "R", 34, 0, {"running": 10, "start-up": 30}),
        (True, "RRPP", 34, 0, {"running": 20, "rungs": 20}),
        (True, "RPT", 3, 0, {"running": 10, "tail": 30}),
        (True, "RPPPP", 5, 0, {"running": 10, "rungs": 30}),  # the paused ones will need their slots
        (True, "RPPPP", 34, 2, {"running": 10, "rungs": 10, "not asked for": 20}),
        (True, "RRRR", 34, 0, {"running": 40}),
    ],
)
def test_what_keeps_a_slot_idle(heard, states, num_samples, at_a_time, expected):
    names = {"R": Trial.RUNNING, "P": Trial.PAUSED, "T": Trial.TERMINATED}
    made = make(4, num_samples, at_a_time, heard)
    made.log.trials = dict.fromkeys(range(len(states)))
    made.add(10, trials(*(names[s] for s in states)))
    assert {name: seconds for name, seconds in made.spent.items() if seconds} == expected


@given(st.lists(st.tuples(st.floats(0, 9), st.lists(st.sampled_from(STATES), max_size=9)), max_size=9), st.integers(9, 12), st.integers(0, 9))
def test_nothing_is_left_out(steps, slots, at_a_time):
    """The parts add up to slots times time."""
    made = make(slots, at_a_time=at_a_time)
    for seconds, states in steps:
        made.add(seconds, trials(*states))
    assert made.minutes()["allocated"] == pytest.approx(slots * sum(seconds for seconds, _ in steps) / 60)


def test_iterations_that_were_run_again_are_told():
    """Their evaluation is not counted twice; a piece that was saved before a planned stop is training."""
    made = make(1)
    for _ in range(2):
        tell(made, 1, 60, evaluation_seconds=36, checkpoints_seconds=6)
    tell(made, 1, 12, partial=True)
    made.spent["running"] = 150.0
    minutes = made.minutes()
    parts = {name: minutes[name] for name in ("training", "evaluation", "checkpoints", "run again", "change-over")}
    assert parts == pytest.approx({"training": 0.5, "evaluation": 0.6, "checkpoints": 0.1, "run again": 1.0, "change-over": 0.3})
    assert "run again 1.0 (40%)" in slot_time.summary(minutes, 2, 16, 34, 40) and "34 for random search" in slot_time.summary(minutes, 2, 16, 34, 40)


def test_a_lost_process_is_a_fault_until_its_trial_has_another():
    made, trial = make(4), types.SimpleNamespace(trial_id="a")
    made.on_trial_recover(0, [], trial)
    made.add(10, trials(Trial.RUNNING, Trial.PENDING))
    made.on_trial_start(0, [], trial)
    made.add(10, trials(Trial.RUNNING, Trial.RUNNING))
    assert (made.spent["faults"], made.spent["rungs"], made.spent["running"]) == (10, 20 + 20, 10 + 20)


class SomeTrial(types.SimpleNamespace):
    def is_finished(self):
        return self.status in (Trial.TERMINATED, Trial.ERROR)


@pytest.fixture()
def release(tmp_path, monkeypatch):
    """An IdleNodeRelease of two nodes of two slots, all of whose trials have been suggested, and which is always due."""
    nodes = [{"Alive": True, "NodeManagerAddress": f"10.0.0.{i}", "Resources": {"CPU": 2, "GPU": 2, f"slurm_job_10{i}": 1}} for i in (1, 2)]
    monkeypatch.setattr(idle_nodes.ray, "nodes", lambda: nodes)
    made = make(4, num_samples=3)
    made.log.trials = dict.fromkeys("abc")
    release = idle_nodes.IdleNodeRelease(made, 1e-9, tmp_path)
    release.EVERY = 0.0
    return release


def look(release, *live):
    for _ in range(2):
        release.on_step_end(0, list(live))
    return sorted(path.name for path in release.folder.iterdir())


def start(release, trial, address=None):
    release.on_trial_start(0, [], trial)
    if address:
        release.on_trial_result(0, [], trial, {"node_ip": address})


def test_an_idle_node_is_given_back(release):
    trial = SomeTrial(trial_id="a", status=Trial.RUNNING)
    start(release, trial, "10.0.0.1")
    assert look(release, trial) == ["release-102"]
    assert look(release, trial) == ["release-102"]  # the other one never


def test_no_node_is_given_back_that_a_trial_needs(release):
    """Nor while one is starting, on what node is not known."""
    a, b, c = (SomeTrial(trial_id=name, status=Trial.RUNNING) for name in "abc")
    start(release, a, "10.0.0.1")
    b.status = c.status = Trial.PAUSED
    assert look(release, a, b, c) == []  # three may run at a time
    c.status, b.status = Trial.TERMINATED, Trial.PENDING
    assert look(release, a, b, c) == []
    b.status = Trial.RUNNING  # was paused on the first node, and goes on on the second, in a process that was there
    release.on_trial_result(0, [], b, {"node_ip": "10.0.0.1"})
    start(release, b)
    assert look(release, a, b, c) == []
    start(release, b, "10.0.0.2")
    assert look(release, a, b, c) == []
    release.slot_time.log.trials.popitem()  # one is still to be suggested
    start(release, b, "10.0.0.1")
    assert look(release, a, b, c) == []


def test_the_state_is_taken_up():
    first, second = make(1), make(1)
    first.add(10, trials(Trial.RUNNING))
    second.set_state(first.get_state())
    second.add(5, trials(Trial.RUNNING))
    assert second.spent["running"] == 15

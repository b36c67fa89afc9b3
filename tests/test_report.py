"""The record of a run: what a rung earned, whatever comes after it; files that are whole."""

import json
import math
import threading
import types
from pathlib import Path

import pytest
from hpo.results.record import Record

from hpo import files
from hpo.results import tables


class SomeTrial:
    """The part of a Tune trial that Record looks at."""

    def __init__(self, trial_id, folder):
        self.trial_id, self.last_result, self.error_file, self.finished = trial_id, {}, None, False
        self.config = {"train_loop_config": {"lr": 1e-4, "per_device_bs": 1, "wd": 0.0}, "rungs": [3, 12, 50]}
        self.storage = types.SimpleNamespace(trial_fs_path=str(folder / "ray" / trial_id))
        (folder / "ray" / trial_id / "checkpoint_000000").mkdir(parents=True)

        self.status, self.checkpoint = "RUNNING", None

    def is_finished(self):
        return self.finished

    def has_checkpoint(self):
        return any(Path(self.storage.trial_fs_path).iterdir())


@pytest.fixture()
def record(tmp_path):
    suggested = {name: {"config": {}, "model_based": False} for name in "abc"}
    return Record(tmp_path, types.SimpleNamespace(suggested=suggested), "eval_loss", 3, 1)


def tell(record, trial, iteration, loss, em=None, **more):
    trial.last_result = {"training_iteration": iteration, "eval_loss": loss, "exact_match": em, "f1": em,
                         "started_at": 0.0, "ended_at": 60.0, "node": "here", **more}  # fmt: skip
    record.on_trial_result(0, [], trial, trial.last_result)


def test_a_trial_with_unusual_gradients_is_warned_about_once(record, tmp_path, capsys):
    a, b = SomeTrial("a", tmp_path), SomeTrial("b", tmp_path)
    for iteration in (1, 2):
        tell(record, a, iteration, 1.0, grad_norm=3e-6, loss_scale=65536.0, skipped_steps=0)
        tell(record, b, iteration, 1.0, grad_norm=0.3, loss_scale=None, skipped_steps=0)
    out = capsys.readouterr().out
    assert out.count("WARNING") == 1 and "WARNING: trial a, iteration 1: grad_norm 3e-06 is far from" in out
    record.write_tables()
    assert [row["grad_norm"] for row in files.read_csv(tmp_path / "iterations.csv")] == [3e-6, 0.3] * 2


def fail(record, trial):
    trial.finished = True
    record.on_trial_error(0, [], trial)


def test_a_state_has_the_checkpoint_of_its_last_report(record, tmp_path):
    """Tune knows a report before its checkpoint: what is saved in between is saved again."""
    a, saved = SomeTrial("a", tmp_path), []
    record.save_state = lambda record, live: saved.append(live[0]["checkpoint"])
    record.on_trial_start(0, [a], a)
    tell(record, a, 3, 1.0)
    record.on_step_end(0, [a])
    a.checkpoint = types.SimpleNamespace(path=str(tmp_path / "ray" / "a" / "checkpoint_000000"))
    record.on_checkpoint(iteration=0, trials=[a], trial=a, checkpoint=a.checkpoint)
    record.pace = 0
    record.on_step_end(1, [a])
    assert saved == [None, "ray/a/checkpoint_000000"]


@pytest.mark.parametrize("end", ["completed", "failed"])
def test_a_trial_stays_what_its_own_report_has_made_it(record, tmp_path, capsys, end):
    """Whatever becomes of its process afterwards, and that is not told as another failure."""
    a = SomeTrial("a", tmp_path)
    record.on_trial_start(0, [a], a)
    if end == "completed":
        tell(record, a, 50, 1.0)
    else:
        record.on_trial_result(0, [a], a, {"training_iteration": 0, "eval_loss": math.nan, "failed": "ValueError no"})
    capsys.readouterr()
    for event in (record.on_trial_recover, record.on_trial_start, record.on_trial_error, record.on_trial_complete):
        event(0, [a], a)
        assert record.trials["a"]["status"] == end
    assert "failed after" not in capsys.readouterr().out


def test_a_leader_that_crashes_between_rungs_keeps_what_it_earned_and_no_more(record, tmp_path):
    a, b = SomeTrial("a", tmp_path), SomeTrial("b", tmp_path)
    for trial in (a, b):
        record.on_trial_start(0, [], trial)
    tell(record, a, 12, 1.0, 0.3)
    tell(record, a, 13, 5.0)
    fail(record, a)
    record.write([a, b])
    row = record.trials["a"]
    assert [row[k] for k in ("training_iteration", "eval_loss", "exact_match", "status")] == [12, 1.0, 0.3, "failed"]
    assert record.best == "a" and a.has_checkpoint()
    tell(record, b, 12, 0.5, 0.6)
    record.write([a, b])
    assert record.best == "b" and not a.has_checkpoint()
    assert [t["trial_id"] for t in tables.ranked(list(record.trials.values()), "eval_loss")] == ["b", "a"]
    assert [i["training_iteration"] for i in record.iterations] == [12, 13, 12]
    assert row["gpu_minutes"] == 2.0


def test_the_checkpoint_of_a_trial_that_is_through_and_not_the_best_goes_at_once(record, tmp_path):
    """With the very save that shows it as completed, not only when its process has ended."""
    a, b = SomeTrial("a", tmp_path), SomeTrial("b", tmp_path)
    for trial, loss in ((a, 0.5), (b, 1.0)):
        record.on_trial_start(0, [], trial)
        tell(record, trial, 50, loss, 0.5)
    record.write([a, b])
    assert record.best == "a" and a.has_checkpoint() and not b.has_checkpoint()
    assert [t["status"] for t in files.read_csv(tmp_path / "trials.csv")] == ["completed"] * 2


def test_a_trial_whose_process_never_started(record, tmp_path):
    trial = SomeTrial("c", tmp_path)
    fail(record, trial)
    record.write([trial])
    assert record.trials["c"]["status"] == "failed" and record.best is None and not trial.has_checkpoint()


def test_nan_is_not_the_best_and_not_in_json(record, tmp_path):
    trial = SomeTrial("a", tmp_path)
    record.on_trial_start(0, [], trial)
    tell(record, trial, 3, math.nan, 0.0)
    assert record.best is None
    files.write_json(tmp_path / "x.json", {"loss": math.nan, "all": [1.5, math.inf]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"loss": None, "all": [1.5, None]}


def test_unfinished_until_all_trials_have_ended(record, tmp_path):
    assert record.unfinished()
    for name in "abc":
        trial = SomeTrial(name, tmp_path)
        record.on_trial_start(0, [], trial)
        tell(record, trial, 3, 1.0, 0.0)
        assert record.unfinished()  # is paused
        record.on_trial_complete(0, [], trial)
    assert not record.unfinished()


def test_a_reader_sees_whole_files_only(tmp_path):
    path, stop, seen = tmp_path / "file", threading.Event(), set()
    texts = ["a" * 300_000, "b" * 500_000]
    files.write_whole(path, texts[0])

    def read():
        while not stop.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(100):
        files.write_whole(path, texts[i % 2])
    stop.set()
    reader.join()
    assert seen <= set(texts) and len(list(tmp_path.iterdir())) == 1


def test_tables_survive_a_round_trip(record, tmp_path):
    trial = SomeTrial("a", tmp_path)
    record.on_trial_start(0, [], trial)
    tell(record, trial, 3, 0.1 + 0.2, 0.25)
    record.write([trial])
    assert files.read_csv(tmp_path / "trials.csv") == list(record.trials.values())
    assert files.read_csv(tmp_path / "iterations.csv") == record.iterations


def test_the_first_rung_that_failed_whole_ends_the_search(tmp_path):
    """Also while a later trial is on its way; not while one of the first may still come through."""
    suggested = {name: {"config": {}, "model_based": False} for name in "abc"}
    record = Record(tmp_path, types.SimpleNamespace(suggested=suggested), "eval_loss", 3, 1, first_rung=2)
    trials = {name: SomeTrial(name, tmp_path) for name in "abc"}
    for trial in trials.values():
        record.on_trial_start(0, [], trial)
    fail(record, trials["b"])
    record.on_step_end(0, [])
    fail(record, trials["a"])
    with pytest.raises(RuntimeError, match="all 2 trials of the first rung failed"):
        record.on_step_end(0, [])


def test_a_full_disk_that_a_trial_meets_ends_the_search_between_two_events(record, tmp_path):
    """In answer to the event it would be wrapped by Tune, and shown as a traceback."""
    trial = SomeTrial("a", tmp_path)
    record.on_trial_start(0, [], trial)
    record.on_trial_result(0, [], trial, {"training_iteration": 0, "eval_loss": math.nan, "storage": "no space left"})
    with pytest.raises(OSError, match="no space left"):
        record.on_step_end(0, [])

"""The tables of a run: results at rungs, statuses, the best trial, deleted checkpoints; files that are complete."""

import json
import math
import threading
import types
from pathlib import Path

import pytest

from hpo import files
from hpo.results import checkpoints, report, tables
from hpo.results.trial_log import TrialLog


class SomeTrial:
    """The part of a Tune trial that TrialLog uses."""

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


def make_log(folder, **more):
    suggested = {name: {"config": {}, "model_based": False} for name in "abc"}
    searcher = types.SimpleNamespace(suggested=suggested)
    return TrialLog(folder, searcher, metric="eval_loss", num_samples=3, gpus_per_trial=1, **more)


@pytest.fixture()
def log(tmp_path):
    return make_log(tmp_path)


def tell(log, trial, iteration, loss, em=None, **more):
    trial.last_result = {"training_iteration": iteration, "eval_loss": loss, "exact_match": em, "f1": em,
                         "started_at": 0.0, "ended_at": 60.0, "node": "here", **more}  # fmt: skip
    log.on_trial_result(0, [], trial, trial.last_result)


def test_log_warns_once_per_trial_of_unusual_gradients(log, tmp_path, capsys):
    a, b = SomeTrial("a", tmp_path), SomeTrial("b", tmp_path)
    for iteration in (1, 2):
        tell(log, a, iteration, 1.0, grad_norm=3e-6, loss_scale=65536.0, skipped_steps=0)
        tell(log, b, iteration, 1.0, grad_norm=0.3, loss_scale=None, skipped_steps=0)
    out = capsys.readouterr().out
    assert out.count("WARNING") == 1 and "WARNING: trial a, iteration 1: grad_norm 3e-06 is far from" in out
    log.write_tables()
    assert [row["grad_norm"] for row in files.read_csv(tmp_path / "iterations.csv")] == [3e-6, 0.3] * 2


def fail(log, trial):
    trial.finished = True
    log.on_trial_error(0, [], trial)


def test_state_is_saved_again_when_the_checkpoint_is_complete(log, tmp_path):
    """Tune calls on_trial_result first and on_checkpoint later. A state saved in between lacks the checkpoint."""
    a, saved = SomeTrial("a", tmp_path), []
    log.save_state = lambda state, live: saved.append(live[0]["checkpoint"])
    log.on_trial_start(0, [a], a)
    tell(log, a, 3, 1.0)
    log.on_step_end(0, [a])
    a.checkpoint = types.SimpleNamespace(path=str(tmp_path / "ray" / "a" / "checkpoint_000000"))
    log.on_checkpoint(iteration=0, trials=[a], trial=a, checkpoint=a.checkpoint)
    log.save_interval = 0
    log.on_step_end(1, [a])
    assert saved == [None, "ray/a/checkpoint_000000"]


def test_checkpoints_of_the_last_two_states_are_kept(log, tmp_path):
    a, kept = SomeTrial("a", tmp_path), []
    log.on_trial_start(0, [a], a)
    for i in range(4):
        folder = tmp_path / "ray" / "a" / f"checkpoint_{i:06}"
        folder.mkdir(exist_ok=True)
        a.checkpoint = types.SimpleNamespace(path=str(folder))
        log.save([a])
        kept.append([int(path.name[-6:]) for path in sorted((tmp_path / "ray" / "a").iterdir())])
    assert kept == [[0], [0, 1], [1, 2], [2, 3]]
    checkpoints.delete_except(tmp_path, ["ray/a/checkpoint_000003"])
    assert [path.name for path in (tmp_path / "ray" / "a").iterdir()] == ["checkpoint_000003"]


@pytest.mark.parametrize("end", ["completed", "failed"])
def test_trial_keeps_the_end_that_it_has_reported(log, tmp_path, capsys, end):
    """If its worker process fails later, the status stays, and the log has no second failure."""
    a = SomeTrial("a", tmp_path)
    log.on_trial_start(0, [a], a)
    if end == "completed":
        tell(log, a, 50, 1.0)
    else:
        log.on_trial_result(0, [a], a, {"training_iteration": 0, "eval_loss": math.nan, "failed": "ValueError no"})
    capsys.readouterr()
    for event in (log.on_trial_recover, log.on_trial_start, log.on_trial_error, log.on_trial_complete):
        event(0, [a], a)
        assert log.trials["a"]["status"] == end
    assert "failed after" not in capsys.readouterr().out


def test_best_trial_that_crashes_keeps_the_result_of_its_last_rung(log, tmp_path):
    a, b = SomeTrial("a", tmp_path), SomeTrial("b", tmp_path)
    for trial in (a, b):
        log.on_trial_start(0, [], trial)
    tell(log, a, 12, 1.0, 0.3)
    tell(log, a, 13, 5.0)
    fail(log, a)
    log.save([a, b])
    row = log.trials["a"]
    assert [row[k] for k in ("training_iteration", "eval_loss", "exact_match", "status")] == [12, 1.0, 0.3, "failed"]
    assert log.best == "a" and a.has_checkpoint()
    tell(log, b, 12, 0.5, 0.6)
    log.save([a, b])
    assert log.best == "b" and not a.has_checkpoint()
    assert [t["trial_id"] for t in tables.ranked(list(log.trials.values()), "eval_loss")] == ["b", "a"]
    assert [i["training_iteration"] for i in log.iterations] == [12, 13, 12]
    assert row["gpu_minutes"] == 2.0


def test_checkpoint_of_completed_trial_that_is_not_best_is_deleted_at_the_next_save(log, tmp_path):
    """It is deleted before the worker process of the trial has ended."""
    a, b = SomeTrial("a", tmp_path), SomeTrial("b", tmp_path)
    for trial, loss in ((a, 0.5), (b, 1.0)):
        log.on_trial_start(0, [], trial)
        tell(log, trial, 50, loss, 0.5)
    log.save([a, b])
    assert log.best == "a" and a.has_checkpoint() and not b.has_checkpoint()
    assert [t["status"] for t in files.read_csv(tmp_path / "trials.csv")] == ["completed"] * 2


@pytest.mark.parametrize("first", ["a", "b"])
def test_of_equal_trials_the_older_one_is_best(log, tmp_path, first):
    """As in the table of results, whichever has reported first."""
    trials = {name: SomeTrial(name, tmp_path) for name in "ab"}
    for trial in trials.values():
        log.on_trial_start(0, [], trial)
    for name in sorted("ab", key=lambda name: name != first):
        tell(log, trials[name], 50, 0.5, 0.5)
    log.save(list(trials.values()))
    assert log.best == "a" and trials["a"].has_checkpoint() and not trials["b"].has_checkpoint()
    assert tables.ranked(list(log.trials.values()), "eval_loss")[0]["trial_id"] == "a"


def test_trial_fails_if_its_process_never_starts(log, tmp_path):
    trial = SomeTrial("c", tmp_path)
    fail(log, trial)
    log.save([trial])
    assert log.trials["c"]["status"] == "failed" and log.best is None and not trial.has_checkpoint()


def test_nan_is_never_best_and_becomes_null_in_json(log, tmp_path):
    trial = SomeTrial("a", tmp_path)
    log.on_trial_start(0, [], trial)
    tell(log, trial, 3, math.nan, 0.0)
    assert log.best is None
    files.write_json(tmp_path / "x.json", {"loss": math.nan, "all": [1.5, math.inf]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"loss": None, "all": [1.5, None]}


def test_search_is_unfinished_until_all_trials_have_ended(log, tmp_path):
    assert log.unfinished()
    for name in "abc":
        trial = SomeTrial(name, tmp_path)
        log.on_trial_start(0, [], trial)
        tell(log, trial, 3, 1.0, 0.0)
        assert log.unfinished()  # is paused
        log.on_trial_complete(0, [], trial)
    assert not log.unfinished()


def test_reader_never_sees_a_part_of_a_file(tmp_path):
    path, stop, seen = tmp_path / "file", threading.Event(), set()
    texts = ["a" * 300_000, "b" * 500_000]
    files.write_atomically(path, texts[0])

    def read():
        while not stop.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(100):
        files.write_atomically(path, texts[i % 2])
    stop.set()
    reader.join()
    assert seen <= set(texts) and len(list(tmp_path.iterdir())) == 1


def test_tables_are_read_back_as_they_were_written(log, tmp_path):
    trial = SomeTrial("a", tmp_path)
    log.on_trial_start(0, [], trial)
    tell(log, trial, 3, 0.1 + 0.2, 0.25)
    log.save([trial])
    assert files.read_csv(tmp_path / "trials.csv") == list(log.trials.values())
    assert files.read_csv(tmp_path / "iterations.csv") == log.iterations


def test_search_ends_if_all_trials_of_the_first_rung_fail(tmp_path):
    """Also while a later trial is running, but not while one of the first ones may still succeed."""
    log = make_log(tmp_path, first_rung=2)
    trials = {name: SomeTrial(name, tmp_path) for name in "abc"}
    for trial in trials.values():
        log.on_trial_start(0, [], trial)
    fail(log, trials["b"])
    log.on_step_end(0, [])
    fail(log, trials["a"])
    with pytest.raises(RuntimeError, match="all 2 trials of the first rung failed"):
        log.on_step_end(0, [])


def test_full_disk_in_a_trial_raises_oserror_at_the_next_step(log, tmp_path):
    """Raised in on_trial_result, Tune would wrap it in a TuneError."""
    trial = SomeTrial("a", tmp_path)
    log.on_trial_start(0, [], trial)
    log.on_trial_result(0, [], trial, {"training_iteration": 0, "eval_loss": math.nan, "storage": "no space left"})
    with pytest.raises(OSError, match="no space left"):
        log.on_step_end(0, [])


def test_mean_iteration_seconds(log, tmp_path):
    trial = SomeTrial("a", tmp_path)
    log.on_trial_start(0, [], trial)
    tell(log, trial, 1, 1.0)
    tell(log, trial, 2, 1.0, ended_at=30.0)
    log.write_tables()
    assert tables.mean_iteration_seconds(tmp_path / "iterations.csv") == 45.0


@pytest.mark.parametrize(
    "content", [b"", b"a,b\n1,2\n", b"started_at,ended_at\n1\n", b"started_at,ended_at\n1,x\n", b"\xff\0"]
)
def test_other_files_have_no_mean_iteration_seconds(tmp_path, content):
    (tmp_path / "other.csv").write_bytes(content)
    with pytest.raises(ValueError):
        tables.mean_iteration_seconds(tmp_path / "other.csv")
    with pytest.raises(OSError):
        tables.mean_iteration_seconds(tmp_path / "missing.csv")


def test_cells_with_commas_and_quotes_are_read_back(tmp_path):
    rows = [{"trial_id": "1e5", "status": 'say "a, b"\nc', "optimizer": "adam,w"}]
    files.write_csv(tmp_path / "x.csv", ["trial_id", "status"], rows)
    assert files.read_csv(tmp_path / "x.csv") == rows
    files.write_atomically(tmp_path / "y", b"\xff\x00")
    assert (tmp_path / "y").read_bytes() == b"\xff\x00"


def test_report_says_how_often_the_test_set_was_looked_at():
    """Of a run of an older version it has the one test. A loss of NaN is null in run.json."""
    scores = {"questions": 10, "eval_loss": None, "exact_match": 0.5, "f1": 0.75}
    run = {"status": "done", "arguments": {"metric": "f1", "num_samples": 0}}
    facts = report.facts_of(run | {"test": scores}, [], [])
    tested = "Test of the best model, on 10 questions that no decision has used"
    assert facts[tested] == "eval_loss nan, exact_match 0.5000, f1 0.7500" and "Looks at the test set" not in facts
    tests = [scores | {"date": f"2026-01-0{i}T00:00:00+00:00", "trial_id": f"t{i}", "f1": i / 4} for i in (1, 2)]
    assert tested in report.facts_of(run | {"tests": tests[:1]}, [], [])
    facts = report.facts_of(run | {"tests": tests}, [], [])
    several = "Test of the best model, on 10 questions"  # a decision may have used an earlier test
    assert facts[several] == "eval_loss nan, exact_match 0.5000, f1 0.5000" and tested not in facts
    extended = report.facts_of(run | {"tests": tests[:1], "status": "running"}, [], [])
    assert "Test of trial t1, on 10 questions that no decision has used" in extended
    looks = "2026-01-01T00:00:00+00:00 (trial t1), 2026-01-02T00:00:00+00:00 (trial t2)"
    assert facts["Looks at the test set"] == f"The test set was looked at 2 times: {looks}"

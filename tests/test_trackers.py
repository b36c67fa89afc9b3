"""Experiment trackers: what arrives in them, after an interruption too, and that the search goes on without them."""

import collections
import contextlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import ROOT, run_script
from hpo import files
from hpo.results import trackers
from slurm_cluster import wait_for


def in_mlflow(folder: Path) -> list[tuple]:
    """(experiment, trial, parameters, status, [(step, eval_loss)]) of each run in a run's folder."""
    from mlflow.tracking import MlflowClient

    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        client = MlflowClient((folder / "mlruns").as_uri())
        for experiment in client.search_experiments():
            for run in client.search_runs([experiment.experiment_id]):
                history = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "eval_loss")]
                found.append((experiment.name, run.info.run_name, run.data.params, run.info.status, history))
    return found


def in_wandb(folder: Path) -> list[tuple]:
    """(group, trial, parameters, exit code, [(step, eval_loss)]) of each offline run in a run's folder, oldest first.

    A file is a log of records as LevelDB has it, after a header of 7 bytes: blocks of 32 KiB; in them checksum, length, kind, data.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        data, at, record, config, history, code = file.read_bytes(), 7, b"", {}, [], None
        while at + 7 <= len(data):
            if at % 32768 > 32768 - 7:
                at += -at % 32768
                continue
            end = at + 7 + int.from_bytes(data[at + 4 : at + 6], "little")
            record, kind, at = record + data[at + 7 : end], data[at + 6], end
            if kind in (1, 4):  # whole, or the last part
                parsed, record = Record.FromString(record), b""
                if parsed.HasField("run"):
                    run, config = parsed.run, {item.key: json.loads(item.value_json) for item in parsed.run.config.update}
                elif parsed.HasField("history"):
                    values = {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in parsed.history.item}
                    history.append((values["_step"], values["eval_loss"]))
                elif parsed.HasField("exit"):
                    code = parsed.exit.exit_code
        found.append((run.run_group, run.run_id, config.get("train_loop_config"), code, history))
    return found


class Server(http.server.BaseHTTPRequestHandler):
    requests: list = []

    def do_POST(self):
        Server.requests.append(self.path)
        self.send_error(500)

    do_GET = do_POST

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model, tiny_squad):
    """A search for each tracker, in which trials are paused; {tracker: (folder, output)}, and the address that wandb was given."""
    output_dir = tmp_path_factory.mktemp("results")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"

    def run(tracker):
        return run_script(
            "--model", tiny_model, "--dataset", tiny_squad, "--output_dir", output_dir, "--run_name", tracker, "--max_t", 4, "--num_train_epochs",
            0.2, "--max_eval_samples", 10, "--num_samples", 5, "--max_concurrent_trials", 1, "--seed", 2,  # of the first four, the second is the best
            "--report_to", tracker, WANDB_MODE="offline", WANDB_BASE_URL=address,
        )  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        processes = dict(zip(["mlflow", "wandb"], pool.map(run, ["mlflow", "wandb"])))
    server.shutdown()
    server.server_close()
    for process in processes.values():
        assert process.returncode == 0 and "goes to --report_to" not in process.stdout, process.stdout + process.stderr
    return {tracker: (output_dir / tracker, process.stdout) for tracker, process in processes.items()}, address


def expected(folder):
    """{trial: (lr, batch size, wd, [(iteration, eval_loss)])} of a run's tables."""
    losses = collections.defaultdict(list)
    for row in files.read_csv(folder / "iterations.csv"):
        losses[row["trial_id"]].append((row["training_iteration"], row["eval_loss"]))
    trials = files.read_csv(folder / "trials.csv")
    assert len(trials) == 5 and max(t["resumes"] for t in trials) == 1  # one was paused, and went on
    return {t["trial_id"]: (t["learning_rate"], t["batch_size"], t["weight_decay"], losses[t["trial_id"]]) for t in trials}


def test_mlflow(runs):
    folder, _ = runs[0]["mlflow"]
    found = {}
    for experiment, name, parameters, status, history in in_mlflow(folder):
        values = (json.loads(parameters[f"train_loop_config/{key}"]) for key in ("lr", "per_device_bs", "wd"))
        assert (experiment, status, name in found) == ("mlflow", "FINISHED", False)
        found[name] = (*values, history)
    assert found == {f"trial_{trial}": values for trial, values in expected(folder).items()}


def test_wandb_offline(runs):
    (folder, _), address = runs[0]["wandb"], runs[1]
    found = {}
    for group, name, config, code, history in in_wandb(folder):
        assert (group, code, name in found) == ("wandb", 0, False)
        found[name] = (*(config[key] for key in ("lr", "per_device_bs", "wd")), history)
    assert found == expected(folder)
    assert Server.requests == []
    mark = f"WANDB_BASE_URL={address}".encode()
    wait_for("the end of wandb's own process", lambda: not any(mark in environment for environment in environments()))


def environments():
    """Of all processes of this machine."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # has ended
            yield path.read_bytes()


class SomeTrial:
    """The part of a Tune trial that the loggers look at."""

    def __init__(self, trial_id):
        self.trial_id, self.config, self.last_result = trial_id, {"train_loop_config": {"lr": 1e-4, "per_device_bs": 1, "wd": 0.0}}, None

    def __str__(self):
        return f"trial_{self.trial_id}"


def part_of_a_search(tracker: str, folder: str, part: int):
    """Part 0 starts three trials: `a` is paused when the search is interrupted, `b` fails, `c` is paused too. Part 1 goes on with `a`, and
    `c` loses at its rung. Each is a process.
    """
    from hpo.results import trackers

    (callback,) = trackers.tracker(tracker, Path(folder))
    callback.setup()
    a, b, c = trials = [SomeTrial(name) for name in "abc"]

    def result(trial, **values):
        trial.last_result = {"training_iteration": 1, "node": "here", "started_at": 1.0, **values}
        callback.on_trial_result(1, trials, trial, trial.last_result)

    if part == 0:
        for trial in trials:
            callback.on_trial_start(1, trials, trial)
        result(a, eval_loss=3.0)
        result(b, eval_loss=float("nan"), failed="ValueError", training_iteration=0)
        callback.on_trial_complete(1, trials, b)
        result(c, eval_loss=4.0)
        result(a, eval_loss=float("nan"), partial=True)
        callback.on_experiment_end(trials)
    else:
        callback.on_trial_start(1, trials, a)
        result(a, eval_loss=2.0, training_iteration=2)
        callback.on_trial_complete(1, trials, c)
        callback.on_trial_complete(1, trials, a)
        callback.on_experiment_end(trials)
    print("done")


def both_parts(tracker: str, folder: Path, **environment) -> list[str]:
    """What they print."""
    folder.mkdir()
    outputs = []
    for part in (0, 1):
        command = f"import test_trackers; test_trackers.part_of_a_search({tracker!r}, {str(folder)!r}, {part})"
        process = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=120, env=os.environ | environment)
        assert process.returncode == 0, process.stderr
        outputs.append(process.stdout)
    return outputs


def test_a_resumed_trial_stays_one_run_in_mlflow(tmp_path):
    assert both_parts("mlflow", tmp_path / "x") == ["done\n", "done\n"]
    found = {name: (status, history) for _, name, _, status, history in in_mlflow(tmp_path / "x")}
    assert len(in_mlflow(tmp_path / "x")) == 3
    assert found == {"trial_a": ("FINISHED", [(1, 3.0), (2, 2.0)]), "trial_b": ("FAILED", []), "trial_c": ("FINISHED", [(1, 4.0)])}


def test_a_resumed_trial_stays_one_run_in_wandb(tmp_path):
    """One id: `wandb sync` makes one run of the parts."""
    both_parts("wandb", tmp_path / "x", WANDB_MODE="offline")
    found = [(name, code, history) for _, name, _, code, history in in_wandb(tmp_path / "x")]
    assert sorted(found, key=lambda run: (run[0], run[2])) == [("a", 0, [(1, 3.0)]), ("a", 0, [(2, 2.0)]), ("b", 1, []), ("c", 0, [(1, 4.0)])]


def test_an_error_of_a_tracker_is_told_once_and_ends_nothing(tmp_path):
    """MLflow's server does not answer: nobody listens on port 9."""
    for out in both_parts("mlflow", tmp_path / "x", MLFLOW_TRACKING_URI="http://127.0.0.1:9", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0"):
        told, done = out.splitlines()
        assert re.match("WARNING: nothing more goes to --report_to mlflow: MlflowException .*127.0.0.1:9", told) and done == "done"


def test_a_tracker_that_is_too_slow_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(trackers, "PATIENCE", 0.2)
    calls = []

    class Slow:
        def close(self):
            calls.append(len(calls))
            time.sleep(0.15)

    callback = trackers.TrackerCallback("slow", Slow)
    callback.setup()
    for i in range(5):
        callback.on_experiment_end([i])
    assert calls in ([0], [0, 1])
    assert re.fullmatch(r"WARNING: nothing more goes to --report_to slow: TimeoutError it has taken 0 of 0 s\n", capsys.readouterr().out)


HIDE = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *more: None if name in ("mlflow", "wandb") else find(name, *more)
"""


@pytest.mark.parametrize("tracker, package", [("mlflow", "mlflow-skinny"), ("wandb", "wandb")])
def test_a_missing_package_is_bad_input(tmp_path, tiny_model, tiny_squad, tracker, package):
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    process = run_script(
        "--model", tiny_model, "--dataset", tiny_squad, "--output_dir", tmp_path / "new", "--report_to", tracker,
        PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]),
    )  # fmt: skip
    assert (process.returncode, process.stdout) == (2, "") and len(process.stderr.splitlines()) == 1, process.stderr
    assert f"--report_to {tracker}: the package is missing" in process.stderr and process.stderr.endswith(f"pip install {package}\n")
    assert not (tmp_path / "new").exists()


def test_resume_keeps_the_tracker_and_takes_runs_from_before_there_was_one(runs, tmp_path):
    from hpo import arguments, errors

    run = json.loads((runs[0]["mlflow"][0] / "run.json").read_text())

    def resumed(*more):
        (tmp_path / "run.json").write_text(json.dumps(run))
        name = ["--run_name", tmp_path.name, "--output_dir", str(tmp_path.parent)]
        return arguments.parse("", ["--resume", *name, *more]).report_to

    assert resumed() == "mlflow"
    with pytest.raises(errors.BadInput, match="--report_to wandb .the run has mlflow."):
        resumed("--report_to", "wandb")
    del run["arguments"]["report_to"]
    assert resumed() == "tensorboard"

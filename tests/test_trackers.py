"""Experiment trackers: what they get, also after an interruption, and that the search continues without them."""

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
from tensorboardX.proto.event_pb2 import Event

from conftest import ROOT, run_script
from hpo import files
from hpo.results import trackers
from slurm_cluster import wait_for

OF_A_TRIAL = """
from hpo.squad import group

gc.disable()  # as worker processes start
group.join()
assert gc.isenabled() and gc.get_freeze_count() > 100_000
assert "deepspeed" in sys.modules and not sys.modules.keys() & {"mlflow", "wandb"}
import wandb
with hpo.hidden("mlflow", "wandb"):
    import wandb
    assert importlib.util.find_spec("mlflow") is None
assert importlib.util.find_spec("mlflow") and sys.modules["wandb"]
"""
OF_THE_SEARCH = """
import ray.air._internal.usage
from hpo.cluster import launch

with launch.ray_folders() as folders:
    launch.start_ray(0.0, *folders)
    ray.air._internal.usage.tag_callbacks([])  # as Tune does
    commands = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
    assert not ray.get(ray.remote(lambda: gc.isenabled()).remote())
    ray.shutdown()
assert not sys.modules.keys() & {"mlflow", "wandb"}
assert any("raylet" in command for command in commands)
of_workers = [command for command in commands if "ray::IDLE" in command or "default_worker.py" in command]
assert not [command for command in of_workers if "/raylet" not in command.split(" ")[0]]
"""


@pytest.mark.parametrize("code", [OF_A_TRIAL, OF_THE_SEARCH], ids=["trial", "search"])
def test_no_tracker_is_imported_and_no_process_started_that_is_not_used(code):
    """DeepSpeed and Tune would import trackers. What hides them hides nothing that is imported already.

    And the garbage collector of a worker process rests during its imports.
    """
    command = [sys.executable, "-c", f"import gc, importlib.util, sys\nimport psutil\nimport hpo\n{code}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def in_mlflow(folder: Path) -> list[tuple]:
    """(experiment, trial, parameters, status, [(step, eval_loss)]) of each MLflow run in a run folder."""
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
    """(group, trial, parameters, exit code, [(step, eval_loss)]) of each offline run in a run folder, oldest first.

    After a header of 7 bytes a file is a log in LevelDB's format: blocks of 32 KiB, which hold records, or parts of
    records, each with checksum, length, kind and data.
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
                    run = parsed.run
                    config = {item.key: json.loads(item.value_json) for item in run.config.update}
                elif parsed.HasField("history"):
                    values = {
                        item.key or "/".join(item.nested_key): json.loads(item.value_json)
                        for item in parsed.history.item
                    }
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
    """A search for each tracker, in which trials are paused.

    Returns ({tracker: (run folder, output)}, the address of the server that wandb must not use).
    """
    output_dir = tmp_path_factory.mktemp("results")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"

    def run(tracker):
        return run_script(
            "--model", tiny_model, "--dataset", tiny_squad, "--output_dir", output_dir, "--run_name", tracker,
            "--max_t", 4, "--num_train_epochs", 0.2, "--max_eval_samples", 10, "--num_samples", 5,
            "--max_concurrent_trials", 1, "--seed", 2,  # with this seed the second of the first four trials is the best
            "--report_to", tracker, WANDB_MODE="offline", WANDB_BASE_URL=address,
        )  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        names = ["mlflow", "wandb"]
        processes = dict(zip(names, pool.map(run, names), strict=True))
    server.shutdown()
    server.server_close()
    for process in processes.values():
        assert process.returncode == 0 and "goes to --report_to" not in process.stdout, process.stdout + process.stderr
    return {tracker: (output_dir / tracker, process.stdout) for tracker, process in processes.items()}, address


def expected(folder):
    """{trial: (lr, batch size, wd, [(iteration, eval_loss)])}, from the tables of a run."""
    losses = collections.defaultdict(list)
    for row in files.read_csv(folder / "iterations.csv"):
        losses[row["trial_id"]].append((row["training_iteration"], row["eval_loss"]))
    trials = files.read_csv(folder / "trials.csv")
    assert len(trials) == 5 and max(t["resumes"] for t in trials) == 1  # one was paused and resumed
    columns = ("learning_rate", "batch_size", "weight_decay")
    return {t["trial_id"]: (*(t[name] for name in columns), losses[t["trial_id"]]) for t in trials}


def test_mlflow_has_one_run_per_trial(runs):
    folder, _ = runs[0]["mlflow"]
    found = {}
    for experiment, name, parameters, status, history in in_mlflow(folder):
        values = (json.loads(parameters[f"train_loop_config/{key}"]) for key in ("lr", "per_device_bs", "wd"))
        assert (experiment, status, name in found) == ("mlflow", "FINISHED", False)
        found[name] = (*values, history)
    assert found == {f"trial_{trial}": values for trial, values in expected(folder).items()}


def test_wandb_offline_has_one_run_per_trial_and_uses_no_network(runs):
    (folder, _), address = runs[0]["wandb"], runs[1]
    found = {}
    for group, name, config, code, history in in_wandb(folder):
        assert (group, code, name in found) == ("wandb", 0, False)
        found[name] = (*(config[key] for key in ("lr", "per_device_bs", "wd")), history)
    assert found == expected(folder)
    assert Server.requests == []
    mark = f"WANDB_BASE_URL={address}".encode()
    wait_for("the end of wandb's own process", lambda: not any(mark in found for found in environments()))


def environments():
    """The environment of each process of this machine."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # the process has ended
            yield path.read_bytes()


class SomeTrial:
    """The part of a Tune trial that TrackerCallback uses."""

    def __init__(self, trial_id):
        self.trial_id, self.last_result = trial_id, None
        self.config = {"train_loop_config": {"lr": 1e-4, "per_device_bs": 1, "wd": 0.0}, "rungs": [1, 4]}


def part_of_a_search(tracker: str, folder: str, part: int):
    """Plays a search that is interrupted. Each part is a process.

    Part 0 starts three trials. Trial b fails; a and c are paused when the search is interrupted. In part 1 trial a goes
    on, and c loses at its rung without running again.
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
    """Runs both parts, and returns what each has printed."""
    folder.mkdir()
    outputs = []
    for part in (0, 1):
        command = f"import test_trackers; test_trackers.part_of_a_search({tracker!r}, {str(folder)!r}, {part})"
        pipes = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 120}
        process = subprocess.run([sys.executable, "-c", command], env=os.environ | environment, **pipes)
        assert process.returncode == 0, process.stderr
        outputs.append(process.stdout)
    return outputs


def in_tensorboard(folder: Path) -> dict[str, tuple]:
    """{trial: ([(tag, step, value)], tags without a value)} of the event files in a run folder, by time."""
    found = {}
    for file in sorted(folder.glob("ray/*/events.out.tfevents.*")):
        data, at = file.read_bytes(), 0
        scalars, others = found.setdefault(file.parent.name, ([], []))
        while at < len(data):  # TFRecord: length, its checksum, data, its checksum
            end = at + 12 + int.from_bytes(data[at : at + 8], "little")
            event, at = Event.FromString(data[at + 12 : end]), end + 4
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    scalars.append((value.tag, event.step, value.simple_value))
                else:
                    others.append(value.tag)
    return found


def test_resumed_trial_adds_to_its_folder_in_tensorboard(tmp_path):
    """The tags are those of Ray's own logger. A trial that ends with results has its hyperparameters too."""
    assert both_parts("tensorboard", tmp_path / "x") == ["done\n", "done\n"]
    found = in_tensorboard(tmp_path / "x")
    hparams = ["_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"]
    assert found == {
        "a": ([("ray/tune/eval_loss", 1, 3.0), ("ray/tune/eval_loss", 2, 2.0)], hparams),
        "b": ([], []),
        "c": ([("ray/tune/eval_loss", 1, 4.0)], []),  # has no result after the resume
    }


def test_resumed_trial_stays_one_run_in_mlflow(tmp_path):
    assert both_parts("mlflow", tmp_path / "x") == ["done\n", "done\n"]
    runs = in_mlflow(tmp_path / "x")
    found = {name: (status, history) for _, name, _, status, history in runs}
    assert len(runs) == 3 and {experiment for experiment, *_ in runs} == {"x"}
    assert found == {
        "trial_a": ("FINISHED", [(1, 3.0), (2, 2.0)]),
        "trial_b": ("FAILED", []),
        "trial_c": ("FINISHED", [(1, 4.0)]),
    }
    hyperparameters = {"lr": "0.0001", "per_device_bs": "1", "wd": "0.0"}
    expected = {f"train_loop_config/{name}": value for name, value in hyperparameters.items()}
    assert all(parameters == expected for _, _, parameters, *_ in runs)


def test_resumed_trial_stays_one_run_in_wandb(tmp_path):
    """Both parts have the same id, so that `wandb sync` makes one run of them."""
    assert both_parts("wandb", tmp_path / "x", WANDB_MODE="offline") == ["done\n", "done\n"]
    found = [(name, code, history) for _, name, _, code, history in in_wandb(tmp_path / "x")]
    assert sorted(found, key=lambda run: (run[0], run[2])) == [
        ("a", 0, [(1, 3.0)]),
        ("a", 0, [(2, 2.0)]),
        ("b", 1, []),
        ("c", 0, [(1, 4.0)]),
    ]


def test_wandb_without_api_key_is_left_out(tmp_path):
    environment = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_API_KEY": "", "WANDB_MODE": "online"}
    for out in both_parts("wandb", tmp_path / "x", **environment):
        warning, done = out.splitlines()
        assert re.match("WARNING: nothing more goes to --report_to wandb: .*no API key: run `wandb login`", warning)
        assert done == "done"


def test_error_of_a_tracker_is_reported_once_and_does_not_end_the_search(tmp_path):
    """MLflow's server does not answer: no process listens on port 9."""
    environment = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    for out in both_parts("mlflow", tmp_path / "x", **environment):
        warning, done = out.splitlines()
        pattern = "WARNING: nothing more goes to --report_to mlflow: MlflowException .*127.0.0.1:9"
        assert re.match(pattern, warning) and done == "done"


def test_tracker_that_is_too_slow_is_left_out(monkeypatch, capsys):
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
    warning = "WARNING: nothing more goes to --report_to slow: TimeoutError it has taken 0 of 0 s\n"
    assert capsys.readouterr().out == warning


HIDE = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *more: None if name in ("mlflow", "wandb") else find(name, *more)
"""


@pytest.mark.parametrize("tracker, package", [("mlflow", "mlflow-skinny"), ("wandb", "wandb")])
def test_missing_package_is_bad_input(tmp_path, tiny_model, tiny_squad, tracker, package):
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    process = run_script(
        "--model", tiny_model, "--dataset", tiny_squad, "--output_dir", tmp_path / "new", "--report_to", tracker,
        PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]),
    )  # fmt: skip
    assert (process.returncode, process.stdout) == (2, "") and len(process.stderr.splitlines()) == 1, process.stderr
    assert f"--report_to {tracker}: the package is missing" in process.stderr
    assert process.stderr.endswith(f"pip install {package}\n")
    assert not (tmp_path / "new").exists()


def test_resume_keeps_the_tracker_and_an_older_run_gets_tensorboard(runs, tmp_path):
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

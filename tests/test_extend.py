"""A run that is done, or was interrupted, goes on with more trials: through the command line. See also test_bohb.py."""

import contextlib
import copy
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from ray import tune

from conftest import run_here, run_script
from faulty import write_script
from hpo import arguments, errors, files, search_space
from hpo.cluster.run import Run
from hpo.cluster.state import load_state, save_state
from hpo.results import provenance, repeat
from test_run import cut, results

SMALL = ["--max_t", 4, "--num_train_epochs", 0.5, "--max_eval_samples", 10, "--max_concurrent_trials", 1, "--seed", 7]
KILLED_IN_ITS_TEST = """
SEARCH = os.getpid()
train = experiment.train


def test(*_):
    os.killpg(SEARCH, signal.SIGKILL)
    time.sleep(60)


experiment.test = test
"""


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(folder):
    """(run.json, rows of trials.csv)"""
    return json.loads((folder / "run.json").read_text()), files.read_csv(folder / "trials.csv")


@pytest.fixture(scope="module")
def search(tiny_model, tiny_squad):
    return ["--model", tiny_model, "--dataset", tiny_squad, *SMALL]


@pytest.fixture(scope="module")
def done(search, tmp_path_factory):
    """The folder of a run with four trials, which is done: seconds that it took, and its arguments."""
    name = ["--output_dir", tmp_path_factory.mktemp("results"), "--run_name", "x"]
    begun = time.time()
    process = run_script(*search, *name, "--num_samples", 4)
    assert process.returncode == 0, process.stderr
    return name[1] / "x", time.time() - begun, name


def test_run_that_cannot_be_extended_is_refused_in_one_line(done, tmp_path):
    """And nothing is changed: fewer trials, a longer training, a full disk, a state that is gone, as in older runs."""
    folder, _, name = done
    before = content(folder)
    assert folder / "state.jsonl" in before and folder / "state.jsonl.1" not in before
    assert not list(folder.glob("ray/*/checkpoint_*"))

    def refused(*arguments, **environment):
        process = run_here(*name, "--resume", *arguments, **environment)
        assert process.returncode == 2 and process.stdout == "" and len(process.stderr.splitlines()) == 1
        return process.stderr

    assert "--num_samples 3 (the run has 4)" in refused("--num_samples", 3)
    assert refused("--num_samples", 6, "--max_t", 8).endswith("the run's: --max_t 8 (the run has 4)\n")
    for more in ([], ["--num_samples", 4]):
        process = run_here(*name, "--resume", *more)
        assert process.returncode == 0 and "is done already" in process.stdout
    (tmp_path / "quota").write_text("#!/bin/sh\necho 10 0 11 0 0 0 0 0\n")  # 1 KB is left
    (tmp_path / "quota").chmod(0o755)
    assert "GB are free (quota's limit)" in refused("--num_samples", 6, PATH=f"{tmp_path}:{os.environ['PATH']}")
    (folder / "state.jsonl").rename(folder / "gone")
    assert "has no state.jsonl" in refused("--num_samples", 6)
    (folder / "gone").rename(folder / "state.jsonl")
    assert content(folder) == before


def test_its_results_enter_the_model_of_another_search(done, search, tmp_path):
    folder, _, _ = done
    rungs = len(load_state(folder)["searcher"]["observations"])
    process = run_script(
        *search, "--num_samples", 1, "--warm_start", folder, "--output_dir", tmp_path, "--run_name", "x"
    )
    assert process.returncode == 0, process.stderr
    assert f"--warm_start {folder}: {rungs} results at rungs enter the model\n" in process.stdout
    state = load_state(tmp_path / "x")
    losses = [loss for _, of_budget in state["searcher"]["model"]["losses"] for loss in of_budget]
    assert len(losses) == rungs + len(state["searcher"]["observations"])


def test_extended_run_is_the_run_that_asked_for_more_at_once(done, search, tmp_path):
    """The extension is preempted, then killed while it tests its best model, and then requeued.

    `whole` is started by the command of --repeat: its trials and metrics are the same to the last digit.
    """
    folder, seconds, name = done
    missing, stop = [], threading.Event()

    def watch():
        while not stop.is_set():
            if not (folder / "best_model" / "model.safetensors").exists():
                missing.append(time.time())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    more = [*name, "--resume", "--num_samples", 6]
    begun = time.time()
    code, out = cut(more, 1, signal.SIGUSR1)
    assert code == 1 and "4 trials have ended, 0 go on" in out and "the time is nearly up" in out, out
    killed = run_script(*name, "--resume", script=write_script(tmp_path / "killed.py", KILLED_IN_ITS_TEST))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    first = read(folder)[0]["tests"]
    assert len(first) == 1 and "testing it" in killed.stdout
    process = run_script(*more, SLURM_RESTART_COUNT="1")
    seconds += time.time() - begun
    stop.set()
    watcher.join()
    assert process.returncode == 0 and not missing, process.stderr

    command = [sys.executable, "-m", "hpo.results", folder, "--repeat"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(lines.splitlines()) > 5 and "WARNING" not in lines
    whole = subprocess.run(["timeout", "900", "bash", "-c", lines], capture_output=True, text=True, cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    again = folder.with_name("x-repeat")
    (run, rows), (expected_run, _) = read(folder), read(again)
    assert results(folder) == results(again)
    for file in ("best_result.json", "best_model/model.safetensors"):
        assert (folder / file).read_bytes() == (again / file).read_bytes()
    kept = ("seed", "versions", "git_commit", "script", "code_sha256", "files", "cuda", "cluster", "hardware")
    assert {name: run[name] for name in kept} == {name: expected_run[name] for name in kept}
    assert list(run["hardware"]) == run["nodes"] and run["hardware"][run["nodes"][0]]["cpus"] > 0
    iterations = [(row["trial_id"], row["training_iteration"]) for row in files.read_csv(folder / "iterations.csv")]
    assert len(iterations) == len(set(iterations)) == sum(row["training_iteration"] for row in rows)
    assert not list(folder.glob("ray/*/checkpoint_*")) and not list(folder.glob(".best_model*"))

    assert run["status"] == "done" and run["arguments"]["num_samples"] == 6
    assert run["model_based_suggestions"]["n"] == 6 and run["slot_minutes"]["run again"] == 0
    assert run["seconds"] < seconds  # the time between the end and the extension does not count
    assert run["slot_minutes"]["allocated"] * 60 / run["seconds"] == pytest.approx(
        expected_run["slot_minutes"]["allocated"] * 60 / expected_run["seconds"], rel=0.5
    )
    best = [row["trial_id"] for row in rows if row["status"] == "completed"]
    assert [test["trial_id"] for test in run["tests"]] == [rows[2]["trial_id"], rows[5]["trial_id"]]
    assert set(best) == {rows[i]["trial_id"] for i in (2, 4, 5)} and run["tests"][0] == first[0]
    assert all(datetime.datetime.fromisoformat(test["date"]).tzinfo == datetime.UTC for test in run["tests"])
    looks = ", ".join(f"{test['date']} (trial {test['trial_id']})" for test in run["tests"])
    assert f"The test set was looked at 2 times: {looks}\n" in process.stdout
    assert f"looked at 2 times: {looks}" in (folder / "report.html").read_text()
    assert "The test set was looked at once: " in whole.stdout

    model, tests = (folder / "best_model" / "config.json").stat().st_ino, run["tests"]
    seventh = run_script(*name, "--resume", "--num_samples", 7)  # it is no better
    run, rows = read(folder)
    assert seventh.returncode == 0 and len(rows) == 7 and "looked at 2 times" in seventh.stdout
    assert run["tests"] == tests and (folder / "best_model" / "config.json").stat().st_ino == model


SPACE = {"train_loop_config": {"lr": tune.loguniform(1e-5, 1e-3), "layers": tune.choice([(1, 2), (3, 4)])}}
FILES = {"model": {"folder": "/m", "sha256": {"config.json": "1", "model.safetensors": "2"}}}
OF_BOTH = {"ds_config": {}, "questions": {"train": 5}, "search_space": search_space.describe(SPACE), "files": FILES}


def take_over(folder, earlier, suggested=4, num_samples=6):
    """A run that takes over an earlier one, by its run.json, without the slow rest."""
    run = Run.__new__(Run)
    run.args = SimpleNamespace(known=[], num_samples=num_samples, gpu_hours=None, hours=None)
    run.space, run.folder = SPACE, folder
    run.facts = copy.deepcopy(OF_BOTH) | {"status": "running", "known_settings": [], "tests": []}
    run.facts |= {"versions": provenance.versions(), "cuda": torch.version.cuda}
    save_state(folder, {"searcher": {"suggested": dict.fromkeys(map(str, range(suggested)))}})
    run.take_over(json.loads(json.dumps(OF_BOTH | {"arguments": {"num_samples": suggested}} | earlier)))
    return run


def test_known_settings_are_those_of_the_run(tmp_path):
    """As the search space has them: JSON has lists for tuples. Another search space is told first."""
    for setting, read in ({"lr": 1e-4, "layers": (3, 4)}, [3, 4]), ({"lr": 1e-3, "layers": (1, 2)}, [1, 2]):
        run = take_over(tmp_path, {"known_settings": [setting]})
        assert run.args.known == [setting] and isinstance(run.args.known[0]["layers"], tuple)
        assert run.facts["known_settings"] == [setting | {"layers": read}]
    assert take_over(tmp_path, {}).args.known == take_over(tmp_path, {}).facts["known_settings"] == []  # of older runs
    other = {"search_space": OF_BOTH["search_space"] | {"lr": "loguniform(0.1, 1)"}, "known_settings": [{"lr": 0.5}]}
    with pytest.raises(errors.BadInput, match="search space: lr is"):
        take_over(tmp_path, other)


def test_run_whose_model_has_changed_is_refused(tmp_path):
    """At the same path. Older runs have no hashes; files of --warm_start are not read again, and their hashes stay."""
    other = {"model": FILES["model"] | {"sha256": {"config.json": "1", "model.safetensors": "3", "vocab.txt": "4"}}}
    with pytest.raises(errors.BadInput, match="--model /m: changed since .* began: model.safetensors, vocab.txt$"):
        take_over(tmp_path, {"files": other})
    assert take_over(tmp_path, {"files": {}}).facts["files"] == FILES
    more = FILES | {"warm_start a": {"folder": "/a", "sha256": {"state.jsonl": "5"}}}
    assert take_over(tmp_path, {"files": more}).facts["files"] == more


def test_run_that_is_resumed_with_another_version_of_a_package_is_told_so(tmp_path, capsys):
    then = {"versions": provenance.versions() | {"torch": "1.0"}, "cuda": "11.0"}
    first = take_over(tmp_path, then).facts
    assert first["earlier_versions"] == [then] and first["versions"] == provenance.versions()
    again = first | {"cuda": torch.version.cuda}
    assert take_over(tmp_path, again).facts["earlier_versions"] == [then]  # nothing has changed since
    run = first | {"files": {}, "cluster": None, "arguments": {}}
    run |= {"code_sha256": provenance.folder_hash(tmp_path / "none")}
    (told,) = repeat.differences(run, tmp_path)
    assert told == "a part of the run used torch 1.0, CUDA 11.0"
    warning = f"WARNING: --resume: torch 1.0 in the run, {provenance.versions()['torch']} here\n"
    assert capsys.readouterr().out == warning


def test_an_extension_keeps_the_results_of_the_run(tmp_path):
    """Until it has its own: the report shows them."""
    results = {"tests": [{"trial_id": "a"}], "baseline": {"trial_id": "a"}, "slot_minutes": {"allocated": 1.0}}
    facts = take_over(tmp_path, results | {"status": "done"}).facts
    assert {name: facts[name] for name in results} == results and facts["status"] == "running"


def test_a_search_that_has_ended_takes_trials_only_if_more_are_wanted(tmp_path):
    """With a budget it could otherwise: each slot gets a trial before a pace is known. Older runs do not say it."""
    for said, wanted, ended in (
        ({"status": "done"}, 4, True),
        ({"status": "done"}, 6, False),
        ({"ended": True}, 4, True),
    ):
        run = take_over(tmp_path, said, num_samples=wanted)
        assert run.ended == run.facts["ended"] == ended
    assert not take_over(tmp_path, {"status": "interrupted"}, num_samples=4).ended


def test_a_number_of_trials_that_was_too_large_is_undone(tmp_path):
    """As long as no trial above the smaller number has begun."""
    assert take_over(tmp_path, {}, suggested=4, num_samples=4).args.num_samples == 4
    with pytest.raises(errors.BadInput, match="--num_samples 3: 4 trials have begun already"):
        take_over(tmp_path, {}, suggested=4, num_samples=3)


@pytest.mark.parametrize("status", ["done", "interrupted"])
def test_number_of_trials_on_the_command_line(tmp_path, status):
    """Of a resumed run. Exit code 3 of python -m hpo.arguments: there is nothing to do."""
    of_run = arguments.kept(arguments.parse("", ["--num_samples", "6", "--precision", "fp32"]))
    (tmp_path / "x").mkdir()
    files.write_json(tmp_path / "x" / "run.json", {"arguments": of_run, "search_space": {}, "status": status})
    resume = ["--resume", "--run_name", "x", "--output_dir", str(tmp_path)]
    for number in (4, 8):
        with pytest.raises(errors.BadInput) if (number, status) == (4, "done") else contextlib.nullcontext():
            assert arguments.parse("", [*resume, "--num_samples", str(number)]).num_samples == number
    for more, code in ([], 3 if status == "done" else 0), (["--num_samples", "8"], 0):
        command = [sys.executable, "-m", "hpo.arguments", *resume, *more]
        process = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert (process.returncode, process.stdout, process.stderr) == (code, "", "")


def test_run_that_an_older_version_has_not_tested_is_tested(done, tmp_path):
    """It had deleted the checkpoints before it tested best_model, and was interrupted then."""
    folder = tmp_path / "x"
    shutil.copytree(done[0], folder)
    run, _ = read(folder)
    expected = run.pop("tests")[-1]  # that of best_model: another test may have extended the run
    files.write_json(folder / "run.json", run | {"status": "interrupted"})
    process = run_script("--output_dir", tmp_path, "--run_name", "x", "--resume")
    assert process.returncode == 0 and "testing it" in process.stdout, process.stderr
    (test,) = read(folder)[0]["tests"]
    assert test | {"date": ""} == expected | {"date": ""} and read(folder)[0]["status"] == "done"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_folder_replaces_another_one(tmp_path, monkeypatch, can_exchange):
    """Also where the file system cannot exchange two folders, and after an interruption of that."""
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
        (tmp_path / ".model.old").mkdir()
    for text in ("one", "two"):
        new = tmp_path / "new"
        new.mkdir()
        (new / text).touch()
        files.replace_folder(new, tmp_path / "model")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        assert [path.name for path in (tmp_path / "model").iterdir()] == [text]

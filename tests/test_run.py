"""Whole runs through the command line, on real Ray with the real DeepSpeed engine, at a small size."""

import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, make_model, run_script
from slurm_cluster import FILES, wait_for
from tensorboardX.proto.event_pb2 import Event

import report
import squad

SMALL = ["--max_t", 16, "--num_train_epochs", 1, "--max_eval_samples", 20]


def ours():
    """Processes of Ray on this machine."""
    listing = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    return {line.split()[0] for line in listing.splitlines() if "raylet" in line or "gcs_server" in line or " ray::" in line}


@pytest.fixture(scope="module")
def band(tmp_path_factory, tiny_squad, tiny_model):
    """One whole band, one slot: (folder, output, processes left behind, most checkpoints of ended trials, most bytes on disk)."""
    output_dir = tmp_path_factory.mktemp("results")
    before = ours()
    most, most_bytes, stop = [0], [0], threading.Event()

    def watch():
        """Most trials at a time that have ended, by the table, and still have a checkpoint; most bytes of all files."""
        while not stop.is_set():
            try:
                rows = report.read_csv(output_dir / "band" / "trials.csv")
            except OSError:
                rows = []
            ended = [row["trial_id"] for row in rows if row["status"] in ("stopped", "completed", "failed")]
            most[0] = max(most[0], sum(any((output_dir / "band" / "ray" / t).glob("checkpoint_*")) for t in ended))
            with contextlib.suppress(FileNotFoundError):
                most_bytes[0] = max(most_bytes[0], sum(p.stat().st_size for p in output_dir.rglob("*") if p.is_file()))
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    process = run_script(
        "--model", tiny_model, "--dataset", tiny_squad, "--output_dir", output_dir, "--run_name", "band", *SMALL,
        "--max_concurrent_trials", 1,
    )  # fmt: skip
    stop.set()
    watcher.join()
    assert process.returncode == 0, process.stdout + process.stderr
    return output_dir / "band", process, ours() - before, most[0], most_bytes[0]


def closing_block(text):
    """What stands after `Best Trial Result:`: (the JSON object, rows of the table)."""
    assert text.count("Best Trial Result:\n") == 1
    rest = text.split("Best Trial Result:\n")[1]
    result, end = json.JSONDecoder().raw_decode(rest)
    lines = [line for line in rest[end:].splitlines() if line.strip()]
    assert all(line.startswith("|") for line in lines)  # nothing else follows
    return result, [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_log_ends_with_result_and_table(band):
    folder, process, *_ = band
    assert "400 to train on" not in process.stdout and "20 of other articles to select on" in process.stdout
    result, rows = closing_block(process.stdout)
    assert list(result) == ["eval_loss", "exact_match", "f1", "config"]
    assert list(result["config"]) == ["train_loop_config"]
    assert set(result["config"]["train_loop_config"]) == {"lr", "per_device_bs", "wd"}
    assert rows[0] == ["Trial ID", "Learning Rate", "Batch Size", "Weight Decay", "Eval Loss", "EM", "F1"]
    assert len(rows) == 2 + 25
    assert json.loads((folder / "best_result.json").read_text()) == result
    assert 0 <= result["exact_match"] <= result["f1"] <= 1
    assert rows[2][4] == f"{result['eval_loss']:.4f}"
    assert len(process.stdout.splitlines()) < 400 and "WARNING" not in process.stdout


def test_progress_is_told_at_each_change_of_a_rung(band):
    """Three changes in a band of three brackets: each with what the brackets did then, and how far the search was."""
    _, process, *_ = band
    tables = re.findall(r"^  bracket  rung at .*\n((?:  +\d+  .*\n)*)  (\d) of 1 slots busy, (\d+) of (\d+) suggestions .*, (\d+) of 136 iterations", process.stdout, re.MULTILINE)
    assert len(tables) == 3
    first = tables[0]
    assert first[0].split() == ["1", "4", *first[0].split()[2:]] and int(first[4]) == 16  # sixteen trials had come to the rung at 1
    running, paused, waiting, done = map(int, first[0].split()[2:6])
    assert (running + paused + waiting, done) == (4, 12)
    assert [int(table[4]) for table in tables] == sorted(int(table[4]) for table in tables)


def test_tables_agree_with_the_plan(band):
    """Trials a rung as planned; each iteration ran once; the best is the best of those that trained fully."""
    folder, process, *_ = band
    trials = report.read_csv(folder / "trials.csv")
    iterations = report.read_csv(folder / "iterations.csv")
    assert list(trials[0]) == report.TRIAL_FIELDS and list(iterations[0]) == report.ITERATION_FIELDS
    assert len(trials) == 25 and Counter(t["training_iteration"] for t in trials) == {1: 12, 4: 3 + 4, 16: 1 + 2 + 3}
    pairs = [(i["trial_id"], i["training_iteration"]) for i in iterations]
    assert len(pairs) == len(set(pairs)) == sum(t["training_iteration"] for t in trials) == 16 + 4 * 3 + 12 + 6 * 4 + 2 * 12 + 3 * 16
    assert Counter(t["status"] for t in trials) == {"stopped": 19, "completed": 6}
    completed = [t for t in trials if t["status"] == "completed"]
    best = min(completed, key=lambda t: t["eval_loss"])
    result = json.loads((folder / "best_result.json").read_text())
    searched = result["config"]["train_loop_config"]
    assert (best["eval_loss"], best["learning_rate"]) == (result["eval_loss"], searched["lr"])
    assert [type(searched[k]) for k in ("lr", "per_device_bs", "wd")] == [float, int, float]
    assert all(i["ended_at"] > i["started_at"] for i in iterations)
    at_rungs = [i for i in iterations if i["exact_match"] is not None]
    assert Counter(i["training_iteration"] for i in at_rungs) == {1: 16, 4: 4 + 6, 16: 6}  # EM where it is used
    text = subprocess.run([sys.executable, ROOT / "report.py", folder], capture_output=True, text=True, check=True).stdout
    assert text.strip() == process.stdout[process.stdout.index("| Trial ID") :].strip()


def test_tensorboard(band):
    """The default of --report_to: event files hold each report once, under the trial's id, and nothing but metrics."""
    folder, *_ = band
    found, tags = {}, set()
    for file in folder.glob("ray/*/events.out.tfevents.*"):
        data, at = file.read_bytes(), 0
        while at < len(data):  # TFRecord: length, its checksum, data, its checksum
            end = at + 12 + int.from_bytes(data[at : at + 8], "little")
            event, at = Event.FromString(data[at + 12 : end]), end + 4
            for value in event.summary.value:
                tags.add(value.tag)
                if value.tag == "ray/tune/eval_loss":
                    found[file.parent.name, event.step] = value.simple_value
    rows = report.read_csv(folder / "iterations.csv")
    assert found == {(row["trial_id"], row["training_iteration"]): pytest.approx(row["eval_loss"]) for row in rows}
    assert {tag for tag in tags if tag.startswith("ray/")} == {f"ray/tune/{name}" for name in report.METRICS}


def test_model_based_suggestions_are_counted(band):
    folder, process, *_ = band
    run = json.loads((folder / "run.json").read_text())
    trials = report.read_csv(folder / "trials.csv")
    k = sum(t["model_based"] for t in trials)
    assert run["model_based_suggestions"] == {"k": k, "n": 25}
    assert f"model-based suggestions: {k} of 25" in process.stdout
    assert k >= (25 - 10) / 3  # of those after the eighth result at one budget


def test_run_json(band):
    folder, *_ = band
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "done" and run["seed"] == 42 and run["arguments"]["max_t"] == 16
    assert set(run["versions"]) >= {"python", "ray", "torch", "transformers", "deepspeed", "hpbandster", "ConfigSpace"}
    assert set(run["gpu_minutes"]) == {"allocated", "busy", "idle"} and len(run["nodes"]) == 1
    parts = dict(run["bill"])
    assert parts.pop("given back") == 0 and parts.pop("allocated") == pytest.approx(sum(parts.values())) and min(parts.values()) >= 0
    assert parts["evaluation"] > 0 and parts["checkpoints"] > 0 and parts["run again"] == 0 and parts["idle: tail"] < 0.05 * run["bill"]["allocated"]
    assert parts["idle: not asked for"] / run["bill"]["allocated"] == pytest.approx(1 - 1 / len(os.sched_getaffinity(0)), abs=0.1)
    assert 0.7 * run["seconds"] < run["bill"]["allocated"] * 60 / len(os.sched_getaffinity(0)) <= run["seconds"]
    assert len(run["git_commit"].removesuffix("-dirty")) == 40


def test_nothing_is_left_but_the_results(band):
    folder, _, processes, most_checkpoints, _ = band
    assert not processes
    assert {p.name for p in folder.iterdir()} == {".lock", "run.json", "trials.csv", "iterations.csv", "best_result.json", "best_model", "report.html", "ray"}
    assert not list(folder.glob("ray/*/checkpoint_*")) and not list(folder.glob("ray/*/saving-*"))
    assert most_checkpoints == 1  # of trials that had ended: the best one's, and it was there


def test_disk_forecast(band):
    _, process, *_, most_bytes = band
    forecast = float(re.search(r"disk: up to ([\d.e-]+) GB in ", process.stdout).group(1)) * 1e9
    assert forecast / 5 < most_bytes < forecast  # of this tiny model the megabyte that is added to each checkpoint is the most


def test_best_model_loads_and_scores_the_same(band, tiny_squad):
    """from_pretrained alone, EM and F1 of the best model on the selection split and on the test split."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import raytune_bayesian

    torch.set_num_threads(1)
    folder, *_ = band
    model = AutoModelForCausalLM.from_pretrained(folder / "best_model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "best_model")
    run, result = (json.loads((folder / f).read_text()) for f in ("run.json", "best_result.json"))
    files = squad.find_squad_files(tiny_squad)
    train, selection = squad.hold_out(squad.read_squad(files["train"]), 20, 42)
    tested = squad.subset(squad.read_squad(files["validation"]), 20, 42)
    longest = squad.tokenize(train, tokenizer, raytune_bayesian.MAX_LENGTH, training=True).longest_answer
    for examples, expected in ((selection, result), (tested, run["test"])):
        data = squad.tokenize(examples, tokenizer, raytune_bayesian.MAX_LENGTH, training=False)
        assert raytune_bayesian.score(model, tokenizer, data, longest) == {k: expected[k] for k in ("exact_match", "f1")}
        loss = squad.evaluate_loss(model, data, tokenizer.pad_token_id, raytune_bayesian.EVAL_BATCH_SIZE)
        assert loss == pytest.approx(expected["eval_loss"], rel=1e-5)  # as the run fuses GELU


def test_two_runs_at_a_time_and_a_metric_to_maximise(tmp_path, tiny_model, tiny_squad):
    """Both end with their own results; the score is computed after each iteration where trials are compared by it.

    Their temporary folders have the longest name that leaves room for Ray's sockets, and one that leaves none.
    """

    def run(name, metric):
        temporary = Path(tempfile.mkdtemp(prefix="t" * (12 if name == "one" else 13), dir="/tmp"))  # 25 and 26 characters
        return run_script(
            "--model", tiny_model, "--dataset", tiny_squad, "--output_dir", tmp_path, "--run_name", name, "--max_t", 4,
            "--num_train_epochs", 0.5, "--max_eval_samples", 10, "--num_samples", 5, "--metric", metric, "--seed", 7,
            TMPDIR=str(temporary),
        ), temporary  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        processes = list(pool.map(run, ["one", "two"], ["f1", "eval_loss"]))
    for name, (process, temporary) in zip(["one", "two"], processes):
        temporary.rmdir()  # nothing is left in it
        assert process.returncode == 0, process.stderr
        result, rows = closing_block(process.stdout)
        assert len(rows) == 2 + 5
        assert "this is random search" in process.stdout and "model-based suggestions: 0 of 5" in process.stdout
    assert all(i["f1"] is not None for i in report.read_csv(tmp_path / "one" / "iterations.csv"))
    assert not all(i["f1"] is not None for i in report.read_csv(tmp_path / "two" / "iterations.csv"))


def test_real_squad(tmp_path, demo_model, shared_squad):
    process = run_script(
        "--dataset", shared_squad, "--model", demo_model, "--max_train_samples", 128, "--max_eval_samples", 32, "--num_samples", 5,
        "--max_t", 4, "--num_train_epochs", 0.5, "--output_dir", tmp_path, "--run_name", "real", timeout=900,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    # the real training subset has one title only
    assert "questions: 128 to train on, 32 of other passages to select on" in process.stdout
    run = json.loads((tmp_path / "real" / "run.json").read_text())
    assert run["questions"] == {"train": 128, "selection": 32, "test": 32} and 0 <= run["test"]["f1"] <= 1
    assert len(closing_block(process.stdout)[1]) == 2 + 5
    # whole answers are learnt: from the loss of the first evaluation to the last of a trial that trained fully
    iterations = report.read_csv(tmp_path / "real" / "iterations.csv")
    losses = [i["eval_loss"] for i in iterations if i["trial_id"] == iterations[-1]["trial_id"]]
    assert len(losses) == 4 and losses[-1] < losses[0]


@pytest.mark.parametrize("how, code", [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_an_interrupted_search_is_not_a_finished_one(tmp_path, tiny_model, tiny_squad, how, code):
    before = ours()
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, ROOT / "raytune_bayesian.py", "--model", tiny_model, "--dataset", tiny_squad, "--max_t", 50,
               "--num_train_epochs", 10, "--max_eval_samples", 20, "--output_dir", tmp_path, "--run_name", "x"]  # fmt: skip
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
    )  # fmt: skip
    try:
        next(line for line in process.stdout if "] trial " in line)
        process.send_signal(how)
        out, err = process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, err
    assert "Best Trial Result" not in out and "Traceback" not in err
    assert (how == signal.SIGTERM) or f"what was saved is in {tmp_path}/x" in err
    run = json.loads((tmp_path / "x" / "run.json").read_text())
    assert run["status"] == "interrupted" and run["bill"]["allocated"] > run["bill"]["training"] > 0 and len(run["nodes"]) == 1
    assert "state.pkl" in {p.name for p in (tmp_path / "x").iterdir()}  # to go on with
    assert len(report.read_csv(tmp_path / "x" / "trials.csv")) >= 1
    assert not list((tmp_path / "tmp").iterdir()) and not ours() - before


# -- going on with a search -------------------------------------------------------------------------------------------

KEYS = ["learning_rate", "batch_size", "weight_decay", "eval_loss", "exact_match", "training_iteration", "status", "model_based"]


def cut(arguments, after, how):
    """Starts the script and sends a signal (or calls a function) when so many lines about trials were printed; (exit code, output)."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "raytune_bayesian.py"), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if sum("] trial " in line for line in lines) == after:
                break
        if callable(how):
            how()
        else:
            (os.killpg if how == signal.SIGKILL else os.kill)(process.pid, how)
        lines.append(process.communicate(timeout=200)[0])
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, "".join(lines)


def test_a_search_that_was_cut_twice_is_the_same_search(band, tmp_path, tiny_model, tiny_squad):
    """With one slot and one seed: the same trials and losses to the last digit as the search that ran through, in a folder that moved.

    So the same seed is the same search.
    """
    whole, *_ = band
    name = ["--output_dir", tmp_path, "--run_name", "x"]
    ds_config = tmp_path / "ds.json"
    shutil.copy(ROOT / "ds_config.json", ds_config)
    first = ["--model", tiny_model, "--dataset", tiny_squad, *SMALL, "--max_concurrent_trials", 1, "--deepspeed", ds_config, *name]
    done, out = cut(first, 9, signal.SIGUSR1)
    assert done == 1 and "the time is nearly up" in out and "Best Trial Result" not in out, out
    ds_config.write_text(json.dumps(json.loads(ds_config.read_text()) | {"gradient_clipping": 2.0}))
    process = run_script(*name, "--resume")
    assert process.returncode == 2 and "--resume: ds_config" in process.stderr and len(process.stderr.splitlines()) == 1
    shutil.copy(ROOT / "ds_config.json", ds_config)
    done, out = cut([*name, "--resume"], 12, signal.SIGKILL)
    assert done == -9 and "going on with a search" in out, out
    (tmp_path / "moved").mkdir()
    (tmp_path / "x").rename(tmp_path / "moved" / "x")
    tmp_path /= "moved"
    name = ["--output_dir", tmp_path, "--run_name", "x"]
    state = tmp_path / "x" / "state.pkl"  # and a file that was only half written
    state.write_bytes(state.read_bytes()[:-100])
    process = run_script(*name, "--resume")
    assert process.returncode == 0, process.stderr
    assert "is damaged; using the state before it" in process.stdout
    rows, expected = ([[t[k] for k in KEYS] for t in report.read_csv(f / "trials.csv")] for f in (tmp_path / "x", whole))
    assert rows == expected
    results = [json.loads((f / "best_result.json").read_text()) for f in (tmp_path / "x", whole)]
    assert results[0] == results[1]
    pairs = [(i["trial_id"], i["training_iteration"]) for i in report.read_csv(tmp_path / "x" / "iterations.csv")]
    # The planned stop costs nothing, the kill the work since the last rung; with the older state file perhaps a whole trial.
    assert len(pairs) - len(set(pairs)) <= 16
    assert not list((tmp_path / "x").glob("ray/*/checkpoint_*")) and not (tmp_path / "x" / "state.pkl").exists()

    again = run_script(*name, "--resume")
    assert again.returncode == 0 and "is done already" in again.stdout
    other = run_script(*name, "--resume", "--max_t", 50, "--seed", 1)
    assert other.returncode == 2 and len(other.stderr.splitlines()) == 1
    assert "other arguments than the run's: --max_t 50 (the run has 16), --seed 1 (the run has 42)" in other.stderr


def test_a_planned_stop_within_an_iteration_loses_no_step(tmp_path, tiny_model, tiny_squad):
    """Saved at the next optimizer step, not at the next evaluation, and resumed bit for bit."""
    one = ["--model", tiny_model, "--dataset", tiny_squad, "--max_t", 2, "--num_train_epochs", 16, "--max_eval_samples", 10,
           "--num_samples", 1, "--output_dir", tmp_path]  # fmt: skip
    through = run_script(*one, "--run_name", "through")
    assert through.returncode == 0, through.stderr
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "raytune_bayesian.py"), *map(str, one), "--run_name", "x"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        # The Trainer's folder is there: the first steps are a moment away.
        wait_for("the training's start", lambda: list((tmp_path / "x").glob("ray/*/saving-*")), 200)
        process.send_signal(signal.SIGUSR1)
        out = process.communicate(timeout=200)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1 and "] trial " not in out, out
    checkpoint = next((tmp_path / "x").glob("ray/*/checkpoint_*"))
    step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    assert 0 < step < 1520  # of 3040: within the first iteration
    process = run_script("--output_dir", tmp_path, "--run_name", "x", "--resume")
    assert process.returncode == 0, process.stderr
    losses = [[i["eval_loss"] for i in report.read_csv(tmp_path / name / "iterations.csv")] for name in ("through", "x")]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_resume_of_what_is_no_run_and_of_one_at_work(tmp_path, tiny_model, tiny_squad):
    name = ["--output_dir", tmp_path, "--run_name", "x"]
    process = run_script(*name, "--resume", "--model", tiny_model, "--dataset", tiny_squad)
    assert process.returncode == 2 and "is not the folder of a run" in process.stderr and not (tmp_path / "x").exists()
    with ThreadPoolExecutor(1) as pool:
        small = ["--max_t", 4, "--num_train_epochs", 1, "--max_eval_samples", 10, "--num_samples", 3]
        running = pool.submit(run_script, *name, "--model", tiny_model, "--dataset", tiny_squad, *small)
        wait_for("the run's folder", (tmp_path / "x" / "run.json").exists, 200)
        second = run_script(*name, "--resume")
        assert second.returncode == 2 and "a process is at work on" in second.stderr
        assert running.result().returncode == 0


def test_a_trial_that_hangs_is_started_again(tmp_path, tiny_model, tiny_squad):
    """One trial's process is stopped (SIGSTOP): it is ended, and the trial goes on from its checkpoint in another."""
    command = [sys.executable, str(ROOT / "raytune_bayesian.py"), "--model", tiny_model, "--dataset", tiny_squad, *SMALL,
               "--num_train_epochs", 6, "--max_concurrent_trials", 1, "--num_samples", 16, "--trial_timeout", 15, "--output_dir", tmp_path, "--run_name", "x"]  # fmt: skip
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if sum("at 4/16" in line for line in lines) == 1:  # a promoted trial is running
                break

        def training():  # an iteration takes half a second and more: it is at work when it is stopped
            children = psutil.Process(process.pid).children(recursive=True)
            return [p for p in children if p.is_running() and "ray::ImplicitFunc.train" in p.cmdline()]

        wait_for("a training process", training, 60)[0].suspend()
        lines.append(process.communicate(timeout=240)[0])
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    out = "".join(lines)
    assert process.returncode == 0, out
    assert "has not reported for 1" in out, out
    assert "goes on from iteration" in out, out
    trials = report.read_csv(tmp_path / "x" / "trials.csv")
    assert {t["status"] for t in trials} == {"stopped", "completed"} and len(trials) == 16


def test_full_disk(tmp_path, tiny_model, tiny_squad):
    """Too little from the start is refused. One that is gone for a while, then fills up: the search waits, and goes on by itself."""
    if os.getuid() != 0:
        pytest.skip("only root can mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=True)
    lines = []
    try:
        small = ["--model", tiny_model, "--dataset", tiny_squad, *SMALL, "--max_concurrent_trials", 1, "--num_samples", 16, "--output_dir", disk, "--run_name", "x"]
        process = run_script(*small)
        assert process.returncode == 2 and not list(disk.iterdir())
        assert re.fullmatch(f".*--output_dir {disk}: the run needs up to 0.0[0-9]+ GB there, and 0.00[0-9]+ GB are free\n", process.stderr)
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)

        process = subprocess.Popen(
            [sys.executable, str(ROOT / "raytune_bayesian.py"), *map(str, small)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip

        def read_to(what, times=1):
            start = len(lines)
            for line in process.stdout:
                lines.append(line)
                if sum(what in line for line in lines[start:]) == times:
                    return
            raise AssertionError("".join(lines))

        read_to("] trial ", 3)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk], check=True)  # in its place
        read_to("waiting for ")
        subprocess.run(["umount", disk], check=True)
        read_to("going on with a search")
        read_to("] trial ", 3)
        with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 4096)
        read_to("waiting for ")
        (disk / "filler").unlink()
        lines.append(process.communicate(timeout=300)[0])
        out = "".join(lines)
        assert process.returncode == 0 and out.count("going on with a search") == 2 and out.count("Best Trial Result") == 1, out
        assert out.count("\nstorage: ") == 2 and re.search("storage: .*o space left on device", out), out
        assert "Traceback" not in out and "ended early" not in out
        trials = report.read_csv(disk / "x" / "trials.csv")
        assert {t["status"] for t in trials} == {"stopped", "completed"} and len(trials) == 16
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        subprocess.run(["umount", disk], check=True)


def memory_cgroup(limit: int) -> Path:
    """A new control group for processes of at most so many bytes; for root."""
    first = Path("/sys/fs/cgroup/memory") if Path("/sys/fs/cgroup/memory/cgroup.procs").exists() else Path("/sys/fs/cgroup")
    group = first / f"bohb-test-{os.getpid()}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if first.name == "memory" else "memory.max")).write_text(str(limit))
    return group


def test_a_trial_that_the_kernel_kills_at_the_memory_limit(tmp_path, tiny_model, tiny_squad):
    """As at the limit of a Slurm job: failed and not tried again, as it would need as much again; kill -9 alone is not taken for it."""
    if os.getuid() != 0:
        pytest.skip("only root can make a control group")
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    script = tmp_path / "raytune_bayesian.py"
    harm = """
import signal

honest_train = train


def train(config, run):
    for fault in ("kill", "memory"):
        mark = Path(run["run_dir"]) / f".fault-{fault}"
        if not mark.exists():
            mark.write_text(tune.get_context().get_trial_id())
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            held = [b"x" * 2**27 for _ in range(64)]  # 8 GiB
            time.sleep(60)
    honest_train(config, run)
"""
    script.write_text(script.read_text().replace('\nif __name__ == "__main__":\n    # by the name', harm + '\n\nif __name__ == "__main__":\n    # by the name'))
    group = memory_cgroup(6 * 2**30)
    try:
        arguments = ["--model", tiny_model, "--dataset", tiny_squad, "--max_t", 2, "--num_train_epochs", 0.2, "--max_eval_samples", 10,
                     "--max_concurrent_trials", 1, "--num_samples", 3, "--output_dir", tmp_path, "--run_name", "x"]  # fmt: skip
        inside = ["bash", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "-"]
        no_monitor = {"RAY_memory_monitor_refresh_ms": "0"}  # Ray's own is tested above
        process = run_script(*arguments, script=script, before=inside, PYTHONPATH=str(tmp_path), **no_monitor)
    finally:
        wait_for("the end of all processes", lambda: not (group / "cgroup.procs").read_text(), 30)
        group.rmdir()
    out = process.stdout
    assert process.returncode == 0, out + process.stderr
    killed, hungry = ((tmp_path / "x" / f".fault-{fault}").read_text() for fault in ("kill", "memory"))
    status = {t["trial_id"]: t["status"] for t in report.read_csv(tmp_path / "x" / "trials.csv")}
    assert (status[killed], status[hungry]) == ("completed", "failed") if killed != hungry else status[hungry] == "failed", out
    assert re.search(f"trial {killed} .*goes on from iteration 0", out), out
    assert re.search(f"trial {hungry} .*failed after 0 iterations: .*the kernel has killed its process", out), out
    assert out.count("goes on from iteration") == 1 and len(status) == 3


FAULTS = """
honest_train = train


def train(config, run):
    faults = ["nan", "data", "gpu memory", "overflow", "memory", "lost", "no change", "fails", None]
    for i, fault in enumerate(faults):  # each once, by the first trials in their order
        mark = Path(run["run_dir"]) / f".fault-{i}"
        if not mark.exists():
            mark.write_text(tune.get_context().get_trial_id())
            break
    if fault == "nan":
        config = {**config, "train_loop_config": {**config["train_loop_config"], "lr": 1e30}}
    elif fault == "data":
        run = {**run, "train": Unreadable(run["train"])}
    elif fault == "gpu memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")  # no GPU here
    elif fault == "memory":
        held = [b"x" * 2**27 for _ in range(64)]  # 8 GiB
        time.sleep(60)
    elif fault == "overflow":  # no fp16 here
        global MAX_OVERFLOWS
        MAX_OVERFLOWS, honest, Iterations.skipped_steps = 10, Iterations.skipped_steps, lambda self: self.engine().global_steps
        try:
            return honest_train(config, run)
        finally:
            Iterations.skipped_steps = honest
    elif fault:  # the next trial of this process comes to harm, once
        from ray.train._internal.session import _TrainSession

        def reset(*args, **kwargs):
            if fault == "lost":
                os._exit(9)
            raise RuntimeError("cannot change over")

        def finish(self, timeout=0, honest=_TrainSession.finish):
            honest(self, timeout)
            self.training_thread.is_alive = lambda: timeout > 0

        if fault == "no change":
            _TrainSession.finish = finish
        else:
            _TrainSession.reset = reset
    honest_train(config, run)


class Unreadable:
    def __init__(self, data):
        self.lengths = data.lengths

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        raise ValueError("cannot read question 7")


if __name__ == "__main__":"""


def test_trials_that_go_wrong(tmp_path, tiny_model, tiny_squad):
    """NaN, broken data, out of memory: failed with the reason, not tried again, bad at their rung. A lost process: tried again."""
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    script = tmp_path / "raytune_bayesian.py"
    script.write_text(script.read_text().replace('if __name__ == "__main__":\n    # by the name', FAULTS + '\n    # by the name'))
    total, used = psutil.virtual_memory().total, psutil.virtual_memory().used
    process = run_script(
        "--model", tiny_model, "--dataset", tiny_squad, *SMALL, "--max_concurrent_trials", 1, "--num_samples", 16, "--output_dir", tmp_path,
        "--run_name", "x", script=script, PYTHONPATH=str(tmp_path), RAY_memory_usage_threshold=str((used + 4 * 2**30) / total),
    )  # fmt: skip
    out = process.stdout
    assert process.returncode == 0, out + process.stderr
    trials = {t["trial_id"]: t for t in report.read_csv(tmp_path / "x" / "trials.csv")}
    hit = [(tmp_path / "x" / f".fault-{i}").read_text() for i in range(9)]
    reasons = ["FloatingPointError eval_loss is nan", "ValueError cannot read question 7", "OutOfMemoryError CUDA out of memory", "FloatingPointError fp16: no optimizer step without", ".*out of memory: .*running low on memory"]
    for trial, reason in zip(hit, reasons):
        lines = [line for line in out.splitlines() if f"trial {trial} " in line]
        assert len(lines) == 1 and re.search(f"failed after 0 iterations: {reason}", lines[0]), lines
        assert (trials[trial]["status"], trials[trial]["training_iteration"]) == ("failed", 0)
    assert len(set(hit)) == 9 and Counter(t["status"] for t in trials.values()) == {"failed": 5, "stopped": 10, "completed": 1}
    lost = [line for line in out.splitlines() if "goes on from iteration 0: " in line]
    assert len(lost) == 3, lost
    for line, reason in zip(lost, ["The actor is dead", "did not let go of the trial before it", "cannot change over"]):
        assert re.search(reason, line) and trials[re.search("trial (\\w+)", line).group(1)]["status"] != "failed", line


def test_all_trials_fail(tmp_path, tiny_squad, tiny_model):
    """Each failure is told with its reason; exit code 1; what there is stays."""
    broken = shutil.copytree(tiny_model, tmp_path / "model")
    wrong = json.loads((broken / "config.json").read_text()) | {"hidden_size": 64}
    (broken / "config.json").write_text(json.dumps(wrong))  # not what the weights have
    process = run_script(
        "--model", broken, "--dataset", tiny_squad, *SMALL, "--output_dir", tmp_path, "--run_name", "x", "--max_concurrent_trials", 1
    )
    assert process.returncode == 1
    assert process.stdout.count("failed after 0 iterations") == 16 and process.stdout.count("error.txt)") == 16
    assert "all 16 trials of the first rung failed, the last one: RuntimeError" in process.stderr and f"{tmp_path}/x" in process.stderr
    assert [t["status"] for t in report.read_csv(tmp_path / "x" / "trials.csv")] == ["failed"] * 16
    assert json.loads((tmp_path / "x" / "run.json").read_text())["status"] == "failed"


# -- the hub ----------------------------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's protocol that a download of a whole repository uses."""

    root: Path
    requests: list = []
    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def do_GET(self):
        Hub.requests.append(self.path)
        path = self.path.split("?")[0]
        for kind in ("models", "datasets"):
            for repo in ("tiny/bloom", "tiny/squad"):
                folder = self.root / kind / repo
                files = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
                if path.startswith(f"/api/{kind}/{repo}/revision/"):
                    return self.answer(json.dumps({"id": repo, "sha": self.COMMIT, "siblings": [{"rfilename": f} for f in files]}).encode())
                if path.startswith(f"/api/{kind}/{repo}/tree/"):
                    tree = [{"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": "0" * 40} for f in files]
                    return self.answer(json.dumps(tree).encode())
                prefix = f"/{'' if kind == 'models' else 'datasets/'}{repo}/resolve/{self.COMMIT}/"
                if path.startswith(prefix) and path.removeprefix(prefix) in files:
                    return self.answer((folder / path.removeprefix(prefix)).read_bytes())
        self.send_response(404)
        self.end_headers()

    do_HEAD = do_GET

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(body) & (2**64 - 1):x}"')
        self.send_header("X-Repo-Commit", self.COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture()
def hub(tmp_path, tiny_squad):
    """A hub on this machine with a model and a data set in parquet; yields the environment that points there."""
    make_model(tmp_path / "hub" / "models" / "tiny" / "bloom")
    for split, source in (("train", "train"), ("validation", "dev")):
        path = tmp_path / "hub" / "datasets" / "tiny" / "squad" / "plain_text" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(squad.read_squad(tiny_squad / f"{source}.json")), path)
    Hub.root, Hub.requests = tmp_path / "hub", []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0",
           "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    server.shutdown()
    server.server_close()


def test_prefetch_then_run_without_the_hub(hub, tmp_path):
    names = ["--model", "tiny/bloom", "--dataset", "tiny/squad", "--output_dir", tmp_path / "results", "--run_name", "x"]
    small = ["--max_t", 2, "--num_train_epochs", 0.2, "--max_eval_samples", 10, "--num_samples", 2]

    early = run_script(*names, *small, **hub | {"HF_HUB_OFFLINE": "1"})
    assert early.returncode == 2 and early.stdout == "" and len(early.stderr.strip().splitlines()) == 1
    assert "tiny/bloom: neither a folder nor in the cache" in early.stderr and "--prefetch" in early.stderr

    prefetch = run_script(*names, "--prefetch", **hub)
    assert prefetch.returncode == 0, prefetch.stderr
    assert "400 training and 60 validation questions" in prefetch.stdout
    assert not (tmp_path / "results").exists()

    Hub.requests.clear()
    process = run_script(*names, *small, **hub)
    assert process.returncode == 0, process.stderr
    assert Hub.requests == []  # what is in the cache is not asked for again
    assert (tmp_path / "results" / "x" / "best_result.json").exists()

    # a part of the model in the cache, as a tokenizer loaded elsewhere leaves it: without a list of what there should be
    next((tmp_path / "cache" / "hub").glob("models--*/snapshots/*/model.safetensors")).unlink()
    shutil.rmtree(next((tmp_path / "cache" / "hub").glob("models--*/trees")))
    part = run_script(*names[:-1], "z", *small, **hub)
    assert part.returncode == 2 and "tiny/bloom: no weights" in part.stderr and "--prefetch" in part.stderr
    assert run_script(*names[:-1], "z", "--prefetch", **hub).returncode == 0
    assert next((tmp_path / "cache" / "hub").glob("models--*/snapshots/*/model.safetensors")).exists()

    wrong = run_script(*names[2:], "--model", "tiny/typo", "--run_name", "y", **hub)
    assert wrong.returncode == 2 and "tiny/typo" in wrong.stderr

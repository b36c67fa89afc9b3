"""Whole runs through the command line, on real Ray with the real DeepSpeed engine, at a small size."""

import contextlib
import http.server
import itertools
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
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
from tensorboardX.proto.event_pb2 import Event

from conftest import ROOT, make_model, run_here, run_script
from faulty import write_script
from hpo import files
from hpo.results import intervals, provenance, repeat, tables
from hpo.squad import data as squad_data
from hpo.squad import evaluation, reading, scores
from test_leakage import plant
from test_squad import without_answers

SMALL = ["--max_t", 16, "--num_train_epochs", 0.5, "--max_eval_samples", 20]


def children() -> set[psutil.Process]:
    """Processes below this one: of tests that run beside this one there are none of them."""
    return set(psutil.Process().children(recursive=True))


@pytest.fixture(scope="module")
def band(tmp_path_factory, tiny_squad, tiny_model):
    """One whole band, one slot: (folder, output, processes left behind, most checkpoints of ended trials, most bytes on
    disk).
    """
    output_dir = tmp_path_factory.mktemp("results")
    before, seen = children(), set()
    most, most_bytes, stop = [0], [0], threading.Event()

    def watch():
        """Most trials at a time that have ended, by the table, and still have a checkpoint, in two looks in a row: it
        is removed a moment after the table is written. Most bytes of all files; processes.
        """
        kept = set()
        for i in itertools.count():
            if stop.is_set():
                break
            if i % 20 == 0:
                seen.update(children() - before)
            try:
                rows = files.read_csv(output_dir / "band" / "trials.csv")
            except OSError:
                rows = []
            ended = [row["trial_id"] for row in rows if row["status"] in ("stopped", "completed", "failed")]
            before_that, kept = kept, {t for t in ended if any((output_dir / "band" / "ray" / t).glob("checkpoint_*"))}
            most[0] = max(most[0], len(kept & before_that))
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
    return output_dir / "band", process, psutil.wait_procs(seen, timeout=0)[1], most[0], most_bytes[0]


HEADER = ["Trial ID", "Learning Rate", "Batch Size", "Weight Decay", "Eval Loss", "EM", "F1", "Iterations"]


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
    assert "400 to train on" not in process.stdout and "20 of other articles to compare" in process.stdout
    result, rows = closing_block(process.stdout)
    assert list(result) == ["eval_loss", "exact_match", "f1", "config"]
    assert list(result["config"]) == ["train_loop_config"]
    assert set(result["config"]["train_loop_config"]) == {"lr", "per_device_bs", "wd"}
    assert rows[0] == [*HEADER, "Eval Loss vs Best"]
    assert len(rows) == 2 + 25
    assert json.loads((folder / "best_result.json").read_text()) == result
    assert 0 <= result["exact_match"] <= result["f1"] <= 1
    assert rows[2][4] == f"{result['eval_loss']:.4f}" and rows[2][7] == "16" and rows[-1][7] == "1"
    assert len(process.stdout.splitlines()) < 400
    warnings = [line for line in process.stdout.splitlines() if "WARNING" in line]
    assert all("rank the trials differently" in line for line in warnings), warnings  # a tiny model has learnt little
    assert not re.search(r"[^\n -~…]", process.stdout)  # no control characters: this is no terminal


def test_progress_is_told_at_each_change_of_a_rung(band):
    """Three changes in a band of three brackets: each with what the brackets did then, and how far the search was."""
    _, process, *_ = band
    tables = re.findall(
        r"^  bracket  rung at .*\n((?:  +\d+  .*\n)*)  (\d) of 1 slots busy, (\d+) of (\d+) suggestions .*, "
        r"(\d+) of 136 iterations",
        process.stdout,
        re.MULTILINE,
    )
    assert len(tables) == 3
    first = tables[0]
    assert (
        first[0].split() == ["1", "4", *first[0].split()[2:]] and int(first[4]) == 16
    )  # sixteen trials had come to the rung at 1
    running, paused, waiting, done = map(int, first[0].split()[2:6])
    assert (running + paused + waiting, done) == (4, 12)
    assert [int(table[4]) for table in tables] == sorted(int(table[4]) for table in tables)


def test_tables_agree_with_the_plan(band):
    """Trials a rung as planned; each iteration ran once; the best is the best of those that trained fully."""
    folder, process, *_ = band
    trials = files.read_csv(folder / "trials.csv")
    iterations = files.read_csv(folder / "iterations.csv")
    assert list(trials[0]) == tables.TRIAL_FIELDS and list(iterations[0]) == tables.ITERATION_FIELDS
    assert len(trials) == 25 and Counter(t["training_iteration"] for t in trials) == {1: 12, 4: 3 + 4, 16: 1 + 2 + 3}
    pairs = [(i["trial_id"], i["training_iteration"]) for i in iterations]
    assert (
        len(pairs)
        == len(set(pairs))
        == sum(t["training_iteration"] for t in trials)
        == 16 + 4 * 3 + 12 + 6 * 4 + 2 * 12 + 3 * 16
    )
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
    text = subprocess.run(
        [sys.executable, "-m", "hpo.results", folder], capture_output=True, text=True, check=True
    ).stdout
    assert text.startswith(process.stdout[process.stdout.index("| Trial ID") :])
    assert "of the other 5 finalists" in text and "of the other 5 finalists" in process.stdout


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
    rows = files.read_csv(folder / "iterations.csv")
    assert found == {(row["trial_id"], row["training_iteration"]): pytest.approx(row["eval_loss"]) for row in rows}
    assert {tag for tag in tags if tag.startswith("ray/")} == {
        f"ray/tune/{name}" for name in (*tables.METRICS, *tables.TRAINING) if name != "loss_scale"
    }


def test_model_based_suggestions_are_counted(band):
    folder, process, *_ = band
    run = json.loads((folder / "run.json").read_text())
    trials = files.read_csv(folder / "trials.csv")
    k = sum(t["model_based"] for t in trials)
    assert run["model_based_suggestions"] == {"k": k, "n": 25}
    assert f"model-based suggestions: {k} of 25" in process.stdout
    assert k >= (25 - 10) / 3  # of those after the eighth result at one budget


def test_run_json(band):
    folder, *_ = band
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "done" and run["seed"] == 42 and run["arguments"]["max_t"] == 16
    assert run["edges"] == {"lr": {"lower": 5e-6, "upper": 2e-4, "log": True, "next": [1e-6, 1e-3]}}
    assert set(run["versions"]) >= {"python", "ray", "torch", "transformers", "deepspeed", "hpbandster", "ConfigSpace"}
    assert set(run["gpu_minutes"]) == {"allocated", "busy", "idle"} and len(run["nodes"]) == 1
    parts = dict(run["slot_minutes"])
    assert (
        parts.pop("given back") == 0
        and parts.pop("allocated") == pytest.approx(sum(parts.values()))
        and min(parts.values()) >= 0
    )
    assert (
        parts["evaluation"] > 0
        and parts["checkpoints"] > 0
        and parts["run again"] == 0
        and parts["idle: tail"] < 0.05 * run["slot_minutes"]["allocated"]
    )
    assert parts["idle: not asked for"] / run["slot_minutes"]["allocated"] == pytest.approx(
        1 - 1 / len(os.sched_getaffinity(0)), abs=0.1
    )
    assert 0.7 * run["seconds"] < run["slot_minutes"]["allocated"] * 60 / len(os.sched_getaffinity(0)) <= run["seconds"]
    assert len(run["git_commit"].removesuffix("-dirty")) == 40
    assert run["code_sha256"] == provenance.folder_hash(folder / "code")  # worker processes have used the copy
    assert run["hardware"] == {run["nodes"][0]: provenance.hardware()} and run["cluster"] is None


def test_nothing_is_left_but_the_results(band):
    folder, _, processes, most_checkpoints, _ = band
    assert not processes
    assert {p.name for p in folder.iterdir()} == {
        ".lock",
        "run.json",
        "state.jsonl",  # to go on with more trials
        "trials.csv",
        "iterations.csv",
        "best_result.json",
        "best_model",
        "report.html",
        "code",
        "scores",
        "ray",
    }
    assert not list(folder.glob("ray/*/checkpoint_*")) and not list(folder.glob("ray/*/saving-*"))
    assert most_checkpoints == 1  # of trials that had ended: the best one's, and it was there


def test_scores_of_each_question(band):
    """They give the metrics of each trial, at its last rung, and the intervals in log, table and run.json."""
    folder, process, *_ = band
    trials = files.read_csv(folder / "trials.csv")
    for row in trials:
        kept = intervals.load(folder, row)
        assert len(set(kept["id"])) == len(kept["f1"]) == 20
        loss = kept["eval_loss"].sum(dtype=float) / kept["answer_tokens"].sum()
        assert loss == pytest.approx(row["eval_loss"], rel=1e-6)
        assert [kept[name].mean() for name in ("exact_match", "f1")] == pytest.approx([row["exact_match"], row["f1"]])
    tested = json.loads((folder / "run.json").read_text())["tests"][-1]
    kept = dict(np.load(folder / "scores" / "test.npz"))
    assert kept["exact_match"].mean() == pytest.approx(tested["exact_match"])
    for name in tables.METRICS:
        low, high = tested["intervals"][name]
        assert low <= tested[name] <= high
        assert f"{name} {tested[name]:.4f} [{low:.4f}, {high:.4f}]" in process.stdout
    assert "Eval Loss vs Best" in process.stdout
    best = intervals.best_in_words(folder, tables.ranked(trials, "eval_loss")[0])
    page = (folder / "report.html").read_text()
    assert f"<dt>Scores of the best trial, too good on average</dt><dd>{best}</dd>" in page


def test_disk_forecast(band):
    _, process, *_, most_bytes = band
    forecast = float(re.search(r"disk: up to ([\d.e-]+) GB in ", process.stdout).group(1)) * 1e9
    assert (
        forecast / 5 < most_bytes < forecast
    )  # of this tiny model the megabyte that is added to each checkpoint is the most


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
    files = reading.find_squad_files(tiny_squad)
    train, selection = squad_data.hold_out(reading.read_squad(files["train"]), 20, 42)
    tested = squad_data.subset(reading.read_squad(files["validation"]), 20, 42)
    longest = squad_data.tokenize(train, tokenizer, raytune_bayesian.MAX_LENGTH, training=True).longest_answer
    for examples, expected in ((selection, result), (tested, run["tests"][-1])):
        data = squad_data.tokenize(examples, tokenizer, raytune_bayesian.MAX_LENGTH, training=False)
        setup = SimpleNamespace(max_new_tokens=longest, metric_language="en", unanswerable=False)
        em_and_f1, _ = raytune_bayesian.answer_scores(model, tokenizer, data, setup)
        assert em_and_f1 == {name: expected[name] for name in ("exact_match", "f1")}
        loss, _ = evaluation.evaluate_loss(model, data, tokenizer.pad_token_id, raytune_bayesian.EVAL_TOKENS)
        assert loss == pytest.approx(expected["eval_loss"], rel=1e-5)  # as the run fuses GELU


def test_two_runs_at_a_time_and_a_metric_to_maximise(tmp_path, tiny_model, tiny_squad):
    """Both end with their own results; the score is computed after each iteration where trials are compared by it.
    The second one is in
    fp16, which torch.autocast has on a CPU too.

    Their temporary folders have the longest name that leaves room for Ray's sockets, and one that leaves none.
    """

    def run(name, metric, precision):
        temporary = Path(
            tempfile.mkdtemp(prefix="t" * (12 if name == "one" else 13), dir="/tmp")
        )  # 25 and 26 characters
        return run_script(
            "--model", tiny_model, "--dataset", tiny_squad, "--output_dir", tmp_path, "--run_name", name, "--max_t", 4,
            "--num_train_epochs", 0.5, "--max_eval_samples", 10, "--num_samples", 3, "--metric", metric, "--seed", 7,
            "--max_concurrent_trials", 1, "--precision", precision, TMPDIR=str(temporary),
        ), temporary  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        processes = list(pool.map(run, ["one", "two"], ["f1", "eval_loss"], ["fp32", "fp16"]))
    for process, temporary in processes:
        temporary.rmdir()  # nothing is left in it
        assert process.returncode == 0, process.stderr
        result, rows = closing_block(process.stdout)
        assert len(rows) == 2 + 3
        assert "this is random search" in process.stdout and "model-based suggestions: 0 of 3" in process.stdout
    one, two = (files.read_csv(tmp_path / name / "iterations.csv") for name in ("one", "two"))
    assert all(i["f1"] is not None for i in one) and not all(i["f1"] is not None for i in two)
    assert all(i["loss_scale"] is None for i in one) and all(i["loss_scale"] >= 2**10 for i in two)
    assert all(i["grad_norm"] > 0 and i["tokens_per_second"] > 0 for i in one + two)
    assert [
        json.loads((tmp_path / name / "best_model" / "config.json").read_text())["dtype"] for name in ("one", "two")
    ] == ["float32", "float16"]
    assert "precision: fp16, ZeRO stage 0: torch.autocast with fp32 weights, GradScaler" in processes[1][0].stdout


@pytest.mark.parametrize("how, code", [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_an_interrupted_search_is_not_a_finished_one(tmp_path, tiny_model, tiny_squad, how, code):
    """Nor can another process resume it while it runs."""
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, ROOT / "raytune_bayesian.py", "--model", tiny_model, "--dataset", tiny_squad,
    "--max_t", 50, "--max_concurrent_trials", 1,
               "--num_train_epochs", 10, "--max_eval_samples", 20, "--output_dir", tmp_path, "--run_name",
               "x"]  # fmt: skip
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
    )  # fmt: skip
    try:
        next(line for line in process.stdout if "] trial " in line)
        below = psutil.Process(process.pid).children(recursive=True)
        assert {"raylet", "gcs_server"} <= {p.name() for p in below}
        if how == signal.SIGINT:
            second = run_script("--output_dir", tmp_path, "--run_name", "x", "--resume")
            assert second.returncode == 2 and "a process is at work on" in second.stderr
        process.send_signal(how)
        out, err = process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, err
    assert "Best Trial Result" not in out and "Traceback" not in err
    assert (how == signal.SIGTERM) or f"what was saved is in {tmp_path}/x" in err
    run = json.loads((tmp_path / "x" / "run.json").read_text())
    assert (
        run["status"] == "interrupted"
        and run["slot_minutes"]["allocated"] > run["slot_minutes"]["training"] > 0
        and len(run["nodes"]) == 1
    )
    assert "state.jsonl" in {p.name for p in (tmp_path / "x").iterdir()}  # to go on with
    assert len(files.read_csv(tmp_path / "x" / "trials.csv")) >= 1
    assert not list((tmp_path / "tmp").iterdir()) and not psutil.wait_procs(below, timeout=0)[1]


# -- going on with a search -------------------------------------------------------------------------------------------

KEYS = [
    "learning_rate",
    "batch_size",
    "weight_decay",
    "eval_loss",
    "exact_match",
    "f1",
    "training_iteration",
    "status",
    "model_based",
]


def results(folder):
    """What is the same in the same search: the trials, and the metrics of all their iterations. Ids are not."""
    trials, iterations = (files.read_csv(folder / f"{name}.csv") for name in ("trials", "iterations"))
    number = {trial["trial_id"]: i for i, trial in enumerate(trials)}
    keys = ("training_iteration", *tables.METRICS)
    reported = {(number[row["trial_id"]], *(row[key] for key in keys)) for row in iterations}
    return [[trial[key] for key in KEYS] for trial in trials], reported


def cut(arguments, after, how):
    """Starts the script and sends a signal (or calls a function) when so many lines about trials were printed; (exit
    code, output).
    """
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "raytune_bayesian.py"), *map(str, arguments)], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
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


STOP_WITHIN_AN_ITERATION = """
SEARCH = os.getpid()  # trials get `train`, with this number, from the process of the search


def train(config, setup, trial):
    # The time limit comes near when the tenth trial has taken three steps.
    steps, must_stop = [], trial.must_stop

    def stop_at_step_3():
        steps.append(1)
        if len(steps) != 3 or len(list(setup.run_dir.glob("ray/*/"))) != 10:
            return must_stop()
        os.kill(SEARCH, signal.SIGUSR1)
        deadline = time.time() + 60
        while not setup.stop_file.exists() and time.time() < deadline:
            time.sleep(0.05)
        return setup.stop_file.exists()

    trial.must_stop = stop_at_step_3
    experiment.train(config, setup, trial)
"""


def test_a_search_that_was_cut_twice_is_the_same_search(band, tmp_path, tiny_model, tiny_squad):
    """With one slot and one seed: the same trials and metrics to the last digit as the search that ran through, in a
    folder that moved. So are iterations that ran a second time.

    So the same seed is the same search. The planned stop is within an iteration: the trial saves at its next step.
    """
    whole, *_ = band
    name = ["--output_dir", tmp_path, "--run_name", "x"]
    ds_config = tmp_path / "ds.json"
    shutil.copy(ROOT / "ds_config.json", ds_config)
    first = [
        "--model",
        tiny_model,
        "--dataset",
        tiny_squad,
        *SMALL,
        "--max_concurrent_trials",
        1,
        "--deepspeed",
        ds_config,
        *name,
    ]
    process = run_script(*first, script=write_script(tmp_path / "stop.py", STOP_WITHIN_AN_ITERATION))
    out = process.stdout
    assert process.returncode == 1 and "the time is nearly up" in out and "Best Trial Result" not in out, out
    assert out.count("] trial ") == 9, out
    states = [json.loads(path.read_text()) for path in (tmp_path / "x").glob("ray/*/checkpoint_*/trainer_state.json")]
    assert sorted(state["global_step"] for state in states)[0] == 3  # of 6 or 12 in the first iteration
    ds_config.write_text(json.dumps(json.loads(ds_config.read_text()) | {"gradient_clipping": 2.0}))
    process = run_here(*name, "--resume", "--new_code")
    assert process.returncode == 2 and "--resume: ds_config" in process.stderr and len(process.stderr.splitlines()) == 1
    done, out = cut([*name, "--resume"], 12, signal.SIGKILL)
    assert done == -9 and "going on with a search" in out, out
    assert f"--deepspeed {ds_config} has changed since: the run uses its copy" in out
    (tmp_path / "moved").mkdir()
    (tmp_path / "x").rename(tmp_path / "moved" / "x")
    tmp_path /= "moved"
    name = ["--output_dir", tmp_path, "--run_name", "x"]
    state = tmp_path / "x" / "state.jsonl"  # and a file that was only half written
    state.write_bytes(state.read_bytes()[:-100])
    process = run_script(*name, "--resume")
    assert process.returncode == 0, process.stderr
    assert "is damaged; using the state before it" in process.stdout
    assert results(tmp_path / "x") == results(whole)
    best = [json.loads((f / "best_result.json").read_text()) for f in (tmp_path / "x", whole)]
    assert best[0] == best[1]
    pairs = [(i["trial_id"], i["training_iteration"]) for i in files.read_csv(tmp_path / "x" / "iterations.csv")]
    # The planned stop costs nothing, the kill the work since the last rung; with the older state file perhaps a whole
    # trial.
    assert len(pairs) - len(set(pairs)) <= 16
    assert not list((tmp_path / "x").glob("ray/*/checkpoint_*")) and not (tmp_path / "x" / "state.jsonl.1").exists()

    again = run_script(*name, "--resume")
    assert again.returncode == 0 and "is done already" in again.stdout
    other = run_script(*name, "--resume", "--max_t", 50, "--seed", 1)
    assert other.returncode == 2 and len(other.stderr.splitlines()) == 1
    assert "other arguments than the run's: --max_t 50 (the run has 16), --seed 1 (the run has 42)" in other.stderr


def test_search_of_squad_v2_and_its_resumption(tmp_path, tiny_model, tiny_squad):
    """What is reported is what the rules of the official script give for the answers of best_model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import raytune_bayesian

    torch.set_num_threads(1)
    dataset = plant(without_answers(tiny_squad, tmp_path / "squad", {"train": 2, "dev": 3}))
    name = ["--output_dir", tmp_path, "--run_name", "x"]
    small = ["--max_t", 4, "--num_train_epochs", 1, "--max_eval_samples", 20, "--num_samples", 3]
    search = ["--model", tiny_model, "--dataset", dataset, *small, "--metric", "f1", "--max_concurrent_trials", 1]
    code, first = cut([*search, *name], 2, signal.SIGUSR1)
    assert code == 1 and "the time is nearly up" in first, first
    process = run_script(*name, "--resume")
    assert process.returncode == 0, process.stdout + process.stderr
    for out in (first, process.stdout):
        assert "some questions have no answer: EM and F1 are those of SQuAD 2.0\n" in out
        assert "20 passages and 0 of 20 questions held out have a near-duplicate in the rest" in out
        assert "WARNING: 6 of 60 passages and 0 of 60 questions of the validation set have a near-duplicate" in out
    folder = tmp_path / "x"
    trials, iterations = (files.read_csv(folder / f"{table}.csv") for table in ("trials", "iterations"))
    assert list(trials[0]) == [*tables.TRIAL_FIELDS, *tables.V2_METRICS]
    assert list(iterations[0]) == [*tables.ITERATION_FIELDS, *tables.V2_METRICS]
    assert len(trials) == 3 and all(row[key] is not None for row in iterations for key in tables.V2_METRICS)
    result, rows = closing_block(process.stdout)
    assert list(result) == ["eval_loss", "exact_match", "f1", "config"]
    assert json.loads((folder / "best_result.json").read_text()) == result
    assert rows[0][:8] == HEADER

    best = next(row for row in trials if row["eval_loss"] == result["eval_loss"])
    run = json.loads((folder / "run.json").read_text())
    assert run["leakage"]["test"]["passages"] == 6 and run["questions"]["test"] == 20
    tested = run["tests"][-1]
    model = AutoModelForCausalLM.from_pretrained(folder / "best_model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "best_model")
    found = reading.find_squad_files(dataset)
    train, selection = squad_data.hold_out(reading.read_squad(found["train"]), 20, 42)
    test = squad_data.subset(reading.read_squad(found["validation"]), 20, 42)
    longest = squad_data.tokenize(train, tokenizer, raytune_bayesian.MAX_LENGTH, training=True).longest_answer
    for examples, reported in ((selection, best), (test, tested)):
        questions = squad_data.tokenize(examples, tokenizer, raytune_bayesian.MAX_LENGTH, training=False)
        answers = evaluation.predict(model, tokenizer, questions, raytune_bayesian.EVAL_TOKENS, longest)
        expected = scores.squad_v2(answers, [{"id": e["id"], "answers": e["answers"]} for e in examples])
        assert {key: reported[key] for key in ("exact_match", "f1", *tables.V2_METRICS)} == expected
        assert expected["NoAns_exact"] > 0  # it has learnt to end at once
    line = ", ".join(f"{key} {tested[key]:.4f}" for key in (*tables.METRICS, *tables.V2_METRICS))
    without_interval = {"NoAns_exact", "NoAns_f1"}  # of 5 questions
    assert {*tables.METRICS, *tables.V2_METRICS} - tested["intervals"].keys() == without_interval, tested
    shown = re.sub(r" \[\S+, \S+\]", "", process.stdout)  # without the intervals
    assert f"  {line}\n" in shown and line in re.sub(r" \[\S+, \S+\]", "", (folder / "report.html").read_text())
    assert "6 of 60 passages" in (folder / "report.html").read_text()


def test_resume_of_what_is_no_run(tmp_path, tiny_model, tiny_squad):
    name = ["--output_dir", tmp_path, "--run_name", "x"]
    process = run_here(*name, "--resume", "--model", tiny_model, "--dataset", tiny_squad)
    assert process.returncode == 2 and "is not the folder of a run" in process.stderr and not (tmp_path / "x").exists()


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
                    return self.answer(
                        json.dumps(
                            {"id": repo, "sha": self.COMMIT, "siblings": [{"rfilename": f} for f in files]}
                        ).encode()
                    )
                if path.startswith(f"/api/{kind}/{repo}/tree/"):
                    tree = [
                        {"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": "0" * 40} for f in files
                    ]
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
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(reading.read_squad(tiny_squad / f"{source}.json")), path)
    Hub.root, Hub.requests = tmp_path / "hub", []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache"),
    "HF_HUB_OFFLINE": "0",
           "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    server.shutdown()
    server.server_close()


def test_prefetch_then_run_without_the_hub(hub, tmp_path):
    names = [
        "--model",
        "tiny/bloom",
        "--dataset",
        "tiny/squad",
        "--output_dir",
        tmp_path / "results",
        "--run_name",
        "x",
    ]
    small = ["--max_t", 2, "--num_train_epochs", 0.2, "--max_eval_samples", 10, "--num_samples", 1]

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
    read = json.loads((tmp_path / "results" / "x" / "run.json").read_text())["files"]
    assert [read[name]["revision"] for name in ("model", "dataset")] == [Hub.COMMIT] * 2
    assert set(read["dataset"]["sha256"]) == {f"plain_text/{s}-00000-of-00001.parquet" for s in ("train", "validation")}
    (command, *comments) = repeat.lines(tmp_path / "results" / "x")
    assert " --model=tiny/bloom --dataset=tiny/squad " in command and "WARNING" not in "".join(comments)

    # a part of the model in the cache, as a tokenizer loaded elsewhere leaves it: without a list of what there should
    # be
    next((tmp_path / "cache" / "hub").glob("models--*/snapshots/*/model.safetensors")).unlink()
    shutil.rmtree(next((tmp_path / "cache" / "hub").glob("models--*/trees")))
    part = run_script(*names[:-1], "z", *small, **hub)
    assert part.returncode == 2 and "tiny/bloom: no weights" in part.stderr and "--prefetch" in part.stderr
    again = "from hpo.squad import loading; loading.prefetch('tiny/bloom', 'tiny/squad', False)"
    subprocess.run([sys.executable, "-c", again], env={**os.environ, **hub}, check=True, timeout=200)
    assert next((tmp_path / "cache" / "hub").glob("models--*/snapshots/*/model.safetensors")).exists()

    wrong = run_script(*names[2:], "--model", "tiny/typo", "--run_name", "y", **hub)
    assert wrong.returncode == 2 and "tiny/typo" in wrong.stderr

"""Bad input, through the command line: one line, exit code 2, within seconds, nothing created."""

import ast
import contextlib
import http.server
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import huggingface_hub
import pyarrow.parquet
import pytest
import ray
import safetensors.torch
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from ray import tune
from ray.tune.search.sample import Categorical, Float
from transformers import TrainingArguments

import raytune_bayesian
from conftest import ROOT, make_model, run_here, run_script
from faulty import write_script
from hpo import arguments, checks, errors, files, known, ranges, search_space
from hpo.bohb.searcher import TuneBOHB
from hpo.results import report
from hpo.squad import loading, reading
from test_run import Hub


@contextlib.contextmanager
def changed_squad(original, folder, split):
    """A copy of a data set; gives the content of a file, to change it."""
    shutil.copytree(original, folder)
    file = folder / f"{split}.json"
    content = json.loads(file.read_text())
    yield content
    file.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def broken(tmp_path_factory, tiny_squad, tiny_model):
    """A folder with all kinds of wrong input."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "empty").mkdir()
    (folder / "file").write_text("x")
    (folder / "not_json.json").write_text("{")
    (folder / "list.json").write_text("[]")
    ds_config = json.loads((ROOT / "ds_config.json").read_text())
    (folder / "stage3.json").write_text(json.dumps(ds_config | {"zero_optimization": {"stage": 3}}))
    (folder / "offload.json").write_text(
        json.dumps(ds_config | {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    )
    (folder / "stage4.json").write_text(json.dumps(ds_config | {"zero_optimization": {"stage": 4}}))
    (folder / "stage1.json").write_text(json.dumps(ds_config | {"zero_optimization": {"stage": 1}}))
    (folder / "autocast.json").write_text(json.dumps(ds_config | {"torch_autocast": {"enabled": True}}))
    (folder / "clip.json").write_text(json.dumps(ds_config | {"gradient_clipping": 0}))
    (folder / "scale.json").write_text(
        json.dumps(ds_config | {"fp16": {"enabled": "auto", "loss_scale_window": "long"}})
    )
    with changed_squad(tiny_squad, folder / "moved", "train") as train:
        train["data"][3]["paragraphs"][2]["qas"][0]["answers"][1]["answer_start"] += 1
    with changed_squad(tiny_squad, folder / "v2", "dev") as dev:
        dev["data"][1]["paragraphs"][4]["qas"][0] |= {"answers": [], "is_impossible": False}
    with changed_squad(tiny_squad, folder / "twice", "train") as train:
        for article in (3, 4):
            train["data"][article]["paragraphs"][0]["qas"][0]["id"] = f"train-{article % 3}-0"
    with changed_squad(tiny_squad, folder / "half", "train") as train:
        train["data"][0]["paragraphs"][0]["qas"][0]["question"] += "\ud83d"
    shutil.copytree(tiny_squad, folder / "no_dev")
    (folder / "no_dev" / "dev.json").unlink()
    shutil.copytree(tiny_squad, folder / "cut")
    (folder / "cut" / "train.json").write_text((tiny_squad / "train.json").read_text()[:5000])
    shutil.copytree(tiny_model, folder / "no_weights")
    (folder / "no_weights" / "model.safetensors").unlink()
    shutil.copytree(tiny_model, folder / "bad_weights")
    (folder / "bad_weights" / "model.safetensors").write_bytes(b"no weights")
    shutil.copytree(tiny_model, folder / "bad_tokenizer")
    (folder / "bad_tokenizer" / "tokenizer.json").write_text("{}")
    (folder / "results" / "old").mkdir(parents=True)
    (folder / "results" / "old" / "mine").write_text("precious")
    return folder


CASES = {  # arguments, of which @ stands for the folder of broken things: part of the message
    "unknown metric": (["--metric", "bleu"], r"--metric: invalid choice: 'bleu'"),
    "unknown flag": (["--learning_rate", "1"], r"unrecognized arguments: --learning_rate"),
    "abbreviated flag": (["--max_train", "1"], r"unrecognized arguments: --max_train"),
    "plan of a run": (["--plan", "--resume"], r"--plan: not with --resume"),
    "not a number": (["--max_t", "many"], r"--max_t: invalid int value: 'many'"),
    "max_t": (["--max_t", "0"], r"--max_t 0: must be at least 1"),
    "reduction_factor": (["--reduction_factor", "1"], r"--reduction_factor 1: must be at least 2"),
    "num_samples": (["--num_samples", "-3"], r"--num_samples -3: must be at least 1"),
    "epochs": (["--num_train_epochs", "nan"], r"--num_train_epochs nan: must be above 0"),
    "GPUs": (["--gpus_per_trial", "99"], r"--gpus_per_trial 99: this machine has \d+"),
    "CPUs": (["--cpus_per_trial", "9999"], r"--cpus_per_trial 9999: this machine has \d+"),
    "max_t above the number of steps": (
        ["--max_train_samples", "10", "--num_train_epochs", "1"],
        r"--max_t 50: .* only 5 optimizer steps",
    ),
    "no ds_config": (["--deepspeed", "@/none.json"], r"--deepspeed .*none.json: .*No such file"),
    "ds_config is a folder": (["--deepspeed", "@/empty"], r"--deepspeed .*empty: .*Is a directory"),
    "ds_config not JSON": (["--deepspeed", "@/not_json.json"], r"--deepspeed .*not_json.json: Expecting property name"),
    "ds_config not an object": (["--deepspeed", "@/list.json"], r"--deepspeed .*list.json: not a JSON object"),
    "ds_config with stage 3": (["--deepspeed", "@/stage3.json"], r"stage 3 splits a model over GPUs"),
    "ds_config with offload": (["--deepspeed", "@/offload.json"], r"offload is not supported"),
    "ds_config with a stage that is none": (
        ["--deepspeed", "@/stage4.json"],
        r"zero_optimization: stage 4 is none of 0, 1, 2, 3",
    ),
    "ds_config with autocast": (["--deepspeed", "@/autocast.json"], r"remove 'torch_autocast'"),
    "ds_config without clipping": (["--deepspeed", "@/clip.json"], r'gradient_clipping 0: must be "auto" or above 0'),
    "ds_config with a loss scale that is none": (
        ["--deepspeed", "@/scale.json"],
        r"fp16: loss_scale_window 'long': must be a number from 1 on",
    ),
    "fp16 at stage 1 on a CPU": (
        ["--deepspeed", "@/stage1.json", "--precision", "fp16"],
        r"DeepSpeed has no fp16 on a CPU at ZeRO stage 1",
    ),
    "unknown precision": (["--precision", "half"], r"--precision: invalid choice: 'half'"),
    "name too long": (["--output_dir", "x" * 300], r"x{300}.*: File name too long"),
    "data set without files": (["--dataset", "@/empty"], r"--dataset .*empty: one file train\*.json"),
    "data set without dev": (
        ["--dataset", "@/no_dev"],
        r"--dataset .*no_dev: one file dev\*.json.* or validation\*.json",
    ),
    "data set cut off": (["--dataset", "@/cut"], r"--dataset .*train.json: not a SQuAD JSON file"),
    "answer not at answer_start": (
        ["--dataset", "@/moved"],
        r"moved/train.json: 1 of 800 answers cannot be used: question train-3-2: answer 'a \w+ hat' is not at "
        r"answer_start \d+; correct them, or leave them out with --drop_bad_answers$",
    ),
    "question without an answer that should have one": (
        ["--dataset", "@/v2"],
        r"v2/dev.json: 1 of \d+ answers cannot be used: question dev-1-4: it has no answer, so is_impossible must be "
        r"true or missing, and it is False; correct them, or leave them out with --drop_bad_answers$",
    ),
    "data set with an id twice": (
        ["--dataset", "@/twice"],
        r"twice/train.json: question ids are not unique: 2 repeated, first question train-0-0$",
    ),
    "data set with half a character": (
        ["--dataset", "@/half"],
        r"half/train.json: question train-0-0: '\\ud83d' is half a character \(a lone surrogate\): correct the text$",
    ),
    "data set is a file": (["--dataset", "@/file"], r"--dataset .*file: neither a folder nor the name of a repository"),
    "model folder without config": (["--model", "@/empty"], r"--model .*empty: no config.json"),
    "weights that are none": (["--model", "@/bad_weights"], r"--model .*bad_weights: weights that cannot be read: "),
    "model folder without weights": (["--model", "@/no_weights"], r"--model .*no_weights: no weights"),
    "model with a broken tokenizer": (["--model", "@/bad_tokenizer"], r"--model .*bad_tokenizer: no usable tokenizer"),
    "no such model folder": (
        ["--model", "@/nowhere"],
        r"--model .*nowhere: neither a folder nor the name of a repository",
    ),
    **{
        f"no name of the hub: {name}": (
            [flag, name],
            rf"{flag} {name}: neither a folder nor the name of a repository on the hub$",
        )
        for flag, name in [
            ("--model", "models--bigscience--bloom-560m"),
            ("--model", "bloom-560m-"),
            ("--dataset", "my..set"),
            ("--dataset", "squad.git"),
        ]
    },
    "run_name exists": (
        ["--output_dir", "@/results", "--run_name", "old"],
        r"--run_name old: .*results/old exists already",
    ),
    "run_name is a path": (["--run_name", "../x"], r"--run_name ../x: letters, digits"),
    "output below a file": (
        ["--output_dir", "@/file/results"],
        r"--output_dir .*file/results: cannot be written: Not a directory",
    ),
    "output not writable": (["--output_dir", "/proc/results"], r"--output_dir /proc/results: cannot be written"),
}


def files_of(folder):
    return sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*"))


def arguments_of(name, broken, tiny_model, tiny_squad):
    arguments = [a.replace("@", str(broken)) for a in CASES[name][0]]
    for flag, value in {"--model": tiny_model, "--dataset": tiny_squad, "--output_dir": broken / "new"}.items():
        arguments = arguments if flag in arguments else [flag, str(value), *arguments]
    return arguments


@pytest.mark.parametrize("name", CASES)
def test_what_is_said(name, broken, tiny_model, tiny_squad):
    """The steps of the script, in this process."""
    before, beside = files_of(broken), set(ROOT.iterdir())
    with pytest.raises(errors.BadInput) as error:
        argv = arguments_of(name, broken, tiny_model, tiny_squad)
        raytune_bayesian.main(checks.check(arguments.parse("", argv)))
    assert len(str(error.value).splitlines()) == 1 and re.search(CASES[name][1], str(error.value))
    assert files_of(broken) == before and set(ROOT.iterdir()) == beside


ONE_OF_EACH_KIND = [
    "not a number",
    "max_t",
    "ds_config not JSON",
    "answer not at answer_start",
    "weights that are none",
    "no name of the hub: bloom-560m-",
    "run_name exists",
]
SLOW_IMPORTS = ["transformers", "datasets", "evaluate", "deepspeed", "ray"]


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_one_line_and_exit_code_2(name, broken, tmp_path, tiny_model, tiny_squad):
    """As from the command line, and told before anything slow is imported."""
    before = files_of(broken)
    look = f"atexit.register(lambda: pathlib.Path('{tmp_path}/modules').write_text(' '.join(sys.modules)))"
    run = "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    code = f"import atexit, pathlib, runpy, sys; {look}; {run}"
    command = [
        sys.executable,
        "-c",
        code,
        ROOT / "raytune_bayesian.py",
        *arguments_of(name, broken, tiny_model, tiny_squad),
    ]
    process = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert process.returncode == 2, process.stderr
    assert process.stdout == ""
    assert len(process.stderr.strip().splitlines()) == 1, process.stderr
    assert process.stderr.startswith("raytune_bayesian.py: error: ") and re.search(CASES[name][1], process.stderr)
    modules = set((tmp_path / "modules").read_text().split())
    assert not set(SLOW_IMPORTS) & modules
    assert files_of(broken) == before


@pytest.mark.slow
def test_one_line_after_the_slow_imports(broken, tiny_model, tiny_squad):
    name = "model with a broken tokenizer"
    process = run_script(*arguments_of(name, broken, tiny_model, tiny_squad))
    assert (process.returncode, process.stdout) == (2, "") and len(process.stderr.strip().splitlines()) == 1, (
        process.stderr
    )
    assert re.search(CASES[name][1], process.stderr)


def space_with(**changes):
    return {"train_loop_config": raytune_bayesian.SEARCH_SPACE["train_loop_config"] | changes}


def check_space(train=raytune_bayesian.train, ds_config=None, **changes):
    search_space.check(space_with(**changes), train, ds_config or {})


GRID = "BOHB draws from a domain such as tune.choice or tune.loguniform"
NORMAL = "BOHB needs bounds, and a normal distribution has none: use tune.uniform or tune.loguniform"
NESTED = "a domain inside a dictionary or a list: make it a hyperparameter of its own"
FRACTIONS = "it draws fractions: use tune.choice, tune.randint or tune.qrandint"
FIXED = "write a fixed value instead"
JSON = "cannot be written as JSON: use numbers, texts, lists or dictionaries"
SAMPLE = "BOHB cannot learn from tune.sample_from: use a range or tune.choice"
SCHEDULE = "add lr_scheduler_type, whose arguments these are"


def read(name):
    return f'use hyperparameters["{name}"] in make_trainer, or remove it'


REFUSED = {  # a hyperparameter, and what is said of it
    "bounds": ("lr", tune.loguniform(2e-4, 5e-6), "lower 0.0002 is not below upper 5e-06"),
    "no range": ("lr", tune.uniform(1e-4, 1e-4), "lower 0.0001 is not below upper 0.0001"),
    "infinite": ("lr", Float(0.0, None), "the bounds (0.0, inf) are not finite numbers"),
    "texts as bounds": ("lr", Float("1", "2"), "the bounds (1, 2) are not finite numbers"),
    "one integer": ("warmup_steps", tune.randint(1, 2), f"one value only in Uniform(1, 2): {FIXED}"),
    "no step": ("per_device_bs", tune.qrandint(1, 3, 5), f"no value in Uniform(1, 3) in steps of 5: {FIXED}"),
    "one step": ("per_device_bs", tune.qrandint(1, 7, 5), f"one value only in Uniform(1, 7) in steps of 5: {FIXED}"),
    "negative step": ("lr", tune.quniform(0.0, 1.0, -0.1), "the step -0.1 is not a number above 0"),
    "half a step": ("per_device_bs", tune.qrandint(1, 5, 0.5), "the step 0.5 is not a whole number above 0"),
    "tiny step": ("lr", tune.quniform(0.0, 1.0, 1e-20), "the step 1e-20 is too small for the bounds (0.0, 1.0)"),
    "no choice": ("wd", tune.choice([]), "there is nothing to choose from"),
    "a choice twice": ("wd", tune.choice([0.0, 0]), "a value is there twice in [0.0, 0]"),
    "a grid": ("wd", tune.grid_search([0.0, 0.01]), GRID),
    "a grid of Tune's class": ("wd", Categorical([0.0, 0.01]).grid(), GRID),
    "a domain in a list": ("wd", [tune.uniform(0, 1)], NESTED),
    "a domain in a dictionary": ("lr_scheduler_kwargs", {"a": tune.uniform(0, 1)}, NESTED),
    "sample_from": ("lr", tune.sample_from(lambda: 1e-4), SAMPLE),
    "randn": ("lr", tune.randn(1e-4, 1e-5), NORMAL),
    "qrandn": ("lr", tune.qrandn(1e-4, 1e-5, 1e-6), NORMAL),
    "a text": ("lr", tune.choice(["1e-4", "1e-5"]), "'1e-4' is not a number from 0 on"),
    "a negative lr": ("lr", tune.uniform(-1e-4, 1e-4), "-0.0001 is not a number from 0 on"),
    "a fixed text": ("lr", "1e-4", "'1e-4' is not a number from 0 on"),
    "NaN": ("wd", tune.choice([0.0, float("nan")]), "nan is not a number from 0 on"),
    "a negative wd": ("wd", -0.1, "-0.1 is not a number from 0 on"),
    "fractions of a batch": ("per_device_bs", tune.uniform(1, 2), FRACTIONS),
    "quantized fractions": ("per_device_bs", tune.quniform(1, 4, 1), "1.0 is not a whole number from 1 on"),
    "texts as batch sizes": ("per_device_bs", tune.choice(["1", "2"]), "'1' is not a whole number from 1 on"),
    "no batch": ("per_device_bs", tune.choice([0, 1]), "0 is not a whole number from 1 on"),
    "a negative batch": ("per_device_bs", tune.randint(-1, 4), "-1 is not a whole number from 1 on"),
    "True as a batch": ("per_device_bs", True, "True is not a whole number from 1 on"),
    "beta": ("adam_beta2", tune.uniform(0.9, 1.0), "1.0 is not a number from 0 to below 1"),
    "no clipping": ("max_grad_norm", tune.choice([0.0, 1.0]), "0.0 is not a number above 0"),
    "not JSON": ("exact_match_weight", tune.choice([{1}, {2}]), f"{{1}} {JSON}"),
    "a field of another name": ("learning_rate", tune.uniform(0, 1), "use lr"),
    "an argument of the search": ("num_train_epochs", tune.choice([1, 2]), "use --num_train_epochs"),
    "an old field": ("warmup_ratio", tune.uniform(0, 0.2), "use warmup_steps: below 1, it is a share of all steps"),
    "not a name": ("a/b", tune.uniform(0, 1), "a name has letters, digits and '_' only, and begins with a letter"),
    "a column of the tables": ("status", tune.uniform(0, 1), "the tables have another column of this name"),
    "a field without effect": (
        "label_smoothing_factor",
        tune.uniform(0, 0.2),
        f"this field of TrainingArguments is not passed on: {read('label_smoothing_factor')}",
    ),
    "a text that no function looks up": ("cuda", tune.uniform(0, 1), f"the training does not read it: {read('cuda')}"),
    "not read": ("dropout", tune.uniform(0, 0.2), f"the training does not read it: {read('dropout')}"),
    "kwargs without a schedule": ("lr_scheduler_kwargs", {"num_cycles": 2}, SCHEDULE),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_hyperparameter_that_cannot_be_searched(case):
    name, domain, says = REFUSED[case]
    with pytest.raises(errors.BadInput) as error:
        check_space(**{name: domain})
    assert str(error.value) == f"search space: {name}: {says}"


GOOD = [1, 2, 4, 8, 0.5, 0.25]
ODD = [*GOOD, 0, -1, 1e-5, math.nan, math.inf, True, None, "1"]
RANGES = [
    tune.uniform, tune.quniform, tune.loguniform, tune.qloguniform, tune.randint, tune.qrandint, tune.lograndint,
    tune.qlograndint, tune.randn, tune.qrandn, Float,
]  # fmt: skip


@st.composite
def any_domain(draw):
    """What a user may write, as far as Tune's own functions take it."""
    kind, value = draw(st.sampled_from([*RANGES, tune.choice, tune.grid_search, "fixed"])), st.sampled_from(ODD)
    if kind == "fixed":
        return draw(st.one_of(value, st.lists(value), st.dictionaries(st.text(), value)))
    if kind not in RANGES:
        return kind(draw(st.lists(draw(st.sampled_from([st.sampled_from(GOOD), value, st.lists(value)])), max_size=4)))
    bounds = sorted(draw(st.lists(st.sampled_from(GOOD), min_size=2, max_size=2)))
    bounds = draw(st.sampled_from([bounds, bounds, [draw(value), draw(value)]]))
    values = [*bounds, draw(st.sampled_from([1, 0.25, draw(value)]))] if kind.__name__.startswith("q") else bounds
    try:
        return kind(*values)
    except Exception:  # Tune says in the user's own line what is wrong
        assume(False)


@mock.patch.object(TuneBOHB, "_check_model", lambda self: None)  # it takes most of the time, and has its own test
@given(st.sampled_from([*search_space.REQUIRED, "warmup_steps", "adam_beta1"]), any_domain())
@example("per_device_bs", tune.qrandint(1, 9, 4))
@example("lr", tune.quniform(0.1, 0.3, 0.1))
@settings(max_examples=400)
def test_any_hyperparameter_can_be_searched_or_is_refused(name, domain):
    changes = {name: domain}
    try:
        check_space(**changes)
    except errors.BadInput as error:
        assert len(str(error).splitlines()) == 1
        return
    space = space_with(**changes)["train_loop_config"]
    search_alg = TuneBOHB({"train_loop_config": space}, seed=0)
    assert search_space.grid_size({"train_loop_config": space}) >= 1
    for i in range(5):
        suggested = space | search_alg.suggest(str(i))["train_loop_config"]
        for name, value in suggested.items():
            valid, _ = (search_space.REQUIRED | search_space.PASSED_ON)[name]
            assert valid(value) and type(value) in (int, float)
            assert search_space.smallest(space[name]) <= value <= search_space.largest(space[name])


def test_a_search_space_as_a_whole():
    check_space()
    fixed = {"lr": 1e-4, "per_device_bs": 1, "wd": 0.0}
    for space, says in [
        ({"train_loop_config": fixed}, "there is nothing to search"),
        ({"train_loop_config": {"lr": 1e-4, "per_device_bs": 1}}, "wd is missing from train_loop_config"),
        (space_with() | {"x": tune.uniform(0, 1)}, "it is a dictionary, train_loop_config, and nothing beside it"),
        ({"train_loop_config": tune.choice([fixed])}, "it is a dictionary, train_loop_config, and nothing beside it"),
    ]:
        with pytest.raises(errors.BadInput) as error:
            search_space.check(space, raytune_bayesian.train, {})
        assert str(error.value) == f"search space: {says}"
    check_space(max_grad_norm=tune.uniform(0.1, 1), ds_config={"gradient_clipping": "auto"})
    with pytest.raises(errors.BadInput, match='max_grad_norm: set gradient_clipping to "auto" in the file of'):
        check_space(max_grad_norm=tune.uniform(0.1, 1), ds_config={"gradient_clipping": 0.5})


def test_no_field_of_the_trainer_is_searched_without_effect():
    """With another field of TrainingArguments than those of PASSED_ON, the search does not start."""
    for field in set(TrainingArguments.__dataclass_fields__) - set(search_space.PASSED_ON):
        with pytest.raises(errors.BadInput, match=f"search space: {field}: "):
            check_space(**{field: tune.choice([1, 2])})


@pytest.mark.slow
def test_each_field_that_is_passed_on_has_an_effect():
    """The weights after a training differ from those without it, and from those with any other field."""
    command = [sys.executable, ROOT / "tests" / "effects.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for weights in json.loads(done.stdout.splitlines()[-1]).values():
        assert weights.pop("none") == weights["none, again"]
        assert len(set(weights.values())) == len(weights) and set(search_space.PASSED_ON) <= set(weights)


@pytest.mark.slow
def test_hyperparameters_that_are_added_are_searched(tmp_path, tiny_model, tiny_squad):
    """A line in the search space is enough, a quantized range keeps its steps, and a changed range is what runs."""
    script = write_script(
        tmp_path / "my_search.py",
        """
from ray import tune

experiment.SEARCH_SPACE["train_loop_config"] |= {
    "lr": tune.loguniform(1e-3, 2e-3),
    "warmup_steps": tune.quniform(0.0, 0.3, 0.1),
    "per_device_bs": tune.qrandint(2, 4, 2),
    "lr_scheduler_type": tune.choice(["linear", "cosine"]),
}
train = experiment.train
""",
    )
    done = run_script(
        "--model", tiny_model, "--dataset", tiny_squad, "--max_t", 2, "--num_train_epochs", 0.1, "--max_eval_samples",
        5, "--num_samples", 4, "--output_dir", tmp_path, "--run_name", "x", script=script,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    trials = files.read_csv(tmp_path / "x" / "trials.csv")
    assert [t["status"] for t in trials if t["status"] not in ("completed", "stopped")] == [] and len(trials) == 4
    for trial in trials:
        assert trial["warmup_steps"] in (0.0, 0.1, 0.2, 0.3) and trial["batch_size"] in (2, 4)
        assert trial["lr_scheduler_type"] in ("linear", "cosine") and 1e-3 <= trial["learning_rate"] <= 2e-3
    run = json.loads((tmp_path / "x" / "run.json").read_text())
    assert (
        run["search_space"]["warmup_steps"] == "Uniform(0.0, 0.3) in steps of 0.1" and run["grid"] == 10 * 2 * 2 * 4 * 2
    )


def test_schedules_are_tried_out():
    """With the smallest learning rate of the search space, and all arguments."""
    for kind in ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup", "inverse_sqrt"):
        check_space(lr_scheduler_type=kind, warmup_steps=tune.uniform(0, 0.1))
    cosine = tune.choice(["cosine_with_restarts"])
    check_space(lr_scheduler_type=cosine, lr_scheduler_kwargs=tune.choice([{"num_cycles": 1}, {"num_cycles": 2}]))
    check_space(lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 2})
    for changes, says in [
        ({"lr_scheduler_type": tune.choice(["linear", "step"])}, "lr_scheduler_type: 'step' is none of constant, "),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type: 'reduce_lr_on_plateau' is none of"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 1}, "warmup_steps: the schedule 'constant' does not use it"),
        (
            {"lr_scheduler_type": tune.choice(["polynomial"]), "lr_scheduler_kwargs": {"lr_end": 1}},
            "lr_scheduler_type 'polynomial' with lr_scheduler_kwargs {'lr_end': 1}: lr_end (1) must be smaller than",
        ),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            "lr_scheduler_type 'warmup_stable_decay' with lr_scheduler_kwargs {}: ",
        ),
    ]:
        with pytest.raises(errors.BadInput, match=re.escape(f"search space: {says}")):
            check_space(**changes)


def test_a_hyperparameter_that_the_user_reads(tmp_path, monkeypatch):
    """In any function or method of the script, or of a module that it imports; a text outside is no use of it."""
    (tmp_path / "my_code").mkdir()
    (tmp_path / "my_code" / "__init__.py").touch()
    (tmp_path / "my_code" / "my_loss.py").write_text("""
def smooth(hyperparameters):
    hyperparameters["written"] = {"other": 1}["other"]
    return hyperparameters["smoothing"]
""")
    (tmp_path / "my_search.py").write_text("""
import functools
import my_code
from my_code import my_loss
import raytune_bayesian
NAMES = ["unread"]
class Trainer(raytune_bayesian.Trainer):
    @functools.cache
    def compute_loss(self):
        return self.hyperparameters.get("temperature")
def train(config, setup, trial):
    return [config["train_loop_config"][name] for name in ("depth", "width")]
""")
    monkeypatch.syspath_prepend(tmp_path)
    import my_search

    for name in ("smoothing", "temperature", "depth", "width"):
        check_space(my_search.train, **{name: tune.uniform(0, 1)})
    for name in ("unread", "written", "other"):
        with pytest.raises(errors.BadInput, match=f"{name}: the training does not read it"):
            check_space(my_search.train, **{name: tune.uniform(0, 1)})


def test_the_script_reads_no_other_hyperparameter():
    """None of its texts can be searched without an effect, such as gradient_clipping, which it reads in ds_config."""
    tree = ast.parse(Path(raytune_bayesian.__file__).read_text())
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    others = [text for text in texts - set(search_space.HYPERPARAMETERS) if text.isidentifier()]
    assert {"gradient_clipping", "rungs", "train_loop_config", "sequences"} <= set(others)
    known = {*search_space.HYPERPARAMETERS, "seed"}  # the seed is refused below
    assert search_space.names_read(raytune_bayesian.train) <= known
    for text in others:
        with pytest.raises(errors.BadInput, match=f"search space: {text}: "):
            check_space(**{text: tune.uniform(0.1, 1)})


def test_values_of_a_domain():
    """The plan and the checks of memory and steps use the ends, the report the size of a grid."""
    for domain, ends, count, says in [
        (tune.choice([4, 1, 2]), (1, 4), 3, "choice[4, 1, 2]"),
        (tune.randint(1, 5), (1, 4), 4, "Uniform(1, 5)"),
        (tune.lograndint(1, 50), (1, 49), 10, "LogUniform(1, 50)"),
        (tune.qrandint(1, 9, 4), (4, 8), 2, "Uniform(1, 9) in steps of 4"),
        (tune.qrandint(1, 4, 1), (1, 3), 3, "Uniform(1, 4) in steps of 1"),
        (tune.qlograndint(2, 64, 2), (2, 64), 10, "LogUniform(2, 64) in steps of 2"),
        (tune.quniform(0.1, 0.3, 0.1), (0.1, 0.3), 3, "Uniform(0.1, 0.3) in steps of 0.1"),
        (Float(0.0, 0.5).quantized(0.25), (0.0, 0.5), 3, "Uniform(0.0, 0.5) in steps of 0.25"),
        (tune.uniform(0.0, 1.0), (0.0, 1.0), 10, "Uniform(0.0, 1.0)"),
    ]:
        assert (search_space.smallest(domain), search_space.largest(domain)) == ends
        space = {"train_loop_config": {"x": domain, "fixed": 3}}
        assert search_space.grid_size(space) == count
        assert search_space.describe(space) == {"x": says, "fixed": "3"}
        search_space.check_same(space, search_space.describe(space))
    with pytest.raises(
        errors.BadInput, match="x is Uniform.* in steps of 1 now, and Uniform.* in steps of 2 in the run"
    ):
        search_space.check_same(
            {"train_loop_config": {"x": tune.qrandint(0, 4, 1)}}, {"x": "Uniform(0, 4) in steps of 2"}
        )


def with_learning_rates(folder, least, most):
    """A test script with another range of the learning rate."""
    return write_script(
        folder / "my_search.py",
        f"""
from ray import tune

experiment.SEARCH_SPACE["train_loop_config"]["lr"] = tune.loguniform({least}, {most})
train = experiment.train
""",
    )


@pytest.mark.parametrize("plan", [[], ["--plan"]], ids=str)
def test_a_search_space_that_is_wrong(tmp_path, tiny_model, tiny_squad, plan):
    script, results = with_learning_rates(tmp_path, 2e-4, 5e-6), tmp_path / "results"
    process = run_here("--model", tiny_model, "--dataset", tiny_squad, "--output_dir", results, *plan, script=script)
    assert process.stdout == ""
    assert process.returncode == 2, process.stderr
    assert process.stderr == "my_search.py: error: search space: lr: lower 0.0002 is not below upper 5e-06\n"
    assert not results.exists()


# ---------------------------------------------------------------------------------------------------------------------
# known good settings


def known_of(*tries, given=(), space=raytune_bayesian.SEARCH_SPACE, more=()):
    """The known settings of a run with KNOWN and some --try."""
    argv = [word for text in tries for word in ("--try", text)]
    return known.settings(list(given), space, arguments.parse("", [*argv, *more]))


OK = {"lr": 2e-5, "per_device_bs": 2, "wd": 0.0}
TRY = "lr=2e-5,per_device_bs=2,wd=0"


def test_known_settings_are_taken_as_the_search_space_has_them(capsys):
    assert known_of() == []
    other = OK | {"lr": 2e-4}  # the upper bound
    assert known_of(TRY, " wd = 0 ,lr=.00002, per_device_bs=2.0", given=[other, OK]) == [other, OK]
    assert [type(value) for value in known_of(TRY)[0].values()] == [float, int, float]
    assert capsys.readouterr().out == "".join(
        f"--try {text}: this setting is given twice, and is tried once\n"
        for text in (TRY, " wd = 0 ,lr=.00002, per_device_bs=2.0".strip())
    )
    space = space_with(
        wd=0.1, warmup_steps=tune.quniform(0, 0.3, 0.1), adam_beta1=tune.choice([0.9, 0.8]),
        lr_scheduler_type=tune.choice(["linear", "cosine"]), lr_scheduler_kwargs=tune.choice([{}, {"a": 1, "b": [2]}]),
        flag=tune.choice([True, "1"]), width=tune.randint(2, 5), step=tune.qrandint(2, 8, 2),
        mode=tune.choice(["1", "2"]), layers=tune.choice([(1, 2), (3,)]),
    )  # fmt: skip
    text = (
        "lr=1e-5,per_device_bs=1,wd=0.1,warmup_steps=0.3,adam_beta1=.9,lr_scheduler_type=linear,"
        "lr_scheduler_kwargs={'a': 1, 'b': [2]},flag=True,mode=1,layers=[1, 2],width=4,step=8"
    )
    (setting,) = known_of(text, space=space)
    assert "wd" not in setting and setting["flag"] is True  # a fixed value is not searched
    assert setting["mode"] == "1" and setting["layers"] == (1, 2)  # the text, as there is no number 1; a tuple
    assert setting["warmup_steps"] == 0.3 and setting["lr_scheduler_kwargs"] == {"a": 1, "b": [2]}
    search_alg = TuneBOHB(space, seed=0, points_to_evaluate=known.points([setting]))
    assert search_alg.suggest("a")["train_loop_config"] == setting
    json.dumps(search_alg.get_state())
    search_alg.on_rung_result("a", 1, 0.5)


IN_LR = "is not in LogUniform(5e-06, 0.0002)"


@pytest.mark.parametrize("text, says", [
    ("lr=2e-5", "per_device_bs is missing"),
    ("lr=2e-5,per_device_bs=2,wd=0,dropout=0.1", "dropout is not in the search space"),
    ("lr=2e-4000,per_device_bs=2,wd=0", f"lr: 0.0 {IN_LR}"),
    ("lr=3e-4,per_device_bs=2,wd=0", f"lr: 0.0003 {IN_LR}"),
    ("lr=nan,per_device_bs=2,wd=0", f"lr: 'nan' {IN_LR}"),
    ("lr=1e999,per_device_bs=2,wd=0", f"lr: inf {IN_LR}"),
    ("lr=2e-5,per_device_bs=4,wd=0", "per_device_bs: 4 is not in choice[1, 2]"),
    ("lr=2e-5,per_device_bs=True,wd=0", "per_device_bs: True is not in choice[1, 2]"),
    ("lr=2e-5,per_device_bs=2,wd=", "wd: '' is not in choice[0.0, 0.01]"),
    *((text, "must be name=value,name=value,... with each name once")
      for text in ("", "2e-5", "lr=2e-5,lr=2e-5,per_device_bs=2,wd=0", "=1", "a b=1")),
])  # fmt: skip
def test_a_known_setting_that_is_wrong(text, says):
    with pytest.raises(errors.BadInput) as error:
        known_of(text)
    assert str(error.value) == " ".join(f"--try {text}: {says}".split())


@pytest.mark.parametrize("domain, value, says", [
    (tune.randint(2, 5), 5, "in Uniform(2, 5)"),
    (tune.randint(2, 5), 2.5, "in Uniform(2, 5)"),
    (tune.quniform(0, 0.3, 0.1), 0.25, "in Uniform(0, 0.3) in steps of 0.1"),
    (tune.quniform(0, 0.3, 0.1), 0.4, "in Uniform(0, 0.3) in steps of 0.1"),
    (tune.qrandint(2, 8, 2), 5, "in Uniform(2, 8) in steps of 2"),
    (tune.uniform(0, 1), True, "in Uniform(0, 1)"),
    (tune.uniform(0, 1), "0.5", "in Uniform(0, 1)"),
    (0.1, 0.2, "0.1"),
])  # fmt: skip
def test_a_known_value_that_the_domain_lacks(domain, value, says):
    setting = OK | {"wd": value}
    with pytest.raises(errors.BadInput) as error:
        known_of(given=[setting], space=space_with(wd=domain))
    assert str(error.value) == f"KNOWN: {setting}: wd: {value!r} is not {says}"


def test_known_settings_as_a_whole():
    for in_script, tries, more, says in [
        ([OK], ["lr=3e-5,per_device_bs=2,wd=0"], ["--num_samples", "1"], "--num_samples 1: there are 2 known settings"),
        ([], [], ["--baseline"], "--baseline: it is the first known setting, and there is none"),
        (["lr"], [], [], "KNOWN: must be a list of dictionaries"),
        ([OK], [TRY], ["--plan", "--max_t", "1", "--reduction_factor", "3", "4"], None),  # twice the same one
        ([OK], ["lr=3e-5,per_device_bs=2,wd=0"], ["--plan", "--max_t", "1"], "--num_samples 1: there are 2 known"),
    ]:
        with pytest.raises(errors.BadInput) if says else contextlib.nullcontext() as error:
            known_of(*tries, given=in_script, more=more)
        assert not says or str(error.value).startswith(says)


@mock.patch.object(TuneBOHB, "_check_model", lambda self: None)
@given(st.integers(0, 10**6))
@settings(max_examples=100)
def test_what_a_search_suggests_can_be_a_known_setting(seed):
    """Also in the words of the command line, and to the last digit."""
    space = space_with(wd=tune.quniform(0.1, 0.7, 0.1), n=tune.lograndint(1, 90), m=tune.qlograndint(4, 64, 4))
    suggested = TuneBOHB(space, seed=seed).suggest("a")["train_loop_config"]
    (setting,) = known_of(",".join(f"{name}={value!r}" for name, value in suggested.items()), space=space)
    assert setting == suggested
    again = TuneBOHB(space, seed=0, points_to_evaluate=known.points([setting]))
    assert again.suggest("a")["train_loop_config"] == suggested
    again.on_rung_result("a", 1, 0.0)


def test_a_search_with_a_wrong_known_setting_is_not_started(tmp_path, tiny_model, tiny_squad):
    small = ["--model", tiny_model, "--dataset", tiny_squad, "--output_dir", tmp_path / "results"]
    for more in ([], ["--plan"]):
        done = run_here(*small, *more, "--try", "lr=1,per_device_bs=2,wd=0")
        says = f"raytune_bayesian.py: error: --try lr=1,per_device_bs=2,wd=0: lr: 1 {IN_LR}\n"
        assert (done.returncode, done.stdout, done.stderr) == (2, "", says)
    assert not (tmp_path / "results").exists()


# ---------------------------------------------------------------------------------------------------------------------
# variables of the environment that change the search space


def space_of(space=raytune_bayesian.SEARCH_SPACE, **variables):
    """The search space of a run with these variables, and what the log says of them."""
    args = arguments.parse("", [])
    args.ranges, args.ds_config = ranges.read(variables), {}
    changed = ranges.space_of_run(space, raytune_bayesian.train, args)
    return changed, ranges.changes(changed, args.ranges)


@pytest.mark.parametrize("variables, says", [
    ({}, []),
    ({"LR_UPPER": "1e-4"}, ["LR_UPPER=1e-4 in the environment: lr is loguniform(5e-06, 0.0001)"]),
    ({"LR_LOWER": " 1e-5\n", "LR_UPPER": "1", "BS_CHOICES": "", "WD_CHOICES": " "},  # empty: not set
     ["LR_LOWER=1e-5 LR_UPPER=1 in the environment: lr is loguniform(1e-05, 1.0)"]),
    ({"BS_CHOICES": "1, 2 4,"}, ["BS_CHOICES=1,2,4 in the environment: per_device_bs is choice[1, 2, 4]"]),
    ({"WD_CHOICES": "0 .1", "BS_CHOICES": "8"}, ["BS_CHOICES=8 in the environment: per_device_bs is choice[8]",
                                                 "WD_CHOICES=0,.1 in the environment: wd is choice[0.0, 0.1]"]),
])  # fmt: skip
def test_the_environment_changes_the_search_space(variables, says):
    before = search_space.describe(raytune_bayesian.SEARCH_SPACE)
    space, lines = space_of(**variables)
    assert lines == says
    assert search_space.describe(raytune_bayesian.SEARCH_SPACE) == before
    suggested = TuneBOHB(space, seed=0).suggest("a")["train_loop_config"]
    for name, domain in space["train_loop_config"].items():
        assert search_space.smallest(domain) <= suggested[name] <= search_space.largest(domain)


def test_the_report_shows_the_changes_of_the_environment():
    run = {"status": "done", "arguments": {"num_samples": 3, "metric": "f1"}}
    assert report.facts_of(run, [], [])["Started with"] == "--num_samples 3 --metric f1"  # of an older version
    run["environment"] = {"LR_UPPER": "1e-4"}
    assert report.facts_of(run, [], [])["Started with"] == "LR_UPPER=1e-4 --num_samples 3 --metric f1"


def test_a_range_keeps_its_kind():
    for domain, says in [
        (tune.uniform(1e-5, 1e-4), "Uniform(1e-05, 0.001)"),
        (tune.quniform(1e-5, 1e-4, 1e-5), "Uniform(1e-05, 0.001) in steps of 1e-05"),
    ]:
        space, _ = space_of(space_with(lr=domain), LR_UPPER="1e-3")
        assert search_space.describe(space)["lr"] == says


BS, WD = "must be whole numbers separated by commas", "must be numbers separated by commas"


@pytest.mark.parametrize("change, says", [
    ("LR_UPPER=high", "must be a number"),
    ("LR_UPPER=,", "must be a number"),
    ("LR_LOWER=1e-5,1e-4", "must be a number"),
    ("LR_LOWER=nan", "must be a number"),
    ("BS_CHOICES=,", BS),
    ("BS_CHOICES=1,1.5", BS),
    ("BS_CHOICES=" + "9" * 5000, BS),
    ("WD_CHOICES=0;1", WD),
    ("LR_UPPER=5e-6", "search space: lr: lower 5e-06 is not below upper 5e-06"),
    ("LR_LOWER=0", "search space: lr: lower 0.0 of a logarithmic range must be above 0"),
    ("BS_CHOICES=0,1", "search space: per_device_bs: 0 is not a whole number from 1 on"),
    ("BS_CHOICES=2,2", "search space: per_device_bs: a value is there twice in [2, 2]"),
    ("WD_CHOICES=-1", "search space: wd: -1.0 is not a number from 0 on"),
], ids=lambda text: text[:30])  # fmt: skip
def test_a_change_of_the_environment_that_is_wrong(change, says):
    variable, _, text = change.partition("=")
    with pytest.raises(errors.BadInput) as error:
        space_of(**{variable: text.replace(",", " , ")})
    assert str(error.value) == f"{change.rstrip(',')} in the environment: {says}"


def test_a_change_that_does_not_fit_to_the_script():
    for variable, name, domain, says in [
        ("LR_UPPER", "lr", 1e-4, "lr is 0.0001 in SEARCH_SPACE, and not a range of numbers"),
        ("LR_LOWER", "lr", tune.choice([1, 2]), "lr is choice[1, 2] in SEARCH_SPACE, and not a range of numbers"),
        ("WD_CHOICES", "wd", tune.uniform(0, 1), "wd is Uniform(0, 1) in SEARCH_SPACE, and not a choice"),
        ("BS_CHOICES", "per_device_bs", 2, "per_device_bs is 2 in SEARCH_SPACE, and not a choice"),
    ]:
        with pytest.raises(errors.BadInput) as error:
            space_of(space_with(**{name: domain}), **{variable: "1"})
        assert str(error.value) == f"{variable}=1 in the environment: {says}"
    space = space_with()
    del space["train_loop_config"]["wd"]
    with pytest.raises(errors.BadInput, match="^search space: wd is missing from train_loop_config$"):
        space_of(space, WD_CHOICES="1")


def test_a_plan_with_changes_of_the_environment(tmp_path, tiny_model):
    changes = {"LR_UPPER": "1e-4", "BS_CHOICES": "1 2 4"}
    done = run_here("--plan", "--max_concurrent_trials", 4, "--model", tiny_model, **changes)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[:2] == [
        "LR_UPPER=1e-4 in the environment: lr is loguniform(5e-06, 0.0001)",
        "BS_CHOICES=1,2,4 in the environment: per_device_bs is choice[1, 2, 4]",
    ]
    assert "memory of a GPU, in GB, at batch size 4, fp16" in done.stdout


@pytest.mark.parametrize("variables, slow_imports", [({"LR_UPPER": "x"}, False), ({"LR_UPPER": "1e-9"}, True)])
def test_a_search_with_a_wrong_change_is_not_started(tmp_path, tiny_model, tiny_squad, variables, slow_imports):
    """head_node.slurm checks what needs no slow import (hpo.arguments) before it starts anything."""
    small = ["--model", tiny_model, "--dataset", tiny_squad, "--output_dir", tmp_path / "results"]
    done = run_here(*small, **variables)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"raytune_bayesian.py: error: LR_UPPER={variables['LR_UPPER']} in the environment: ")
    assert not (tmp_path / "results").exists()
    quick = subprocess.run(
        [sys.executable, "-m", "hpo.arguments"], cwd=ROOT, env=os.environ | variables, capture_output=True, timeout=60
    )
    assert quick.returncode == (0 if slow_imports else 2)


@pytest.mark.slow
def test_a_resumed_search_keeps_the_changes_of_its_environment(tmp_path, tiny_model, tiny_squad):
    """They are taken from the run. Others are refused, and the same ones in other words are not."""
    script = write_script(
        tmp_path / "cut.py",
        """
search, train = experiment.search, experiment.train


def cut(run, train):
    if not run.args.resume:
        raise RuntimeError("cut")
    return search(run, train)


experiment.search = cut
""",
    )
    run = ["--output_dir", tmp_path, "--run_name", "x"]
    small = ["--max_t", 2, "--num_train_epochs", 0.1, "--num_samples", 2, "--max_eval_samples", 5]
    changes = {"LR_LOWER": "1e-3", "LR_UPPER": "2e-3", "WD_CHOICES": "0.2"}
    begun = run_script(*run, "--model", tiny_model, "--dataset", tiny_squad, *small, script=script, **changes)
    assert begun.returncode == 1 and "RuntimeError: cut" in begun.stderr
    facts = json.loads((tmp_path / "x" / "run.json").read_text())
    assert facts["environment"] == changes
    assert facts["search_space"] == {
        "lr": "LogUniform(0.001, 0.002)", "per_device_bs": "choice[1, 2]", "wd": "choice[0.2]"
    }  # fmt: skip

    refused = "cut.py: error: --resume: "
    for variables, says in [
        ({"LR_UPPER": "3e-3"}, "other arguments than the run's: LR_UPPER=3e-3 in the environment (the run has 2e-3)"),
        ({"BS_CHOICES": "4"}, "search space: per_device_bs is choice[4] now, and choice[1, 2] in the run"),
    ]:
        again = run_here(*run, "--resume", script=script, **variables)
        assert again.returncode == 2 and again.stderr == f"{refused}{says}\n", again.stderr
    resumed = run_script(*run, "--resume", script=script, LR_UPPER="0.002")
    assert resumed.returncode == 0, resumed.stderr
    assert "in the environment: lr is loguniform(0.001, 0.002)" in resumed.stdout
    trials = files.read_csv(tmp_path / "x" / "trials.csv")
    assert len(trials) == 2 and all(1e-3 <= trial["learning_rate"] <= 2e-3 for trial in trials)
    assert {trial["weight_decay"] for trial in trials} == {0.2}


def test_a_folder_that_may_not_be_entered(tmp_path, tiny_model, tiny_squad):
    """Root may enter all folders: so the check runs as another user."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    args = arguments.parse("", ["--model", str(closed / "model"), "--dataset", str(tiny_squad)])
    os.seteuid(65534)
    try:
        with pytest.raises(errors.BadInput, match="Permission denied"):
            checks.check(args)
    finally:
        os.seteuid(0)


def test_prefetch_on_a_login_node_does_not_look_for_gpus():
    args = arguments.parse("", ["--prefetch", "--gpus_per_trial", "99"])
    checks.check(args)


@pytest.mark.parametrize("flags", [["--help"], ["--max_t", "0"], ["--nonsense"]])
def test_help_and_wrong_flags_import_the_standard_library_only(flags, tmp_path):
    """What is imported is told by Python itself, on stderr."""
    process = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "raytune_bayesian.py", *flags],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert process.returncode == (0 if flags == ["--help"] else 2)
    modules = {
        line.rpartition("|")[2].strip().partition(".")[0]
        for line in process.stderr.splitlines()
        if "import time:" in line
    }
    # of Jython: copy looks for it
    by_site = {"sitecustomize", "usercustomize", "apport_python_hook", "_distutils_hack", "_virtualenv"} | {"org"}
    others = {name for name in modules - by_site if name not in sys.stdlib_module_names and not name.startswith("__")}
    assert "argparse" in modules and others <= {"hpo", "imported package"}, others


def test_a_data_set_is_read_once(tiny_model, tiny_squad):
    """By the checks; the script takes what they have read."""
    args = arguments.parse("", ["--model", str(tiny_model), "--dataset", str(tiny_squad)])
    loading.load_examples.cache_clear()
    checks.check(args)
    loading.load_examples(args.dataset, args.prefetch, args.drop_bad_answers)  # as main does
    assert loading.load_examples.cache_info()[:2] == (1, 1)  # hits, misses


@pytest.mark.slow
def test_bad_answers_can_be_dropped_and_the_log_says_how_many(broken, tiny_model, tiny_squad, tmp_path):
    """The whole search, and its resumption, which takes the flag from the run."""
    with changed_squad(broken / "moved", tmp_path / "squad", "dev") as dev:
        for passage in dev["data"][0]["paragraphs"][:3]:
            for answer in passage["qas"][0]["answers"]:
                answer["answer_start"] = 10**6
    run = ["--output_dir", tmp_path, "--run_name", "x"]
    small = ["--max_t", 1, "--num_train_epochs", 0.1, "--num_samples", 1, "--max_eval_samples", 57]
    of_run = ["--model", tiny_model, "--dataset", tmp_path / "squad", *small]
    process = run_script(*run, *of_run, "--drop_bad_answers")
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert "bad answers left out of the training set: 1, and with them 0 of its 400 questions" in lines
    assert "bad answers left out of the validation set: 6, and with them 3 of its 60 questions" in lines
    tested = "Test of the best model on 57 of the 60 questions of the validation set (3 of them are left out)"
    assert f"{tested}, which no decision has used:" in lines
    assert json.loads((tmp_path / "x" / "run.json").read_text())["arguments"]["drop_bad_answers"] is True

    again = run_here(*run, "--resume")
    assert (again.returncode, again.stderr) == (0, "") and "is done already" in again.stdout


def test_a_run_of_an_older_version_drops_no_answers(tmp_path):
    of_run = arguments.kept(arguments.parse("", ["--precision", "fp32"]))
    del of_run["drop_bad_answers"]
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "run.json").write_text(json.dumps({"arguments": of_run, "search_space": {}}))
    resume = ["--resume", "--run_name", "x", "--output_dir", str(tmp_path)]
    assert arguments.parse("", resume).drop_bad_answers is False
    with pytest.raises(errors.BadInput) as error:
        arguments.parse("", [*resume, "--drop_bad_answers"])
    assert str(error.value) == ("--resume: other arguments than the run's: --drop_bad_answers True (the run has False)")


@pytest.fixture()
def hub(tmp_path):
    """A hub on this machine with a model in both kinds of weights; yields its folder, and the environment."""
    model = make_model(tmp_path / "hub" / "models" / "tiny" / "bloom")
    weights = safetensors.torch.load_file(model / "model.safetensors")
    torch.save(weights, model / "pytorch_model.bin")
    Hub.root, Hub.requests = tmp_path / "hub", []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache")}
    yield model, environment | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("kinds", [["model.safetensors", "pytorch_model.bin"], ["pytorch_model.bin"], []])
def test_weights_of_either_kind_are_fetched_and_never_both(kinds, hub, tiny_squad):
    folder, environment = hub
    for kind in {"model.safetensors", "pytorch_model.bin"} - set(kinds):
        (folder / kind).unlink()
    prefetch = "import sys; from hpo.squad import loading; loading.prefetch(*sys.argv[1:], False); "
    prefetch += "print('a plan finds', loading.local_model(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", prefetch, "tiny/bloom", tiny_squad],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, **environment},
    )
    fetched = {path.rpartition("/")[2] for path in Hub.requests}
    assert fetched & {"model.safetensors", "pytorch_model.bin"} == set(kinds[:1])
    if kinds:
        assert done.returncode == 0 and "400 training and 60 validation questions" in done.stdout, done.stderr
        assert re.search(rf"a plan finds /.*{Hub.COMMIT}\n$", done.stdout)  # although not all files were fetched
    else:
        error = done.stderr.splitlines()[-1].removeprefix("hpo.errors.BadInput: ")
        assert error == "--model tiny/bloom: no weights (*.safetensors or pytorch_model*.bin) in this folder"


def test_a_hub_set_in_the_cache_is_read_or_refused_with_its_splits(monkeypatch, tiny_squad, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "datasets--tiny--squad"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    train = reading.read_squad(tiny_squad / "train.json")
    rows = [{name: e[name] for name in ("id", "context", "question", "answers")} for e in train]
    (folder / "snapshots" / ("0" * 40) / "data").mkdir(parents=True)

    def write(split, rows):
        path = folder / "snapshots" / ("0" * 40) / "data" / f"{split}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)

    write("train", rows)
    write("test", rows)
    loading.load_examples.cache_clear()
    with pytest.raises(errors.BadInput) as error:
        loading.load_examples("tiny/squad")
    assert str(error.value) == (
        "--dataset tiny/squad: train and validation splits are needed, and it has: test, train; pass a folder with "
        "train.json and dev.json as --dataset, or run with --prefetch if the cache has only a part of it"
    )

    moved = {"text": rows[0]["answers"]["text"], "answer_start": [0, 0]}
    write("validation", [rows[0] | {"answers": moved}, *rows[1:]])
    with pytest.raises(errors.BadInput, match="tiny/squad, validation: 2 of 800 answers cannot be used: "):
        loading.load_examples("tiny/squad")
    read = loading.load_examples("tiny/squad", False, True)
    assert read[:2] == ([e | {"title": ""} for e in train], [e | {"title": ""} for e in train[1:]])
    assert read[2]["validation"] == {"answers": 2, "questions": 1, "read": 400}


def test_help_lists_and_explains_all_flags():
    process = run_script("--help")
    assert process.returncode == 0
    flags = re.findall(r"^  --(\w+)(?: [^ ]+)*? {2,}\S|^  --(\w+)(?: .*)?\n {20,}\S", process.stdout, re.MULTILINE)
    explained = {first or second for first, second in flags}
    assert explained == set(vars(arguments.parse("", []))) - {
        "given",
        "cluster",
        "ranges",
        "known",
        "earlier_results",
    }, process.stdout


def test_defaults():
    args = arguments.parse("", [])
    assert (args.model, args.dataset) == ("bigscience/bloom-560m", "rajpurkar/squad")
    assert (args.max_t, args.reduction_factor, args.metric) == (50, 4, "eval_loss")


def test_what_a_full_disk_looks_like(tmp_path):
    """Torch, safetensors and Python each raise their own; other errors say nothing of a disk."""
    import torch
    from safetensors.torch import save_file

    if os.getuid() != 0:
        pytest.skip("only root can mount a small file system")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", tmp_path], check=True)
    try:
        weights = {"w": torch.zeros(10**6)}
        for write in (torch.save, save_file, lambda data, path: path.write_bytes(bytes(data["w"].numpy()))):
            with pytest.raises(Exception) as caught:
                write(weights, tmp_path / "weights")
            assert errors.is_storage(caught.value), caught.value
            (tmp_path / "weights").unlink(missing_ok=True)
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    for other in (
        ValueError("no"),
        FileNotFoundError(2, "No such file"),
        OSError(24, "Too many open files"),
        TimeoutError(),
    ):
        assert not errors.is_storage(other)


def test_a_ds_config_for_one_training_is_taken(tmp_path, capsys):
    """Each setting that the search decides is replaced, with a line. What has no effect is left out."""
    of_one_training = {
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-05}},
        "scheduler": {"type": "WarmupLR"},
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "fp16": {"enabled": True, "initial_scale_power": 12},
        "zero_optimization": {
            "stage": 0, "offload_optimizer": {"device": "none"}, "offload_param": {"device": "none"},
            "cpu_offload": False, "cpu_offload_param": False, "cpu_offload_use_pin_memory": True,
        },
    }  # fmt: skip
    (tmp_path / "ds.json").write_text(json.dumps(of_one_training))
    assert checks.read_ds_config(arguments.parse("", ["--deepspeed", str(tmp_path / "ds.json")])) == {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 0},
        "fp16": {"enabled": "auto", "initial_scale_power": 12},
        "bf16": {"enabled": "auto"},
    }
    replaced = [
        'optimizer {"type": "AdamW", "params": {"lr": 2e-05}} is replaced by '
        "torch's AdamW with each trial's lr and wd",
        'scheduler {"type": "WarmupLR"} is replaced by '
        "the Trainer's schedule, linear from each trial's lr to 0 if it is not searched",
        "train_micro_batch_size_per_gpu 4 is replaced by each trial's per_device_bs",
        "gradient_accumulation_steps 2 is replaced by --gradient_accumulation_steps",
        "fp16: enabled true is replaced by --precision",
    ]
    assert capsys.readouterr().out == "".join(f"--deepspeed {tmp_path}/ds.json: {line}\n" for line in replaced)


def test_another_ray_is_told_before_it_is_imported(monkeypatch, tmp_path):
    """And requirements.txt asks for the Ray that this program was tested with."""
    assert f"ray[default,tune]=={checks.TESTED_WITH} " in (ROOT / "requirements.txt").read_text()
    monkeypatch.setattr(checks, "TESTED_WITH", "1.0.0")
    refused = run_here("--deepspeed", tmp_path / "none.json")
    expected = f"WARNING: Ray {ray.__version__} is installed; this program was tested with Ray 1.0.0\n"
    assert refused.stdout == expected and refused.returncode == 2

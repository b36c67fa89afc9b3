"""A tiny model and a tiny data set, made in a second: what a test needs that does not look at learning."""

import contextlib
import fcntl
import gc
import io
import json
import os
import random
import runpy
import subprocess
import sys
import unittest.mock
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest

import hpo  # noqa: F401  before ray: it sets Ray's environment

os.environ["OMP_NUM_THREADS"] = "1"  # threads that spin on a busy machine make small models slower

# An example may take as long as it does: machines are busy.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

ROOT = Path(__file__).parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # for the processes of trials
SCRIPT = ROOT / "raytune_bayesian.py"
SHARED_SQUAD = ROOT.parent / "shared" / "squad"


SIZES = {"train": (20, 20), "dev": (6, 10)}  # articles, and passages of an article


def make_squad(folder: Path) -> Path:
    """Writes train.json and dev.json with one question for each passage."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for split, (articles, passages) in SIZES.items():
        data = []
        for a in range(articles):
            paragraphs = []
            for p in range(passages):
                names, colours = ["Bo", "Al", "Cy", "Di"], ["red", "blue", "green", "pink"]
                rng.shuffle(colours)
                context = f"Tale {a}.{p} of {split}. " + " ".join(
                    f"{n} has a {c} hat." for n, c in zip(names, colours, strict=False)
                )
                who = rng.randrange(4)
                answers = [
                    {"text": t, "answer_start": context.index(t)} for t in (colours[who], f"a {colours[who]} hat")
                ]
                qas = [{"id": f"{split}-{a}-{p}", "question": f" What hat has {names[who]}?", "answers": answers}]
                paragraphs.append({"context": context, "qas": qas})
            data.append({"title": f"{split} {a}", "paragraphs": paragraphs})
        (folder / f"{split}.json").write_text(json.dumps({"version": "1.1", "data": data}))
    return folder


def make_model(folder: Path, dropout: float = 0.0) -> Path:
    """Saves a random BLOOM of two layers and a byte-level tokenizer without merges worth speaking of."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(
        ["Question: What hat has Bo? Context: Al has a pink hat. Answer: red blue green"] * 9, trainer
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=len(fast), hidden_size=32, n_layer=2, n_head=4, hidden_dropout=dropout, attention_dropout=dropout,
        bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    BloomForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_squad(tmp_path_factory) -> Path:
    return make_squad(tmp_path_factory.mktemp("squad"))


@pytest.fixture(scope="session")
def uneven_squad(tmp_path_factory):
    """Answers of different lengths: the mean over ranks of their means is not the mean over tokens."""
    folder = make_squad(tmp_path_factory.mktemp("uneven"))
    content = json.loads((folder / "train.json").read_text())
    for i, paragraph in enumerate(paragraph for article in content["data"] for paragraph in article["paragraphs"]):
        if i % 3 == 0:  # "a red hat" instead of "red" is the one to learn
            paragraph["qas"][0]["answers"].reverse()
    (folder / "train.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def dropout_model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("dropout_model"), dropout=0.1)


@pytest.fixture(scope="session")
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def ray_token(tmp_path_factory) -> Path:
    """The token of every Ray that is started in this process: Ray reads it once a process."""
    token = tmp_path_factory.mktemp("token") / "token"
    token.touch(mode=0o600)
    token.write_text(os.urandom(32).hex())
    return token


@pytest.fixture(scope="session")
def joined():
    """The Group of trials in this process, and the environment variables of DeepSpeed. It can be made once a process:
    DeepSpeed keeps what it knows of the first one.
    """
    import torch

    from bench import common

    before = dict(os.environ)
    group = common.one_rank()
    own = {name: value for name, value in os.environ.items() if before.get(name) != value}
    os.environ.clear()
    os.environ.update(before)
    gc.unfreeze()
    yield group, own
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def one_rank(joined):
    """The Group of trials in this process, with one rank; DeepSpeed's environment variables for the module's tests."""
    group, own = joined
    before = dict(os.environ)
    os.environ.update(own)
    yield group
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def ray_without_gpu(ray_token):
    """Ray in this process, as the script starts it. Its worker processes can train in fp16 on the CPU."""
    import tempfile

    import ray

    from hpo.cluster.launch import start_ray
    from slurm_cluster import NO_GPU

    before = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(NO_GPU), os.environ["PYTHONPATH"]])
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(ray_token)
    with tempfile.TemporaryDirectory(prefix="bohb-") as temp_dir, tempfile.TemporaryDirectory() as trials_dir:
        start_ray(0, temp_dir, trials_dir)
        yield
        ray.shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo's model; its data is beside it. Made by the first of the tests' processes that asks for it."""
    folder = ROOT / "demo" / "model"
    with open(__file__) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            subprocess.run([sys.executable, ROOT / "demo" / "make_demo.py"], check=True, timeout=1200)
    return folder


@pytest.fixture(scope="session")
def shared_squad() -> Path:
    if not SHARED_SQUAD.is_dir():
        pytest.skip("real SQuAD is not beside this clone (../shared/squad)")
    return SHARED_SQUAD


# Files of tests that start Ray, a browser or many processes, in the order in which they run, after all others. The
# shortest come last: of three processes (make test) none then waits long for another at the end.
SLOW = ["run", "extend", "demo", "trial", "faults", "bench", "precision", "lora", "shared_gpus", "check", "slurm",
        "trackers", "known", "memory", "launches"]  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the marks
def pytest_collection_modifyitems(items):
    """Quick tests first. Of three processes (make test), one begins with the cluster's tests, which mostly wait."""
    order = [f"test_{name}" for name in SLOW]
    for item in items:
        if item.module.__name__ in order:
            item.add_marker(pytest.mark.slow)
    if "PYTEST_XDIST_WORKER" in os.environ:
        order.remove("test_slurm")
        order = ["test_slurm", None, *order]
    else:
        order = [None, *order]
    names = {name: i for i, name in enumerate(order)}
    items.sort(key=lambda item: names.get(item.module.__name__, names[None]))


def run_script(*arguments, timeout=900, script=SCRIPT, before=(), **environment) -> subprocess.CompletedProcess:
    """Runs the script as a user does, in a process group of its own, `before` in front of the command."""
    command = [*before, sys.executable, str(script), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True, **pipes)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def run_here(*arguments, script=SCRIPT, **environment) -> subprocess.CompletedProcess:
    """Runs the script from its first line, as run_script does, in this process, which has the slow imports already.

    For command lines that end before Ray starts: plans and refusals.
    """
    patch, out, err, code = unittest.mock.patch, io.StringIO(), io.StringIO(), 0
    argv = [str(script), *map(str, arguments)]
    experiment = sys.modules.pop(SCRIPT.stem, None)  # a test script imports it anew, and may change it
    with contextlib.ExitStack() as stack:
        for change in (
            patch.dict(os.environ, environment),
            patch.object(sys, "argv", argv),
            patch("os.execve", side_effect=AssertionError("--resume goes on with another code")),
            patch("hpo.cluster.run.atexit", SimpleNamespace(register=stack.callback)),  # the lock of the run folder
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            stack.enter_context(change)
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        finally:
            gc.unfreeze()  # see errors.exit_on_bad_input
            sys.modules.pop(SCRIPT.stem, None)
            if experiment:
                sys.modules[SCRIPT.stem] = experiment
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())

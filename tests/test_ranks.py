"""Trials of several ranks, on real Ray and real DeepSpeed: two processes on the CPU, as no GPU is here."""

import errno
import json
import os
import tempfile
import types

import pytest
import ray
import torch
from conftest import ROOT
from ray import tune
from ray.exceptions import RayActorError
from test_trial import PauseAtRungs, config, prepare
from transformers import AutoModelForCausalLM

import ranks
import raytune_bayesian
import resume


@pytest.fixture(scope="module", autouse=True)
def ray_session():
    os.environ["FAKE_GPUS"] = "2"
    with tempfile.TemporaryDirectory(prefix="bohb-") as temp_dir, tempfile.TemporaryDirectory() as trials_dir:
        raytune_bayesian.start_ray(types.SimpleNamespace(gpus_per_trial=0), temp_dir, trials_dir)
        yield
        ray.shutdown()
    del os.environ["FAKE_GPUS"]


def run_trials(folder, trainable, run, configs, scheduler=None, size=2, max_failures=0):
    """As in test_trial, with a bundle for each rank; results of trials that failed are among them."""
    bundles = tune.PlacementGroupFactory([{"CPU": 1 / size}] * size, strategy="STRICT_PACK")
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trainable, run=run | {"gpus_per_trial": size}), bundles),
        param_space={"i": tune.grid_search(list(range(len(configs)))), "configs": configs},
        tune_config=tune.TuneConfig(scheduler=scheduler, reuse_actors=True, max_concurrent_trials=1),
        run_config=tune.RunConfig(
            name="ray", storage_path=str(folder), verbose=0, checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
            failure_config=tune.FailureConfig(max_failures=max_failures),
        ),
    )  # fmt: skip
    return sorted(tuner.fit(), key=lambda result: result.config["i"])


def trial(config, run):
    import raytune_bayesian

    raytune_bayesian.train(config["configs"][config["i"]], run)


def with_stage(run, stage):
    ds_config = json.loads((ROOT / "ds_config.json").read_text())
    zero = {"stage": stage} | ({"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {})
    return run | {"ds_config": ds_config | {"zero_optimization": zero}}


def losses(result):
    return result.metrics_dataframe["eval_loss"].tolist()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_ranks_equal_one_at_the_same_global_batch(tmp_path, tiny_model, tiny_squad, stage):
    """Also where the trial was paused at two rungs: to the last bit what it is without a pause."""
    run = prepare(tiny_model, tiny_squad, "--max_t", 8, "--num_train_epochs", 0.5, "--max_eval_samples", 45)
    one = run_trials(tmp_path / "one", trial, with_stage(run, min(stage, 2)), [config(per_device_bs=2)], size=1)[0]
    scheduler = PauseAtRungs([1, 3])
    configs = [config(per_device_bs=1), config(per_device_bs=1)]
    two, again = run_trials(tmp_path / "two", trial, with_stage(run, stage), configs, scheduler)
    assert scheduler.pauses == 4
    through = run_trials(tmp_path / "through", trial, with_stage(run, stage), configs[:1])[0]
    assert losses(two) == losses(again) == losses(through) and len(losses(two)) == 8
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert two.metrics["exact_match"] == one.metrics["exact_match"]
    models = [AutoModelForCausalLM.from_pretrained(result.checkpoint.path) for result in (one, two)]  # as best_model is made
    for (name, weight), other in zip(models[0].named_parameters(), models[1].parameters()):
        assert torch.allclose(weight, other, atol=1e-4), name


def harmed_trial(config, run):
    """Does what `harm` says to the process of rank 1, once, after the first report with a checkpoint."""
    import os
    import signal
    import threading
    import time
    from pathlib import Path

    import psutil

    import raytune_bayesian

    c = config["configs"][config["i"]]

    def harm():
        while not list(Path(c["folder"]).glob("ray/*/checkpoint_*")):
            time.sleep(0.05)
        (rank,) = [p for p in psutil.Process(os.getppid()).children(recursive=True) if "".join(p.cmdline()).startswith("ray::Rank")]
        rank.send_signal(signal.SIGKILL)
        rank.wait(60)
        Path(c["folder"], "harmed").write_text(str(rank.pid))

    if "folder" in c and not os.path.exists(c["folder"] + "/started"):
        Path(c["folder"], "started").touch()
        threading.Thread(target=harm, daemon=True).start()
    raytune_bayesian.train(c, run)


def test_a_dead_rank_costs_the_trial_its_work_since_the_last_rung(tmp_path, tiny_model, tiny_squad):
    """kill -9: the trial goes on from its checkpoint, in other processes, and comes to what it would have come to."""
    run = prepare(tiny_model, tiny_squad, "--max_t", 8, "--num_train_epochs", 8, "--max_eval_samples", 45)
    c = config(per_device_bs=1, rungs=(1, 8))
    harmed, through = run_trials(tmp_path, harmed_trial, run, [c | {"folder": str(tmp_path)}, c], max_failures=1)
    assert (tmp_path / "harmed").read_text() and harmed.error is None and through.error is None
    assert harmed.metrics["eval_loss"] == through.metrics["eval_loss"] and harmed.metrics["training_iteration"] == 8


def failing_trial(config, run):
    import raytune_bayesian

    c = config["configs"][config["i"]]
    raytune_bayesian.train(c, run | {"train": Unreadable(run["train"])} if c["bad"] else run)


class Unreadable:
    """Cannot be read by rank 1."""

    def __init__(self, data):
        self.data, self.lengths = data, data.lengths

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        if os.environ["RANK"] == "1":
            raise ValueError("cannot read question 7")
        return self.data[i]


@pytest.mark.parametrize(
    "errors, killed, kind, text",
    [
        ([OSError(errno.ENOSPC, "No space left on device"), FileNotFoundError(2, "gone")], False, OSError, "No space left"),
        ([RuntimeError("gloo: Connection closed by peer"), torch.OutOfMemoryError("CUDA out of memory")], False, resume.TrialFailed, "CUDA out of memory"),
        ([ValueError("no"), RuntimeError("gloo: Connection reset by peer")], False, resume.TrialFailed, "ValueError no"),
        ([RuntimeError("gloo: Connection closed by peer"), RayActorError()], False, ConnectionError, "a rank is lost"),
        ([RuntimeError("gloo: Connection closed by peer"), RayActorError()], True, resume.TrialFailed, "out of memory"),
        ([torch.distributed.DistBackendError("NCCL error: unhandled system error")], False, ConnectionError, "NCCL error"),
        ([RuntimeError("CUDA error: an illegal memory access")], False, ConnectionError, "CUDA error"),
    ],
)
def test_what_to_make_of_errors(errors, killed, kind, text):
    """A full disk is waited for, a lost rank or a broken GPU is the node's fault, and all else the trial's, which is not tried again."""
    cause = ranks._cause(errors, killed)
    assert type(cause) is kind and text in str(cause)


def test_what_one_rank_alone_fails_at_is_the_trial_s_failure(tmp_path, tiny_model, tiny_squad):
    """The reason comes from that rank, and the next trial has processes of its own. NaN is what all ranks see."""
    run = prepare(tiny_model, tiny_squad, "--max_t", 4, "--num_train_epochs", 0.2, "--max_eval_samples", 45)
    good = config(per_device_bs=1, rungs=(1, 4)) | {"bad": False}
    nan = config(lr=1e30, per_device_bs=1, rungs=(1, 4)) | {"bad": False}
    results = run_trials(tmp_path, failing_trial, run, [nan, good | {"bad": True}, good])
    assert "eval_loss is nan" in str(results[0].error) and results[2].error is None
    assert "TrialFailed: ValueError cannot read question 7" in str(results[1].error), results[1].error

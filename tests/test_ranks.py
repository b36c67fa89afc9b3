"""Trials of several ranks, on real Ray and real DeepSpeed: two processes on the CPU, as no GPU is here."""

import json
import os
import tempfile
import types

import psutil
import pytest
import ray
import torch
from conftest import ROOT
from ray import tune
from safetensors.torch import load_file
from test_trial import PauseAtRungs, config, prepare

import raytune_bayesian


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
    weights = [load_file(f"{result.checkpoint.path}/model.safetensors") for result in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], atol=1e-4), name

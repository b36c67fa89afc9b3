"""LoRA, gradient accumulation and gradient checkpointing: what a trial trains with, its checkpoints, best_model."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import raytune_bayesian
from hpo.squad import evaluation, loading, lora, models
from test_trial import PauseAtRungs, config, losses, prepare, run_ranks, run_trials, trial, with_stage


def with_more(base: dict, **more) -> dict:
    """A trial's config with more hyperparameters."""
    return base | {"train_loop_config": base["train_loop_config"] | more}


def size(folder) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


@pytest.mark.usefixtures("ray_without_gpu")
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_paused_trial_equals_one_that_ran_through(tmp_path, dropout_model, tiny_squad, stage):
    """To the last bit, with adapters, accumulation and gradient checkpointing together.

    190 questions make 24 steps of 4 batches of 2; the last one has 3 batches.
    """
    more = ("--max_eval_samples", 20, "--lora_r", 4, "--gradient_accumulation_steps", 4, "--gradient_checkpointing")
    setup = prepare(dropout_model, tiny_squad, "--max_t", 8, "--num_train_epochs", 0.5, *more)
    setup = with_stage(setup, stage)
    scheduler = PauseAtRungs([1, 3, 8])
    configs = [config(), config(), with_more(config(), lora_r=8)]
    paused, through, other = run_trials(tmp_path, trial, setup, configs, scheduler)
    assert scheduler.pauses == 3 and len(losses(paused)) == 8
    assert losses(paused) == losses(through) != losses(other)
    weights = [load_file(f"{result.checkpoint.path}/adapter_model.safetensors") for result in (through, paused)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.usefixtures("ray_without_gpu")
@pytest.mark.parametrize("stage, ranks", [(0, 1), (1, 1), (2, 2), (3, 2)])
def test_checkpoint_has_adapters_only_and_best_model_is_a_plain_model(tmp_path, demo_model, tiny_squad, stage, ranks):
    """Of a full training, and of one that was stopped at a rung."""
    more = ("--max_eval_samples", 20, "--lora_r", 4, "--lora_target_modules", "all-linear")
    setup = with_stage(prepare(demo_model, tiny_squad, "--max_t", 3, "--num_train_epochs", 0.1, *more), stage)
    ended, cut = with_more(config(lr=1e-2, rungs=[3]), lora_alpha=16.0), with_more(config(lr=1e-2, rungs=[2]), lora_r=8)
    for c in (ended, cut):
        c["train_loop_config"]["per_device_bs"] = 1
    results = run_ranks(tmp_path / "ray", trial, setup, [ended, cut], size=ranks)
    adapters = lora.count_trained(demo_model, 8, "all-linear")
    assert 0 < adapters < loading.count_parameters(demo_model) / 5
    for result, c, iteration in zip(results, (ended, cut), (3, 2), strict=True):
        checkpoint, path = Path(result.checkpoint.path), tmp_path / f"model-{iteration}"
        assert models.is_of_full_training(checkpoint) is (iteration == 3)
        assert size(checkpoint) < loading.checkpoint_bytes(demo_model, adapters)
        of_trial = lora.of_trial(setup, c["train_loop_config"])
        models.save_best_model(checkpoint, demo_model, "fp32", path, of_trial)
        merged, pretrained = load_file(path / "model.safetensors"), load_file(demo_model / "model.safetensors")
        assert merged.keys() == pretrained.keys()
        changed = {name for name in merged if not torch.equal(merged[name], pretrained[name])}
        assert changed and all(
            name.endswith(("query_key_value.weight", "dense.weight", "4h.weight", "h.weight")) for name in changed
        )
        model = evaluation.fuse_gelu(AutoModelForCausalLM.from_pretrained(path))
        loss = evaluation.evaluate_loss(model, setup.selection, 0, raytune_bayesian.EVAL_TOKENS)
        assert loss == pytest.approx(losses(result)[iteration - 1], rel=1e-5)


@pytest.mark.usefixtures("ray_without_gpu")
@pytest.mark.parametrize("stage, ranks", [(0, 1), (1, 1), (0, 2), (2, 2), (3, 2)])
def test_accumulated_batches_equal_one_large_batch(tmp_path, tiny_model, uneven_squad, stage, ranks):
    """Answers differ in length, so a mean of the batches' means would be another loss. The last step has one batch."""
    more = ("--max_train_samples", 164, "--num_train_epochs", 1, "--max_eval_samples", 20)
    setup = prepare(tiny_model, uneven_squad, "--max_t", 7, *more)
    (one,) = run_ranks(tmp_path / "one", trial, setup, [config(per_device_bs=24, rungs=[7])], size=1)
    several = with_more(config(per_device_bs=24 // ranks // 3, rungs=[7]), gradient_accumulation_steps=3)
    (many,) = run_ranks(tmp_path / "many", trial, with_stage(setup, stage), [several], size=ranks)
    assert len(losses(one)) == 7 and losses(many) == pytest.approx(losses(one), rel=1e-4)
    ends = [AutoModelForCausalLM.from_pretrained(result.checkpoint.path) for result in (one, many)]
    for (name, weight), other in zip(ends[0].named_parameters(), ends[1].parameters(), strict=True):
        assert torch.allclose(weight, other, atol=1e-4), name

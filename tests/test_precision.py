"""fp16 as fp32 is tested: the real DeepSpeed engine trains in fp16 on the CPU, with a scaled loss, overflows and
skipped steps, on real Ray.
"""

import dataclasses
import functools
import json
import math
import unittest.mock
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import masking_utils

import raytune_bayesian
from conftest import ROOT
from hpo import errors
from hpo.results import trial_log
from hpo.squad import evaluation, models, precision
from hpo.squad.group import ONE_RANK
from test_trial import PauseAtRungs, config, losses, prepare, run_in_ranks, run_ranks

pytestmark = pytest.mark.usefixtures("ray_without_gpu")


def in_fp16(setup, stage, precision="fp16", **fp16):
    """The run in fp16, or bf16, at a ZeRO stage; fp16: what its ds_config says of the loss scale."""
    ds_config = json.loads((ROOT / "ds_config.json").read_text())
    ds_config["zero_optimization"] = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    ds_config["fp16"] |= fp16
    return dataclasses.replace(setup, ds_config=ds_config, precision=precision)


def trial(config, setup):
    """A trial whose loss is multiplied, and which reports its learning rate."""
    import scaled_loss

    run_in_ranks(config, scaled_loss.train, setup)


def with_loss(multiplier, **more):
    return config(per_device_bs=more.pop("per_device_bs", 2), **more) | {"multiplier": multiplier}


@pytest.fixture(scope="module")
def setup(tiny_model, tiny_squad):
    return prepare(tiny_model, tiny_squad, "--max_t", 4, "--num_train_epochs", 0.25, "--max_eval_samples", 20)


@pytest.fixture(scope="module")
def in_fp32(setup, tmp_path_factory):
    """Losses of a trial in fp32, with its loss as it is and a hundredth of it."""
    configs = [with_loss(1, rungs=[4]), with_loss(0.01, rungs=[4])]
    return [losses(result) for result in run_ranks(tmp_path_factory.mktemp("fp32"), trial, setup, configs, size=1)]


STAGES = [("fp16", 0, 1), ("fp16", 1, 1), ("fp16", 3, 2)]
MORE_STAGES = [("fp16", 2, 2), ("fp16", 0, 2), ("bf16", 0, 1), ("bf16", 1, 1)]
PAUSES = [1, 3]


@pytest.fixture(scope="module")
def results(setup, tiny_model, tiny_squad, tmp_path_factory):
    """A function of precision, ZeRO stage and ranks: the results of the trials there, by name.

    They share their processes, which read one model. Trials that fail come last, as each ends its process.
    """
    epoch = prepare(tiny_model, tiny_squad, "--max_t", 6, "--num_train_epochs", 0.5, "--max_eval_samples", 10)
    overflowing = prepare(tiny_model, tiny_squad, "--max_t", 4, "--num_train_epochs", 0.5, "--max_eval_samples", 10)

    @functools.cache
    def run(name, stage, ranks):
        size = {"per_device_bs": 2 // ranks}
        with_overflows = in_fp16(epoch, stage, initial_scale_power=24, loss_scale_window=15)
        rungs = [*PAUSES, 6]
        learning = in_fp16(setup, stage, name, initial_scale_power=12)
        trials = {
            "whole loss": (learning, with_loss(1, rungs=[4], **size)),
            "small loss": (learning, with_loss(0.01, rungs=[4], **size)),
        }
        if (name, stage, ranks) in STAGES:
            trials = {
                "paused": (with_overflows, with_loss(1, rungs=rungs, **size)),  # the first one: it is paused
                "through": (with_overflows, with_loss(1, rungs=rungs, **size)),
                **trials,
                "stopped at 3": (in_fp16(setup, stage), with_loss(1, rungs=[3], **size)),
                "dynamic scale": (in_fp16(overflowing, stage, loss_scale=0), with_loss(1e30, per_device_bs=1)),
            }
        if (stage, ranks) == (0, 1):
            trials["static scale"] = in_fp16(overflowing, stage, loss_scale=128), with_loss(1e30, per_device_bs=1)
        folder, scheduler = tmp_path_factory.mktemp("ranks"), PauseAtRungs(PAUSES if "paused" in trials else [])
        found = run_ranks(folder, trial, *map(list, zip(*trials.values(), strict=True)), scheduler, size=ranks)
        assert scheduler.pauses == len(scheduler.rungs)
        return dict(zip(trials, found, strict=True))

    return run


@pytest.mark.parametrize("name, stage, ranks", STAGES + MORE_STAGES)
def test_sixteen_bits_learn_as_fp32_does(results, in_fp32, name, stage, ranks):
    """Also where the gradients are as small as in a real fine-tuning: unscaled, most of them would be 0 in fp16."""
    found = [results(name, stage, ranks)[loss] for loss in ("whole loss", "small loss")]
    for result, expected, gradients in zip(found, in_fp32, ((1, 100), (0.01, 1)), strict=True):
        assert result.error is None
        assert losses(result) == pytest.approx(expected, rel=0.005) and losses(result)[-1] < 0.9 * losses(result)[0]
        frame = result.metrics_dataframe
        assert frame["grad_norm"].between(*gradients).all() and (frame["skipped_steps"] == 0).all()
        assert (frame["loss_scale"] == 2**12).all() if name == "fp16" else frame["loss_scale"].isna().all()
        assert (frame["tokens_per_second"] > 0).all()


@pytest.mark.parametrize("name, stage, ranks", STAGES)
def test_paused_trial_equals_one_that_ran_through_with_overflows(results, name, stage, ranks):
    """To the last bit, with loss scale and skipped steps; the schedule of the learning rate comes to its end."""
    paused, through = (results(name, stage, ranks)[how] for how in ("paused", "through"))
    assert len(losses(paused)) == 6
    for metric in ("eval_loss", "grad_norm", "loss_scale", "skipped_steps", "lr"):
        assert paused.metrics_dataframe[metric].tolist() == through.metrics_dataframe[metric].tolist(), metric
    skipped = through.metrics_dataframe["skipped_steps"].tolist()
    assert skipped[0] > 5 and min(sum(skipped[1:3]), sum(skipped[3:])) > 0, skipped
    assert paused.metrics["lr"] == 0
    weights = [load_file(f"{result.checkpoint.path}/model.safetensors") for result in (paused, through)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


UNTIL = "again and again, until the loss scale has fallen to 1"
IN_A_ROW = "with the static loss scale 128, 16 steps in a row"


@pytest.mark.parametrize("name, stage, ranks", STAGES)
def test_gradients_that_always_overflow_end_the_trial(results, name, stage, ranks):
    """With the same words at every stage, before the first iteration has ended."""
    for scale, says in {"dynamic scale": UNTIL, "static scale": IN_A_ROW}.items():
        result = results(name, stage, ranks).get(scale)
        if result:
            assert f"FloatingPointError: fp16: the gradients overflow {says}" in str(result.error), result.error
            assert "eval_loss" not in (result.metrics or {})
    assert ("static scale" in results(name, stage, ranks)) is (stage == 0)
    assert errors.kind_of(FloatingPointError("fp16: the gradients overflow")) is errors.Kind.TRIAL


def test_unscaled_gradients_are_found_before_the_first_trial(tmp_path, setup):
    """What DeepSpeed 0.19.8 does with fp16 weights at stage 0."""

    def fp16_weights_at_stage_0(config, setup):
        import raytune_bayesian
        from hpo.squad import precision

        arguments = raytune_bayesian.transformers.TrainingArguments
        raytune_bayesian.transformers.TrainingArguments = lambda **given: arguments(**given | {"fp16": True})
        precision.engine_config = lambda ds_config, name: ds_config
        run_in_ranks(config, raytune_bayesian.train, setup)

    (result,) = run_ranks(tmp_path, fp16_weights_at_stage_0, in_fp16(setup, 0), [with_loss(1)], size=1)
    assert "CannotTrain: the optimizer gets gradients that are 0.000977 times those of the loss" in str(
        result.error
    )  # 1 in 2**10
    assert errors.kind_of(errors.CannotTrain("")) is errors.Kind.SETUP  # ends the search


def test_a_configuration_that_deepspeed_refuses_is_found_too(tmp_path, setup):
    """In one line, which ends the search: not by the failures of all trials."""
    refused = {"zero_optimization": {"stage": 1, "round_robin_gradients": "x"}}
    refused = dataclasses.replace(in_fp16(setup, 1), ds_config=refused)
    (result,) = run_ranks(tmp_path, trial, refused, [with_loss(1)], size=1)
    assert "errors.CannotTrain: " in str(result.error), result.error


@pytest.mark.parametrize("stage, ended", [(0, True), (0, False), (1, True), (1, False)])
def test_best_model_has_the_precision_of_the_training(results, tmp_path, setup, tiny_model, stage, ended):
    """Whether its trial came to its end or not; and the test reads it so."""
    result = results("fp16", stage, 1)["whole loss" if ended else "stopped at 3"]
    checkpoint = Path(result.checkpoint.path)
    assert models.is_of_full_training(checkpoint) is ended
    models.save_best_model(checkpoint, tiny_model, "fp16", tmp_path / "best_model")
    assert {weight.dtype for weight in load_file(tmp_path / "best_model" / "model.safetensors").values()} == {
        torch.float16
    }
    assert json.loads((tmp_path / "best_model" / "config.json").read_text())["dtype"] == "float16"
    tested, _ = raytune_bayesian.test(tmp_path / "best_model", setup.selection, in_fp16(setup, stage))
    assert tested["eval_loss"] == pytest.approx(losses(result)[3 if ended else 2], rel=3e-3)


def test_a_model_of_bf16_is_known(tiny_model, tmp_path):
    for dtype, warns in ((None, False), ("bfloat16", True)):
        config = json.loads((tiny_model / "config.json").read_text()) | {"dtype": dtype}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert precision.is_of_bf16(tmp_path) is warns


def test_norms_of_skipped_steps_go_where_the_others_are():
    """DeepSpeed's norms are tensors on the GPU, and what was skipped is a number."""
    norms = precision.on_device(
        [torch.ones(1, device="meta"), math.inf, torch.ones((), device="meta")], torch.device("meta")
    )
    assert [(norm.device.type, norm.shape, norm.dtype) for norm in norms] == [("meta", (), torch.float32)] * 3


# -- without Ray ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage, name, expected", [
    (0, "fp16", {"fp16": False, "bf16": False, "torch_autocast": {"enabled": True, "dtype": "float16"}}),
    (0, "bf16", {"fp16": False, "bf16": False, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
    (0, "fp32", {"fp16": False, "bf16": False, "torch_autocast": None}),
    (1, "fp16", {"fp16": "auto", "bf16": "auto", "torch_autocast": None}),
])  # fmt: skip
def test_engine_config(monkeypatch, stage, name, expected):
    ds_config = json.loads((ROOT / "ds_config.json").read_text()) | {"zero_optimization": {"stage": stage}}
    made = precision.engine_config(ds_config, name)
    found = {key: made.get(key) if key == "torch_autocast" else made[key]["enabled"] for key in expected}
    assert found == expected
    assert "torch_autocast" not in ds_config and ds_config["fp16"]["enabled"] == "auto"  # the user's own stays as it is
    monkeypatch.setattr(raytune_bayesian, "Trainer", unittest.mock.Mock(side_effect=InterruptedError))
    setup = SimpleNamespace(ds_config=ds_config, precision=name)
    hyperparameters = {"lr": 1e-5, "wd": 0.0, "per_device_bs": 1, "gradient_accumulation_steps": 1, "seed": 1}
    with pytest.raises(InterruptedError):
        raytune_bayesian.make_trainer(None, [], hyperparameters, setup, ONE_RANK, "", 0)
    given = raytune_bayesian.Trainer.call_args.kwargs["args"]
    assert given.deepspeed == made and (given.fp16, given.bf16) == (stage == 1 and name == "fp16", False)


def with_low_scores(family: str) -> torch.nn.Module:
    """A model whose queries and keys have biases that lower all scores by the same 40: softmax does not see it, fp16's
    smallest number does.
    """
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 60,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "attention_bias": True,
    }
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **sizes)).eval()
    bias = (40 * 4) ** 0.5 / 4  # of 16 dimensions; scores are divided by 4
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("query_key_value.bias"):  # (head, query key or value, dimension)
                parameter.view(2, 3, 16)[:, 0], parameter.view(2, 3, 16)[:, 1] = bias, -bias
            elif name.endswith("q_proj.bias"):
                parameter.fill_(bias)
            elif name.endswith("k_proj.bias"):
                parameter.fill_(-bias)
    return model


@pytest.mark.parametrize("family, attention", [("bloom", "eager"), ("llama", "eager"), ("llama", "sdpa")])
def test_no_nan_by_padding_in_fp16(family, attention, monkeypatch):
    """The rows of padding, in which all scores are masked, give numbers; those of tokens give what they give without
    padding in fp32.
    """
    model = with_low_scores(family)
    model.set_attn_implementation(attention)
    if family == "llama":  # its positions turn the biases: only part of the shift is left
        model.config.rope_parameters["rope_theta"] = 1e30
    data = [{"input_ids": torch.arange(5, n).numpy(), "prompt_length": n - 8} for n in (12, 40)]
    batch = evaluation.collate(data, 0)
    expected = sum(evaluation.answer_loss(model, evaluation.collate([example], 0))[0].item() for example in data)
    half = model.half()
    assert evaluation.answer_loss(half, batch)[0].item() == pytest.approx(expected, rel=1e-2)
    if attention == "eager":  # transformers' own
        monkeypatch.setitem(
            masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "eager", masking_utils.eager_mask
        )
        assert evaluation.answer_loss(half, batch)[0].isnan()


def test_masks_are_transformers_own_where_something_is_visible():
    padding = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    sizes = {"batch_size": 2, "q_length": 4, "kv_length": 4, "attention_mask": padding, "dtype": torch.float16}
    for name, empty in (("eager_mask", torch.finfo(torch.float16).min), ("sdpa_mask", False)):
        own = getattr(masking_utils, name)(**sizes)
        ours = precision.never_all_masked(getattr(masking_utils, name))(**sizes)
        assert (own[0, 0, :2] == empty).all() and (ours[0, 0, :2] != empty).all()
        assert torch.equal(own[0, 0, 2:], ours[0, 0, 2:]) and torch.equal(own[1], ours[1])
    assert (
        precision.never_all_masked(masking_utils.sdpa_mask)(batch_size=1, q_length=4, kv_length=4) is None
    )  # no padding, no mask


@pytest.mark.parametrize("result, says", [
    ({"grad_norm": 0.2, "loss_scale": 65536.0}, None),
    ({"grad_norm": 3.0, "loss_scale": None}, None),
    ({}, None),
    ({"grad_norm": 3e-6, "loss_scale": 65536.0}, "grad_norm 3e-06 is far from"),
    ({"grad_norm": float("nan"), "loss_scale": 4096.0}, "grad_norm nan is far from"),
    ({"grad_norm": 9.0, "loss_scale": 2.0}, "loss_scale 2 is far from"),
])  # fmt: skip
def test_unusual_gradients_are_warned_about(result, says):
    found = trial_log.unusual_gradients(result)
    assert found is None if says is None else says in found

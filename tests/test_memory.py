"""The forecast of GPU memory: its properties, and a comparison with the real engine on a CPU."""

import gc
import json
import types

import numpy as np
import pytest
import torch
import transformers

import raytune_bayesian
from conftest import ROOT
from hpo.plan import memory
from hpo.squad import evaluation, loading, lora, precision
from hpo.squad import group as groups
from hpo.squad.data import TokenizedSquad

DS_CONFIG = json.loads((ROOT / "ds_config.json").read_text())
SIZES = {"batch_size": 2, "max_length": 128, "answer_tokens": 16, "eval_tokens": 256, "max_new_tokens": 16}


def with_stage(stage: int, **zero) -> dict:
    return DS_CONFIG | {"zero_optimization": {"stage": stage, "reduce_bucket_size": 1e5, **zero}}


def forecast(model, stage=0, kind="fp16", ranks=1, **sizes) -> memory.Forecast:
    return memory.forecast(model, with_stage(stage), kind, **(SIZES | sizes), ranks=ranks)


def data(rows: int, length: int, answer: int) -> TokenizedSquad:
    """Sequences of the same length."""
    offsets = np.arange(rows + 1, dtype=np.int64) * length
    prompts = np.full(rows, length - answer)
    return TokenizedSquad(np.full(rows * length, 5, np.int32), offsets, prompts, np.arange(rows), [])


@pytest.fixture(scope="module")
def group(one_rank):
    return one_rank


def trainer_of(folder, model, rows, stage: int, kind: str, group):
    setup = types.SimpleNamespace(ds_config=with_stage(stage), precision=kind)
    hyperparameters = {"lr": 1e-4, "wd": 0.01, "per_device_bs": SIZES["batch_size"], "seed": 0}
    return raytune_bayesian.make_trainer(model, rows, hyperparameters, setup, group, str(folder), pad_token_id=0)


# ---------------------------------------------------------------------------------------------------------------------
# the forecast alone


def test_no_weights_are_read(tiny_model, tmp_path):
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    assert forecast(tmp_path) == forecast(tiny_model)


def test_parts_add_up(tiny_model):
    parameters = loading.count_parameters(tiny_model)
    for stage in (0, 1, 2, 3):
        f = forecast(tiny_model, stage)
        assert f.peak == f.weights + f.optimizer + max(f.backward, f.step, f.evaluation, f.resume) + f.reserve
        assert f.weights == parameters * (2 if stage else 4) and f.gradients == f.weights
        assert f.optimizer == parameters * (12 if stage else 8)
        assert 0 < f.logits < f.activations <= f.backward and f.step >= f.gradients


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_grows_with_batch_size_length_and_answers(tiny_model, stage):
    least = forecast(tiny_model, stage)
    for larger in ({"batch_size": 4}, {"max_length": 256}):
        assert forecast(tiny_model, stage, **larger).peak > least.peak
    assert forecast(tiny_model, stage, answer_tokens=32).logits > least.logits
    assert forecast(tiny_model, stage, eval_tokens=4096).evaluation > least.evaluation


def test_zero_splits_over_ranks(tiny_model):
    one, two = ([forecast(tiny_model, stage, ranks=n) for stage in (0, 1, 2, 3)] for n in (1, 2))
    assert [b.optimizer / a.optimizer for a, b in zip(one, two, strict=True)] == [1, 0.5, 0.5, 0.5]
    assert [b.gradients / a.gradients for a, b in zip(one, two, strict=True)] == [1, 1, 0.5, 0.5]
    assert [b.weights / a.weights for a, b in zip(one, two, strict=True)] == [1, 1, 1, 0.5]
    for a, b in zip(one[1:], two[1:], strict=True):
        assert b.weights + b.optimizer + b.backward < a.weights + a.optimizer + a.backward


def test_16_bit_weights_and_activations(tiny_model):
    """At stage 0 weights are in fp32. At other stages they take half, and the optimizer has copies in fp32."""
    assert (
        forecast(tiny_model, 1).weights * 2
        == forecast(tiny_model, 0).weights
        == forecast(tiny_model, 1, "fp32").weights
    )
    assert forecast(tiny_model, 0, "fp16").activations != forecast(tiny_model, 0, "fp32").activations
    assert forecast(tiny_model, 1, "fp16").activations < forecast(tiny_model, 1, "fp32").activations
    assert forecast(tiny_model, 0, "bf16") == forecast(tiny_model, 0, "fp16")


def test_bucket_of_deepspeed(tiny_model):
    def backward(**zero):
        return memory.forecast(tiny_model, with_stage(1, **zero), "fp16", **SIZES).backward

    assert backward(reduce_bucket_size=3e5) - backward() == 2 * 200_000
    assert backward(overlap_comm=True) - backward() == 2 * 100_000
    assert backward(reduce_bucket_size="auto") - backward() == 2 * (32**2 - 100_000)


def test_plan_hints_at_what_fits(monkeypatch):
    def forecast_of(ds_config, batch_size, ranks):
        size = 10**9 * (30 if batch_size == 2 else 20) // (ranks if precision.zero_stage(ds_config) else 1)
        return memory.Forecast(size, 0, 0, 0, 0, 0, 0, 0, 0, 0)

    lines = memory.plan(forecast_of, "fp16", with_stage(0), [1, 2], 1).splitlines()
    assert [line.split(maxsplit=3) for line in lines[-5:]] == [
        ["16", "no", "-14.0", "--gpus_per_trial 2, batch size 2, ZeRO stage 1"],
        ["24", "no", "-6.0", "batch size 1, ZeRO stage 0"],
        ["32", "yes", "2.0"], ["40", "yes", "10.0"], ["80", "yes", "50.0"],
    ]  # fmt: skip
    monkeypatch.setattr(memory, "GPUS", (8,))
    last = memory.plan(forecast_of, "fp16", with_stage(0), [1, 2], 1).splitlines()[-1]
    assert last.split(maxsplit=3)[3].startswith("none of the smaller choices")


# ---------------------------------------------------------------------------------------------------------------------
# against the real engine, on a CPU


def test_live_counts_storages_once():
    with memory.Live() as live:
        a = torch.zeros(1000)
        view, b = a[:10], a + 1
        assert live.now == 8000
        del a
        assert live.now == 8000  # the view keeps it
        del view, b
    assert live.now == 0 and live.peak == 8000


class SaveThenLook(transformers.TrainerCallback):
    """Saves after the first step. When a training begins, adds up all tensors that exist."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == 1

    def on_train_begin(self, args, state, control, **kwargs):
        self.alive = alive()


def alive() -> int:
    """Bytes of all CPU tensors that Python knows. A storage that views share counts once."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.device.type == "cpu"]
    return sum({id(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_resume_holds_the_optimizer_state_once(tiny_model, tmp_path, group, monkeypatch, stage):
    """There is no state before it is loaded, and the loaded checkpoint is freed before the training continues."""
    import deepspeed

    def train(**how):
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        trainer = trainer_of(tmp_path, model, data(8, 16, 4), stage, "fp32", group)
        look = SaveThenLook()
        trainer.add_callback(look)
        before = alive()
        trainer.train(**how)
        states = trainer.model_wrapped.basic_optimizer.state.values()
        moments = sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))
        trainer.model_wrapped.destroy()
        return look.alive - before, moments

    load, states = deepspeed.DeepSpeedEngine.load_checkpoint, []

    def load_checkpoint(engine, *args, **kwargs):
        own = engine.basic_optimizer.state.values()
        states.append(sum(torch.is_tensor(v) for state in own for v in state.values()))
        return load(engine, *args, **kwargs)

    monkeypatch.setattr(deepspeed.DeepSpeedEngine, "load_checkpoint", load_checkpoint)
    fresh, moments = train()
    resumed, _ = train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert states == [0]
    assert moments <= resumed - fresh < 1.1 * moments


def test_adapters_and_checkpointing(tiny_model):
    """Only the adapters have gradients and optimizer state. Frozen weights have the dtype of the others."""
    count, adapters = loading.count_parameters(tiny_model), lora.count_trained(tiny_model, 8, "")
    for stage, ranks in ((0, 1), (1, 1), (2, 2), (3, 2)):
        plain, small = (forecast(tiny_model, stage, ranks=ranks, **more) for more in ({}, {"lora_r": 8}))
        size = 2 if stage else 4
        assert small.weights == size * (count + adapters) / (ranks if stage == 3 else 1)
        assert small.optimizer == (12 if stage else 8) * adapters / ranks
        assert small.gradients == size * adapters / (ranks if stage >= 2 else 1)
        assert small.peak < plain.peak
        assert forecast(tiny_model, stage, ranks=ranks, checkpointing=True).backward < plain.backward


# Stage 0 in fp16 comes last, because DeepSpeed keeps torch.autocast set up in this process.
@pytest.mark.parametrize("stage, kind, options", [
    (0, "fp32", {}), (1, "fp32", {}), (2, "fp32", {}), (0, "fp32", {"checkpointing": True}),
    (0, "fp32", {"lora_r": 16}), (1, "fp32", {"lora_r": 16, "checkpointing": True}), (0, "fp16", {}),
    (0, "fp16", {"lora_r": 16}),
])  # fmt: skip
def test_forecast_agrees_with_the_real_engine(demo_model, tmp_path, group, stage, kind, options):
    """Within 15 % of all tensors that are alive at the peak of three optimizer steps."""
    sizes = SIZES | {"max_length": 256}
    f = memory.forecast(demo_model, with_stage(stage), kind, **sizes, **options)
    model = evaluation.fuse_gelu(transformers.AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32))
    flags = types.SimpleNamespace(gradient_checkpointing=options.get("checkpointing"), lora_target_modules="")
    model = lora.prepare(model, flags, {"lora_r": options.get("lora_r", 0)}).train()  # as at the start of a trial
    live = memory.Live()
    for parameter in model.parameters():
        live.add(parameter)
    rows = data(3 * sizes["batch_size"], sizes["max_length"], sizes["answer_tokens"])
    trainer = trainer_of(tmp_path, model, rows, stage, kind, group)
    try:
        with live:
            trainer.train()
    finally:
        trainer.model_wrapped.destroy()
    assert live.peak == pytest.approx(f.weights + f.optimizer + max(f.backward, f.step), rel=0.15)


@pytest.mark.parametrize("kind", ["fp32", "fp16"])
def test_forecast_of_evaluation(demo_model, kind):
    f = memory.forecast(demo_model, with_stage(0), kind, **SIZES)
    model = evaluation.fuse_gelu(transformers.AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32))
    live = memory.Live()
    for parameter in model.parameters():
        live.add(parameter)
    weights, rows = live.now, SIZES["eval_tokens"] // SIZES["max_length"]
    long = data(2 * rows, SIZES["max_length"], SIZES["answer_tokens"])
    ids = torch.full((rows, SIZES["max_length"]), 5)
    with live, precision.autocast(with_stage(0), kind, "cpu"), torch.no_grad():
        evaluation.evaluate_loss(model, long, 0, SIZES["eval_tokens"])
        evaluation.greedy(model, ids, torch.ones_like(ids), -1, 2, groups.ONE_RANK)
    assert live.peak - weights == pytest.approx(f.evaluation, rel=0.15)

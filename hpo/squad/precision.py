"""Mixed precision under DeepSpeed: how a trial trains, and what is recorded of it. Nothing of Ray in here.

In fp16 a gradient below 6e-8 is 0. So the loss is multiplied by a *loss scale* before the backward pass, and the
gradients are divided by it before the optimizer uses them. A step whose scaled gradients overflow is skipped, and the
scale is halved. How this is done depends on the ZeRO stage of the DeepSpeed configuration:

    stage 0         torch.autocast: weights, gradients and optimizer in fp32, matrix products in 16 bits;
                    torch.amp.GradScaler
    stages 1 to 3   weights and gradients in 16 bits, fp32 copies of the weights in the optimizer;
                    DeepSpeed's own loss scaler

DeepSpeed also offers fp16 weights at stage 0, which are not used here: up to 0.19.8 it divides the gradients by the
loss scale but does not multiply the loss by it (DeepSpeed pull request 8393), so the gradients are 65,536 times too
small. `check_gradients` finds such a fault.

bf16 has the range of fp32 and needs no loss scale.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import math
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import masking_utils

from hpo import errors
from hpo.squad import evaluation

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SCALER_FILE = "grad_scaler.json"  # in a checkpoint: DeepSpeed saves its own loss scaler, but not torch's
REDUCE_BUCKET = 50_000_000  # elements; DeepSpeed's own default, ten times as many, takes 1 GB of the GPU
LOOK_EVERY = 16  # optimizer steps; more often at stage 0 would make the CPU wait for the GPU


def zero_stage(ds_config: dict) -> int:
    """The ZeRO stage of a DeepSpeed configuration."""
    return ds_config.get("zero_optimization", {}).get("stage", 0)


def engine_config(ds_config: dict, precision: str) -> dict:
    """The DeepSpeed configuration of a trial: the user's, with the mixed precision that fits its ZeRO stage.

    Args:
        ds_config: as in ds_config.json; `enabled` of fp16 and bf16 are "auto".
        precision: "fp16", "bf16" or "fp32".
    """
    config = copy.deepcopy(ds_config)
    config.setdefault("timers", {"throughput": {"enabled": False}})  # it makes the CPU wait for the GPU twice a step
    if zero_stage(config) == 0:
        config["fp16"] = config.get("fp16", {}) | {"enabled": False}
        config["bf16"] = config.get("bf16", {}) | {"enabled": False}
        if precision != "fp32":
            config["torch_autocast"] = {"enabled": True, "dtype": str(DTYPES[precision]).removeprefix("torch.")}
    else:
        config["zero_optimization"].setdefault("reduce_bucket_size", REDUCE_BUCKET)
    return config


def in_words(ds_config: dict, precision: str) -> str:
    """One line for the log."""
    stage = zero_stage(ds_config)
    if precision == "fp32":
        return f"precision: fp32, ZeRO stage {stage}"
    how = "torch.autocast with fp32 weights" if stage == 0 else f"{precision} weights with fp32 copies in the optimizer"
    scale = {"bf16": "", "fp16": ", GradScaler" if stage == 0 else ", DeepSpeed's loss scaler"}[precision]
    return f"precision: {precision}, ZeRO stage {stage}: {how}{scale}"


def is_of_bf16(model: str | Path) -> bool:
    """Whether a model's config.json says that it was trained in bf16."""
    return transformers.AutoConfig.from_pretrained(model).dtype == torch.bfloat16


@contextlib.contextmanager
def autocast(ds_config: dict, precision: str, device_type: str):
    """The context of evaluation: the precision of the training. At stages 1 to 3 the weights have it already."""
    enabled = precision != "fp32" and zero_stage(ds_config) == 0
    with torch.autocast(device_type, DTYPES[precision] if enabled else None, enabled):
        yield


def never_all_masked(make_mask):
    """A mask function whose masks hide no row completely. Rows that are all padding see everything instead.

    The output of such a row is not used, but it must be a number. transformers adds the smallest number of the dtype
    to masked scores. In fp16 its sum with a negative score is -inf, softmax of -inf alone is NaN, and in the next
    layer the whole sequence is NaN.

    Args:
        make_mask: a mask function of transformers.masking_utils. Its mask is boolean (True: visible), additive (0:
            visible) or None.
    """

    @functools.wraps(make_mask)
    def make(*args, **kwargs):
        mask = make_mask(*args, **kwargs)
        if mask is None:
            return None
        if mask.dtype == torch.bool:
            return mask | ~mask.any(-1, keepdim=True)
        return mask * (mask == 0).any(-1, keepdim=True)

    return make


for name, make_mask in {"eager": masking_utils.eager_mask, "sdpa": masking_utils.sdpa_mask}.items():
    transformers.AttentionMaskInterface.register(name, never_all_masked(make_mask))


# ---------------------------------------------------------------------------------------------------------------------
# while a trial trains


class Gradients:
    """Gradient norms, loss scale and skipped steps of a training. Does not wait for the GPU in each step.

    At ZeRO stage 0 it clips the gradients in place of the DeepSpeed engine, which clips one parameter after another
    and does not return the norm. With one rank it also turns off the all-reduce, which would only copy.

    Args:
        engine: the DeepSpeed engine, before its first step.
        ds_config: the user's DeepSpeed configuration.
        precision: "fp16", "bf16" or "fp32".
        checkpoint: the folder that the training goes on from, or None.
        ranks: the number of ranks of the trial.
    """

    def __init__(self, engine, ds_config: dict, precision: str, checkpoint: Path | None, ranks: int):
        self.engine, self.precision = engine, precision
        # Of each step since the last summary, before clipping. Not finite where the step was skipped.
        self.norms: list[torch.Tensor | float] = []
        self.skipped_before = engine.skipped_steps
        fp16 = ds_config.get("fp16", {})
        static = fp16.get("loss_scale", 0)
        self.scaler = engine.torch_autocast_z0_gradscaler
        self.static, self.least_scale = bool(static), 1 if self.scaler else fp16.get("min_loss_scale", 1)
        self.stage_0 = not engine.zero_optimization()
        if self.stage_0:
            engine.enable_backward_allreduce = ranks > 1
            engine.clip_fp32_gradients = self._clip
        if self.scaler:
            start = {
                "scale": float(static or 2.0 ** fp16.get("initial_scale_power", 16)),
                "growth_factor": 1.0 if static else 2.0,
                "backoff_factor": 1.0 if static else 0.5,
                "growth_interval": fp16.get("loss_scale_window", 1000),
                "_growth_tracker": 0,
            }
            saved = checkpoint and checkpoint / SCALER_FILE
            self.scaler.load_state_dict(json.loads(saved.read_text()) if saved and saved.exists() else start)

    def _clip(self) -> None:
        parameters = self.engine.module.parameters()
        self.norms.append(torch.nn.utils.clip_grad_norm_(parameters, self.engine.gradient_clipping(), foreach=True))

    def after_step(self) -> bool:
        """Call it after each optimizer step. Returns whether the step is known to be skipped, without waiting.

        Raises:
            FloatingPointError: the gradients overflow with every loss scale, so every step would be skipped.
        """
        skipped = self.engine.skipped_steps > self.skipped_before
        self.skipped_before = self.engine.skipped_steps
        if not self.stage_0:
            self.norms.append(math.inf if skipped else self.engine.get_global_grad_norm())
        if skipped or self.scaler and len(self.norms) % LOOK_EVERY == 0:
            self._check()
        return skipped

    def _check(self) -> None:
        if math.isfinite(self.norms[-1]):
            return
        last, scale = self.norms[-LOOK_EVERY:], self.loss_scale()
        if self.static and len(last) == LOOK_EVERY and not any(map(math.isfinite, last)):
            what = f"with the static loss scale {scale:g}, {LOOK_EVERY} steps in a row"
            raise FloatingPointError(f"fp16: the gradients overflow {what}")
        if not self.static and scale <= self.least_scale:
            what = f"again and again, until the loss scale has fallen to {scale:g}"
            raise FloatingPointError(f"fp16: the gradients overflow {what}")

    def loss_scale(self) -> float | None:
        """The loss scale; None in bf16 and fp32."""
        if self.precision != "fp16":
            return None
        return self.scaler.get_scale() if self.scaler else float(self.engine.optimizer.loss_scale)

    def summary(self) -> dict[str, float | int | None]:
        """Of the steps since the last summary: median norm, number of skipped steps; and the loss scale now."""
        if self.scaler and self.norms:
            self._check()
        norms = torch.stack(on_device(self.norms or [math.nan], self.engine.device)).cpu()
        self.norms = []
        finite = norms[norms.isfinite()]
        return {
            "grad_norm": finite.median().item() if len(finite) else math.nan,
            "loss_scale": self.loss_scale(),
            "skipped_steps": len(norms) - len(finite) if self.precision == "fp16" else 0,
        }

    def save(self, folder: Path) -> None:
        """Adds torch's loss scaler to a checkpoint."""
        if self.scaler:
            (folder / SCALER_FILE).write_text(json.dumps(self.scaler.state_dict()))


def on_device(norms: list[torch.Tensor | float], device: torch.device) -> list[torch.Tensor]:
    """Numbers and tensors of one element, as fp32 tensors without dimensions on one device."""
    return [torch.as_tensor(norm, dtype=torch.float32, device=device).reshape(()) for norm in norms]


# ---------------------------------------------------------------------------------------------------------------------
# before the first trial


def tiny_model() -> transformers.PreTrainedModel:
    """A random BLOOM of one layer. The norm of its gradients is about 0.05, as in a real fine-tuning."""
    sizes = {
        "vocab_size": 32,
        "hidden_size": 8,
        "n_layer": 1,
        "n_head": 2,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    generator = torch.Generator().manual_seed(0)
    model = transformers.BloomForCausalLM(transformers.BloomConfig(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


@contextlib.contextmanager
def engine_of(trainer: transformers.Trainer):
    """Destroys the DeepSpeed engine of a Trainer in the end. Tune ends a paused trial by SystemExit."""
    try:
        yield
    finally:
        if hasattr(trainer.model_wrapped, "destroy"):
            trainer.model_wrapped.destroy()


def check_once(make_trainer, hyperparameters: dict, setup, group) -> None:
    """Checks once in a process that its trials train with the right gradients, see `check_gradients`.

    Args:
        make_trainer: of the script.
        hyperparameters: of the trial. The check has its own learning rate, batch size and weight decay. Where the
            trial accumulates gradients, the check takes its two sequences one by one.
        setup: what all trials share.
        group: the ranks of the trial, which all call this.
    """
    if group.gradients_checked:
        return
    fp16 = setup.ds_config.get("fp16", {}) | {"initial_scale_power": 10}  # with a larger one the step may be skipped
    setup = dataclasses.replace(setup, ds_config=setup.ds_config | {"fp16": fp16})

    def trainer_of(model, data, folder):
        accumulates = hyperparameters.get("gradient_accumulation_steps", 1) > 1
        sizes = {"per_device_bs": 1, "gradient_accumulation_steps": 2} if accumulates else {"per_device_bs": 2}
        own = hyperparameters | {"lr": 1e-5, "wd": 0.0} | sizes
        return make_trainer(model, data, own, setup, group, folder, pad_token_id=0)

    def loss_of(model, data):
        total, count = evaluation.answer_loss(model, evaluation.collate(data, pad_token_id=0))
        return total / count

    check_gradients(trainer_of, loss_of, group.size)
    group.gradients_checked = True


def check_gradients(make_trainer, loss_of, ranks: int) -> float:
    """Trains one step of a tiny model, and compares the gradient that AdamW used with that of autograd in fp32.

    After one step AdamW's running mean is (1 - beta1) times the gradient after unscaling and clipping.

    Args:
        make_trainer: (model, data, folder) -> a Trainer for one optimizer step on all of `data`, two sequences a rank.
        loss_of: (model, data) -> the mean loss on `data`, for autograd.
        ranks: the number of ranks of the trial, which all call this.

    Returns:
        The ratio of both norms: 1 within the precision.

    Raises:
        errors.CannotTrain: it differs from 1 by more than 5 %, or DeepSpeed or the Trainer refuse the configuration.
    """
    data = [{"input_ids": [5 + i % 20, 9, 3, 30 - i % 20, 1], "prompt_length": 3} for i in range(2 * ranks)]
    reference = tiny_model()
    loss_of(reference, data).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()]).item()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(tiny_model(), data, folder)
        with engine_of(trainer):
            try:
                trainer.train()
            except Exception as error:
                if errors.kind_of(error) is errors.Kind.TRIAL:
                    raise errors.CannotTrain(f"{type(error).__name__} {errors.one_line(error)}") from error
                raise
            engine = trainer.model_wrapped
            (beta, _), clip = engine.basic_optimizer.param_groups[0]["betas"], engine.gradient_clipping()
            squares = torch.zeros((), device=engine.device)
            for state in engine.basic_optimizer.state.values():
                squares += state["exp_avg"].float().square().sum()
            if engine.zero_optimization():  # each rank has a part
                torch.distributed.all_reduce(squares)
    ratio = squares.sqrt().item() / (1 - beta) / min(expected, clip or expected)
    if not 0.95 < ratio < 1.05:
        raise errors.CannotTrain(f"the optimizer gets gradients that are {ratio:.3g} times those of the loss")
    return ratio

"""Forecast of the GPU memory of a trial. It needs no GPU and no weights, only the config.json of a model. No Ray here.

    sizes = {"batch_size": 2, "max_length": 1024, "answer_tokens": 48, "eval_tokens": 8192, "max_new_tokens": 48}
    forecast("demo/model", ds_config, "fp16", **sizes).peak    # bytes on one GPU

The real model class runs forward pass, loss, backward pass and evaluation on FakeTensors. A FakeTensor has a shape, a
dtype and a lifetime, but no data. `Live` adds up the bytes of all tensors that live at the same time. What DeepSpeed
keeps and copies is calculated from its configuration, with formulas that follow the source of DeepSpeed 0.19.8. All
sizes are bytes on one GPU.

The FakeTensors are on the CPU, because a torch without CUDA has no autograd for fake GPU tensors. torch.autocast has
another list of operations on a CPU, but it is the same for all operations of BLOOM that need much memory. The
workspace inside a kernel is not seen.
"""

import contextlib
import dataclasses
import functools
import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hpo.results.slots import CONTEXT
from hpo.squad import evaluation, lora
from hpo.squad.precision import DTYPES, REDUCE_BUCKET, zero_stage

COMMUNICATION = 400_000_000  # bytes, assumed: NCCL's buffers, if a trial has several GPUs
FRAGMENTATION = 0.1  # assumed: torch's allocator holds 10 % more than its tensors, because batches differ in length
GPUS = (16, 24, 32, 40, 80)  # GB
BUCKET = 500_000_000  # elements that DeepSpeed all-reduces at a time at stage 0
LIVE_PARAMETERS = 1_000_000_000  # elements: DeepSpeed's default of stage3_max_live_parameters


@dataclass(frozen=True)
class Forecast:
    """Bytes on one GPU.

    backward, step, evaluation and resume are what is held at the peak of that phase besides weights and optimizer. Only
    one of these phases runs at a time, so the largest of the four counts.
    """

    weights: int
    gradients: int  # of all trained weights, as this GPU keeps them after the backward pass
    optimizer: int  # Adam's two moments; at stages 1 to 3 also fp32 copies of the weights
    activations: int  # forward and backward pass without complete gradients; with 16-bit copies of weights, and logits
    logits: int  # the part of the activations that has one number per token of the vocabulary
    backward: int  # forward and backward pass: activations, the gradients so far, DeepSpeed's bucket
    step: int  # from the end of the backward pass to the end of the optimizer step: gradients and copies of them
    evaluation: int  # one batch of evaluation: its loss, or generation with the cache
    resume: int  # while a checkpoint is loaded
    reserve: int  # CONTEXT, COMMUNICATION and FRAGMENTATION

    @property
    def peak(self) -> int:
        """The most that the GPU holds at any time, in bytes."""
        phases = max(self.backward, self.step, self.evaluation, self.resume)
        return self.weights + self.optimizer + phases + self.reserve


# ---------------------------------------------------------------------------------------------------------------------
# fake passes of the model


class Live(TorchDispatchMode):
    """While active, adds up the bytes of all tensors that operations have made and that still exist.

    Args:
        vocabulary: a tensor whose last dimension has this size counts as logits.
    """

    def __init__(self, vocabulary: int = 0):
        super().__init__()
        self.vocabulary = vocabulary
        self.seen: dict[int, weakref.ref] = {}  # by storage, because views share one
        self.gradients = 0  # bytes of complete gradients; a hook of the caller adds them
        self.now = self.logits = 0
        self.reset()

    def reset(self) -> None:
        """Sets the peaks to zero. Tensors that exist stay counted."""
        self.peak = self.peak_without_gradients = self.peak_of_logits = 0

    def add(self, tensor: torch.Tensor) -> None:
        """Counts the storage of a tensor once, until nothing refers to it any more."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self.seen:
            return
        logits = size if tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary else 0

        def forget(_):
            del self.seen[key]
            self.now -= size
            self.logits -= logits

        self.seen[key] = weakref.ref(storage, forget)
        self.now += size
        self.logits += logits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        self.peak = max(self.peak, self.now)
        self.peak_without_gradients = max(self.peak_without_gradients, self.now - self.gradients)
        self.peak_of_logits = max(self.peak_of_logits, self.logits)
        return result


@dataclass(frozen=True)
class Passes:
    """What the fake passes of a model held at their peaks besides its weights, in bytes."""

    sizes: tuple[int, ...]  # elements of each parameter that is trained
    frozen: int  # elements of all other parameters
    activations: int
    logits: int
    backward: int
    evaluation: int


def fake_batch(rows: int, length: int, width: int) -> dict:
    """A batch as evaluation.collate makes it; all sequences are `length` and all answers `width` tokens long."""
    ids = torch.zeros(rows, length, dtype=torch.long)
    n = torch.zeros(rows * width, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return batch | {"labels": n, "positions": torch.zeros_like(n), "width": width}


@functools.lru_cache
def passes(
    model_folder: str,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    batch_size: int,
    max_length: int,
    answer_tokens: int,
    eval_tokens: int,
    max_new_tokens: int,
    lora_r: int,
    target_modules: str,
    checkpointing: bool,
) -> Passes:
    """Runs a model on FakeTensors: its longest batch in training, and its largest batches in evaluation.

    Args:
        model_folder: with config.json.
        dtype: of the weights.
        autocast: the dtype of torch.autocast; None turns it off.
        batch_size: see `forecast`, as the arguments below.
        max_length: tokens.
        answer_tokens: tokens.
        eval_tokens: tokens.
        max_new_tokens: tokens.
        lora_r: rank of LoRA adapters.
        target_modules: see lora.adapted.
        checkpointing: gradient checkpointing.
    """
    config = transformers.AutoConfig.from_pretrained(model_folder)
    live = Live(config.get_text_config().vocab_size)

    def precision_context():
        return torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()

    def count_gradient(parameter):
        live.gradients += parameter.grad.untyped_storage().nbytes()

    model = evaluation.fuse_gelu(lora.without_weights(model_folder, dtype=dtype))
    if checkpointing:
        model.activation_checkpointing_enable()
    model = lora.adapted(model, lora_r, target_modules=target_modules, autocast_adapter_dtype=False)
    with FakeTensorMode(), live:
        onto_cpu(model)
        for tensor in (*model.parameters(), *model.buffers()):
            live.add(tensor)
        weights = live.now
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(count_gradient)
        live.reset()
        model.train()
        with precision_context():
            loss, _ = evaluation.answer_loss(model, fake_batch(batch_size, max_length, answer_tokens))
        loss.backward()
        backward, activations, logits = live.peak, live.peak_without_gradients, live.peak_of_logits
        model.zero_grad()
        del loss
        live.gradients = 0
        live.reset()
        model.eval()
        with torch.no_grad(), precision_context():
            # evaluate_loss counts one position of an answer as LOGITS tokens. So the largest batch is either one of the
            # longest sequences, or one of short prompts that is filled with answers.
            for length in {max_length, min(max_length, evaluation.LOGITS * answer_tokens)}:
                evaluation.answer_loss(model, fake_batch(max(1, eval_tokens // length), length, answer_tokens))
            generate(model, fake_batch(max(1, eval_tokens // max_length), max_length, 1), max_new_tokens)
        sizes = tuple(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        frozen = sum(parameter.numel() for parameter in model.parameters()) - sum(sizes)
        return Passes(sizes, frozen, activations - weights, logits, backward - weights, live.peak - weights)


def onto_cpu(model: torch.nn.Module) -> None:
    """Replaces the tensors of a model without weights by FakeTensors on the CPU. Tied weights stay tied.

    peft cannot adapt a model that has FakeTensors, because it moves adapters to a device.
    """
    made = {}
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor not in made:
                made[tensor] = torch.empty(tensor.shape, dtype=tensor.dtype)
                if isinstance(tensor, torch.nn.Parameter):
                    made[tensor] = torch.nn.Parameter(made[tensor], tensor.requires_grad)
            setattr(module, name, made[tensor])


def generate(model, batch: dict, max_new_tokens: int) -> None:
    """The first two steps of evaluation.predict, which stand for all.

    The prompts have the greatest length already, so the cache of the second step is as large as that of the last one.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    options = {"use_cache": True, "logits_to_keep": 1}
    output = model(input_ids=ids, attention_mask=mask, **options, **evaluation.position_ids(model, mask))
    if max_new_tokens > 1:
        cache, mask = output.past_key_values, torch.nn.functional.pad(mask, (0, 1), value=1)
        positions = {name: ids[:, -1:] + 1 for name, ids in evaluation.position_ids(model, mask).items()}
        model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache, **options, **positions)


# ---------------------------------------------------------------------------------------------------------------------
# what DeepSpeed adds


def forecast(
    model_folder: str | Path,
    ds_config: dict,
    precision: str,
    batch_size: int,
    max_length: int,
    answer_tokens: int,
    eval_tokens: int,
    max_new_tokens: int,
    ranks: int = 1,
    lora_r: int = 0,
    target_modules: str = "",
    checkpointing: bool = False,
) -> Forecast:
    """The memory of a trial on each of its GPUs.

    Args:
        model_folder: with config.json; the weights are not read.
        ds_config: the DeepSpeed configuration.
        precision: "fp16", "bf16" or "fp32".
        batch_size: sequences per GPU in training.
        max_length: tokens of the longest sequence. All sequences are taken to be as long.
        answer_tokens: tokens of the answer in each sequence. Logits are computed for these only.
        eval_tokens: tokens of a batch in evaluation, padding included.
        max_new_tokens: the most tokens that are generated for an answer.
        ranks: GPUs of the trial.
        lora_r: rank of LoRA adapters; 0: all weights are trained.
        target_modules: see lora.adapted.
        checkpointing: gradient checkpointing.
    """
    stage, dtype, autocast = zero_stage(ds_config), DTYPES[precision], None
    if stage == 0:  # weights in fp32; in fp16 and bf16 operations convert them, by torch.autocast
        dtype, autocast = torch.float32, dtype if precision != "fp32" else None
    sizes = batch_size, max_length, answer_tokens, eval_tokens, max_new_tokens
    run = passes(str(model_folder), dtype, autocast, *sizes, lora_r, target_modules, checkpointing)
    if stage == 0:
        parts = without_zero(run, ranks)
    else:
        zero = ds_config.get("zero_optimization", {})
        bucket = elements(zero, "reduce_bucket_size", model_folder)
        live_parameters = elements(zero, "stage3_max_live_parameters", model_folder) if stage == 3 else 0
        buckets = 2 if zero.get("overlap_comm", stage == 3) else 1
        parts = with_zero(run, stage, dtype.itemsize, ranks, bucket, buckets, live_parameters)
    result = Forecast(**parts, activations=run.activations, logits=run.logits, reserve=0)
    reserve = CONTEXT + (ranks > 1) * COMMUNICATION + round(FRAGMENTATION * result.peak)
    return dataclasses.replace(result, reserve=reserve)


def without_zero(run: Passes, ranks: int) -> dict[str, int]:
    """The parts of a Forecast at ZeRO stage 0: weights, gradients and AdamW's state are in fp32."""
    count = sum(run.sizes)
    return {
        "weights": 4 * (count + run.frozen),
        "gradients": 4 * count,
        "optimizer": 8 * count,
        "backward": run.backward,
        # Several ranks all-reduce flat copies of the gradients. AdamW's fused kernel and torch's clipping copy nothing.
        "step": 4 * count + 4 * (ranks > 1) * min(count, BUCKET),
        "evaluation": run.evaluation,
        "resume": 0,  # AdamW has no state before it is loaded, from a file that is read to the CPU
    }


def with_zero(
    run: Passes, stage: int, size: int, ranks: int, capacity: int, buckets: int, live_parameters: int
) -> dict[str, int]:
    """The parts of a Forecast at ZeRO stages 1 to 3.

    Args:
        run: the fake passes.
        stage: 1, 2 or 3.
        size: bytes of one weight.
        ranks: GPUs of the trial.
        capacity: elements of a bucket, in which gradients are collected before the ranks reduce them.
        buckets: 2 if one bucket is filled while the other is reduced, else 1.
        live_parameters: at stage 3, the most elements of weights that are gathered at a time.
    """
    count, largest = sum(run.sizes), max(run.sizes)
    part = -(-count // ranks)  # elements that this rank keeps, rounded up
    bucket = size * capacity * buckets
    gathered = size * min(count + run.frozen, live_parameters)  # of the weights of other ranks; 0 below stage 3
    gradients = size * (count if stage == 1 else part)
    kept = gradients + bucket if stage == 3 else 0  # stage 3 allocates its gradient buffers once, for the whole run
    if stage == 1:
        backward = run.backward + bucket
    elif stage == 2:  # a complete gradient moves to the bucket, and from a full bucket to its rank
        backward = run.activations + bucket + (gradients if capacity < count else 0)
    else:
        backward = run.activations + gathered + kept
    norm = 8 * min(part, largest)  # the norm of each gradient is computed in fp64
    if stage == 3:
        step = kept + max(norm, 4 * part)
    else:
        # Stage 1 reduces after the backward pass: gradients move to the bucket, and from a full bucket to a flat tensor
        # of this rank. Several ranks copy the bucket. Then come the norms. At last this rank's gradients are made one
        # tensor, and that is converted to fp32.
        flat = size * part
        unreduced = max(size * count, size * max(0, count - capacity) + flat) if stage == 1 else flat
        reduction = unreduced + bucket + (ranks > 1) * min(bucket, size * count)
        update = 2 * flat + (4 * part if size < 4 else 0)
        step = max(reduction, flat + norm, update)
    return {
        "weights": size * (part + -(-run.frozen // ranks) if stage == 3 else count + run.frozen),
        "gradients": gradients,
        "optimizer": 12 * part,
        "backward": backward,
        "step": step,
        "evaluation": run.evaluation + gathered + kept,
        "resume": kept,  # as at stage 0 there is no optimizer state before it is loaded
    }


def elements(zero: dict, name: str, model_folder: str | Path) -> int:
    """A number of elements in DeepSpeed's zero_optimization, or its default.

    The Trainer replaces "auto" by the square of the hidden size.
    """
    defaults = {"reduce_bucket_size": REDUCE_BUCKET, "stage3_max_live_parameters": LIVE_PARAMETERS}
    value = zero.get(name, defaults[name])
    if value == "auto":
        return json.loads((Path(model_folder) / "config.json").read_text())["hidden_size"] ** 2
    return int(float(value))


# ---------------------------------------------------------------------------------------------------------------------
# the forecast as text


def plan(
    forecast_of: Callable[[dict, int, int], Forecast],
    precision: str,
    ds_config: dict,
    batch_sizes: list[int],
    ranks: int,
    sharing: int = 1,
) -> str:
    """The forecast as text: its parts, and which GPUs the trial, or all trials that share a GPU, fit on.

    For a GPU that is too small, the text names the first setting that fits: fewer trials on a GPU, the smallest batch
    size, or a higher ZeRO stage, on up to two GPUs.

    Args:
        forecast_of: computes a Forecast from a DeepSpeed configuration, a batch size and a number of ranks.
        precision: "fp16", "bf16" or "fp32".
        ds_config: the DeepSpeed configuration of the search.
        batch_sizes: the smallest and the largest batch size of the search space.
        ranks: GPUs of a trial of the search.
        sharing: trials that share a GPU. Each has all parts of the memory for itself, CUDA's context too.
    """
    least, most = batch_sizes
    stage = zero_stage(ds_config)
    f = forecast_of(ds_config, most, ranks)
    gb = {name: f"{size / 1e9:.3g}" for name, size in dataclasses.asdict(f).items()}
    gpus = f" on each of {ranks} GPUs" if ranks > 1 else ""
    lines = [
        f"memory of a GPU, in GB, at batch size {most}, {precision}, ZeRO stage {stage}{gpus}: "
        f"weights {gb['weights']}, optimizer {gb['optimizer']}, and the most of",
        f"  forward and backward {gb['backward']} (activations {gb['activations']}, of these logits {gb['logits']}), "
        f"optimizer step {gb['step']} (gradients {gb['gradients']}), evaluation {gb['evaluation']};",
        f"  reserve {gb['reserve']} (CUDA {CONTEXT / 1e9:.1f}, fragmentation {FRAGMENTATION:.0%}); "
        f"at its peak {f.peak / 1e9:.3g}",
        *[f"{sharing} trials share a GPU: {sharing * f.peak / 1e9:.3g} in all"] * (sharing > 1),
        "",
    ]
    others = [(ds_config, least, ranks)] if least < most else []
    for other_stage, gpus in ((1, 1), (1, 2), (2, 2), (3, 2)):
        if (other_stage, gpus) > (stage, ranks) and gpus >= ranks:
            zero = ds_config.get("zero_optimization", {}) | {"stage": other_stage}
            others.append((ds_config | {"zero_optimization": zero}, most, gpus))
    lines.append(f"{'GPU, GB':>10}  {'fits':>4}  {'free, GB':>8}  would fit with")
    for size in GPUS:
        room, hint = int(size * 1e9 // f.peak), ""  # trials
        if sharing > room >= 1:
            hint = "--gpus_per_trial " + ("1" if room == 1 else f"1/{room}")
        elif room == 0:
            found = next((choice for choice in others if forecast_of(*choice).peak <= size * 1e9), None)
            nothing = "none of the smaller choices either: batch size, ZeRO stages on 2 GPUs"
            hint = in_words(*found, shared=sharing > 1) if found else nothing
        fits, free = "yes" if room >= sharing else "no", size - sharing * f.peak / 1e9
        lines.append(f"{size:>10}  {fits:>4}  {free:>8.1f}  {hint}".rstrip())
    return "\n".join(lines)


def in_words(ds_config: dict, batch_size: int, ranks: int, shared: bool) -> str:
    """A setting as text: GPUs per trial, batch size, ZeRO stage. `shared`: trials of the search share a GPU."""
    gpus = f"--gpus_per_trial {ranks}, " * (shared or ranks > 1)
    return f"{gpus}batch size {batch_size}, ZeRO stage {zero_stage(ds_config)}"

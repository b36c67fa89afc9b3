"""Forecast of the GPU memory of a trial, without a GPU and without weights. Nothing of Ray in here.

    forecast("demo/model", ds_config, "fp16", batch_size=2, max_length=1024, answer_tokens=48, eval_tokens=8192, max_new_tokens=48).peak

Forward pass, loss, backward pass and evaluation of the real model class run on FakeTensors, which have a shape, a dtype and a lifetime but no
data; `Live` adds up those that live at the same time. What DeepSpeed keeps and copies is calculated from its configuration; the formulas
follow the sources of 0.19.8. All sizes are bytes of one GPU, of a trial that has as many GPUs as `ranks` says.

FakeTensors of a CPU stand for those of a GPU: a torch without CUDA has no autograd for the others. torch.autocast has another list of
operations for a CPU, but the same for those of BLOOM that need memory. A kernel's own workspace is not seen.
"""

import contextlib
import dataclasses
import functools
import json
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hpo.squad import evaluation
from hpo.squad import precision as mixed  # `precision` is an argument of functions here

CONTEXT = 600_000_000  # bytes, assumed: the CUDA context with its kernels, and the workspaces of cuBLAS
COMMUNICATION = 400_000_000  # bytes, assumed: NCCL's buffers, where a trial has several GPUs
FRAGMENTATION = 0.1  # assumed: the allocator of torch holds so much more than its tensors have, as batches differ in length
GPUS = (16, 24, 32, 40, 80)  # GB
BUCKET = 500_000_000  # elements that DeepSpeed all-reduces at a time at stage 0
LIVE_PARAMETERS = 1_000_000_000  # elements: DeepSpeed's default of stage3_max_live_parameters


@dataclass(frozen=True)
class Forecast:
    """Bytes on one GPU. peak = weights + optimizer + max(backward, step, evaluation, resume) + reserve."""

    weights: int
    gradients: int  # of all weights, as this GPU keeps them after the backward pass
    optimizer: int  # Adam's two moments; at stages 1 to 3 also fp32 copies of the weights
    activations: int  # most in forward and backward pass besides gradients that are complete; 16-bit copies of weights and logits included
    logits: int  # most that tensors with a number for each token of the vocabulary have of these
    backward: int  # most in forward and backward pass above weights and optimizer: activations, gradients so far, DeepSpeed's bucket
    step: int  # most above weights and optimizer from the end of the backward pass to that of the optimizer step: gradients and copies of them
    evaluation: int  # most above weights and optimizer in a batch of evaluation: loss, or generation with its cache
    resume: int  # most above weights and optimizer while a checkpoint is loaded
    reserve: int  # CONTEXT, COMMUNICATION and FRAGMENTATION

    @property
    def peak(self) -> int:
        return self.weights + self.optimizer + max(self.backward, self.step, self.evaluation, self.resume) + self.reserve


class Live(TorchDispatchMode):
    """While active: adds up the bytes of all tensors that operations have made and that are still there.

    Args:
        vocabulary: tensors whose last dimension is this one are logits.
    """

    def __init__(self, vocabulary: int = 0):
        super().__init__()
        self.vocabulary = vocabulary
        self.seen: dict[int, weakref.ref] = {}  # storages: views share one
        self.gradients = 0  # bytes of complete ones, to be added by who knows of them
        self.now = self.logits = 0
        self.reset()

    def reset(self) -> None:
        """Forgets the peaks."""
        self.peak = self.peak_without_gradients = self.peak_of_logits = 0

    def add(self, tensor: torch.Tensor) -> None:
        """Counts a tensor, once, until nothing refers to its storage."""
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
class Run:
    """What fake passes of a model have held besides its weights, in bytes."""

    sizes: tuple[int, ...]  # elements of each parameter
    activations: int
    logits: int
    backward: int
    evaluation: int


@functools.lru_cache
def passes(
    model_folder: str, dtype: torch.dtype, autocast: torch.dtype | None, batch_size: int, max_length: int, answer_tokens: int, eval_tokens: int, max_new_tokens: int
) -> Run:
    """Runs the model of a configuration on FakeTensors: its longest batch in training, and three in evaluation.

    Args:
        dtype: of the weights.
        autocast: of torch.autocast, if it is on.
        others: see `forecast`.
    """
    config = transformers.AutoConfig.from_pretrained(model_folder)
    live = Live(config.get_text_config().vocab_size)

    def batch(rows: int, length: int, width: int) -> dict:
        ids = torch.zeros(rows, length, dtype=torch.long)
        n = torch.zeros(rows * width, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": n, "positions": torch.zeros_like(n), "width": width}

    def sixteen_bits():
        return torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()

    def count(parameter):
        live.gradients += parameter.grad.untyped_storage().nbytes()

    with FakeTensorMode(), live:
        model = evaluation.fuse_gelu(transformers.AutoModelForCausalLM.from_config(config, dtype=dtype))
        for tensor in (*model.parameters(), *model.buffers()):
            live.add(tensor)
        weights = live.now
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(count)
        live.reset()
        model.train()
        with sixteen_bits():
            loss, _ = evaluation.answer_loss(model, batch(batch_size, max_length, answer_tokens))
        loss.backward()
        backward, activations, logits = live.peak, live.peak_without_gradients, live.peak_of_logits
        model.zero_grad()
        del loss
        live.gradients = 0
        live.reset()
        model.eval()
        with torch.no_grad(), sixteen_bits():
            # Where prompts are short, answers fill the batch: evaluation.evaluate_loss counts an answer's position as LOGITS tokens.
            for length in {max_length, min(max_length, evaluation.LOGITS * answer_tokens)}:
                evaluation.answer_loss(model, batch(max(1, eval_tokens // length), length, answer_tokens))
            generate(model, batch(max(1, eval_tokens // max_length), max_length, 1), max_new_tokens)
        sizes = tuple(parameter.numel() for parameter in model.parameters())
        return Run(sizes, activations - weights, logits, backward - weights, live.peak - weights)


def generate(model, batch: dict, max_new_tokens: int) -> None:
    """The first step of evaluation.predict and the second, whose cache has as many tokens as the last one's: the prompts are taken as the longest."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    output = model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1, **evaluation.position_ids(model, mask))
    if max_new_tokens > 1:
        cache, mask = output.past_key_values, torch.nn.functional.pad(mask, (0, 1), value=1)
        positions = {name: ids[:, -1:] + 1 for name, ids in evaluation.position_ids(model, mask).items()}
        model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1, **positions)


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
) -> Forecast:
    """The memory of a trial on each of its GPUs.

    Args:
        model_folder: with config.json; the weights are not read.
        ds_config: the DeepSpeed configuration, see hpo/checks.py.
        precision: "fp16", "bf16" or "fp32".
        batch_size: sequences a GPU in training.
        max_length: tokens of the longest sequence, all of them taken as so long.
        answer_tokens: of each sequence, whose logits are computed.
        eval_tokens: of a batch in evaluation, padding included.
        max_new_tokens: most that are generated.
        ranks: GPUs of the trial.
    """
    stage, zero = mixed.zero_stage(ds_config), ds_config.get("zero_optimization", {})
    sixteen = mixed.DTYPES[precision]
    dtype, autocast = (torch.float32, sixteen if precision != "fp32" else None) if stage == 0 else (sixteen, None)
    run = passes(str(model_folder), dtype, autocast, batch_size, max_length, answer_tokens, eval_tokens, max_new_tokens)
    count, size = sum(run.sizes), dtype.itemsize
    part = -(-count // ranks)
    if stage == 0:
        # Several ranks: the gradients are all-reduced in flat copies. AdamW's fused kernel and torch's clipping make no copies.
        step = 4 * count + 4 * (ranks > 1) * min(count, BUCKET)
        parts = {"weights": 4 * count, "gradients": 4 * count, "optimizer": 8 * count, "backward": run.backward, "step": step, "evaluation": run.evaluation}
        parts["resume"] = 0  # AdamW has no state before it is loaded, from a file that is read to the CPU
    else:
        capacity = elements(zero, "reduce_bucket_size", model_folder)
        bucket = size * capacity * (2 if zero.get("overlap_comm", stage == 3) else 1)
        if stage == 1:
            gathered, kept, gradients = 0, 0, size * count
            backward = run.backward + bucket
        elif stage == 2:  # a gradient moves to the bucket as soon as it is complete, and from a full bucket to its rank
            gathered, kept, gradients = 0, 0, size * part
            backward = run.activations + bucket + (gradients if capacity < count else 0)
        else:  # weights are gathered to be used; buffers for gradients are there all the time
            gathered, gradients = size * min(count, elements(zero, "stage3_max_live_parameters", model_folder)), size * part
            kept = gradients + bucket
            backward = run.activations + gathered + kept
        # The reduction, after the backward pass at stage 1: gradients move to the bucket, and from a full one to a flat tensor of this rank's.
        # With several ranks the bucket is copied. Then the norm, in fp64, of each gradient; then all of this rank's as one tensor, and that in fp32.
        left = max(size * count, size * max(0, count - capacity) + size * part) if stage == 1 else size * part
        reduction = left + bucket + (ranks > 1) * min(bucket, size * count)
        norm = size * part + 8 * min(part, max(run.sizes))
        update = 2 * size * part + (4 * part if size < 4 else 0)
        step = max(reduction, norm, update) if stage < 3 else kept + max(8 * min(part, max(run.sizes)), 4 * part)
        parts = {"weights": size * (part if stage == 3 else count), "gradients": gradients, "optimizer": 12 * part, "backward": backward, "step": step}
        # As at stage 0. At stage 3, too, no state is there before.
        parts |= {"evaluation": run.evaluation + gathered + kept, "resume": kept}
    result = Forecast(**parts, activations=run.activations, logits=run.logits, reserve=0)
    reserve = CONTEXT + (ranks > 1) * COMMUNICATION + round(FRAGMENTATION * result.peak)
    return dataclasses.replace(result, reserve=reserve)


def elements(zero: dict, name: str, model_folder: str | Path) -> int:
    """A number of elements in DeepSpeed's zero_optimization; for the bucket the Trainer takes "auto" as the square of the hidden size."""
    value = zero.get(name, {"reduce_bucket_size": mixed.REDUCE_BUCKET, "stage3_max_live_parameters": LIVE_PARAMETERS}[name])
    if value == "auto":
        return json.loads((Path(model_folder) / "config.json").read_text())["hidden_size"] ** 2
    return int(float(value))


def plan(forecast_of, precision: str, ds_config: dict, batch_sizes: list[int], ranks: int) -> str:
    """The forecast as text: its parts, and the GPUs that it fits on. Where it does not, the first smaller choice that does.

    Args:
        forecast_of: (ds_config, batch size, ranks) -> Forecast
        precision, ds_config, ranks: of the search.
        batch_sizes: the smallest and the largest of the search.
    """
    least, most = batch_sizes
    stage = mixed.zero_stage(ds_config)
    f = forecast_of(ds_config, most, ranks)
    gb = {name: f"{size / 1e9:.3g}" for name, size in dataclasses.asdict(f).items()}
    gpus = f" on each of {ranks} GPUs" if ranks > 1 else ""
    lines = [
        f"memory of a GPU, in GB, at batch size {most}, {precision}, ZeRO stage {stage}{gpus}: weights {gb['weights']}, optimizer {gb['optimizer']}, and the most of",
        f"  forward and backward {gb['backward']} (activations {gb['activations']}, of these logits {gb['logits']}), optimizer step {gb['step']} (gradients {gb['gradients']}), evaluation {gb['evaluation']};",
        f"  reserve {gb['reserve']} (CUDA {CONTEXT / 1e9:.1f}, fragmentation {FRAGMENTATION:.0%}); at its peak {f.peak / 1e9:.3g}",
        "",
    ]
    others = [(ds_config, least, ranks)] if least < most else []
    for other_stage, gpus in ((1, 1), (1, 2), (2, 2), (3, 2)):
        if (other_stage, gpus) > (stage, ranks) and gpus >= ranks:
            others.append((ds_config | {"zero_optimization": ds_config.get("zero_optimization", {}) | {"stage": other_stage}}, most, gpus))
    lines.append(f"{'GPU, GB':>10}  {'fits':>4}  {'free, GB':>8}  would fit with")
    for size in GPUS:
        fits, hint = f.peak <= size * 1e9, ""
        if not fits:
            found = next((choice for choice in others if forecast_of(*choice).peak <= size * 1e9), None)
            hint = in_words(*found) if found else "none of the smaller choices either: batch size, ZeRO stages on 2 GPUs"
        lines.append(f"{size:>10}  {'yes' if fits else 'no':>4}  {size - f.peak / 1e9:>8.1f}  {hint}".rstrip())
    return "\n".join(lines)


def in_words(ds_config: dict, batch_size: int, ranks: int) -> str:
    gpus = f"--gpus_per_trial {ranks}, " * (ranks > 1)
    return f"{gpus}batch size {batch_size}, ZeRO stage {mixed.zero_stage(ds_config)}"

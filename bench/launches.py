"""Operations and waits of the CPU in one optimizer step: the Trainer's own with DeepSpeed against ours. No GPU is needed.

    .venv/bin/python bench/launches.py                     # two minutes on two cores
    .venv/bin/python bench/launches.py --operations        # and the ten most frequent operations of each row

At a batch of one or two sequences a GPU is faster than the CPU that starts its work, so a step takes as long as its launches do. Their number
does not depend on the width of the model: it is counted here on the CPU, in a model of BLOOM-560M's depth, with the engine of a run. Each row is
a process of its own, as DeepSpeed keeps global state of autocast.

What counts: each operation of torch that computes or copies, seen by a dispatch mode; views and allocations do not. One on a list of tensors
counts as the launches that its length needs on a GPU; at BLOOM-560M's full width each such operation (six in ours) has some 25 launches more. A
sync is an operation whose result the CPU reads, a call of DeepSpeed's `synchronize`, and the copy of a tensor of the batch to the GPU where the
Trainer is not told to copy without waiting. Not seen here: that some operations are several kernels on a GPU. bench/gpu.sh compares the count with
the profiler's.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import raytune_bayesian  # first: sets up Ray's environment

# isort: split
import torch
import transformers
from deepspeed.accelerator import get_accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from hpo.squad import evaluation, precision, ranks

LAYERS, HEADS, HIDDEN, VOCABULARY = 24, 16, 32, 100
LENGTHS, ANSWER, PADDED = (12, 9), 3, 16  # tokens of the two sequences, of an answer, and of a sequence of the textbook (512 in use: as many operations)
COUNTED, TIMED = 5, 5  # steps; the first two are not counted: AdamW makes its state, DeepSpeed its buffers
LIMIT, SYNC_LIMIT = 2500, 4
ROWS = {  # way, precision, ZeRO stage
    "textbook": ("textbook", "fp16", 0),
    "textbook, stage 1": ("textbook", "fp16", 1),
    "ours": ("ours", "fp16", 0),
    "ours, bf16": ("ours", "bf16", 0),
    "ours, stage 1": ("ours", "fp16", 1),
    "ours, fp32": ("ours", "fp32", 0),
}
PARTS = ("forward", "backward", "optimizer", "rest")
METHODS = ("floating_point_ops", "train", "zero_grad")  # whose time is measured
NO_LAUNCH = {"detach", "alias", "lift_fresh", "_unsafe_view", "set_", "resize_", "_record_function_enter_new", "_record_function_exit"}  # beside views and empty tensors
GROUP: list[ranks.Group] = []  # of this process, once one is needed
SYNCS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive", "is_nonzero"}
TENSORS_A_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}  # by the number of lists (torch's MultiTensorApply.cuh)


class Counting(TorchDispatchMode):
    """Counts operations by name, syncs by name too, in the `part` of a step that is set; None: nothing is counted."""

    def __init__(self):
        super().__init__()
        self.part = None
        self.reset()

    def reset(self) -> None:
        self.launches, self.syncs = {part: Counter() for part in PARTS}, Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if self.part:
            name = operation._schema.name.split("::")[1]
            if not (operation.is_view or name in NO_LAUNCH or name.startswith(("empty", "new_empty"))):
                lists = [a for a in args if isinstance(a, (list, tuple)) and a and torch.is_tensor(a[0])] if "_foreach" in name or "_fused" in name else []
                many = math.ceil(len(lists[0]) / TENSORS_A_LAUNCH[min(5, len(lists))]) if lists else 1
                self.launches[self.part][name] += many
            mask = name.startswith("index") and any(torch.is_tensor(i) and i.dtype == torch.bool for a in args if isinstance(a, (list, tuple)) for i in a)
            if name in SYNCS or mask:
                self.syncs[f"{name} in {self.part}"] += 1
        return operation(*args, **(kwargs or {}))

    def during(self, part: str | None, function):
        """The function, with what it does counted for a part; the outer one, where another part calls it."""

        def call(*args, **kwargs):
            before = self.part
            self.part = part if part is None or before == "rest" else before
            try:
                return function(*args, **kwargs)
            finally:
                self.part = before

        return call


class Watch(transformers.TrainerCallback):
    """What raytune_bayesian.Iterations does in each step of ours; then calls `on_step`.

    Args:
        trainer, make_gradients: from `make`.
    """

    def __init__(self, trainer, make_gradients):
        self.trainer, self.make_gradients, self.gradients = trainer, make_gradients, None
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.make_gradients:
            model.train()
            self.gradients = self.make_gradients(self.trainer.model_wrapped)

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        if self.gradients and self.gradients.after_step():
            lr_scheduler.step()
        self.on_step(state.global_step, control)

    def on_step(self, step: int, control) -> None:
        pass


class Steps(Watch):
    """Counts the first steps of a training, and measures the time of some methods in the others."""

    def __init__(self, *args):
        super().__init__(*args)
        self.counting, self.steps, self.seconds, self.inside = Counting(), [], Counter(), Counter()
        self.trainer.data_collator = self.batch(self.counting.during(None, self.trainer.data_collator))  # on a CPU, with a GPU too

    def on_train_begin(self, *args, **kwargs):
        super().on_train_begin(*args, **kwargs)
        trainer, engine, count = self.trainer, self.trainer.model_wrapped, self.counting
        self.accelerator, self.synchronize = get_accelerator(), get_accelerator().synchronize
        self.accelerator.synchronize = self.synchronizes
        trainer.compute_loss = count.during("forward", trainer.compute_loss)
        engine.backward = count.during("backward", engine.backward)
        engine.step = count.during("optimizer", engine.step)
        for owner, name in ((trainer, "floating_point_ops"), (trainer.model, "train"), (engine, "train"), (engine, "zero_grad"), (trainer.model, "zero_grad")):
            setattr(owner, name, self.timed(name, getattr(owner, name)))
        count.part = "rest"
        count.__enter__()

    def synchronizes(self, *args, **kwargs):
        """Of DeepSpeed's accelerator: returns at once on a CPU."""
        if self.counting.part:
            self.counting.syncs[f"synchronize in {self.counting.part}"] += 1
        return self.synchronize(*args, **kwargs)

    def batch(self, collate):
        """The collator, with the copies of its batch to a GPU counted. One batch is collated ahead of its step: all are alike."""

        def call(*args, **kwargs):
            batch = collate(*args, **kwargs)
            if not self.trainer.args.accelerator_config.non_blocking:
                self.counting.syncs["copies of a batch"] += sum(map(torch.is_tensor, batch.values()))
            return batch

        return call

    def timed(self, name: str, function):
        def call(*args, **kwargs):
            self.inside[name] += 1  # engine.train() calls model.train()
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside[name] -= 1
                if not self.inside[name]:
                    self.seconds[name] += time.process_time() - began

        return call

    def on_step(self, step, control):
        count = self.counting
        if step <= COUNTED:
            self.steps.append((count.launches, count.syncs, self.trainer.model_wrapped.skipped_steps))
            count.reset()
        if step == COUNTED:
            count.__exit__(None, None, None)
            self.accelerator.synchronize = self.synchronize
            self.seconds.clear()
            self.began = time.process_time()
        elif step == COUNTED + TIMED:
            self.seconds["step"] = time.process_time() - self.began


def allow_fp16() -> None:
    """Lets DeepSpeed train in fp16 on the CPU: torch can, DeepSpeed refuses."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    CPU_Accelerator.is_fp16_supported = lambda self: True


def make(way: str, kind: str, stage: int, model, data, batch_size: int, folder: str, padded: int) -> tuple:
    """A Trainer for one pass over the data, and what makes `precision.Gradients` of its engine, None for the textbook's, which pads to
    `padded` tokens and learns all of them."""
    GROUP or GROUP.append(ranks.Group())
    ds_config = json.loads((ROOT / "ds_config.json").read_text()) | {"zero_optimization": {"stage": stage}}
    if way == "ours":
        run = {"ds_config": ds_config, "precision": kind, "seed": 0}
        hyperparameters = {"lr": 1e-4, "wd": 0.01, "per_device_bs": batch_size}
        trainer = raytune_bayesian.make_trainer(evaluation.fuse_gelu(model), data, list(range(len(data))), hyperparameters, run, GROUP[0], folder, 0)
        return trainer, lambda engine: precision.Gradients(engine, ds_config, kind, None, 1)
    rows = []
    for i in range(len(data)):
        ids = data[i]["input_ids"][:padded].tolist()
        padding = padded - len(ids)
        rows.append({"input_ids": ids + [0] * padding, "attention_mask": [1] * len(ids) + [0] * padding, "labels": ids + [0] * padding})
    arguments = transformers.TrainingArguments(
        output_dir=folder, learning_rate=1e-4, per_device_train_batch_size=batch_size, num_train_epochs=1, deepspeed=ds_config, fp16=kind == "fp16",
        bf16=kind == "bf16", use_cpu=not torch.cuda.is_available(), save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer, None


def train(way: str, kind: str, stage: int, layers: int) -> dict:
    """One row: launches and syncs of a step by part, those of each operation, milliseconds a step of some methods."""
    allow_fp16()
    torch.set_num_threads(1)
    transformers.set_seed(0)
    sizes = {"hidden_size": HIDDEN, "n_layer": layers, "n_head": HEADS, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    model = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=VOCABULARY, **sizes))
    data = [{"input_ids": torch.randint(3, VOCABULARY, (length,)).numpy(), "prompt_length": length - ANSWER} for length in LENGTHS * (COUNTED + TIMED)]
    with tempfile.TemporaryDirectory() as folder:
        trainer, make_gradients = make(way, kind, stage, model, data, 2, folder, PADDED)
        callback = Steps(trainer, make_gradients)
        trainer.train()
    steady = [step for i, step in enumerate(callback.steps) if i >= 2 and step[2] == callback.steps[i - 1][2]]  # not those that overflow
    launches = {part: statistics.median(step[0][part].total() for step in steady) for part in PARTS}
    return {
        "launches": launches,
        "syncs": statistics.median(step[1].total() for step in steady),
        "where": dict(steady[-1][1]),
        "operations": sum(steady[-1][0].values(), Counter()).most_common(),
        "milliseconds": {name: 1000 * callback.seconds[name] / TIMED for name in (*METHODS, "step")},
        "skipped": callback.steps[-1][2],
    }


def row(name: str, layers: int = LAYERS) -> dict:
    """`train` in a process of its own."""
    command = [sys.executable, __file__, "--row", name, "--layers", str(layers)]
    no_gpu = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=no_gpu).stdout
    return json.loads(output.splitlines()[-1])


def rank(number: int, folder: str) -> dict:
    """Milliseconds of the messages that two ranks send each other in a step: objects, as before, and numbers, as now."""
    torch.set_num_threads(1)
    group, times = ranks.Group(number, 2, folder), {"objects": [], "numbers": []}
    ways = {"objects": lambda: (group.broadcast(False), group.gather(3)), "numbers": lambda: (group.any(False), group.mean(3, "cpu"))}
    for _ in range(100):
        for name, send in ways.items():
            began = time.perf_counter()
            send()
            times[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(values[10:]) for name, values in times.items()}


def messages() -> dict:
    with tempfile.TemporaryDirectory() as folder:
        ranks_ = [subprocess.Popen([sys.executable, __file__, "--rank", str(i), folder], stdout=subprocess.PIPE, text=True) for i in (0, 1)]
        outputs = [process.communicate()[0] for process in ranks_]
    return json.loads(outputs[0].splitlines()[-1])


def main(layers: int, operations: bool) -> None:
    print(f"launches and syncs of an optimizer step, {layers} layers, 2 sequences; limit of ours: {LIMIT:,} and {SYNC_LIMIT}")
    print(f"{'':<20}{'precision':>10}{'stage':>6}" + "".join(f"{part:>10}" for part in PARTS) + f"{'launches':>10}{'syncs':>7}{'fewer, times':>14}")
    rows = {}
    for name, (_, kind, stage) in ROWS.items():
        result = rows[name] = row(name, layers)
        total = result["total"] = sum(result["launches"].values())
        parts = "".join(f"{result['launches'][part]:>10,.0f}" for part in PARTS)
        print(f"{name:<20}{kind:>10}{stage:>6}{parts}{total:>10,.0f}{result['syncs']:>7.0f}{rows['textbook']['total'] / total:>14.2f}", flush=True)
        if operations:
            print("    " + ", ".join(f"{operation} {count}" for operation, count in result["operations"][:10]))
            print("    syncs: " + (", ".join(f"{count} {where}" for where, count in result["where"].items()) or "none"), flush=True)
    print("\nmilliseconds of the CPU in a step")
    print(f"{'':<20}" + "".join(f"{name:>20}" for name in METHODS))
    for name in ("textbook", "ours"):
        print(f"{name:<20}" + "".join(f"{rows[name]['milliseconds'][method]:>20.2f}" for method in METHODS))
    sent = messages()
    print(f"messages between two ranks: as objects {sent['objects']:.2f}, as numbers {sent['numbers']:.2f}")
    print(f"\nratio: {rows['textbook']['total'] / rows['ours']['total']:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--operations", action="store_true")
    parser.add_argument("--row", choices=ROWS)
    parser.add_argument("--rank", nargs=2)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(train(*ROWS[args.row], args.layers)))
    elif args.rank:
        print(json.dumps(rank(int(args.rank[0]), args.rank[1])))
    else:
        main(args.layers, args.operations)

"""Operations and waits of the CPU in one optimizer step: the Trainer's own with DeepSpeed against ours, without a GPU.

    .venv/bin/python bench/launches.py                     # two minutes on two cores
    .venv/bin/python bench/launches.py --operations        # and the ten most frequent operations of each row

At a batch of one or two sequences a GPU is faster than the CPU that starts its work, so a step takes as long as its
launches. Their number does not depend on the width of the model. Here it is counted on the CPU, in a model of
BLOOM-560M's depth, with the engine of a trial. Each row is a process of its own, because DeepSpeed keeps global state
of autocast.

A launch is an operation of torch that computes or copies, seen by a dispatch mode. Views and allocations do not count.
An operation on a list of tensors counts as the launches that its length needs on a GPU. At BLOOM-560M's full width
each such operation (six in ours) has about 25 launches more.

A sync is an operation whose result the CPU reads, a call of DeepSpeed's `synchronize`, or the copy of a tensor of the
batch to the GPU where the Trainer is not told to copy without waiting.

Some operations are several kernels on a GPU. That is not seen here: bench/gpu.sh compares the count with the
profiler's.
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

import common
import torch
import transformers
from deepspeed.accelerator import get_accelerator
from torch.utils._python_dispatch import TorchDispatchMode

import raytune_bayesian
from hpo.squad import evaluation, precision
from hpo.squad.group import join

LAYERS, HEADS, HIDDEN, VOCABULARY = 24, 16, 32, 100
LENGTHS, ANSWER = (12, 9), 3  # tokens of the two sequences, and of an answer
PADDED = 16  # tokens of a sequence of the textbook; 512 in use, with as many operations
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
NO_LAUNCH = {  # besides views and empty tensors
    "detach", "alias", "lift_fresh", "_unsafe_view", "set_", "resize_", "_record_function_enter_new",
    "_record_function_exit",
}  # fmt: skip
SYNCS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive",
    "is_nonzero",
}  # fmt: skip
TENSORS_A_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}  # by the number of lists (torch's MultiTensorApply.cuh)


def launches_of(name: str, args: tuple) -> int:
    """How many launches an operation is on a GPU."""
    if "_foreach" not in name and "_fused" not in name:
        return 1
    lists = [a for a in args if isinstance(a, (list, tuple)) and a and torch.is_tensor(a[0])]
    return math.ceil(len(lists[0]) / TENSORS_A_LAUNCH[min(5, len(lists))]) if lists else 1


def makes_cpu_wait(name: str, args: tuple) -> bool:
    """Whether the CPU waits for the result of an operation, as it does for a mask that is an index."""
    indices = [i for a in args if isinstance(a, (list, tuple)) for i in a] if name.startswith("index") else []
    return name in SYNCS or any(torch.is_tensor(i) and i.dtype == torch.bool for i in indices)


class Counting(TorchDispatchMode):
    """Counts operations by name, syncs by name too, in the `part` of a step that is set; None: nothing is counted."""

    def __init__(self):
        super().__init__()
        self.part = None
        self.reset()

    def reset(self) -> None:
        """Forgets what was counted."""
        self.launches, self.syncs = {part: Counter() for part in PARTS}, Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if self.part:
            name = operation._schema.name.split("::")[1]
            if not (operation.is_view or name in NO_LAUNCH or name.startswith(("empty", "new_empty"))):
                self.launches[self.part][name] += launches_of(name, args)
            if makes_cpu_wait(name, args):
                self.syncs[f"{name} in {self.part}"] += 1
        return operation(*args, **(kwargs or {}))

    def during(self, part: str | None, function):
        """The function, with what it does counted for a part. Called by another part, it counts for that one."""

        def call(*args, **kwargs):
            before = self.part
            self.part = part if part is None or before == "rest" else before
            try:
                return function(*args, **kwargs)
            finally:
                self.part = before

        return call


class Watch(transformers.TrainerCallback):
    """Does in each step of ours what raytune_bayesian.Iterations does; then calls `on_step`.

    Args:
        trainer: from `make`.
        make_gradients: from `make`.
    """

    def __init__(self, trainer, make_gradients):
        self.trainer, self.make_gradients, self.gradients = trainer, make_gradients, None
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Prepares the engine of ours."""
        if self.make_gradients:
            model.train()
            self.gradients = self.make_gradients(self.trainer.model_wrapped)

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        """Looks for a skipped step, and calls `on_step`."""
        if self.gradients and self.gradients.after_step():
            lr_scheduler.step()
        self.on_step(state.global_step, control)

    def on_step(self, step: int, control) -> None:
        """For subclasses: after each optimizer step, which are counted from 1."""


class Steps(Watch):
    """Counts the first steps of a training, and times some methods in the others. For the arguments see Watch."""

    def __init__(self, *args):
        super().__init__(*args)
        self.counting, self.steps, self.seconds, self.inside = Counting(), [], Counter(), Counter()
        collate = self.counting.during(None, self.trainer.data_collator)  # it works on the CPU with a GPU too
        self.trainer.data_collator = self.batch(collate)

    def on_train_begin(self, *args, **kwargs):
        """Replaces the methods that are counted and timed."""
        super().on_train_begin(*args, **kwargs)
        trainer, engine, count = self.trainer, self.trainer.model_wrapped, self.counting
        self.accelerator, self.synchronize = get_accelerator(), get_accelerator().synchronize
        self.accelerator.synchronize = self.synchronizes
        trainer.compute_loss = count.during("forward", trainer.compute_loss)
        engine.backward = count.during("backward", engine.backward)
        engine.step = count.during("optimizer", engine.step)
        both = ["train", "zero_grad"]
        for owner, names in ((trainer, ["floating_point_ops"]), (trainer.model, both), (engine, both)):
            for name in names:
                setattr(owner, name, self.timed(name, getattr(owner, name)))
        count.part = "rest"
        count.__enter__()

    def synchronizes(self, *args, **kwargs):
        """DeepSpeed's accelerator.synchronize, counted. It returns at once on a CPU."""
        if self.counting.part:
            self.counting.syncs[f"synchronize in {self.counting.part}"] += 1
        return self.synchronize(*args, **kwargs)

    def batch(self, collate):
        """The collator, with the copies of its batch to a GPU counted.

        A batch is collated one step ahead; all are alike.
        """

        def call(*args, **kwargs):
            batch = collate(*args, **kwargs)
            if not self.trainer.args.accelerator_config.non_blocking:
                self.counting.syncs["copies of a batch"] += sum(map(torch.is_tensor, batch.values()))
            return batch

        return call

    def timed(self, name: str, function):
        """The function, with its CPU time added to `seconds`."""

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
        """Keeps the counts of a step, or ends the counting or the timing."""
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
    """A Trainer for one pass over the data, in its order.

    Args:
        way: "ours", or "textbook", which pads to `padded` tokens, learns all of them and shuffles.
        kind: "fp16", "bf16" or "fp32".
        stage: ZeRO stage.
        model: to train.
        data: sequences, each {"input_ids", "prompt_length"}.
        batch_size: sequences of a step.
        folder: for the Trainer's files.
        padded: tokens of a sequence of the textbook.

    Returns:
        The Trainer, and what makes `precision.Gradients` of its engine, None for the textbook's.
    """
    ds_config = common.ds_config(stage)
    if way == "ours":
        setup = common.setup_of_questions(data, data, stage, kind)
        hyperparameters = common.HYPERPARAMETERS | {"per_device_bs": batch_size}
        model = evaluation.fuse_gelu(model)
        trainer = raytune_bayesian.make_trainer(model, data, hyperparameters, setup, common.one_rank(), folder, 0)
        return trainer, lambda engine: precision.Gradients(engine, ds_config, kind, None, 1)
    common.one_rank()
    rows = []
    for i in range(len(data)):
        ids = data[i]["input_ids"][:padded].tolist()
        padding = padded - len(ids)
        padded_ids = ids + [0] * padding
        mask = [1] * len(ids) + [0] * padding
        rows.append({"input_ids": padded_ids, "attention_mask": mask, "labels": padded_ids})
    arguments = transformers.TrainingArguments(
        output_dir=folder, learning_rate=1e-4, per_device_train_batch_size=batch_size, num_train_epochs=1,
        deepspeed=ds_config, fp16=kind == "fp16", bf16=kind == "bf16", use_cpu=not torch.cuda.is_available(),
        save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer, None


def train(way: str, kind: str, stage: int, layers: int) -> dict:
    """One row: launches of a step by part and by operation, syncs, milliseconds a step of some methods."""
    allow_fp16()
    torch.set_num_threads(1)
    transformers.set_seed(0)
    sizes = {"hidden_size": HIDDEN, "n_layer": layers, "n_head": HEADS, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    model = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=VOCABULARY, **sizes))
    data = [
        {"input_ids": torch.randint(3, VOCABULARY, (length,)).numpy(), "prompt_length": length - ANSWER}
        for length in LENGTHS * (COUNTED + TIMED)
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer, make_gradients = make(way, kind, stage, model, data, 2, folder, PADDED)
        callback = Steps(trainer, make_gradients)
        trainer.train()
    skipped = [step[2] for step in callback.steps]  # so far; steps that overflow are not counted
    steady = [step for i, step in enumerate(callback.steps) if i >= 2 and skipped[i] == skipped[i - 1]]
    launches = {part: statistics.median(step[0][part].total() for step in steady) for part in PARTS}
    return {
        "launches": launches,
        "syncs": statistics.median(step[1].total() for step in steady),
        "where": dict(steady[-1][1]),
        "operations": sum(steady[-1][0].values(), Counter()).most_common(),
        "milliseconds": {name: 1000 * callback.seconds[name] / TIMED for name in (*METHODS, "step")},
        "skipped": skipped[-1],
    }


def row(name: str, layers: int = LAYERS) -> dict:
    """`train` in a process of its own."""
    command = [sys.executable, __file__, "--row", name, "--layers", str(layers)]
    no_gpu = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=no_gpu).stdout
    return json.loads(output.splitlines()[-1])


def rank(number: int, folder: str) -> dict:
    """Milliseconds of the messages that two ranks send each other in a step: as objects, and as numbers."""
    torch.set_num_threads(1)
    group, times = join(number, 2, folder), {"objects": [], "numbers": []}
    ways = {
        "objects": lambda: (group.broadcast(False), group.gather(3)),
        "numbers": lambda: (group.broadcast_flag(False), group.mean(3, "cpu")),
    }
    for _ in range(100):
        for name, send in ways.items():
            began = time.perf_counter()
            send()
            times[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(values[10:]) for name, values in times.items()}


def messages() -> dict:
    """`rank` in two processes; what the first one measured."""
    with tempfile.TemporaryDirectory() as folder:
        commands = [[sys.executable, __file__, "--rank", str(i), folder] for i in (0, 1)]
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
        outputs = [process.communicate()[0] for process in processes]
    return json.loads(outputs[0].splitlines()[-1])


def main(layers: int, operations: bool) -> None:
    """Prints the tables."""
    limits = f"limit of ours: {LIMIT:,} and {SYNC_LIMIT}"
    print(f"launches and syncs of an optimizer step, {layers} layers, 2 sequences; {limits}")
    parts = "".join(f"{part:>10}" for part in PARTS)
    print(f"{'':<20}{'precision':>10}{'stage':>6}{parts}{'launches':>10}{'syncs':>7}{'fewer, times':>14}")
    rows = {}
    for name, (_, kind, stage) in ROWS.items():
        result = rows[name] = row(name, layers)
        total = result["total"] = sum(result["launches"].values())
        parts = "".join(f"{result['launches'][part]:>10,.0f}" for part in PARTS)
        times = rows["textbook"]["total"] / total
        line = f"{name:<20}{kind:>10}{stage:>6}{parts}{total:>10,.0f}{result['syncs']:>7.0f}{times:>14.2f}"
        print(line, flush=True)
        if operations:
            print("    " + ", ".join(f"{operation} {count}" for operation, count in result["operations"][:10]))
            syncs = ", ".join(f"{count} {where}" for where, count in result["where"].items())
            print(f"    syncs: {syncs or 'none'}", flush=True)
    print("\nmilliseconds of the CPU in a step")
    print(f"{'':<20}" + "".join(f"{name:>20}" for name in METHODS))
    for name in ("textbook", "ours"):
        milliseconds = rows[name]["milliseconds"]
        print(f"{name:<20}" + "".join(f"{milliseconds[method]:>20.2f}" for method in METHODS))
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

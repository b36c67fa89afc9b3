"""Searches learning rate, batch size and weight decay for fine-tuning BLOOM-560M on SQuAD v1.1, with BOHB in Ray Tune.

    .venv/bin/python raytune_bayesian.py                # this machine: its GPUs, else its CPUs
    .venv/bin/python raytune_bayesian.py --prefetch     # on a login node: download model and data, then end
    .venv/bin/python raytune_bayesian.py --model demo/model --dataset demo/squad --max_t 16 --num_train_epochs 1

Read from top to bottom: search space and knobs · EM and F1 · one trial · the search · main.
"""

import argparse
import atexit
import contextlib
import copy
import fcntl
import functools
import gc
import importlib
import itertools
import json
import math
import os
import platform
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "token")  # read when ray is imported: else anyone on the network may run code in it
os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # Ray's new progress output cannot be silenced; record.Record prints instead
from ray import tune
from ray.tune.experiment import Trial

from hpo import checks, errors
from hpo.bohb.brackets import band_size

# ---------------------------------------------------------------------------------------------------------------------
# search space and knobs

SEARCH_SPACE = {
    "train_loop_config": {
        "lr": tune.loguniform(5e-6, 2e-4),
        "per_device_bs": tune.choice([1, 2]),
        "wd": tune.choice([0.0, 0.01]),
    }
}
# Fixed for all trials:
MAX_LENGTH = 1024  # tokens; the longest of SQuAD's questions with its passage has 835 in BLOOM's tokens
SELECTION_SIZE = 1000  # questions held out of the training set, to compare trials on
EVAL_TOKENS = 8192  # of a batch of sequences of like length in evaluation, padding included: 9 rows of 835 tokens, or 141 of 58
MAX_GRAD_NORM = 1.0
LR_SCHEDULE = "linear"  # from lr to 0 over the full training, whatever rung a trial stops at
CHECKPOINT_BYTES = 18  # a parameter, at most, as with ZeRO 1 and 2 in fp32: AdamW's state, master weights, weights, tied ones twice
MAX_FAILURES = 3  # a trial whose process is lost, with its node or alone, goes on from its checkpoint so many times
STORAGE_PATIENCE = 3600  # seconds; a file system that is full or gone is waited for, then the search goes on from its last saved state
MAX_STORAGE_WAITS = 10  # in all
# For the C library of a trial's process. Each trial is a new thread of it, for which glibc would keep memory; and it would give back each
# block above 32 MB at once, as the logits of a batch are on a CPU, and have the next one made of fresh pages. Before 2.35 it takes no such
# threshold, and setting the other alone would make it worse.
MALLOC = {"MALLOC_ARENA_MAX": "1"}
if platform.libc_ver()[0] == "glibc" and tuple(map(int, platform.libc_ver()[1].split(".")[:2])) >= (2, 35):
    MALLOC |= {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
MODES = {"eval_loss": "min", "exact_match": "max", "f1": "max"}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = checks.Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", default="bigscience/bloom-560m", help="causal language model: name on the hub, or folder")
    add("--dataset", default="rajpurkar/squad", help="name on the hub, or folder with train*.json[.gz] and dev*.json[.gz]")
    add("--max_train_samples", type=int, help="train on so many questions (default: all)")
    add("--max_eval_samples", type=int, help="select, and test, on so many questions (default: 1000, and all)")
    add("--num_train_epochs", type=float, default=2.0, help="length of a full training")
    add("--max_t", type=int, default=50, help="a full training has so many iterations, each ends with an evaluation")
    add("--reduction_factor", type=int, nargs="+", default=[4], help="one in so many trials is promoted at a rung")
    add("--num_samples", type=int, help="number of trials (default: one whole band)")
    add("--gpus_per_trial", type=int, help="default: 1, and 0 on a machine without GPUs; a process for each")
    add("--cpus_per_trial", type=int, default=1, help="of all its processes together")
    add("--max_concurrent_trials", type=int, nargs="+", default=[0], help="0: as many as the machine has room for")
    add("--metric", choices=list(MODES), default="eval_loss", help="what trials are compared by")
    add("--precision", choices=checks.PRECISIONS, help="of training (default: fp16, and fp32 on a machine without GPUs)")
    add("--deepspeed", default=str(Path(__file__).with_name("ds_config.json")), help="DeepSpeed configuration")
    add("--seed", type=int, default=42, help="of the search, the split and each training")
    add("--output_dir", default="results", help="the run's folder is <output_dir>/<run_name>")
    add("--run_name", help="default: bloom_bohb-<job id, or time>")
    add("--report_to", choices=checks.TRACKERS, default="tensorboard", help="experiment tracker")
    add("--trial_timeout", type=float, help="seconds without a report until a trial counts as hung (default: 10 slowest iterations)")
    add("--resume", action="store_true", help="go on with the run of --run_name, with its arguments")
    add("--prefetch", action="store_true", help="download model, tokenizer and data, and end")
    add("--plan", action="store_true", help="say what the search would run and take, and end; compares several settings: --reduction_factor 3 4")
    add("--seconds_per_iteration", help="for --plan: a number, or the iterations.csv of an earlier run")
    args = parser.parse_args(argv)
    for name in ("reduction_factor", "max_concurrent_trials"):
        if not args.plan:
            if len(getattr(args, name)) > 1:
                parser.error(f"--{name}: several values only with --plan")
            setattr(args, name, getattr(args, name)[0])
    parser.set_defaults(**dict.fromkeys(vars(args)))
    args.given = {name for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    return args


def show_plan(args: argparse.Namespace, ds_config: dict) -> None:
    """Prints the plan of the search, or compares those of several settings; and on which GPUs it fits."""
    from hpo.plan import plan

    at_hand = checks.slots(argparse.Namespace(**{**vars(args), "max_concurrent_trials": 0}))
    settings = []
    for reduction_factor, at_a_time in itertools.product(args.reduction_factor, args.max_concurrent_trials):
        trials = args.num_samples or band_size(args.max_t, reduction_factor)
        setting = {"num_samples": trials, "max_t": args.max_t, "reduction_factor": reduction_factor, "slots": at_a_time or at_hand}
        settings.append(setting)
    seconds = args.seconds_per_iteration and checks.seconds_per_iteration(args.seconds_per_iteration)
    folder = checks.local_model(args.model)
    size = checkpoint_bytes(folder) if folder else None
    forecasts = [plan.forecast(SEARCH_SPACE, **setting) for setting in settings]
    text = plan.plan(SEARCH_SPACE, settings, forecasts, seconds, size, checks.time_limit(Path(__file__).parent))
    where = "the worker nodes of cluster.env have" if "RAY_ADDRESS" in os.environ else "this machine has"
    print(f"{where} {at_hand} slots; a plan for others: --max_concurrent_trials\n\n{text}", flush=True)
    print(f"\n{memory_plan(args, folder, ds_config)}" if folder else "memory of a GPU: known once the model is there (--prefetch)", flush=True)
    if size and len(forecasts) == 1:
        checks.check_disk(Path(args.output_dir).absolute(), forecasts[0].disk(size))


def memory_plan(args: argparse.Namespace, model: Path, ds_config: dict) -> str:
    """Which GPUs a trial fits on, as text. In fp16 where no precision is given: the question is which GPU to ask for."""
    from hpo.plan import memory
    from hpo.squad import data

    precision = args.precision if "precision" in args.given else "fp16"
    domain = SEARCH_SPACE["train_loop_config"]["per_device_bs"]

    def forecast(ds_config: dict, batch_size: int, ranks: int) -> memory.Forecast:
        room = data.ANSWER_ROOM
        return memory.forecast(model, ds_config, precision, batch_size, MAX_LENGTH, room, EVAL_TOKENS, room, ranks)

    sizes = [int(checks.smallest(domain)), int(checks.largest(domain))]
    try:
        return memory.plan(forecast, precision, ds_config, sizes, max(1, args.gpus_per_trial))
    except Exception as error:  # whatever a class of models does that FakeTensors cannot follow
        return f"memory of a GPU: no forecast for this model: {errors.one_line(error, 200)}"


def checkpoint_bytes(model: Path) -> int:
    """Size of a checkpoint, at most."""
    return checks.parameters(model) * CHECKPOINT_BYTES + 10**6


if __name__ == "__main__":  # before the slow imports: bad input is told within seconds
    try:
        ARGS = parse_arguments()
        if ARGS.plan:
            checks.use_cluster_env(Path(__file__).parent)
        DS_CONFIG, EXAMPLES = checks.check(ARGS, SEARCH_SPACE)
        if ARGS.plan:
            show_plan(ARGS, DS_CONFIG)
            sys.exit()
    except errors.BadInput as error:
        errors.refuse(error)

import datasets
import evaluate
import ray
import torch
import transformers
from transformers.trainer_pt_utils import get_length_grouped_indices

from hpo import errors, files
from hpo.bohb.brackets import rungs
from hpo.bohb.scheduler import HyperBandForBOHB
from hpo.bohb.searcher import TuneBOHB
from hpo.cluster import gpu_check, idle_nodes, ray_private, resume, shutdown, watchdogs
from hpo.cluster import state as state_file
from hpo.cluster import storage as storage_wait
from hpo.plan import plan
from hpo.results import record as records
from hpo.results import report, run_folder, slot_time, tables, trackers
from hpo.squad import data, evaluation, precision, ranks

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed looks for other kinds, and warns
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# ---------------------------------------------------------------------------------------------------------------------
# EM and F1


class SquadMetric(evaluate.Metric):
    """Exact match and F1 as the official script of SQuAD v1.1 computes them, offline, as fractions of 1.

    Each is the best over all references of a question, averaged over all questions in `references`; one without a
    prediction scores 0. Source: https://rajpurkar.github.io/SQuAD-explorer, evaluate-v1.1.py.

        SquadMetric().compute(predictions=[{"id": "1", "prediction_text": "the Moon"}],
                              references=[{"id": "1", "answers": {"text": ["Moon"], "answer_start": [7]}}])
    """

    def __init__(self, **kwargs):
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self):
        text = datasets.Value("string")
        answers = datasets.Sequence({"text": text, "answer_start": datasets.Value("int32")})
        return evaluate.MetricInfo(
            description="SQuAD v1.1 exact match and F1",
            citation="",
            inputs_description="",
            features=datasets.Features(
                predictions={"id": text, "prediction_text": text}, references={"id": text, "answers": answers}
            ),
        )

    def compute(self, *, predictions: list[dict], references: list[dict]) -> dict[str, float]:
        """Returns {"exact_match", "f1"}. Raises ValueError where there is no reference or one without an answer."""
        if not references:
            raise ValueError("no references")
        by_id = {p["id"]: p for p in predictions}
        aligned = [by_id.get(r["id"], {"id": f"none for {r['id']}", "prediction_text": ""}) for r in references]
        return super().compute(predictions=aligned, references=references)

    def _compute(self, predictions, references):
        exact_match = f1 = 0.0
        for prediction, reference in zip(predictions, references):
            if not reference["answers"]["text"]:
                raise ValueError(f"question {reference['id']} has no answer")
            if prediction["id"] == reference["id"]:
                scores = [evaluation.score_answer(prediction["prediction_text"], t) for t in reference["answers"]["text"]]
                exact_match += max(em for em, _ in scores)
                f1 += max(f1 for _, f1 in scores)
        return {"exact_match": exact_match / len(references), "f1": f1 / len(references)}


def score(model, tokenizer, data: data.TokenizedSquad, max_new_tokens: int, group=None) -> dict[str, float]:
    """EM and F1 of greedy answers."""
    predictions = evaluation.predict(model, tokenizer, data, EVAL_TOKENS, max_new_tokens, group)
    return SquadMetric().compute(predictions=predictions, references=data.references)


# ---------------------------------------------------------------------------------------------------------------------
# one trial


class Trainer(transformers.Trainer):
    """The Trainer with a loss on answer tokens only and with a data order that is fixed from the start."""

    def __init__(self, *args, order: list[int], group: ranks.Group, **kwargs):
        super().__init__(*args, **kwargs)
        self.order, self.group = order, group
        self.model_accepts_loss_kwargs = False  # the loss counts its tokens itself

    def _get_train_sampler(self, train_dataset=None):
        return self.order

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        total, count = evaluation.answer_loss(model, inputs)
        # DeepSpeed takes the mean over ranks: so that each token counts alike, as on one GPU.
        return total / self.group.mean(count, total.device)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward, backward and optimizer step of the DeepSpeed engine `model`. The Trainer's own also walks through all modules, to set
        them to training."""
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        model.backward(loss)  # scales the loss
        model.step()  # unscales the gradients, clips them, skips the step where they overflow
        return loss.detach()

    def floating_point_ops(self, inputs):
        """Not counted: it takes as long as a quarter of a forward pass of a small batch."""
        return 0

    def save_model(self, *args, **kwargs):
        """As a model only at the end of the full training: before that, DeepSpeed's files have the weights."""
        if self.state.global_step == self.state.max_steps:
            super().save_model(*args, **kwargs)

    def _save(self, output_dir=None, state_dict=None):
        """Tied weights once: DeepSpeed's state has a copy of them for each name, 1 GB with BLOOM's vocabulary."""
        if state_dict:
            state_dict = {name: weight for name, weight in state_dict.items() if name not in self.model.all_tied_weights_keys}
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir):
        """DeepSpeed's files, weights too: not at the end, where nobody goes on."""
        if self.state.global_step < self.state.max_steps:
            super()._save_optimizer_and_scheduler(output_dir)


def data_order(lengths, epochs: float, batch_size: int, seed: int) -> list[int]:
    """Indices of the questions of a full training: like lengths share a batch, each epoch in another order."""
    order = []
    for epoch in range(math.ceil(epochs)):
        generator = torch.Generator().manual_seed(seed + epoch)
        order += get_length_grouped_indices(lengths, batch_size, generator=generator)
    return order[: max(1, round(len(lengths) * epochs))]


class Iterations(transformers.TrainerCallback):
    """Cuts a training into max_t iterations, evaluates after each, and reports to Tune.

    A checkpoint goes with the report where the scheduler may pause the trial and at the end, and nowhere else; EM and
    F1 are computed there, or after each iteration when trials are compared by them.
    """

    def __init__(self, run: dict, rungs: list[int], tokenizer, trainer: Trainer, checkpoint: str | None):
        self.run, self.rungs, self.tokenizer, self.trainer, self.group = run, rungs, tokenizer, trainer, trainer.group
        self.checkpoint = checkpoint and Path(checkpoint)
        self.batch_size = trainer.args.per_device_train_batch_size * self.group.size
        max_steps = math.ceil(len(trainer.order) / self.batch_size)
        self.last_steps = [round(t * max_steps / run["max_t"]) for t in range(run["max_t"] + 1)]
        self.every_score = run["metric"] != "eval_loss"

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.train()
        self.engine = self.trainer.model_wrapped
        self.gradients = precision.Gradients(self.engine, self.run["ds_config"], self.run["precision"], self.checkpoint, self.group.size)
        self.started_at = self.looked_at = time.time()
        self.first_step = state.global_step

    def on_step_end(self, args, state, control, model=None, lr_scheduler=None, **kwargs):
        if self.gradients.after_step():
            lr_scheduler.step()  # the Trainer does not where DeepSpeed has skipped a step: the schedule would not come to its end
        if state.global_step not in self.last_steps[1:]:
            if self.stopping():
                done = sum(step <= state.global_step for step in self.last_steps[1:])
                self.metrics = {"training_iteration": done, self.run["metric"]: math.nan, "partial": True}
                control.should_save = True
            return
        iteration = self.last_steps.index(state.global_step, 1)
        selection, gradients = self.run["selection"], self.gradients.summary()  # waits for the GPU: the time after it is the evaluation's
        began = time.time()
        trained_on = self.trainer.order[self.first_step * self.batch_size : state.global_step * self.batch_size]
        pace = int(self.run["train"].lengths[trained_on].sum()) / (began - self.started_at)
        self.metrics = {"training_iteration": iteration, "tokens_per_second": pace, **gradients}
        with precision.autocast(self.run["ds_config"], self.run["precision"], self.engine.device.type):
            self.metrics["eval_loss"] = loss = evaluation.evaluate_loss(model, selection, self.tokenizer.pad_token_id, EVAL_TOKENS, self.group)
            if not math.isfinite(loss):
                raise FloatingPointError(f"eval_loss is {loss} after {iteration} iterations")
            if iteration in self.rungs or self.every_score:
                self.metrics.update(score(model, self.tokenizer, selection, self.run["max_new_tokens"], self.group))
        self.saving_since = time.time()
        self.metrics["evaluation_seconds"] = self.saving_since - began
        model.train()
        if iteration in self.rungs or self.stopping():
            control.should_save = True  # and report with the checkpoint
        else:
            self.report()

    def stopping(self) -> bool:
        """Whether the search is about to be stopped; looks once a second."""
        stop = False
        if time.time() > self.looked_at + 1:
            self.looked_at = time.time()
            stop = stop_file(self.run).exists()
        return self.group.any(stop)

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.group.gather(None)  # all ranks have written their part
        if self.group.rank == 0:
            self.gradients.save(folder)
            files.sync(*folder.rglob("*"), folder)
        if "evaluation_seconds" in self.metrics:
            self.metrics["checkpoints_seconds"] = time.time() - self.saving_since
        self.report(tune.Checkpoint.from_directory(folder))

    def report(self, checkpoint=None):
        """Reports from rank 0; does not return where Tune pauses the trial."""
        times = {"started_at": self.started_at, "ended_at": time.time(), "node": socket.gethostname()}
        goes_on = False
        try:
            if self.group.rank == 0:
                tune.report({**self.metrics, **times}, checkpoint=checkpoint)
                goes_on = True
        finally:
            goes_on = self.group.broadcast(goes_on)
        if not goes_on:
            raise ranks.Stopped
        self.started_at, self.first_step = time.time(), self.trainer.state.global_step


def stop_file(run: dict) -> Path:
    """Its presence asks the trials, on whatever node, to save and be paused."""
    return Path(run["run_dir"]) / ".stop"


PRETRAINED: dict[str, torch.nn.Module] = {}  # of this process: the next trial does not read it from disk again


def pretrained(folder: str) -> torch.nn.Module:
    """A fresh copy of the pretrained model, fp32, on the CPU."""
    if folder not in PRETRAINED:
        PRETRAINED[folder] = evaluation.fuse_gelu(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    return copy.deepcopy(PRETRAINED[folder])


@functools.lru_cache
def load_tokenizer(folder: str | Path):
    """The tokenizer of a model, once a process; one without a padding token pads with EOS, which the attention mask hides."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


GROUPS: list[ranks.Group] = []  # of this process: that of its trials, once the first has begun


def train(config: dict, run: dict) -> None:
    """One trial, from its start or from its last checkpoint to the end of the full training, or until Tune pauses it.

    Runs in a process of its own that goes on to the next trial afterwards.

    Args:
        config: {"train_loop_config": {"lr", "per_device_bs", "wd"}, "rungs": iterations where it may be paused}.
        run: what all trials share, see `main`.
    """
    if run["gpus_per_trial"]:
        gpu_check.visible(run["precision"])
    GROUPS or GROUPS.append(ranks.start(__name__, run, max(1, run["gpus_per_trial"])))
    with GROUPS[0].trial(config):
        train_rank(config, run, GROUPS[0])


def train_rank(config: dict, run: dict, group: ranks.Group) -> None:
    """The part of a trial that one process has: all of it, or with several GPUs one rank."""
    hyperparameters = config["train_loop_config"]
    torch.set_num_threads(max(1, run["cpus_per_trial"] // group.size))
    tokenizer, model = load_tokenizer(run["model"]), pretrained(run["model"])  # before any Trainer: with ZeRO 3, transformers would split the weights
    if not group.checked:
        check_gradients(run, group)
    transformers.set_seed(run["seed"])
    batch_size = hyperparameters["per_device_bs"] * group.size
    order = data_order(run["train"].lengths, run["num_train_epochs"], batch_size, run["seed"])
    with contextlib.ExitStack() as stack:
        folder = group.broadcast(stack.enter_context(ray_private.saving_folder()) if group.rank == 0 else None)
        trainer = make_trainer(model, run["train"], order, hyperparameters, run, group, folder, tokenizer.pad_token_id)
        try:
            checkpoint = tune.get_checkpoint() if group.rank == 0 else None
            checkpoint, through = group.broadcast((checkpoint.path, is_model(Path(checkpoint.path))) if checkpoint else (None, False))
            trainer.add_callback(Iterations(run, config["rungs"], tokenizer, trainer, checkpoint))
            if not through:  # else its search was cut, or its process lost, after its last report
                trainer.train(resume_from_checkpoint=checkpoint)
        finally:  # Tune ends a paused trial by SystemExit out of tune.report
            if hasattr(trainer.model_wrapped, "destroy"):
                trainer.model_wrapped.destroy()
            del trainer, model
            gc.collect()


def make_trainer(model, data, order: list[int], hyperparameters: dict, run: dict, group: ranks.Group, folder: str, pad_token_id: int) -> Trainer:
    """The Trainer of one trial, with the DeepSpeed engine under it; it writes its checkpoints to `folder`."""
    clip = run["ds_config"].get("gradient_clipping", "auto")
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        learning_rate=hyperparameters["lr"],
        weight_decay=hyperparameters["wd"],
        per_device_train_batch_size=hyperparameters["per_device_bs"],
        lr_scheduler_type=LR_SCHEDULE,
        max_grad_norm=MAX_GRAD_NORM if clip == "auto" else clip,
        num_train_epochs=1,  # the order holds all epochs
        **precision.training_arguments(run["ds_config"], run["precision"]),  # DeepSpeed, fp16 or bf16
        use_cpu=not torch.cuda.is_available(),
        seed=run["seed"],
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,  # it makes the CPU wait for the GPU in each step, as copies of a batch do that block:
        accelerator_config={"non_blocking": True},
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=lambda batch: evaluation.collate(batch, pad_token_id),
        order=order,
        group=group,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def check_gradients(run: dict, group: ranks.Group) -> None:
    """Once a process, before its first trial: that loss and gradients are scaled by this ds_config, DeepSpeed and precision.

    Raises errors.CannotTrain where they are not.
    """
    fp16 = run["ds_config"].get("fp16", {}) | {"initial_scale_power": 10}  # or the one step might be skipped
    run = run | {"ds_config": run["ds_config"] | {"fp16": fp16}}

    def trainer_of(model, data, folder):
        hyperparameters = {"lr": 1e-5, "wd": 0.0, "per_device_bs": 2}
        return make_trainer(model, data, list(range(len(data))), hyperparameters, run, group, folder, pad_token_id=0)

    def loss_of(model, data):
        total, count = evaluation.answer_loss(model, evaluation.collate(data, pad_token_id=0))
        return total / count

    precision.check_gradients(trainer_of, loss_of, group.size)
    group.checked = True


# ---------------------------------------------------------------------------------------------------------------------
# the search


def search(
    args: argparse.Namespace, run: dict, run_dir: Path, state: dict | None, expected: plan.Forecast, facts: dict
) -> records.Record:
    """Runs all trials, or those that are left of an earlier run; returns what was recorded. Whatever ends it, the bill is in `facts`.

    Raises:
        shutdown.Drained: after SIGUSR1, once each running trial has saved a checkpoint.
        KeyboardInterrupt: after SIGINT.
    """
    searcher = TuneBOHB(seed=args.seed, max_concurrent=args.max_concurrent_trials)
    scheduler = HyperBandForBOHB(
        time_attr="training_iteration",
        max_t=args.max_t,
        reduction_factor=args.reduction_factor,
        stop_last_trials=False,
    )

    def save_state(record: dict, live: list[dict]):
        live = [trial for trial in live if scheduler.in_race(trial["trial_id"])] + algorithm.live
        parts = {"searcher": searcher.get_state(), "scheduler": scheduler.get_state(), "record": record, "live": live}
        state_file.save_state(run_dir, parts | {"bill": spent.get_state()})

    first_rung = min(args.num_samples, max(4, rungs(args.max_t, args.reduction_factor)[0][0][0]))  # one trial alone ends no search
    record = records.Record(run_dir, searcher, args.metric, args.num_samples, args.gpus_per_trial, first_rung, save_state)
    resources = {"cpu": args.cpus_per_trial, "gpu": args.gpus_per_trial}
    # one bundle a rank, all on one node
    share = {"CPU": args.cpus_per_trial / max(1, args.gpus_per_trial), "GPU": min(1, args.gpus_per_trial)}
    bundles = tune.PlacementGroupFactory([share] * max(1, args.gpus_per_trial), strategy="STRICT_PACK")
    spent = slot_time.Bill(record, resources, args.max_concurrent_trials)
    algorithm = resume.ResumableSearch(searcher, run_dir)
    if state:
        live = {trial["trial_id"] for trial in state["live"]}
        spent.set_state(state["bill"])
        searcher.set_state(state["searcher"], live)
        scheduler.set_state(state["scheduler"], {t["trial_id"] for t in state["live"] if t["status"] == Trial.PENDING})
        record.set_state(state["record"], live)
        algorithm = resume.ResumableSearch(searcher, run_dir, state["live"], created=len(searcher.suggested))
    record.tidy([trial["checkpoint"] for trial in state["live"]] if state else [])
    script, meeting = __name__, os.environ.get("MEETING")  # where head_node.slurm and its workers meet

    def trial(config, run):
        # Imported here, not with the process, which so is up within seconds: ray_private.TuneController waits two minutes for one that starts.
        module = importlib.import_module(script)
        try:
            module.train(config, run)
        except Exception as error:
            kind, reason = errors.kind_of(error), errors.one_line(f"{type(error).__name__} {error}")
            nothing = {"training_iteration": 0, run["metric"]: math.nan}
            if kind is errors.Kind.STORAGE:  # a full disk says nothing about the hyperparameters: the search stops
                tune.report({**nothing, "storage": f"{reason} (on {socket.gethostname()})"})
            elif kind is errors.Kind.SETUP:
                tune.report({**nothing, "setup": f"{reason} (on {socket.gethostname()}); {errors.what_to_install(error)}"})
            elif kind is errors.Kind.NODE or isinstance(error, errors.TrialFailed):
                raise  # Tune starts the trial again in another process, or ends its processes
            elif kind is errors.Kind.PROCESS:
                raise errors.TrialFailed(reason) from error
            else:  # would come again with the same hyperparameters, so it is a result
                file = Path(run["run_dir"]) / "ray" / tune.get_context().get_trial_id() / "error.txt"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(traceback.format_exc())
                tune.report({**nothing, "failed": f"{reason} ({file})"})

    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # the tables and --report_to have it all
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trial, run=run), bundles),
        param_space=SEARCH_SPACE,
        tune_config=tune.TuneConfig(
            metric=args.metric,
            mode=MODES[args.metric],
            num_samples=args.num_samples,
            search_alg=algorithm,
            scheduler=scheduler,
            reuse_actors=True,  # a trial that starts in a warm process skips imports, CUDA and reading the model
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(run_dir),
            callbacks=[
                record,
                spent,
                idle_nodes.IdleRelease(spent, float(os.environ.get("IDLE_RELEASE_MINUTES", 0)), meeting and Path(meeting)),
                records.Progress(record, scheduler, checks.slots(args), expected.iterations, expected.time),
                shutdown.Drain(scheduler, algorithm, stop_file(run), finish=record.write),
                watchdogs.Watchdog(args.trial_timeout, record.say),
                watchdogs.BadNodes(meeting and Path(meeting), record.say),
                *trackers.tracker(args.report_to, run_dir),
            ],
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            verbose=0,
        ),
    )
    try:
        if record.unfinished():
            tuner.fit()
    finally:
        minutes, busy = spent.minutes(), sum(row["gpu_minutes"] for row in record.trials.values())
        allocated = minutes["allocated"] * args.gpus_per_trial
        facts |= record.facts() | {
            "bill": minutes,
            "gpu_minutes": {"allocated": allocated, "busy": busy, "idle": allocated - busy},
            "model_based_suggestions": {"k": searcher.model_based, "n": len(searcher.suggested)},
        }
        record.write_tables()
    if record.unfinished():  # Tune returns as after a good end
        raise KeyboardInterrupt
    record.write([])  # what comes now may be interrupted too
    shutdown.stop_at_once()
    return record


def start_ray(args: argparse.Namespace, temp_dir: str, trials_dir: str) -> None:
    """Starts Ray on this machine, open to nobody else, or joins the cluster that RAY_ADDRESS names."""
    # A trial of a big model may need more than Ray's 2 s to free its memory before its process takes the next one.
    environment = {
        "TUNE_FUNCTION_THREAD_TIMEOUT_S": "600",
        "HF_HUB_OFFLINE": "1",  # all was loaded before
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not args.gpus_per_trial:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    options = {"log_to_driver": False, "logging_level": "ERROR"}
    if "RAY_ADDRESS" not in os.environ:
        token = Path(temp_dir) / "token"
        token.touch(mode=0o600)
        token.write_text(os.urandom(32).hex())
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
        environment["TMPDIR"] = trials_dir  # so that nothing of theirs is left behind, however they end
        options |= {"_temp_dir": temp_dir, "include_dashboard": False, "num_cpus": len(os.sched_getaffinity(0))}
    os.environ.update(environment)
    with contextlib.chdir(Path(__file__).parent):  # its processes look for modules there first, not in a folder with another copy
        ray.init(**options, runtime_env={"env_vars": environment | MALLOC})
    shutdown.stop_at_once()  # after Ray has set its own handlers, so that all is put away


def test(run: dict, folder: str) -> dict[str, float]:
    """eval_loss, EM and F1 of a model on the test questions. Runs where the trials ran."""
    torch.set_num_threads(run["cpus_per_trial"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(folder)
    model = evaluation.fuse_gelu(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")).to(device)
    loss = evaluation.evaluate_loss(model, run["test"], tokenizer.pad_token_id, EVAL_TOKENS)
    return {"eval_loss": loss, **score(model, tokenizer, run["test"], run["max_new_tokens"])}


# ---------------------------------------------------------------------------------------------------------------------
# main


def prepare(args: argparse.Namespace, examples: tuple[list, list], folder: Path, ds_config: dict) -> dict:
    """Splits and tokenises once; returns what trials share. Raises BadInput where this data cannot be used."""
    try:
        tokenizer = load_tokenizer(folder)
    except Exception as error:  # whatever a broken tokenizer raises
        raise errors.BadInput(f"--model {folder}: no usable tokenizer: {errors.one_line(error, 200)}") from None
    if tokenizer.eos_token_id is None or not tokenizer.is_fast:
        raise errors.BadInput(f"--model {folder}: a fast tokenizer (tokenizer.json) with an EOS token is needed")
    try:
        size = args.max_eval_samples or SELECTION_SIZE
        train_examples, selection = data.hold_out(examples[0], size, args.seed)
        titles = [{e["title"] for e in part} for part in (train_examples, selection)]
        train_examples = data.subset(train_examples, args.max_train_samples, args.seed)
        tested = data.subset(examples[1], args.max_eval_samples, args.seed)
        run = {
            "train": data.tokenize(train_examples, tokenizer, MAX_LENGTH, training=True),
            "selection": data.tokenize(selection, tokenizer, MAX_LENGTH, training=False),
            "test": data.tokenize(tested, tokenizer, MAX_LENGTH, training=False),
        }
        run["train"].references = []  # nobody scores on it: need not travel to each trial
    except ValueError as error:
        raise errors.BadInput(f"--dataset {args.dataset}: {error}") from None
    batch_size = checks.largest(SEARCH_SPACE["train_loop_config"]["per_device_bs"]) * max(1, args.gpus_per_trial)
    steps = math.ceil(max(1, round(len(run["train"]) * args.num_train_epochs)) / batch_size)
    if steps < args.max_t:
        raise errors.BadInput(
            f"--max_t {args.max_t}: a full training on {len(run['train'])} questions has only {steps} optimizer steps "
            f"at batch size {batch_size}; use more questions or epochs, or a smaller --max_t"
        )
    run["held_out"] = "articles" if titles[0].isdisjoint(titles[1]) else "passages"
    run |= {"model": str(folder), "ds_config": ds_config, "max_new_tokens": run["train"].longest_answer}
    return run | {key: getattr(args, key) for key in ("max_t", "num_train_epochs", "seed", "metric", "cpus_per_trial", "gpus_per_trial", "precision")}


def announce(args: argparse.Namespace, run: dict, run_dir: Path, state: dict | None, expected: plan.Forecast, disk: int) -> None:
    """Says what is about to run; disk is in bytes."""
    if state:
        rows = state["record"]["trials"].values()
        ended = sum(row["status"] in tables.ENDED for row in rows)
        print(f"going on with a search: {ended} trials have ended, {len(state['live'])} go on, {len(state['record']['iterations'])} iterations are done")
    whole = "all" if args.max_eval_samples is None else "bounded by --max_eval_samples:"
    print(f"run folder: {run_dir}")
    print(f"questions: {len(run['train'])} to train on, {len(run['selection'])} of other {run['held_out']} to select on;")
    print(f"  to test the best model on once, at the end: {whole} {len(run['test'])} of the validation set")
    if not args.gpus_per_trial:
        print(f"no GPU: training in {args.precision} on the CPU" + " instead of fp16" * (args.precision == "fp32"))
    print(precision.in_words(run["ds_config"], args.precision))
    if args.precision == "fp16" and "precision" not in args.given and precision.is_of_bf16(run["model"]):
        print("WARNING: this model was trained in bf16, whose range fp16 does not have: --precision bf16 is safer, on a GPU that has it (A100, H100)")
    print(f"search: {args.num_samples} trials on {checks.slots(args)} slots, brackets of (trials, iterations) {rungs(args.max_t, args.reduction_factor)}")
    print(f"disk: up to {disk / 1e9:.3g} GB in {args.output_dir}, for {expected.checkpoints} checkpoints and the best model")
    print(f"of {args.num_samples} suggestions {expected.model_based} come after the model has enough results; a third of them stays random")
    if expected.model_based == 0:
        print(f"WARNING: this is random search; one band is {band_size(args.max_t, args.reduction_factor)} trials (--num_samples): take")
        print("  more trials or fewer at a time (--max_concurrent_trials), so that the first are through before the last are drawn")
    sys.stdout.flush()


def is_model(checkpoint: Path) -> bool:
    """Whether a checkpoint is that of the end of a full training, a model as from_pretrained takes it; others are DeepSpeed's, to go on from.

    Raises FileNotFoundError where it is neither, as when a file system is not mounted.
    """
    through = (checkpoint / "config.json").exists()
    if not through and not any(checkpoint.glob("global_step*")):
        raise FileNotFoundError(f"{checkpoint} is no checkpoint, or no more")
    return through


def load_weights(checkpoint: Path, model: torch.nn.Module) -> torch.nn.Module:
    """Gives a model the weights of a checkpoint to go on from."""
    files = list(checkpoint.glob("global_step*/mp_rank_00_model_states.pt"))
    if files:
        weights = torch.load(files[0], map_location="cpu", mmap=True, weights_only=False)["module"]
    else:  # ZeRO 3: each rank has written its part
        from deepspeed.utils.zero_to_fp32 import (
            get_fp32_state_dict_from_zero_checkpoint,  # slow, and hardly ever needed
        )

        weights = get_fp32_state_dict_from_zero_checkpoint(checkpoint)
    model.load_state_dict(weights)
    return model


def save_best_model(checkpoint: Path, run: dict, path: Path) -> None:
    """Makes a folder with model and tokenizer of a checkpoint, as from_pretrained takes it: there as a whole or not at all.

    Its weights are in the precision of the training, whether that came to its end or not.
    """
    folder = path.with_name(f".{path.name}.tmp")
    dtype = precision.DTYPES[run["precision"]]
    if is_model(checkpoint):
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    else:  # no trial has come to the end
        model = load_weights(checkpoint, pretrained(run["model"])).to(dtype)
    if not all(weight.isfinite().all() for weight in model.parameters()):
        print(f"WARNING: best_model has weights that are infinite in {run['precision']}, or NaN: train with --precision bf16 or fp32", flush=True)
    model.save_pretrained(folder)
    load_tokenizer(run["model"]).save_pretrained(folder)
    files.sync(*folder.rglob("*"), folder)
    folder.rename(path)
    files.sync(path.parent)


def take_lock(run_dir: Path, patience: float):
    """An open file that is locked: two processes must not write one run. After a node was lost its lock may outlive it a while.

    Raises BadInput when another process holds it for `patience` seconds.
    """
    lock, deadline = open(run_dir / ".lock", "w"), time.time() + patience
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.time() > deadline:
                raise errors.BadInput(f"--run_name {run_dir.name}: a process is at work on {run_dir}") from None
            time.sleep(1)
        except OSError as error:
            print(f"WARNING: this file system has no locks ({error.strerror}): start no second process on {run_dir}")
            return lock


def main(args: argparse.Namespace, ds_config: dict, examples: tuple[list, list] | None) -> None:
    folder = checks.model_folder(args.model, args.prefetch)
    examples = examples or checks.load_examples(args.dataset, args.prefetch)
    if args.prefetch:
        print(f"in the cache: model {folder}, {len(examples[0])} training and {len(examples[1])} validation questions")
        return
    args.num_samples = args.num_samples or band_size(args.max_t, args.reduction_factor)
    run = prepare(args, examples, folder, ds_config)
    run_dir = Path(args.output_dir).absolute() / args.run_name
    run["run_dir"] = str(run_dir)
    facts = {
        "status": "running",
        "arguments": {name: value for name, value in vars(args).items() if name not in ("given", *checks.MODES_OF_USE)},
        "search_space": checks.describe(SEARCH_SPACE),
        "grid": checks.grid_size(SEARCH_SPACE),
        "ds_config": ds_config,
        "seed": args.seed,
        "questions": {part: len(run[part]) for part in ("train", "selection", "test")},
        "versions": run_folder.versions(),
        "git_commit": run_folder.git_commit(Path(__file__).parent),
    }
    expected = plan.forecast(SEARCH_SPACE, args.num_samples, args.max_t, args.reduction_factor, checks.slots(args))
    disk = expected.disk(checkpoint_bytes(folder))
    if not args.resume:
        checks.check_disk(run_dir.parent, disk)
        try:
            run_dir.mkdir(parents=True)
        except FileExistsError:
            raise errors.BadInput(f"--run_name {args.run_name}: {run_dir} exists already") from None
    atexit.register(take_lock(run_dir, 120 if "SLURM_RESTART_COUNT" in os.environ else 0).close)
    if args.resume:
        earlier = json.loads((run_dir / "run.json").read_text())
        if earlier.get("status") == "done":
            print(f"{run_dir} is done already; {sys.executable} -m hpo.results {run_dir} shows it")
            return
        for name in ("ds_config", "questions"):
            if earlier.get(name) != facts[name]:
                raise errors.BadInput(f"--resume: {name} {facts[name]} is not that of the run, {earlier.get(name)}")
    try:
        state = state_file.load_state(run_dir) if args.resume else None
    except RuntimeError as error:
        raise errors.BadInput(f"--resume: {error}") from None
    stop_file(run).unlink(missing_ok=True)
    files.write_json(run_dir / "run.json", facts)
    announce(args, run, run_dir, state, expected, disk)
    folder_of_its_own = functools.partial(tempfile.TemporaryDirectory, prefix="bohb-", ignore_cleanup_errors=True)  # mode 0700
    short = None if len(tempfile.gettempdir()) < 26 else "/tmp"  # for Ray's sockets: names of at most 107 bytes
    environment, storage = dict(os.environ), None
    with folder_of_its_own(dir=short) as temp_dir, folder_of_its_own() as trials_dir:
        try:
            start_ray(args, temp_dir, trials_dir)
            tested = run.pop("test")
            record = search(args, run, run_dir, state, expected, facts)
            if record.best is None:
                raise RuntimeError("no trial came to its first rung with a number; the reasons are above")
            result = {name: record.trials[record.best][name] for name in tables.METRICS}
            result["config"] = {"train_loop_config": record.configs[record.best]}
            files.write_json(run_dir / "best_result.json", result)
            if not (run_dir / "best_model").exists():  # made before an interruption
                found = record.checkpoints(record.best)
                if not found:
                    raise OSError(f"the checkpoint of the best trial is gone from {run_dir / 'ray' / record.best}")
                save_best_model(found[-1], run, run_dir / "best_model")
            record.tidy([])
            print(f"best model: {run_dir / 'best_model'}; testing it", flush=True)
            resources = {"num_cpus": args.cpus_per_trial, "num_gpus": min(1, args.gpus_per_trial)}
            task = ray.remote(**resources)(test).remote(run | {"test": tested}, str(run_dir / "best_model"))
            facts["test"] = {"questions": len(tested), **ray.get(task)}
            if not math.isfinite(facts["test"]["eval_loss"]):
                print(f"WARNING: the test of best_model in {args.precision} gives no number: train with --precision bf16 or fp32", flush=True)
        except BaseException as error:
            if errors.is_storage(error) or isinstance(error, OSError) and not run_dir.exists():
                storage = error
            else:
                status = "interrupted" if isinstance(error, shutdown.Drained) or not isinstance(error, Exception) else "failed"
                files.write_json(run_dir / "run.json", facts | {"status": status})
                raise
        finally:
            ray.shutdown()
    if storage:
        go_on_after(storage, run_dir, disk, environment)
        with contextlib.suppress(OSError):
            files.write_json(run_dir / "run.json", facts | {"status": "interrupted"})
        raise storage
    files.write_json(run_dir / "run.json", facts | {"status": "done"})
    state_file.delete_state(run_dir)
    try:
        report.write_page(run_dir)
        print(f"figures: {run_dir / 'report.html'}")
    except Exception as error:  # all else is done
        print(f"WARNING: no report.html ({error!r}); {sys.executable} -m hpo.results {run_dir} tries again")
    print(slot_time.text(facts["bill"], len(record.iterations), args.max_t, args.num_samples, facts["grid"]))
    print("model-based suggestions: {k} of {n}".format(**facts["model_based_suggestions"]))
    print(f"Test of the best model on {len(tested)} questions of the validation set, which no choice has looked at:")
    print("  " + ", ".join(f"{name} {facts['test'][name]:.4f}" for name in tables.METRICS))
    print(f"Below, eval_loss, EM and F1 are on the {len(run['selection'])} questions that trials were selected on.\n")
    print(f"Best Trial Result:\n{files.to_json(result)}\n")
    print(tables.table(list(record.trials.values()), args.metric), flush=True)


def go_on_after(error: Exception, run_dir: Path, disk: int, environment: dict[str, str]) -> None:
    """Waits for a file system that was full or gone, and starts this program anew with --resume; returns when that is not to be."""
    waits = int(environment.get("STORAGE_WAITS", 0))
    if waits == MAX_STORAGE_WAITS:
        return
    print(f"storage: {errors.one_line(error, -500)}", flush=True)
    print(f"waiting for {run_dir} and room in it, at most {STORAGE_PATIENCE / 60:.0f} minutes (STORAGE_PATIENCE)", flush=True)
    try:
        shutdown.stop_at_once()  # on the signal before a time limit
        there = storage_wait.wait_for_storage(run_dir, disk, STORAGE_PATIENCE)
    except (shutdown.Drained, KeyboardInterrupt):
        return
    if there:
        command = [sys.executable, sys.argv[0], "--resume", "--run_name", run_dir.name, "--output_dir", str(run_dir.parent)]
        os.execve(sys.executable, command, environment | {"STORAGE_WAITS": str(waits + 1)})


if __name__ == "__main__":
    # by the name of its file, so that trial processes import it, a copy too, and nothing has to be pickled
    script = importlib.import_module(Path(__file__).stem)
    try:
        script.main(ARGS, DS_CONFIG, EXAMPLES)
    except errors.BadInput as error:
        errors.refuse(error)
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, OSError) or errors.is_storage(error):
            print(f"raytune_bayesian.py: storage: {errors.one_line(error, -500)}", file=sys.stderr)
        elif isinstance(error, Exception) and not isinstance(error, script.resume.Drained):
            traceback.print_exc()
        where = f"{ARGS.output_dir}/{ARGS.run_name}"
        how = f"--resume --run_name {ARGS.run_name} --output_dir {ARGS.output_dir}"
        print(f"raytune_bayesian.py: the search ended early; what was saved is in {where}; go on with {how}", file=sys.stderr)
        sys.exit(1)

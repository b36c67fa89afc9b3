"""Searches learning rate, batch size and weight decay for fine-tuning BLOOM-560M on SQuAD v1.1, with BOHB in Ray Tune.

    make setup                                          # first: sets up .venv
    .venv/bin/python raytune_bayesian.py --prefetch     # with a network: downloads model and data, tries them, and ends
    .venv/bin/python raytune_bayesian.py --plan         # estimates time, disk and GPU memory; --check measures them
    .venv/bin/python raytune_bayesian.py                # on this machine: its GPUs, or its CPUs if it has no GPU
    sbatch head_node.slurm                              # on Slurm, with the same flags
    make demo                                           # or a search of minutes, with a small model and data set

--model and --dataset take a folder or a name on the Hugging Face hub. --metric (eval_loss, exact_match or f1) ranks the
trials. --help lists all flags and their defaults.

The sections of this file: search space and constants, EM and F1, one trial, the search, main. The package hpo/ has the
rest: saving and resuming, Slurm, faults, tables and figures. docs/architecture.md shows its parts.

A trial trains with one choice of hyperparameters. A full training (all epochs) is cut into max_t equal parts: these are
the iterations, Tune's training_iteration. Trials are compared in groups, the brackets of Hyperband. At certain
iterations, the rungs (3, 12 and 50 by default), the trials of a bracket are paused and compared. The best are promoted
and go on to the next rung, the others end. BOHB is Hyperband with a model that suggests hyperparameters: docs/bohb.md.
"""

from hpo import checks, hidden

if __name__ == "__main__":  # first of all: bad input is refused before the slow imports below
    ARGS = checks.arguments_of_program(__doc__)

import math
from pathlib import Path

import datasets

with hidden("scipy", "sklearn"):  # evaluate and transformers would import them, which takes a second
    import evaluate
    import transformers

import torch
from ray import tune
from transformers.trainer_pt_utils import get_length_grouped_indices

from hpo import known, ranges, search_space
from hpo.results.tables import MODES
from hpo.squad import data, evaluation, loading, lora, models, precision, scores
from hpo.squad.group import ONE_RANK
from hpo.squad.probe import try_model
from hpo.squad.setup import Setup, prepare

# ---------------------------------------------------------------------------------------------------------------------
# search space and constants

# To add a hyperparameter, add a line here. For example, "warmup_steps": tune.uniform(0.0, 0.1) searches a warmup ratio:
# a number below 1 is a share of all steps. Fields of TrainingArguments that docs/bohb.md lists are passed on by name.
# For any other hyperparameter, use hyperparameters["its_name"] in make_trainer.
SEARCH_SPACE = {
    "train_loop_config": {
        "lr": tune.loguniform(5e-6, 2e-4),
        "per_device_bs": tune.choice([1, 2]),
        "wd": tune.choice([0.0, 0.01]),
    }
}
# Known good settings. The first trials train with them. --try adds one from the command line, see docs/bohb.md.
KNOWN = []  # for example [{"lr": 2.5e-5, "per_device_bs": 2, "wd": 0.0}]
# The same for all trials:
MAX_LENGTH = 1024  # tokens of a sequence; the longest question of SQuAD, with its passage, has 835 in BLOOM's tokens
SELECTION_SIZE = 1000  # questions of the training set, held out to compare trials; the test uses the validation set
EVAL_TOKENS = 8192  # the most tokens of a batch in evaluation, padding included
MAX_GRAD_NORM = 1.0
LR_SCHEDULE = "linear"  # from lr to 0 over the full training; a trial that ends at an earlier rung has not reached 0
MAX_FAILURES = 3  # times that a trial goes on from its newest checkpoint, after it has lost its process, node or GPU

# ---------------------------------------------------------------------------------------------------------------------
# EM and F1


class SquadMetric(evaluate.Metric):
    """Exact match and F1 as the official script of SQuAD v1.1 computes them, offline, as fractions of 1.

    Each is the best over all references of a question, averaged over all questions in `references`. A question
    without a prediction scores 0. Source: https://rajpurkar.github.io/SQuAD-explorer, evaluate-v1.1.py. `language` says
    how answers are normalised, see hpo/squad/scores.py.

        SquadMetric().compute(predictions=[{"id": "1", "prediction_text": "the Moon"}],
                              references=[{"id": "1", "answers": {"text": ["Moon"], "answer_start": [7]}}])
    """

    def __init__(self, language: str = "en", **kwargs):
        super().__init__(keep_in_memory=True, **kwargs)
        self.language = language

    def _info(self):
        text = datasets.Value("string")
        predictions = {"id": text, "prediction_text": text}
        answers = datasets.Sequence({"text": text, "answer_start": datasets.Value("int32")})
        features = datasets.Features({"predictions": predictions, "references": {"id": text, "answers": answers}})
        return evaluate.MetricInfo(description="SQuAD v1.1 exact match and F1", citation="", features=features)

    def compute(self, *, predictions: list[dict], references: list[dict]) -> dict[str, float]:
        """Returns {"exact_match", "f1"}. Raises ValueError where there is no reference, or one without an answer."""
        if not references:
            raise ValueError("no references")
        by_id = {p["id"]: p for p in predictions}  # a missing one is replaced by one with another id: see _compute
        aligned = [by_id.get(r["id"], {"id": f"none for {r['id']}", "prediction_text": ""}) for r in references]
        return super().compute(predictions=aligned, references=references)

    def _compute(self, predictions, references):
        sum_em = sum_f1 = 0.0
        for prediction, reference in zip(predictions, references, strict=True):
            if not reference["answers"]["text"]:
                raise ValueError(f"question {reference['id']} has no answer")
            if prediction["id"] == reference["id"]:  # else it is missing, and scores 0
                text, answers = prediction["prediction_text"], reference["answers"]["text"]
                em, f1 = scores.best_score(text, answers, self.language)
                sum_em, sum_f1 = sum_em + em, sum_f1 + f1
        return {"exact_match": sum_em / len(references), "f1": sum_f1 / len(references)}


def answer_scores(model, tokenizer, questions: data.TokenizedSquad, setup: Setup, group=ONE_RANK) -> tuple[dict, list]:
    """EM and F1 of the model's greedy answers, over all questions and of each; of SQuAD 2.0 if setup.unanswerable."""
    answers = evaluation.predict(model, tokenizer, questions, EVAL_TOKENS, setup.max_new_tokens, group)
    each = scores.of_questions(answers, questions.references, setup.metric_language, setup.unanswerable)
    if setup.unanswerable:
        return scores.squad_v2(answers, questions.references, setup.metric_language), each
    return SquadMetric(setup.metric_language).compute(predictions=answers, references=questions.references), each


# ---------------------------------------------------------------------------------------------------------------------
# one trial


def train(config: dict, setup: Setup, trial) -> None:
    """One trial: from its start, or its newest checkpoint, until the full training ends or Tune pauses the trial.

    Runs in a worker process, which is used again for the next trial; with --gpus_per_trial N in N processes.

    hpo/errors.py decides what an error means. A trial has failed if it is out of memory (the GPU's, or the node's: Ray
    or the kernel has then killed its process), if its loss is NaN or if its data are broken. It is not tried again, but
    for one case: where trials share a GPU and its memory is full, once. BOHB learns it as a bad result, and the search
    goes on. A trial that has lost its process, node or GPU for another reason goes on from its newest checkpoint, at
    most MAX_FAILURES times, on another node if there is one.

    Args:
        config: {"train_loop_config": the hyperparameters, "rungs": iterations, added by the scheduler. At each of them
            Tune may pause the trial; at the last, max_t, it ends}.
        setup: what all trials share.
        trial: its ranks, its checkpoint and `report`, see TrialContext in hpo/cluster/trial.py.
    """
    group, hyperparameters = trial.group, setup.hyperparameters(config["train_loop_config"])
    tokenizer, model = models.load_tokenizer(setup.model), models.pretrained(setup.model)
    precision.check_once(make_trainer, hyperparameters, setup, group)  # the gradients, once per process
    transformers.set_seed(hyperparameters["seed"])
    model = lora.prepare(model, setup, hyperparameters)
    batch_size = hyperparameters["per_device_bs"] * hyperparameters["gradient_accumulation_steps"] * group.size
    order = data_order(setup.train.lengths, setup.num_train_epochs, batch_size, hyperparameters["seed"])
    questions = torch.utils.data.Subset(setup.train, order)
    trainer = make_trainer(model, questions, hyperparameters, setup, group, trial.folder, tokenizer.pad_token_id)
    trainer.add_callback(Iterations(config["rungs"], setup, trial, trainer, tokenizer, batch_size))
    with precision.engine_of(trainer):
        trainer.train(resume_from_checkpoint=trial.checkpoint)


def data_order(lengths, epochs: float, batch_size: int, seed: int) -> list[int]:
    """Indices of the questions of a full training, one epoch after another, each in another order.

    Questions of similar lengths share a batch.
    """
    order = []
    for epoch in range(math.ceil(epochs)):
        order += get_length_grouped_indices(lengths, batch_size, generator=torch.Generator().manual_seed(seed + epoch))
    return order[: max(1, round(len(lengths) * epochs))]


def make_trainer(model, questions, hyperparameters: dict, setup: Setup, group, folder: str, pad_token_id: int):
    """The Trainer of one trial. It makes a DeepSpeed engine, and writes its checkpoints to `folder`."""
    stage, clip = precision.zero_stage(setup.ds_config), setup.ds_config.get("gradient_clipping", "auto")
    defaults = {"lr_scheduler_type": LR_SCHEDULE, "max_grad_norm": MAX_GRAD_NORM if clip == "auto" else clip}
    training_arguments = transformers.TrainingArguments(
        output_dir=folder,
        learning_rate=hyperparameters["lr"],
        weight_decay=hyperparameters["wd"],
        per_device_train_batch_size=hyperparameters["per_device_bs"],
        **defaults | search_space.training_arguments(hyperparameters),
        num_train_epochs=1,  # to the Trainer it is one long epoch: `questions` has all epochs, see data_order
        train_sampling_strategy="sequential",
        deepspeed=precision.engine_config(setup.ds_config, setup.precision),
        fp16=stage > 0 and setup.precision == "fp16",  # at ZeRO stage 0 torch.autocast does it, see engine_config
        bf16=stage > 0 and setup.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        seed=hyperparameters["seed"],
        save_strategy="no",  # Iterations says when to save
        logging_strategy="no",
        logging_nan_inf_filter=False,  # the filter makes the CPU wait for the GPU in each step
        accelerator_config={"non_blocking": True},  # and so do blocking copies
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model=model,
        args=training_arguments,
        train_dataset=questions,
        data_collator=lambda batch: evaluation.collate(batch, pad_token_id),
    )
    trainer.group = group
    trainer.model_accepts_loss_kwargs = False  # the loss counts its tokens itself
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


class Trainer(transformers.Trainer):
    """The Trainer with a loss on answer tokens only."""

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of an optimizer step, and how many answer tokens a batch has on average, over all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum(len(batch["labels"]) for batch in batches)  # a label for each answer token, and no others
        # DeepSpeed divides by this number too, also in the last step, which may have fewer batches.
        return batches, self.group.mean(count / self.args.gradient_accumulation_steps, device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This batch's part of the mean cross entropy (nats) over all answer tokens of an optimizer step.

        DeepSpeed averages the parts over batches and ranks. Two batches with 8 and 4 tokens, on average 6, and the sums
        a and b: (a / 6 + b / 6) / 2 is (a + b) / 12.
        """
        total, _ = evaluation.answer_loss(model, inputs)
        return total / num_items_in_batch

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward of one batch. After the last batch of an optimizer step, DeepSpeed updates the weights.

        `model` is the DeepSpeed engine. The Trainer's own method is slower: it calls model.train() each time.
        """
        loss = self.compute_loss(model, evaluation.to_device(inputs, model.device), False, num_items_in_batch)
        model.set_gradient_accumulation_boundary(self.accelerator.sync_gradients)  # the last step may be shorter
        model.backward(loss)  # scales the loss
        model.step()  # after the last batch: unscales and clips the gradients; no update where they overflow
        return loss.detach()

    def floating_point_ops(self, inputs):
        """Not counted: counting takes a quarter of the time of a forward pass."""
        return 0

    def save_model(self, output_dir=None, **_):
        """Writes the model at the end of the full training. Before that, DeepSpeed saves the weights in its files."""
        if self.state.global_step == self.state.max_steps:
            weights, tied = self.accelerator.get_state_dict(self.model_wrapped), self.model.all_tied_weights_keys
            if self.args.should_save:  # rank 0
                weights = {name: weight for name, weight in weights.items() if name not in tied}
                self.model.save_pretrained(output_dir, state_dict=weights)


class Iterations(transformers.TrainerCallback):
    """Cuts a full training into max_t iterations. Evaluates after each one, and reports to Tune.

        after                 metrics             checkpoint
        an iteration          eval_loss           none
        a rung below max_t    eval_loss, EM, F1   DeepSpeed's files, to go on from
        max_t                 eval_loss, EM, F1   the model, or its adapters, for from_pretrained
        a planned stop        see below           DeepSpeed's files, to go on from

    All metrics are on the selection questions. With --metric exact_match or f1, EM and F1 are computed after each
    iteration. A planned stop is SIGUSR1, which Slurm sends before the time limit. At the end of an iteration, the
    metrics are those of the iteration. Amid an iteration there are none.
    """

    def __init__(self, rungs: list[int], setup: Setup, trial, trainer: Trainer, tokenizer, batch_size: int):
        self.rungs, self.setup, self.trial, self.trainer, self.tokenizer = rungs, setup, trial, trainer, tokenizer
        self.batch_size = batch_size  # of an optimizer step, in all ranks
        max_steps = math.ceil(len(trainer.train_dataset) / batch_size)
        # The last step of each iteration. Item 0 is the start. `prepare` makes sure of at least max_t steps.
        self.last_steps = [round(t * max_steps / setup.max_t) for t in range(setup.max_t + 1)]

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Prepares the engine, which the Trainer has made by now."""
        model.train()
        engine, checkpoint = self.trainer.model_wrapped, self.trial.checkpoint
        self.gradients = precision.Gradients(
            engine, self.setup.ds_config, self.setup.precision, checkpoint and Path(checkpoint), self.trial.group.size
        )
        self.first_step = state.global_step
        self.trial.start_iteration()

    def on_step_end(self, args, state, control, model=None, lr_scheduler=None, **kwargs):
        """At the end of an iteration: evaluates, has the Trainer save a checkpoint if one is due, and reports."""
        skipped = self.gradients.after_step()  # by DeepSpeed, because of an overflow
        if skipped:  # the Trainer has counted the step, but it has not advanced the schedule, which must end at 0
            lr_scheduler.step()
        args.save_only_model = state.global_step == state.max_steps  # no trial goes on from max_t
        if state.global_step in self.last_steps[1:]:
            iteration = self.last_steps.index(state.global_step, 1)
            self.metrics = self.evaluate_iteration(iteration, model, state.global_step)
            if iteration in self.rungs or self.trial.must_stop():
                control.should_save = True  # the Trainer saves, and then calls on_save
            else:
                self.report()
        elif self.trial.must_stop():  # amid an iteration. Tune wants a metric; "partial" keeps it out of all tables
            done = sum(step <= state.global_step for step in self.last_steps[1:])
            self.metrics = {"training_iteration": done, self.setup.metric: math.nan, "partial": True}
            control.should_save = True

    def evaluate_iteration(self, iteration: int, model, step: int) -> dict:
        """The metrics of an iteration. Raises FloatingPointError where the loss is NaN or infinite."""
        setup, group, pad = self.setup, self.trial.group, self.tokenizer.pad_token_id
        gradients = self.gradients.summary()  # waits for the GPU
        trained_on = self.trainer.train_dataset.indices[self.first_step * self.batch_size : step * self.batch_size]
        tokens = int(setup.train.lengths[trained_on].sum())
        metrics = {"training_iteration": iteration, "tokens_per_second": tokens / self.trial.seconds(), **gradients}
        self.trial.begin("evaluation")  # the time from here on is evaluation's
        with precision.autocast(setup.ds_config, setup.precision, self.trainer.args.device.type):
            loss, losses = evaluation.evaluate_loss(model, setup.selection, pad, EVAL_TOKENS, group)
            if not math.isfinite(loss):
                raise FloatingPointError(f"eval_loss is {loss} after {iteration} iterations")
            metrics["eval_loss"] = loss
            if iteration in self.rungs or setup.metric != "eval_loss":
                em_and_f1, each = answer_scores(model, self.tokenizer, setup.selection, setup, group)
                if iteration in self.rungs:
                    self.trial.keep_scores(losses, each, iteration)
                metrics |= em_and_f1
        self.trial.begin("checkpoints")
        model.train()
        return metrics

    def on_save(self, args, state, control, **kwargs):
        """Reports with the checkpoint that the Trainer has written."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.trial.group.gather(None)  # waits until all ranks have written their part
        if self.trial.group.rank == 0:
            self.gradients.save(folder)
        self.report(folder)

    def report(self, checkpoint: Path | None = None):
        """Reports to Tune. If Tune pauses the trial, rank 0 raises SystemExit, and other ranks TrialPaused."""
        self.trial.report(self.metrics, checkpoint)
        self.first_step = self.trainer.state.global_step


def test(folder: Path, questions: data.TokenizedSquad, setup: Setup) -> tuple[dict, tuple]:
    """eval_loss, EM and F1 of a model on the test questions, and those of each question. Runs in a worker process."""
    torch.set_num_threads(setup.cpus_per_trial)
    tokenizer = models.load_tokenizer(folder)
    model = models.load_for_test(folder, "cuda" if torch.cuda.is_available() else "cpu")
    loss, losses = evaluation.evaluate_loss(model, questions, tokenizer.pad_token_id, EVAL_TOKENS)
    em_and_f1, each = answer_scores(model, tokenizer, questions, setup)
    return {"eval_loss": loss, **em_and_f1}, (losses, each)


# ---------------------------------------------------------------------------------------------------------------------
# the search


def search(run, train):
    """Runs all trials of a new run, or those that a resumed run has left, or that --finish adds. Returns a TrialLog.

    TuneBOHB suggests the hyperparameters of a trial. HyperBandForBOHB decides at a rung which trials are promoted. Both
    are classes of hpo/bohb/, used in place of Ray's classes of these names.
    """
    from hpo.bohb.scheduler import HyperBandForBOHB
    from hpo.bohb.searcher import TuneBOHB
    from hpo.cluster.session import SearchSession

    args = run.args
    points = known.points(args.known)
    searcher = TuneBOHB(points_to_evaluate=points, seed=args.seed, max_concurrent=args.max_concurrent_trials)
    scheduler = HyperBandForBOHB(
        time_attr="training_iteration", max_t=args.max_t, reduction_factor=args.reduction_factor,
        stop_last_trials=False, baseline=args.baseline,  # --baseline: the first trial is trained to the end
    )  # fmt: skip
    session = SearchSession(run, searcher, scheduler)  # its search_alg hands out the trials of an earlier search first
    tuner = tune.Tuner(
        session.trainable(train),
        param_space=run.space,
        tune_config=tune.TuneConfig(
            metric=args.metric,
            mode=MODES[args.metric],
            num_samples=args.num_samples or -1,  # -1: until --hours or --gpu_hours are used up
            search_alg=session.search_alg,
            scheduler=scheduler,
            reuse_actors=True,  # a worker process keeps its imports, CUDA and the pretrained model for its next trial
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(run.folder),
            callbacks=session.callbacks,
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),  # not for trials that have failed, see train
            verbose=0,
        ),
    )
    return session.fit(tuner)


# ---------------------------------------------------------------------------------------------------------------------
# main


def main(args, train=train) -> None:
    """The whole program, after `args` were parsed and checked. A script of your own can pass another `train`."""
    space = ranges.space_of_run(SEARCH_SPACE, train, args)
    args.known = known.settings(KNOWN, space, args)
    from hpo.cluster import check_nodes, finish, launch, messages, repeats, warm_start  # slow: after the checks above
    from hpo.cluster.run import Run
    from hpo.plan import plan

    args.earlier_results = warm_start.take(args, space)
    if args.plan:
        return plan.show(args, space, MAX_LENGTH, EVAL_TOKENS)
    if args.prefetch:
        loading.prefetch(args.model, args.dataset, args.drop_bad_answers)
    largest = search_space.largest_trial(space, args)
    setup, test_set = prepare(args, MAX_LENGTH, SELECTION_SIZE, largest["sequences"])
    if not args.resume:
        try_model(setup, test_set, largest)
    if args.prefetch:
        return
    if args.check:
        return check_nodes.check(args, space, setup, largest, train)
    run = Run(args, space, setup, len(test_set))
    if run.done:
        return messages.print_done(run)
    messages.announce(run)

    with launch.ray_session(run):  # if the search stops early, for whatever reason, --resume continues it
        log = search(run, train)
        if finish.add_trials(run, log):  # --finish N: up to N stopped trials train to the end
            log = search(run, train)
        result = run.write_best_result(log)
        finish.test_best_model(run, log, test_set, test)
        repeats.run(run, log, lambda more: search(more, train))  # --repeats N: the best with N other seeds
    messages.print_results(run, log, result)


if __name__ == "__main__":
    from hpo.cluster.exits import exit_codes

    with exit_codes(ARGS):
        main(ARGS)

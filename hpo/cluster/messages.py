"""What the log says before the search, and at its end."""

import math
import shlex
import sys

from hpo import arguments, known, machines, ranges
from hpo.bohb.brackets import band_size, rungs
from hpo.cluster.run import Run
from hpo.files import to_json
from hpo.results import intervals, report, slot_time, tables
from hpo.results.slots import gpus_without_cpus, trials_per_gpu
from hpo.results.trial_log import TrialLog
from hpo.squad import loading, precision


def announce(run: Run) -> None:
    """Prints what is about to run."""
    args, setup, forecast = run.args, run.setup, run.forecast
    if run.state:
        rows, live = run.state["log"]["trials"].values(), len(run.state["live"])
        ended, iterations = sum(row["status"] in tables.ENDED for row in rows), len(run.state["log"]["iterations"])
        print(f"going on with a search: {ended} trials have ended, {live} go on, {iterations} iterations are done")
    whole = "all" if args.max_eval_samples is None else "bounded by --max_eval_samples:"
    tested, trials = run.facts["questions"]["test"], args.num_samples
    budget = " and ".join(arguments.budget_in_words(args))
    print(f"run folder: {run.folder}")
    print(f"questions: {len(setup.train)} to train on; {len(setup.selection)} of other {setup.held_out} to compare")
    print(f"  trials on; {whole} {tested} of the validation set to test the best model on, at the end")
    if setup.unanswerable:
        print("some questions have no answer: EM and F1 are those of SQuAD 2.0")
    for split, left_out in setup.dropped.items():
        print("bad answers left out of the {} set:".format("training" if split == "train" else split), end=" ")
        print("{answers}, and with them {questions} of its {read} questions".format_map(left_out))
    for line in tables.leakage_in_words(setup.leakage):
        print(line)
    if not args.gpus_per_trial:
        print(f"no GPU: training in {args.precision} on the CPU" + " instead of fp16" * (args.precision == "fp32"))
    print(precision.in_words(setup.ds_config, args.precision))
    if args.precision == "fp16" and "precision" not in args.given and precision.is_of_bf16(setup.model):
        print("WARNING: this model was trained in bf16, whose range fp16 does not have: --precision bf16 is safer,")
        print("  on a GPU that has it (A100, H100)")
    if run.adapters:
        model = loading.count_parameters(setup.model)
        print(f"LoRA: up to {run.adapters:,} trained parameters; the {model:,} of the model are frozen")
    brackets = rungs(args.max_t, args.reduction_factor)
    for line in [*ranges.changes(run.space, args.ranges), *known.in_words(args.known, args.baseline)]:
        print(line)
    if setup.shares_gpu:
        print(f"{trials_per_gpu(args.gpus_per_trial)} trials share each GPU")
    number = f"{trials} trials" if trials else "as many trials"
    number += " at most, and as many" * bool(trials and budget) + f" as {budget} allow" * bool(budget)
    print(f"search: {number} on {run.slots} slots, brackets of (trials, iterations) {brackets}")
    for line in cpu_warnings(args, run.slots):
        print(line)
    print(f"disk: up to {run.needed / 1e9:.3g} GB in {args.output_dir}: {forecast.checkpoints} checkpoints, best model")
    # A budget leaves the number of trials open. With earlier results the model can suggest from the start.
    if trials and not args.warm_start:
        print_model_outlook(forecast.model_based, args)
    sys.stdout.flush()


def print_done(run: Run) -> None:
    """Prints that there is nothing to do."""
    print(f"{run.folder} is done already; a larger --num_samples or budget adds trials, and a larger --finish or")
    print(f"--repeats adds trainings; python -m hpo.results {shlex.quote(str(run.folder))} shows it")


def print_model_outlook(model_based: int, args) -> None:
    """Prints how many suggestions can come from the model, by the plan, and a warning where none can."""
    print(f"model: {model_based} of {args.num_samples} suggestions come after it has enough results; a third of them")
    print("  stays random")
    if model_based == 0:
        band = band_size(args.max_t, args.reduction_factor)
        print(f"WARNING: this is random search; one band is {band} trials (--num_samples): take more trials, or fewer")
        print("  at a time (--max_concurrent_trials), so that the first ones end before the last ones are suggested")


def cpu_warnings(args, slots: int) -> list[str]:
    """A line for each kind of node whose CPUs are too few for its GPUs, unless `slots` are all that are wanted."""
    if slots == args.max_concurrent_trials:
        return []
    of_trial = {"cpu": args.cpus_per_trial, "gpu": args.gpus_per_trial}
    texts = [gpus_without_cpus(have, of_trial) for _, have in machines.kinds_of_nodes(args)]
    return [f"WARNING: on a node {text}" for text in dict.fromkeys(texts) if text]


def print_results(run: Run, log: TrialLog, result: dict) -> None:
    """Draws report.html and prints the result, as the last lines of the log.

    Args:
        run: the run.
        log: the tables of the search.
        result: of the best trial, see best_result.json.
    """
    setup, tested = run.setup, run.facts["tests"][-1]
    if tested["eval_loss"] is None or not math.isfinite(tested["eval_loss"]):  # None: from run.json
        print(f"WARNING: the test of best_model in {setup.precision} gives no number: use --precision bf16 or fp32")
    try:
        _, claims = report.write_page(run.folder)
        print(f"figures: {run.folder / 'report.html'}")
        if claims:
            print("what the search may claim (docs/results.md):", *claims, sep="\n")
    except Exception as error:  # everything else is done
        again = shlex.join([sys.executable, "-m", "hpo.results", str(run.folder)])
        print(f"WARNING: no report.html ({error!r}); {again} tries again")
    facts, iterations = run.facts, len(log.iterations)
    print(slot_time.summary(facts["slot_minutes"], iterations, setup.max_t, len(log.trials), facts["grid"]))
    if repeated := facts.get("repeats"):
        print(f"slot time of the repeats: {slot_time.in_parts(repeated['slot_minutes'])}")
    print("model-based suggestions: {k} of {n}".format(**facts["model_based_suggestions"]))
    number = tested["questions"]
    of = "questions of the validation set"
    if setup.dropped:
        of = "of the {read} questions of the validation set ({questions} of them are left out)".format_map(
            setup.dropped["validation"]
        )
    unused = ", which no decision has used" * (len(facts["tests"]) == 1)
    print(f"Test of the best model on {number} {of}{unused}:")
    print("  " + tables.tested_in_words(tested))
    print(tables.looks_in_words(facts["tests"]))
    if "baseline" in facts:
        baseline = facts["baseline"]
        print(f"Gain over the baseline (trial {baseline['trial_id']}): {tables.gain_in_words(baseline)}")
    print(f"Below, eval_loss, EM and F1 are on the {len(setup.selection)} questions that trials were selected on.")
    print("The best trial was selected by them: its scores are too good on average, and their intervals miss the truth")
    print("too often. The test above uses other questions, which had no part in the selection.")
    print(f"  {intervals.best_in_words(run.folder, log.best_trial())}\n")
    print(f"Best Trial Result:\n{to_json(result)}\n")
    trials = list(log.trials.values())
    versus = intervals.versus_best(run.folder, trials, setup.metric)
    print(tables.table(trials, setup.metric, versus), flush=True)

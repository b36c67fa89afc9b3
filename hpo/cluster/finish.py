"""After a search: --finish, and the test of the best model."""

from collections.abc import Callable

import ray

from hpo import known, search_space
from hpo.bohb import scheduler
from hpo.cluster.run import Run
from hpo.cluster.state import load_state
from hpo.results import intervals
from hpo.squad import lora, models


def add_trials(run: Run, log) -> bool:
    """--finish: trials that were stopped in doubt are trained to the end, each alone.

    Changes the state of a search that has ended: the best of these trials are live again. They are trained from their
    start, since the checkpoints of stopped trials are deleted. Those that an earlier call has added count too.

    Args:
        run: its `state` is changed.
        log: the tables of the search, a TrialLog.

    Returns:
        Whether there are such trials: the search goes on with them from run.state.
    """
    args, rows = run.args, list(log.trials.values())
    if not args.finish:
        return False
    state = load_state(run.folder)
    alone = state["scheduler"]["alone"]
    more = args.finish - len(alone.keys() - {state["scheduler"]["baseline"]})
    in_doubt = intervals.stopped_in_doubt(run.folder, rows, args.metric, alone)
    chosen = [row["trial_id"] for row in in_doubt[: max(0, more)]]
    for trial_id in chosen:
        config = state["searcher"]["suggested"][trial_id]["config"]
        (setting,) = known.points([search_space.setting_of(run.space, config["train_loop_config"])])
        state["searcher"]["live"][trial_id] = setting
        state["log"]["trials"][trial_id]["status"] = "paused"
        live = {"trial_id": trial_id, "config": config | {"rungs": [args.max_t]}, "status": "PAUSED"}
        state["live"].append(live | {"checkpoint": None, "training_iteration": 0})
    if not chosen:
        if more > 0:
            print(f"--finish {args.finish}: no other trial is known to be in doubt", flush=True)
        return False
    print(f"--finish {args.finish}: trained to the end now: {', '.join(chosen)}", flush=True)
    scheduler.add_alone(state["scheduler"], chosen, args.max_t)
    run.state = state
    return True


def test_best_model(run: Run, log, test_set, test: Callable) -> None:
    """Makes best_model of the best trial's checkpoint, and tests it where trials run. What was done already stays.

    Args:
        run: gets the results of the test.
        log: the tables of the search, a TrialLog.
        test_set: questions.
        test: called as test(folder, test_set, setup) in a worker process, see the script.
    """
    if run.has_tested(log.best):  # it is best_model already
        return
    setup, best_model = run.setup, run.folder / "best_model"
    if not run.has_untested(log.best):
        adapters = lora.of_trial(setup, log.configs[log.best])
        models.save_best_model(log.best_checkpoint(), setup.model, setup.precision, best_model, adapters)
    print(f"best model: {best_model}; testing it", flush=True)
    task = ray.remote(num_cpus=setup.cpus_per_trial, num_gpus=min(1, setup.gpus_per_trial))(test)
    run.add_test(log.best, test_set, *ray.get(task.remote(best_model, test_set, setup)))

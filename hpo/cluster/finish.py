"""--finish: after a search, trials that were stopped in doubt are trained to the end, each alone.

They are trained again from their start, since the checkpoints of stopped trials are deleted.
"""

from hpo import known, search_space
from hpo.bohb import scheduler
from hpo.cluster.run import Run
from hpo.cluster.state import load_state
from hpo.results import intervals


def add_trials(run: Run, log) -> bool:
    """Changes the state of a search that has ended: the best of the trials in doubt are live again.

    Those that an earlier call has added count towards --finish.

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
    scheduler.going_on(state["scheduler"], chosen, args.max_t)
    run.state = state
    return True

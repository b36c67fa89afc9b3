"""--repeats: the best trial and the baseline are trained again with other seeds, after everything else.

The repeats are a search of their own, in the folder repeats/ of the run. It has only known settings, and each of its
trials is trained to the end. So they survive and continue as the trials of a search do. The seed, and the id of the
trial that is repeated, are two further hyperparameters.
"""

import argparse
import dataclasses
from collections.abc import Callable

from ray import tune

from hpo import search_space
from hpo.cluster.run import Run
from hpo.cluster.state import load_state
from hpo.errors import BadInput
from hpo.plan.plan import forecast
from hpo.results import checkpoints, seeds

NO_RUNGS = 10**12  # as a reduction factor: each bracket has one trial, whose only rung is max_t


class Repeats:
    """What a search needs of a run, see Run.

    Args:
        run: the run whose search has ended.
        settings: the hyperparameters that are trained again, each with "seed" and "repeat_of".
        state: of the repeats so far, or None.
    """

    def __init__(self, run: Run, settings: list[dict], state: dict | None):
        self.of, self.state, self.slots, self.ended, self.may_fail = run, state, run.slots, False, True
        self.folder = run.folder / seeds.FOLDER
        self.folder.mkdir(exist_ok=True)
        self.setup = dataclasses.replace(run.setup, run_dir=self.folder)
        trials = list(dict.fromkeys(setting["repeat_of"] for setting in settings))
        more = {"seed": tune.randint(0, 2**32), "repeat_of": tune.choice(trials)}
        self.space = {"train_loop_config": run.space["train_loop_config"] | more}
        own = {"num_samples": len(settings), "known": settings, "reduction_factor": NO_RUNGS, "baseline": False}
        own |= {"finish": 0, "repeats": 0}
        own |= {"gpu_hours": None, "hours": None, "warm_start": [], "earlier_results": [], "report_to": "none"}
        self.args = argparse.Namespace(**vars(run.args) | own)
        self.forecast = forecast(self.space, len(settings), run.args.max_t, NO_RUNGS, run.slots)
        self.facts = {}

    def write(self, status: str) -> None:
        """Writes run.json of the run, with the time of the repeats."""
        if "slot_minutes" in self.facts:
            self.of.facts["repeats"] = {name: self.facts[name] for name in ("slot_minutes", "gpu_minutes")}
        self.of.write(status)


def run(of: Run, log, search: Callable) -> None:
    """Trains the repeats that the run does not have yet.

    Args:
        of: the run, whose search has ended and whose best model is tested.
        log: its tables, a TrialLog.
        search: runs a search, with a Repeats in place of a Run.

    Raises:
        BadInput: the saved state of earlier repeats cannot be read.
    """
    if not of.args.repeats:
        return
    baseline = of.facts["baseline"]["trial_id"] if of.args.baseline else log.best
    trials, numbers = list(dict.fromkeys([log.best, baseline])), seeds.of_repeats(of.args.seed, of.args.repeats)
    wanted = [(trial_id, seed) for trial_id in trials for seed in numbers]
    folder = of.folder / seeds.FOLDER
    try:
        state = load_state(folder)
    except RuntimeError as error:
        raise BadInput(f"--repeats: {error}; rename {folder} to train all repeats again") from None
    suggested = state["searcher"]["suggested"].values() if state else []
    configs = [suggestion["config"]["train_loop_config"] for suggestion in suggested]
    begun = [(config["repeat_of"], config["seed"]) for config in configs]
    new = [pair for pair in wanted if pair not in begun]
    if state:
        if not new and not state["live"]:
            checkpoints.delete_except(folder)  # if the run was killed before it could do so
            return
        state["searcher"]["points_to_evaluate"] = new  # their number counts
    settings = [
        search_space.setting_of(of.space, log.configs[trial_id]) | {"seed": seed, "repeat_of": trial_id}
        for trial_id, seed in begun + new
    ]
    both = " and of the baseline" * (len(trials) > 1)
    print(f"repeats: {of.args.repeats} of the best trial{both}, with seed {', '.join(map(str, numbers))}", flush=True)
    repeats = Repeats(of, settings, state)
    search(repeats)
    repeats.write("running")
    checkpoints.delete_except(repeats.folder)

"""What a search needs around Tune's own loop: callbacks, saved state, worker resources."""

import math
import os
from pathlib import Path

from ray import tune
from ray.tune.experiment import Trial

from hpo import arguments, search_space
from hpo.bohb.brackets import rungs
from hpo.cluster import preemption, trial
from hpo.cluster.idle_nodes import IdleNodeRelease
from hpo.cluster.ray_private import ResumableSearch
from hpo.cluster.run import Run
from hpo.cluster.state import save_state
from hpo.cluster.watchdogs import FaultyNodes, SharedGpus, Watchdog
from hpo.plan.budget import Budget, MeasuredPace
from hpo.plan.plan import further_trainings
from hpo.results import checkpoints, intervals, tables, trackers
from hpo.results.progress import ProgressPrinter
from hpo.results.slot_time import SlotTime
from hpo.results.slots import trials_per_gpu
from hpo.results.trial_log import TrialLog

UNBOUNDED = 10_000  # trials that may wait for a worker process, where the number of trials is not known


class SearchSession:
    """Everything around one search: the tables, the slot time, the saved state, and the callbacks of Tune.

    Takes over the state of an earlier search, if the run has one.

    Args:
        run: the run.
        searcher: a TuneBOHB.
        scheduler: a HyperBandForBOHB.
    """

    def __init__(self, run: Run, searcher, scheduler):
        args, self.setup = run.args, run.setup
        self.run, self.searcher, self.scheduler = run, searcher, scheduler
        self.observed = 0  # results at rungs when run.json was written last
        # If the whole first rung has failed, the search ends. One trial alone does not end it, and no repeat.
        num_samples = args.num_samples or math.inf
        first_rung = min(num_samples, max(4, rungs(args.max_t, args.reduction_factor)[0][0][0]))
        first_rung = UNBOUNDED if run.may_fail else first_rung
        self.log = TrialLog(
            run_dir=run.folder,
            searcher=searcher,
            metric=args.metric,
            num_samples=num_samples,
            gpus_per_trial=args.gpus_per_trial,
            first_rung=first_rung,
            save_state=self.save,
        )
        resources = {"cpu": args.cpus_per_trial, "gpu": args.gpus_per_trial}
        self.slot_time = SlotTime(self.log, resources, args.max_concurrent_trials, searcher)
        searcher.add_earlier_results(args.earlier_results)
        if args.warm_start:
            searcher.change_seed(1 + len(args.earlier_results))
        self.search_alg = ResumableSearch(searcher, run.folder)
        if run.state:
            self.restore(run.state)
        needed = [t["checkpoint"] for t in run.state["live"]] if run.state else []
        checkpoints.delete_except(run.folder, needed, self.log.best)
        rendezvous = os.environ.get("RENDEZVOUS_DIR")  # where head_node.slurm and its worker jobs meet
        folder, idle_minutes = rendezvous and Path(rendezvous), float(os.environ.get("IDLE_RELEASE_MINUTES", 0))
        has_budget = arguments.has_budget(args) and not run.ended
        self.callbacks = [
            self.log,
            self.slot_time,
            IdleNodeRelease(self.slot_time, idle_minutes, folder, max(further_trainings(args).values())),
            ProgressPrinter(
                self.log,
                scheduler,
                run.slots,
                run.forecast.iterations,
                run.forecast.time,
                self.seconds_left if has_budget else None,
            ),
            preemption.PauseOnSignal(scheduler, self.search_alg, self.setup.stop_file, self.log.save),
            Watchdog(args.trial_timeout, self.log.log),
            FaultyNodes(folder, self.log.log),
            SharedGpus(trials_per_gpu(args.gpus_per_trial), self.log.log),
            *trackers.tracker(args.report_to, run.folder),
        ]
        self.budget = None
        if has_budget:
            pace = MeasuredPace(self.log, scheduler)
            self.budget = Budget(scheduler, self.usable_slots, self.seconds_left, pace, pace.started)
            searcher.allows_trial = self.allows_trial
            self.callbacks.append(pace)
        if run.ended:
            searcher.allows_trial = lambda: False
            self.log.num_samples = len(searcher.suggested)
        # By default Tune starts worker processes one by one. With this variable it starts one for each pending trial.
        # The searcher suggests one trial more than there are slots.
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(args.num_samples or UNBOUNDED)
        self.slot_time.count_slots()
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # the tables and --report_to have everything
        self.setup.stop_file.unlink(missing_ok=True)

    def usable_slots(self) -> int:
        """The number of trials that can run at a time now; as planned where no worker has joined yet."""
        slots = self.slot_time.slots or self.run.slots
        return min(slots, self.run.args.max_concurrent_trials or slots)

    def seconds_left(self) -> float:
        """Seconds of the budget that are left."""
        args = self.run.args
        return self.slot_time.budget_left(args.gpu_hours, args.hours, args.gpus_per_trial, self.usable_slots())

    def allows_trial(self) -> bool | None:
        """Whether the budget allows another trial, see Budget. Tells the log how many trials the search has."""
        allowed, limit = self.budget.allows_trial(), self.run.args.num_samples or math.inf
        before = self.log.num_samples
        self.log.num_samples = limit if allowed else min(limit, len(self.searcher.suggested))
        live = len(self.scheduler.live_trials())
        if live and self.log.iterations and self.log.num_samples < before:
            needed, left = self.budget.needed() / 60, self.seconds_left() / 60
            warning = "WARNING: " * (needed > 1.05 * left)
            what = f"the budget has no room for another trial now, {live} trials go on"
            self.log.log(f"{warning}{what}: they need about {needed:.1f} min, and {left:.1f} min are left")
        return allowed

    def trainable(self, train):
        """What Tune runs for a trial: `train` of the script, with its resources, on one node."""
        resources = tune.PlacementGroupFactory(trial.bundles(self.setup), strategy="STRICT_PACK")
        return tune.with_resources(tune.with_parameters(trial.run, train=train, setup=self.setup), resources)

    def fit(self, tuner: tune.Tuner) -> TrialLog:
        """Runs the search, or what is left of it.

        Raises:
            preemption.Preempted: after SIGUSR1, when each running trial has saved a checkpoint.
            KeyboardInterrupt: after SIGINT.
        """
        try:
            if self.budget and self.run.state and not self.run.state["live"] and self.allows_trial() is False:
                self.log.log("the budget has no room for another trial: none is added")
            if self.log.unfinished():
                tuner.fit()
            else:  # interrupted after its last trial. Tune, which would pass the search space, does not run
                self.searcher.set_search_properties(None, None, self.run.space)
        finally:
            minutes = self.slot_time.minutes()
            busy = sum(row["gpu_minutes"] for row in self.log.trials.values())
            allocated = minutes["allocated"] * self.setup.gpus_per_trial
            self.run.facts |= self.log.facts() | {
                "slot_minutes": minutes,
                "gpu_minutes": {"allocated": allocated, "busy": busy, "idle": allocated - busy},
                "model_based_suggestions": {"k": self.searcher.model_based, "n": len(self.searcher.suggested)},
                "densities": self.searcher.densities(),
                "alone": self.alone(),
            }
            self.log.write_tables()
        if self.log.unfinished():  # after SIGINT, Tuner.fit returns as if the search had ended
            raise KeyboardInterrupt
        self.run.ended = self.run.facts["ended"] = True
        self.log.save([])  # what follows can be interrupted too
        self.run.write("running")
        if self.scheduler.baseline:
            baseline = self.log.trials[self.scheduler.baseline]
            gain = tables.gain(self.log.best_trial(), baseline)
            trials, best = list(self.log.trials.values()), self.log.best_trial()
            ends = intervals.of_gain(self.run.folder, trials, best, baseline) if gain else {}
            found = {"trial_id": baseline["trial_id"], "gain": gain, "intervals": ends}
            self.run.facts["baseline"] = found | {"level": intervals.level_of(trials)}
        preemption.stop_on_signals()
        return self.log

    def save(self, state: dict, live: list[dict]) -> None:
        """Saves the state of the search.

        Args:
            state: of the tables.
            live: the live trials of Tune, see ResumableSearch.
        """
        # A trial without a further rung was saved after its final report and before Tune removed it. It holds no slot.
        live = [trial for trial in live if self.scheduler.has_rung(trial["trial_id"])] + self.search_alg.live
        parts = {"searcher": self.searcher.get_state(), "scheduler": self.scheduler.get_state(), "log": state}
        save_state(self.run.folder, parts | {"live": live, "slot_time": self.slot_time.get_state()})
        if self.observed < len(self.searcher.observations):  # the report shows the model, also during the search
            self.observed = len(self.searcher.observations)
            self.run.facts |= {"densities": self.searcher.densities(), "alone": self.alone()}
            self.run.write("running")

    def alone(self) -> dict:
        """The trials that went on without a promotion, for run.json."""
        baseline = self.scheduler.baseline if self.scheduler.baseline in self.scheduler.alone else None
        return {"baseline": baseline, "finish": sorted(self.scheduler.alone.keys() - {baseline})}

    def restore(self, state: dict) -> None:
        """Takes over a saved state. The searcher first: the others and Tune ask it.

        The values of hyperparameters are those of the search space again: JSON has lists for tuples.
        """
        found = [trial["config"] for trial in state["live"]]
        found += [suggested["config"] for suggested in state["searcher"]["suggested"].values()]
        for config in found:
            config["train_loop_config"] = search_space.as_searched(self.run.space, config["train_loop_config"])
        for trial_id, config in state["log"]["configs"].items():
            searched = state["log"]["configs"][trial_id] = search_space.as_searched(self.run.space, config)
            row = state["log"]["trials"][trial_id]
            row.update({tables.COLUMNS.get(name, name): value for name, value in searched.items()})
        live = {trial["trial_id"] for trial in state["live"]}
        self.slot_time.set_state(state["slot_time"])
        self.searcher.set_state(state["searcher"], live)
        waiting = {trial["trial_id"] for trial in state["live"] if trial["status"] == Trial.PENDING}
        self.scheduler.set_state(state["scheduler"], waiting)
        self.log.set_state(state["log"], live)
        created = len(self.searcher.suggested)
        self.search_alg = ResumableSearch(self.searcher, self.run.folder, state["live"], created)

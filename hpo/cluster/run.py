"""Creates or resumes the run folder, locks it, and loads its saved state."""

import argparse
import atexit
import datetime
import fcntl
import itertools
import json
import os
import sys
import time
from pathlib import Path

import torch

from hpo import arguments, code_copy, disk, machines, search_space
from hpo.bohb.brackets import band_size
from hpo.cluster.state import FILE, load_state
from hpo.errors import BadInput
from hpo.files import write_json
from hpo.plan.plan import forecast, further_trainings, most_checkpoints
from hpo.results import intervals
from hpo.results.checkpoints import checkpoints_of
from hpo.results.provenance import folder_hash, git_commit, hashes, other_versions, versions
from hpo.results.tables import METRICS
from hpo.squad import loading, lora
from hpo.squad.setup import Setup

LOCK_PATIENCE = 120  # seconds; after a node was lost, its lock may stay for a while


class Run:
    """A run folder, from its creation or resumption to the end of the search.

    `space` is the search space, `facts` the content of run.json, `state` the saved state of an earlier search or None,
    `slots` the number of trials that can run at a time, `needed` the bytes that the run needs at its peak. `done`:
    the search has all its trials and was tested, so there is nothing to do. `ended`: the search suggests no more
    trials, even if its budget has time left. `may_fail`: whether all trials may fail.

    Args:
        args: the arguments of the run.
        space: the search space.
        setup: what all trials share.
        test_size: the number of questions that the best model is tested on.

    Raises:
        BadInput: the folder exists already, another process works on it, it is not of the same search, or the disk is
            too small.
    """

    def __init__(self, args: argparse.Namespace, space: dict, setup: Setup, test_size: int):
        self.args, self.space, self.setup, self.folder, self.state = args, space, setup, setup.run_dir, None
        self.slots, self.done, self.ended, self.may_fail = machines.slots(args), False, False, False
        self.facts = {
            "status": "running",
            "arguments": arguments.kept(args),
            "search_space": search_space.describe(space),
            "edges": search_space.edges(space),
            "known_settings": json.loads(json.dumps(args.known)),  # as they are read back: a tuple is a list
            "environment": args.ranges,
            "grid": search_space.grid_size(space),
            "ds_config": setup.ds_config,
            "seed": args.seed,
            "questions": {"train": len(setup.train), "selection": len(setup.selection), "test": test_size},
            "leakage": setup.leakage,
            "versions": versions(),
            "cuda": torch.version.cuda,
            "earlier_versions": [],  # of parts of the run, where it went on with others
            "git_commit": git_commit(arguments.ROOT),
            "script": Path(sys.argv[0]).name,
            "cluster": args.cluster,
            "tests": [],  # each look at the test set, also those of an earlier search
        }
        goes_on = False  # whether an unfinished run continues, with the number of trials that it had
        if args.resume:
            hold_lock(self.folder)
            earlier = json.loads((self.folder / "run.json").read_text())
            self.done = arguments.nothing_to_do(args, earlier)
            if self.done:
                return
        self.facts["files"] = input_files(args, setup.model)
        if args.resume:
            self.take_over(earlier)
            goes_on = earlier.get("status") != "done" and args.num_samples == earlier["arguments"]["num_samples"]
        self.set_forecast()
        if not goes_on:
            machines.check_disk(self.folder.parent, self.needed - disk.used(self.folder))
        if not args.resume:
            make_folder(self.folder)
            hold_lock(self.folder)
        if args.new_code or not self.has_copy():
            code_copy.keep(self.folder, args.deepspeed)
            self.facts.pop("code_sha256", None)  # of the code until now
        self.facts.setdefault("code_sha256", folder_hash(self.folder / code_copy.NAME))
        intervals.save(self.folder / "scores" / "selection.npz", intervals.questions_of(setup.selection))
        self.write("running")

    def set_forecast(self) -> None:
        """Sets `forecast`, `adapters` (trained parameters of LoRA, at the largest rank) and `needed`."""
        args = self.args
        # With a budget it is a forecast of two bands: what a search of several needs on disk.
        trials = args.num_samples or 2 * band_size(args.max_t, args.reduction_factor)
        size = trials, args.max_t, args.reduction_factor, self.slots
        further = further_trainings(args)
        finish = {"finish": further["finish"]}  # repeats have a forecast of their own
        self.forecast = forecast(
            self.space, *size, short_ends(self.state), args.known, args.baseline, further=finish
        )
        of_repeats = most_checkpoints(further["repeats"], self.slots)
        self.forecast.checkpoints = max(self.forecast.checkpoints, of_repeats)
        r = search_space.largest_trial(self.space, args)["lora_r"]
        self.adapters = lora.count_trained(self.setup.model, r, args.lora_target_modules)
        checkpoint, best_model = loading.disk_bytes(self.setup.model, self.adapters)
        self.needed = self.forecast.disk(checkpoint, best_model)
        if (self.folder / "best_model").exists():
            self.needed += best_model  # a better one is written beside it

    def take_over(self, earlier: dict) -> None:
        """Takes over the known settings, the results and the saved state of an earlier search.

        Args:
            earlier: the content of its run.json.

        Raises:
            BadInput: it is another search, or its state cannot be read.
        """
        search_space.check_same(self.space, dict(earlier["search_space"]))
        for name in ("ds_config", "questions"):
            if earlier.get(name) != self.facts[name]:
                raise BadInput(f"--resume: {name} {self.facts[name]} is not that of the run, {earlier.get(name)}")
        files = earlier.get("files", {})  # older runs have none
        for name in files.keys() & self.facts["files"].keys():
            changed = files[name]["sha256"].items() ^ self.facts["files"][name]["sha256"].items()
            if changed:
                what = ", ".join(sorted({file for file, _ in changed}))
                folder = self.facts["files"][name]["folder"]
                raise BadInput(f"--resume: --{name} {folder}: changed since the run began: {what}")
        then = {name: earlier.get(name) for name in ("versions", "cuda")}
        self.facts["earlier_versions"] = earlier.get("earlier_versions", [])
        if then["versions"] and then != {name: self.facts[name] for name in then}:
            self.facts["earlier_versions"].append(then)  # of the results so far
        for text in other_versions(earlier.get("versions", {})):
            print(f"WARNING: --resume: {text}")
        try:
            self.state = load_state(self.folder)
        except RuntimeError as error:
            raise BadInput(f"--resume: {error}") from None
        suggested = len(self.state["searcher"]["suggested"]) if self.state else 0
        if self.args.num_samples is not None and self.args.num_samples < suggested:
            raise BadInput(f"--num_samples {self.args.num_samples}: {suggested} trials have begun already")
        if earlier.get("status") == "done" and self.state is None:
            raise BadInput(f"--resume: {self.folder} has no {FILE}: an older version of this program has deleted it")
        known = earlier.get("known_settings", [])  # older runs have none
        self.args.known = [search_space.setting_of(self.space, setting) for setting in known]
        self.facts |= {"known_settings": known, "tests": earlier.get("tests", [])}
        self.facts["files"] |= files
        if self.has_copy() and not self.args.new_code:
            self.facts |= {name: earlier[name] for name in ("git_commit", "script") if name in earlier}
        ended = earlier.get("ended", earlier.get("status") == "done")
        self.ended = self.facts["ended"] = ended and not arguments.grows(self.args, earlier)
        self.facts = earlier | self.facts  # slot time, baseline and the like stay until the search writes new ones

    def has_copy(self) -> bool:
        """Whether the run has a copy of its code. Those of older versions have none."""
        return (self.folder / code_copy.NAME).is_dir()

    def has_tested(self, trial_id: str) -> bool:
        """Whether best_model is that of this trial, and was tested."""
        tests = self.facts["tests"]
        return bool(tests) and tests[-1]["trial_id"] == trial_id

    def has_untested(self, trial_id: str) -> bool:
        """Whether best_model is that of this trial, and was not tested: an older version deleted checkpoints before."""
        exists = (self.folder / "best_model").exists()
        return exists and not self.facts["tests"] and not checkpoints_of(self.folder, trial_id)

    def write_best_result(self, log) -> dict:
        """Writes best_result.json, the metrics and hyperparameters of the best trial of a TrialLog. Returns them."""
        result = {name: log.best_trial()[name] for name in METRICS}
        result["config"] = {"train_loop_config": log.configs[log.best]}
        write_json(self.folder / "best_result.json", result)
        return result

    def add_test(self, trial_id: str, test_set, metrics: dict[str, float], of_questions: tuple) -> None:
        """Adds a test of best_model to run.json, and writes scores/test.npz.

        Args:
            trial_id: the trial of best_model.
            test_set: the questions, a TokenizedSquad.
            metrics: their means.
            of_questions: their losses and (exact match, F1), see intervals.scores_of.
        """
        scores = intervals.questions_of(test_set) | intervals.scores_of(*of_questions)
        intervals.save(self.folder / "scores" / "test.npz", scores)
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        test = {"date": date, "trial_id": trial_id, "questions": len(test_set), **metrics}
        self.facts["tests"].append(test | {"intervals": intervals.score_intervals(scores, self.setup.unanswerable)})
        self.write("running")

    def write(self, status: str) -> None:
        """Writes run.json."""
        self.facts["status"] = status
        write_json(self.folder / "run.json", self.facts)


def input_files(args: argparse.Namespace, model: Path) -> dict[str, dict]:
    """The files that a run reads: of "model", "dataset" and each folder of --warm_start, see provenance.hashes.

    "revision" is the commit of a snapshot of the hub, and None for a folder of the user.

    Args:
        args: the arguments of the run.
        model: the folder of the model.
    """
    data, files = loading.data_files(args.dataset)
    found = {"model": hashes(model, loading.model_files(model))}
    found["dataset"] = hashes(data, [*files["train"], *files["validation"]])
    for name, folder in ("model", model), ("dataset", data):
        found[name]["revision"] = None if Path(getattr(args, name)).is_dir() else folder.name
    for earlier in [] if args.resume else args.warm_start:  # --resume does not read them again
        found[f"warm_start {earlier}"] = hashes(Path(earlier), [*Path(earlier).glob(FILE)])
    return found


def short_ends(state: dict | None) -> list[int]:
    """The numbers of trials at which a search has ended before its last bracket was full, from a saved state."""
    brackets = state["scheduler"]["brackets"] if state else []
    trials = itertools.accumulate(b["added"] for b in brackets)
    return [n for n, b in zip(trials, brackets, strict=True) if b["rung"] > 0 and b["added"] < b["rungs"][0][0]]


def make_folder(folder: Path) -> None:
    """Makes a run folder. Raises BadInput where it exists already."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise BadInput(f"--run_name {folder.name}: {folder} exists already") from None


def hold_lock(folder: Path) -> None:
    """Locks a run folder until the program ends. In a requeued job it waits for the lock of a lost node."""
    # Not an attribute of Run: Tune pickles all that its callbacks refer to.
    atexit.register(lock(folder, LOCK_PATIENCE if "SLURM_RESTART_COUNT" in os.environ else 0).close)


def lock(folder: Path, patience: float):
    """An open file that is locked: two processes must not work on one run. Keep it until the program ends.

    Raises:
        BadInput: another process holds the lock for `patience` seconds.
    """
    file, deadline = open(folder / ".lock", "w"), time.time() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.time() > deadline:
                raise BadInput(f"--run_name {folder.name}: a process is at work on {folder}") from None
            time.sleep(1)
        except OSError as error:
            print(f"WARNING: this file system has no locks ({error.strerror}): start no second process on {folder}")
            return file

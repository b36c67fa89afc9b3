"""Creates or resumes the run folder, locks it, and loads its saved state."""

import argparse
import atexit
import fcntl
import json
import os
import time
from pathlib import Path

from hpo import arguments, search_space
from hpo.cluster.state import load_state
from hpo.errors import BadInput
from hpo.files import write_json
from hpo.plan.plan import forecast
from hpo.results.provenance import git_commit, versions
from hpo.squad import loading, lora
from hpo.squad.setup import Setup

LOCK_PATIENCE = 120  # seconds; after a node was lost, its lock may stay for a while


class Run:
    """A run folder, from its creation or resumption to the end of the search.

    `space` is the search space, `facts` the content of run.json, `state` the saved state of an earlier search or None,
    `slots` the number of trials that can run at a time, `needed` the bytes that the run needs at its peak.

    Args:
        args: the arguments of the run.
        space: the search space.
        setup: what all trials share.
        test_size: the number of questions that the best model is tested on.

    Raises:
        BadInput: the folder exists already, another process works on it, or it is not of the same search.
    """

    def __init__(self, args: argparse.Namespace, space: dict, setup: Setup, test_size: int):
        self.args, self.space, self.setup, self.folder, self.state = args, space, setup, setup.run_dir, None
        self.slots = arguments.slots(args)
        size = args.num_samples, args.max_t, args.reduction_factor, self.slots
        self.forecast = forecast(space, *size, args.known, args.baseline)
        r = search_space.largest_trial(space, args)["lora_r"]
        self.adapters = lora.count_trained(setup.model, r, args.lora_target_modules)  # of the largest rank
        self.needed = self.forecast.disk(*loading.disk_bytes(setup.model, self.adapters))
        self.facts = {
            "status": "running",
            "arguments": arguments.kept(args),
            "search_space": search_space.describe(space),
            "known_settings": json.loads(json.dumps(args.known)),  # as they are read back: a tuple is a list
            "environment": args.ranges,
            "grid": search_space.grid_size(space),
            "ds_config": setup.ds_config,
            "seed": args.seed,
            "questions": {"train": len(setup.train), "selection": len(setup.selection), "test": test_size},
            "versions": versions(),
            "git_commit": git_commit(arguments.ROOT),
        }
        if not args.resume:
            arguments.check_disk(self.folder.parent, self.needed)
            make_folder(self.folder)
        # Not an attribute: Tune pickles all that its callbacks refer to.
        atexit.register(lock(self.folder, LOCK_PATIENCE if "SLURM_RESTART_COUNT" in os.environ else 0).close)
        earlier = json.loads((self.folder / "run.json").read_text()) if args.resume else {}
        earlier.setdefault("known_settings", [])  # older runs have none
        self.done = earlier.get("status") == "done"
        if self.done:
            return
        if args.resume:
            search_space.check_same(space, dict(earlier["search_space"]))
            for name in ("ds_config", "questions", "known_settings"):
                if earlier.get(name) != self.facts[name]:
                    raise BadInput(f"--resume: {name} {self.facts[name]} is not that of the run, {earlier.get(name)}")
            try:
                self.state = load_state(self.folder)
            except RuntimeError as error:
                raise BadInput(f"--resume: {error}") from None
        self.write("running")

    def write(self, status: str) -> None:
        """Writes run.json."""
        self.facts["status"] = status
        write_json(self.folder / "run.json", self.facts)


def make_folder(folder: Path) -> None:
    """Makes a run folder. Raises BadInput where it exists already."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise BadInput(f"--run_name {folder.name}: {folder} exists already") from None


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

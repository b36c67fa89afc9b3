"""One trial on real Ray with the real DeepSpeed engine: what it trains with, pausing and resuming, warm processes."""

import dataclasses
import errno
import functools
import json
import math
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
import ray
import torch
from ray import tune
from ray.exceptions import RayActorError
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import raytune_bayesian
from conftest import ROOT
from hpo import arguments, checks, errors
from hpo.bohb.scheduler import HyperBandForBOHB
from hpo.bohb.searcher import TuneBOHB
from hpo.cluster import ray_private
from hpo.results import tables
from hpo.squad import data, evaluation, loading, models, ranks
from hpo.squad.setup import prepare as prepare_setup
from slurm_cluster import wait_for

pytestmark = pytest.mark.usefixtures("ray_without_gpu")


def prepare(model, dataset, *more):
    """What the trials of a search with these arguments share; its run_dir is set by `fit`."""
    args = arguments.parse("", ["--model", str(model), "--dataset", str(dataset), *map(str, more)])
    checks.check(args)
    setup, _ = prepare_setup(args, raytune_bayesian.MAX_LENGTH, raytune_bayesian.SELECTION_SIZE, 2)
    return setup


def fit(folder, trainable, setup, configs, resources, scheduler=None, max_failures=0, at_a_time=None, callbacks=()):
    """One trial a config; Tune's results in the order of the configs, those of trials that failed among them.

    `setup` is that of all trials, or a list with one for each.
    """
    if setup:
        setups = setup if isinstance(setup, list) else [setup] * len(configs)
        setup = [dataclasses.replace(one, run_dir=folder) for one in setups]
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trainable, setup=setup), resources),
        param_space={"i": tune.grid_search(list(range(len(configs)))), "configs": configs},
        tune_config=tune.TuneConfig(
            scheduler=scheduler, reuse_actors=True, max_concurrent_trials=at_a_time,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="ray", storage_path=str(folder), verbose=0, callbacks=list(callbacks),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
            failure_config=tune.FailureConfig(max_failures=max_failures),
        ),
    )  # fmt: skip
    return sorted(tuner.fit(), key=lambda result: result.config["i"])


def run_trials(folder, trainable, setup, configs, scheduler=None, cpus=1):
    """As fit, of trials of one process; raises the error of one that failed."""
    results = fit(folder, trainable, setup, configs, {"cpu": cpus}, scheduler)
    for result in results:
        if result.error:
            raise result.error
    return results


def run_in_ranks(config, train, setup):
    """As hpo.cluster.trial.run, but an error of a trial is raised and not reported."""
    from hpo.squad import ranks

    body = functools.partial(run_rank_of, train=train, setups=setup)
    ranks.of_this_process(body, max(1, setup[0].gpus_per_trial)).run(config)


def run_rank_of(config, group, train, setups):
    """One rank of a trial. The processes keep their `setups`, so that of the trial is chosen here."""
    from hpo.cluster.trial import run_rank

    run_rank(config["configs"][config["i"]], group, train, setups[config["i"]])


def trial(config, setup):
    import raytune_bayesian

    run_in_ranks(config, raytune_bayesian.train, setup)


def config(lr=1e-3, per_device_bs=2, wd=0.01, rungs=(1, 3, 8)):
    return {"train_loop_config": {"lr": lr, "per_device_bs": per_device_bs, "wd": wd}, "rungs": list(rungs)}


class PauseAtRungs(FIFOScheduler):
    """Pauses the first trial at these rungs."""

    def __init__(self, rungs):
        super().__init__()
        self.rungs, self.pauses = rungs, 0

    def on_trial_result(self, tune_controller, trial, result):
        if result["training_iteration"] in self.rungs and trial.config["i"] == 0:
            self.pauses += 1
            return TrialScheduler.PAUSE
        return TrialScheduler.CONTINUE

    def choose_trial_to_run(self, tune_controller):
        return next((t for t in tune_controller.get_trials() if t.status in (Trial.PAUSED, Trial.PENDING)), None)


def test_trial_reports_the_metrics_of_squad_v2(tmp_path, tiny_model, tiny_squad):
    """At its rung, where four of the ten questions that trials are compared on have no answer."""
    setup = prepare(tiny_model, tiny_squad, "--max_t", 2, "--num_train_epochs", 0.1, "--max_eval_samples", 10)
    none = {"answers": {"text": [], "answer_start": []}}
    references = [{**r, **none} if i < 4 else r for i, r in enumerate(setup.selection.references)]
    selection = dataclasses.replace(setup.selection, references=references)
    setup = dataclasses.replace(setup, selection=selection, unanswerable=True)
    (result,) = run_trials(tmp_path, trial, setup, [config(rungs=(2,))])
    metrics = result.metrics
    for both, one in {"exact_match": "exact", "f1": "f1"}.items():
        expected = 0.6 * metrics[f"HasAns_{one}"] + 0.4 * metrics[f"NoAns_{one}"]
        assert metrics[both] == pytest.approx(expected, abs=1e-12)
    reports = [json.loads(line) for line in (Path(result.path) / "result.json").read_text().splitlines()]
    assert [set(tables.V2_METRICS) <= set(report) for report in reports] == [False, True]


def trial_that_looks_at_its_files(config, setup):
    """Writes to the file `same` whether it goes on from the very files that it has written."""

    def inodes(folder):
        return str(sorted(file.stat().st_ino for file in Path(folder).rglob("*") if file.is_file()))

    def train(config, setup, trial):
        import raytune_bayesian

        def report(metrics, checkpoint=None):
            if checkpoint:
                written.write_text(inodes(checkpoint))
            report_to_tune(metrics, checkpoint)

        written, report_to_tune = setup.run_dir / Path(trial.folder).parent.name, trial.report  # of this trial
        trial.report = report
        if trial.checkpoint:
            print(written.read_text() == inodes(trial.checkpoint), file=open(setup.run_dir / "same", "a"))
        raytune_bayesian.train(config, setup, trial)

    run_in_ranks(config, train, setup)


def test_paused_trial_equals_one_that_ran_through(tmp_path, dropout_model, tiny_squad):
    """Same weights to the last bit and same eval_loss: optimizer, schedule, data order and RNG (dropout) carry on.

    Its checkpoints are written once. Tune would copy them.
    """
    setup = prepare(dropout_model, tiny_squad, "--max_t", 8, "--num_train_epochs", 1.5, "--max_eval_samples", 20)
    configs = [config(), config(), config(lr=2e-3)]
    scheduler = PauseAtRungs(
        [1, 3, 8]
    )  # the first, at 8 as where a search is cut before it knows that the trial is through
    paused, through, other = run_trials(tmp_path, trial_that_looks_at_its_files, setup, configs, scheduler)
    assert scheduler.pauses == 3
    assert (tmp_path / "same").read_text().split() == ["True"] * 2  # what is through does not train again
    assert paused.metrics["eval_loss"] == through.metrics["eval_loss"]
    iterations = paused.metrics_dataframe["training_iteration"].tolist()
    assert iterations == through.metrics_dataframe["training_iteration"].tolist() == list(range(1, 9))
    assert paused.metrics_dataframe["eval_loss"].tolist() == through.metrics_dataframe["eval_loss"].tolist()
    weights = [load_file(f"{result.checkpoint.path}/model.safetensors") for result in (through, paused)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert other.metrics["eval_loss"] != through.metrics["eval_loss"]  # or the comparison would say nothing


def spying_trial(config, setup):
    """Adds to each report what the DeepSpeed engine trains with, and what the process has cost so far."""
    import gc
    import os
    import time

    import deepspeed
    import psutil

    import raytune_bayesian

    started = time.time()
    first_step = []

    class Iterations(raytune_bayesian.Iterations):
        def on_step_end(self, *args, **kwargs):
            first_step or first_step.append(time.time() - started)
            super().on_step_end(*args, **kwargs)

        def report(self, checkpoint=None):
            engines = [e for e in gc.get_objects() if isinstance(e, deepspeed.DeepSpeedEngine)]
            groups = engines[-1].optimizer.param_groups
            self.metrics |= {
                "engines": len(engines),
                "micro_batch": engines[-1].train_micro_batch_size_per_gpu(),
                "initial_lr": groups[0]["initial_lr"],
                "lr": groups[0]["lr"],
                "wds": sorted({g["weight_decay"] for g in groups}),
                "zero_stage": engines[-1].zero_optimization_stage(),
                "first_step": first_step[0],
                "rss": psutil.Process().memory_info().rss / 2**20,
                "pid": os.getpid(),
                "process_started": psutil.Process().create_time(),
                "first_step_at": started + first_step[0],
                "saved": len(list(checkpoint.parent.glob("checkpoint-*"))) if checkpoint else 0,
            }
            super().report(checkpoint)

    original, raytune_bayesian.Iterations = raytune_bayesian.Iterations, Iterations
    try:
        run_in_ranks(config, raytune_bayesian.train, setup)
    finally:
        raytune_bayesian.Iterations = original


def test_deepspeed_engine_trains_with_the_trial_s_hyperparameters(tmp_path, tiny_model, tiny_squad):
    setup = prepare(tiny_model, tiny_squad, "--max_t", 4, "--num_train_epochs", 0.2, "--max_eval_samples", 10)
    configs = [config(3e-4, 1, 0.0, [2, 4]), config(7e-5, 2, 0.01, [2, 4])]
    for result, c in zip(run_trials(tmp_path, spying_trial, setup, configs), configs, strict=False):
        searched = c["train_loop_config"]
        frame = result.metrics_dataframe
        assert set(frame["engines"]) == {1}
        assert set(frame["micro_batch"]) == {searched["per_device_bs"]}
        assert set(frame["initial_lr"]) == {searched["lr"]}
        assert result.metrics["wds"] == sorted({0.0, searched["wd"]})  # biases and layer norms have none
        assert frame["lr"].is_monotonic_decreasing and frame["lr"].iloc[-1] == 0  # linear, over the full training
        assert frame["saved"].tolist() == [0, 1, 0, 1]  # at the rungs, nowhere else, and the Trainer keeps none


def test_twenty_trials_in_one_warm_process(tmp_path, demo_model, capsys):
    data = demo_model.parent / "squad"
    setup = prepare(
        demo_model, data, "--max_t", 2, "--max_train_samples", 16, "--num_train_epochs", 1, "--max_eval_samples", 5
    )
    configs = [config(1e-4 * (i + 1), 1 + i % 2, 0.01, [1, 2]) for i in range(20)]
    results = run_trials(tmp_path, spying_trial, setup, configs, cpus=2)
    assert len({r.metrics["pid"] for r in results}) == 1
    warm = sorted(r.metrics["first_step"] for r in results[1:])
    rss = [r.metrics["rss"] for r in results]
    fresh = results[0].metrics["first_step_at"] - results[0].metrics["process_started"]
    with capsys.disabled():
        print(f"\nfirst optimizer step after {fresh:.2f} s in a fresh process, {warm[len(warm) // 2]:.2f} s "
              f"in a warm one (median of {len(warm)}, worst {warm[-1]:.2f}); "
              f"memory {rss[4]:.0f} MB after 5 trials, {rss[-1]:.0f} after 20")  # fmt: skip
    assert warm[len(warm) // 2] < fresh / 2
    assert {r.metrics["engines"] for r in results} == {1}  # the engines of earlier trials are gone
    assert max(rss[-5:]) - max(rss[4:9]) < 40, rss  # MB; 15 trials that stay would be 114


class OneRung(FIFOScheduler):
    """All trials wait for each other after their first iteration; then one of the idle processes may get lost."""

    def __init__(self, lose):
        super().__init__()
        self.lose, self.pids, self.through = lose, [], False

    def on_trial_result(self, tune_controller, trial, result):
        self.pids.append(result["pid"])
        return TrialScheduler.PAUSE if len(self.pids) <= 8 else TrialScheduler.CONTINUE

    def choose_trial_to_run(self, tune_controller):
        trials = tune_controller.get_trials()
        waiting = [t for t in trials if t.status == Trial.PENDING]
        paused = [t for t in trials if t.status == Trial.PAUSED]
        if len(paused) == 8:
            self.through = True
            if self.lose:
                os.kill(self.pids[0], signal.SIGKILL)

                def lost():
                    actors = ray._private.state.actors().values()
                    return {p["State"] for p in actors if p["Pid"] == self.pids[0]} == {"DEAD"}

                wait_for("Ray to notice the lost process", lost, 400)
        return waiting[0] if waiting else paused[0] if paused and self.through else None


@pytest.mark.parametrize("lose", [False, True])
def test_each_slot_keeps_its_process(tmp_path, lose):
    """Over a rung, and from the start: none is started that is not used.

    One that is lost while it is idle costs no trial a try.
    """

    def three_iterations(config, setup):
        for i in range(3):
            time.sleep(0.2)
            tune.report({"x": i})

    scheduler = OneRung(lose)
    cores = len(os.sched_getaffinity(0))
    slots = cores // max(1, cores // 2)
    results = fit(tmp_path, three_iterations, None, list(range(8)), {"cpu": max(1, cores // 2)}, scheduler)
    assert [result.error for result in results] == [None] * 8
    started = [set(scheduler.pids[:8]), set(scheduler.pids)]
    assert [len(pids) for pids in started] == [slots, slots + lose], scheduler.pids


def test_a_process_that_hangs_while_it_starts_is_ended(tmp_path, monkeypatch):
    """Its trial, the only one, starts in another."""
    monkeypatch.setattr(ray_private.TuneController, "HANGS", 20)
    mark = tmp_path / "hung"

    class HangsOnce:
        """The first process that unpickles it, but for the search's own, does not get through.

        A class of the test: nothing is imported for it.
        """

        def __init__(self, searching):
            self.searching = searching
            if os.getpid() != searching and not mark.exists():
                mark.write_text(str(os.getpid()))
                time.sleep(1000)

        def __reduce__(self):
            return HangsOnce, (self.searching,)

    hangs = HangsOnce(os.getpid())

    def one_iteration(config, setup):
        tune.report({"searching": hangs.searching})

    (result,) = fit(tmp_path / "run", one_iteration, None, [None], {"cpu": 1}, max_failures=3)
    assert result.error is None
    assert int(mark.read_text()) not in (result.metrics["pid"], result.metrics["searching"])


class PausesAllForAWhile(FIFOScheduler):
    """As at a planned stop, from the first report until 20 steps of Tune after its trial's end."""

    pause_all = asked = False

    def on_trial_result(self, tune_controller, trial, result):
        self.pause_all, self.asked = self.pause_all or not self.asked, True
        return TrialScheduler.CONTINUE


class Starts(tune.Callback):
    def __init__(self, scheduler):
        self.scheduler, self.steps, self.starts = scheduler, 0, []

    def on_trial_start(self, iteration, trials, trial, **info):
        self.starts.append((trial.config["i"], self.scheduler.pause_all))

    def on_step_end(self, iteration, trials, **info):
        self.steps += self.scheduler.pause_all and not any(t.status == Trial.RUNNING for t in trials)
        self.scheduler.pause_all &= self.steps < 20


def test_no_trial_starts_before_a_planned_stop(tmp_path):
    """Not one that waits for a slot either, when a process is free."""

    def two_iterations(config, setup):
        for i in range(2):
            time.sleep(0.2)
            tune.report({"x": i})

    scheduler = PausesAllForAWhile()
    starts = Starts(scheduler)
    results = fit(
        tmp_path,
        two_iterations,
        None,
        list(range(3)),
        {"cpu": len(os.sched_getaffinity(0))},
        scheduler,
        callbacks=[starts],
    )
    assert [result.error for result in results] == [None] * 3 and starts.steps == 20
    assert sorted(starts.starts) == [(0, False), (1, False), (2, False)]


class Pids(tune.Callback):
    def __init__(self):
        self.pids = set()

    def on_trial_result(self, iteration, trials, trial, result, **info):
        self.pids.add(result["pid"])


@pytest.mark.parametrize("at_a_time", [1, 2])
def test_no_more_processes_than_trials_at_a_time(tmp_path, at_a_time):
    """Though there are slots for more: of searcher, scheduler and control loop together."""
    processes = Pids()

    def iterations(config):
        checkpoint = tune.get_checkpoint()
        done = int((Path(checkpoint.path) / "t").read_text()) if checkpoint else 0
        for t in range(done + 1, 5):
            time.sleep(0.2)
            with tempfile.TemporaryDirectory(dir=tmp_path, ignore_cleanup_errors=True) as folder:
                (Path(folder) / "t").write_text(str(t))
                tune.report(
                    {"x": config["x"], "training_iteration": t}, checkpoint=tune.Checkpoint.from_directory(folder)
                )

    results = tune.Tuner(
        tune.with_resources(iterations, {"cpu": len(os.sched_getaffinity(0)) / 4}),
        param_space={"x": tune.uniform(0, 1)},
        tune_config=tune.TuneConfig(
            metric="x", mode="min", num_samples=10, search_alg=TuneBOHB(seed=0, max_concurrent=at_a_time),
            reuse_actors=True,
            scheduler=HyperBandForBOHB(time_attr="training_iteration", max_t=4, reduction_factor=4,
            stop_last_trials=False),
        ),
        run_config=tune.RunConfig(name="ray", storage_path=str(tmp_path), verbose=0, callbacks=[processes]),
    ).fit()  # fmt: skip
    assert results.num_errors == 0
    assert 1 <= len(processes.pids) <= at_a_time


def test_a_stale_lock_of_a_killed_build_does_not_hang(tmp_path, tiny_model, tiny_squad, monkeypatch):
    """DeepSpeed would wait for ever for the lock of its CPU communication op: here the op is not built at all."""
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()

    def locked_trial(config, setup):
        os.environ["TORCH_EXTENSIONS_DIR"] = config["configs"][0]["extensions"]
        trial(config, setup)

    setup = prepare(tiny_model, tiny_squad, "--max_t", 1, "--num_train_epochs", 0.1, "--max_eval_samples", 10)
    configs = [config(rungs=[1]) | {"extensions": str(lock.parent.parent)}]
    result = run_trials(tmp_path / "run", locked_trial, setup, configs)[0]
    assert math.isfinite(result.metrics["eval_loss"])
    assert [p.name for p in lock.parent.parent.iterdir()] == ["deepspeed_shm_comm"]


def trial_after_a_lost_process(config, setup):
    """Its folder has what a lost process leaves: a checkpoint that Tune does not know, and one that is not complete."""
    from hpo.cluster.trial import trial_folder

    for name in ("checkpoint_000000", "saving-lost"):
        folder = trial_folder(setup[0]) / name
        folder.mkdir(parents=True)
        (folder / "left").touch()
    trial(config, setup)


def test_what_a_lost_process_has_left_hinders_no_trial(tmp_path, tiny_model, tiny_squad):
    setup = prepare(tiny_model, tiny_squad, "--max_t", 1, "--num_train_epochs", 0.1, "--max_eval_samples", 10)
    (result,) = run_trials(tmp_path, trial_after_a_lost_process, setup, [config(rungs=[1])])
    names = {path.name for path in (tmp_path / "ray").glob("*/*")}
    assert "checkpoint_000000" in names and not [name for name in names if name.startswith("saving-")]
    assert (
        not list((tmp_path / "ray").glob("*/*/left"))
        and (tmp_path / "ray").joinpath(result.path, "checkpoint_000000", "trainer_state.json").exists()
    )


# -- several ranks: two processes on the CPU, as no GPU is here
# ----------------------------------------------------------


def run_ranks(folder, trainable, setup, configs, scheduler=None, size=2, max_failures=0):
    """As fit, one at a time, of trials with a bundle for each rank."""
    bundles = tune.PlacementGroupFactory([{"CPU": 1 / size}] * size, strategy="STRICT_PACK")
    setups = setup if isinstance(setup, list) else [setup] * len(configs)
    setup = [dataclasses.replace(one, gpus_per_trial=size) for one in setups]
    return fit(folder, trainable, setup, configs, bundles, scheduler, max_failures, at_a_time=1)


def with_stage(setup, stage):
    ds_config = json.loads((ROOT / "ds_config.json").read_text())
    zero = {"stage": stage} | ({"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {})
    return dataclasses.replace(setup, ds_config=ds_config | {"zero_optimization": zero})


def losses(result):
    return result.metrics_dataframe["eval_loss"].tolist()


@pytest.fixture(scope="module")
def global_batch(tmp_path_factory, tiny_model, uneven_squad):
    """A setup, and what a trial of one rank gives at ZeRO stage 0 and at stage 2."""
    setup = prepare(tiny_model, uneven_squad, "--max_t", 8, "--num_train_epochs", 0.5, "--max_eval_samples", 20)
    setups = [with_stage(setup, stage) for stage in (0, 2)]
    return setup, run_ranks(tmp_path_factory.mktemp("one"), trial, setups, [config(per_device_bs=2)] * 2, size=1)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_ranks_equal_one_at_the_same_global_batch(tmp_path, global_batch, stage):
    """Also where the trial was paused at two rungs: to the last bit what it is without a pause."""
    setup, of_one = global_batch
    one = of_one[min(stage, 1)]
    scheduler = PauseAtRungs([1, 3])
    configs = [config(per_device_bs=1), config(per_device_bs=1)]
    two, through = run_ranks(tmp_path / "two", trial, with_stage(setup, stage), configs, scheduler)
    assert scheduler.pauses == 2
    assert losses(two) == losses(through) and len(losses(two)) == 8
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert two.metrics["exact_match"] == one.metrics["exact_match"]
    ends = [
        AutoModelForCausalLM.from_pretrained(result.checkpoint.path) for result in (one, two)
    ]  # as best_model is made
    for (name, weight), other in zip(ends[0].named_parameters(), ends[1].parameters(), strict=False):
        assert torch.allclose(weight, other, atol=1e-4), name


@pytest.mark.parametrize("stage, size", [(0, 1), (2, 1), (3, 2)])
def test_a_model_can_be_made_of_any_checkpoint(tmp_path, demo_model, tiny_squad, stage, size):
    """Weights are written once: as a model at the end, before that by DeepSpeed, of which a model is made where no
    trial came to the end.
    """
    setup = prepare(demo_model, tiny_squad, "--max_t", 3, "--num_train_epochs", 0.05, "--max_eval_samples", 20)
    ended, cut = [config(rungs=[3]), config(rungs=[2])]
    ended, cut = run_ranks(tmp_path / "ray", trial, with_stage(setup, stage), [ended, cut], size=size)
    files = [[path.name for path in Path(result.checkpoint.path).rglob("*")] for result in (ended, cut)]
    assert "model.safetensors" in files[0] and not [name for name in files[0] if name.endswith("_states.pt")]
    assert "model.safetensors" not in files[1] and [name for name in files[1] if name.endswith("_states.pt")]
    sizes = [sum(path.stat().st_size for path in Path(result.checkpoint.path).rglob("*")) for result in (ended, cut)]
    assert sizes[0] < sizes[1] / 2 and 0.5 < sizes[1] / loading.checkpoint_bytes(demo_model) < 1
    with pytest.raises(FileNotFoundError, match="no checkpoint, or no more"):  # not "trained to the end"
        models.is_of_full_training(tmp_path / "not mounted")
    for result, iteration in ((ended, 3), (cut, 2)):
        models.save_best_model(Path(result.checkpoint.path), demo_model, "fp32", tmp_path / f"model-{iteration}")
        names = load_file(tmp_path / f"model-{iteration}" / "model.safetensors").keys()
        assert names == load_file(demo_model / "model.safetensors").keys()  # tied weights are there once
        model = evaluation.fuse_gelu(AutoModelForCausalLM.from_pretrained(tmp_path / f"model-{iteration}"))
        loss, _ = evaluation.evaluate_loss(model, setup.selection, 0, raytune_bayesian.EVAL_TOKENS)
        assert loss == pytest.approx(losses(result)[iteration - 1], rel=1e-5)


def harmed_trial(config, setup):
    """Does what `harm` says to the process of rank 1, once, after the first report with a checkpoint."""
    import os
    import signal
    import threading
    import time
    from pathlib import Path

    import psutil

    c = config["configs"][config["i"]]

    def harm():
        while not list(Path(c["folder"]).glob("ray/*/checkpoint_*")):
            time.sleep(0.05)
        (rank,) = [
            p
            for p in psutil.Process(os.getppid()).children(recursive=True)
            if "".join(p.cmdline()).startswith("ray::Rank")
        ]
        rank.send_signal(signal.SIGKILL)
        rank.wait(60)
        Path(c["folder"], "harmed").write_text(str(rank.pid))

    if "folder" in c and not os.path.exists(c["folder"] + "/started"):
        Path(c["folder"], "started").touch()
        threading.Thread(target=harm, daemon=True).start()
    trial(config, setup)


def test_a_dead_rank_costs_the_trial_its_work_since_the_last_rung(tmp_path, tiny_model, tiny_squad):
    """kill -9: the trial goes on from its checkpoint, in other processes, and comes to what it would have come to."""
    setup = prepare(tiny_model, tiny_squad, "--max_t", 8, "--num_train_epochs", 4, "--max_eval_samples", 45)
    c = config(per_device_bs=1, rungs=(1, 8))
    harmed, through = run_ranks(tmp_path, harmed_trial, setup, [c | {"folder": str(tmp_path)}, c], max_failures=1)
    assert (tmp_path / "harmed").read_text() and harmed.error is None and through.error is None
    assert harmed.metrics["eval_loss"] == through.metrics["eval_loss"] and harmed.metrics["training_iteration"] == 8


def failing_trial(config, setup):
    import raytune_bayesian

    run_in_ranks(config, fails_in_rank_1(raytune_bayesian.train), setup)


def fails_in_rank_1(train):
    """A `train` in which rank 1 cannot read the data of trials with "bad"."""

    def train_with_bad_data(config, setup, trial):
        if config["bad"] and trial.group.rank == 1:
            setup = dataclasses.replace(setup, train=Unreadable(**vars(setup.train)))
        train(config, setup, trial)

    return train_with_bad_data


class Unreadable(data.TokenizedSquad):
    def __getitem__(self, i):
        raise ValueError("cannot read question 7")


@pytest.mark.parametrize(
    "raised, killed, kind, text",
    [
        (
            [OSError(errno.ENOSPC, "No space left on device"), FileNotFoundError(2, "gone")],
            False,
            OSError,
            "No space left",
        ),
        (
            [RuntimeError("gloo: Connection closed by peer"), torch.OutOfMemoryError("CUDA out of memory")],
            False,
            errors.TrialFailed,
            "CUDA out of memory",
        ),
        (
            [ValueError("no"), RuntimeError("gloo: Connection reset by peer")],
            False,
            errors.TrialFailed,
            "ValueError no",
        ),
        ([RuntimeError("gloo: Connection closed by peer"), RayActorError()], False, ConnectionError, "a rank is lost"),
        ([RuntimeError("gloo: Connection closed by peer"), RayActorError()], True, errors.TrialFailed, "out of memory"),
        (
            [torch.distributed.DistBackendError("NCCL error: unhandled system error")],
            False,
            ConnectionError,
            "NCCL error",
        ),
        ([RuntimeError("CUDA error: an illegal memory access")], False, ConnectionError, "CUDA error"),
        (
            [ConnectionError("a rank is lost"), RuntimeError("CUDA error: device-side assert triggered")],
            False,
            errors.TrialFailed,
            "device-side assert",
        ),
        (
            [RuntimeError("NCCL error"), RuntimeError("CUDA error: no kernel image is available")],
            False,
            RuntimeError,
            "no kernel image",
        ),
    ],
)
def test_what_to_make_of_errors(raised, killed, kind, text):
    """A full disk is waited for, a lost rank or a broken GPU is the node's fault, and all else the trial's, which is
    not tried again.
    An error of the installation comes out as it is."""
    cause = ranks.cause_of(raised, killed)
    assert type(cause) is kind and text in str(cause)


def test_what_one_rank_alone_fails_at_is_the_trial_s_failure(tmp_path, tiny_model, tiny_squad):
    """The reason comes from that rank, and the next trial has processes of its own. NaN is what all ranks see."""
    setup = prepare(tiny_model, tiny_squad, "--max_t", 4, "--num_train_epochs", 0.2, "--max_eval_samples", 45)
    good = config(per_device_bs=1, rungs=(1, 4)) | {"bad": False}
    nan = config(lr=1e30, per_device_bs=1, rungs=(1, 4)) | {"bad": False}
    results = run_ranks(tmp_path, failing_trial, setup, [nan, good | {"bad": True}, good])
    assert "eval_loss is nan" in str(results[0].error) and results[2].error is None
    assert "TrialFailed: ValueError cannot read question 7" in str(results[1].error), results[1].error

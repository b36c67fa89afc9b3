"""What has to be measured on a GPU, in parts; bench/gpu.sh runs all of them, each with its limit of time.

    .venv/bin/python bench/gpu.py speed              # one part; prints a table, and writes speed.txt and speed.json to gpu-results
    .venv/bin/python bench/gpu.py speed --tiny       # at a size that says nothing, without a GPU too

Parts: fp16, pause, speed, launches, memory, evaluation. What a part compares are jobs, each in a process of its own: DeepSpeed keeps global
state of autocast. Models are the demo's, or random ones of BLOOM-560M's shape with random tokens, as long as SQuAD's questions are.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

DEMO = ROOT / "demo"
BLOOM = {"vocab_size": 250_880, "hidden_size": 1024, "n_layer": 24, "n_head": 16}
TINY_BLOOM = {"vocab_size": 400, "hidden_size": 32, "n_layer": 2, "n_head": 4}
MEDIAN, SPREAD, LONGEST, ANSWER = 177, 0.395, 835, 4  # tokens of SQuAD's prompts: log-normal, with 339 at 95 %; of an answer with EOS
PADDED = 512  # tokens of a sequence of the textbook
KINDS = {"fp32": ("fp32", 0), "fp16, stage 0": ("fp16", 0), "fp16, stage 1": ("fp16", 1), "bf16, stage 0": ("bf16", 0)}


def at_size(tiny: bool, full, small):
    return small if tiny else full


# ---------------------------------------------------------------------------------------------------------------------
# jobs: each prints one line of JSON


def ds_config(stage: int) -> dict:
    return json.loads((ROOT / "ds_config.json").read_text()) | {"zero_optimization": {"stage": stage}}


def cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def bloom(tiny: bool):
    """A random model, made where that is fast; fp32, on the CPU as the pretrained one of a trial."""
    import torch
    import transformers

    config = transformers.BloomConfig(**at_size(tiny, BLOOM, TINY_BLOOM), hidden_dropout=0.0, attention_dropout=0.0, pad_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    with torch.device("cuda" if cuda() else "cpu"):
        model = transformers.BloomForCausalLM(config)
    return model.cpu()


def questions(count: int, tiny: bool, length: int | None = None):
    """Random tokens in sequences of SQuAD's lengths, or of one length."""
    import numpy as np

    from hpo.squad import data as squad_data

    rng = np.random.default_rng(0)
    median, longest = at_size(tiny, MEDIAN, 20), at_size(tiny, LONGEST, 40)
    lengths = np.clip(rng.lognormal(math.log(median), SPREAD, count), ANSWER + 4, longest).astype(int) if length is None else np.full(count, length)
    return squad_data.TokenizedSquad(
        tokens=rng.integers(3, at_size(tiny, BLOOM, TINY_BLOOM)["vocab_size"], lengths.sum(), dtype=np.int32),
        offsets=np.cumsum([0, *lengths]),
        prompt_lengths=lengths - ANSWER,
        references=[{"id": str(i), "answers": {"text": ["none"], "answer_start": [0]}} for i in range(count)],
    )


def no_tokenizer(*_):
    """What evaluation takes of a tokenizer, where the tokens mean nothing."""
    return types.SimpleNamespace(pad_token_id=0, eos_token_id=1, batch_decode=lambda answers, **_: [""] * len(answers))


def learn(kind: str, stage: int, steps: int, factor: float, tiny: bool) -> dict:
    """eval_loss of the demo's model after so many steps with the loss multiplied by a factor."""
    import launches
    import transformers

    import raytune_bayesian
    from hpo.squad import data as squad_data
    from hpo.squad import evaluation, precision, ranks

    class Scaled(raytune_bayesian.Trainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * factor

    group = ranks.Group()
    transformers.set_seed(1)
    tokenizer = raytune_bayesian.load_tokenizer(DEMO / "model")
    train, selection = squad_data.hold_out(squad_data.read_squad(squad_data.find_squad_files(DEMO / "squad")["train"]), at_size(tiny, 200, 20), 0)
    train, selection = squad_data.tokenize(train, tokenizer, 1024, True), squad_data.tokenize(selection, tokenizer, 1024, False)
    order = raytune_bayesian.data_order(train.lengths, 1.0, 2, 0)[: 2 * steps]
    run = {"ds_config": ds_config(stage), "precision": kind, "seed": 1}
    model = raytune_bayesian.pretrained(DEMO / "model")
    with tempfile.TemporaryDirectory() as folder:
        trainer = raytune_bayesian.make_trainer(model, train, order, {"lr": 1e-4, "wd": 0.0, "per_device_bs": 2}, run, group, folder, tokenizer.pad_token_id)
        trainer.__class__ = Scaled
        watch = launches.Watch(trainer, lambda engine: precision.Gradients(engine, ds_config(stage), kind, None, 1))
        trainer.train()
    with precision.autocast(ds_config(stage), kind, watch.gradients.engine.device.type):
        loss = evaluation.evaluate_loss(trainer.model, selection, tokenizer.pad_token_id, raytune_bayesian.EVAL_TOKENS)
    return {"eval_loss": loss, **watch.gradients.summary()}


def trial(run: dict, rungs: list[int], folder: Path, pause: int | None = None, checkpoint: Path | None = None, iterations=None) -> tuple[list, Path]:
    """A trial without Tune, from a checkpoint or from its start, to its end or to a pause after so many iterations.

    Args:
        folder: for its checkpoints.
        iterations: a subclass of raytune_bayesian.Iterations.

    Returns:
        Its reports, and its last checkpoint.
    """
    import raytune_bayesian
    from hpo.squad import ranks

    raytune_bayesian.GROUPS or raytune_bayesian.GROUPS.append(ranks.Group())
    reports, kept = [], folder / "none"

    def report(metrics, checkpoint=None):
        nonlocal kept
        reports.append(metrics)
        if checkpoint:
            kept = folder / f"after_{metrics['training_iteration']}"
            shutil.move(checkpoint.path, kept)
        if metrics["training_iteration"] == pause:
            raise SystemExit  # as Tune pauses a trial

    saved = checkpoint and raytune_bayesian.tune.Checkpoint.from_directory(checkpoint)
    with contextlib.ExitStack() as stack:
        for name, value in {"report": report, "get_checkpoint": lambda: saved}.items():
            stack.enter_context(mock.patch.object(raytune_bayesian.tune, name, value))
        stack.enter_context(mock.patch.object(raytune_bayesian, "Iterations", iterations or raytune_bayesian.Iterations))
        stack.enter_context(mock.patch.object(raytune_bayesian.resume, "saving_folder", tempfile.TemporaryDirectory))
        stack.enter_context(contextlib.suppress(SystemExit))
        config = {"train_loop_config": {"lr": 1e-4, "per_device_bs": 2, "wd": 0.01}, "rungs": rungs}
        raytune_bayesian.train_rank(config, run, raytune_bayesian.GROUPS[0])
    return reports, kept


def resume(kind: str, stage: int, tiny: bool) -> dict:
    """A trial of the demo's model that runs through, twice, and one that is paused and resumed: whether losses and weights are the same bits."""
    import torch
    from safetensors.torch import load_file

    import raytune_bayesian
    from hpo.squad import data as squad_data

    tokenizer = raytune_bayesian.load_tokenizer(DEMO / "model")
    train, selection = squad_data.hold_out(squad_data.read_squad(squad_data.find_squad_files(DEMO / "squad")["train"]), 40, 0)
    run = {
        "model": DEMO / "model", "train": squad_data.tokenize(train[: at_size(tiny, 80, 12)], tokenizer, 1024, True),
        "selection": squad_data.tokenize(selection, tokenizer, 1024, False), "ds_config": ds_config(stage), "precision": kind, "seed": 1, "max_t": 4,
        "num_train_epochs": 1.0, "metric": "eval_loss", "max_new_tokens": 8, "cpus_per_trial": 1, "gpus_per_trial": 0, "run_dir": "/nonexistent",
    }  # fmt: skip
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("through", "again", "paused"):
            (own := Path(folder) / name).mkdir()
            if name == "paused":
                before, checkpoint = trial(run, [2, 4], own, pause=2)
                after, checkpoint = trial(run, [2, 4], own, checkpoint=checkpoint)
                reports = before + after
            else:
                reports, checkpoint = trial(run, [2, 4], own)
            found[name] = [r["eval_loss"] for r in reports], load_file(checkpoint / "model.safetensors")
    losses, weights = found["through"]
    equal = {name: losses == its and all(torch.equal(weights[w], own[w]) for w in weights) for name, (its, own) in found.items()}
    return {"losses": {name: its for name, (its, _) in found.items()}, "equal": equal}


def pace(way: str, kind: str, stage: int, batch_sizes: list[int], together: int, meeting: str, number: int, tiny: bool) -> dict:
    """Optimizer steps a second by batch size, while `together` processes do the same."""
    import launches
    import torch

    wait = torch.cuda.synchronize if cuda() else lambda: None
    warm, window = at_size(tiny, (4, 5), (1, 0.2))  # steps, seconds

    class Clock(launches.Watch):
        def on_step(self, step, control):
            if step == warm:
                wait()
                (Path(meeting) / f"{batch_size}-{number}").touch()
                while len(list(Path(meeting).glob(f"{batch_size}-*"))) < together:
                    time.sleep(0.01)
                self.began = time.perf_counter()
            elif step > warm and step % at_size(tiny, 5, 1) == 0 and time.perf_counter() > self.began + window:
                wait()
                self.rate = (step - warm) / (time.perf_counter() - self.began)
                control.should_training_stop = True

    rates, model = {}, bloom(tiny)
    for batch_size in batch_sizes:
        data = questions(at_size(tiny, 2000, 40) * batch_size, tiny)
        with tempfile.TemporaryDirectory() as folder:
            padded = at_size(tiny, PADDED, 40)
            clock = Clock(*launches.make(way, kind, stage, model, data, batch_size, folder, padded))
            clock.trainer.train()
            clock.trainer.model_wrapped.destroy()
        rates[batch_size] = clock.rate
    peak = torch.cuda.max_memory_allocated() if cuda() else 0
    return {"rates": rates, "peak": peak}


def profiled(way: str, kind: str, stage: int, tiny: bool) -> dict:
    """Calls of CUDA's runtime in a step, by the profiler."""
    import launches
    import torch

    first, steps = at_size(tiny, (5, 5), (2, 2))
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda()
    profiler = torch.profiler.profile(activities=activities)

    class Profile(launches.Watch):
        def on_step(self, step, control):
            if step == first:
                profiler.start()
                self.began = time.perf_counter()
            elif step == first + steps:
                if cuda():
                    torch.cuda.synchronize()
                self.seconds = time.perf_counter() - self.began
                profiler.stop()
                control.should_training_stop = True

    with tempfile.TemporaryDirectory() as folder:
        data = questions(2 * (first + steps + 2), tiny)
        profile = Profile(*launches.make(way, kind, stage, bloom(tiny), data, 2, folder, at_size(tiny, PADDED, 40)))
        profile.trainer.train()
    events = profiler.key_averages()

    def calls(*names):
        return sum(event.count for event in events if event.key.startswith(names)) / steps

    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    return {
        "launches": calls("cudaLaunchKernel", "cuLaunchKernel"), "copies": calls("cudaMemcpyAsync", "cudaMemsetAsync"), "to the CPU": calls("Memcpy DtoH"),
        "waits": calls("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"), "items": calls("aten::item"),
        "GPU ms": sum(event.self_device_time_total for event in kernels) / 1000 / steps, "ms": 1000 * profile.seconds / steps,
        "most": [[event.key[:80], event.count / steps] for event in sorted(events, key=lambda event: -event.count)[:40]],
    }  # fmt: skip


def counted(row: str, tiny: bool) -> dict:
    """The number of bench/launches.py for the same step."""
    import launches

    return launches.row(row, at_size(tiny, launches.LAYERS, 2))


def peaks(kind: str, stage: int, tiny: bool) -> dict:
    """Most bytes on the GPU in training, evaluation and resume of a trial, and the forecast of each."""
    import torch

    import raytune_bayesian
    from hpo.plan import memory
    from hpo.squad import data as squad_data
    from hpo.squad import evaluation

    found = {"resume": 0, "training": 0, "evaluation": 0, "start": 0, "reserved": 0}

    def note(name):
        if cuda():
            torch.cuda.synchronize()
            found[name] = max(found[name], torch.cuda.max_memory_allocated())
            found["reserved"] = max(found["reserved"], torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()

    class Iterations(raytune_bayesian.Iterations):
        def on_train_begin(self, *args, **kwargs):
            note("resume" if self.checkpoint else "start")
            super().on_train_begin(*args, **kwargs)

        def on_step_end(self, *args, **kwargs):
            note("training")
            super().on_step_end(*args, **kwargs)
            note("evaluation")

    length = at_size(tiny, LONGEST, 40)
    room, eval_tokens = squad_data.ANSWER_ROOM, raytune_bayesian.EVAL_TOKENS
    run = {
        "model": "/nonexistent", "train": questions(16, tiny, length), "selection": questions(at_size(tiny, 20, 4), tiny, length),
        "ds_config": ds_config(stage), "precision": kind, "seed": 1, "max_t": 2, "num_train_epochs": 1.0, "metric": "eval_loss",
        "max_new_tokens": room, "cpus_per_trial": 1, "gpus_per_trial": 0, "run_dir": "/nonexistent",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(raytune_bayesian, "load_tokenizer", no_tokenizer):
        model = evaluation.fuse_gelu(bloom(tiny))
        model.config.save_pretrained(folder)
        forecast = memory.forecast(folder, ds_config(stage), kind, 2, length, ANSWER, eval_tokens, room)
        with mock.patch.object(raytune_bayesian, "pretrained", lambda _: model):
            trial_folder = Path(folder)
            _, checkpoint = trial(run, [1, 2], trial_folder, pause=1, iterations=Iterations)
            size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
            model = evaluation.fuse_gelu(bloom(tiny))
            if cuda():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            trial(run, [1, 2], trial_folder, checkpoint=checkpoint, iterations=Iterations)
    base = forecast.weights + forecast.optimizer
    expected = {"training": base + max(forecast.backward, forecast.step), "evaluation": base + forecast.evaluation, "resume": base + forecast.resume}
    return {"measured": found, "forecast": expected, "with reserve": forecast.peak, "checkpoint": size}


def answer(kind: str, tiny: bool) -> dict:
    """Questions a second of evaluation: eval_loss, and answers of so many tokens; a random model ends none of them earlier."""
    import torch

    import raytune_bayesian
    from hpo.squad import evaluation, precision

    device = "cuda" if cuda() else "cpu"
    model, data, rates = evaluation.fuse_gelu(bloom(tiny)).to(device), questions(at_size(tiny, 500, 6), tiny), {}
    ways = {"eval_loss": lambda: evaluation.evaluate_loss(model, data, 0, raytune_bayesian.EVAL_TOKENS)}
    for tokens in (3, 16):
        ways[f"answers of {tokens} tokens"] = lambda tokens=tokens: evaluation.predict(model, no_tokenizer(), data, raytune_bayesian.EVAL_TOKENS, tokens)
    with precision.autocast(ds_config(0), kind, device):
        for name, way in ways.items():
            seconds = []
            for _ in range(at_size(tiny, 3, 1)):
                began = time.perf_counter()
                way()  # ends with numbers on the CPU
                seconds.append(time.perf_counter() - began)
            rates[name] = len(data) / statistics.median(seconds)
    return {"rates": rates, "peak": torch.cuda.max_memory_allocated() if cuda() else 0}


JOBS = {job.__name__: job for job in (learn, resume, pace, profiled, counted, peaks, answer)}


def run_jobs(name: str, settings: list[dict], at_once: int = 1) -> list[dict]:
    """Runs a job with each of the settings, so many at the same time; a job that fails gives {"failed": its last line}."""
    results = []
    for start in range(0, len(settings), at_once):
        running = []
        for setting in settings[start : start + at_once]:
            command = [sys.executable, __file__, "--job", name, json.dumps(setting)]
            log = tempfile.TemporaryFile("w+")
            running.append((subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True), log))
        for process, log in running:
            output, _ = process.communicate()
            log.seek(0)
            lines = log.read().splitlines()
            if process.returncode:
                print(f"{name}: " + "\n".join(lines[-30:]), file=sys.stderr, flush=True)
            results.append({"failed": (lines or ["no output"])[-1][:300]} if process.returncode else json.loads(output.splitlines()[-1]))
    return results


# ---------------------------------------------------------------------------------------------------------------------
# parts: each returns the lines of its table and its numbers


def side_by_side(tiny: bool) -> int:
    return at_size(tiny, max(1, len(os.sched_getaffinity(0)) // 2), 2)


def table(names: list[str], results: list[dict], columns: list[str], cells) -> list[str]:
    """A line for each result; `cells` gives the texts of one."""
    lines = [f"{'':<38}" + "".join(f"{column:>18}" for column in columns)]
    for name, result in zip(names, results):
        texts = [result["failed"]] if "failed" in result else cells(result)
        lines.append(f"{name:<38}" + "".join(f"{text:>18}" for text in texts))
    return lines


def fp16(tiny: bool) -> tuple[list[str], list[dict]]:
    """Final eval_loss of the demo's model in each precision; with a small loss the gradients are as small as in a real fine-tuning."""
    cases = [(200, 1.0), (100, 0.01)] if not tiny else [(3, 0.01)]
    settings = [{"kind": kind, "stage": stage, "steps": steps, "factor": factor, "tiny": tiny} for steps, factor in cases for kind, stage in KINDS.values()]
    results = run_jobs("learn", settings, side_by_side(tiny))
    names = [f"{name}, {steps} steps, loss x {factor:g}" for steps, factor in cases for name in KINDS]
    columns = ["eval_loss", "gradient norm", "loss scale", "skipped steps"]
    cells = lambda r: [f"{r['eval_loss']:.4f}", f"{r['grad_norm']:.4f}", f"{r['loss_scale'] or 1:g}", f"{r['skipped_steps']}"]  # noqa: E731
    return table(names, results, columns, cells), results


def pause(tiny: bool) -> tuple[list[str], list[dict]]:
    """Whether a trial that is paused and resumed ends with the same bits; through, twice, says whether the GPU itself repeats its bits."""
    kinds = {name: KINDS[name] for name in KINDS if not tiny or "fp16" in name}
    results = run_jobs("resume", [{"kind": kind, "stage": stage, "tiny": tiny} for kind, stage in kinds.values()], side_by_side(tiny))
    cells = lambda r: [str(r["equal"]["again"]), str(r["equal"]["paused"]), f"{r['losses']['through'][-1]:.6f}", f"{r['losses']['paused'][-1]:.6f}"]  # noqa: E731
    return table(list(kinds), results, ["same bits: again", "paused, resumed", "eval_loss", "resumed"], cells), results


def speed(tiny: bool) -> tuple[list[str], list[dict]]:
    """Optimizer steps a second of all processes together, of BLOOM-560M's shape."""
    rows = [("ours", "fp16", 0, 1), ("textbook", "fp16", 0, 1), ("ours", "bf16", 0, 1), ("ours", "bf16", 0, 2), ("ours", "bf16", 0, 4)]
    if tiny:
        rows = [("textbook", "fp16", 0, 1), ("ours", "fp16", 0, 2)]
    names, results = [], []
    for way, kind, stage, together in rows:
        with tempfile.TemporaryDirectory() as meeting:
            setting = {"way": way, "kind": kind, "stage": stage, "batch_sizes": [1, 2], "together": together, "meeting": meeting, "tiny": tiny}
            found = run_jobs("pace", [setting | {"number": i} for i in range(together)], together)
        failed = [f for f in found if "failed" in f]
        names.append(f"{way}, {kind}, {together} at the same time")
        rates = None if failed else {size: sum(f["rates"][size] for f in found) for size in found[0]["rates"]}
        results.append(failed[0] if failed else {"rates": rates, "peak": max(f["peak"] for f in found)})
    columns = ["batch 1: steps/s", "batch 2: steps/s", "questions/s", "GB of each"]
    cells = lambda r: [f"{r['rates']['1']:.2f}", f"{r['rates']['2']:.2f}", f"{2 * r['rates']['2']:.1f}", f"{r['peak'] / 1e9:.2f}"]  # noqa: E731
    return table(names, results, columns, cells), results


def launches(tiny: bool) -> tuple[list[str], list[dict]]:
    """What bench/launches.py counts against the profiler's count, in a step of two questions."""
    rows = {"ours": ("ours", "fp16", 0), "ours, bf16": ("ours", "bf16", 0), "ours, stage 1": ("ours", "fp16", 1), "textbook": ("textbook", "fp16", 0)}
    if tiny:
        rows = {"ours": rows["ours"]}
    settings = [{"way": way, "kind": kind, "stage": stage, "tiny": tiny} for way, kind, stage in rows.values()]
    results = run_jobs("profiled", settings, side_by_side(tiny))
    for result, count in zip(results, run_jobs("counted", [{"row": row, "tiny": tiny} for row in rows], side_by_side(tiny))):
        result["counted"], result["counted syncs"] = (math.nan, math.nan) if "failed" in count else (sum(count["launches"].values()), count["syncs"])
    fields = ["counted", "launches", "copies", "counted syncs", "to the CPU", "waits", "GPU ms", "ms"]
    lines = table(list(rows), results, fields, lambda r: [f"{r[field]:.1f}" for field in fields])
    return lines + ["milliseconds are with the profiler at work"], results


def memory(tiny: bool) -> tuple[list[str], list[dict]]:
    """Most memory of a trial against the forecast, batch 2, the longest questions."""
    kinds = {name: KINDS[name] for name in ("fp16, stage 0", "fp16, stage 1")[: at_size(tiny, 2, 1)]}
    results = run_jobs("peaks", [{"kind": kind, "stage": stage, "tiny": tiny} for kind, stage in kinds.values()], len(kinds))
    lines = []
    for name, result in zip(kinds, results):
        if "failed" in result:
            lines += table([name], [result], [], None)[1:]
            continue
        forecast, measured = result["forecast"], result["measured"]
        parts = [(f"{name}: {part}", {"forecast": forecast[part], "measured": measured[part]}) for part in forecast]
        parts.append((f"{name}: all, as reserved", {"forecast": result["with reserve"], "measured": measured["reserved"]}))
        cells = lambda r: [f"{r['forecast'] / 1e9:.3f}", f"{r['measured'] / 1e9:.3f}", f"{r['forecast'] / r['measured']:.2f}" if r["measured"] else "-"]  # noqa: E731
        lines += table([part for part, _ in parts], [row for _, row in parts], ["forecast, GB", "measured, GB", "ratio"], cells)
    return lines, results


def evaluation(tiny: bool) -> tuple[list[str], list[dict]]:
    """Questions a second of evaluation, of BLOOM-560M's shape, under autocast."""
    kinds = ["fp16", "bf16"][: at_size(tiny, 2, 1)]
    results = run_jobs("answer", [{"kind": kind, "tiny": tiny} for kind in kinds])
    columns = next((list(result["rates"]) for result in results if "rates" in result), [])
    cells = lambda r: [f"{rate:.1f}" for rate in r["rates"].values()] + [f"{r['peak'] / 1e9:.2f}"]  # noqa: E731
    lines = [f"{'':<10}" + "".join(f"{column:>24}" for column in [*columns, "GB"])]
    for kind, result in zip(kinds, results):
        lines.append(f"{kind:<10}" + "".join(f"{text:>24}" for text in ([result["failed"]] if "failed" in result else cells(result))))
    return lines, results


PARTS = {part.__name__: part for part in (fp16, pause, speed, launches, memory, evaluation)}


def main(name: str, tiny: bool, out: Path) -> None:
    part, began = PARTS[name], time.time()
    lines, results = part(tiny)
    text = "\n".join([f"{name}: {part.__doc__}", *lines, f"({time.time() - began:.0f} s)"])
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.txt").write_text(text + "\n")
    (out / f"{name}.json").write_text(json.dumps(results, indent=1))
    print(text, flush=True)
    if any("failed" in result for result in results):
        sys.exit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="?", choices=PARTS)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")))
    parser.add_argument("--job", nargs=2)
    args = parser.parse_args()
    if args.job:
        import raytune_bayesian  # noqa: F401  before all that it imports: sets up Ray's environment

        if not cuda():
            import launches

            launches.allow_fp16()
        print(json.dumps(JOBS[args.job[0]](**json.loads(args.job[1]))))
    else:
        main(args.part, args.tiny, args.out)

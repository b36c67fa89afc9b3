"""What has to be measured on a GPU, in parts. bench/gpu.sh runs all of them, each with its time limit.

    .venv/bin/python bench/gpu.py speed              # one part: a table, also in gpu-results
    .venv/bin/python bench/gpu.py speed --tiny       # at a size that says nothing, without a GPU too

Parts: fp16, pause, speed, launches, memory, evaluation. A part compares jobs. Each job is a process of its own, because
DeepSpeed keeps global state of autocast. Models are the demo's, or random ones of BLOOM-560M's shape with random
tokens, as long as SQuAD's questions are.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from unittest import mock

BLOOM = {"vocab_size": 250_880, "hidden_size": 1024, "n_layer": 24, "n_head": 16}
TINY_BLOOM = {"vocab_size": 400, "hidden_size": 32, "n_layer": 2, "n_head": 4}
MEDIAN, SPREAD, LONGEST = 177, 0.395, 835  # tokens of SQuAD's prompts: log-normal, 339 at 95 %
ANSWER = 4  # tokens of an answer, EOS included
PADDED = 512  # tokens of a sequence of the textbook
KINDS = {  # precision, ZeRO stage
    "fp32": ("fp32", 0),
    "fp16, stage 0": ("fp16", 0),
    "fp16, stage 1": ("fp16", 1),
    "bf16, stage 0": ("bf16", 0),
}


def at_size(tiny: bool, full, small):
    """A number of the benchmark, or of --tiny."""
    return small if tiny else full


# ---------------------------------------------------------------------------------------------------------------------
# jobs: each prints one line of JSON


def cuda() -> bool:
    """Whether there is a GPU."""
    import torch

    return torch.cuda.is_available()


def bloom(tiny: bool):
    """A random model, made where that is fast; fp32, on the CPU as the pretrained one of a trial."""
    import torch
    import transformers

    sizes = at_size(tiny, BLOOM, TINY_BLOOM) | {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    config = transformers.BloomConfig(**sizes, pad_token_id=0, eos_token_id=1)
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
    lengths = np.full(count, length)
    if length is None:
        lengths = np.clip(rng.lognormal(math.log(median), SPREAD, count), ANSWER + 4, longest).astype(int)
    return squad_data.TokenizedSquad(
        tokens=rng.integers(3, at_size(tiny, BLOOM, TINY_BLOOM)["vocab_size"], lengths.sum(), dtype=np.int32),
        offsets=np.cumsum([0, *lengths]),
        prompt_lengths=lengths - ANSWER,
        passages=np.arange(count),
        references=[{"id": str(i), "answers": {"text": ["none"], "answer_start": [0]}} for i in range(count)],
    )


def no_tokenizer(*_):
    """What evaluation takes of a tokenizer, where the tokens mean nothing."""
    return types.SimpleNamespace(pad_token_id=0, eos_token_id=1, batch_decode=lambda answers, **_: [""] * len(answers))


def demo(kind: str, stage: int, *arguments):
    """The Setup of trials of the demo's model, in a precision and at a ZeRO stage."""
    import common

    setup = common.setup_of_search("--model", common.DEMO / "model", "--dataset", common.DEMO / "squad", *arguments)
    return dataclasses.replace(setup, ds_config=common.ds_config(stage), precision=kind)


def learn(kind: str, stage: int, steps: int, factor: float, tiny: bool) -> dict:
    """eval_loss of the demo's model after so many steps with the loss multiplied by a factor."""
    import common
    import launches
    import torch
    import transformers

    import raytune_bayesian
    from hpo.squad import evaluation, models, precision

    class Scaled(raytune_bayesian.Trainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * factor

    setup = demo(kind, stage, "--max_eval_samples", at_size(tiny, 200, 20))
    pad = models.load_tokenizer(setup.model).pad_token_id
    transformers.set_seed(setup.seed)
    order = raytune_bayesian.data_order(setup.train.lengths, 1.0, 2, setup.seed)[: 2 * steps]
    data = torch.utils.data.Subset(setup.train, order)
    model, group = models.pretrained(setup.model), common.one_rank()
    with tempfile.TemporaryDirectory() as folder:
        trainer = raytune_bayesian.make_trainer(model, data, common.HYPERPARAMETERS, setup, group, folder, pad)
        trainer.__class__ = Scaled
        watch = launches.Watch(trainer, lambda engine: precision.Gradients(engine, setup.ds_config, kind, None, 1))
        trainer.train()
    with precision.autocast(setup.ds_config, kind, watch.gradients.engine.device.type):
        loss, _ = evaluation.evaluate_loss(trainer.model, setup.selection, pad, raytune_bayesian.EVAL_TOKENS)
    return {"eval_loss": loss, **watch.gradients.summary()}


def resume(kind: str, stage: int, tiny: bool) -> dict:
    """Whether losses and weights of a trial that was paused and resumed are the same bits as without a pause.

    The trial without a pause runs twice.
    """
    import common
    import torch
    from safetensors.torch import load_file

    setup = demo(kind, stage, "--max_train_samples", at_size(tiny, 80, 12), "--max_eval_samples", 40, "--max_t", 4)
    setup = dataclasses.replace(setup, num_train_epochs=1.0, max_new_tokens=8)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("through", "again", "paused"):
            trial = common.TrialHere(Path(folder) / name, pause=2 if name == "paused" else None)
            trial.run(setup, rungs=[2, 4])
            reports = trial.reports
            if name == "paused":
                trial = common.TrialHere(Path(folder) / name, trial.last_checkpoint)
                trial.run(setup, rungs=[2, 4])
                reports = reports + trial.reports
            found[name] = [r["eval_loss"] for r in reports], load_file(trial.last_checkpoint / "model.safetensors")
    losses, weights = found["through"]
    equal = {
        name: losses == its_losses and all(torch.equal(weights[w], its_weights[w]) for w in weights)
        for name, (its_losses, its_weights) in found.items()
    }
    return {"losses": {name: its_losses for name, (its_losses, _) in found.items()}, "equal": equal}


def pace(
    way: str, kind: str, stage: int, batch_sizes: list[int], together: int, barrier: str, number: int, tiny: bool
) -> dict:
    """Optimizer steps a second by batch size, while `together` processes do the same."""
    import launches
    import torch

    wait = torch.cuda.synchronize if cuda() else lambda: None
    warm, window = at_size(tiny, (4, 5), (1, 0.2))  # steps, seconds

    class Clock(launches.Watch):
        def on_step(self, step, control):
            if step == warm:
                wait()
                (Path(barrier) / f"{batch_size}-{number}").touch()
                deadline = time.monotonic() + 60
                while len(list(Path(barrier).glob(f"{batch_size}-*"))) < together:
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"not all {together} processes are at batch size {batch_size} after 60 s")
                    time.sleep(0.01)
                self.began = time.perf_counter()
            elif step > warm and step % at_size(tiny, 5, 1) == 0 and time.perf_counter() > self.began + window:
                wait()
                self.rate = (step - warm) / (time.perf_counter() - self.began)
                control.should_training_stop = True

    rates, model = {}, bloom(tiny)
    for batch_size in batch_sizes:
        data = questions(at_size(tiny, 2000, 400) * batch_size, tiny)
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
        "launches": calls("cudaLaunchKernel", "cuLaunchKernel"),
        "copies": calls("cudaMemcpyAsync", "cudaMemsetAsync"),
        "to the CPU": calls("Memcpy DtoH"),
        "waits": calls("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
        "items": calls("aten::item"),
        "GPU ms": sum(event.self_device_time_total for event in kernels) / 1000 / steps,
        "ms": 1000 * profile.seconds / steps,
        "most": [
            [event.key[:80], event.count / steps] for event in sorted(events, key=lambda event: -event.count)[:40]
        ],
    }


def counted(row: str, tiny: bool) -> dict:
    """The number of bench/launches.py for the same step."""
    import launches

    return launches.row(row, at_size(tiny, launches.LAYERS, 2))


def peaks(kind: str, stage: int, tiny: bool) -> dict:
    """Most bytes on the GPU in training, evaluation and resume of a trial, and the forecast of each."""
    import common
    import torch

    import raytune_bayesian
    from hpo.plan import memory
    from hpo.squad import data as squad_data
    from hpo.squad import evaluation, models

    found = {"resume": 0, "training": 0, "evaluation": 0, "start": 0, "reserved": 0}

    def note(name):
        if cuda():
            torch.cuda.synchronize()
            found[name] = max(found[name], torch.cuda.max_memory_allocated())
            found["reserved"] = max(found["reserved"], torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()

    class Iterations(raytune_bayesian.Iterations):
        def on_train_begin(self, *args, **kwargs):
            note("resume" if self.trial.checkpoint else "start")
            super().on_train_begin(*args, **kwargs)

        def on_step_end(self, *args, **kwargs):
            note("training")
            super().on_step_end(*args, **kwargs)
            note("evaluation")

    length = at_size(tiny, LONGEST, 40)
    room, eval_tokens = squad_data.ANSWER_ROOM, raytune_bayesian.EVAL_TOKENS
    data = questions(16, tiny, length), questions(at_size(tiny, 20, 4), tiny, length)
    setup = common.setup_of_questions(*data, stage, kind, max_new_tokens=room)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(models, "load_tokenizer", no_tokenizer),
        mock.patch.object(models, "pretrained", lambda _: model),
        mock.patch.object(raytune_bayesian, "Iterations", Iterations),
    ):
        model = evaluation.fuse_gelu(bloom(tiny))
        model.config.save_pretrained(folder)
        forecast = memory.forecast(folder, setup.ds_config, kind, 2, length, ANSWER, eval_tokens, room)
        paused = common.TrialHere(Path(folder), pause=1)
        paused.run(setup, rungs=[1, 2])
        size = sum(file.stat().st_size for file in paused.last_checkpoint.rglob("*") if file.is_file())
        model = evaluation.fuse_gelu(bloom(tiny))
        if cuda():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        common.TrialHere(Path(folder), paused.last_checkpoint).run(setup, rungs=[1, 2])
    base = forecast.weights + forecast.optimizer
    expected = {
        "training": base + max(forecast.backward, forecast.step),
        "evaluation": base + forecast.evaluation,
        "resume": base + forecast.resume,
    }
    return {"measured": found, "forecast": expected, "with reserve": forecast.peak, "checkpoint": size}


def answer(kind: str, tiny: bool) -> dict:
    """Questions a second of evaluation: eval_loss, and answers of so many tokens; a random model ends none earlier."""
    import common
    import torch

    import raytune_bayesian
    from hpo.squad import evaluation, precision

    device, eval_tokens = "cuda" if cuda() else "cpu", raytune_bayesian.EVAL_TOKENS
    model, data, rates = evaluation.fuse_gelu(bloom(tiny)).to(device), questions(at_size(tiny, 500, 6), tiny), {}
    ways = {"eval_loss": lambda: evaluation.evaluate_loss(model, data, 0, eval_tokens)}
    for tokens in (3, 16):
        ways[f"answers of {tokens} tokens"] = lambda tokens=tokens: evaluation.predict(
            model, no_tokenizer(), data, eval_tokens, tokens
        )
    with precision.autocast(common.ds_config(0), kind, device):
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
    """Runs a job with each of the settings, so many at the same time.

    A job that fails gives {"failed": its last line}.
    """
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
                results.append({"failed": (lines or ["no output"])[-1][:300]})
            else:
                results.append(json.loads(output.splitlines()[-1]))
    return results


# ---------------------------------------------------------------------------------------------------------------------
# parts: each returns the lines of its table and its numbers


def side_by_side(tiny: bool) -> int:
    """How many jobs may run at the same time, where they need the CPU too."""
    return at_size(tiny, max(1, len(os.sched_getaffinity(0)) // 2), 2)


def table(names: list[str], results: list[dict], columns: list[str], cells) -> list[str]:
    """A line for each result; `cells` gives the texts of one."""
    lines = [f"{'':<38}" + "".join(f"{column:>18}" for column in columns)]
    for name, result in zip(names, results, strict=True):
        texts = [result["failed"]] if "failed" in result else cells(result)
        lines.append(f"{name:<38}" + "".join(f"{text:>18}" for text in texts))
    return lines


def fp16(tiny: bool) -> tuple[list[str], list[dict]]:
    """Final eval_loss of the demo's model; with a small loss the gradients are as small as in a real fine-tuning."""
    cases = [(200, 1.0), (100, 0.01)] if not tiny else [(3, 0.01)]
    names, settings = [], []
    for steps, factor in cases:
        for name, (kind, stage) in KINDS.items():
            names.append(f"{name}, {steps} steps, loss x {factor:g}")
            settings.append({"kind": kind, "stage": stage, "steps": steps, "factor": factor, "tiny": tiny})
    results = run_jobs("learn", settings, side_by_side(tiny))

    def cells(r):
        scale = f"{r['loss_scale'] or 1:g}"
        return [f"{r['eval_loss']:.4f}", f"{r['grad_norm']:.4f}", scale, f"{r['skipped_steps']}"]

    return table(names, results, ["eval_loss", "gradient norm", "loss scale", "skipped steps"], cells), results


def pause(tiny: bool) -> tuple[list[str], list[dict]]:
    """Whether a trial that was paused ends with the same bits; "again" says whether the GPU repeats its own bits."""
    kinds = {name: KINDS[name] for name in KINDS if not tiny or "fp16" in name}
    settings = [{"kind": kind, "stage": stage, "tiny": tiny} for kind, stage in kinds.values()]
    results = run_jobs("resume", settings, side_by_side(tiny))

    def cells(r):
        losses = [f"{r['losses'][name][-1]:.6f}" for name in ("through", "paused")]
        return [str(r["equal"]["again"]), str(r["equal"]["paused"]), *losses]

    columns = ["same bits: again", "paused, resumed", "eval_loss", "resumed"]
    return table(list(kinds), results, columns, cells), results


def speed(tiny: bool) -> tuple[list[str], list[dict]]:
    """Optimizer steps a second of all processes together, of BLOOM-560M's shape."""
    rows = [
        ("ours", "fp16", 0, 1),
        ("textbook", "fp16", 0, 1),
        ("ours", "bf16", 0, 1),
        ("ours", "bf16", 0, 2),
        ("ours", "bf16", 0, 4),
    ]
    if tiny:
        rows = [("textbook", "fp16", 0, 1), ("ours", "fp16", 0, 2)]
    names, results = [], []
    for way, kind, stage, together in rows:
        setting = {"way": way, "kind": kind, "stage": stage, "batch_sizes": [1, 2], "together": together, "tiny": tiny}
        with tempfile.TemporaryDirectory() as barrier:
            settings = [setting | {"barrier": barrier, "number": i} for i in range(together)]
            found = run_jobs("pace", settings, together)
        failed = [f for f in found if "failed" in f]
        names.append(f"{way}, {kind}, {together} at the same time")
        rates = None if failed else {size: sum(f["rates"][size] for f in found) for size in found[0]["rates"]}
        results.append(failed[0] if failed else {"rates": rates, "peak": max(f["peak"] for f in found)})

    def cells(r):
        one, two = r["rates"]["1"], r["rates"]["2"]
        return [f"{one:.2f}", f"{two:.2f}", f"{2 * two:.1f}", f"{r['peak'] / 1e9:.2f}"]

    columns = ["batch 1: steps/s", "batch 2: steps/s", "questions/s", "GB of each"]
    return table(names, results, columns, cells), results


def launches(tiny: bool) -> tuple[list[str], list[dict]]:
    """What bench/launches.py counts against the profiler's count, in a step of two questions."""
    rows = {
        "ours": ("ours", "fp16", 0),
        "ours, bf16": ("ours", "bf16", 0),
        "ours, stage 1": ("ours", "fp16", 1),
        "textbook": ("textbook", "fp16", 0),
    }
    if tiny:
        rows = {"ours": rows["ours"]}
    settings = [{"way": way, "kind": kind, "stage": stage, "tiny": tiny} for way, kind, stage in rows.values()]
    results = run_jobs("profiled", settings, side_by_side(tiny))
    counts = run_jobs("counted", [{"row": row, "tiny": tiny} for row in rows], side_by_side(tiny))
    for result, count in zip(results, counts, strict=True):
        result["counted"] = math.nan if "failed" in count else sum(count["launches"].values())
        result["counted syncs"] = math.nan if "failed" in count else count["syncs"]
    fields = ["counted", "launches", "copies", "counted syncs", "to the CPU", "waits", "GPU ms", "ms"]
    lines = table(list(rows), results, fields, lambda r: [f"{r[field]:.1f}" for field in fields])
    return lines + ["milliseconds are with the profiler at work"], results


def memory(tiny: bool) -> tuple[list[str], list[dict]]:
    """Most memory of a trial against the forecast, batch 2, the longest questions."""
    kinds = {name: KINDS[name] for name in ("fp16, stage 0", "fp16, stage 1")[: at_size(tiny, 2, 1)]}
    settings = [{"kind": kind, "stage": stage, "tiny": tiny} for kind, stage in kinds.values()]
    results = run_jobs("peaks", settings, len(kinds))

    def cells(r):
        forecast, measured = r["forecast"], r["measured"]
        ratio = f"{forecast / measured:.2f}" if measured else "-"
        return [f"{forecast / 1e9:.3f}", f"{measured / 1e9:.3f}", ratio]

    lines = []
    for name, result in zip(kinds, results, strict=True):
        if "failed" in result:
            lines += table([name], [result], [], None)[1:]
            continue
        forecast, measured = result["forecast"], result["measured"]
        parts = {f"{name}: {part}": (forecast[part], measured[part]) for part in forecast}
        parts[f"{name}: all, as reserved"] = result["with reserve"], measured["reserved"]
        rows = [{"forecast": expected, "measured": found} for expected, found in parts.values()]
        lines += table(list(parts), rows, ["forecast, GB", "measured, GB", "ratio"], cells)
    return lines, results


def evaluation(tiny: bool) -> tuple[list[str], list[dict]]:
    """Questions a second of evaluation, of BLOOM-560M's shape, under autocast."""
    kinds = ["fp16", "bf16"][: at_size(tiny, 2, 1)]
    results = run_jobs("answer", [{"kind": kind, "tiny": tiny} for kind in kinds])
    columns = next((list(result["rates"]) for result in results if "rates" in result), [])
    lines = [f"{'':<10}" + "".join(f"{column:>24}" for column in [*columns, "GB"])]
    for kind, result in zip(kinds, results, strict=True):
        if "failed" in result:
            texts = [result["failed"]]
        else:
            texts = [f"{rate:.1f}" for rate in result["rates"].values()] + [f"{result['peak'] / 1e9:.2f}"]
        lines.append(f"{kind:<10}" + "".join(f"{text:>24}" for text in texts))
    return lines, results


PARTS = {part.__name__: part for part in (fp16, pause, speed, launches, memory, evaluation)}


def main(name: str, tiny: bool, out: Path) -> None:
    """Runs a part, prints its table and writes its files."""
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
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        if not cuda():
            import launches

            launches.allow_fp16()
        print(json.dumps(JOBS[args.job[0]](**json.loads(args.job[1]))))
    else:
        main(args.part, args.tiny, args.out)

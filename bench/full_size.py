"""The real size on this machine's CPU: a search with a random model of BLOOM-560M's exact shape and vocabulary.

    make demo-data && .venv/bin/python bench/full_size.py [folder]        # 25 minutes, 24 GB of memory, 71 GB of disk

Four trials, one at a time. Each trains to the first rung and is paused with a checkpoint. The best is resumed, trains
to the end, and becomes best_model. (The last of the four would go on without a pause; with this seed the first is the
best.) Questions are SQuAD's where it is beside the repository, in ../shared/squad, else the demo's.

It shows that the real size works, and what it takes. It says nothing about fp16 or a GPU.
"""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from hpo import files
from hpo.results import tables

ROOT = Path(__file__).parent.parent
VOCABULARY = 250_880
ARGUMENTS = [
    "--max_t", "4", "--num_samples", "4", "--max_concurrent_trials", "1", "--max_train_samples", "32",
    "--num_train_epochs", "0.5", "--max_eval_samples", "8", "--seed", "45", "--run_name", "full_size",
]  # fmt: skip


def make_model(folder: Path) -> int:
    """Writes a random BLOOM-560M. Returns the number of its parameters.

    The tokenizer is the demo's, filled up to BLOOM's vocabulary with tokens that no text has.
    """
    import torch
    import transformers

    shutil.copytree(ROOT / "demo" / "model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for i in range(VOCABULARY - len(vocabulary)):
        vocabulary[f"<unused {i}>"] = len(vocabulary)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert len(transformers.AutoTokenizer.from_pretrained(folder)) == VOCABULARY
    torch.manual_seed(0)
    demo = transformers.AutoConfig.from_pretrained(folder)
    special = {name: getattr(demo, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=1024, n_layer=24, n_head=16, **special)
    model = transformers.BloomForCausalLM(config)
    model.save_pretrained(folder)
    return model.num_parameters()


class Peak(threading.Thread):
    """Most memory (proportional set size, bytes) of the processes below one, looked at every second."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.process, self.most = psutil.Process(pid), 0

    def run(self):
        """Looks until the process has ended."""
        while self.process.is_running():
            used = 0
            for process in self.process.children(recursive=True):
                try:
                    used = max(used, process.memory_full_info().pss)
                except psutil.Error:
                    pass
            self.most = max(self.most, used)
            time.sleep(1)


def main(folder: Path) -> None:
    """Runs the search, and prints what it took."""
    began = time.time()
    parameters = make_model(folder / "model")
    made = f"vocabulary {VOCABULARY:,}, made in {time.time() - began:.0f} s"
    print(f"model: {parameters / 1e6:.0f} million parameters, {made}", flush=True)
    data = ROOT.parent / "shared" / "squad"
    data = data if data.is_dir() else ROOT / "demo" / "squad"
    where = ["--model", folder / "model", "--dataset", data, "--output_dir", folder / "results"]
    command = [sys.executable, ROOT / "raytune_bayesian.py", *where, *ARGUMENTS]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak, lines, checkpoint = Peak(process.pid), [], 0
    peak.start()
    for line in process.stdout:
        lines.append(line)
        print("  " + line, end="", flush=True)
        for path in (folder / "results" / "full_size" / "ray").glob("*/checkpoint_*"):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                checkpoint = max(checkpoint, sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))
    if process.wait() != 0:
        sys.exit("the search failed")
    results = folder / "results" / "full_size"
    run, iterations = json.loads((results / "run.json").read_text()), files.read_csv(results / "iterations.csv")
    trials = files.read_csv(results / "trials.csv")
    disk, count = map(float, re.search(r"disk: up to ([\d.]+) GB in .* for (\d+) checkpoints", "".join(lines)).groups())
    model = sum(file.stat().st_size for file in (results / "best_model").iterdir())
    seconds = {name: 60 * minutes for name, minutes in run["slot_minutes"].items()}
    milestones = sum(i["exact_match"] is not None for i in iterations)
    best = [i["eval_loss"] for i in iterations if i["trial_id"] == iterations[-1]["trial_id"]]
    rows = [
        ["eval_loss of the trial that trained fully", ", ".join(f"{loss:.3f}" for loss in best)],
        ["trials; paused and resumed", f"{len(trials)}; {sum(t['resumes'] for t in trials)}"],
        ["seconds an iteration of 4 questions, training alone", f"{seconds['training'] / len(iterations):.1f}"],
        ["seconds an evaluation of 8 questions", f"{seconds['evaluation'] / len(iterations):.1f}"],
        ["seconds a checkpoint", f"{seconds['checkpoints'] / milestones:.1f}"],
        ["GB a checkpoint; as the disk forecast counts", f"{checkpoint / 1e9:.2f}; {disk / (count + 1):.2f}"],
        ["GB on disk at most, by the forecast", f"{disk:.1f}"],
        ["GB of best_model", f"{model / 1e9:.2f}"],
        ["GB of memory of the largest process, at its peak", f"{peak.most / 1e9:.1f}"],
        ["test of best_model", ", ".join(f"{name} {run['tests'][-1][name]:.3f}" for name in tables.METRICS)],
        ["minutes in all", f"{(time.time() - began) / 60:.1f}"],
    ]
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))

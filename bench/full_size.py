"""The real size on this machine's CPU: a search with a randomly initialised model of BLOOM-560M's exact shape and vocabulary.

    make demo-data && .venv/bin/python bench/full_size.py [folder]        # about 25 minutes, 24 GB of memory, 71 GB of disk

Four trials, one at a time: each trains to the first rung and is paused with a checkpoint; the best is resumed (the last of the four
would go on without a pause; by the seed it is the first), trains to the end, and becomes best_model. Real SQuAD where it is beside this
folder, else the demo's questions. Shows that it works and what it takes; it says nothing about fp16 or a GPU.
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

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from hpo import files
from hpo.results import tables

VOCABULARY = 250_880
ARGUMENTS = ["--max_t", "4", "--num_samples", "4", "--max_concurrent_trials", "1", "--max_train_samples", "32", "--num_train_epochs", "0.5",
             "--max_eval_samples", "8", "--seed", "45", "--run_name", "full_size"]  # fmt: skip


def make_model(folder: Path) -> int:
    """Writes a random BLOOM-560M with the demo's tokenizer, filled up to BLOOM's vocabulary with tokens that no text has; its parameters."""
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
    special = {name: getattr(transformers.AutoConfig.from_pretrained(folder), name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
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
    began = time.time()
    parameters = make_model(folder / "model")
    print(f"model: {parameters / 1e6:.0f} million parameters, vocabulary {VOCABULARY:,}, made in {time.time() - began:.0f} s", flush=True)
    data = ROOT.parent / "shared" / "squad"
    command = [sys.executable, ROOT / "raytune_bayesian.py", "--model", folder / "model", "--dataset", data if data.is_dir() else ROOT / "demo" / "squad",
               "--output_dir", folder / "results", *ARGUMENTS]  # fmt: skip
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
    bill = {name: 60 * minutes for name, minutes in run["bill"].items()}
    milestones = sum(i["exact_match"] is not None for i in iterations)
    rows = [
        ["eval_loss of the trial that trained fully", ", ".join(f"{i['eval_loss']:.3f}" for i in iterations if i["trial_id"] == iterations[-1]["trial_id"])],
        ["trials; paused and resumed", f"{len(trials)}; {sum(t['resumes'] for t in trials)}"],
        ["seconds an iteration of 4 questions, training alone", f"{bill['training'] / len(iterations):.1f}"],
        ["seconds an evaluation of 8 questions", f"{bill['evaluation'] / len(iterations):.1f}"],
        ["seconds a checkpoint", f"{bill['checkpoints'] / milestones:.1f}"],
        ["GB a checkpoint; as the disk forecast counts", f"{checkpoint / 1e9:.2f}; {disk / (count + 1):.2f}"],
        ["GB on disk at most, by the forecast", f"{disk:.1f}"],
        ["GB of best_model", f"{model / 1e9:.2f}"],
        ["GB of memory of the largest process, at its peak", f"{peak.most / 1e9:.1f}"],
        ["test of best_model", ", ".join(f"{name} {run['test'][name]:.3f}" for name in tables.METRICS)],
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

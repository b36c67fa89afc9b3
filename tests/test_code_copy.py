"""What ran is what is kept: a search reads the copy of its code in the run folder, and not the checkout."""

import json
import os
import signal
import subprocess
import sys

import pytest

from conftest import run_script
from hpo import code_copy, files
from slurm_cluster import copy_project


@pytest.mark.slow
def test_the_checkout_can_be_edited_while_a_search_runs(tiny_model, tiny_squad, tmp_path, monkeypatch):
    """And before it is resumed. The edits would end the search: a module that only worker processes import, the search
    space, the ds_config. The checkout is a copy of the project, with another name of the script.
    """
    checkout, folder = tmp_path / "checkout", tmp_path / "x"
    checkout.mkdir()
    copy_project(checkout)
    script = (checkout / "raytune_bayesian.py").rename(checkout / "my_search.py")
    monkeypatch.setenv("PYTHONPATH", "")  # not the project that it was copied from
    name = ["--output_dir", tmp_path, "--run_name", "x"]
    small = ["--max_t", 4, "--num_train_epochs", 0.2, "--max_eval_samples", 10, "--max_concurrent_trials", 1]
    flags = ["--model", tiny_model, "--dataset", tiny_squad, "--report_to", "none", *small, *name, "--num_samples", 2]
    kept = code_copy.files_of(checkout)
    command = [sys.executable, script, *map(str, flags)]
    process = subprocess.Popen(command, cwd=checkout, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        for line in process.stdout:
            if line.startswith("search: "):  # Ray does not run yet
                assert {path: (folder / "code" / path).read_bytes() for path in kept} == kept
                (checkout / "hpo" / "squad" / "ranks.py").write_text("raise RuntimeError('edited')\n")
            if "] trial " in line:
                break
        os.kill(process.pid, signal.SIGUSR1)
        process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1 and "failed after" not in line
    assert " at 1/4 | " in line, line  # its worker process did not import the broken module
    script.write_text(script.read_text().replace("tune.loguniform(5e-6, 2e-4)", "tune.loguniform(1e-3, 1e-2)"))
    (checkout / "ds_config.json").write_text("{}")
    broken, good = checkout / "hpo" / "squad" / "ranks.py", kept["hpo/squad/ranks.py"]
    broken.write_bytes(good)
    new = run_script(*name, "--resume", "--new_code", script=script)
    broken.write_text("raise RuntimeError('edited')\n")
    assert new.returncode == 2 and "lr" in new.stderr
    assert {path: (folder / "code" / path).read_bytes() for path in kept} == kept
    done = run_script(*name, "--resume", script=script)
    assert done.returncode == 0, done.stderr
    changed = "changed since: my_search.py, hpo/squad/ranks.py (--new_code takes it)"
    assert f"going on with the code of the run, {folder}/code; {changed}\n" in done.stdout
    run = json.loads((folder / "run.json").read_text())
    assert run["search_space"]["lr"] == "LogUniform(5e-06, 0.0002)" and run["ds_config"]["fp16"]
    assert len(files.read_csv(folder / "trials.csv")) == 2

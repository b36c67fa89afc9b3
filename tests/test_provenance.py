"""What run.json has to repeat a run, and the command of --repeat. test_extend.py runs that command."""

import json
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hpo import arguments, code_copy, files
from hpo.cluster.run import input_files
from hpo.results import provenance, repeat, report


def test_hashes_are_those_of_sha256sum(tmp_path):
    """The docstring has the command. Python's compiled files do not count."""
    (tmp_path / "hpo" / "__pycache__").mkdir(parents=True)
    (tmp_path / "hpo" / "__pycache__" / "a.pyc").write_text("x")
    for name in ("script.py", "hpo/a b.py", "hpo/Z.sh"):
        (tmp_path / name).write_text(name)
    command = next(line for line in provenance.folder_hash.__doc__.splitlines() if "find" in line)
    of_shell = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    before = provenance.folder_hash(tmp_path)
    assert before == of_shell.split()[0]
    (tmp_path / "hpo" / "Z.sh").rename(tmp_path / "hpo" / "Y.sh")
    assert provenance.folder_hash(tmp_path) != before


@pytest.fixture()
def smi(tmp_path, monkeypatch):
    """A stand-in for nvidia-smi: smi(what it prints, as a shell script)."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def write(body):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        provenance.hardware.cache_clear()

    yield write
    provenance.hardware.cache_clear()


def test_hardware_of_a_node(smi):
    asked = '[ "$*" = "--query-gpu=name,driver_version --format=csv,noheader" ]'
    smi(f'{asked} && yes "NVIDIA A100, 80GB, 580.65.06" | head -n 2')
    found = provenance.hardware()
    assert found["gpus"] == ["NVIDIA A100, 80GB"] * 2 and found["driver"] == "580.65.06"
    assert found["cpu"] and found["cpus"] > 0
    for broken in ("exit 9", ""):
        smi(broken)
        assert provenance.hardware() == found | {"gpus": [], "driver": None}


def test_files_that_a_run_reads(tiny_model, tiny_squad, tmp_path):
    """Other files in the folders do not count: notes may change."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "notes.md").touch()
    (model / "pytorch_model.bin").touch()  # the same weights once more
    (tmp_path / "state.jsonl").touch()
    args = SimpleNamespace(model=str(model), dataset=str(tiny_squad), warm_start=[str(tmp_path)], resume=False)
    found = input_files(args, model)
    names = {name: set(entry["sha256"]) for name, entry in found.items()}
    assert names.pop("model") == {path.name for path in tiny_model.iterdir()}
    assert names == {"dataset": {"train.json", "dev.json"}, f"warm_start {tmp_path}": {"state.jsonl"}}
    assert found["dataset"]["sha256"]["dev.json"] == files.sha256(tiny_squad / "dev.json")
    assert found["model"]["revision"] is found["dataset"]["revision"] is None
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "pytorch_model.bin" in input_files(args, model)["model"]["sha256"]


FLAGS = [
    "--model=some/model", "--dataset=d", "--try=lr=1e-4,wd=0", "--try", "lr=2e-5,wd=0.01", "--gpus_per_trial=1/3",
    "--num_samples=7", "--gpu_hours=2.5", "--baseline", "--seed=0", "--max_concurrent_trials=1", "--precision=bf16",
]  # fmt: skip


@pytest.fixture()
def made(tmp_path, monkeypatch):
    """A run folder whose name needs quotes, with what --repeat reads; write(changes to run.json)."""
    folder = tmp_path / "it's here" / "x"
    (folder / "code").mkdir(parents=True)
    (folder / "code" / "my_search.py").write_text("1")
    (tmp_path / "w").mkdir()
    for file in ("train.json", "w/state.jsonl", "w/run.json"):
        (tmp_path / file).write_text(file)
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "hub" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_text("1")
    args = arguments.parse("", [*FLAGS, "--warm_start", "w"])
    model = provenance.hashes(snapshot, [snapshot / "model.safetensors"]) | {"revision": "abc"}
    data = provenance.hashes(tmp_path, [tmp_path / "train.json"]) | {"revision": None}
    run = {
        "arguments": json.loads(json.dumps(arguments.kept(args))), "environment": {"BS_CHOICES": "1,2"},
        "cluster": None, "script": "my_search.py", "git_commit": "c0ffee", "versions": provenance.versions(),
        "code_sha256": provenance.folder_hash(folder / "code"), "cuda": "13.0",
        "files": {"model": model, "dataset": data,
                  "warm_start w": provenance.hashes(tmp_path / "w", [tmp_path / "w" / "state.jsonl"])},
        "hardware": {"n1": {"cpu": "EPYC", "cpus": 4, "gpus": ["A100", "A100"], "driver": "580.1"}},
    }  # fmt: skip

    def write(**changes):
        files.write_json(folder / "run.json", run | changes)
        return run | changes

    write()
    return folder, write


def test_command_has_the_arguments_of_the_run(made, tmp_path):
    """As the command line reads them again: all but the paths, which are absolute, and the name of the run."""
    folder, write = made
    (folder.parent / "x-repeat").mkdir()
    words = shlex.split(repeat.lines(folder)[0])
    assert words[:4] == ["env", "BS_CHOICES=1,2", sys.executable, str(folder / "code" / "my_search.py")]
    of_run, again = write()["arguments"], arguments.kept(arguments.parse("", words[4:]))
    own = {"run_name": "x-repeat2", "output_dir": str(folder.parent), "dataset": str(tmp_path),
           "deepspeed": str(folder / "code" / "ds_config.json"), "warm_start": [str(tmp_path / "w")]}  # fmt: skip
    assert again == of_run | own and again["model"] == "some/model" and again["gpus_per_trial"] == 1 / 3


def test_conditions_and_differences_have_a_line_each(made, tmp_path, monkeypatch):
    folder, write = made
    warnings = [line for line in repeat.lines(folder) if "WARNING" in line]
    budget = "# WARNING: --gpu_hours 2.5: the number of trials depends on the speed of the machine"
    assert warnings == [budget]  # no other: nothing has changed
    text = "\n".join(repeat.lines(folder))
    for part in ("commit c0ffee", f"numpy {provenance.versions()['numpy']}", "CUDA 13.0",
                 f"{files.sha256(tmp_path / 'train.json')}  {tmp_path}/train.json",
                 "n1: 4 CPUs (EPYC), A100, A100, driver 580.1"):  # fmt: skip
        assert part in text
    write(versions=provenance.versions() | {"torch": "1.0"})
    (tmp_path / "train.json").write_text("changed")
    (tmp_path / "w" / "state.jsonl").unlink()
    newer = tmp_path / "hub" / "snapshots" / "def"  # of the hub, fetched after the run
    newer.mkdir()
    (newer / "model.safetensors").write_text("2")
    (tmp_path / "hub" / "refs").mkdir()
    (tmp_path / "hub" / "refs" / "main").write_text("def\n")
    (folder / "code" / "my_search.py").write_text("2")
    (folder / "code-until-20260101-000000").mkdir()
    warnings = [line.removeprefix("# WARNING: ") for line in repeat.lines(folder) if "WARNING" in line]
    assert warnings == [
        f"torch 1.0 in the run, {provenance.versions()['torch']} here",
        f"model {newer}: changed or not there: model.safetensors",
        f"dataset {tmp_path}: changed or not there: train.json",
        f"warm_start w {tmp_path}/w: changed or not there: state.jsonl",
        f"{folder}/code was edited",
        f"a part of the run used other code, {folder}/code-until-20260101-000000",
        budget.removeprefix("# WARNING: "),
    ]


def test_run_on_a_cluster_is_repeated_with_sbatch(made):
    """From this checkout. A warning says that its code is not that of the run."""
    folder, write = made
    write(cluster={"NUM_WORKERS": 2, "GPUS_PER_NODE": 4, "CPUS_PER_NODE": 8, "HEAD_GPUS": 0, "HEAD_CPUS": 0})
    lines = repeat.lines(folder)
    sizes = "NUM_WORKERS=2 GPUS_PER_NODE=4 CPUS_PER_NODE=8"
    assert lines[0].startswith(f"cd {code_copy.ROOT} && env {sizes} BS_CHOICES=1,2 sbatch head_node.slurm --model=some")
    other = f"# WARNING: {code_copy.ROOT} has other code than the run (my_search.py): copy {folder}/code/"
    assert [line for line in lines if line.startswith(other)]


@pytest.mark.parametrize("gpus, memory, asks", [
    (4, {"HEAD_MEM": 6144}, "--gpus-per-node=4 --mem=6144M "),
    (0, {"HEAD_MEM": 0}, ""),
    (0, {}, ""),  # of an older version
])  # fmt: skip
def test_run_in_one_job_is_repeated_in_one_job(made, gpus, memory, asks):
    folder, write = made
    sizes = {"NUM_WORKERS": 2, "GPUS_PER_NODE": gpus, "CPUS_PER_NODE": 8}
    write(cluster=sizes | memory | {"HEAD_GPUS": 0, "HEAD_CPUS": 0, "HEAD_NODES": 2})
    command = repeat.lines(folder)[0].partition(" && ")[2]
    options = f"--nodes=2 --cpus-per-task=8 {asks}"
    assert command.startswith(f"env NUM_WORKERS=0 BS_CHOICES=1,2 sbatch {options}head_node.slurm --model=some")


def test_commit_of_a_copy_is_that_of_its_run(made):
    """The copy may lie in a checkout of another commit."""
    folder, _ = made
    assert provenance.git_commit(folder / "code") == "c0ffee"
    assert provenance.git_commit(folder) is None
    assert len(provenance.git_commit(code_copy.ROOT).removesuffix("-dirty")) == 40


@pytest.mark.parametrize(
    "harm, says",
    [
        (lambda folder: (folder / "run.json").write_text("{"), "run.json cannot be read (JSONDecodeError"),
        (lambda folder: (folder / "run.json").write_text('{"git_commit": "abc"}'), "git checkout abc"),
        (lambda folder: (folder / "run.json").write_text("[]"), "cannot be read"),
        (lambda folder: (folder / "code" / "my_search.py").unlink(), "code has no my_search.py"),
        (lambda folder: (folder / "run.json").unlink(), "is not a run folder"),
    ],
)
def test_bad_input_is_told_in_one_line(made, capsys, harm, says):
    folder, _ = made
    harm(folder)
    with pytest.raises(SystemExit) as end:
        report.main([str(folder), "--repeat"])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and says in err and len(err.splitlines()) == 1


def test_repeat_excludes_the_other_ways(made, capsys):
    with pytest.raises(SystemExit) as end:
        report.main([str(made[0]), "--repeat", "--png"])
    assert end.value.code == 2 and "not allowed with" in capsys.readouterr().err

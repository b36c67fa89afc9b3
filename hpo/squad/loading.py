"""Finds models and data sets: in a folder, or in the cache of the Hugging Face hub. Imports nothing slow at its top."""

import functools
import json
import math
import re
from collections import Counter
from pathlib import Path

from hpo import errors
from hpo.errors import BadInput

VALIDATION = ("validation", "dev", "valid", "val")  # names of the split
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]  # configuration, weights, tokenizer


def check_model_folder(path: Path) -> None:
    """Raises BadInput unless a folder holds what save_pretrained writes, tokenizer included."""
    try:
        assert json.loads((path / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise BadInput(f"--model {path}: no config.json with a model_type in this folder") from None
    if not [*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")]:
        raise BadInput(f"--model {path}: no weights (*.safetensors or pytorch_model*.bin) in this folder")
    if not (path / "tokenizer_config.json").exists():
        raise BadInput(f"--model {path}: no tokenizer_config.json in this folder")
    try:
        count_parameters(path)
    except Exception as error:  # SafetensorError is none of the usual kinds
        raise BadInput(f"--model {path}: weights that cannot be read: {error}") from None


def count_parameters(folder: Path) -> int:
    """The number of parameters in a model folder, from the headers of its safetensors files.

    For .bin files it is estimated from their size and the dtype in config.json, or two bytes a parameter.
    """
    import safetensors

    index, whole, count = folder / "model.safetensors.index.json", folder / "model.safetensors", 0
    files = folder.glob("*.safetensors")
    if index.exists():  # other files in the folder may have the same weights in another form
        files = {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
    elif whole.exists():
        files = [whole]
    for file in files:
        with safetensors.safe_open(file, framework="np") as weights:
            count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())
    config = json.loads((folder / "config.json").read_text())
    each = 4 if "float32" in (config.get("dtype"), config.get("torch_dtype")) else 2
    return count or sum(file.stat().st_size for file in folder.glob("pytorch_model*.bin")) // each


def checkpoint_bytes(folder: Path, adapters: int = 0) -> int:
    """The size of a trial's checkpoint, at most: AdamW's state, fp32 copy, weights, tied weights twice.

    Args:
        folder: of the model.
        adapters: the number of parameters of LoRA adapters; a checkpoint has only these. 0: there are none.
    """
    return (adapters or count_parameters(folder)) * 18 + 10**6


def disk_bytes(folder: Path, adapters: int) -> tuple[int, int]:
    """The sizes of a checkpoint and of best_model, at most. For the arguments see `checkpoint_bytes`.

    With adapters best_model is larger than a checkpoint: 8 bytes a parameter, for fp32 and tied weights twice.
    """
    checkpoint = checkpoint_bytes(folder, adapters)
    return checkpoint, count_parameters(folder) * 8 + 10**6 if adapters else checkpoint


def hub_snapshot(name: str, repo_type: str, patterns: list[str], download: bool) -> Path:
    """The folder with the files of a hub repository.

    Takes it from the cache without asking the network, unless `download` is set: a cache may hold only a part of a
    repository and does not know it.

    Args:
        name: of the repository.
        repo_type: "model" or "dataset".
        patterns: of the files that are needed.
        download: complete the cache from the network.

    Raises:
        BadInput: neither the cache nor the hub has it.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    what = {"repo_id": name, "repo_type": repo_type}
    if not download:
        try:
            return Path(huggingface_hub.snapshot_download(**what, allow_patterns=patterns, local_files_only=True))
        except LocalEntryNotFoundError:
            pass
    try:
        folder = Path(huggingface_hub.snapshot_download(**what, allow_patterns=patterns))
        if repo_type == "model" and not [*folder.glob("*.safetensors")]:  # an older model; most of them have both
            huggingface_hub.snapshot_download(**what, allow_patterns=["pytorch_model*.bin"])
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = errors.one_line(error, 200)
        hint = "" if download else "; run with --prefetch where there is a network"
        raise BadInput(
            f"--{repo_type} {name}: neither a folder nor in the cache, and the hub does not give it{hint} ({reason})"
        ) from None


def local_model(model: str) -> Path | None:
    """The folder of a model if this machine has it, else None. Does not ask the network.

    Raises:
        BadInput: it is a folder, and no model is in it.
    """
    if Path(model).is_dir():
        check_model_folder(Path(model))
        return Path(model)
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=MODEL_FILES, local_files_only=True))
    except (OSError, ValueError):
        return None


def model_folder(model: str, download: bool = False) -> Path:
    """The folder with configuration, weights and tokenizer of a model; raises BadInput where there is none."""
    if Path(model).is_dir():
        return Path(model).absolute()
    folder = hub_snapshot(model, "model", MODEL_FILES, download)
    try:
        check_model_folder(folder)
    except BadInput as error:
        reason = str(error).split(": ", 1)[1]
        hint = "" if download else "; run with --prefetch where there is a network"
        raise BadInput(f"--model {model}: {reason}{hint}") from None
    return folder


def prefetch(model: str, dataset: str, drop_bad_answers: bool) -> None:
    """Downloads model and data set into the hub's cache. Raises BadInput where they cannot be had."""
    folder = model_folder(model, download=True)
    train, validation, _ = load_examples(dataset, True, drop_bad_answers)
    print(f"in the cache: model {folder}, {len(train)} training and {len(validation)} validation questions")


@functools.lru_cache(maxsize=1)  # the first checks read a folder, the search takes what they have read
def load_examples(
    dataset: str, download: bool = False, drop_bad_answers: bool = False
) -> tuple[list[dict], list[dict], dict[str, Counter]]:
    """The training and the validation questions of a data set, see hpo/squad/reading.py for their form.

    Args:
        dataset: a folder with SQuAD's JSON files, or a repository of the hub with parquet files.
        download: complete the cache from the network.
        drop_bad_answers: leave out answers that cannot be used, instead of refusing the data set.

    Returns:
        Training questions, validation questions, and for "train" and "validation" what was left out, as
        `reading.check_questions` counts it; {} without drop_bad_answers.

    Raises:
        BadInput: there is no such data set, or something is wrong with it.
    """
    from hpo.squad import reading

    splits, dropped = ("train", "validation"), {}
    if drop_bad_answers:
        dropped = {split: Counter() for split in splits}
    try:
        _, files = data_files(dataset, download)
        if Path(dataset).is_dir():
            loaded = [reading.read_squad(files[split][0], dropped.get(split)) for split in splits]
        else:
            loaded = [reading.read_parquet(files[split], dataset, split, dropped.get(split)) for split in splits]
    except ValueError as error:
        raise BadInput(f"--dataset {error}") from None
    return *loaded, dropped


def data_files(dataset: str, download: bool = False) -> tuple[Path, dict[str, list[Path]]]:
    """The folder of a data set, and its files for "train" and "validation". For errors see `load_examples`."""
    from hpo.squad import reading

    if Path(dataset).is_dir():
        return Path(dataset), {split: [file] for split, file in reading.find_squad_files(Path(dataset)).items()}
    folder = hub_snapshot(dataset, "dataset", ["*.parquet"], download)
    return folder, hub_files(dataset, folder, download)


def model_files(folder: Path) -> list[Path]:
    """The files of a model folder that are read: MODEL_FILES, or .bin files where there are no others with weights."""
    patterns = MODEL_FILES + ["pytorch_model*.bin"] * (not [*folder.glob("*.safetensors")])
    return [path for pattern in patterns for path in folder.glob(pattern)]


def hub_files(dataset: str, folder: Path, downloaded: bool) -> dict[str, list[Path]]:
    """The parquet files of a data set: {"train": its files, "validation": its files}.

    The folder of a file is its configuration. Its name begins with its split, as in train-00000-of-00001.parquet, or
    its split is a folder in that of the configuration, as in train/0000.parquet.

    Args:
        dataset: its name.
        folder: of the repository.
        downloaded: all files are there, else the cache may have only a part of them.

    Raises:
        ValueError: a split is missing, or there are several configurations.
    """
    configs: dict[str, dict[str, list[Path]]] = {}
    for path in sorted(folder.rglob("*.parquet")):
        split, config = re.match(r"[^\W\d]*", path.name)[0].strip("_").lower(), path.parent
        if path.parent != folder and path.parent.name.lower() in (split, "train", *VALIDATION):
            split, config = path.parent.name.lower(), path.parent.parent
        configs.setdefault(str(config.relative_to(folder)), {}).setdefault(split, []).append(path)
    for splits in configs.values():
        for name in VALIDATION:
            if name in splits:
                splits.setdefault("validation", splits[name])
    instead = "pass a folder with train.json and dev.json as --dataset"
    of_search = [name for name, splits in configs.items() if {"train", "validation"} <= splits.keys()]
    if len(of_search) > 1:
        raise ValueError(f"{dataset}: has several configurations ({', '.join(of_search)}): {instead}")
    splits = configs[of_search[0]] if of_search else {split: [] for names in configs.values() for split in names}
    if not {"train", "validation"} <= splits.keys():
        has = ", ".join(sorted(splits)) or "none in parquet files"
        hint = "" if downloaded else ", or run with --prefetch if the cache has only a part of it"
        raise ValueError(f"{dataset}: train and validation splits are needed, and it has: {has}; {instead}{hint}")
    return splits

"""Models, tokenizers and checkpoints: reading them, and making best_model of a checkpoint."""

import copy
import functools
import gc
import json
import shutil
from pathlib import Path

import peft
import torch
import transformers

from hpo import errors
from hpo.errors import BadInput
from hpo.files import replace_folder, sync
from hpo.squad import evaluation, lora, precision

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def _read(folder: str | Path) -> torch.nn.Module:
    return evaluation.fuse_gelu(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


_kept = functools.lru_cache(maxsize=1)(_read)


def pretrained(folder: str | Path) -> torch.nn.Module:
    """A fresh copy of the pretrained model, in fp32, on the CPU.

    A worker process reads the files once and keeps the model for its next trials.
    """
    return copy.deepcopy(_kept(str(folder)))


@functools.lru_cache(maxsize=1)
def _config(folder: str) -> transformers.PretrainedConfig:
    return transformers.AutoConfig.from_pretrained(folder)


def check_kind(folder: Path) -> None:
    """Raises BadInput unless the config.json of a folder is that of a causal language model."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    try:
        config = _config(str(folder)) if kind in transformers.CONFIG_MAPPING else None
    except Exception as error:  # whatever a wrong value raises
        raise BadInput(f"--model {folder}: its config.json cannot be used: {errors.one_line(error, 200)}") from None
    if getattr(config, "is_encoder_decoder", False):
        raise BadInput(f"--model {folder}: {kind} is an encoder-decoder, and a causal language model is needed")
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:  # the model's own code is not run
        version = transformers.__version__
        raise BadInput(f"--model {folder}: transformers {version} has no causal language model of model_type {kind!r}")


@functools.lru_cache
def load_tokenizer(folder: str | Path):
    """The tokenizer of a model.

    It pads with EOS if it has no padding token, or one for which the model has no embedding. The attention mask hides
    padding.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= text_config(folder).vocab_size:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def text_config(folder: str | Path) -> transformers.PretrainedConfig:
    """The configuration of a model, or of its part for text."""
    return _config(str(folder)).get_text_config()


def max_positions(folder: str | Path) -> int | None:
    """The most tokens that a model takes; None where its configuration has no limit, as BLOOM's."""
    config = text_config(folder)
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)


def load_for_test(folder: str | Path, device: str) -> torch.nn.Module:
    """A model in the precision of its files, on a device."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    gc.enable()  # worker processes start without it, see group.imports_are_done
    return evaluation.fuse_gelu(model).to(device)


def is_of_full_training(checkpoint: Path) -> bool:
    """Whether a checkpoint was written at the end of a full training.

    Such a checkpoint is a folder for from_pretrained: of the model, or of its adapters. All others hold DeepSpeed's
    files, to go on from.

    Raises:
        FileNotFoundError: the folder holds neither, for example because its file system is not mounted.
    """
    is_model = any((checkpoint / name).exists() for name in ("config.json", "adapter_config.json"))
    if not is_model and not any(checkpoint.glob("global_step*")):
        raise FileNotFoundError(f"{checkpoint} is no checkpoint, or no more")
    return is_model


def load_weights(checkpoint: Path, model: torch.nn.Module) -> torch.nn.Module:
    """Gives a model the weights of a checkpoint with DeepSpeed's files, and returns it.

    Where the model has adapters, the checkpoint has only these.
    """
    files = list(checkpoint.glob("global_step*/mp_rank_00_model_states.pt"))
    if files:
        weights = torch.load(files[0], map_location="cpu", mmap=True, weights_only=False)["module"]
    else:  # at ZeRO stage 3 each rank has written its part; the import is slow and hardly ever needed
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        weights = get_fp32_state_dict_from_zero_checkpoint(checkpoint)
    missing, unexpected = model.load_state_dict(weights, strict=not isinstance(model, peft.PeftModel))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    if unexpected or trained & set(missing):
        raise RuntimeError(f"{checkpoint} has other adapters: {[*unexpected, *sorted(trained & set(missing))][:3]}")
    return model


def save_best_model(
    checkpoint: Path, pretrained_folder: str | Path, dtype_name: str, path: Path, adapters: dict | None = None
) -> None:
    """Writes model and tokenizer of a checkpoint to a folder for from_pretrained.

    The folder is written under another name and renamed when it is complete. It replaces an earlier one. The weights
    have the precision of the training, whether the training came to its end or not. The model is in memory once.

    Args:
        checkpoint: of the best trial.
        pretrained_folder: of the model that the training began with.
        dtype_name: "fp16", "bf16" or "fp32".
        path: the folder to make.
        adapters: arguments of `lora.adapted`. They are merged into the weights, in fp32. None: there are none.
    """
    folder = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)  # left by an interruption
    dtype = precision.DTYPES[dtype_name]
    if not is_of_full_training(checkpoint):
        model = load_weights(checkpoint, lora.adapted(_read(pretrained_folder), **adapters or {"r": 0}))
    elif adapters:
        model = lora.with_saved_adapters(_read(pretrained_folder), checkpoint)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    model = (model.merge_and_unload() if adapters else model).to(dtype)
    if not all(end.isfinite() for weight in model.parameters() for end in weight.aminmax()):  # makes no copy of one
        print(
            f"WARNING: best_model has weights that are infinite in {dtype_name}, or NaN: "
            "train with --precision bf16 or fp32",
            flush=True,
        )
    tokenizer = load_tokenizer(pretrained_folder)
    model.generation_config.eos_token_id = tokenizer.eos_token_id  # the training has taught it this one
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sync(*folder.rglob("*"), folder)
    replace_folder(folder, path)

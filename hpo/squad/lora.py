"""LoRA adapters (Hu et al., https://arxiv.org/abs/2106.09685) through peft, and gradient checkpointing.

Adapters are trained in place of the model's weights, which are frozen. A checkpoint has the adapters only; best_model
has them merged into the weights, see models.save_best_model.
"""

import contextlib
import warnings
from collections import Counter
from pathlib import Path

import peft
import torch
import transformers

from hpo import errors
from hpo.errors import BadInput

ALL_LINEAR = "all-linear"
LINEAR = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)


def adapted(model, r: int, alpha: float | None = None, target_modules: str = "", **options) -> torch.nn.Module:
    """A model with new adapters, drawn from torch's random stream, and its own weights frozen.

    Args:
        model: changed in place.
        r: the rank of the adapters; 0: the model is returned as it is.
        alpha: the adapters are scaled by alpha / r; None: 2 r.
        target_modules: names of layers separated by commas, or "all-linear"; "": peft's own for the architecture.
        options: of peft.get_peft_model.
    """
    if not r:
        return model
    names = target_modules if target_modules == ALL_LINEAR else target_modules.split(",") if target_modules else None
    alpha = 2 * r if alpha is None else alpha
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=alpha, target_modules=names)
    with quiet():
        return peft.get_peft_model(model, config, **options)


def with_saved_adapters(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """A model with the adapters that save_pretrained has written, on the CPU."""
    with quiet():
        return peft.PeftModel.from_pretrained(model, folder, torch_device="cpu")


@contextlib.contextmanager
def quiet():
    """Without warnings of peft that a user can do nothing about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # peft sets it right by itself, for GPT-2
        yield


def of_trial(setup, searched: dict) -> dict | None:
    """The adapters of a trial, as arguments of `adapted`; None where it has none.

    Args:
        setup: what all trials share.
        searched: the searched hyperparameters of the trial.
    """
    hyperparameters = setup.hyperparameters(searched)
    r, alpha = hyperparameters["lora_r"], hyperparameters["lora_alpha"]
    return {"r": r, "alpha": alpha, "target_modules": setup.lora_target_modules} if r else None


def prepare(model: torch.nn.Module, setup, hyperparameters: dict) -> torch.nn.Module:
    """The model that a trial trains, of a pretrained one: with adapters or gradient checkpointing where they are set.

    Args:
        model: changed in place.
        setup: what all trials share.
        hyperparameters: of the trial, see Setup.hyperparameters.
    """
    if setup.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return adapted(model, hyperparameters["lora_r"], hyperparameters.get("lora_alpha"), setup.lora_target_modules)


def without_weights(folder: str | Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A model of the class in config.json whose tensors have shapes and no data."""
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(folder)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def count_trained(folder: str | Path, r: int, target_modules: str) -> int:
    """The number of parameters of the adapters; 0 without adapters. For the arguments see `adapted`."""
    if not r:
        return 0
    model = adapted(without_weights(folder), r, target_modules=target_modules)
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def check(folder: str | Path, r: int, target_modules: str, gradient_checkpointing: bool) -> None:
    """Raises BadInput where a model cannot have these adapters, or no gradient checkpointing. Reads no weights.

    Args:
        folder: of the model.
        r: see `adapted`.
        target_modules: see `adapted`.
        gradient_checkpointing: whether it is asked for.
    """
    if not r and not gradient_checkpointing:
        return
    model = without_weights(folder)
    if gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise BadInput(f"--gradient_checkpointing: {type(model).__name__} does not have it")
    if not r:
        return
    names = target_modules.split(",") if target_modules not in ("", ALL_LINEAR) else []
    modules = dict(model.named_modules())
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    for target in names:
        found = [module for name, module in modules.items() if f".{name}".endswith(f".{target}")]
        if not found:
            layers = [(name, m) for name, m in modules.items() if isinstance(m, LINEAR) and uses[id(m.weight)] == 1]
            linear = {name.rpartition(".")[2] for name, _ in layers}
            has = ", ".join(sorted(linear))
            raise BadInput(f"--lora_target_modules: there is no {target} in this model; its linear layers are {has}")
        if any(uses[id(weight)] > 1 for module in found for weight in module.parameters(recurse=False)):
            raise BadInput(f"--lora_target_modules: {target} shares its weights with another layer: leave it out")
    kind = type(model).__name__
    try:
        model = adapted(model, r, target_modules=target_modules)
    except Exception as error:  # whatever peft raises
        if not target_modules:
            known = f"peft has no default layers for {kind}: name some with --lora_target_modules, or all-linear"
            raise BadInput(f"--lora_r: {known}") from None
        reason = errors.one_line(error, 200)
        raise BadInput(f"--lora_target_modules {target_modules}: peft cannot adapt this {kind}: {reason}") from None
    sides = [min(m.get_base_layer().weight.shape) for m in model.modules() if hasattr(m, "lora_A")]
    if r > min(sides):
        raise BadInput(f"--lora_r: {r} is above {min(sides)}, the smaller side of a layer")

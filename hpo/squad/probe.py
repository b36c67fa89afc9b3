"""Tries a model before a search: a training step, the longest sequence and an answer, on the CPU, without Ray."""

import math
import os

import numpy as np
import psutil
import torch
import transformers

from hpo import errors
from hpo.errors import BadInput
from hpo.squad import evaluation, loading, lora, models
from hpo.squad.data import TokenizedSquad
from hpo.squad.setup import Setup

OTHER = 2 * 10**9  # bytes that this program needs besides the model


def free_memory() -> int:
    """Bytes that this process may still use: of the machine, or of the Slurm job."""
    per_node, per_cpu = (int(os.environ.get(f"SLURM_MEM_PER_{unit}", 0)) << 20 for unit in ("NODE", "CPU"))
    of_job = per_node or per_cpu * int(os.environ.get("SLURM_CPUS_ON_NODE", 1))
    return min(psutil.virtual_memory().available, of_job or math.inf) - OTHER


def try_model(setup: Setup, test: TokenizedSquad, largest: dict) -> None:
    """Does with the real weights and questions what the trials will do. A mistake would fail all of them.

    A model whose weights and gradients do not fit into this machine's memory, in fp32, is not tried. Adapters and
    gradient checkpointing are checked for it without the weights, too.

    Args:
        setup: what all trials share.
        test: the test questions.
        largest: see search_space.largest_trial.

    Raises:
        BadInput: the model fails.
    """
    lora.check(setup.model, largest["lora_r"], setup.lora_target_modules, setup.gradient_checkpointing)
    per_weight = 4 if largest["lora_r"] else 8  # bytes: frozen weights have no gradients
    needed, free = per_weight * loading.count_parameters(setup.model), free_memory()
    if needed > free:
        print(f"the model is not tried before the search: that needs {needed / 1e9:.3g} GB, {free / 1e9:.3g} are free")
        return
    print("trying the model on the CPU: a training step, the longest sequence, an answer", flush=True)
    tokenizer, what = models.load_tokenizer(setup.model), "reading the weights"
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(setup.model, dtype=torch.float32)
        model = lora.prepare(model, setup, largest)
        shortest = np.argsort(setup.train.lengths, kind="stable")
        what = "a training step"
        loss, count = evaluation.answer_loss(
            model,
            evaluation.collate([setup.train[i] for i in shortest[: largest["per_device_bs"]]], tokenizer.pad_token_id),
        )
        (loss / count).backward()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss}")
        model.zero_grad(set_to_none=True)
        longest = longest_sequence((setup.train, setup.selection, test), setup.max_new_tokens)
        what = f"the longest sequence, {len(longest['input_ids'])} tokens"
        with torch.no_grad():
            evaluation.answer_loss(model, evaluation.collate([longest], tokenizer.pad_token_id))
        what = "generating an answer, which needs a cache of keys and values"
        question = setup.train[shortest[0]]
        ends, prompt_lengths = np.array([0, len(question["input_ids"])]), np.array([question["prompt_length"]])
        one = TokenizedSquad(question["input_ids"], ends, prompt_lengths, references=[{"id": "a question"}])
        evaluation.predict(model, tokenizer, one, 1, setup.max_new_tokens)
    except Exception as error:  # whatever a model raises
        reason = errors.one_line(f"{type(error).__name__}: {error}")
        raise BadInput(f"--model {setup.model}: it fails at {what}: {reason}") from error


def longest_sequence(parts: tuple[TokenizedSquad, ...], max_new_tokens: int) -> dict:
    """The longest sequence that a model will see, in training, evaluation or generation, as an item of a data set."""
    best = None
    for part in parts:
        lengths = np.maximum(part.lengths, part.prompt_lengths + max_new_tokens)
        i = int(lengths.argmax())
        if best is None or lengths[i] > len(best["input_ids"]):
            best = part[i]
            best["input_ids"] = np.resize(best["input_ids"], lengths[i])  # tokens do not matter: repeats some
    return best

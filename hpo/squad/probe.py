"""Tries a model before a search: a training step, the longest sequence and an answer, on the CPU, without Ray."""

import math
import os
from pathlib import Path

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
SMALL = 10**6  # numbers of a weight that gets a gradient
FEW = 4  # tokens of the answers that are tried


def free_memory() -> int:
    """Bytes that this process may still use: of the machine, or of the Slurm job."""
    per_node, per_cpu = (int(os.environ.get(f"SLURM_MEM_PER_{unit}", 0)) << 20 for unit in ("NODE", "CPU"))
    of_job = per_node or per_cpu * int(os.environ.get("SLURM_CPUS_ON_NODE", 1))
    return min(psutil.virtual_memory().available, of_job or math.inf) - OTHER


def try_model(setup: Setup, test: TokenizedSquad, largest: dict) -> None:
    """Does with the real weights and questions what the trials will do. A mistake would fail all of them.

    Only small weights get gradients, such as those of norms, for lack of memory. They are in all layers, so the
    backward pass goes through the whole model. A model that does not fit into this machine's memory is not tried;
    adapters and gradient checkpointing are checked for it without the weights.

    Args:
        setup: what all trials share.
        test: the test questions.
        largest: see search_space.largest_trial.

    Raises:
        BadInput: the model fails.
    """
    lora.check(setup.model, largest["lora_r"], setup.lora_target_modules, setup.gradient_checkpointing)
    needed, free = 5 * loading.count_parameters(setup.model), free_memory()
    if needed > free:
        print(f"the model is not tried before the search: that needs {needed / 1e9:.3g} GB, {free / 1e9:.3g} are free")
        return
    print("trying the model on the CPU: a training step, the longest sequence, an answer", flush=True)
    tokenizer, what = models.load_tokenizer(setup.model), "reading the weights"
    try:
        model = _read_weights(setup.model)
        least = min(weight.numel() for weight in model.parameters())
        for weight in model.parameters():
            weight.requires_grad_(weight.numel() <= max(SMALL, least))
        model = lora.prepare(model, setup, largest)
        shortest = np.argsort(setup.train.lengths, kind="stable")
        what = "a training step"
        loss, count = evaluation.answer_loss(
            model,
            evaluation.collate([setup.train[i] for i in shortest[: largest["per_device_bs"]]], tokenizer.pad_token_id),
        )
        (loss / count).backward()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()}")
        longest = longest_sequence(setup.train, (setup.selection, test), setup.max_new_tokens)
        what = f"the longest sequence, {len(longest['input_ids'])} tokens"
        with torch.no_grad():
            evaluation.answer_loss(model, evaluation.collate([longest], tokenizer.pad_token_id))
            what = "two sequences in one batch"
            order = np.argsort(setup.selection.prompt_lengths, kind="stable")
            pair = setup.selection.take([order[0], order[len(order) // 2]])
            alone = sum(_plain_loss(model, item) for item in pair)
            together, _ = evaluation.answer_loss(model, evaluation.collate(list(pair), tokenizer.pad_token_id))
        what = "generating an answer"
        few = min(FEW, setup.max_new_tokens)
        one_by_one = evaluation.predict(model, tokenizer, pair, 1, few)
        same = one_by_one == evaluation.predict(model, tokenizer, pair, 10**6, few)
        if not same or not math.isclose(alone, together.item(), rel_tol=1e-4):
            raise BadInput("padding on the left of a batch changes its results, so it cannot be used here")
    except BadInput as error:
        raise BadInput(f"--model {setup.model}: {error}") from None
    except Exception as error:  # whatever a model raises
        reason = errors.one_line(f"{type(error).__name__}: {error}")
        raise BadInput(f"--model {setup.model}: it fails at {what}: {reason}") from error


def _plain_loss(model, item: dict) -> float:
    """The sum of the cross entropy (nats) over the answer tokens of one sequence, by the plain forward pass."""
    ids = torch.from_numpy(item["input_ids"].astype(np.int64))
    logits = model(input_ids=ids[None]).logits[0, item["prompt_length"] - 1 : -1]
    return torch.nn.functional.cross_entropy(logits.float(), ids[item["prompt_length"] :], reduction="sum").item()


def _read_weights(folder: Path) -> torch.nn.Module:
    """The model, in fp32. Raises BadInput where transformers would begin with random numbers for some weights."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    bad = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if bad:
        raise BadInput(f"{len(bad)} of its weights are missing or do not have the shape of config.json: first {bad[0]}")
    return model


def longest_sequence(train: TokenizedSquad, parts: tuple[TokenizedSquad, ...], max_new_tokens: int) -> dict:
    """The longest sequence that a model will see, in training, evaluation or generation, as an item of a data set.

    Args:
        train: the training questions, for which no answers are generated.
        parts: the other questions.
        max_new_tokens: of a generated answer.
    """
    best = train[int(train.lengths.argmax())]
    for part in parts:
        lengths = np.maximum(part.lengths, part.prompt_lengths + max_new_tokens)
        i = int(lengths.argmax())
        if lengths[i] > len(best["input_ids"]):
            best = part[i]
            best["input_ids"] = np.resize(best["input_ids"], lengths[i])  # tokens do not matter: repeats some
    return best

"""Tries a model before a search: a training step, the longest sequence and an answer, on the CPU, without Ray."""

import math
import os
import time
from pathlib import Path

import numpy as np
import psutil
import torch
import transformers

from hpo import errors, host_memory
from hpo.errors import BadInput
from hpo.squad import evaluation, loading, lora, models
from hpo.squad.data import TokenizedSquad
from hpo.squad.group import ONE_RANK
from hpo.squad.setup import Setup

OTHER = 2 * 10**9  # bytes that this program needs besides the model
SMALL = 10**6  # numbers of a weight that gets a gradient
FEW = 4  # tokens of the answers that are tried
NO_EOS = -1  # no token


def free_memory() -> int:
    """Bytes that this process may still use: of the machine, of its control groups, or of the Slurm job."""
    per_node, per_cpu = (int(os.environ.get(f"SLURM_MEM_PER_{unit}", 0)) << 20 for unit in ("NODE", "CPU"))
    of_job = per_node or per_cpu * int(os.environ.get("SLURM_CPUS_ON_NODE", 1))
    return min(psutil.virtual_memory().available, host_memory.free_in_groups(), of_job or math.inf) - OTHER


def try_model(setup: Setup, test: TokenizedSquad, largest: dict) -> None:
    """Does with the real weights and questions what the trials will do. A mistake would fail all of them.

    A model that does not fit into this machine's memory is not tried; adapters and gradient checkpointing are checked
    for it without the weights.

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
        needs = f"that needs {needed / 1e9:.3g} GB, {max(0, free) / 1e9:.3g} are free"
        print(f"the model is not tried before the search: {needs}; with more memory (sbatch --mem=...) it is")
        return
    began = time.monotonic()
    print("trying the model on the CPU: a training step, the longest sequence, an answer", flush=True)
    tokenizer, what = models.load_tokenizer(setup.model), "reading the weights"
    pad = tokenizer.pad_token_id
    try:
        model = lora.prepare(_read_weights(setup.model), setup, largest)
        what = "a training step"
        _training_step(model, setup.train, largest["per_device_bs"], pad)
        longest = longest_sequence(setup.train, (setup.selection, test), setup.max_new_tokens)
        what = f"the longest sequence, {len(longest['input_ids'])} tokens"
        with torch.no_grad():
            evaluation.answer_loss(model, evaluation.collate([longest], pad))
            what = "two sequences in one batch"
            order = np.argsort(setup.selection.prompt_lengths, kind="stable")
            pair = [setup.selection[i] for i in (order[0], order[len(order) // 2])]
            alone = sum(_plain_loss(model, item) for item in pair)
            together, _ = evaluation.answer_loss(model, evaluation.collate(pair, pad))
            what = "generating an answer"
            few = min(FEW, setup.max_new_tokens)
            answers = [_generate(model, [item], pad, NO_EOS, few)[0] for item in pair]
            same = answers == _generate(model, pair, pad, NO_EOS, few)
            if not same or not math.isclose(alone, together.item(), rel_tol=1e-4):
                raise BadInput("padding on the left of a batch changes its results, so it cannot be used here")
            what = "ending an answer at EOS"
            _check_end(model, pair, answers, pad, few)
    except BadInput as error:
        raise BadInput(f"--model {setup.model}: {error}") from None
    except Exception as error:  # whatever a model raises
        reason = errors.one_line(f"{type(error).__name__}: {error}")
        raise BadInput(f"--model {setup.model}: it fails at {what}: {reason}") from error
    print(f"the model was tried in {time.monotonic() - began:.1f} s", flush=True)


def _read_weights(folder: Path) -> torch.nn.Module:
    """The model in fp32, of which only small weights, such as those of norms, get gradients, for lack of memory.

    They are in all layers, so the backward pass goes through the whole model. Raises BadInput where transformers would
    begin with random numbers for some weights.
    """
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    bad = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if bad:
        raise BadInput(f"{len(bad)} of its weights are missing or do not have the shape of config.json: first {bad[0]}")
    least = min(weight.numel() for weight in model.parameters())
    for weight in model.parameters():
        weight.requires_grad_(weight.numel() <= max(SMALL, least))
    return model


def _training_step(model, train: TokenizedSquad, batch_size: int, pad: int) -> None:
    """Forward and backward pass of a largest batch. Raises FloatingPointError where its loss is NaN or infinite.

    It has the shortest sequences: a batch of the longest ones may fit on a GPU and not here, and `--plan` forecasts
    the memory of a GPU. The longest sequence is tried without gradients, which need most of the memory.
    """
    shortest = np.argsort(train.lengths, kind="stable")[:batch_size]
    model.train()  # gradient checkpointing works in this mode only
    loss, count = evaluation.answer_loss(model, evaluation.collate([train[i] for i in shortest], pad))
    (loss / count).backward()
    model.eval()
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"the loss is {loss.item()}")


def _plain_loss(model, item: dict) -> float:
    """The sum of the cross entropy (nats) over the answer tokens of one sequence, by the plain forward pass."""
    ids = torch.from_numpy(item["input_ids"].astype(np.int64))
    logits = model(input_ids=ids[None]).logits[0, item["prompt_length"] - 1 : -1]
    return torch.nn.functional.cross_entropy(logits.float(), ids[item["prompt_length"] :], reduction="sum").item()


def _generate(model, items: list[dict], pad: int, eos: int, max_new_tokens: int) -> list[list[int]]:
    """The answers, as tokens, to the prompts of some items of a data set, in one batch."""
    prompts = [{**item, "input_ids": item["input_ids"][: item["prompt_length"]]} for item in items]
    batch = evaluation.collate(prompts, pad)
    return evaluation.greedy(model, batch["input_ids"], batch["attention_mask"], eos, max_new_tokens, ONE_RANK)


def _check_end(model, items: list[dict], answers: list[list[int]], pad: int, max_new_tokens: int) -> None:
    """Raises BadInput unless an answer ends at EOS, and the others of its batch go on as they would alone.

    The model may not generate EOS within a few tokens. So a token that it does generate replaces EOS: if possible one
    that ends the answers at different lengths.

    Args:
        model: in eval mode.
        items: of a data set.
        answers: their answers, as tokens, without an end.
        pad: token that a batch is padded with.
        max_new_tokens: most tokens of an answer.
    """

    def ended(eos: int) -> list[list[int]]:
        return [answer[: answer.index(eos)] if eos in answer else answer for answer in answers]

    eos = max(answers[0] + answers[1], key=lambda token: len({len(answer) for answer in ended(token)}))
    if _generate(model, items, pad, eos, max_new_tokens) != ended(eos):
        raise BadInput("an answer changes when another one in its batch has ended, so it cannot be used here")


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

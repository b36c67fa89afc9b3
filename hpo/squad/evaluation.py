"""Batches, loss, greedy answers and their scores."""

import inspect
import re
import string
from collections import Counter

import numpy as np
import torch

from hpo.squad.data import TokenizedSquad

LOGITS = 8  # so many tokens of a sequence are counted for an answer's position, whose logits need memory: 0.5 GB a batch in fp16 for BLOOM's

# ---------------------------------------------------------------------------------------------------------------------
# batching


def collate(examples: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pads on the left, to the longest of the batch.

    On the left all answers end in the same column, so that a model has to compute its logits for the last few columns only, as many as
    the longest answer with EOS has tokens.

    Returns:
        input_ids, attention_mask: int64 (batch, longest).
        labels: int64 (n,), the tokens of all answers, EOS included.
        positions: int64 (n,), where their logits are among those of the last columns, (batch * width,) row by row.
        width: that of these columns, the last one of `labels` has no logits in the batch: the columns begin one earlier.
    """
    longest = max(len(e["input_ids"]) for e in examples)
    width = max(len(e["input_ids"]) - e["prompt_length"] for e in examples)
    input_ids = torch.full((len(examples), longest), pad_token_id)
    attention_mask = torch.zeros((len(examples), longest), dtype=torch.long)
    labels, positions = [], []
    for row, e in enumerate(examples):
        ids = torch.from_numpy(np.asarray(e["input_ids"], np.int64))
        input_ids[row, longest - len(ids) :] = ids
        attention_mask[row, longest - len(ids) :] = 1
        labels.append(ids[e["prompt_length"] :])
        positions.append(torch.arange((row + 1) * width - len(labels[-1]), (row + 1) * width))
    return {
        "input_ids": input_ids, "attention_mask": attention_mask, "labels": torch.cat(labels), "positions": torch.cat(positions), "width": width,
    }  # fmt: skip


def fuse_gelu(model: torch.nn.Module) -> torch.nn.Module:
    """Gives a BLOOM, in place, the GELU of torch: the same function in one operation instead of eight. Others stay as they are."""
    for module in model.modules():
        if type(module).__name__ == "BloomMLP":  # importing it would take seconds, also to refuse a wrong argument
            module.gelu_impl = torch.nn.GELU(approximate="tanh")
    return model


def answer_loss(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Sum of the cross entropy (nats) over the answer tokens of a batch from `collate`, and their number. In fp32, whatever the logits are.

    Picks the logits by their positions: a mask of them would make the CPU wait for the GPU, to know how many there are.
    """
    labels, mask = batch["labels"], batch["attention_mask"]
    keep = {"use_cache": False, "logits_to_keep": batch["width"] + 1}
    logits = model(input_ids=batch["input_ids"], attention_mask=mask, **_positions(model, mask), **keep).logits[:, :-1]
    logits = logits.flatten(0, 1)[batch["positions"]].float()
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), labels.numel()


def _positions(model, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """position_ids of a model whose forward takes them (BLOOM's does not): counted as generate does, behind the padding."""
    takes = "position_ids" in inspect.signature(getattr(model, "module", model).forward).parameters
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if takes else {}


def _shares(lengths: np.ndarray, batch_tokens: int, group) -> list[tuple[np.ndarray, bool]]:
    """Indices by batch, the longest sequences first: those of this rank, see ranks.Group.mine. A batch has batch_tokens tokens at most
    with its padding, or one sequence: many short ones need no more memory than few long ones."""
    order, batches = np.argsort(-lengths, kind="stable"), []
    while len(order):
        rows = max(1, batch_tokens // int(lengths[order[0]]))
        batches.append(order[:rows])
        order = order[rows:]
    return group.mine(batches) if group else [(batch, True) for batch in batches]

# ---------------------------------------------------------------------------------------------------------------------
# evaluating


@torch.no_grad()
def evaluate_loss(model, data: TokenizedSquad, pad_token_id: int, batch_tokens: int, group=None) -> float:
    """Mean cross entropy (nats) over all answer tokens of a set: not a mean of batch means. All ranks of a group (see ranks.py) share
    the work, and each returns the whole set's."""
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    # logits of a large vocabulary need more memory than anything else: an answer's position counts as LOGITS tokens
    lengths = np.maximum(data.lengths, LOGITS * (data.lengths - data.prompt_lengths))
    for indices, counts in _shares(lengths, batch_tokens, group):
        batch = collate([data[i] for i in indices], pad_token_id)
        loss, n = answer_loss(model, {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()})
        total, count = total + loss.item() * counts, count + n * counts
    totals, numbers = zip(*(group.gather((total, count)) if group else [(total, count)]))
    return sum(totals) / sum(numbers)


@torch.no_grad()
def predict(model, tokenizer, data: TokenizedSquad, batch_tokens: int, max_new_tokens: int, group=None) -> list[dict]:
    """Greedy answers, in the order of the data: [{"id", "prediction_text"}]. Prompts of like length share a batch; all ranks of a group
    (see ranks.py) share the batches, and each returns all answers."""
    model.eval()
    device = next(model.parameters()).device
    texts = {}
    for indices, _ in _shares(data.prompt_lengths, batch_tokens, group):
        prompts = [{**data[i], "input_ids": data[i]["input_ids"][: data[i]["prompt_length"]]} for i in indices]
        batch = collate(prompts, tokenizer.pad_token_id)
        input_ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        answers = _greedy(model, input_ids, mask, tokenizer.eos_token_id, max_new_tokens, group)
        for i, text in zip(indices, tokenizer.batch_decode(answers, skip_special_tokens=True)):
            texts[i] = text.strip()
    for others in group.gather(texts) if group else []:
        texts |= others
    return [{"id": reference["id"], "prediction_text": texts[i]} for i, reference in enumerate(data.references)]


def _greedy(model, input_ids: torch.Tensor, mask: torch.Tensor, eos_token_id: int, max_new_tokens: int, group) -> list[list[int]]:
    """The tokens that model.generate gives, without EOS, for prompts that are padded on the left, int64 (batch, longest).

    A row that has come to EOS leaves the batch, where generate computes it on until the last one is through: answers are
    two or three tokens long, and now and then forty. A rank of several that is through keeps one row until all are: with ZeRO 3 the model
    has to be called equally often in each.
    """
    answers: list[list[int]] = [[] for _ in input_ids]
    rows, through, cache = list(range(len(answers))), False, None
    positions = _positions(model, mask)
    for _ in range(max_new_tokens):
        output = model(
            input_ids=input_ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1, **positions
        )
        cache, tokens = output.past_key_values, _argmax(output.logits[:, -1])
        going = []
        for k, token in enumerate(tokens.tolist()):
            if token != eos_token_id and not through:
                answers[rows[k]].append(token)
                going.append(k)
        through = not going
        if all(group.gather(through)) if group else through:
            break
        going = going or [0]
        if len(going) < len(rows):
            rows, kept = [rows[k] for k in going], torch.tensor(going, device=tokens.device)
            tokens, mask, positions = tokens[kept], mask[kept], {name: ids[kept] for name, ids in positions.items()}
            cache.batch_select_indices(kept)
        input_ids, mask = tokens[:, None], torch.nn.functional.pad(mask, (0, 1), value=1)
        positions = {name: ids[:, -1:] + 1 for name, ids in positions.items()}
    return answers


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    """torch.argmax of each row; on a CPU by numpy's, which is faster there."""
    return torch.from_numpy(logits.float().numpy().argmax(-1)) if logits.device.type == "cpu" else logits.argmax(-1)


def normalize_answer(text: str) -> list[str]:
    """Lower case, without punctuation and articles, split at white space: as in the official evaluate-v1.1.py."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def score_answer(prediction: str, reference: str) -> tuple[float, float]:
    """(exact match, F1) of one prediction against one reference."""
    prediction, reference = normalize_answer(prediction), normalize_answer(reference)
    common = (Counter(prediction) & Counter(reference)).total()
    if common == 0:  # the official script gives no F1 for two answers without a word, although they match
        return float(prediction == reference), 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return float(prediction == reference), 2 * precision * recall / (precision + recall)

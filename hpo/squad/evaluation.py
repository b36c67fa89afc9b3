"""Batches, loss and greedy answers. Nothing of Ray in here."""

import inspect

import numpy as np
import torch

from hpo.errors import BadInput
from hpo.squad.data import TokenizedSquad
from hpo.squad.group import ONE_RANK

# The logits of one answer token count as much memory as this many tokens of a sequence: BLOOM's vocabulary has
# 250,880 entries.
LOGITS = 8

# ---------------------------------------------------------------------------------------------------------------------
# batching


def collate(examples: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pads sequences on the left, to the longest of the batch.

    All answers then end in the same column, so a model computes logits for the last columns only: as many as the
    longest answer has tokens, EOS included.

    Returns:
        A dictionary with

        - input_ids, attention_mask: int64 (batch, longest)
        - labels: int64 (n,), the tokens of all answers, EOS included
        - positions: int64 (n,), the place of each label among the last `width` columns, counted row by row
        - width: int, tokens of the longest answer. The logits for a token are those of the column before it.
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
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": torch.cat(labels),
        "positions": torch.cat(positions),
        "width": width,
    }


def fuse_gelu(model: torch.nn.Module) -> torch.nn.Module:
    """Gives a BLOOM, in place, torch's GELU: one operation instead of eight. Leaves other models as they are."""
    for module in model.modules():
        if type(module).__name__ == "BloomMLP":
            module.gelu_impl = torch.nn.GELU(approximate="tanh")
    return model


def answer_loss(model, batch: dict[str, torch.Tensor], reduction: str = "sum") -> tuple[torch.Tensor, int]:
    """The sum of the cross entropy (nats) over the answer tokens of a batch from `collate`, and their number.

    With reduction "none" it is the cross entropy of each token. The loss is computed in fp32. Logits are selected by
    position: selecting them by a mask would make the CPU wait for the GPU, to learn how many there are.
    """
    labels, mask = batch["labels"], batch["attention_mask"]
    keep = {"use_cache": False, "logits_to_keep": batch["width"] + 1}
    output = model(input_ids=batch["input_ids"], attention_mask=mask, **position_ids(model, mask), **keep)
    logits = output.logits[:, :-1]
    logits = logits.flatten(0, 1)[batch["positions"]].float()
    return torch.nn.functional.cross_entropy(logits, labels, reduction=reduction), labels.numel()


def position_ids(model, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The argument position_ids of a model whose forward takes it (BLOOM's does not): counted after the padding."""
    model = getattr(model, "module", model)  # of DeepSpeed's engine
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # without peft's wrapper
    takes = "position_ids" in inspect.signature(model.forward).parameters
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if takes else {}


def batches_by_length(lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Indices of sequences, in batches of similar length, the longest first.

    A batch has at most batch_tokens tokens with its padding, or one sequence.
    """
    order, batches = np.argsort(-lengths, kind="stable"), []
    while len(order):
        rows = max(1, batch_tokens // int(lengths[order[0]]))
        batches.append(order[:rows])
        order = order[rows:]
    return batches


def to_device(batch: dict, device: torch.device) -> dict:
    """A batch with its tensors on a device. The CPU does not wait for the copies."""
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


# ---------------------------------------------------------------------------------------------------------------------
# evaluating


@torch.no_grad()
def evaluate_loss(
    model, data: TokenizedSquad, pad_token_id: int, batch_tokens: int, group=ONE_RANK
) -> tuple[float, np.ndarray]:
    """The mean cross entropy (nats) over all answer tokens of a set, and the sum of each question: float64 (n,).

    The mean is not a mean of means. All ranks of the group share the batches, and each returns the whole result.

    Args:
        model: on the device to compute on.
        data: n sequences.
        pad_token_id: of the tokenizer.
        batch_tokens: of a batch, padding included.
        group: the ranks of the trial, see hpo/squad/ranks.py.
    """
    model.eval()
    device = next(model.parameters()).device
    losses = np.zeros(len(data))
    lengths = np.maximum(data.lengths, LOGITS * data.answer_lengths)
    for indices, counts in group.share(batches_by_length(lengths, batch_tokens)):
        batch = collate([data[i] for i in indices], pad_token_id)
        of_tokens, _ = answer_loss(model, to_device(batch, device), reduction="none")
        if counts:
            question_of = (batch["positions"] // batch["width"]).numpy()
            losses[indices] = np.bincount(question_of, of_tokens.double().cpu().numpy(), len(indices))
    losses = np.sum(group.gather(losses), axis=0)  # in each rank, 0 for the questions of the others
    return float(losses.sum() / data.answer_lengths.sum()), losses


@torch.no_grad()
def predict(
    model, tokenizer, data: TokenizedSquad, batch_tokens: int, max_new_tokens: int, group=ONE_RANK
) -> list[dict]:
    """Greedy answers in the order of the data: [{"id", "prediction_text"}].

    All ranks of the group share the batches, and each returns all answers. For the arguments see `evaluate_loss`.
    """
    model.eval()
    device = next(model.parameters()).device
    texts = {}
    for indices, _ in group.share(batches_by_length(data.prompt_lengths, batch_tokens)):
        prompts = [{**data[i], "input_ids": data[i]["input_ids"][: data[i]["prompt_length"]]} for i in indices]
        batch = collate(prompts, tokenizer.pad_token_id)
        input_ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        answers = greedy(model, input_ids, mask, tokenizer.eos_token_id, max_new_tokens, group)
        for i, text in zip(indices, tokenizer.batch_decode(answers, skip_special_tokens=True), strict=True):
            texts[i] = text.strip()
    for of_rank in group.gather(texts):
        texts |= of_rank
    return [{"id": reference["id"], "prediction_text": texts[i]} for i, reference in enumerate(data.references)]


def greedy(
    model, input_ids: torch.Tensor, mask: torch.Tensor, eos_token_id: int, max_new_tokens: int, group
) -> list[list[int]]:
    """The tokens that model.generate would give, without EOS, for prompts that are padded on the left.

    A row that has produced EOS leaves the batch; generate would compute it until the last row ends, and answers have
    two or three tokens, rarely forty. With several ranks, a rank that has finished keeps one row until all have
    finished: at ZeRO stage 3 every rank must call the model equally often.

    Args:
        model: on the device of the prompts.
        input_ids: int64 (batch, longest).
        mask: int64 (batch, longest), 0 where there is padding.
        eos_token_id: ends an answer.
        max_new_tokens: most tokens of an answer.
        group: the ranks of the trial.

    Raises:
        BadInput: the model has no cache of keys and values.
    """
    answers: list[list[int]] = [[] for _ in input_ids]
    rows, finished, cache = list(range(len(answers))), False, None
    positions = position_ids(model, mask)
    for _ in range(max_new_tokens):
        keep = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        output = model(input_ids=input_ids, attention_mask=mask, **keep, **positions)
        cache, tokens = getattr(output, "past_key_values", None), _argmax(output.logits[:, -1])
        if cache is None:  # a Mamba, or a BERT, which is no causal model
            raise BadInput("generating an answer needs a cache of keys and values, which this model has not")
        going = []
        for k, token in enumerate(tokens.tolist()):
            if token != eos_token_id and not finished:
                answers[rows[k]].append(token)
                going.append(k)
        finished = not going
        if all(group.gather(finished)):
            break
        going = going or [0]
        if len(going) < len(rows):
            rows, kept = [rows[k] for k in going], torch.tensor(going, device=tokens.device)
            tokens, mask = tokens[kept], mask[kept]
            positions = {name: ids[kept] for name, ids in positions.items()}
            cache.reorder_cache(kept)  # keeps these rows; batch_select_indices fails for layers of Mamba
        input_ids, mask = tokens[:, None], torch.nn.functional.pad(mask, (0, 1), value=1)
        positions = {name: ids[:, -1:] + 1 for name, ids in positions.items()}
    return answers


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    """torch.argmax of each row; on a CPU by numpy's, which is faster there."""
    return torch.from_numpy(logits.float().numpy().argmax(-1)) if logits.device.type == "cpu" else logits.argmax(-1)

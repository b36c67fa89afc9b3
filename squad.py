"""SQuAD v1.1 for a causal language model: loading, splitting, tokenising, batching, evaluating. Nothing of Ray in here.

One sequence is   Question: … Context: … Answer: <answer> EOS   and only the answer and EOS are learnt. Rajpurkar et al.,
"SQuAD: 100,000+ Questions for Machine Comprehension of Text", EMNLP 2016.
"""

import gzip
import inspect
import json
import random
import re
import string
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

LOGITS = 8  # so many tokens of a sequence are counted for an answer's position, whose logits need memory: 0.5 GB a batch in fp16 for BLOOM's
ANSWER_ROOM = 48  # tokens kept free after a prompt in evaluation: its length must not depend on the answer

# ---------------------------------------------------------------------------------------------------------------------
# loading: an example is {"id", "title", "context", "question", "answers": {"text": [...], "answer_start": [...]}}


def find_squad_files(folder: Path) -> dict[str, Path]:
    """The files of a folder in SQuAD's own format: {"train": train*.json[.gz], "validation": dev*|validation*.json[.gz]}.

    Raises:
        ValueError: one of them is missing or there are several.
    """
    files = {}
    for split, names in {"train": ["train"], "validation": ["dev", "validation"]}.items():
        found = sorted(p for name in names for end in (".json", ".json.gz") for p in folder.glob(f"{name}*{end}"))
        if len(found) != 1:
            what = " or ".join(f"{name}*.json[.gz]" for name in names)
            raise ValueError(f"{folder}: one file {what} is needed, found {len(found)}")
        files[split] = found[0]
    return files


def read_squad(path: Path) -> list[dict]:
    """The questions of a SQuAD v1.1 JSON file, gzip'd or not, in its order.

    Raises:
        ValueError: not such a file, an answer that is not at its answer_start, a question without an answer, or no
            question at all; the message names file and question.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            articles = json.load(file)["data"]
        examples = [
            {
                "id": str(qa["id"]),
                "title": article.get("title", ""),
                "context": paragraph["context"],
                "question": qa["question"],
                "answers": {
                    "text": [answer["text"] for answer in qa["answers"]],
                    "answer_start": [answer["answer_start"] for answer in qa["answers"]],
                },
            }
            for article in articles
            for paragraph in article["paragraphs"]
            for qa in paragraph["qas"]
        ]
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a SQuAD v1.1 JSON file ({type(error).__name__}: {error})") from None
    check_examples(examples, str(path))
    return examples


def check_examples(examples: list[dict], where: str) -> None:
    """Raises ValueError where an example could teach or score something wrong."""
    if not examples:
        raise ValueError(f"{where}: holds no question")
    if len({e["id"] for e in examples}) < len(examples):
        raise ValueError(f"{where}: question ids are not unique")
    for e in examples:
        context, question, answers = e["context"], e["question"], e["answers"]
        if not isinstance(context, str) or not isinstance(question, str):
            raise ValueError(f"{where}: question {e['id']}: context or question is not a text")
        if not answers["text"]:
            raise ValueError(f"{where}: question {e['id']} has no answer (SQuAD v2 is not supported)")
        for text, start in zip(answers["text"], answers["answer_start"]):
            good = isinstance(text, str) and text.strip() and isinstance(start, int) and start >= 0
            if not good or context[start : start + len(text)] != text:
                raise ValueError(f"{where}: question {e['id']}: answer {text!r} is not at answer_start {start}")


def hold_out(examples: list[dict], size: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Splits off about `size` questions for selection; returns (train, selection).

    Whole articles are held out, whole passages where the set has fewer than two titles, so that no passage is on both
    sides; then the selection is cut to `size`. At most a fifth of the questions' groups is held out.
    """
    for key in ("title", "context"):
        group_of = _groups(examples, key)
        counts = Counter(group_of[e[key]] for e in examples)
        if len(counts) > 1:
            break
    else:
        raise ValueError("the training set has a single passage: nothing can be held out for selection")
    groups = sorted(counts)
    random.Random(seed).shuffle(groups)
    held: set[str] = set()
    questions = 0
    for group in groups:
        if held and (questions >= size or len(held) >= max(1, len(groups) // 5)):
            break
        held.add(group)
        questions += counts[group]
    train = [e for e in examples if group_of[e[key]] not in held]
    selection = [e for e in examples if group_of[e[key]] in held]
    return train, subset(selection, size, seed)


def _groups(examples: list[dict], key: str) -> dict[str, str]:
    """Group of each value of `key`; values that share a passage are one group."""
    parent: dict[str, str] = {}
    first_with: dict[str, str] = {}

    def root(value: str) -> str:
        while parent.setdefault(value, value) != value:
            value = parent[value]
        return value

    for e in examples:
        parent[root(e[key])] = root(first_with.setdefault(e["context"], e[key]))
    return {value: root(value) for value in list(parent)}


def subset(examples: list[dict], size: int | None, seed: int) -> list[dict]:
    """At most `size` examples, drawn at random, in their old order."""
    if size is None or size >= len(examples):
        return examples
    return [examples[i] for i in sorted(random.Random(seed).sample(range(len(examples)), size))]


# ---------------------------------------------------------------------------------------------------------------------
# tokenising


@dataclass
class TokenizedSquad:
    """Sequences in three flat arrays, which Ray shares between processes without a copy. A torch map-style dataset."""

    tokens: np.ndarray  # int32, all sequences one after the other: prompt, answer, EOS
    offsets: np.ndarray  # int64 (n + 1,), where each begins
    prompt_lengths: np.ndarray  # int64 (n,)
    references: list[dict]  # n times {"id", "answers"}, as the metric takes them

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, i: int) -> dict:
        return {
            "input_ids": self.tokens[self.offsets[i] : self.offsets[i + 1]],
            "prompt_length": int(self.prompt_lengths[i]),
        }

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def longest_answer(self) -> int:
        """Most tokens after a prompt, EOS included."""
        return int((self.lengths - self.prompt_lengths).max())


def tokenize(examples: list[dict], tokenizer, max_length: int, training: bool) -> TokenizedSquad:
    """Tokenises examples to at most max_length tokens each (in evaluation: prompts to max_length - ANSWER_ROOM); the first
    answer is the one to learn.

    A context that does not fit is cut to a window, never the question or the answer. In training the window lies around
    the answer; in evaluation it is the one that shares most tokens with the question: where the answer is, is not looked at.

    Raises:
        ValueError: question and answer alone do not fit into max_length.
    """
    heads = tokenizer([f"Question: {e['question'].strip()} Context:" for e in examples], add_special_tokens=False).input_ids
    contexts = tokenizer([f" {e['context']}" for e in examples], add_special_tokens=False, return_offsets_mapping=True)
    answers = tokenizer([f" {e['answers']['text'][0].strip()}" for e in examples], add_special_tokens=False).input_ids
    tail = tokenizer(" Answer:", add_special_tokens=False).input_ids
    sequences, prompt_lengths = [], []
    for i, (e, head, context, answer) in enumerate(zip(examples, heads, contexts.input_ids, answers)):
        answer = answer + [tokenizer.eos_token_id]
        room = max_length - len(head) - len(tail) - (len(answer) if training else ANSWER_ROOM)
        if room < 1:
            raise ValueError(f"question {e['id']}: question and answer alone are longer than {max_length} tokens")
        if len(context) > room:
            if training:
                begin = e["answers"]["answer_start"][0] + 1  # for the space in front
                start = _window_around(contexts["offset_mapping"][i], begin, begin + len(e["answers"]["text"][0]), room)
            else:
                start = _window_like(head, context, room)
            context = context[start : start + room]
        prompt = head + context + tail
        sequences.append(prompt + answer)
        prompt_lengths.append(len(prompt))
    return TokenizedSquad(
        tokens=np.fromiter((t for s in sequences for t in s), np.int32, sum(map(len, sequences))),
        offsets=np.cumsum([0] + [len(s) for s in sequences], dtype=np.int64),
        prompt_lengths=np.array(prompt_lengths, np.int64),
        references=[{"id": e["id"], "answers": e["answers"]} for e in examples],
    )


def _window_around(offsets: list[tuple[int, int]], begin: int, end: int, room: int) -> int:
    """First token of a window of `room` tokens with the characters [begin, end) in its middle."""
    inside = [j for j, (a, b) in enumerate(offsets) if a < end and b > begin]
    middle = (inside[0] + inside[-1] + 1) // 2
    return min(max(0, middle - room // 2), len(offsets) - room)


def _window_like(question: list[int], context: list[int], room: int) -> int:
    """First token of the window of `room` tokens with the most different tokens of the question; the first of equals."""
    wanted = set(question)
    starts = list(range(0, len(context) - room, max(1, room // 4))) + [len(context) - room]
    return max(starts, key=lambda start: len(wanted.intersection(context[start : start + room])))


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

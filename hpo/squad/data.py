"""SQuAD v1.1 for a causal language model: reading, splitting, tokenising. Nothing of torch or Ray in here.

A sequence is   Question: … Context: … Answer: <answer> EOS   and only the answer and EOS are learnt. Rajpurkar et al.,
"SQuAD: 100,000+ Questions for Machine Comprehension of Text", EMNLP 2016.

An example is {"id", "title", "context", "question", "answers": {"text": [...], "answer_start": [...]}}.
"""

import gzip
import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ANSWER_ROOM = 48  # tokens kept free for the answer in evaluation: a prompt's length must not depend on the answer

# ---------------------------------------------------------------------------------------------------------------------
# reading and splitting


def find_squad_files(folder: Path) -> dict[str, Path]:
    """The files of a folder: {"train": train*.json[.gz], "validation": dev*.json[.gz] or validation*.json[.gz]}.

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
        for text, start in zip(answers["text"], answers["answer_start"], strict=False):
            good = isinstance(text, str) and text.strip() and isinstance(start, int) and start >= 0
            if not good or context[start : start + len(text)] != text:
                raise ValueError(f"{where}: question {e['id']}: answer {text!r} is not at answer_start {start!r}")


def hold_out(examples: list[dict], size: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Splits off about `size` questions for selection. Returns (train, selection).

    Whole articles are held out, or whole passages if all have one title: no passage is on both sides. Then the
    selection is cut to `size`. At most a fifth of the articles, or passages, is held out.
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
    """The group of each value of `key`. Values that share a passage are in one group."""
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
    """Sequences in three flat arrays, which Ray shares between processes without a copy. A map-style data set."""

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
        """Tokens of each sequence, int64 (n,)."""
        return np.diff(self.offsets)

    @property
    def longest_answer(self) -> int:
        """Most tokens after a prompt, EOS included."""
        return int((self.lengths - self.prompt_lengths).max())


def tokenize(examples: list[dict], tokenizer, max_length: int, training: bool) -> TokenizedSquad:
    """Tokenises examples. The first answer of each is the one to learn.

    A context that does not fit is cut to a window; the question and the answer are never cut. In training the window
    lies around the answer. In evaluation it is the window that shares most tokens with the question, so it does not
    depend on the answer.

    Args:
        examples: n questions.
        tokenizer: a fast one.
        max_length: tokens of a sequence; in evaluation of a prompt and ANSWER_ROOM.
        training: in training or in evaluation.

    Raises:
        ValueError: question and answer alone do not fit into max_length.
    """
    heads = [f"Question: {e['question'].strip()} Context:" for e in examples]
    heads = tokenizer(heads, add_special_tokens=False).input_ids
    contexts = [f" {e['context']}" for e in examples]
    contexts = tokenizer(contexts, add_special_tokens=False, return_offsets_mapping=True)
    answers = [f" {e['answers']['text'][0].strip()}" for e in examples]
    answers = tokenizer(answers, add_special_tokens=False).input_ids
    tail = tokenizer(" Answer:", add_special_tokens=False).input_ids
    sequences, prompt_lengths = [], []
    for i, (e, head, context, answer) in enumerate(zip(examples, heads, contexts.input_ids, answers, strict=True)):
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
    """First token of the first window of `room` tokens that has most different tokens of the question."""
    wanted = set(question)
    starts = list(range(0, len(context) - room, max(1, room // 4))) + [len(context) - room]
    return max(starts, key=lambda start: len(wanted.intersection(context[start : start + room])))

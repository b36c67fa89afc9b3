"""SQuAD for a causal language model: splitting and tokenising. Nothing of torch or Ray in here.

A sequence is   Question: … Context: … Answer: <answer> EOS   and only the answer and EOS are learnt. Rajpurkar et al.,
"SQuAD: 100,000+ Questions for Machine Comprehension of Text", EMNLP 2016. Without an answer it ends with Answer: EOS.
Rajpurkar et al., "Know What You Don't Know: Unanswerable Questions for SQuAD", ACL 2018.

For the form of an example see hpo/squad/reading.py.
"""

import bisect
import itertools
import random
from collections import Counter
from dataclasses import dataclass

import numpy as np

from hpo.errors import BadInput
from hpo.squad import leakage

ANSWER_ROOM = 48  # tokens kept free for an answer in evaluation: the length of a prompt must not depend on it


def hold_out(examples: list[dict], size: int, seed: int, leaks: dict | None = None) -> tuple[list[dict], list[dict]]:
    """Splits off about `size` questions for selection. Returns (train, selection).

    Whole articles are held out, or whole passages if all have one title: no passage is on both sides. Near-duplicates
    of questions in `train` are left out of the selection, unless all are; more articles are held out in their place.
    Then the selection is cut to `size`. At most a fifth of the articles, or passages, is held out. What is left out is
    on neither side, as is what the cut removes: so `train` stays the same whatever is left out, unless more articles
    are needed.

    Args:
        examples: the questions of the training set.
        size: questions of the selection, at most.
        seed: of the draw.
        leaks: gets the counts of `leakage.find`. None to leave nothing out, as in older runs.

    Raises:
        ValueError: nothing can be held out.
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
    questions = list(itertools.accumulate(counts[group] for group in groups))
    number, most = 0, max(1, len(groups) // 5)  # of groups that are held out
    missing = size
    while missing > 0 and number < most:
        reached = questions[number - 1] if number else 0
        number = min(bisect.bisect_left(questions, reached + missing) + 1, most)
        held = set(groups[:number])
        train = [e for e in examples if group_of[e[key]] not in held]
        selection = [e for e in examples if group_of[e[key]] in held]
        if leaks is None:
            break
        affected, found = leakage.find(selection, train)
        leaks.update(found)
        clean = [e for e in selection if e["id"] not in affected]
        missing = size - len(clean)
        selection = clean or selection
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
    passages: np.ndarray  # int64 (n,), equal for questions on the same passage
    references: list[dict]  # n times {"id", "answers"}, as the metric takes them

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, i: int) -> dict:
        return {
            "input_ids": self.tokens[self.offsets[i] : self.offsets[i + 1]],
            "prompt_length": int(self.prompt_lengths[i]),
        }

    def take(self, indices) -> "TokenizedSquad":
        """Some of the sequences, as a data set of their own."""
        items = [self[i] for i in indices]
        return TokenizedSquad(
            tokens=np.concatenate([item["input_ids"] for item in items]),
            offsets=np.cumsum([0] + [len(item["input_ids"]) for item in items], dtype=np.int64),
            prompt_lengths=np.array([item["prompt_length"] for item in items], np.int64),
            passages=self.passages[list(indices)],
            references=[self.references[i] for i in indices] if self.references else [],
        )

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int64 (n,)."""
        return np.diff(self.offsets)

    @property
    def answer_lengths(self) -> np.ndarray:
        """Tokens after each prompt, EOS included, int64 (n,)."""
        return self.lengths - self.prompt_lengths

    @property
    def longest_answer(self) -> int:
        """Most tokens after a prompt, EOS included."""
        return int(self.answer_lengths.max())


def tokenize(examples: list[dict], tokenizer, max_length: int, training: bool) -> TokenizedSquad:
    """Tokenises examples. The first answer of each is the one to learn; without an answer that is EOS alone.

    A text is tokenised as a whole, and gets the special tokens in front that the tokenizer itself puts there, such as
    BOS. A context that does not fit is cut to a window; the question and the answer are never cut. In training the
    window lies around the answer. In evaluation, and without an answer, it is the window that shares most tokens with
    the question, so it does not depend on the answer.

    Args:
        examples: n questions.
        tokenizer: a fast one.
        max_length: most tokens, in training of a sequence, in evaluation of a prompt.
        training: in training or in evaluation.

    Raises:
        ValueError: a question and its answer alone do not fit into max_length.
    """
    heads = [f"Question: {e['question'].strip()} Context:" for e in examples]
    prompts = [f"{head} {e['context']} Answer:" for head, e in zip(heads, examples, strict=True)]
    answers = [next(iter(e["answers"]["text"]), "").strip() for e in examples]
    # Without an answer a text ends with its prompt: a space after it could become a token of its own.
    texts = [f"{prompt} {answer}".rstrip() for prompt, answer in zip(prompts, answers, strict=True)]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    prefix = special_prefix(tokenizer)
    sequences, prompt_lengths, passages = [], [], {}
    for e, head, prompt, ids, offsets in zip(
        examples, heads, prompts, encoded.input_ids, encoded["offset_mapping"], strict=True
    ):
        ends = [end for _, end in offsets]
        # Characters at which the parts end, as numbers of tokens. A token across an end belongs to the part after it.
        parts = len(head), len(head) + 1 + len(e["context"]), len(prompt)
        head_end, context_end, prompt_end = (bisect.bisect_right(ends, characters) for characters in parts)
        context, answer = ids[head_end:context_end], ids[prompt_end:] + [tokenizer.eos_token_id]
        rest = len(prefix) + prompt_end - len(context)  # of the prompt
        room = max_length - rest - (len(answer) if training else 0)
        if room < 1:
            raise ValueError(
                f"question {e['id']}: question{' and answer' * training} alone are longer than {max_length} tokens"
            )
        if len(context) > room:
            if training and e["answers"]["text"]:
                begin = len(head) + 1 + e["answers"]["answer_start"][0]
                end = begin + len(e["answers"]["text"][0])
                start = _window_around(offsets[head_end:context_end], begin, end, room)
            else:
                start = _window_like(ids[:head_end], context, room)
            context = context[start : start + room]
        prompt = prefix + ids[:head_end] + context + ids[context_end:prompt_end]
        sequences.append(prompt + answer)
        prompt_lengths.append(len(prompt))
    return TokenizedSquad(
        tokens=np.fromiter((t for s in sequences for t in s), np.int32, sum(map(len, sequences))),
        offsets=np.cumsum([0] + [len(s) for s in sequences], dtype=np.int64),
        prompt_lengths=np.array(prompt_lengths, np.int64),
        passages=np.array([passages.setdefault(e["context"], len(passages)) for e in examples], np.int64),
        references=[{"id": e["id"], "answers": e["answers"]} for e in examples],
    )


def special_prefix(tokenizer) -> list[int]:
    """The special tokens that a tokenizer puts in front of a text: BOS for Llama or Gemma, none for BLOOM.

    Raises BadInput where a text has other tokens between special ones than without them.
    """
    with_special, without = (tokenizer("a", add_special_tokens=special).input_ids for special in (True, False))
    for start in range(len(with_special)):
        if with_special[start : start + len(without)] == without:
            return with_special[:start]
    text = "a text has other tokens between special tokens than without them"
    raise BadInput(f"--model {tokenizer.name_or_path}: its tokenizer cannot be used: {text}")


def _window_around(offsets: list[tuple[int, int]], begin: int, end: int, room: int) -> int:
    """First token of a window of `room` tokens with the characters [begin, end) in its middle."""
    inside = [j for j, (a, b) in enumerate(offsets) if a < end and b > begin]
    inside = inside or [min(bisect.bisect([a for a, _ in offsets], begin), len(offsets) - 1)]  # it has no token
    middle = (inside[0] + inside[-1] + 1) // 2
    return min(max(0, middle - room // 2), len(offsets) - room)


def _window_like(question: list[int], context: list[int], room: int) -> int:
    """First token of the first window of `room` tokens that has most different tokens of the question."""
    wanted = set(question)
    starts = list(range(0, len(context) - room, max(1, room // 4))) + [len(context) - room]
    return max(starts, key=lambda start: len(wanted.intersection(context[start : start + room])))

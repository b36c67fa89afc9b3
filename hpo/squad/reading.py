"""Reads data sets in the form of SQuAD v1.1 or 2.0, from JSON or parquet files. Nothing of torch or Ray in here.

An example is {"id", "title", "context", "question", "answers": {"text": [...], "answer_start": [...]}}. The lists are
empty if the question has no answer.
"""

import gzip
import json
import zlib
from collections import Counter
from pathlib import Path

from hpo import errors


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


def read_squad(path: Path, dropped: Counter | None = None) -> list[dict]:
    """The questions of a SQuAD JSON file, gzip'd or not, in its order.

    Args:
        path: of the file. It is a training set if its name begins with "train", else a validation set.
        dropped: see `check_questions`.

    Raises:
        ValueError: not such a file, or what `check_questions` raises; the message names the file.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            articles = json.loads(file.read())["data"]  # from bytes: json knows byte order marks
        questions = [
            {**qa, "title": article.get("title"), "context": paragraph.get("context")}
            for article in articles
            for paragraph in article["paragraphs"]
            for qa in paragraph["qas"]
        ]
    except (OSError, EOFError, zlib.error, RecursionError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a SQuAD JSON file ({type(error).__name__}: {error})") from None
    return check_questions(questions, str(path), "train" if path.name.startswith("train") else "validation", dropped)


def read_parquet(files: list[Path], name: str, split: str, dropped: Counter | None = None) -> list[dict]:
    """The questions of one split of a data set on the hub, in the order of its parquet files.

    Args:
        files: of the split.
        name: of the data set, for messages.
        split: "train" or "validation".
        dropped: see `check_questions`.

    Raises:
        ValueError: a file cannot be read or lacks a column, or what `check_questions` raises.
    """
    import pyarrow.parquet  # a folder with JSON files does not need it

    questions = []
    for path in files:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                columns = file.schema_arrow.names
                used = ("id", "title", "context", "question", "answers", "is_impossible")
                rows = file.read([c for c in columns if c in used])
                questions += rows.to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            raise ValueError(f"{name}: {path.name} cannot be read: {errors.one_line(error)}") from None
        for column in ("context", "question", "answers"):
            if column not in columns:
                has = errors.one_line(", ".join(columns))
                raise ValueError(f"{name}: {path.name} has no column {column!r} (it has {has})")
    return check_questions(questions, f"{name}, {split}", split, dropped)


def check_questions(questions: list[dict], where: str, split: str, dropped: Counter | None = None) -> list[dict]:
    """Makes examples, as this module has them, of the questions of a file.

    A question without an id gets one from its split and its place in it, counted from 0: "train#7".

    Args:
        questions: {"id", "title", "context", "question", "answers", "is_impossible"}, see `_example`.
        where: the file or the split, for messages.
        split: "train" or "validation".
        dropped: None to refuse bad answers. A Counter to leave them out, with the questions that have no other
            answer; "answers" and "questions" count them, "read" counts all questions.

    Raises:
        ValueError: a question could teach or score something wrong, or there is none.
    """
    examples, bad, answer_count = [], [], 0
    for place, question in enumerate(questions):
        name = question.get("id")
        name = f"{split}#{place}" if name in (None, "") else str(name)
        try:
            example, faults, count = _example(name, question)
        except ValueError as error:
            raise ValueError(f"{where}: {_named(name)}: {error}") from None
        examples += [example] if example else []
        bad += [f"{_named(name)}: {fault}" for fault in faults]
        answer_count += count
    if bad and dropped is None:
        hint = "correct them, or leave them out with --drop_bad_answers"
        first = "; ".join(bad[:3])
        raise ValueError(f"{where}: {len(bad)} of {answer_count} answers cannot be used: {first}; {hint}")
    if dropped is not None:
        dropped.update(answers=len(bad), questions=len(questions) - len(examples), read=len(questions))
    if not examples:
        raise ValueError(f"{where}: holds no question" + " with a good answer" * bool(questions))
    if len({e["id"] for e in examples}) < len(examples):
        repeated = [name for name, count in Counter(e["id"] for e in examples).items() if count > 1]
        raise ValueError(f"{where}: question ids are not unique: {len(repeated)} repeated, first {_named(repeated[0])}")
    return examples


def _example(name: str, question: dict) -> tuple[dict | None, list[str], int]:
    """The example that is made of a question.

    An answer is bad if it is not at its answer_start. If it differs there in white space only, the context's own text
    replaces it. Answers of a wrong form, or that contradict is_impossible, count as one bad answer.

    Args:
        name: its id.
        question: see `check_questions`. Answers are a list of {"text", "answer_start"}, one of them, or {"text": [...],
            "answer_start": [...]}. A question has no answer if there is none or all texts are empty. is_impossible may
            be missing.

    Returns:
        The example, or None if all its answers are bad; what is wrong with each bad answer; the number of its answers.

    Raises:
        ValueError: context, question or answer is no text, or one that UTF-8 cannot encode.
    """
    context, title = question.get("context"), question.get("title")
    _check_texts(context, question.get("question"), name)
    try:
        answers = _answers(question.get("answers"), question.get("is_impossible"))
    except ValueError as error:
        return None, [str(error)], 1
    _check_texts(*(text for text, _ in answers if isinstance(text, str)))
    faults, texts, starts = [], [], []
    for text, start in answers:
        begin, end = _locate(text, start, context)
        if begin < end:
            texts.append(context[begin:end])
            starts.append(begin)
        else:
            faults.append(_fault(text, start))
    example = {
        "id": name,
        "title": "" if title is None else str(title),
        "context": context,
        "question": question["question"],
        "answers": {"text": texts, "answer_start": starts},
    }
    return example if texts or not answers else None, faults, len(answers)


def _check_texts(*texts) -> None:
    """Raises ValueError unless these are texts that UTF-8 has."""
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("context or question is not a text")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise ValueError(f"{half} is half a character (a lone surrogate): correct the text") from None


def _answers(answers, is_impossible) -> list[tuple]:
    """The (text, answer_start) of a question's answers, in any of their forms; none if it is unanswerable.

    Raises:
        ValueError: they have another form, or contradict is_impossible.
    """
    if answers is None:
        if is_impossible is not True:
            raise ValueError('it has no "answers"; a question without an answer has an empty list, or is_impossible')
        answers = []
    if isinstance(answers, dict) and isinstance(answers.get("text"), (str, int, float)):
        answers = [answers]
    elif isinstance(answers, dict):
        texts, starts = answers.get("text") or [], answers.get("answer_start") or []
        if isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts):
            answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
        raise ValueError(f"not a SQuAD list of answers, with text and answer_start: {_short(answers)}")
    pairs = [(answer.get("text"), answer.get("answer_start")) for answer in answers]
    if all(text == "" for text, _ in pairs):
        pairs = []
    if is_impossible not in (None, not pairs):
        has, must = ("an answer", "false") if pairs else ("no answer", "true")
        raise ValueError(f"it has {has}, so is_impossible must be {must} or missing, and it is {_short(is_impossible)}")
    return pairs


def _locate(text, start, context: str) -> tuple[int, int]:
    """The characters [begin, end) of a context that are an answer, white space left aside; (0, 0) if it is bad."""
    text = str(text) if type(text) in (int, float) else text
    try:
        start = float(start) if isinstance(start, str) else start
    except ValueError:
        return 0, 0
    if isinstance(start, float) and start.is_integer():
        start = int(start)
    if not isinstance(text, str) or not text.strip() or type(start) is not int or start < 0:
        return 0, 0
    if context.startswith(text, start):
        return start, start + len(text)
    begin = start
    while text[0].isspace() and context[begin : begin + 1].isspace():
        begin += 1
    end = begin
    for character in "".join(text.split()):
        while end > begin and context[end : end + 1].isspace():
            end += 1
        if context[end : end + 1] != character:
            return 0, 0
        end += 1
    return begin, end


def _fault(text, start) -> str:
    """What is wrong with an answer that `_locate` does not find."""
    if text is None or isinstance(text, str) and not text.strip():
        return f"answer {_short(text)} is empty"
    if start is None:
        return f"answer {_short(text)} has no answer_start"
    return f"answer {_short(text)} is not at answer_start {_short(start)}"


def _named(name: str) -> str:
    """A question in a message. A lone surrogate could not be printed."""
    return "question " + errors.one_line(name, 60).encode("utf-8", "backslashreplace").decode()


def _short(value) -> str:
    """A value as Python writes it, at most 60 characters: for messages."""
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"

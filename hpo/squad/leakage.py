"""Leakage: near-duplicates of passages and questions in another set. Nothing of torch or Ray in here.

Texts are compared by their words. Case, punctuation and white space do not count, as in Brown et al., "Language Models
are Few-Shot Learners", NeurIPS 2020, appendix C. docs/models.md says what is found and what is missed.
"""

import functools
import re
import unicodedata

import numpy as np

# Words of an n-gram. With 2 or 3 most copied texts are found: Barrón-Cedeño and Rosso, "On Automatic Plagiarism
# Detection Based on n-Grams Comparison", ECIR 2009. With 2 a changed word costs least.
N = 2
RESEMBLANCE = 0.85  # from here on two passages are near-duplicates
CONTAINMENT = 0.95  # from here on a passage is a part of another one
PART = 25  # n-grams of the shortest passage of which this is asked: a shorter one may be a common phrase
# Scripts without spaces: Thai, Lao, Burmese, Khmer, Japanese, Chinese. There each character counts as a word.
NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
INDIC = "\u0900-\u0963\u0966-\u0dff"  # with its vowel signs, which are no letters to \w
WORD = re.compile(rf"(?:[^\W_{NO_SPACES}]|[{INDIC}])+|[{NO_SPACES}]")


def words(text: str) -> tuple[str, ...]:
    """The words of a text: runs of letters and digits, after case folding and NFKC."""
    return tuple(WORD.findall(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())))


@functools.lru_cache(maxsize=None)  # selection and test are compared with the same texts; `prepare` clears the caches
def ngrams(text: str) -> np.ndarray:
    """Hashes of the different n-grams of a text, int64. A text of fewer words is one n-gram; without words, none."""
    own = words(text)
    grams = set(zip(*(own[i:] for i in range(N)), strict=False)) or {own}
    return np.fromiter(map(hash, grams if own else ()), np.int64)


@functools.lru_cache(maxsize=None)
def question_key(question: str) -> str:
    """The words of a question as one text: the same for questions with the same words, empty without words."""
    return " ".join(words(question))


def clear_caches() -> None:
    """Frees the memory of what was compared."""
    ngrams.cache_clear()
    question_key.cache_clear()


def near_duplicates(texts: list[str], others: list[str]) -> set[str]:
    """Those of `texts` that resemble one of the others, or are a part of one.

    The resemblance of two texts is the number of n-grams that both have, divided by the number of those that at least
    one has; the containment of a text in another one is divided by the number of its own: Broder, "On the resemblance
    and containment of documents", SEQUENCES 1997. Broder estimates both from a sample. Here they are exact, except that
    two n-grams may have the same 64-bit hash.
    """
    if not texts or not others:
        return set()
    of_others = [ngrams(text) for text in others]
    sizes = np.array([len(grams) for grams in of_others])
    grams, owners = np.concatenate(of_others), np.repeat(np.arange(len(others)), sizes)
    order = np.argsort(grams)
    grams, owners = grams[order], owners[order]
    found = set()
    for text in texts:
        own = ngrams(text)
        begin, end = (np.searchsorted(grams, own, side) for side in ("left", "right"))
        if not len(own) or np.mean(begin < end) < RESEMBLANCE:
            continue  # too few of its n-grams stand anywhere in the others; so it is with most texts
        shared = np.concatenate([owners[a:b] for a, b in zip(begin, end, strict=True)])
        shared = np.bincount(shared, minlength=len(others))
        resembles = shared >= RESEMBLANCE * (len(own) + sizes - shared)
        is_part = (shared >= CONTAINMENT * len(own)) & (len(own) >= PART)
        if (resembles | is_part).any():
            found.add(text)
    return found


def same_questions(examples: list[dict], others: list[dict]) -> set[str]:
    """Ids of the questions that the others have with the same words and the same answer, on whatever passage.

    If the others ask the question several times, it must share an answer with each of them: the answer to "What is the
    population?" depends on the passage, so the words alone are no help. A question without an answer does not count.
    """
    by_key: dict[str, list[set]] = {question_key(e["question"]): [] for e in examples}
    for other in others:
        if (same := by_key.get(question_key(other["question"]))) is not None:
            same.append(_answers(other))
    found = set()
    for e in examples:
        key, answers = question_key(e["question"]), _answers(e)
        if key and by_key[key] and all(answers & theirs for theirs in by_key[key]):
            found.add(e["id"])
    return found


def _answers(example: dict) -> set[tuple]:
    """The answers of a question, each as its words, or as it is if it has none, such as "%"."""
    return {words(text) or (text,) for text in example["answers"]["text"]}


def find(examples: list[dict], others: list[dict]) -> tuple[set[str], dict[str, int]]:
    """Compares questions with others. For their form see hpo/squad/reading.py.

    Returns:
        Ids of the questions of `examples` that are affected: on a near-duplicate passage, or near-duplicates
        themselves. And the counts: "passages" and "questions" that are near-duplicates, out of "of_passages" and
        "of_questions"; "affected".
    """
    passages, rest = (list(dict.fromkeys(e["context"] for e in some)) for some in (examples, others))
    near, same = near_duplicates(passages, rest), same_questions(examples, others)
    affected = same | {e["id"] for e in examples if e["context"] in near}
    counts = {"passages": len(near), "of_passages": len(passages), "questions": len(same)}
    return affected, counts | {"of_questions": len(examples), "affected": len(affected)}

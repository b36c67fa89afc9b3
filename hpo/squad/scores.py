"""EM and F1 of answers: their normalisation by language, one answer, and a set of SQuAD 2.0. Standard library only.

Sources: evaluate-v1.1.py and evaluate-v2.0.py of https://rajpurkar.github.io/SQuAD-explorer for English;
mlqa_evaluation_v1.py of https://github.com/facebookresearch/MLQA for the other languages.
"""

import re
import string
import unicodedata
from collections import Counter

# What is removed as an article, by language. These are all languages of --metric_language.
ARTICLES = {
    "en": r"\b(a|an|the)\b",
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "hi": None,
    "vi": r"\b(của|là|cái|chiếc|những)\b",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "ar": "ال",  # also within a word. The official pattern is \sال^|ال, and the part before | never matches
    "zh": None,
}


def normalize_answer(text: str, language: str = "en") -> list[str]:
    """Lower case, without punctuation and articles, split at white space; in Chinese each character is a token.

    Args:
        text: an answer.
        language: a key of ARTICLES. In English, punctuation is that of ASCII, as in SQuAD's scripts. In the other
            languages it is that of Unicode and of ASCII, as in MLQA's script.

    Returns:
        The tokens.
    """
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    if language != "en":
        text = "".join(c for c in text if not unicodedata.category(c).startswith("P"))
    if ARTICLES[language]:
        text = re.sub(ARTICLES[language], " ", text)
    if language == "zh":
        text = re.sub("([\u4e00-\u9fa5])", r" \1 ", text)
    return text.split()


def score_answer(prediction: str, reference: str, language: str = "en") -> tuple[float, float]:
    """(exact match, F1) of one prediction against one reference, as in SQuAD v1.1 and MLQA."""
    prediction, reference = normalize_answer(prediction, language), normalize_answer(reference, language)
    common = (Counter(prediction) & Counter(reference)).total()
    if common == 0:  # the official scripts give no F1 for two answers without a word, although they match
        return float(prediction == reference), 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return float(prediction == reference), 2 * precision * recall / (precision + recall)


def best_score(prediction: str, references: list[str], language: str = "en") -> tuple[float, float]:
    """(exact match, F1) of one prediction, each the best over all references, as in SQuAD v1.1 and MLQA."""
    pairs = [score_answer(prediction, reference, language) for reference in references]
    return max(em for em, _ in pairs), max(f1 for _, f1 in pairs)


def best_score_v2(prediction: str, references: list[str], language: str = "en") -> tuple[float, float]:
    """(exact match, F1) of one prediction, as in SQuAD 2.0; see `squad_v2`."""
    references = [reference for reference in references if normalize_answer(reference, language)] or [""]
    em, f1 = best_score(prediction, references, language)
    # Two answers without a word have F1 1 in SQuAD 2.0, and 0 in v1.1. All other answers that match have F1 1.
    return em, max(em, f1)


def of_questions(
    predictions: list[dict], references: list[dict], language: str, unanswerable: bool
) -> list[tuple[float, float]]:
    """(exact match, F1) of each question. Predictions and references are in the same order.

    Args:
        predictions: {"id", "prediction_text"}.
        references: {"id", "answers": {"text": [...]}}.
        language: see `normalize_answer`.
        unanswerable: as in SQuAD 2.0, and not as in v1.1.
    """
    score = best_score_v2 if unanswerable else best_score
    pairs = zip(predictions, references, strict=True)
    return [score(p["prediction_text"], reference["answers"]["text"], language) for p, reference in pairs]


def squad_v2(predictions: list[dict], references: list[dict], language: str = "en") -> dict[str, float]:
    """EM and F1 as the official script of SQuAD 2.0 computes them, as fractions of 1.

    The right answer to a question without an answer is the empty text. A reference answer that is nothing after
    normalisation does not count.

    Args:
        predictions: {"id", "prediction_text"}, one for each question.
        references: {"id", "answers": {"text": [...]}}; the list is empty where a question has no answer.
        language: see `normalize_answer`.

    Returns:
        exact_match and f1 of all questions, HasAns_exact and HasAns_f1 of those with an answer, NoAns_exact and
        NoAns_f1 of those without one. A pair is left out if there are no such questions.

    Raises:
        ValueError: there is no reference, or a question has no prediction.
    """
    if not references:
        raise ValueError("no references")
    texts = {prediction["id"]: prediction["prediction_text"] for prediction in predictions}
    found: dict[str, list[tuple[float, float]]] = {"HasAns": [], "NoAns": []}  # (exact match, F1) of each question
    for reference in references:
        if reference["id"] not in texts:  # the official script ends with an error, too
            raise ValueError(f"question {reference['id']} has no prediction")
        answers = reference["answers"]["text"]
        found["HasAns" if answers else "NoAns"].append(best_score_v2(texts[reference["id"]], answers, language))

    def means(rows: list[tuple[float, float]], names: tuple[str, str]) -> dict[str, float]:
        return {name: sum(column) / len(rows) for name, column in zip(names, zip(*rows, strict=True), strict=True)}

    scores = means(found["HasAns"] + found["NoAns"], ("exact_match", "f1"))
    for group, rows in found.items():
        scores |= means(rows, (f"{group}_exact", f"{group}_f1")) if rows else {}
    return scores

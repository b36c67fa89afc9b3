"""EM and F1: SQuAD 2.0, the languages of MLQA, and where a user sees them."""

import dataclasses
import json
import string
import sys
import types
import unicodedata
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import raytune_bayesian
from hpo import arguments, checks, errors, files
from hpo.results import report, tables, trackers
from hpo.squad import evaluation, scores
from hpo.squad.probe import try_model
from hpo.squad.setup import prepare
from test_report import SomeTrial, make_log, tell
from test_squad import random_model, without_answers

LANGUAGES = list(scores.ARTICLES)

# -- SQuAD 2.0 --------------------------------------------------------------------------------------------------------


def squad_v2(pairs):
    """pairs: [(prediction, [reference answers])]"""
    predictions = [{"id": str(i), "prediction_text": prediction} for i, (prediction, _) in enumerate(pairs)]
    references = [
        {"id": str(i), "answers": {"text": answers, "answer_start": [0] * len(answers)}}
        for i, (_, answers) in enumerate(pairs)
    ]
    return scores.squad_v2(predictions, references)


ARTICLES = {  # of evaluate-v2.0.py (en) and mlqa_evaluation_v1.py
    "en": "a an the", "es": "un una unos unas el la los las", "vi": "của là cái chiếc những",
    "de": "ein eine einen einem eines einer der die das den dem des",
}  # fmt: skip


def words(text, language="en"):
    """The words that the official scripts compare, written anew from their rules."""
    marks = set(string.punctuation)
    if language != "en":
        marks |= {c for c in text.lower() if unicodedata.category(c) in ("Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po")}
    letters = "".join(" " if c.isspace() else c for c in text.lower() if c not in marks)
    if language == "ar":  # the article is a part of its word
        letters = " ".join(letters.split("ال"))
    if language == "zh":
        letters = "".join(f" {c} " if 0x4E00 <= ord(c) <= 0x9FA5 else c for c in letters)
    runs = [""]  # an article is a word between characters that are not \w
    for c in letters:
        is_word = c.isalnum() or c == "_"
        if runs[-1] and is_word != (runs[-1][-1].isalnum() or runs[-1][-1] == "_"):
            runs.append("")
        runs[-1] += c
    return "".join(" " if run in ARTICLES.get(language, "").split() else run for run in runs).split()


def word_f1(gold, found):
    """The harmonic mean of precision and recall of words; two answers without a word are equal."""
    if not gold or not found:
        return 1.0 if gold == found else 0.0
    left, same = list(gold), 0
    for word in found:
        if word in left:
            left.remove(word)
            same += 1
    return 2 * same / (len(gold) + len(found))  # the harmonic mean of same / found and same / gold


def expected_v2(pairs):
    """What evaluate-v2.0.py prints, as fractions of 1."""
    exact, overlap = [], []
    for prediction, answers in pairs:
        golds = [words(answer) for answer in answers if words(answer)]
        golds = golds or [[]]  # only the empty answer is right
        exact.append(max(float(gold == words(prediction)) for gold in golds))
        overlap.append(max(word_f1(gold, words(prediction)) for gold in golds))
    means = {}
    has = [bool(answers) for _, answers in pairs]
    for of, names in {None: ("exact_match", "f1"), True: ("HasAns_exact", "HasAns_f1"),
                      False: ("NoAns_exact", "NoAns_f1")}.items():  # fmt: skip
        for name, values in zip(names, (exact, overlap), strict=True):
            chosen = [value for value, answerable in zip(values, has, strict=True) if of in (None, answerable)]
            if chosen:
                means[name] = sum(chosen) / len(chosen)
    return means


WORDS = ["the", "a", "an", "The", "moon", "Moon's", "1,000", "é", "İ", "don’t", "U.S.", "—", "", ".", "the_", "x"]
english = st.one_of(
    st.just(""),
    st.lists(st.sampled_from(WORDS), max_size=5).map(" ".join),
    st.text(alphabet=string.punctuation + " theano\u00a0\n", max_size=12),
    st.text(alphabet=st.characters(categories=("L", "N", "P", "S", "Z", "Cc")), max_size=8),
)


@given(st.lists(st.tuples(english, st.lists(english, max_size=3)), min_size=1, max_size=8))
@settings(max_examples=500)
def test_squad_v2_equals_the_rules_of_the_official_script(pairs):
    found = squad_v2(pairs)
    assert found == pytest.approx(expected_v2(pairs), abs=1e-12)
    assert list(found)[:2] == ["exact_match", "f1"] and set(found) <= {*tables.METRICS, *tables.V2_METRICS}


def test_squad_v2_known_values():
    assert squad_v2([("moon", ["The Moon"]), ("", []), ("sun", []), ("full moon", ["moon", "sun"])]) == {
        "exact_match": 0.5, "f1": pytest.approx((1 + 1 + 0 + 2 / 3) / 4),
        "HasAns_exact": 0.5, "HasAns_f1": pytest.approx((1 + 2 / 3) / 2),
        "NoAns_exact": 0.5, "NoAns_f1": 0.5,
    }  # fmt: skip
    assert squad_v2([("the.", [])]) == dict.fromkeys(("exact_match", "f1", "NoAns_exact", "NoAns_f1"), 1.0)
    right = dict.fromkeys(("exact_match", "f1", "HasAns_exact", "HasAns_f1"), 1.0)
    assert (
        squad_v2([("", ["the"])]) == right
    )  # the reference is nothing after normalisation, so the empty text is right
    assert squad_v2([("", ["the", "moon"])]) == dict.fromkeys(right, 0.0)  # one of two: it does not count
    metric = raytune_bayesian.SquadMetric()
    references = [{"id": "1", "answers": {"text": ["the"], "answer_start": [0]}}]
    in_v1 = metric.compute(predictions=[{"id": "1", "prediction_text": ""}], references=references)
    assert in_v1 == {"exact_match": 1.0, "f1": 0.0}


def test_squad_v2_refuses_what_cannot_be_scored():
    with pytest.raises(ValueError, match="^no references$"):
        scores.squad_v2([], [])
    with pytest.raises(ValueError, match="^question 7 has no prediction$"):
        scores.squad_v2([], [{"id": "7", "answers": {"text": [], "answer_start": []}}])


# -- languages --------------------------------------------------------------------------------------------------------

KNOWN = [  # language, prediction, reference, exact match, F1
    ("en", "The Moon.", "moon", 1, 1),
    ("en", "¿moon?", "moon", 0, 0),  # as in SQuAD's scripts: ¿ is no punctuation of ASCII
    ("es", "¿La luna?", "luna", 1, 1),
    ("es", "unos niños", "Niños", 1, 1),
    ("es", "elefante", "fante", 0, 0),  # whole words only
    ("es", "the luna", "luna", 0, 2 / 3),  # not an article of Spanish
    ("hi", "दिल्ली।", "दिल्ली", 1, 1),
    ("hi", "नई दिल्ली", "दिल्ली", 0, 2 / 3),
    ("vi", "Những cái bàn của tôi", "bàn tôi", 1, 1),
    ("vi", "Hà Nội", "Nội", 0, 2 / 3),
    ("de", "„Die Straße“", "straße", 1, 1),
    ("de", "des Mondes, eines", "Mondes", 1, 1),
    ("de", "Derby", "by", 0, 0),
    ("ar", "القمر؟", "قمر", 1, 1),
    ("ar", "والسلام،", "و سلام", 1, 1),  # also within a word, as in the official script
    ("zh", "北京大学", "北京", 0, 2 / 3),
    ("zh", "北京。", "《北京》，", 1, 1),
    ("zh", "北京ABC 大学", "北 京 abc 大 学", 1, 1),
    ("zh", "2008年", "2008", 0, 2 / 3),
    ("zh", "一龥", "龥", 0, 2 / 3),  # the first and the last character that is a token
    ("zh", "龦㐀", "龦", 0, 0),
]


@pytest.mark.parametrize(("language", "prediction", "reference", "exact", "f1"), KNOWN)
def test_known_answers_in_each_language(language, prediction, reference, exact, f1):
    assert scores.score_answer(prediction, reference, language) == (exact, pytest.approx(f1))
    pair = [{"id": "1", "prediction_text": prediction}], [{"id": "1", "answers": {"text": [reference]}}]
    references = [{"id": "1", "answers": {"text": [reference], "answer_start": [0]}}]
    metric = raytune_bayesian.SquadMetric(language)
    assert metric.compute(predictions=pair[0], references=references) == {"exact_match": exact, "f1": pytest.approx(f1)}
    assert scores.squad_v2(*pair, language)["HasAns_f1"] == pytest.approx(f1)


def test_each_language_has_a_known_answer():
    assert {language for language, *_ in KNOWN} == set(LANGUAGES)


def test_punctuation_is_that_of_unicode_outside_english():
    marks = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c).startswith("P")]
    assert len(marks) > 800 and "。" in marks and "¿" in marks
    for language in set(LANGUAGES) - {"en"}:
        assert scores.normalize_answer("x" + "".join(marks) + string.punctuation + "y", language) == ["xy"]
        assert scores.normalize_answer("5 € ± 3", language) == ["5", "€", "±", "3"]  # symbols are not punctuation
    assert scores.normalize_answer("¿$x。") == ["¿x。"]


answer = st.one_of(
    st.sampled_from([text for _, *texts, _, _ in KNOWN for text in texts]),
    st.lists(st.sampled_from([word for _, *texts, _, _ in KNOWN for text in texts for word in text.split()])).map(
        " ".join
    ),
    st.text(max_size=10),
)


@given(st.one_of(answer, english), st.one_of(answer, english), st.sampled_from(LANGUAGES))
@settings(max_examples=500)
def test_scores_equal_the_rules_of_the_official_scripts(prediction, reference, language):
    """Those of SQuAD v1.1 in English, of MLQA in the other languages: no F1 for two answers without a word."""
    found, gold = words(prediction, language), words(reference, language)
    expected = float(found == gold), word_f1(gold, found) if gold else 0.0
    assert scores.score_answer(prediction, reference, language) == pytest.approx(expected, abs=1e-12)


@given(answer, answer, st.sampled_from(LANGUAGES))
@settings(max_examples=500)
def test_scores_are_symmetric_and_consistent(one, other, language):
    exact, f1 = scores.score_answer(one, other, language)
    assert scores.score_answer(other, one, language) == (exact, f1)
    words = scores.normalize_answer(one, language)
    assert exact in (0.0, 1.0) and 0 <= f1 <= 1
    assert f1 == 1.0 or not (exact and words)
    assert scores.score_answer(one, one, language) == (1.0, 1.0 if words else 0.0)
    assert (f1 > 0) == bool(Counter(words) & Counter(scores.normalize_answer(other, language)))
    v2 = scores.squad_v2([{"id": "1", "prediction_text": one}], [{"id": "1", "answers": {"text": [other]}}], language)
    assert v2["exact_match"] == exact
    assert v2["f1"] == (f1 if scores.normalize_answer(other, language) else exact)


# -- where a user sees them -------------------------------------------------------------------------------------------


def test_answers_are_scored_in_the_language_of_the_run(tmp_path, tokenizer, tiny_squad):
    """The references are the model's own answers, with a mark that is punctuation in all languages but English."""
    model = random_model("bloom", tokenizer, std=0.3).eval()  # it has an answer with a word to each question
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    argv = ["--model", str(tmp_path), "--dataset", str(tiny_squad), "--metric_language", "zh"]
    args = checks.check(arguments.parse("", [*argv, "--max_eval_samples", "6"]))
    setup, questions = prepare(args, raytune_bayesian.MAX_LENGTH, raytune_bayesian.SELECTION_SIZE, 2)
    assert setup.metric_language == "zh"
    threads = torch.get_num_threads()
    try:
        own = evaluation.predict(model, tokenizer, questions, raytune_bayesian.EVAL_TOKENS, setup.max_new_tokens)
        marked = [f"。{prediction['prediction_text']}" for prediction in own]
        assert all(scores.normalize_answer(text, "zh") for text in marked)
        references = [
            {"id": prediction["id"], "answers": {"text": [text], "answer_start": [0]}}
            for prediction, text in zip(own, marked, strict=True)
        ]
        answerable = dataclasses.replace(questions, references=references)
        tested, _ = raytune_bayesian.test(tmp_path, answerable, setup)
        assert {"exact_match": 1.0, "f1": 1.0} == {name: tested[name] for name in tables.METRICS[1:]}
        english, _ = raytune_bayesian.test(tmp_path, answerable, dataclasses.replace(setup, metric_language="en"))
        assert english["exact_match"] == 0.0
        for reference in references[:2]:  # now two questions of six have no answer, and the model gives one
            reference["answers"] = {"text": [], "answer_start": []}
        tested, (_, each) = raytune_bayesian.test(tmp_path, answerable, dataclasses.replace(setup, unanswerable=True))
        assert sum(em for em, _ in each) == 4
        assert {name: value for name, value in tested.items() if name != "eval_loss"} == {
            "exact_match": 4 / 6, "f1": 4 / 6,
            "HasAns_exact": 1.0, "HasAns_f1": 1.0, "NoAns_exact": 0.0, "NoAns_f1": 0.0,
        }  # fmt: skip
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("damaged", [{}, {"train": 3}, {"dev": 3}, {"train": 3, "dev": 3}, {"train": 1, "dev": 1}])
def test_selection_and_test_are_scored_alike(tmp_path, tiny_model, tokenizer, tiny_squad, damaged):
    """As in SQuAD 2.0 if any of the two files has a question without an answer, whatever the few questions have."""
    dataset = without_answers(tiny_squad, tmp_path / "squad", damaged)
    argv = ["--model", str(tiny_model), "--dataset", str(dataset), "--max_eval_samples", "6"]
    args = checks.check(arguments.parse("", argv))
    setup, test = prepare(args, raytune_bayesian.MAX_LENGTH, raytune_bayesian.SELECTION_SIZE, 2)
    assert setup.unanswerable == bool(damaged)
    try_model(setup, test, {"per_device_bs": 2, "lora_r": 0})
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for split, questions in {"train": setup.selection, "dev": test}.items():
        has = {bool(reference["answers"]["text"]) for reference in questions.references}
        assert has == {None: {True}, 3: {True, False}, 1: {False}}[damaged.get(split)]
        names = {"HasAns": True in has, "NoAns": False in has} if damaged else {}
        expected = {f"{group}_{one}" for group, shown in names.items() if shown for one in ("exact", "f1")}
        found, _ = raytune_bayesian.answer_scores(model, tokenizer, questions, setup)
        assert set(found) == {"exact_match", "f1", *expected}


V2 = {"HasAns_exact": 0.25, "HasAns_f1": 0.5, "NoAns_exact": 0.75, "NoAns_f1": 0.8125}


def test_tables_have_columns_of_squad_v2_only_for_such_data(tmp_path):
    for name, more in {"v1": {}, "v2": V2}.items():
        log, folder = make_log(tmp_path / name), tmp_path / name
        a, b = SomeTrial("a", folder), SomeTrial("b", folder)
        for trial in (a, b):
            trial.config["train_loop_config"] |= {"momentum": 0.9}
            log.on_trial_start(0, [], trial)
        tell(log, a, 1, 1.0)  # no rung: eval_loss only
        tell(log, b, 3, 1.0, 0.5, **more)  # the first trial has no result yet
        log.save([a, b])
        trials, iterations = (files.read_csv(folder / f"{table}.csv") for table in ("trials", "iterations"))
        assert list(trials[0]) == [*tables.TRIAL_FIELDS, "momentum", *more]
        assert list(iterations[0]) == [*tables.ITERATION_FIELDS, *more]
        for first, second in (trials, iterations):
            assert [first[key] for key in more] == [None] * len(more)
            assert {key: second[key] for key in more} == more
        for rows in (trials, list(log.trials.values())):
            found = tables.hyperparameter_columns(rows)
            assert found == ["learning_rate", "batch_size", "weight_decay", "momentum"]
            assert tables.result_rows(rows, "eval_loss")[0] == [
                "Trial ID", "Learning Rate", "Batch Size", "Weight Decay", "momentum", "Eval Loss", "EM", "F1",
                "Iterations",
            ]  # fmt: skip


def test_trackers_get_the_metrics_of_squad_v2():
    sent = []
    callback = trackers.TrackerCallback("some", lambda: types.SimpleNamespace(log=lambda *told: sent.append(told)))
    callback.setup()
    trial = types.SimpleNamespace(trial_id="a")
    for more in ({}, V2):
        result = {"training_iteration": 3, "eval_loss": 1.0, "node": "here", **more}
        callback.on_trial_result(0, [], trial, result)
    assert sent == [("a", 3, {"eval_loss": 1.0}), ("a", 3, {"eval_loss": 1.0, **V2})]


def test_test_line_has_the_metrics_of_squad_v2():
    tested = {"questions": 9, "eval_loss": 1.5, "exact_match": 0.5, "f1": 0.625}
    run = {"status": "done", "arguments": {"num_samples": 3, "metric": "f1"}}
    name = "Test of the best model, on 9 questions that no decision has used"
    line = "eval_loss 1.5000, exact_match 0.5000, f1 0.6250"
    assert report.facts_of(run | {"test": tested}, [], [])[name] == line
    line += ", HasAns_exact 0.2500, HasAns_f1 0.5000, NoAns_exact 0.7500, NoAns_f1 0.8125"
    assert report.facts_of(run | {"test": tested | V2}, [], [])[name] == line


@pytest.mark.parametrize("of_run", [None, "en", "zh"])
def test_a_resumed_run_keeps_its_language(tmp_path, of_run):
    """Runs that are older than the flag are English."""
    argv = ["--run_name", "x", "--output_dir", str(tmp_path)]
    given = ["--precision", "fp32", *(["--metric_language", of_run] if of_run else [])]
    kept = arguments.kept(arguments.parse("", [*argv, *given]))
    if of_run is None:
        del kept["metric_language"]
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "run.json").write_text(json.dumps({"arguments": kept, "search_space": {}}))
    assert arguments.parse("", [*argv, "--resume"]).metric_language == (of_run or "en")
    message = f"--resume: other arguments than the run's: --metric_language de (the run has {of_run or 'en'})"
    with pytest.raises(errors.BadInput) as error:
        arguments.parse("", [*argv, "--resume", "--metric_language", "de"])
    assert str(error.value) == message


def test_another_language_is_refused():
    with pytest.raises(errors.BadInput) as error:
        arguments.parse("", ["--metric_language", "fr"])
    assert str(error.value) == (
        "argument --metric_language: invalid choice: 'fr' (choose from 'en', 'es', 'hi', 'vi', 'de', 'ar', 'zh')"
    )

"""Near-duplicates between selection, test and training set: hpo/squad/leakage.py."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import raytune_bayesian
from bench import common
from conftest import make_squad
from hpo.results import tables
from hpo.results.report import facts_of
from hpo.squad import data, leakage, loading, reading
from hpo.squad.setup import prepare

WORDS = ["Haus", "Straße", "école", "Москва", "Ωμέγα", "1984", "東京都", "北京大学", "ﬁsh", "x", "of", "the"]
BREAKS = [" ", "\n", " \t\u00a0", " — ", "... ", ", ", "\u3000「", "_"]


def spaced(text: str) -> str:
    """The same text with other white space."""
    return "\n " + text.replace(" ", " \t\u00a0")


@given(st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(BREAKS), st.sampled_from([str.upper, str.lower])),
                min_size=1, max_size=60))  # fmt: skip
def test_other_case_punctuation_and_white_space_are_always_found(parts):
    text, changed = " ".join(word for word, _, _ in parts), "".join(case(word) + end for word, end, case in parts)
    assert leakage.near_duplicates([changed], ["Another text.", text]) == {changed}


@given(st.integers(0, 2**32), st.integers(10, 80))
def test_texts_of_random_words_are_never_found(seed, length):
    rng = random.Random(seed)
    texts = [" ".join(f"w{rng.randrange(1000)}" for _ in range(length)) for _ in range(10)]
    assert leakage.near_duplicates(texts[:5], texts[5:]) == set()


def pairs(text: str) -> set:
    words = text.split()
    return set(zip(words, words[1:], strict=False)) or {tuple(words)} - {()}


short = st.lists(st.sampled_from("abc"), max_size=9).map(" ".join)


@given(st.lists(short, max_size=6, unique=True), st.lists(short, max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=200)
def test_all_pairs_are_compared_whatever_their_order(texts, others, rng):
    expected = {
        text
        for text in texts
        for other in others
        if pairs(text) and len(pairs(text) & pairs(other)) >= 0.85 * len(pairs(text) | pairs(other))
    }
    assert leakage.near_duplicates(texts, others) == expected
    rng.shuffle(texts)
    rng.shuffle(others)
    assert leakage.near_duplicates(texts, others) == expected


@pytest.mark.parametrize("changed, found", [(4, True), (5, False)])
def test_a_passage_of_120_words_is_found_after_four_changes(changed, found):
    """The numbers of docs/models.md."""
    words = [f"w{i}" for i in range(120)]
    other = [f"other{i}" if i % 20 == 10 and i < 20 * changed else word for i, word in enumerate(words)]
    assert bool(leakage.near_duplicates([" ".join(other)], [" ".join(words)])) == found


@pytest.mark.parametrize("length, found", [(120, True), (26, True), (25, False)])
def test_a_passage_that_is_a_part_of_a_longer_one_is_found(length, found):
    """One word of 120 is changed. A passage of 25 words has 24 pairs: it is too short."""
    words = [f"w{i}" for i in range(300)]
    part = words[100 : 100 + length]
    if length == 120:
        part[60] = "other"
    assert bool(leakage.near_duplicates([" ".join(part)], [" ".join(words)])) == found
    assert not leakage.near_duplicates([" ".join(words)], [" ".join(part)])


def test_a_sentence_in_chinese_is_compared_by_its_characters():
    text = "臺灣的首都是哪一個城市？它在什麼時候成為首都，人口有多少？"
    assert leakage.near_duplicates([spaced(text.replace("，", " "))], [text])
    assert not leakage.near_duplicates(["日本的首都是東京，它是日本最大的城市。"], [text])


def question(name, text, *answers, context="c", title="t"):
    answers = {"text": list(answers), "answer_start": [0] * len(answers)}
    return {"id": name, "title": title, "context": context, "question": text, "answers": answers}


@pytest.mark.parametrize(
    "own, others, found",
    [
        (("Who is  it?", "Bo"), [("WHO is it", "bo.")], True),
        (("Who is it?", "Al", "Bo"), [("Who is it?", "Bo", "Cy")], True),
        (("Who is it?", "Bo"), [("Who is it?", "Al")], False),
        (("Who is it?", "Bo"), [("Who is it?", "Bo"), ("Who is it?", "Al")], False),  # a generic question
        (("Who is it?", "Bo"), [("Who was it?", "Bo")], False),
        (("Which sign?", "%"), [("Which sign?", "%")], True),
        (("Which sign?", "%"), [("Which sign?", "&")], False),
        (("Who is it?",), [("Who is it?",)], False),  # without an answer, as in SQuAD 2.0
        (("?", "Bo"), [("?", "Bo")], False),
    ],
)
def test_a_question_needs_the_same_words_and_the_same_answer(own, others, found):
    same = leakage.same_questions([question("own", *own)], [question(str(i), *o) for i, o in enumerate(others)])
    assert same == ({"own"} if found else set())


# -- selection --------------------------------------------------------------------------------------------------------


def articles(rng, count):
    """Articles of ten questions, each on a passage of its own."""
    return [
        question(f"{a}-{p}", f"What is {a} {p}?", "w", title=f"t{a}", context=" ".join(rng.choices(WORDS, k=5) + [
            f"w{rng.randrange(10**6)}" for _ in range(30)])) for a in range(count) for p in range(10)
    ]  # fmt: skip


def test_near_duplicates_are_left_out_of_the_selection_and_others_take_their_place():
    examples = articles(random.Random(1), 30)
    train, selection = data.hold_out(examples, 20, 7)
    assert data.hold_out(examples, 20, 7, {}) == (train, selection)  # nothing to leave out: nothing changes
    copies = [
        e | {"id": f"copy {e['id']}", "context": spaced(e["context"]), "title": train[0]["title"]}
        for e in selection[:4]
    ]
    found = {}
    more_train, clean = data.hold_out(examples + copies, 20, 7, found)
    assert len(clean) == 20 and not {e["id"] for e in clean} & {e["id"] for e in selection[:4]}
    assert found == {"passages": 4, "of_passages": 30, "questions": 4, "of_questions": 30, "affected": 4}
    assert len(more_train) == len(train) + 4 - 10  # a third article is held out
    assert leakage.find(clean, more_train)[0] == set()


def test_a_selection_of_near_duplicates_only_is_kept_with_a_warning():
    examples = articles(random.Random(1), 2)
    copies = [e | {"id": f"copy {e['id']}", "context": spaced(e["context"]), "title": "x"} for e in examples]
    found = {}
    train, selection = data.hold_out(examples + copies, 5, 7, found)
    assert len(selection) == 5 and found["affected"] == found["of_questions"] > 0
    assert leakage.find(selection, train)[0] == {e["id"] for e in selection}
    (line,) = tables.leakage_in_words({"selection": found})
    assert line.startswith("WARNING: ") and line.endswith("questions are affected and stay, as no others are left")


def test_a_question_alone_is_left_out():
    examples = articles(random.Random(1), 30)
    train, selection = data.hold_out(examples, 20, 7)
    same = question("same", selection[3]["question"].upper(), "W.", context="w other", title=train[0]["title"])
    found = {}
    _, clean = data.hold_out([*examples, same], 20, 7, found)
    assert found["questions"] == found["affected"] == 1 and found["passages"] == 0 and len(clean) == 20
    assert selection[3] not in clean


# -- a run ------------------------------------------------------------------------------------------------------------


def copy_of(paragraph: dict, prefix: str) -> dict:
    """A passage of a JSON file and its questions, with other white space and other ids."""
    copy = json.loads(json.dumps(paragraph)) | {"context": spaced(paragraph["context"])}
    for qa in copy["qas"]:
        qa["id"] = prefix + qa["id"]
        for answer in qa["answers"]:
            answer["text"] = answer["text"].replace(" ", " \t\u00a0")
            answer["answer_start"] = copy["context"].index(answer["text"])
    return copy


def plant(folder):
    """Writes a tenth of the validation passages of a data set into its training set. Returns the folder."""
    train, dev = (json.loads((folder / f"{split}.json").read_text())["data"] for split in ("train", "dev"))
    passages = [paragraph for article in dev for paragraph in article["paragraphs"]]
    for article, paragraph in zip(train, passages[::10], strict=False):
        article["paragraphs"].append(copy_of(paragraph, "copy-"))
    (folder / "train.json").write_text(json.dumps({"data": train}))
    return folder


def prepared(model, dataset, *more):
    """The arguments, the setup and the test questions of a run, as the script prepares them."""
    flags = ["--model", model, "--dataset", dataset, "--max_t", 1, "--report_to", "none", *more]
    args = common.checks.check(common.arguments.parse("", list(map(str, flags))))
    return args, *prepare(args, raytune_bayesian.MAX_LENGTH, 20, 2)


def test_a_tenth_of_the_validation_passages_in_the_training_set_is_counted(tiny_model, tmp_path):
    """The test keeps all its questions. Those of --max_eval_samples are fewer, and the counts are those of the set."""
    folder = plant(make_squad(tmp_path))
    expected = {"passages": 6, "of_passages": 60, "questions": 0, "of_questions": 60, "affected": 6}
    _, setup, test = prepared(tiny_model, folder)
    assert setup.leakage["test"] == expected and setup.leakage["selection"]["affected"] == 0
    assert len(test) == 60 and len(setup.selection) == 20
    _, setup, test = prepared(tiny_model, folder, "--max_eval_samples", 9, "--max_train_samples", 30)
    assert setup.leakage["test"] == expected and len(test) == len(setup.selection) == 9


def test_an_older_run_keeps_its_selection(tiny_model, tmp_path):
    """With its near-duplicates: results on two selections could not be compared."""
    folder = make_squad(tmp_path / "squad")
    _, older, _ = prepared(tiny_model, folder)
    chosen = [reference["id"] for reference in older.selection.references]
    train = json.loads((folder / "train.json").read_text())["data"]
    own, other = ([a for a in train if (a["title"] == f"train {chosen[0].split('-')[1]}") == held] for held in (1, 0))
    other[0]["paragraphs"] += [copy_of(paragraph, "copy-") for paragraph in own[0]["paragraphs"][:3]]
    (folder / "train.json").write_text(json.dumps({"data": train}))
    loading.load_examples.cache_clear()
    name = ["--output_dir", tmp_path / "results", "--run_name", "x"]
    args, checked, _ = prepared(tiny_model, folder, *name)
    assert checked.leakage["selection"]["affected"] == 3
    run = {"arguments": common.arguments.kept(args), "search_space": {}}
    (tmp_path / "results" / "x").mkdir(parents=True)
    for facts, same in (({}, True), ({"leakage": {"test": {}}}, True), ({"leakage": checked.leakage}, False)):
        (tmp_path / "results" / "x" / "run.json").write_text(json.dumps(run | facts))
        _, setup, _ = prepared(tiny_model, folder, *name, "--resume", "--new_code")
        ids = [reference["id"] for reference in setup.selection.references]
        assert (ids == chosen, "selection" not in setup.leakage) == (same, same)


def test_the_report_has_the_counts_if_there_are_any():
    run = {"status": "done", "arguments": {"metric": "eval_loss", "num_samples": 1}}
    counts = {"passages": 207, "of_passages": 2067, "questions": 1, "of_questions": 10570, "affected": 1032}
    none = dict.fromkeys(counts, 0)
    assert "Near-duplicates" not in facts_of(run | {"leakage": {"selection": none, "test": none}}, [], [])
    assert facts_of(run | {"leakage": {"selection": none, "test": counts}}, [], [])["Near-duplicates"] == (
        "WARNING: 207 of 2067 passages and 1 of 10570 questions of the validation set have a near-duplicate in the "
        "training set: 1032 questions are affected"
    )


@pytest.mark.slow
def test_all_of_the_real_validation_set_is_compared(shared_squad):
    """With the part of the training set that is there. The copies are found, and nothing else than without them."""
    train, dev = (reading.read_squad(reading.find_squad_files(shared_squad)[s]) for s in ("train", "validation"))
    affected, counts = leakage.find(dev, train)
    assert counts == {"passages": 2, "of_passages": 2067, "questions": 0, "of_questions": 10570, "affected": 9}
    contexts = list(dict.fromkeys(e["context"] for e in dev))[::10]
    copies = [e | {"context": spaced(e["context"]).upper()} for e in dev if e["context"] in contexts]
    more, counts = leakage.find(dev, train + copies)
    assert more == affected | {e["id"] for e in copies} and counts["passages"] in range(207, 210)
    assert counts["questions"] == len(leakage.same_questions(dev, copies)) >= 0.99 * len(copies)
    found = {}
    data.hold_out(train, 1000, 42, found)
    assert found["affected"] == 0

"""Data, objective and metric: squad.py, and SquadMetric in raytune_bayesian.py."""

import dataclasses
import gzip
import json
import math
import shutil
import string
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
import torch
import torchmetrics.text
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import raytune_bayesian
from hpo.results import tables
from hpo.squad import data as squad_data
from hpo.squad import evaluation, group, loading, reading, scores
from raytune_bayesian import SquadMetric

# -- loading ----------------------------------------------------------------------------------------------------------


def test_reads_plain_and_gzipped_files(tiny_squad, tmp_path):
    plain = reading.read_squad(tiny_squad / "train.json")
    with gzip.open(tmp_path / "train-v1.1.json.gz", "wt") as file:
        file.write((tiny_squad / "train.json").read_text())
    (tmp_path / "validation.json").write_text((tiny_squad / "dev.json").read_text())
    files = reading.find_squad_files(tmp_path)
    assert reading.read_squad(files["train"]) == plain and len(plain) == 400
    assert len(reading.read_squad(files["validation"])) == 60


def squad_json(folder, *answers, name="train", **fields) -> Path:
    """Writes a set with one passage and one question for each answer; gives the file."""
    context = "In 1984 the  old\xa0town\nhad 7 gates of 5.5 m."
    qas = [{"id": f"q{i}", "question": "?", "answers": [a]} | fields for i, a in enumerate(answers)]
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": [{"context": context, "qas": qas}]}]}))
    return path


@pytest.mark.parametrize("title, read", [(None, ""), (1984, "1984"), (["a"], "['a']")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_titles_of_any_kind_and_byte_order_marks_are_read(tmp_path, title, read, encoding):
    path = squad_json(tmp_path, {"text": "1984", "answer_start": 3})
    path.write_text(path.read_text().replace('"t"', json.dumps(title)), encoding=encoding)
    assert [e["title"] for e in reading.read_squad(path)] == [read]


@pytest.mark.parametrize("name, ids", [("train", ["train#0", "train#1"]), ("dev", ["validation#0", "validation#1"])])
def test_a_question_without_an_id_gets_one(tmp_path, name, ids):
    answer = {"text": "1984", "answer_start": 3}
    assert [e["id"] for e in reading.read_squad(squad_json(tmp_path, answer, answer, name=name, id=None))] == ids


def test_numbers_as_texts_and_other_white_space_are_read(tmp_path):
    answers = [
        {"text": "1984", "answer_start": "3"},
        {"text": 1984, "answer_start": 3.0},
        {"text": 5.5, "answer_start": 37},
        {"text": "the old town", "answer_start": 8},
        {"text": " old\ttown  had ", "answer_start": 13},
        {"text": "5.5 m .", "answer_start": 37},
    ]
    found = [e["answers"] for e in reading.read_squad(squad_json(tmp_path, *answers))]
    assert found == [
        {"text": [text], "answer_start": [start]}
        for text, start in [
            ("1984", 3), ("1984", 3), ("5.5", 37), ("the  old\xa0town", 8), ("old\xa0town\nhad", 13), ("5.5 m.", 37)
        ]  # fmt: skip
    ]


HINT = "correct them, or leave them out with --drop_bad_answers"


def test_bad_answers_are_refused_or_dropped(tmp_path):
    good, bad = {"text": "7", "answer_start": 26}, {"text": "old", "answer_start": 26}
    path = squad_json(tmp_path, bad, good, bad, bad, bad)
    with pytest.raises(ValueError) as error:
        reading.read_squad(path)
    first = "; ".join(f"question {i}: answer 'old' is not at answer_start 26" for i in ("q0", "q2", "q3"))
    assert str(error.value) == f"{path}: 4 of 5 answers cannot be used: {first}; {HINT}"

    dropped = Counter()
    assert [e["id"] for e in reading.read_squad(path, dropped)] == ["q1"]
    assert dropped == {"answers": 4, "questions": 4, "read": 5}
    some, dropped = squad_json(tmp_path, good, answers=[bad, good]), Counter()
    assert reading.read_squad(some, dropped)[0]["answers"] == {"text": ["7"], "answer_start": [26]}
    assert dropped == {"answers": 1, "questions": 0, "read": 1}
    with pytest.raises(ValueError, match="train.json: holds no question with a good answer$"):
        reading.read_squad(squad_json(tmp_path, bad), Counter())


NO_ANSWER = {"text": [], "answer_start": []}


def without_answers(original, folder, every):
    """A copy of a data set in which every so many-th question of a file has no answer, as in SQuAD 2.0."""
    folder.mkdir()
    for split in ("train", "dev"):
        content = json.loads((original / f"{split}.json").read_text())
        qas = [qa for article in content["data"] for paragraph in article["paragraphs"] for qa in paragraph["qas"]]
        for qa in qas:
            qa["is_impossible"] = False
        for qa in qas[:: every[split]] if split in every else ():
            qa |= {"answers": [], "plausible_answers": qa["answers"], "is_impossible": True}
        (folder / f"{split}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "form",
    [
        {"answers": [], "is_impossible": True, "plausible_answers": [{"text": "7", "answer_start": 26}]},
        {"answers": NO_ANSWER},
        {"answers": {"text": "", "answer_start": -1}},
        {"answers": {"text": "", "answer_start": -1}, "is_impossible": True},
        {"answers": {"text": [""], "answer_start": [-1]}, "is_impossible": True},
        {"answers": [{"text": "", "answer_start": -1}]},
        {"answers": None, "is_impossible": True},
    ],
)
def test_questions_without_an_answer_are_read(tmp_path, form):
    """From JSON and from parquet. No bad answer is found in them."""
    good, dropped = {"text": "7", "answer_start": 26}, Counter()
    path = squad_json(tmp_path, good, good)
    content = json.loads(path.read_text())
    (paragraph,) = content["data"][0]["paragraphs"]
    paragraph["qas"][1] |= form
    path.write_text(json.dumps(content))
    examples = reading.read_squad(path, dropped)
    assert [e["answers"] for e in examples] == [{"text": ["7"], "answer_start": [26]}, NO_ANSWER]
    assert dropped == {"answers": 0, "questions": 0, "read": 2}
    row = {**paragraph["qas"][1], "context": paragraph["context"], "title": "t"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "train.parquet")
    assert reading.read_parquet([tmp_path / "train.parquet"], "set", "train") == examples[1:]


@pytest.mark.parametrize(
    "answers, told, has, must",
    [
        ([], False, "no answer", "true"),
        ([{"text": "", "answer_start": -1}], "yes", "no answer", "true"),
        ([{"text": "7", "answer_start": 26}], True, "an answer", "false"),
    ],
)
def test_is_impossible_must_agree_with_the_answers(tmp_path, answers, told, has, must):
    what = f"question q0: it has {has}, so is_impossible must be {must} or missing, and it is {told!r}"
    path = squad_json(tmp_path, None, None, None, None, answers=answers, is_impossible=told)
    with pytest.raises(ValueError) as error:
        reading.read_squad(path)
    named = "; ".join(what.replace("q0", name) for name in ("q0", "q1", "q2"))
    assert str(error.value) == f"{path}: 4 of 4 answers cannot be used: {named}; {HINT}"
    content = json.loads(path.read_text())
    del content["data"][0]["paragraphs"][0]["qas"][1]["is_impossible"]
    path.write_text(json.dumps(content))
    dropped = Counter()
    assert [e["id"] for e in reading.read_squad(path, dropped)] == ["q1"]
    assert dropped == {"answers": 3, "questions": 3, "read": 4}
    (paragraph,) = content["data"][0]["paragraphs"]
    row = {"id": "q0", "context": paragraph["context"], "question": "?", "is_impossible": told}
    of_lists = {"text": [x["text"] for x in answers], "answer_start": [x["answer_start"] for x in answers]}
    table = pyarrow.Table.from_pylist([row | {"answers": of_lists}])
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(ValueError) as error:
        reading.read_parquet([tmp_path / "train.parquet"], "set", "train")
    assert str(error.value) == f"set, train: 1 of 1 answers cannot be used: {what}; {HINT}"


@pytest.mark.parametrize(
    "answers, count, fault",
    [
        ([{"text": "7"}], 1, "answer '7' has no answer_start"),
        ([{"answer_start": 26}], 1, "answer None is empty"),
        ([{"text": "7", "answer_start": 26}, {"text": "", "answer_start": 26}], 2, "answer '' is empty"),
        ([{"text": "7", "answer_start": 26}, {"text": "7"}], 2, "answer '7' has no answer_start"),
        ({"text": 5.5, "answer_start": 26}, 1, "answer 5.5 is not at answer_start 26"),
        ({"text": ["7"]}, 1, "not a SQuAD list of answers, with text and answer_start: {'text': ['7']}"),
        (["7"], 1, "not a SQuAD list of answers, with text and answer_start: ['7']"),
        (None, 1, 'it has no "answers"; a question without an answer has an empty list, or is_impossible'),
    ],
)
def test_answers_of_a_wrong_form_are_counted_or_dropped(tmp_path, answers, count, fault):
    good = {"text": "7", "answer_start": 26}
    path = squad_json(tmp_path, good, good)
    content = json.loads(path.read_text())
    content["data"][0]["paragraphs"][0]["qas"][1]["answers"] = answers
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        reading.read_squad(path)
    assert str(error.value) == f"{path}: 1 of {1 + count} answers cannot be used: question q1: {fault}; {HINT}"
    dropped = Counter()
    found = [e["answers"]["text"] for e in reading.read_squad(path, dropped)]
    assert found == [["7"]] * count and dropped == {"answers": 1, "questions": 2 - count, "read": 2}


def test_a_question_with_bad_answers_only_does_not_become_unanswerable(tmp_path):
    bad, dropped = {"text": "old", "answer_start": 26}, Counter()
    path = squad_json(tmp_path, bad, {"text": "", "answer_start": -1})
    assert [e["id"] for e in reading.read_squad(path, dropped)] == ["q1"]
    assert dropped == {"answers": 1, "questions": 1, "read": 2}


INSTEAD = "pass a folder with train.json and dev.json as --dataset"


@pytest.mark.parametrize(
    "train, validation, others",
    [
        ("data/train-{}.parquet", "data/validation-{}.parquet", ["data/test-0.parquet", "data/train_small-0.parquet"]),
        ("plain_text/train-{}.parquet", "plain_text/dev-{}.parquet", ["plain_text/test-0.parquet"]),
        ("train_{}.parquet", "validation_{}.parquet", ["validation_matched_0.parquet", "other/test-0.parquet"]),
        ("data/train/{}.parquet", "data/validation/{}.parquet", []),
        ("data/Train-{}.parquet", "data/valid-{}.parquet", ["more/train-0.parquet"]),
        ("train/part-{}.parquet", "val/part-{}.parquet", ["0000.parquet"]),
        ("train/train-{}.parquet", "validation/validation-{}.parquet", []),
    ],
)
def test_splits_of_a_hub_set(tmp_path, train, validation, others):
    numbers = ["00000-of-00002", "00001-of-00002"]
    wanted = {"train": [train.format(n) for n in numbers], "validation": [validation.format(n) for n in numbers]}
    for file in [*wanted["train"], *wanted["validation"], *others]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    files = loading.hub_files("set", tmp_path, True)
    assert {split: [str(p.relative_to(tmp_path)) for p in files[split]] for split in wanted} == wanted


@pytest.mark.parametrize(
    "files, message",
    [
        (
            ["data/train-0.parquet", "data/test-0.parquet"],
            f"set: train and validation splits are needed, and it has: test, train; {INSTEAD}",
        ),
        (["squad.json"], f"set: train and validation splits are needed, and it has: none in parquet files; {INSTEAD}"),
        (
            ["de/train-0.parquet", "de/validation-0.parquet", "en/train-0.parquet", "en/validation-0.parquet"],
            f"set: has several configurations (de, en): {INSTEAD}",
        ),
    ],
)
def test_hub_sets_that_cannot_be_used(tmp_path, files, message):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(ValueError) as error:
        loading.hub_files("set", tmp_path, True)
    assert str(error.value) == message
    hint = ", or run with --prefetch if the cache has only a part of it" * message.startswith("set: train")
    with pytest.raises(ValueError) as error:
        loading.hub_files("set", tmp_path, False)
    assert str(error.value) == message + hint


def make_example(i, title="t", context="c a", answer="a"):
    return {"id": str(i), "title": title, "context": context, "question": "q?",
            "answers": {"text": [answer], "answer_start": [context.index(answer)]}}  # fmt: skip


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20)), min_size=2, max_size=120),
    st.integers(1, 50),
    st.integers(0, 9),
)
def test_no_passage_is_on_both_sides(pairs, size, seed):
    """Whatever articles and passages there are, and although some passages stand in several articles."""
    examples = [make_example(i, f"title {t}", f"passage {c} a") for i, (t, c) in enumerate(pairs)]
    if len({c for _, c in pairs}) < 2:
        with pytest.raises(ValueError, match="single passage"):
            squad_data.hold_out(examples, size, seed)
        return
    train, selection = squad_data.hold_out(examples, size, seed)
    assert not {e["context"] for e in train} & {e["context"] for e in selection}
    assert train and 1 <= len(selection) <= size
    assert squad_data.hold_out(examples, size, seed) == (train, selection)


def test_articles_stay_whole(tiny_squad):
    examples = reading.read_squad(tiny_squad / "train.json")
    train, selection = squad_data.hold_out(examples, 30, seed=1)
    assert not {e["title"] for e in train} & {e["title"] for e in selection}
    assert len(selection) == 30 and len(train) == 400 - 40  # two articles of 20 questions


# -- tokenising -------------------------------------------------------------------------------------------------------


def decode_answer(data, i, tokenizer):
    item = data[i]
    answer = item["input_ids"][item["prompt_length"] :]
    assert answer[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in answer[:-1]
    return tokenizer.decode(answer[:-1])


@pytest.mark.slow
def test_labels_decode_to_the_answer_for_all_of_squad(shared_squad, tokenizer):
    files = reading.find_squad_files(shared_squad)
    for split, count in {"train": 8149, "validation": 10570}.items():
        examples = reading.read_squad(files[split])
        assert len(examples) == count
        data = squad_data.tokenize(examples, tokenizer, 1024, training=split == "train")
        assert (data.lengths if split == "train" else data.prompt_lengths).max() <= 1024
        for i, e in enumerate(examples):
            answer = e["answers"]["text"][0]
            assert decode_answer(data, i, tokenizer).strip() == answer.strip()
            prompt = tokenizer.decode(data[i]["input_ids"][: data[i]["prompt_length"]])
            assert prompt.startswith(f"Question: {e['question'].strip()} Context:") and prompt.endswith(" Answer:")
            if split == "train":
                assert answer in prompt.removeprefix(f"Question: {e['question'].strip()}")


@given(st.integers(0, 400), st.integers(70, 250), st.booleans())
def test_windows_cut_neither_question_nor_answer(tokenizer, place, max_length, training):
    words = [f"w{i}" for i in range(401)]
    words[place] = "needle"
    context = " ".join(words)
    example = make_example(0, context=context, answer="needle") | {"question": "Where is the needle?"}
    data = squad_data.tokenize([example], tokenizer, max_length, training)
    assert (data.lengths if training else data.prompt_lengths)[0] <= max_length
    text = tokenizer.decode(data[0]["input_ids"][: data[0]["prompt_length"]])
    assert text.startswith("Question: Where is the needle? Context:") and text.endswith(" Answer:")
    assert decode_answer(data, 0, tokenizer) == " needle"
    if training:
        assert "needle" in text.split("Context:")[1]


def test_evaluation_window_does_not_look_at_the_answer(tokenizer):
    """The passage is cut near words of the question, and in the same way whatever the answer and wherever it is."""
    words = ["aaa"] * 300
    words[0], words[140], words[150], words[160], words[299] = "begin", "QZX", "KJV", "YWZ", "at the very end"
    context = " ".join(words)
    prompts = set()
    for answer in ("begin", "at the very end"):
        e = make_example(0, context=context, answer=answer) | {"question": "QZX KJV YWZ?"}
        data = squad_data.tokenize([e], tokenizer, 300, training=False)
        prompts.add(tokenizer.decode(data[0]["input_ids"][: data[0]["prompt_length"]]))
    assert len(prompts) == 1
    window = prompts.pop().split("Context:")[1]
    assert "QZX" in window and "KJV" in window and "begin" not in window and "end" not in window


def test_without_an_answer_eos_follows_the_prompt(tokenizer, tiny_squad):
    """The prompt is the same as with an answer, token by token."""
    examples = reading.read_squad(tiny_squad / "dev.json")
    without = [e | {"answers": NO_ANSWER} for e in examples]
    for training in (True, False):
        both = [squad_data.tokenize(part, tokenizer, 1024, training) for part in (examples, without)]
        for one, other in zip(*both, strict=True):
            prompt = one["input_ids"][: one["prompt_length"]].tolist()
            assert other["input_ids"].tolist() == [*prompt, tokenizer.eos_token_id]
            assert other["prompt_length"] == len(prompt)
        assert both[1].longest_answer == 1 and both[0].longest_answer > 1


def test_without_an_answer_training_has_the_window_of_evaluation(tokenizer):
    words = ["aaa"] * 300
    words[140], words[150], words[160] = "QZX", "KJV", "YWZ"
    e = make_example(0, context=" ".join(words)) | {"question": "QZX KJV YWZ?", "answers": NO_ANSWER}
    trained = squad_data.tokenize([e], tokenizer, 301, training=True)  # EOS counts in training
    evaluated = squad_data.tokenize([e], tokenizer, 300, training=False)
    assert trained.tokens.tolist() == evaluated.tokens.tolist() and trained.lengths[0] == 301
    window = tokenizer.decode(trained.tokens).split("Context:")[1]
    assert "QZX" in window and "KJV" in window


def test_question_and_answer_that_do_not_fit_are_refused(tokenizer):
    with pytest.raises(ValueError, match="longer than 20 tokens"):
        squad_data.tokenize([make_example(0) | {"question": "x" * 100}], tokenizer, 20, training=True)


def test_batch_is_padded_to_its_longest_and_only_answers_are_supervised(tokenizer):
    data = squad_data.tokenize(
        [make_example(0), make_example(1, context="long " * 9 + "answer", answer="answer")], tokenizer, 500, True
    )
    batch = evaluation.collate([data[0], data[1]], tokenizer.pad_token_id)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, data.lengths.max())
    assert batch["attention_mask"].sum(1).tolist() == data.lengths.tolist()
    answers = [data[i]["input_ids"][data[i]["prompt_length"] :].tolist() for i in range(2)]
    assert batch["width"] == max(map(len, answers)) and batch["labels"].tolist() == answers[0] + answers[1]
    last = batch["input_ids"][:, -batch["width"] :]
    assert last.flatten()[batch["positions"]].tolist() == batch["labels"].tolist()


# -- the objective ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tiny_squad, tokenizer):
    return squad_data.tokenize(reading.read_squad(tiny_squad / "dev.json"), tokenizer, 1024, training=False)


@pytest.mark.parametrize("every", [None, 2, 1])
def test_loss_is_that_of_a_plain_forward_pass(tiny_model, tokenizer, tiny_squad, every):
    """Left padding and few logits give what each sequence alone gives with labels of its own.

    No question is without an answer, every second one, or all of them: then each answer is EOS alone.
    """
    examples = reading.read_squad(tiny_squad / "dev.json")
    for e in examples[::every] if every else ():
        e["answers"] = NO_ANSWER
    data = squad_data.tokenize(examples, tokenizer, 1024, training=False)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    each, count = [], 0
    for i in range(len(data)):
        ids = torch.tensor(data[i]["input_ids"].astype(np.int64))[None]
        labels = ids.clone()
        labels[0, : data[i]["prompt_length"]] = -100  # which torch's cross entropy leaves out
        n = int((labels != -100).sum())
        with torch.no_grad():
            each.append(model(input_ids=ids, labels=labels).loss.item() * n)
        count += n
    total = sum(each)
    for rows in (1, 7, 60):
        loss, sums = evaluation.evaluate_loss(model, data, tokenizer.pad_token_id, rows * int(data.lengths.max()))
        assert loss == pytest.approx(total / count, abs=1e-5)
        assert sums == pytest.approx(each, abs=1e-4)
    assert total / count == pytest.approx(math.log(model.config.vocab_size), rel=0.05)  # random weights know nothing


def test_loss_is_a_mean_over_tokens_not_over_batches(tiny_model, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    examples = [make_example(0), make_example(1, context="x " + "abcdefghij" * 4, answer="abcdefghij" * 4)]
    both = squad_data.tokenize(examples, tokenizer, 500, True)
    each = [squad_data.tokenize([e], tokenizer, 500, True) for e in examples]
    sums = [evaluation.evaluate_loss(model, d, 0, 1)[0] * d.longest_answer for d in each]
    tokens = sum(d.longest_answer for d in each)
    assert evaluation.evaluate_loss(model, both, 0, 1)[0] == pytest.approx(sum(sums) / tokens, abs=1e-6)


def test_long_answers_of_short_sequences_share_a_batch_with_few(monkeypatch, tiny_model, tokenizer):
    """The logits of their positions are what needs memory."""
    examples = [make_example(0) for _ in range(40)] + [
        make_example(i, context="x " + "abcdefghij" * 4, answer="abcdefghij" * 4) for i in (1, 2)
    ]
    data, shapes, answer_loss = squad_data.tokenize(examples, tokenizer, 500, True), [], evaluation.answer_loss
    monkeypatch.setattr(
        evaluation,
        "answer_loss",
        lambda model, batch, reduction: shapes.append((len(batch["input_ids"]), batch["width"]))
        or answer_loss(model, batch, reduction),
    )
    evaluation.evaluate_loss(AutoModelForCausalLM.from_pretrained(tiny_model).eval(), data, 0, 2048)
    assert (
        len(shapes) > 1
        and sum(rows for rows, _ in shapes) == 42
        and max(width for _, width in shapes) == data.longest_answer
    )
    assert all(rows * width * evaluation.LOGITS <= 2048 for rows, width in shapes), shapes


def random_model(family: str, tokenizer, std: float = 0.02):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": 0,
    }
    sizes |= {
        "intermediate_size": 64,
        "max_position_embeddings": 512,
        "initializer_range": std,
        "tie_word_embeddings": False,
    }
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **sizes)).eval()


def test_fused_gelu_is_the_same_function(tiny_model, tokenizer, data):
    plain, fused = (AutoModelForCausalLM.from_pretrained(tiny_model) for _ in range(2))
    evaluation.fuse_gelu(fused)
    assert plain.transformer.h[1].mlp.gelu_impl is not fused.transformer.h[1].mlp.gelu_impl
    x = torch.linspace(-9, 9, 999, dtype=torch.float64)
    torch.testing.assert_close(
        fused.transformer.h[1].mlp.gelu_impl(x), plain.transformer.h[1].mlp.gelu_impl(x), rtol=1e-6, atol=1e-7
    )
    batch = evaluation.collate([data[i] for i in range(8)], tokenizer.pad_token_id)
    for model in (plain, fused):
        evaluation.answer_loss(model, batch)[0].backward()
    for one, other in zip(plain.parameters(), fused.parameters(), strict=False):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unanswerable", [False, True])
def test_one_batch_overfits_to_exact_match(tiny_model, tokenizer, tiny_squad, unanswerable):
    """Also where every second question has no answer: the model learns which ones."""
    setup = SimpleNamespace(max_new_tokens=12, metric_language="en", unanswerable=unanswerable)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    examples = reading.read_squad(tiny_squad / "dev.json")[:8]
    for e in examples[::2] if unanswerable else ():
        e["answers"] = NO_ANSWER
    few = squad_data.tokenize(examples, tokenizer, 1024, training=False)
    items = [few[i] for i in range(8)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = evaluation.collate(items, tokenizer.pad_token_id)
    assert raytune_bayesian.answer_scores(model, tokenizer, few, setup)[0]["exact_match"] < 1
    model.train()
    for _ in range(1000):
        loss, count = evaluation.answer_loss(model, batch)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss / count < 0.02:
            break
    names = ["exact_match", "f1", *(tables.V2_METRICS if unanswerable else ())]
    assert raytune_bayesian.answer_scores(model, tokenizer, few, setup) == (dict.fromkeys(names, 1.0), [(1.0, 1.0)] * 8)
    if unanswerable:  # a batch in which all rows end at once
        none = squad_data.tokenize(examples[::2], tokenizer, 1024, training=False)
        assert [p["prediction_text"] for p in evaluation.predict(model, tokenizer, none, 8192, 12)] == [""] * 4


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_the_work_and_each_has_all_of_it(tokenizer, data, size):
    """Ranks as threads that meet at a barrier; batches of about 4, of which some rank has one more."""
    model = random_model("llama", tokenizer, std=0.3)
    few = dataclasses.replace(
        data, references=data.references[:17], prompt_lengths=data.prompt_lengths[:17], offsets=data.offsets[:18]
    )
    four = 4 * int(few.lengths.max())
    predictions, loss = (
        evaluation.predict(model, tokenizer, few, four, 5),
        evaluation.evaluate_loss(model, few, tokenizer.pad_token_id, four)[0],
    )
    assert len({p["prediction_text"] for p in predictions}) > 5
    barrier, box = threading.Barrier(size, timeout=60), {}

    class Group(group.Group):
        def __init__(self, rank):
            self.rank, self.size, self.calls = rank, size, 0

        def gather(self, value):
            self.calls += 1
            box[self.rank, self.calls] = value
            barrier.wait()
            return [box[rank, self.calls] for rank in range(size)]

    def work(rank):
        own = Group(rank)
        answers = evaluation.predict(model, tokenizer, few, four, 5, own)
        return answers, evaluation.evaluate_loss(model, few, tokenizer.pad_token_id, four, own)[0]

    with ThreadPoolExecutor(size) as pool:
        for found in pool.map(work, range(size)):
            assert found == (predictions, pytest.approx(loss, rel=1e-6))


@given(st.lists(st.integers(1, 1024), min_size=1, max_size=200), st.integers(1, 10_000))
def test_a_batch_of_an_evaluation_has_so_many_tokens_at_most(lengths, batch_tokens):
    batches = evaluation.batches_by_length(np.array(lengths), batch_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    widths = [max(lengths[i] for i in batch) for batch in batches]
    assert widths == sorted(widths, reverse=True)
    for batch, width, following in zip(batches, widths, widths[1:] + [0], strict=False):
        assert len(batch) == 1 or len(batch) * width <= batch_tokens
        assert not following or (len(batch) + 1) * width > batch_tokens  # as many as have room


@given(st.lists(st.integers(1, 300), min_size=1, max_size=200), st.floats(0.1, 3), st.integers(1, 4))
def test_data_order_holds_each_question_once_an_epoch(lengths, epochs, batch_size):
    order = raytune_bayesian.data_order(lengths, epochs, batch_size, seed=1)
    n = len(lengths)
    assert len(order) == max(1, round(n * epochs))
    for epoch in range(int(epochs)):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert order == raytune_bayesian.data_order(lengths, epochs, batch_size, seed=1)


# -- EM and F1 --------------------------------------------------------------------------------------------------------


def compute(pairs):
    """pairs: [(prediction or None, [references])]"""
    predictions = [{"id": str(i), "prediction_text": p} for i, (p, _) in enumerate(pairs) if p is not None]
    references = [
        {"id": str(i), "answers": {"text": list(r), "answer_start": [0] * len(r)}} for i, (_, r) in enumerate(pairs)
    ]
    return SquadMetric().compute(predictions=predictions, references=references)


def test_metric_known_values():
    assert compute([("The Moon!", ["moon"])]) == {"exact_match": 1.0, "f1": 1.0}
    assert compute([("blue moon", ["moon", "full moon", "sun"])]) == {"exact_match": 0.0, "f1": pytest.approx(2 / 3)}
    assert compute([("moon", ["sun", "moon"]), (None, ["moon"])]) == {"exact_match": 0.5, "f1": 0.5}
    assert compute([(None, ["the"])]) == {"exact_match": 0.0, "f1": 0.0}  # no prediction is not an empty one
    assert compute([("an", ["the"])]) == {"exact_match": 1.0, "f1": 0.0}  # as the official script
    assert compute([("twelve twelve", ["twelve"])])["f1"] == pytest.approx(2 / 3)
    assert compute([("a-b", ["ab"])])["exact_match"] == 1.0
    assert compute([("", ["moon"])]) == {"exact_match": 0.0, "f1": 0.0}


def test_metric_refuses_what_cannot_be_scored():
    with pytest.raises(ValueError, match="no references"):
        SquadMetric().compute(predictions=[], references=[])
    with pytest.raises(ValueError, match="no answer"):
        compute([("x", [])])


word = st.sampled_from(
    [
        "the",
        "a",
        "an",
        "The",
        "moon",
        "Moon's",
        "moon",
        "1,000",
        "é",
        "ß",
        "İ",
        "don’t",
        "an\u00a0apple",
        "x",
        "U.S.",
        "—",
    ]
)
text = st.one_of(
    st.lists(word, max_size=6).map(" ".join),
    st.text(max_size=12),
    st.text(alphabet=string.punctuation + " theano", max_size=15),
)


@given(st.lists(st.tuples(st.one_of(st.none(), text), st.lists(text, min_size=1, max_size=4)), min_size=1, max_size=6))
@settings(max_examples=300)
def test_metric_equals_torchmetrics(pairs):
    ours = compute(pairs)
    predictions = [{"id": str(i), "prediction_text": p} for i, (p, _) in enumerate(pairs) if p is not None]
    target = [
        {"id": str(i), "answers": {"text": list(r), "answer_start": [0] * len(r)}} for i, (_, r) in enumerate(pairs)
    ]
    if not predictions:
        assert ours == {"exact_match": 0.0, "f1": 0.0}
        return
    theirs = torchmetrics.text.SQuAD()(predictions, target)
    assert ours["exact_match"] == pytest.approx(theirs["exact_match"].item() / 100, abs=1e-5)
    # For two answers without a word torchmetrics gives F1 1 as SQuAD v2 does, the script of v1.1 gives 0.
    wordless = sum(
        p is not None and not scores.normalize_answer(p) and any(not scores.normalize_answer(t) for t in r)
        for p, r in pairs
    )
    assert ours["f1"] + wordless / len(pairs) == pytest.approx(theirs["f1"].item() / 100, abs=1e-5)
    assert compute(pairs * 2) == pytest.approx(ours)


def test_metric_on_the_whole_dev_set(shared_squad):
    """Reference answers as predictions. All 10,570 questions count; one reference is a mere full stop, so no F1."""
    examples = reading.read_squad(reading.find_squad_files(shared_squad)["validation"])
    references = [{"id": e["id"], "answers": e["answers"]} for e in examples]
    perfect = [{"id": e["id"], "prediction_text": e["answers"]["text"][-1]} for e in examples]
    wordless = sum(not scores.normalize_answer(p["prediction_text"]) for p in perfect)
    found = SquadMetric().compute(predictions=perfect, references=references)
    assert found == {"exact_match": 1.0, "f1": pytest.approx(1 - wordless / 10570)} and wordless < 3
    assert SquadMetric().compute(predictions=perfect[: 10570 // 2], references=references)["exact_match"] == 0.5


def test_files_are_checked(tmp_path):
    def article(**answer):
        qa = {"id": "7", "question": "q", "answers": [answer]}
        return {"data": [{"title": "t", "paragraphs": [{"context": "one two", "qas": [qa]}]}]}

    for content, message in {
        "not json": "not a SQuAD JSON file",
        "[]": "not a SQuAD JSON file",
        '{"data": []}': "no question",
        "[" * 10**5: "not a SQuAD JSON file .RecursionError",
        json.dumps(article(text="two", answer_start=3)): "question 7: answer 'two' is not at answer_start 3",
        json.dumps(article(text="two", answer_start=-3)): "not at answer_start",
        json.dumps(article(text="two", answer_start=True)): "answer 'two' is not at answer_start True",
        json.dumps(article(text=" ", answer_start=3)): "answer ' ' is empty",
        json.dumps(article(text="two")): "question 7: answer 'two' has no answer_start",
    }.items():
        path = tmp_path / "train.json"
        path.write_text(content)
        with pytest.raises(ValueError, match=message) as error:
            reading.read_squad(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_damaged_gzip_files_are_refused(tmp_path):
    path = tmp_path / "train.json.gz"
    content = bytearray(gzip.compress(b"0123456789" * 9))
    content[10:14] = b"\xff" * 4  # the first block has a type that does not exist
    path.write_bytes(content)
    with pytest.raises(ValueError, match="train.json.gz: not a SQuAD JSON file .error: Error -3"):
        reading.read_squad(path)


def test_weights_in_a_second_form_are_counted_once(tiny_model, tmp_path):
    """As in repositories of Mistral's models."""
    shutil.copytree(tiny_model, tmp_path / "model")
    count = loading.count_parameters(tiny_model)
    shutil.copy(tmp_path / "model" / "model.safetensors", tmp_path / "model" / "consolidated.safetensors")
    assert loading.count_parameters(tmp_path / "model") == count
    for file in (tmp_path / "model").glob("*.safetensors"):
        file.rename(file.with_name("pytorch_model.bin"))
    assert 1 <= loading.count_parameters(tmp_path / "model") / count < 1.2  # config.json says float32


def test_a_question_without_the_key_of_its_answers_is_refused(tmp_path, tiny_squad):
    """Another name of the key would make all questions unanswerable."""
    text = (tiny_squad / "dev.json").read_text()
    (tmp_path / "dev.json").write_text(text.replace('"answers"', '"answer"', 1))
    with pytest.raises(ValueError) as error:
        reading.read_squad(tmp_path / "dev.json")
    assert str(error.value) == (
        f"{tmp_path}/dev.json: 1 of 119 answers cannot be used: question dev-0-0: "
        f'it has no "answers"; a question without an answer has an empty list, or is_impossible; {HINT}'
    )

"""Whatever a user hands in: a file or a flag is taken, or refused with BadInput (one line, exit code 2).

Nothing else.
"""

import contextlib
import copy
import io
import json
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import raytune_bayesian
from hpo import arguments, checks, errors, ranges
from hpo.bohb.searcher import TuneBOHB
from hpo.cluster import state as state_file
from hpo.squad import loading, reading

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
FUZZ = settings(max_examples=300, suppress_health_check=list(HealthCheck))
FEWER = settings(FUZZ, max_examples=100)  # parquet files take longer


def places(value, path=()):
    """Paths to all nodes of a JSON value."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def changed(value, path, new):
    """The value with another one at a path."""
    if not path:
        return new
    value = copy.deepcopy(value)
    at = value
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = new
    return value


@contextlib.contextmanager
def a_file(name, content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        yield path


def one_line(error):
    assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000


QA = {"id": "1", "question": "Who?", "answers": [{"text": "two", "answer_start": 4}]}
NONE = {"id": "3", "question": "Why?", "answers": [], "plausible_answers": QA["answers"], "is_impossible": True}
DOCUMENT = {
    "version": "1.1",
    "data": [{"title": "t", "paragraphs": [{"context": "one two", "qas": [QA, {**QA, "id": "2"}, NONE]}]}],
}


def read_or_refused(read, *arguments):
    """Whatever the files hold: good examples, or one line."""
    try:
        examples = read(*arguments)
    except ValueError as error:
        one_line(error)
        return
    assert examples and len({e["id"] for e in examples}) == len(examples)
    for e in examples:
        assert isinstance(e["title"], str) and e["question"].encode() is not None
        for text, start in zip(e["answers"]["text"], e["answers"]["answer_start"], strict=True):
            assert text.strip() and e["context"][start : start + len(text)] == text


DROPPED = st.sampled_from([lambda: None, Counter])  # without and with --drop_bad_answers


@given(st.lists(st.tuples(st.sampled_from(list(places(DOCUMENT))), JSON), min_size=1, max_size=2), DROPPED)
@FUZZ
def test_squad_documents(changes, dropped):
    document = DOCUMENT
    for path, new in changes:
        with contextlib.suppress(LookupError, TypeError):  # the first change has removed this place
            document = changed(document, path, new)
    with a_file("train.json", json.dumps(document)) as file:
        read_or_refused(reading.read_squad, file, dropped())


ROW = {"id": "1", "title": "t", "context": "one two", "question": "Who?",
       "answers": {"text": ["two"], "answer_start": [4]}, "is_impossible": False}  # fmt: skip


@given(st.sampled_from(list(places(ROW))), JSON, DROPPED)
@FEWER
def test_squad_columns(path, new, dropped):
    """All rows have another value in one place, as types are those of a column."""
    row = changed(ROW, path, new)
    with a_file("train.parquet", b"") as file:
        try:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), file)
        except (pyarrow.ArrowException, AttributeError, UnicodeEncodeError, OverflowError):  # parquet has no such value
            return
        read_or_refused(reading.read_parquet, [file], "set", "train", dropped())


@given(st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 255)), max_size=9), st.integers(1, 9999))
@FEWER
def test_parquet_bytes(flips, length):
    with a_file("train.parquet", b"") as file:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW, ROW | {"id": "2"}]), file)
        content = bytearray(file.read_bytes())
        for place, byte in flips:
            content[place % len(content)] = byte
        file.write_bytes(content[:length])
        read_or_refused(reading.read_parquet, [file], "set", "train")


@st.composite
def squad_sets(draw):
    """A data set without fault: the articles of a JSON file, and the rows of a parquet file."""
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    id_of = draw(st.sampled_from([lambda i: i, lambda i: f"q{i}", lambda i: None]))
    has_title, lists, v2 = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    told = v2 and draw(st.booleans())  # the files have is_impossible
    nothing = [[], [{"text": "", "answer_start": -1}]]
    articles, rows = [], []
    for _ in range(draw(st.integers(1, 3))):
        article = {"paragraphs": []} | ({"title": draw(st.none() | text)} if has_title else {})
        for _ in range(draw(st.integers(1, 2))):
            words = draw(st.lists(text.filter(str.strip), min_size=1, max_size=4))
            context = " ".join(words)
            qas = []
            for _ in range(draw(st.integers(1, 2))):
                answers = []
                for _ in range(draw(st.integers(1, 3))):
                    first = draw(st.integers(0, len(words) - 1))
                    last = draw(st.integers(first, len(words) - 1))
                    space = draw(st.sampled_from([" ", "  ", "\n", "\xa0"]))
                    start = sum(len(word) + 1 for word in words[:first])
                    answers.append({"text": space.join(words[first : last + 1]), "answer_start": start})
                if v2 and draw(st.booleans()):
                    answers = draw(st.sampled_from(nothing))
                qa = {"id": id_of(len(rows)), "question": draw(text), "answers": answers}
                qa["is_impossible"] = answers in nothing if told else None
                qas.append({name: value for name, value in qa.items() if value is not None})
                of_lists = {name: [answer[name] for answer in answers] for name in ("text", "answer_start")}
                row = {"context": context, **qas[-1], "answers": of_lists if lists else answers}
                if told:
                    qas[-1]["plausible_answers"] = [{"text": context, "answer_start": 0}]  # nothing reads them
                rows.append(row | ({"title": article["title"]} if has_title else {}))
            article["paragraphs"].append({"context": context, "qas": qas})
        articles.append(article)
    return articles, rows


@given(squad_sets())
@FEWER
def test_json_and_parquet_give_the_same_examples(squad_set):
    articles, rows = squad_set
    with a_file("train.json", json.dumps({"data": articles})) as file:
        examples = reading.read_squad(file)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file.with_suffix(".parquet"))
        assert reading.read_parquet([file.with_suffix(".parquet")], "set", "train") == examples
    assert [e["context"] for e in examples] == [row["context"] for row in rows]
    qas = [qa for article in articles for paragraph in article["paragraphs"] for qa in paragraph["qas"]]
    for e, qa in zip(examples, qas, strict=True):
        assert len(e["answers"]["text"]) == sum(answer["text"] != "" for answer in qa["answers"])
        for text, start in zip(e["answers"]["text"], e["answers"]["answer_start"], strict=True):
            assert e["context"][start:].startswith(text)


@given(st.binary(max_size=60), st.sampled_from(["train.json", "train.json.gz"]))
@FUZZ
def test_squad_bytes(content, name):
    with a_file(name, content) as file:
        with pytest.raises(ValueError) as error:
            reading.read_squad(file)
        one_line(error.value)


def args_of(*argv):
    return arguments.parse("", list(map(str, argv)))


DS_CONFIG = json.loads((Path(raytune_bayesian.__file__).with_name("ds_config.json")).read_text())


@given(st.sampled_from(list(places(DS_CONFIG))), JSON)
@FUZZ
def test_ds_configs(path, new):
    with a_file("ds.json", json.dumps(changed(DS_CONFIG, path, new))) as file:
        try:
            assert isinstance(
                checks.read_ds_config(args_of("--deepspeed", file, "--gpus_per_trial", 2, "--precision", "fp16")), dict
            )
        except errors.BadInput as error:
            one_line(error)


@given(JSON | st.dictionaries(st.sampled_from(["model_type"]), JSON))
@FUZZ
def test_model_folders(config):
    with a_file("config.json", json.dumps(config)) as file:
        with pytest.raises(errors.BadInput) as error:  # there are no weights in any case
            loading.check_model_folder(file.parent)
        one_line(error.value)


ARGUMENTS = arguments.kept(args_of())
RUN = {"arguments": ARGUMENTS, "search_space": {"lr": "1"}, "environment": {"LR_UPPER": "1", "BS_CHOICES": "1,2"}}


@given(st.sampled_from(list(places(RUN))), JSON)
@FUZZ
def test_records_of_runs(path, new):
    with a_file("run.json", json.dumps(changed(RUN, path, new))) as file:
        try:
            args_of("--resume", "--run_name", file.parent.name, "--output_dir", file.parent.parent)
        except errors.BadInput as error:
            one_line(error)


VALUES = (
    st.text(max_size=12)
    | st.integers().map(str)
    | st.floats().map(str)
    | st.sampled_from(["", "/", "..", "-1", "0", "a\0b", "x" * 300])
)
LISTS = st.lists(st.integers(-1, 9).map(str) | VALUES, max_size=4)
SPACE = raytune_bayesian.SEARCH_SPACE


@mock.patch.object(TuneBOHB, "_check_model", lambda self: None)  # it takes most of the time, and has its own test
@given(st.dictionaries(st.sampled_from(list(ranges.VARIABLES)), LISTS, min_size=1), st.sampled_from([",", " ", ", "]))
@FUZZ
def test_variables_of_the_environment(lists, between):
    variables, args = {name: between.join(words) for name, words in lists.items()}, args_of()
    try:
        args.ranges, args.ds_config = ranges.read(variables), {}
        space = ranges.space_of_run(SPACE, raytune_bayesian.train, args)
    except errors.BadInput as error:
        one_line(error)
        return
    assert args.ranges.keys() == {name for name, text in variables.items() if text.strip()}  # an empty one is not set
    changed = {ranges.VARIABLES[name] for name in args.ranges}
    for name, domain in space["train_loop_config"].items():
        assert (domain is SPACE["train_loop_config"][name]) == (name not in changed)
        assert type(domain) is type(SPACE["train_loop_config"][name])


@given(st.binary(max_size=200))
@FUZZ
def test_states(content):
    with a_file("state.jsonl", content) as file, contextlib.redirect_stdout(io.StringIO()):
        with pytest.raises(RuntimeError, match="no whole state"):
            state_file.load_state(file.parent)


FLAGS = [f"--{name}" for name in vars(args_of()) if name not in ("given", "cluster", "ranges", "known", "help")]



@given(pairs=st.lists(st.tuples(st.sampled_from(FLAGS), VALUES), max_size=4), more=st.lists(VALUES, max_size=2))
@example(pairs=[("--run_name", "a\nb")], more=[])
@FUZZ
def test_flags(pairs, more, tiny_model, tiny_squad):
    argv = ["--model", str(tiny_model), "--dataset", str(tiny_squad)]
    argv += [
        word
        for pair in pairs
        for word in (pair if pair[0] not in ("--resume", "--prefetch", "--drop_bad_answers") else pair[:1])
    ] + more
    try:
        checks.check(arguments.parse("", argv))
    except errors.BadInput as error:
        one_line(error)
    except SystemExit as end:  # --help, or -h
        assert end.code == 0

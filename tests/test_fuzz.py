"""Whatever a user hands in: a file or a flag is taken, or refused with BadInput (one line, exit code 2).

Nothing else.
"""

import contextlib
import copy
import io
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import raytune_bayesian
from hpo import arguments, checks, errors
from hpo.cluster import state as state_file
from hpo.squad import data, loading

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
FUZZ = settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))


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
DOCUMENT = {
    "version": "1.1",
    "data": [{"title": "t", "paragraphs": [{"context": "one two", "qas": [QA, {**QA, "id": "2"}]}]}],
}


@given(st.sampled_from(list(places(DOCUMENT))), JSON)
@FUZZ
def test_squad_documents(path, new):
    with a_file("train.json", json.dumps(changed(DOCUMENT, path, new))) as file:
        try:
            for example in data.read_squad(file):
                assert example["answers"]["text"]
        except ValueError as error:
            one_line(error)


@given(st.binary(max_size=60), st.sampled_from(["train.json", "train.json.gz"]))
@FUZZ
def test_squad_bytes(content, name):
    with a_file(name, content) as file:
        with pytest.raises(ValueError) as error:
            data.read_squad(file)
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
RUN = {"arguments": ARGUMENTS, "search_space": {"lr": "1"}}


@given(st.sampled_from(list(places(RUN))), JSON)
@FUZZ
def test_records_of_runs(path, new):
    with a_file("run.json", json.dumps(changed(RUN, path, new))) as file:
        try:
            args_of("--resume", "--run_name", file.parent.name, "--output_dir", file.parent.parent)
        except errors.BadInput as error:
            one_line(error)


@given(st.binary(max_size=200))
@FUZZ
def test_states(content):
    with a_file("state.jsonl", content) as file, contextlib.redirect_stdout(io.StringIO()):
        with pytest.raises(RuntimeError, match="no whole state"):
            state_file.load_state(file.parent)


FLAGS = [f"--{name}" for name in vars(args_of()) if name not in ("given", "help")]
VALUES = (
    st.text(max_size=12)
    | st.integers().map(str)
    | st.floats().map(str)
    | st.sampled_from(["", "/", "..", "-1", "0", "a\0b", "x" * 300])
)


@given(pairs=st.lists(st.tuples(st.sampled_from(FLAGS), VALUES), max_size=4), more=st.lists(VALUES, max_size=2))
@example(pairs=[("--run_name", "a\nb")], more=[])
@FUZZ
def test_flags(pairs, more, tiny_model, tiny_squad):
    argv = ["--model", str(tiny_model), "--dataset", str(tiny_squad)]
    argv += [
        word for pair in pairs for word in (pair if pair[0] not in ("--resume", "--prefetch", "--drop_bad_answers") else pair[:1])
    ] + more
    try:
        checks.check(arguments.parse("", argv))
    except errors.BadInput as error:
        one_line(error)
    except SystemExit as end:  # --help, or -h
        assert end.code == 0

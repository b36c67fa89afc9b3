"""Families of causal language models, each tiny and with random weights: loss, answers, pause and resume, best_model.

And what a model folder may have wrong: it is refused in one line, before Ray starts.
"""

import copy
import json
import math
import re
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import raytune_bayesian
from bench import common
from conftest import make_squad, run_here
from hpo import host_memory
from hpo.errors import BadInput
from hpo.squad import data as squad_data
from hpo.squad import evaluation, models, reading
from hpo.squad.probe import try_model
from hpo.squad.setup import prepare
from test_squad import make_example

WINDOW = 32  # of a sliding window: shorter than all sequences here
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
FAMILIES = {  # model_type: what its configuration needs beyond SIZES
    "bloom": {},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA | {"layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
    "falcon": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "bamba": MAMBA | {"attn_layer_indices": [1]},  # layers of Mamba and of attention
}
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


def random_config(family: str, tokenizer, std: float = 0.02, **more):
    sizes = SIZES | FAMILIES.get(family, {}) | {"vocab_size": len(tokenizer)} | more
    return AutoConfig.for_model(family, **sizes, initializer_range=std, init_std=std)


def random_model(family: str, tokenizer, std: float = 0.02, **more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(random_config(family, tokenizer, std, **more)).eval()


def lively_model(family: str, tokenizer):
    """A model whose layers matter more than its embeddings: all prompts end in the same token."""
    model = random_model(family, tokenizer, std=0.3, tie_word_embeddings=False)
    for name, weight in model.named_parameters():
        if weight is model.get_input_embeddings().weight or "word_embeddings_layernorm.weight" in name:
            weight.data *= 0.01
    return model


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def questions(tiny_squad, tokenizer):
    """24 questions of unequal lengths."""
    examples = reading.read_squad(tiny_squad / "dev.json")[:24]
    for i, example in enumerate(examples):
        example["context"] += " Bo has a red hat." * (i % 4)
    questions = squad_data.tokenize(examples, tokenizer, 512, training=False)
    assert len(set(questions.lengths)) > 3 and questions.lengths.min() > WINDOW
    return questions


@pytest.fixture(scope="module")
def trial_here(one_rank):
    """The class that runs trials in this process."""
    return common.TrialHere


# -- what a trial does with a model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_of_padded_batches_equals_that_of_each_sequence_alone(family, tokenizer, questions):
    model, total = lively_model(family, tokenizer), 0.0
    for item in (questions[i] for i in range(len(questions))):
        ids, begin = torch.from_numpy(item["input_ids"].astype(np.int64)), item["prompt_length"]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        total += torch.nn.functional.cross_entropy(logits[begin - 1 : -1], ids[begin:], reduction="sum").item()
    mean = total / int((questions.lengths - questions.prompt_lengths).sum())
    longest = int(questions.lengths.max())
    for rows in (1, 7, 24):
        assert evaluation.evaluate_loss(model, questions, 0, rows * longest)[0] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_answers_equal_generate_one_at_a_time(family, tokenizer, questions):
    """Also where the rows of a batch end at different steps, some at the first and some not at all."""
    model, n = lively_model(family, tokenizer), 8

    def generate(i: int) -> list[int]:
        prompt = torch.tensor(questions[i]["input_ids"][: questions[i]["prompt_length"]].astype(np.int64))[None]
        of_one = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": n}
        return model.generate(prompt, **of_one, eos_token_id=None, pad_token_id=0)[0, prompt.shape[1] :].tolist()

    endless = [generate(i) for i in range(len(questions))]

    def ends(token):  # the steps at which rows would end, were this EOS
        return {answer.index(token) if token in answer else n for answer in endless}

    eos = max(range(2, len(tokenizer)), key=lambda token: (len(ends(token) & {0, n}), len(ends(token))))
    assert len(ends(eos)) > 2, ends(eos)
    other = copy.deepcopy(tokenizer)
    other.eos_token = other.convert_ids_to_tokens(eos)
    alone = [answer[: answer.index(eos)] if eos in answer else answer for answer in endless]
    alone = [text.strip() for text in other.batch_decode(alone, skip_special_tokens=True)]
    assert len(set(alone)) > 5
    longest = int(questions.prompt_lengths.max())
    for rows in (1, 7, 24):
        found = evaluation.predict(model, other, questions, rows * longest, max_new_tokens=n)
        assert [prediction["prediction_text"] for prediction in found] == alone
        assert [prediction["id"] for prediction in found] == [reference["id"] for reference in questions.references]


@pytest.mark.parametrize(
    "family", ["bloom", *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES if family != "bloom")]
)
def test_paused_trial_and_best_model_equal_one_that_ran_through(family, tmp_path, tokenizer, tiny_squad, trial_here):
    """With the real Trainer and DeepSpeed engine. A best_model is made of both kinds of checkpoint."""
    folder = save(tmp_path / "model", random_model(family, tokenizer), tokenizer)
    setup = common.setup_of_search(
        "--model", folder, "--dataset", tiny_squad, "--max_t", 3, "--num_train_epochs", 0.06, "--max_eval_samples", 10,
        "--max_train_samples", 100, "--precision", "fp32",
    )  # fmt: skip
    through = trial_here(tmp_path / "through")
    through.run(setup, [1, 3])
    begun = trial_here(tmp_path / "paused", pause=1)
    begun.run(setup, [1, 3])
    rest = trial_here(tmp_path / "paused", checkpoint=begun.last_checkpoint)
    rest.run(setup, [1, 3])
    losses = [[report["eval_loss"] for report in reports] for reports in (through.reports, begun.reports, rest.reports)]
    assert losses[0] == losses[1] + losses[2] and len(set(losses[0])) == 3
    for checkpoint, loss in ((begun.last_checkpoint, losses[0][0]), (rest.last_checkpoint, losses[0][2])):
        path = tmp_path / f"best_model of {checkpoint.name}"
        models.save_best_model(checkpoint, folder, "fp32", path)
        model = AutoModelForCausalLM.from_pretrained(path)
        pad = tokenizer.pad_token_id
        found, _ = evaluation.evaluate_loss(model, setup.selection, pad, raytune_bayesian.EVAL_TOKENS)
        assert found == pytest.approx(loss, rel=1e-6)


@pytest.mark.slow
def test_a_trial_learns_from_real_squad(tmp_path, demo_model, shared_squad, trial_here):
    flags = ["--model", demo_model, "--dataset", shared_squad, "--max_train_samples", 128, "--max_eval_samples", 32]
    args = [*flags, "--max_t", 4, "--num_train_epochs", 0.5, "--report_to", "none"]
    args = common.checks.check(common.arguments.parse("", list(map(str, args))))
    setup, test = prepare(args, raytune_bayesian.MAX_LENGTH, raytune_bayesian.SELECTION_SIZE, 2)
    assert setup.held_out == "passages"  # the real training subset has one title only
    assert [len(part) for part in (setup.train, setup.selection, test)] == [128, 32, 32]
    try_model(setup, test, {"per_device_bs": 2, "lora_r": 0})
    trial = trial_here(tmp_path)
    trial.run(setup, [1, 4])
    losses = [report["eval_loss"] for report in trial.reports]
    assert len(losses) == 4 and losses[-1] < losses[0]
    models.save_best_model(trial.last_checkpoint, demo_model, "fp32", tmp_path / "best_model")
    assert 0 <= raytune_bayesian.test(tmp_path / "best_model", test, setup)[0]["f1"] <= 1


def test_a_large_model_is_saved_in_several_files_and_read_again(tmp_path, tiny_model, monkeypatch):
    """transformers splits weights above 50 GB; here above 20 kB: the last checkpoint of a trial, and best_model."""
    save = transformers.PreTrainedModel.save_pretrained

    def save_in_parts(model, folder, **options):
        save(model, folder, max_shard_size="20KB", **options)

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", save_in_parts)
    model = models.pretrained(tiny_model)
    model.save_pretrained(tmp_path / "checkpoint")
    models.save_best_model(tmp_path / "checkpoint", tiny_model, "fp32", tmp_path / "best_model")
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "best_model").state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert all(len([*(tmp_path / name).glob("*.safetensors")]) > 2 for name in ("checkpoint", "best_model"))


def test_best_model_ends_its_answers_at_the_eos_that_it_has_learnt(tmp_path, tokenizer, questions):
    """Its own configuration has another: `generate` of transformers would go on after the answer."""
    model = lively_model("llama", tokenizer)
    prompt = torch.tensor(questions[0]["input_ids"][: questions[0]["prompt_length"]].astype(np.int64))[None]
    first, second = model.generate(prompt, do_sample=False, max_new_tokens=2, eos_token_id=None)[0, -2:].tolist()
    assert first != second
    learnt, other = copy.deepcopy(tokenizer), first
    learnt.eos_token = learnt.convert_ids_to_tokens(second)
    model.generation_config.eos_token_id = other
    folder = save(tmp_path / "model", model, learnt)
    models.save_best_model(folder, folder, "fp32", tmp_path / "best_model")
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "best_model")
    assert best.generate(prompt, do_sample=False, max_new_tokens=9)[0, prompt.shape[1] :].tolist() == [first, second]


# -- positions --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_squad(tmp_path_factory):
    """Passages longer than a model takes, answers longer than ANSWER_ROOM, questions that are longer in dev.json."""
    folder = make_squad(tmp_path_factory.mktemp("long"))
    for file in folder.glob("*.json"):
        content = json.loads(file.read_text())
        for i, paragraph in enumerate(p for article in content["data"] for p in article["paragraphs"]):
            answer = "0123456789" * (6 if i % 9 == 0 else 1)  # a digit is a token
            paragraph["context"] += f" {answer}." + " Al has a pink hat." * 150
            paragraph["qas"][0]["question"] += " 0123456789" * (file.stem == "dev")
            paragraph["qas"][0]["answers"] = [{"text": answer, "answer_start": paragraph["context"].index(answer)}]
        file.write_text(json.dumps(content))
    return folder


def prepared(model, dataset, *more):
    """The setup and the test questions, as the script prepares them."""
    flags = ["--model", model, "--dataset", dataset, "--max_t", 1, "--num_train_epochs", 0.01, *more]
    args = common.checks.check(common.arguments.parse("", [*map(str, flags), "--report_to", "none"]))
    return prepare(args, raytune_bayesian.MAX_LENGTH, 20, 2)


@pytest.mark.parametrize("positions", [128, 200, 256, 1000, 1024, 1030])
def test_windows_stay_within_the_positions_of_the_model(tmp_path, tokenizer, long_squad, trial_here, positions):
    model = random_model("gpt2", tokenizer, max_position_embeddings=positions)
    setup, test = prepared(save(tmp_path / "model", model, tokenizer), long_squad, "--precision", "fp32")
    assert setup.max_new_tokens == setup.train.longest_answer > squad_data.ANSWER_ROOM
    assert setup.train.lengths.max() == min(positions, raytune_bayesian.MAX_LENGTH)
    for part in (setup.selection, test):
        room = max(part.longest_answer, setup.max_new_tokens)
        longest = int(part.prompt_lengths.max())
        assert longest == min(raytune_bayesian.MAX_LENGTH - squad_data.ANSWER_ROOM, positions - room)
    try_model(setup, test, {"per_device_bs": 2, "lora_r": 0})
    if positions <= 256:
        trial = trial_here(tmp_path / "trial")
        trial.run(setup, [1])
        assert trial.reports[-1]["training_iteration"] == 1 and 0 <= trial.reports[-1]["exact_match"] <= 1


@pytest.mark.parametrize(
    "positions, reason",
    [
        (60, "question train-{}: question and answer alone are longer than 60 tokens (@ takes 60)"),
        (80, "question dev-{}: question alone are longer than 18 tokens, beside an answer of up to 62 (@ takes 80)"),
    ],
)
def test_a_model_with_too_few_positions_is_refused(tmp_path, tokenizer, long_squad, positions, reason):
    model = random_model("gpt2", tokenizer, max_position_embeddings=positions)
    folder = save(tmp_path / "model", model, tokenizer)
    with pytest.raises(BadInput) as error:
        prepared(folder, long_squad)
    found = str(error.value)
    place = re.search(r"question \w+-(\d+-\d+):", found).group(1)
    assert found == f"--dataset {long_squad}: {reason.format(place).replace('@', str(folder))}"


# -- tokenizers -------------------------------------------------------------------------------------------------------

TEXTS = ["Question: What hat has Bo? Context: Al has a pink hat.\n Answer: red, blue  green", "the ten été 東京"] * 9
BLOOM_REGEX = " ?[^(\\s|[.,!?…。，、।۔،])]+"


def trained(kind: str, special: str = ""):
    """A tokenizer of some hundred tokens.

    Args:
        kind: "bytes" (GPT-2, Llama 3), "bloom", "metaspace" (Llama 2) or "gemma".
        special: what its post-processor adds: "", "bos", or "bos eos".
    """
    of_bytes = kind in ("bytes", "bloom")
    pad_bos_eos = ["<pad>", "<s>", "</s>"]
    if of_bytes:
        tokenizer = Tokenizer(tokenizer_models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if kind == "bloom":
            split = pre_tokenizers.Split(Regex(BLOOM_REGEX), "isolated")
            byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:  # as sentencepiece: unknown characters as bytes
        pad_bos_eos += ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        tokenizer = Tokenizer(tokenizer_models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        alphabet = []
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=pad_bos_eos, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    if not of_bytes:
        content = json.loads(tokenizer.to_str())  # bytes are ordinary tokens
        content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
        tokenizer = Tokenizer.from_str(json.dumps(content))
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if kind == "metaspace":  # the text is not split, and begins with a space of its own
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
            parts.append(decoders.Strip(" ", 1, 0))
        else:
            tokenizer.normalizer = normalizers.Replace(" ", "▁")
            tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.decoder = decoders.Sequence(parts)
    if special:
        template = "<s> $A" + " </s>" * ("eos" in special)
        ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


KINDS = [
    ("bytes", ""), ("bytes", "bos"), ("bytes", "bos eos"), ("bloom", ""), ("metaspace", "bos"),
    ("metaspace", "bos eos"), ("gemma", "bos"),
]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS, ids=" ".join)
def kind(request):
    kind, special = request.param
    return kind, special, trained(kind, special)


letters = st.characters(exclude_categories=["Cs"], exclude_characters="▁")  # which sentencepiece has for a space
texts = st.one_of(
    st.text(letters, max_size=20),
    st.text(" \n\t\xa0.,:;!?()'\"-aAé東عה\u0301👍🏽", max_size=30),
    st.lists(st.sampled_from(["Answer:", "Context:", "hat", " ", "\n\n", "  ", "東京", "👩‍👩‍👧", "1984", "."])).map(
        "".join
    ),
)


@given(texts, texts, texts.filter(str.strip), texts)
def test_a_sequence_is_what_the_tokenizer_gives_for_the_whole_text(kind, question, before, answer, after):
    """Then EOS. BOS is there once, no prompt ends in EOS, and the labels are the answer."""
    name, special, tokenizer = kind
    context = f"{before}{answer}{after}"
    example = {"id": "0", "context": context, "question": question}
    example["answers"] = {"text": [answer], "answer_start": [len(before)]}
    head, answer = f"Question: {question.strip()} Context:", answer.strip()
    whole = tokenizer(f"{head} {context} Answer: {answer}").input_ids
    if special == "bos eos":
        assert whole.pop() == tokenizer.eos_token_id
    parts = []
    for part in (head, f" {context}", " Answer:", f" {answer}"):
        parts.append(tokenizer(part, add_special_tokens=False).input_ids)
    for training in (True, False):
        (item,) = squad_data.tokenize([example], tokenizer, 10**6, training)
        ids, prompt_length = item["input_ids"].tolist(), item["prompt_length"]
        assert ids == [*whole, tokenizer.eos_token_id]
        assert ids.count(tokenizer.bos_token_id) == (special != "") and ids.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(ids[:prompt_length], skip_special_tokens=True) == f"{head} {context} Answer:"
        assert tokenizer.decode(ids[prompt_length:-1]).removeprefix(" ") == answer
        if name in ("bytes", "bloom"):
            assert ids[special != "" : -1] == sum(parts, []) and ids[prompt_length:-1] == parts[3]


@given(texts, texts.filter(str.strip), texts, st.integers(0, 40))
def test_a_window_keeps_bos_and_the_limit(kind, before, answer, after, room):
    _, special, tokenizer = kind
    context = " ".join([*"abcdefghijklmnopqrstuvwxyz", before, answer, after, *"zyxwvutsrqponmlkjihgfedcba"])
    example = make_example(0, context=context, answer=answer)
    least = len(tokenizer(f"Question: q? Context: Answer: {answer.strip()}").input_ids) + 4
    whole = squad_data.tokenize([example], tokenizer, 10**6, True)[0]["input_ids"].tolist()
    for training in (True, False):
        (item,) = squad_data.tokenize([example], tokenizer, least + room, training)
        ids, prompt_length = item["input_ids"].tolist(), item["prompt_length"]
        assert (len(ids) if training else prompt_length) <= least + room
        assert ids.count(tokenizer.bos_token_id) == (special != "") and ids.count(tokenizer.eos_token_id) == 1
        assert ids[0] == whole[0] and ids[-1] == tokenizer.eos_token_id
        prompt = tokenizer.decode(ids[:prompt_length], skip_special_tokens=True)
        assert prompt.startswith("Question: q? Context:") and prompt.endswith(" Answer:")
        assert tokenizer.decode(ids[prompt_length:-1]).removeprefix(" ") == answer.strip()


def test_a_padding_token_without_an_embedding_is_replaced(tmp_path, tokenizer, tiny_squad):
    """It is the first id that the model does not have."""
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"pad_token": "[PAD]"})
    folder = save(tmp_path / "model", random_model("llama", tokenizer), other)
    assert other.pad_token_id == len(tokenizer) == models.text_config(folder).vocab_size
    assert models.load_tokenizer(folder).pad_token_id == tokenizer.eos_token_id
    setup, test = prepared(folder, tiny_squad)
    try_model(setup, test, {"per_device_bs": 2, "lora_r": 0})


def test_tokens_without_an_embedding_are_refused(tmp_path, tokenizer, tiny_squad):
    folder = save(tmp_path / "model", random_model("llama", tokenizer, vocab_size=200), tokenizer)
    with pytest.raises(BadInput) as error:
        prepared(folder, tiny_squad)
    tokens = squad_data.tokenize(reading.read_squad(tiny_squad / "train.json"), tokenizer, 1024, True).tokens
    assert str(error.value) == f"--model {folder}: its tokenizer gives token {tokens.max()}, and it has 200 embeddings"


def test_a_tokenizer_that_special_tokens_change_is_refused():
    def spells(text, add_special_tokens):
        return SimpleNamespace(input_ids=[1, 7] if add_special_tokens else [5])

    with pytest.raises(BadInput) as error:
        squad_data.special_prefix(mock.Mock(side_effect=spells, name_or_path="my/model"))
    what = "a text has other tokens between special tokens than without them"
    assert str(error.value) == f"--model my/model: its tokenizer cannot be used: {what}"


# -- models that are refused ------------------------------------------------------------------------------------------

NO_CACHE = "generating an answer needs a cache of keys and values, which this model has not"


def test_mamba_is_refused_on_the_command_line(tmp_path, tokenizer, tiny_squad):
    folder = save(tmp_path / "mamba", random_model("mamba", tokenizer), tokenizer)
    process = run_here("--model", folder, "--dataset", tiny_squad, "--output_dir", tmp_path / "results")
    assert process.returncode == 2 and not (tmp_path / "results").exists()
    assert process.stderr.splitlines()[-1] == f"raytune_bayesian.py: error: --model {folder}: {NO_CACHE}"


def test_a_cache_that_loses_the_wrong_row_is_refused(tmp_path, tokenizer, tiny_squad, monkeypatch):
    """When an answer ends, its row leaves the batch."""
    setup, test = prepared(save(tmp_path / "model", lively_model("llama", tokenizer), tokenizer), tiny_squad)
    largest = {"per_device_bs": 2, "lora_r": 0}
    try_model(setup, test, largest)
    reorder = transformers.DynamicCache.reorder_cache
    monkeypatch.setattr(transformers.DynamicCache, "reorder_cache", lambda cache, rows: reorder(cache, 1 - rows))
    with pytest.raises(BadInput, match="an answer changes when another one in its batch has ended, so it cannot be"):
        try_model(setup, test, largest)


def test_a_model_that_is_too_large_is_not_tried(tmp_path, tokenizer, tiny_squad, monkeypatch, capsys):
    setup, test = prepared(save(tmp_path / "model", random_model("llama", tokenizer), tokenizer), tiny_squad)
    capsys.readouterr()
    try_model(setup, test, {"per_device_bs": 2, "lora_r": 0})
    begins, ends = capsys.readouterr().out.splitlines()
    assert begins.startswith("trying the model") and re.fullmatch(r"the model was tried in \d+\.\d s", ends)
    monkeypatch.setattr(host_memory, "free_in_groups", lambda: 2e9 + 1000)
    try_model(setup, test, {"per_device_bs": 2, "lora_r": 0})
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("the model is not tried before the search: that needs 0.000")
    assert line.endswith(" GB, 1e-06 are free; with more memory (sbatch --mem=...) it is")


@pytest.mark.parametrize(
    "line, group, files",
    [
        ("0::/user.slice/me/session", "user.slice/me", ("memory.max", "memory.current", "inactive_file")),
        (
            "4:cpu,memory:/slurm/job/step",
            "memory/slurm/job",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_the_limit_of_a_control_group_counts(tmp_path, line, group, files):
    """Also of one that it is in: here the parent's is the smaller one."""
    limit, used, inactive = files
    parent = tmp_path / "sys/fs/cgroup" / group
    own, above = parent / line.rpartition("/")[2], parent.parent
    for folder, most in ((own, 10**9), (parent, 8000), (above, "max")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit).write_text(f"{most}\n")
        (folder / used).write_text("5000\n")
        (folder / "memory.stat").write_text(f"anon 4700\nfile 300\n{inactive} 200\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"9:pids:/\n{line}\n")
    assert host_memory.free_in_groups(tmp_path) == 8000 - 5000 + 200
    (parent / limit).write_text("max\n")
    (own / limit).write_text("max\n")
    assert host_memory.free_in_groups(tmp_path) == math.inf


def edited(folder, **values):
    """A model folder with other values in its config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def with_nan(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(folder)


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def of(kind, family, **more):
    """Replaces a model by a random one of another kind."""

    def replace(folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        config = random_config(family, tokenizer, **more)
        for file in ("config.json", "model.safetensors"):
            (folder / file).unlink()
        getattr(transformers, kind).from_config(config).save_pretrained(folder)

    return replace


T5 = {"d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
CODE = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
UNKNOWN = f"transformers {transformers.__version__} has no causal language model of model_type "
PADDING = "padding on the left of a batch changes its results, so it cannot be used here"
SHAPE = "of its weights are missing or do not have the shape of config.json: first "


@pytest.mark.parametrize(
    "spoil, message",
    [
        (of("AutoModelForCausalLM", "bert"), NO_CACHE),
        (of("AutoModelForCausalLM", "roberta", is_decoder=True, max_position_embeddings=600), PADDING),
        (of("AutoModelForMaskedLM", "distilbert"), f"{UNKNOWN}'distilbert'"),
        (of("AutoModelForSeq2SeqLM", "t5", **T5), "t5 is an encoder-decoder, and a causal language model is needed"),
        (of("AutoModelForSeq2SeqLM", "bart"), "bart is an encoder-decoder, and a causal language model is needed"),
        (of("AutoModelForSequenceClassification", "llama"), f"1 {SHAPE}lm_head.weight"),
        (lambda folder: edited(folder, model_type="no_such"), f"{UNKNOWN}'no_such'"),
        (lambda folder: edited(folder, model_type="own", auto_map=CODE), f"{UNKNOWN}'own'"),
        (lambda folder: edited(folder, num_hidden_layers=3), f"9 {SHAPE}model.layers.2.input_layernorm.weight"),
        (lambda folder: edited(folder, intermediate_size=32), f"6 {SHAPE}model.layers.0.mlp.down_proj.weight"),
        (lambda folder: edited(folder, hidden_size="many"), "its config.json cannot be used: "),
        (cut, "weights that cannot be read: "),
        (with_nan, "it fails at a training step: FloatingPointError: the loss is nan"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_that_cannot_be_used_are_refused(tmp_path, tokenizer, tiny_squad, capfd, spoil, message):
    folder = save(tmp_path / "model", random_model("llama", tokenizer), tokenizer)
    spoil(folder)
    capfd.readouterr()
    with pytest.raises(BadInput) as error:
        try_model(*prepared(folder, tiny_squad), {"per_device_bs": 2, "lora_r": 0})
    found = str(error.value)
    assert found == f"--model {folder}: {message}" or message.endswith(": ") and message in found and len(found) < 400
    out, err = capfd.readouterr()  # no table of weights, no question whether to run a model's own code
    assert out.count("\n") <= 1 and "y/N" not in out + err

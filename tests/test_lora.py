"""LoRA, gradient accumulation and gradient checkpointing: what a trial trains with, its checkpoints, best_model."""

import csv
import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
import transformers
from ray import tune
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import raytune_bayesian
from conftest import run_here, run_script
from faulty import write_script
from hpo import arguments, checks, errors, search_space
from hpo.plan import plan
from hpo.squad import evaluation, loading, lora, models
from hpo.squad.setup import prepare as prepare_setup
from test_trial import PauseAtRungs, config, losses, prepare, run_ranks, trial, with_stage


def with_more(base: dict, **more) -> dict:
    """A trial's config with more hyperparameters."""
    return base | {"train_loop_config": base["train_loop_config"] | more}


def size(folder) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


@pytest.mark.usefixtures("ray_without_gpu")
@pytest.mark.parametrize("stage, precision", [(0, "fp16"), (1, "fp32"), (2, "fp16")])
def test_paused_trial_equals_one_that_ran_through(tmp_path, dropout_model, tiny_squad, stage, precision):
    """To the last bit, with adapters, accumulation and gradient checkpointing together.

    190 questions make 24 steps of 4 batches of 2; the last one has 3 batches.
    """
    more = ("--max_eval_samples", 20, "--lora_r", 4, "--gradient_accumulation_steps", 4, "--gradient_checkpointing")
    more += ("--precision", precision)
    setup = prepare(dropout_model, tiny_squad, "--max_t", 8, "--num_train_epochs", 0.5, *more)
    setup = with_stage(setup, stage)
    scheduler = PauseAtRungs([1, 3, 8])
    configs = [config(), config(), with_more(config(), lora_r=8)]
    paused, through, other = run_ranks(tmp_path, trial, setup, configs, scheduler, size=1)
    assert scheduler.pauses == 3 and len(losses(paused)) == 8
    assert losses(paused) == losses(through) != losses(other)
    weights = [load_file(f"{result.checkpoint.path}/adapter_model.safetensors") for result in (through, paused)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.usefixtures("ray_without_gpu")
@pytest.mark.parametrize("stage, ranks", [(0, 1), (2, 2), (3, 2)])
def test_checkpoint_has_adapters_only_and_best_model_is_a_plain_model(tmp_path, demo_model, tiny_squad, stage, ranks):
    """Of a full training, and of one that was stopped at a rung."""
    more = ("--max_eval_samples", 20, "--lora_r", 4, "--lora_target_modules", "all-linear")
    setup = with_stage(prepare(demo_model, tiny_squad, "--max_t", 3, "--num_train_epochs", 0.1, *more), stage)
    ended, cut = with_more(config(lr=1e-2, rungs=[3]), lora_alpha=16.0), with_more(config(lr=1e-2, rungs=[2]), lora_r=8)
    for c in (ended, cut):
        c["train_loop_config"]["per_device_bs"] = 1
    results = run_ranks(tmp_path / "ray", trial, setup, [ended, cut], size=ranks)
    adapters = lora.count_trained(demo_model, 8, "all-linear")
    assert 0 < adapters < loading.count_parameters(demo_model) / 5
    for result, c, iteration in zip(results, (ended, cut), (3, 2), strict=True):
        checkpoint, path = Path(result.checkpoint.path), tmp_path / f"model-{iteration}"
        assert models.is_of_full_training(checkpoint) is (iteration == 3)
        assert size(checkpoint) < loading.checkpoint_bytes(demo_model, adapters)
        of_trial = lora.of_trial(setup, c["train_loop_config"])
        models.save_best_model(checkpoint, demo_model, "fp32", path, of_trial)
        merged, pretrained = load_file(path / "model.safetensors"), load_file(demo_model / "model.safetensors")
        assert merged.keys() == pretrained.keys()
        changed = {name for name in merged if not torch.equal(merged[name], pretrained[name])}
        assert changed and all(
            name.endswith(("query_key_value.weight", "dense.weight", "4h.weight", "h.weight")) for name in changed
        )
        model = evaluation.fuse_gelu(AutoModelForCausalLM.from_pretrained(path))
        loss, _ = evaluation.evaluate_loss(model, setup.selection, 0, raytune_bayesian.EVAL_TOKENS)
        assert loss == pytest.approx(losses(result)[iteration - 1], rel=1e-5)


def test_best_model_reads_the_weights_once(tmp_path, tiny_model, monkeypatch):
    """Without the copy that a worker process keeps for its next trials: it would take twice the memory."""
    lora.adapted(AutoModelForCausalLM.from_pretrained(tiny_model), 4).save_pretrained(tmp_path / "checkpoint")
    models._kept.cache_clear()
    monkeypatch.setattr(models, "pretrained", None)
    models.save_best_model(tmp_path / "checkpoint", tiny_model, "fp32", tmp_path / "best_model", {"r": 4})
    assert models._kept.cache_info().currsize == 0 and (tmp_path / "best_model" / "model.safetensors").exists()


@pytest.mark.parametrize("value", [math.nan, -math.inf, 1.0])
def test_a_best_model_that_is_no_number_is_told(tmp_path, tiny_model, capsys, value):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.transformer.h[0].mlp.dense_h_to_4h.weight.data[3, 5] = value
    model.save_pretrained(tmp_path / "checkpoint")
    models.save_best_model(tmp_path / "checkpoint", tiny_model, "fp32", tmp_path / "best_model")
    assert ("WARNING: best_model has weights that are infinite" in capsys.readouterr().out) is not math.isfinite(value)


LARGE = 24  # sequences of an optimizer step


@pytest.fixture(scope="module")
def of_one_rank(tmp_path_factory, ray_without_gpu, tiny_model, dropout_model, uneven_squad):
    """A setup, and its trials of one rank: one large batch, accumulated batches; then, with dropout, one large batch
    without and with gradient checkpointing.
    """
    more = ("--max_train_samples", 152, "--num_train_epochs", 1, "--max_eval_samples", 20)
    setup = prepare(tiny_model, uneven_squad, "--max_t", 7, *more)
    dropout = dataclasses.replace(setup, model=dropout_model)
    setups = [setup, setup, dropout, dataclasses.replace(dropout, gradient_checkpointing=True)]
    one = config(per_device_bs=LARGE, rungs=[7])
    configs = [one, accumulated(1), one, one]
    return setup, run_ranks(tmp_path_factory.mktemp("one"), trial, setups, configs, size=1)


def accumulated(ranks: int) -> dict:
    """The config of a trial that makes its large batch of three smaller ones, on so many ranks."""
    return with_more(config(per_device_bs=LARGE // ranks // 3, rungs=[7]), gradient_accumulation_steps=3)


@pytest.mark.parametrize("stage, ranks", [(0, 1), (0, 2), (2, 2), (3, 2)])
def test_accumulated_batches_equal_one_large_batch(tmp_path, of_one_rank, stage, ranks):
    """Answers differ in length, so a mean of the batches' means would be another loss. The last step has one batch."""
    setup, (one, many, *_) = of_one_rank
    if ranks > 1:
        (many,) = run_ranks(tmp_path, trial, with_stage(setup, stage), [accumulated(ranks)], size=ranks)
    assert len(losses(one)) == 7 and losses(many) == pytest.approx(losses(one), rel=1e-4)
    ends = [AutoModelForCausalLM.from_pretrained(result.checkpoint.path) for result in (one, many)]
    for (name, weight), other in zip(ends[0].named_parameters(), ends[1].parameters(), strict=True):
        assert torch.allclose(weight, other, atol=1e-4), name


def test_gradient_checkpointing_changes_no_bit(of_one_rank):
    _, (plain, _, without, with_it) = of_one_rank
    assert losses(with_it) == losses(without) != losses(plain)
    weights = [load_file(f"{result.checkpoint.path}/model.safetensors") for result in (without, with_it)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_checkpointing_computes_the_layers_again(tiny_model):
    """Each layer runs twice in a training step: or the test above would say nothing."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model).train()
    calls = []
    model.transformer.h[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    setup = type("Setup", (), {"gradient_checkpointing": True, "lora_target_modules": ""})
    lora.prepare(model, setup, {"lora_r": 0})
    batch = evaluation.collate([{"input_ids": [5, 6, 7, 8], "prompt_length": 2}], 0)
    evaluation.answer_loss(model, batch)[0].backward()
    assert len(calls) == 2


SEARCH = """
from ray import tune

experiment.SEARCH_SPACE["train_loop_config"] |= {
    "lr": tune.loguniform(1e-3, 1e-2),
    "lora_r": tune.choice([2, 8]),
    "gradient_accumulation_steps": tune.choice([1, 2]),
}
train = experiment.train
"""


def test_a_search_of_ranks_and_learning_rates(tmp_path, demo_model):
    """From the command line, with the plan's checks before it. best_model is loaded as any model, and gives the loss
    of the test."""
    script = write_script(tmp_path / "my_search.py", SEARCH)
    flags = ("--model", demo_model, "--dataset", demo_model.parent / "squad", "--output_dir", tmp_path)
    flags += ("--max_t", 2, "--reduction_factor", 2, "--num_samples", 3, "--max_train_samples", 24)
    flags += ("--max_concurrent_trials", 1)
    flags += ("--max_eval_samples", 20, "--lora_target_modules", "all-linear", "--gradient_checkpointing")
    process = run_script(*flags, "--run_name", "run", "--report_to", "none", script=script)
    assert process.returncode == 0, process.stdout + process.stderr
    assert re.search(r"^LoRA: up to [\d,]+ trained parameters", process.stdout, re.MULTILINE), process.stdout
    run = tmp_path / "run"
    with open(run / "trials.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and all(row["lora_r"] in ("2", "8") for row in rows)
    facts, best = json.loads((run / "run.json").read_text()), json.loads((run / "best_result.json").read_text())
    assert facts["status"] == "done" and best["config"]["train_loop_config"]["lora_r"] in (2, 8)
    model = evaluation.fuse_gelu(AutoModelForCausalLM.from_pretrained(run / "best_model"))
    pretrained = load_file(demo_model / "model.safetensors")
    assert load_file(run / "best_model" / "model.safetensors").keys() == pretrained.keys()
    args = arguments.parse("", [*map(str, flags), "--run_name", "other"])
    args.ds_config, args.precision = {}, "fp32"
    _, test = raytune_bayesian.prepare(args, raytune_bayesian.MAX_LENGTH, raytune_bayesian.SELECTION_SIZE, 4)
    pad = models.load_tokenizer(run / "best_model").pad_token_id
    loss, _ = evaluation.evaluate_loss(model, test, pad, raytune_bayesian.EVAL_TOKENS)
    assert loss == pytest.approx(facts["tests"][-1]["eval_loss"], rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# wrong input: one line


def refusal(*flags, **searched) -> str:
    """What the check of the flags says, with more hyperparameters in the search space."""
    space = {"train_loop_config": raytune_bayesian.SEARCH_SPACE["train_loop_config"] | searched}
    with pytest.raises(errors.BadInput) as refused:
        args = arguments.parse("", list(map(str, flags)))
        search_space.check(space, raytune_bayesian.train, {})
        search_space.check_flags(space, args)
    return str(refused.value)


NO_ADAPTERS = "no adapters: use --lora_r, or add lora_r to the search space"
NAMES = "names separated by commas, or all-linear alone"


@pytest.mark.parametrize("flags, searched, says", [
    (["--lora_r", -1], {}, "--lora_r -1: must be at least 0"),
    (["--lora_r", 4, "--lora_alpha", 0], {}, "--lora_alpha 0.0: must be above 0"),
    (["--lora_r", 4, "--lora_alpha", "inf"], {}, "--lora_alpha inf: must be above 0"),
    (["--lora_r", 4, "--lora_target_modules", "a,,b"], {}, f"--lora_target_modules a,,b: {NAMES}"),
    (["--lora_r", 4, "--lora_target_modules", "all-linear,x"], {}, f"--lora_target_modules all-linear,x: {NAMES}"),
    (["--lora_alpha", 4], {}, f"--lora_alpha 4.0: {NO_ADAPTERS}"),
    (["--lora_target_modules", "all-linear"], {}, f"--lora_target_modules all-linear: {NO_ADAPTERS}"),
    ([], {"lora_alpha": tune.choice([4, 8])}, f"search space: lora_alpha: {NO_ADAPTERS}"),
    (["--lora_r", 4], {"lora_r": tune.choice([4, 8])},
     "--lora_r 4: the search space has lora_r too: remove one of them"),
    ([], {"lora_r": tune.choice([0, 8])}, "search space: lora_r: 0 is not a whole number from 1 on"),
    ([], {"lora_r": tune.uniform(1, 8)},
     "search space: lora_r: it draws fractions: use tune.choice, tune.randint or tune.qrandint"),
    (["--lora_r", 4], {"lora_alpha": tune.uniform(0, 8)}, "search space: lora_alpha: 0 is not a number above 0"),
    (["--gradient_accumulation_steps", 0], {}, "--gradient_accumulation_steps 0: must be at least 1"),
    (["--gradient_accumulation_steps", 2], {"gradient_accumulation_steps": tune.choice([1, 2])},
     "--gradient_accumulation_steps 2: the search space has gradient_accumulation_steps too: remove one of them"),
    ([], {"gradient_accumulation_steps": tune.choice([1, 1.5])},
     "search space: gradient_accumulation_steps: 1.5 is not a whole number from 1 on"),
    ([], {"gradient_checkpointing": tune.choice([True, False])},
     "search space: gradient_checkpointing: use --gradient_checkpointing"),
])  # fmt: skip
def test_contradictions_are_refused(flags, searched, says):
    assert refusal(*flags, **searched) == says


def test_flags_and_hyperparameters_that_go_together():
    space = {"train_loop_config": {"lora_r": tune.choice([4, 8])}}
    for flags in (["--lora_alpha", "4"], ["--lora_target_modules", "all-linear"], ["--gradient_checkpointing"]):
        search_space.check_flags(space, arguments.parse("", flags))
    args = arguments.parse("", ["--lora_r", "4", "--gradient_accumulation_steps", "3"])
    assert search_space.largest_trial({"train_loop_config": {"per_device_bs": 2}}, args) == {
        "per_device_bs": 2, "gradient_accumulation_steps": 3, "lora_r": 4, "sequences": 6
    }  # fmt: skip


BLOOM = "its linear layers are dense, dense_4h_to_h, dense_h_to_4h, query_key_value"


@pytest.mark.parametrize("target_modules, says", [
    ("q_proj", f"--lora_target_modules: there is no q_proj in this model; {BLOOM}"),
    ("dense,value", f"--lora_target_modules: there is no value in this model; {BLOOM}"),
    ("lm_head", "--lora_target_modules: lm_head shares its weights with another layer: leave it out"),
    ("input_layernorm", "--lora_target_modules input_layernorm: peft cannot adapt this BloomForCausalLM: Target module "
     "LayerNorm"),
])  # fmt: skip
def test_layers_that_cannot_be_adapted_are_refused(tiny_model, target_modules, says):
    with pytest.raises(errors.BadInput) as refused:
        lora.check(tiny_model, 4, target_modules, False)
    assert str(refused.value).startswith(says) and (str(refused.value) == says or says.endswith("LayerNorm"))


def test_a_rank_above_the_size_of_a_layer_is_refused(tiny_model):
    lora.check(tiny_model, 32, "", False)
    with pytest.raises(errors.BadInput, match="^--lora_r: 33 is above 32, the smaller side of a layer$"):
        lora.check(tiny_model, 33, "", False)


def test_models_that_peft_does_not_know(tmp_path):
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1}
    transformers.OlmoConfig(**sizes, intermediate_size=16, num_attention_heads=2).save_pretrained(tmp_path / "olmo")
    with pytest.raises(errors.BadInput) as refused:
        lora.check(tmp_path / "olmo", 4, "", False)
    assert str(refused.value) == (
        "--lora_r: peft has no default layers for OlmoForCausalLM: name some with --lora_target_modules, or all-linear"
    )
    lora.check(tmp_path / "olmo", 4, "all-linear", True)
    assert lora.count_trained(tmp_path / "olmo", 4, "q_proj") == 4 * (16 + 16)


@pytest.mark.parametrize("more", [[], ["--plan"]])  # --prefetch does what a search does first
def test_wrong_layers_end_the_program_before_ray(tmp_path, tiny_model, tiny_squad, more):
    flags = ["--model", tiny_model, "--dataset", tiny_squad, "--output_dir", tmp_path / "results", "--lora_r", 4]
    process = run_here(*flags, "--max_t", 2, "--lora_target_modules", "q_proj", *more)
    assert process.returncode == 2, process.stdout + process.stderr
    says = f"raytune_bayesian.py: error: --lora_target_modules: there is no q_proj in this model; {BLOOM}\n"
    assert process.stderr == says and not (tmp_path / "results").exists()


def test_too_few_optimizer_steps_are_refused(tiny_model, tiny_squad):
    """A step takes as many sequences as all its batches have."""
    more = ("--max_t", 6, "--max_train_samples", 40, "--num_train_epochs", 1, "--gradient_accumulation_steps", 4)
    args = arguments.parse("", [*map(str, ("--model", tiny_model, "--dataset", tiny_squad, *more))])
    largest = search_space.largest_trial(raytune_bayesian.SEARCH_SPACE, checks.check(args))
    with pytest.raises(errors.BadInput) as refused:
        prepare_setup(args, raytune_bayesian.MAX_LENGTH, raytune_bayesian.SELECTION_SIZE, largest["sequences"])
    assert str(refused.value) == (
        "--max_t 6: a full training on 40 questions has only 5 optimizer steps at batch size 8; use more questions or "
        "epochs, or a smaller --max_t"
    )


def test_plan_with_adapters(tmp_path, demo_model, capsys):
    """Optimizer state and checkpoints of the adapters only, and best_model as a whole."""

    def said(*more) -> str:
        flags = ("--plan", "--max_concurrent_trials", 1, "--model", demo_model, "--output_dir", tmp_path, *more)
        args = checks.check(arguments.parse("", list(map(str, flags))))
        script = raytune_bayesian
        plan.show(args, script.SEARCH_SPACE, script.MAX_LENGTH, script.EVAL_TOKENS)
        return capsys.readouterr().out

    plain, small = said(), said("--lora_r", 8, "--gradient_checkpointing")
    sizes = [float(re.search(r"checkpoints of ([\d.]+) GB", text).group(1)) for text in (plain, small)]
    adapters = lora.count_trained(demo_model, 8, "")
    assert sizes[0] > 5 * sizes[1]
    assert sizes[1] == pytest.approx(loading.checkpoint_bytes(demo_model, adapters) / 1e9, rel=0.01)
    assert "\nmemory of a GPU, in GB, at batch size 2" in plain
    assert "\nwith LoRA rank 8 and gradient checkpointing: memory of a GPU, in GB, at batch size 2" in small

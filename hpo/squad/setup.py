"""What all trials of a search share."""

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from hpo import errors
from hpo.errors import BadInput
from hpo.squad import data, leakage, loading, models
from hpo.squad.data import TokenizedSquad


@dataclass
class Setup:
    """What all trials of a search share. Ray sends it to each node once.

    A field with the name of a flag has the value of the flag; only `model` is a folder here.
    """

    run_dir: Path
    model: Path  # folder of the pretrained model
    train: TokenizedSquad
    selection: TokenizedSquad  # held-out training questions that trials are compared on
    max_new_tokens: int  # of a generated answer: as many as the longest answer of the training set has, EOS included
    ds_config: dict  # as in the user's file, see hpo/checks.py
    held_out: str  # what separates `train` from `selection`: "articles" or "passages"
    precision: str  # "fp16", "bf16" or "fp32"
    max_t: int  # a full training has so many iterations
    num_train_epochs: float  # of a full training
    metric: str  # trials are compared by it
    metric_language: str  # answers are normalised as in this language, see hpo/squad/scores.py
    seed: int
    gpus_per_trial: float  # 0.5: two trials share a GPU
    cpus_per_trial: int
    unanswerable: bool = False  # a question for training or validation has no answer: scored as in SQuAD 2.0
    dropped: dict[str, Counter] = field(default_factory=dict)  # see loading.load_examples
    leakage: dict[str, dict[str, int]] = field(default_factory=dict)  # "selection", "test": counts of leakage.find
    # The next three, and seed, can also be hyperparameters. Then the trial's own value counts.
    gradient_accumulation_steps: int = 1
    lora_r: int = 0
    lora_alpha: float | None = None
    lora_target_modules: str = ""
    gradient_checkpointing: bool = False

    def hyperparameters(self, searched: dict) -> dict:
        """All hyperparameters of a trial: those that are searched, and flags for what is not.

        Args:
            searched: train_loop_config of the trial.
        """
        names = ("gradient_accumulation_steps", "lora_r", "lora_alpha", "seed")
        return {name: getattr(self, name) for name in names} | searched

    @property
    def shares_gpu(self) -> bool:
        """Whether other trials run on the GPU of a trial."""
        return 0 < self.gpus_per_trial < 1

    @property
    def stop_file(self) -> Path:
        """While it exists, trials save a checkpoint at their next step and are paused, on whatever node they run."""
        return self.run_dir / ".stop"


def prepare(args, max_length: int, selection_size: int, batch: int) -> tuple[Setup, TokenizedSquad]:
    """Loads the questions, splits and tokenises them, once for all trials.

    Args:
        args: the arguments of the run.
        max_length: most tokens of a sequence, if the model takes as many.
        selection_size: questions to hold out of the training set, unless --max_eval_samples says otherwise.
        batch: sequences of one GPU in an optimizer step, at most.

    Returns:
        The setup, and the test questions.

    Raises:
        BadInput: this data or this model cannot be used.
    """
    model = loading.model_folder(args.model)
    models.check_kind(model)
    *examples, dropped = loading.load_examples(args.dataset, args.prefetch, args.drop_bad_answers)
    tokenizer = _load_tokenizer(model)
    positions, embeddings = models.max_positions(model), models.text_config(model).vocab_size
    run_dir = Path(args.output_dir).absolute() / args.run_name
    leaks = {"selection": {}} if _checks_selection(args, run_dir) else {}
    try:
        size = args.max_eval_samples or selection_size
        train, selection = data.hold_out(examples[0], size, args.seed, leaks.get("selection"))
    except ValueError as error:
        raise BadInput(f"--dataset {args.dataset}: {error}") from None
    leaks["test"] = leakage.find(examples[1], examples[0])[1]
    leakage.clear_caches()
    titles = [{example["title"] for example in part} for part in (train, selection)]
    train = data.subset(train, args.max_train_samples, args.seed)
    test = data.subset(examples[1], args.max_eval_samples, args.seed)
    try:
        train, selection, test = _tokenize(train, selection, test, tokenizer, max_length, positions)
    except ValueError as error:
        takes = f" ({args.model} takes {positions})" if positions else ""
        raise BadInput(f"--dataset {args.dataset}: {error}{takes}") from None
    largest = max(int(part.tokens.max()) for part in (train, selection, test))
    if largest >= embeddings:
        raise BadInput(f"--model {model}: its tokenizer gives token {largest}, and it has {embeddings} embeddings")
    _check_steps(args, len(train), batch * max(1, args.gpus_per_trial or 0))  # None on a login node
    flags = {name: getattr(args, name) for name in Setup.__annotations__.keys() & vars(args).keys()}
    of_questions = {
        "run_dir": run_dir,
        "model": model,
        "train": train,
        "selection": selection,
        "max_new_tokens": train.longest_answer,
        "held_out": "articles" if titles[0].isdisjoint(titles[1]) else "passages",
        "unanswerable": any(not example["answers"]["text"] for part in examples for example in part),
        "dropped": dropped,
        "leakage": leaks,
    }
    return Setup(**flags | of_questions), test


def _checks_selection(args, run_dir: Path) -> bool:
    """Whether near-duplicates are left out of the selection. A run keeps the selection that it has begun with.

    Versions that did not check have no "selection" in run.json. Their runs come here only without a copy of the code,
    or with --new_code.
    """
    if not args.resume:
        return True
    return "selection" in json.loads((run_dir / "run.json").read_text()).get("leakage", {})


def _load_tokenizer(model: Path):
    """The tokenizer of a model. Raises BadInput unless it is a fast one with an EOS token."""
    try:
        tokenizer = models.load_tokenizer(model)
    except Exception as error:  # whatever a broken tokenizer raises
        raise BadInput(f"--model {model}: no usable tokenizer: {errors.one_line(error, 200)}") from None
    if tokenizer.eos_token_id is None or not tokenizer.is_fast:
        raise BadInput(f"--model {model}: a fast tokenizer (tokenizer.json) with an EOS token is needed")
    return tokenizer


def _tokenize(train, selection, test, tokenizer, max_length: int, positions: int | None) -> list[TokenizedSquad]:
    """Tokenises the three parts. Raises ValueError where a question does not fit into the lengths of `prepare`."""
    train = data.tokenize(train, tokenizer, min(max_length, positions or max_length), training=True)
    train.references = []  # no score is computed on them, so they need not be sent to each trial
    others = [
        _tokenize_for_evaluation(part, tokenizer, max_length, positions, train.longest_answer)
        for part in (selection, test)
    ]
    return [train, *others]


def _check_steps(args, questions: int, batch: int) -> None:
    """Raises BadInput where a full training has fewer optimizer steps than iterations."""
    steps = math.ceil(max(1, round(questions * args.num_train_epochs)) / batch)
    if steps < args.max_t:
        raise BadInput(
            f"--max_t {args.max_t}: a full training on {questions} questions has only {steps} optimizer steps "
            f"at batch size {batch}; use more questions or epochs, or a smaller --max_t"
        )


def _tokenize_for_evaluation(examples, tokenizer, max_length: int, positions: int | None, max_new_tokens: int):
    """Prompts leave ANSWER_ROOM below max_length. Within the model's positions they leave room for each answer."""
    longest_prompt = max_length - data.ANSWER_ROOM
    tokens = data.tokenize(examples, tokenizer, longest_prompt, training=False)
    room = max(tokens.longest_answer, max_new_tokens)
    if positions is None or longest_prompt + room <= positions:
        return tokens
    try:
        return data.tokenize(examples, tokenizer, max(0, positions - room), training=False)
    except ValueError as error:
        raise ValueError(f"{error}, beside an answer of up to {room}") from None

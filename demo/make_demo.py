"""Makes the demo, so that everything runs without a hub and without a GPU: a small data set and a small BLOOM.

    python demo/make_demo.py        # writes demo/squad/ and demo/model/ in a minute and a half

demo/squad has the format of SQuAD v1.1. All names and facts are invented, so a question can only be answered by
reading its passage: several facts of the same kind stand in it (two people, two places, two dates, two materials), and
in some a second building with the same relation.

demo/model is "pretrained a little", on passages of its own with notes about them ("keeper: Mira Toven noted."). It
can look a fact up and copy it, but it has never seen a question or the prompt of the fine-tuning: that is left to
learn.
"""

import json
import os
import random
import shutil
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

# ---------------------------------------------------------------------------------------------------------------------
# knobs

HERE = Path(__file__).parent
SEED = 1

TRAIN_ARTICLES = 100  # times 6 passages and 4 questions: 2400
DEV_ARTICLES = 15  # 360 questions
PASSAGES = 6  # an article
FACTS = 4  # a passage, of one building
RIVAL = 0.15  # share of passages that tell one of the facts of a second building too

VOCABULARY = 1600  # 256 bytes, and merges enough that an invented name is a token or two
HIDDEN, LAYERS, HEADS = 96, 3, 4
INIT_STD = 0.1  # BLOOM's 0.02 is meant for wide models

STEPS, BATCH, LR, WARMUP = 300, 48, 3e-3, 50  # pretraining
CUE_FIRST = 0.9  # share of pretraining texts that ask before the passage, as a question will

# ---------------------------------------------------------------------------------------------------------------------
# an invented world

ONSETS = "b br d dr f g gr h j k kr l m n p pr r s st t tr v z".split()
VOWELS = "a e i o u ai ea ou".split()
CODAS = ["", "", "l", "n", "r", "s", "m", "nd", "rk", "th"]
KINDS = "Abbey Bridge Tower College Museum Mill Library Theatre Castle Garden".split()
MONTHS = "January February March April May June July August September October November December".split()
COLOURS = "red white black grey green blue yellow brown".split()
STONES = "granite marble sandstone brick limestone slate oak cedar".split()

# relation: kind of value, name in notes, sentences, questions; {s} is the building, {v} the value
RELATIONS = {
    "founder": ("person", ["{s} was founded by {v}.", "The founder of {s} was {v}.", "{s} had as its founder {v}."],
                ["Who founded {s}?", "Who was the founder of {s}?", "By whom was {s} founded?"]),
    "keeper": ("person", ["{s} is kept by {v}.", "The keeper of {s} is {v}.", "{s} has a keeper, {v}."],
               ["Who keeps {s}?", "Who is the keeper of {s}?", "By whom is {s} kept?"]),
    "architect": ("person", ["{s} was drawn by {v}.", "The architect of {s} was {v}.", "{s} had an architect, {v}."],
                  ["Who drew {s}?", "Who was the architect of {s}?", "By whom was {s} drawn?"]),
    "town": ("town", ["{s} stands in the town of {v}.", "The town of {s} is {v}.", "{s} is found in the town of {v}."],
             ["In which town does {s} stand?", "What is the town of {s}?", "In what town is {s} found?"]),
    "river": ("river", ["{s} looks over the {v}.", "The river at {s} is the {v}.", "{s} lies on the {v}."],
              ["Which river does {s} look over?", "What is the river at {s}?", "On which river does {s} lie?"]),
    "walls": ("material", ["{s} has walls of {v}.", "The walls of {s} are of {v}.", "{s} shows walls of {v}."],
              ["What are the walls of {s} made of?", "Of what are the walls of {s}?", "What walls does {s} have?"]),
    "roof": ("material", ["{s} has a roof of {v}.", "The roof of {s} is of {v}.", "{s} is under a roof of {v}."],
             ["What is the roof of {s} made of?", "Of what is the roof of {s}?", "Under what roof is {s}?"]),
    "opening": ("date", ["{s} was opened on {v}.", "The opening of {s} was on {v}.", "{s} opened its doors on {v}."],
                ["When was {s} opened?", "On what date was the opening of {s}?", "When did {s} open its doors?"]),
    "fire": ("date", ["{s} burned on {v}.", "The fire of {s} was on {v}.", "{s} was lost to fire on {v}."],
             ["When did {s} burn?", "On what date was the fire of {s}?", "When was {s} lost to fire?"]),
}  # fmt: skip


def make_names(rng: random.Random, count: int, taken: set[str]) -> list[str]:
    """New names of two syllables, which are added to `taken`."""
    names = []
    while len(names) < count:
        syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(2)]
        name = ("".join(syllables) + rng.choice(CODAS)).capitalize()
        if name not in taken:
            taken.add(name)
            names.append(name)
    return names


_rng, _taken = random.Random(SEED), set()
GIVEN, FAMILY, PLACES, TOWNS, RIVERS = (make_names(_rng, n, _taken) for n in (40, 60, 100, 40, 40))
YEARS = _rng.sample(range(1700, 1990), 40)


def make_value(rng: random.Random, kind: str) -> list[str]:
    """A value as a list of accepted references; the later ones are pieces of the first."""
    if kind == "person":
        given, family = rng.choice(GIVEN), rng.choice(FAMILY)
        return [f"{given} {family}", family]
    if kind == "town":
        return [rng.choice(TOWNS)]
    if kind == "river":
        river = rng.choice(RIVERS)
        return [f"River {river}", river]
    if kind == "material":
        stone = rng.choice(STONES)
        return [f"{rng.choice(COLOURS)} {stone}", stone]
    month, year = rng.choice(MONTHS), rng.choice(YEARS)
    return [f"{rng.randint(1, 28)} {month} {year}", f"{month} {year}"]


def make_subject(rng: random.Random) -> str:
    """The name of something that a passage is about."""
    return f"{rng.choice(PLACES)} {rng.choice(KINDS)}"


def make_passage(rng: random.Random, subject: str, known: dict) -> tuple[str, list[tuple]]:
    """A passage about `subject` and its facts, each (relation, references, where the first reference starts).

    `known` keeps what is true of the subject from one passage of an article to the next.
    """
    relations = rng.sample(list(RELATIONS), FACTS)
    told = [(subject, r, known.setdefault(r, make_value(rng, RELATIONS[r][0]))) for r in relations]
    if rng.random() < RIVAL:
        relation = rng.choice(relations)
        told.append((make_subject(rng), relation, make_value(rng, RELATIONS[relation][0])))
    rng.shuffle(told)
    passage, facts = "", []
    for s, relation, references in told:
        before, after = rng.choice(RELATIONS[relation][1]).replace("{s}", f"the {s}").split("{v}")
        before = " " * bool(passage) + before[0].upper() + before[1:]
        if s == subject:
            facts.append((relation, references, len(passage) + len(before)))
        passage += before + references[0] + after
    return passage, facts


def question(rng: random.Random, relation: str, subject: str) -> str:
    """A question for one fact of a subject."""
    return rng.choice(RELATIONS[relation][2]).replace("{s}", f"the {subject}")


# ---------------------------------------------------------------------------------------------------------------------
# data set


def make_articles(rng: random.Random, count: int, titles: set[str], all_references: bool) -> list[dict]:
    """Articles in SQuAD's format about buildings that are not in `titles`, which grows."""
    articles = []
    while len(articles) < count:
        subject = make_subject(rng)
        if subject in titles:
            continue
        titles.add(subject)
        paragraphs, known = [], {}
        for _ in range(PASSAGES):
            context, facts = make_passage(rng, subject, known)
            qas = []
            for relation, references, start in facts:
                answers = [{"text": t, "answer_start": start + references[0].index(t)} for t in references]
                if not all_references and rng.random() < 0.8:  # as in SQuAD, where training questions have one
                    answers = answers[:1]
                qas.append(
                    {
                        "id": f"{rng.getrandbits(96):024x}",
                        "question": question(rng, relation, subject),
                        "answers": answers,
                    }
                )
            paragraphs.append({"context": context, "qas": qas})
        articles.append({"title": subject.replace(" ", "_"), "paragraphs": paragraphs})
    return articles


def make_squad() -> tuple[dict, dict, set[str]]:
    """Training set, development set, and the titles of both."""
    rng, titles = random.Random(SEED + 1), set()
    sets = [make_articles(rng, n, titles, dev) for n, dev in ((TRAIN_ARTICLES, False), (DEV_ARTICLES, True))]
    return {"version": "1.1", "data": sets[0]}, {"version": "1.1", "data": sets[1]}, titles


# ---------------------------------------------------------------------------------------------------------------------
# model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with the whole byte alphabet: any text survives encoding and decoding."""
    rng = random.Random(SEED + 2)
    texts = ["Question: Context: Answer:"] * 400
    for _ in range(3000):
        subject = make_subject(rng)
        passage, facts = make_passage(rng, subject, {})
        texts += [passage] + [question(rng, relation, subject) for relation, _, _ in facts]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<pad>", "<s>", "</s>"]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_text(rng: random.Random, titles: set[str], encode) -> tuple[list[int], list[bool]]:
    """One text to pretrain on: token ids, and which of them are to be predicted (what a note says)."""
    while (subject := make_subject(rng)) in titles:
        pass
    passage, facts = make_passage(rng, subject, {})
    rng.shuffle(facts)
    ids: list[int] = []
    learnt: list[bool] = []

    def add(text: str, learn: bool = False):
        new = encode(text)
        ids.extend(new)
        learnt.extend([learn] * len(new))

    # A note ends with a word: a model that has not learnt to end an answer with EOS shall not score for what it copies.
    if rng.random() < CUE_FIRST:
        relation, references, _ = facts.pop()
        cue = rng.choice([relation, f"{relation} of the {subject}", f"the {subject}, {relation}"])
        add(f"Seek {cue} in {passage} Found:")
        add(f" {references[0]} noted.", learn=True)
    else:
        add(passage)
    for relation, references, _ in facts:
        add(f" Note {relation}:")
        add(f" {references[0]} noted.", learn=True)
    return ids, learnt


def copying_start(model: BloomForCausalLM) -> None:
    """Starts attention as a copier: queries look for keys like themselves, and what they find is passed on whole.

    Copying is then learnt in hundreds of steps instead of thousands (Trockman & Kolter, "Mimetic Initialization of
    Self-Attention Layers", ICML 2023).
    """
    dim = HIDDEN // HEADS
    for block in model.transformer.h:
        attention = block.self_attention
        weights = attention.query_key_value.weight.data.view(HEADS, 3, dim, HIDDEN)
        torch.nn.init.normal_(weights[:, 0], std=0.05)
        weights[:, 1] = weights[:, 0]
        turn = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN))[0]
        weights[:, 2] = 1.5 * turn.view(HEADS, dim, HIDDEN)
        attention.dense.weight.data.copy_(1.5 * turn.T)


def make_model(tokenizer: PreTrainedTokenizerFast, titles: set[str]) -> BloomForCausalLM:
    """Pretrains a small BLOOM a little."""
    torch.set_num_threads(1)  # on a busy machine two threads that wait for each other are slower than one
    torch.manual_seed(SEED)
    config = BloomConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS, initializer_range=INIT_STD,
        hidden_dropout=0.0, attention_dropout=0.0, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = BloomForCausalLM(config)
    copying_start(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / WARMUP, (STEPS - s) / (STEPS - WARMUP))
    )
    rng, started = random.Random(SEED + 3), time.time()
    told = 0.0
    for step in range(STEPS):
        texts = [
            make_text(rng, titles, lambda text: tokenizer.backend_tokenizer.encode(text).ids) for _ in range(BATCH)
        ]
        width = max(len(ids) for ids, _ in texts)
        # padded on the right, where a causal model never looks
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in texts])
        learnt = torch.tensor([mask + [False] * (width - len(mask)) for _, mask in texts])[:, 1:]
        hidden = model.transformer(ids[:, :-1], use_cache=False).last_hidden_state
        logits, targets = model.lm_head(hidden[learnt]), ids[:, 1:][learnt]
        loss = torch.nn.functional.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if time.time() > told + 5 or step == STEPS - 1:
            told = time.time()
            right = (logits.argmax(-1) == targets).float().mean().item()
            print(
                f"[{time.time() - started:4.0f} s] pretraining step {step:3d}/{STEPS}, loss {loss.item():.3f}, "
                f"right {right:.2f}",
                flush=True,
            )
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------


def write_folder(path: Path, write) -> None:
    """Calls write(temporary folder) and renames it: `path` is whole or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.mkdir()
    try:
        write(temporary)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main() -> None:
    """Makes demo/squad and demo/model, unless they are there."""
    transformers.logging.disable_progress_bar()
    squad_folder, model_folder = HERE / "squad", HERE / "model"
    if squad_folder.is_dir() and model_folder.is_dir():
        print(f"the demo is there already: {model_folder} and {squad_folder}")
        return
    train, dev, titles = make_squad()

    def write_squad(folder: Path):
        for name, articles in (("train", train), ("dev", dev)):
            (folder / f"{name}-v1.1.json").write_text(json.dumps(articles))

    def write_model(folder: Path):
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)

    if not squad_folder.is_dir():
        write_folder(squad_folder, write_squad)
    if not model_folder.is_dir():
        tokenizer = make_tokenizer()
        model = make_model(tokenizer, titles)
        write_folder(model_folder, write_model)
    print(f"the demo is made: {model_folder} and {squad_folder}")


if __name__ == "__main__":
    main()

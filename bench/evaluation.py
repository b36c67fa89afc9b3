"""EM and F1 of 1,000 questions: evaluation.predict against one question at a time, with the same predictions.

    make demo-data && .venv/bin/python bench/evaluation.py        # about six minutes

One at a time is what people write: model.generate with its defaults, greedy, with the same limit of new tokens. The
model is the demo's after a short fine-tuning, so that it answers and ends as trained models do. It is measured as it
is, and with BLOOM's vocabulary of 250,880, in rows that no answer uses. The ratio is that of BLOOM's vocabulary.

One thread, and the C library's settings for memory, as in a trial. Seconds are CPU seconds, which other work on the
machine disturbs less than seconds of a clock. All ways take turns; the table has medians of the turns.
"""

import copy
import os
import statistics
import sys
import time

import common
import numpy as np
import torch
import transformers

from hpo.cluster.launch import MALLOC
from hpo.squad import data as squad_data
from hpo.squad import evaluation, models, reading
from raytune_bayesian import EVAL_TOKENS, MAX_LENGTH, SquadMetric

QUESTIONS = 1000
TURNS = 5  # in each, one at a time answers a fifth of the questions, each other way all of them
STEPS, BATCH, LR = 200, 16, 1e-3  # fine-tuning
BLOOM_VOCABULARY = 250_880
LIMIT = 8.0


def fine_tune(model, tokenizer, data: squad_data.TokenizedSquad) -> None:
    """Trains all weights for STEPS steps, in place."""
    optimizer, rng = torch.optim.AdamW(model.parameters(), lr=LR), np.random.default_rng(0)
    for _ in range(STEPS):
        drawn = [data[i] for i in rng.choice(len(data), BATCH, replace=False)]
        batch = evaluation.collate(drawn, tokenizer.pad_token_id)
        loss, count = evaluation.answer_loss(model, batch)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def one_at_a_time(model, tokenizer, data: squad_data.TokenizedSquad, indices, max_new_tokens: int) -> list[dict]:
    """The answers to the questions with these indices, as people compute them."""
    predictions = []
    for i in indices:
        prompt = torch.from_numpy(data[i]["input_ids"][: data[i]["prompt_length"]].astype(np.int64))[None]
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        text = tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).strip()
        predictions.append({"id": data.references[i]["id"], "prediction_text": text})
    return predictions


@torch.no_grad()
def generate_in_batches(model, tokenizer, data: squad_data.TokenizedSquad, max_new_tokens: int) -> list[dict]:
    """What evaluation.predict would be with model.generate."""
    predictions = [{}] * len(data)
    for indices in evaluation.batches_by_length(data.prompt_lengths, EVAL_TOKENS):
        prompts = [{**data[i], "input_ids": data[i]["input_ids"][: data[i]["prompt_length"]]} for i in indices]
        batch = evaluation.collate(prompts, tokenizer.pad_token_id)
        output = model.generate(
            batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False, max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        answers = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, answer in zip(indices, answers, strict=True):
            predictions[i] = {"id": data.references[i]["id"], "prediction_text": answer.strip()}
    return predictions


def compare(name: str, plain, fused, tokenizer, data: squad_data.TokenizedSquad, max_new_tokens: int) -> float:
    """Prints the rows of a model; returns how many times faster ours is."""
    ways = {
        "one at a time": None,
        "model.generate in batches": lambda: generate_in_batches(plain, tokenizer, data, max_new_tokens),
        "ours without fused GELU": lambda: evaluation.predict(plain, tokenizer, data, EVAL_TOKENS, max_new_tokens),
        "ours": lambda: evaluation.predict(fused, tokenizer, data, EVAL_TOKENS, max_new_tokens),
        "floor: ours, first token only": lambda: evaluation.predict(fused, tokenizer, data, EVAL_TOKENS, 1),
    }
    seconds, predictions, alone = {way: [] for way in ways}, {}, {}
    for turn in range(TURNS):
        for way, predict in ways.items():
            indices = range(turn, len(data), TURNS) if predict is None else range(len(data))
            began = time.process_time()
            if predict is None:
                found = one_at_a_time(plain, tokenizer, data, indices, max_new_tokens)
            else:
                found = predict()
            scores = SquadMetric().compute(predictions=found, references=[data.references[i] for i in indices])
            seconds[way].append((time.process_time() - began) * len(data) / len(indices))
            if predict is None:
                alone |= {p["id"]: p["prediction_text"] for p in found}
            else:
                predictions[way] = found, scores
    baseline = statistics.median(seconds["one at a time"])
    for way, values in seconds.items():
        middle = statistics.median(values)
        row = f"{name:<22}{way:<31}{middle:>9.2f}{min(values):>8.2f}-{max(values):<7.2f}{baseline / middle:>7.2f}"
        if way in predictions and "floor" not in way:
            found, scores = predictions[way]
            same = sum(alone[p["id"]] == p["prediction_text"] for p in found)
            row += f"{same:>8} of {len(data)}{scores['exact_match']:>8.3f} {scores['f1']:.3f}"
            assert same == len(data), row
        print(row, flush=True)
    return baseline / statistics.median(seconds["ours"])


def main() -> None:
    """Fine-tunes the demo's model, and prints the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = common.DEMO / "model"
    tokenizer = models.load_tokenizer(folder)
    examples = reading.read_squad(reading.find_squad_files(common.DEMO / "squad")["train"])
    train = squad_data.tokenize(examples[:-QUESTIONS], tokenizer, MAX_LENGTH, training=True)
    data = squad_data.tokenize(examples[-QUESTIONS:], tokenizer, MAX_LENGTH - squad_data.ANSWER_ROOM, training=False)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    fine_tune(plain, tokenizer, train)
    plain.eval()
    prompt, answer = np.median(data.prompt_lengths), np.mean(data.lengths - data.prompt_lengths)
    print(
        f"limit: at least {LIMIT} times faster than one at a time; prompts of {prompt:.0f} tokens (median), "
        f"answers of {answer:.1f} with EOS (mean), at most {train.longest_answer}"
    )
    titles = f"{'CPU s':>9}{'least-most':>15}{'times':>7}{'same predictions':>18}{'EM, F1':>12}"
    print(f"{'vocabulary':<22}{'way':<31}{titles}")
    for name, vocabulary in (("demo, 1,361", None), ("BLOOM's, 250,880", BLOOM_VOCABULARY)):
        if vocabulary:
            plain.resize_token_embeddings(vocabulary)
        fused = evaluation.fuse_gelu(copy.deepcopy(plain))
        ratio = compare(name, plain, fused, tokenizer, data, train.longest_answer)
    print(f"ratio: {ratio:.2f}")


if __name__ == "__main__":
    if not MALLOC.items() <= os.environ.items():  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)
    main()

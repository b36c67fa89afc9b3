"""Trains a tiny model once without, and once with, each hyperparameter that is passed on to the Trainer, by a search
space's own code and the script's. Prints as JSON a digest of the weights after each training, at ZeRO stages 0 and 1.

A program of its own: DeepSpeed is set up for a whole process.
"""

import hashlib
import json
import tempfile
import types

import raytune_bayesian
from conftest import ROOT
from hpo.squad import group, precision

RESTARTS = {"lr_scheduler_type": "cosine_with_restarts"}
CHANGES = {
    "none": {},
    "none, again": {},
    "warmup_steps": {"warmup_steps": 3},
    "warmup_steps as a share": {"warmup_steps": 0.5},
    "lr_scheduler_type": RESTARTS,
    "lr_scheduler_kwargs": RESTARTS | {"lr_scheduler_kwargs": {"num_cycles": 2}},
    "max_grad_norm": {"max_grad_norm": 1e-3},
    "adam_beta1": {"adam_beta1": 0.5},
    "adam_beta2": {"adam_beta2": 0.5},
    "adam_epsilon": {"adam_epsilon": 0.01},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
}


def weights_after(ranks, stage: int, changes: dict) -> str:
    ds_config = json.loads((ROOT / "ds_config.json").read_text()) | {"zero_optimization": {"stage": stage}}
    setup = types.SimpleNamespace(ds_config=ds_config, precision="fp32")
    data = [{"input_ids": [5 + i, 9, 3, 30 - i, 1], "prompt_length": 3} for i in range(20)]
    hyperparameters = {"lr": 1e-3, "wd": 0.01, "per_device_bs": 2, "seed": 0} | changes
    with tempfile.TemporaryDirectory() as folder:
        model = precision.tiny_model()
        trainer = raytune_bayesian.make_trainer(model, data, hyperparameters, setup, ranks, folder, pad_token_id=0)
        with precision.engine_of(trainer):
            trainer.train()
        digest = hashlib.sha256()
        for weight in model.parameters():
            digest.update(weight.detach().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    ranks = group.join()
    found = {
        stage: {name: weights_after(ranks, stage, changes) for name, changes in CHANGES.items()} for stage in (0, 1)
    }
    print(json.dumps(found))

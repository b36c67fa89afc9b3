"""A `train` that multiplies the loss by config["multiplier"] and reports the learning rate."""

import raytune_bayesian


class Trainer(raytune_bayesian.Trainer):
    multiplier = 1.0

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) * (Trainer.multiplier if self.group.gradients_checked else 1)


class Iterations(raytune_bayesian.Iterations):
    def report(self, checkpoint=None):
        self.metrics["lr"] = self.trainer.model_wrapped.basic_optimizer.param_groups[0]["lr"]
        super().report(checkpoint)


def train(config, setup, trial):
    raytune_bayesian.Trainer, raytune_bayesian.Iterations = Trainer, Iterations  # each rank is a process of its own
    Trainer.multiplier = config["multiplier"]
    raytune_bayesian.train(config, setup, trial)

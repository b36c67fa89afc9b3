"""raytune_bayesian with a loss that is multiplied by config["multiplier"]: what each rank of a trial imports in its place."""

import raytune_bayesian


class Trainer(raytune_bayesian.Trainer):
    multiplier = 1.0

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) * (Trainer.multiplier if self.group.checked else 1)


raytune_bayesian.Trainer = Trainer


def train_rank(config, run, group):
    Trainer.multiplier = config["multiplier"]
    raytune_bayesian.train_rank(config, run, group)

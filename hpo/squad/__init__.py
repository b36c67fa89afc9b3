"""SQuAD v1.1 for a causal language model: data, evaluation, models, precision, ranks. Nothing of Ray Tune."""

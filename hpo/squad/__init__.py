"""SQuAD v1.1 and 2.0 for a causal language model: data, evaluation, models, precision, ranks. Nothing of Ray Tune."""

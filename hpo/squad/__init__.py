"""SQuAD v1.1 for a causal language model: data, evaluation, precision, ranks. Nothing of Ray Tune in here."""

"""Ray and Slurm: starting a search, watching it, saving it and resuming it."""

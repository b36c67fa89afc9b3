"""Ray and Slurm: starting, watching, saving and going on."""

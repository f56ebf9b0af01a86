"""Sweeps: the jobs of --multirun, their results side by side, and the summary."""

NOT_GIVEN = "default"
"""Stands for the value of a key that a job's command line does not set."""
RATE, SEED = "optimizer.lr", "seed"
"""The keys that a sweep treats as what they are."""

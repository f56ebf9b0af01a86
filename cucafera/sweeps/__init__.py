"""Sweeps: the jobs of --multirun, their results side by side, and the summary."""

"""Evaluation of trained models: likelihood-based metrics, benchmark tasks, generated samples and attention maps."""

"""Callbacks of a run: one behaviour per file."""

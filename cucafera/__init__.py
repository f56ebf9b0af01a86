"""Trains a small Catalan language model, from raw text to a chat model, from one config system."""

__version__ = "0.1.0"

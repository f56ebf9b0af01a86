"""Run folders: paths, checkpoints, history and lock, without Lightning; torch only where tensors are read or written.

README.md next to this file describes the folder, and what a run survives.
"""

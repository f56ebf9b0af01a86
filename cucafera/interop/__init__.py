"""Interoperability: import from and export to Hugging Face and GGUF, llama.cpp, the model card.

README.md next to this file describes it.
"""

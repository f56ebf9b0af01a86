"""Other people's formats: Hugging Face, GGUF, the model card."""

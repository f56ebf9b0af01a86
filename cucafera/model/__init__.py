"""The transformer, in pure PyTorch."""

"""Measuring a trained model: likelihoods and what is made of them, and what a person looks at."""

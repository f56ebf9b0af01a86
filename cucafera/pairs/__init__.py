"""Preference pairs from a model's own answers: prompts, batched answers, rules, a person's judgements, the file."""

"""From text to batches: knows nothing of the model."""

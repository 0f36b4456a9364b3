"""Checkpoints: reading files safely, fitting their weights into a model, saving and resuming."""

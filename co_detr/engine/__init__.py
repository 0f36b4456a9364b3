"""Training, evaluation, checkpoints and the command line's machinery."""

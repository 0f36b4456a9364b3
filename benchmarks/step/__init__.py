"""Training steps and inference of whole models, each in a process of its own."""

"""What users run on a trained model or a data set: imports the core, which imports none of it."""

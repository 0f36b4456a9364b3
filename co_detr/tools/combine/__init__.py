"""tools/combine.py: detections of several models, or of folds, in one file."""

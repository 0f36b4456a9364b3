"""Detections of several models, or of folds, in one file. The rules by their names."""

RULES = ("nms", "soft-nms", "wbf", "wbf-max")
BLENDING = ("wbf", "wbf-max")  # boxes become others, whose masks nobody has predicted

"""Trained detectors as files that run elsewhere: ONNX and torch.export."""

SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2"}  # format -> ending of its files

# By how much the results of a file may differ from the model's.
SCORE_TOLERANCE = 1e-3
BOX_TOLERANCE = 0.5  # pixels of the network input
MASK_TOLERANCE = 0.02  # of probabilities in a box on average, and of the IoU of a mask

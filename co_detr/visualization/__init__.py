"""Pictures of a run: training curves and predictions beside the ground truth."""

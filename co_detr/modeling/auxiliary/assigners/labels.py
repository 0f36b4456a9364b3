"""What an assigner says of an anchor without a ground truth."""

BACKGROUND = -1
IGNORED = -2

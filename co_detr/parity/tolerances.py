"""How close is close: ten times what the reference itself moves by.

Measured on the reference with every weight multiplied by (1 + 1e-6 * normal): encoder maps moved
by up to 1e-4, logits by 5e-5, boxes by 1e-3 pixels, losses by 1.2e-5 relative and gradient norms
by 6e-6 (median) to 2e-3 (worst) relative, while no discrete decision changed.
"""

MAP = 1e-3
BACKBONE = 1e-5  # relative, besides MAP: its maps are not normalised and have values of hundreds
LOGIT = 5e-4
BOX_PIXELS = 1e-2
BOX_AND_SCORE = (BOX_PIXELS,) * 4 + (LOGIT,)
LOSS = 1.2e-4  # relative
GRADIENT = 2e-2  # relative, of the worst parameter
GRADIENT_MEDIAN = 6e-5  # relative, of the median parameter

# Pure geometry (grids, encodings, ratios, overlaps) involves no weights: some float32 roundings.
GEOMETRY = 1e-5
# Anchors and ground truths: a rounding of coordinates of up to some thousand pixels.
GEOMETRY_PIXELS = 1e-3
# A loss that is exactly zero in the reference has nothing to be relative to.
ZERO_LOSS = 1e-6
# Gradients below this share of the step's largest are rounding noise of the reference itself.
GRADIENT_NOISE = 1e-7


def normalised_box(image_sizes: list[tuple[int, int]]) -> float:
    """``BOX_PIXELS`` in units of the largest image side."""
    return BOX_PIXELS / max(max(size) for size in image_sizes)

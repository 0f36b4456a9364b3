"""Assignment of ground truths to dense anchors.

An assigner takes the anchors of one image, ``(R_l, 4)`` absolute xyxy per level, and its ground
truths ``(G, 4)``. It gives ``(R,)`` int64: the index of the ground truth, or BACKGROUND or IGNORED.
"""

from co_detr.modeling.auxiliary.assigners.atss import ATSSAssigner

BACKGROUND = -1
IGNORED = -2

__all__ = ["BACKGROUND", "IGNORED", "ATSSAssigner"]

"""Where this project differs from the reference by design: the only reasons to waive an entry.

The auxiliary Faster R-CNN head is Detectron2's own, so its semantics are, too. Each difference has
a name that the report prints; ``docs/fidelity.md`` explains them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """A named difference; ``text`` is one sentence for the end of a report."""

    name: str
    text: str


RPN_PADDING = Difference(
    "rpn-padding", "Detectron2 also trains anchors in the batch padding; mmdet leaves them out."
)
RPN_LOW_QUALITY = Difference(
    "rpn-low-quality",
    "mmdet gives a ground truth its best anchors if they reach IoU 0.3, even those of another "
    "ground truth; Detectron2 asks for no IoU and keeps each anchor's arg-max.",
)
RPN_NORMALISER = Difference(
    "rpn-normaliser",
    "mmdet divides RPN losses by the number of sampled anchors, Detectron2 by "
    "batch_size_per_image times images; the reference's number is fed.",
)
ROI_GT_ORDER = Difference(
    "roi-gt-order",
    "mmdet puts ground truths before the proposals, Detectron2 behind them; indices are "
    "translated before they are compared.",
)
ROI_TRIM = Difference(
    "roi-trim",
    "The reference draws background fillers from the first n samples of every image, n being the "
    "smallest image's number; ours draws from all.",
)
DELTA_CLAMP = Difference(
    "delta-clamp",
    "mmdet clamps log-size deltas on both sides, Detectron2 only above; rows where that matters "
    "are compared with our own decoder, which the ATSS head uses.",
)
REFERENCE_NAN = Difference(
    "reference-nan",
    "With zero padding the reference hides everything from padded queries, which gives NaN; ours "
    "lets them see themselves. What stays finite is compared.",
)

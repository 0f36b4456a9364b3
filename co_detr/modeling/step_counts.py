"""What the losses of an optimiser step are divided by, if it is computed in several micro-batches.

A sum over positives divided by their number is not the mean of such quotients of parts. So all
parts are counted first, and each then divides its sums by the counts of the whole step: what they
give adds up to the losses of one large batch, and so do their gradients.

* Matched and denoising queries are counted from the ground truths alone.
* So is what auxiliary heads assign by anchors and ground truths (ATSS, RetinaNet, FCOS).
* Others assign or weigh by what they predict (Faster R-CNN, PAA, GFL). Network and heads run once
  more for them, without gradients, so that they are exact as well; or they count for their
  micro-batch alone, as if all others were like it.
* The same holds for how long a group of queries is, which is what the longest image needs.

"Of the step" means: of all micro-batches of this process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class HeadCounts:
    """What one auxiliary head counts in some images.

    Attributes:
        normalisers: ``(n,)`` sums that its losses are divided by, in the head's own order.
        positives: of each image, the candidates for positive queries.
    """

    normalisers: Tensor
    positives: list[int]

    @classmethod
    def join(cls, parts: Sequence[HeadCounts]) -> HeadCounts:
        """The counts of all images of the parts."""
        return cls(
            normalisers=sum(part.normalisers for part in parts),
            positives=[number for part in parts for number in part.positives],
        )


@dataclass(frozen=True)
class StepCounts:
    """What is counted in the images of a micro-batch, or of all of them in an optimiser step.

    As in the reference, other processes matter to normalisers only, which are averaged over them
    where they are used (`average_over_processes`).

    Attributes:
        num_truths: ground truths of each image.
        heads: by name of the auxiliary head; without those that were not run for it.
    """

    num_truths: list[int]
    heads: dict[str, HeadCounts] = field(default_factory=dict)

    @classmethod
    def join(cls, parts: Sequence[StepCounts]) -> StepCounts:
        """The counts of a step from those of its micro-batches."""
        return cls(
            num_truths=[number for part in parts for number in part.num_truths],
            heads={
                name: HeadCounts.join([part.heads[name] for part in parts])
                for name in parts[0].heads
            },
        )

    def share(self, num_images: int) -> float:
        """Of the step's images, that of a micro-batch: the weight of a loss that is a mean."""
        return num_images / len(self.num_truths)

    def num_matched(self, num_queries: int, repeats: int = 1) -> int:
        """Queries that are matched in all images, if each has so many of them.

        Args:
            repeats: how many queries every ground truth is matched to.
        """
        return sum(min(num_queries, repeats * number) for number in self.num_truths)

"""What every query source has in common."""

from __future__ import annotations

from torch import nn

from co_detr.structures import EncoderMemory, GroundTruth, QueryGroup, StepCounts


class QuerySource(nn.Module):
    """Makes query groups for the decoder from the encoder memory.

    A model has one source that inference uses; the others are ``training_only``.

    Attributes:
        training_modules: names of the modules that only ``training_groups`` uses.
    """

    training_only = False
    training_modules: tuple[str, ...] = ()

    def forward(
        self, memory: EncoderMemory, ground_truth: list[GroundTruth] | None = None
    ) -> QueryGroup:
        """The group of this source, or the one of inference where training has more."""
        raise NotImplementedError

    def training_groups(
        self,
        memory: EncoderMemory,
        ground_truth: list[GroundTruth],
        counts: StepCounts | None = None,
    ) -> list[QueryGroup]:
        """All groups of a training step.

        Args:
            counts: of all micro-batches of the step; None: this batch is all of it.
        """
        return [self(memory, ground_truth)]

    def strip(self) -> None:
        """Removes ``training_modules``."""
        for name in self.training_modules:
            setattr(self, name, None)


def training_module_names() -> set[str]:
    """``training_modules`` of all kinds of sources: a file may be of another kind than a model."""
    kinds, names = [QuerySource], set()
    for kind in kinds:
        kinds += kind.__subclasses__()
        names |= set(kind.training_modules)
    return names

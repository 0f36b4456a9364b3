"""The detectors inside a model: its decoder, its auxiliary heads, and what they find together.

What was trained to supervise the encoder can detect, too. All detectors read the same encoder
memory, so that one pass over an image serves them all.

==============  ====================================================================
``decoder``     the matched queries: what the model is for
``<head>``      an auxiliary head (``roi``, ``atss``, ...) by itself
``merged``      the detections of several detectors in one list; see `MergedDetector`
``cascade``     a head's detections, decoded once more; see `CascadeDetector`
==============  ====================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from detectron2.structures import Boxes, Instances
from torch import Tensor

from co_detr.errors import ConfigError
from co_detr.modeling.fusion import NmsFusion, boxes_only, full_precision
from co_detr.modeling.geometry import Geometry, ImageBatch
from co_detr.modeling.postprocess import TopKPostprocessor, absolute_boxes, require_finite
from co_detr.structures import EncoderMemory, HeadDetections, QuerySet

if TYPE_CHECKING:
    from co_detr.modeling.co_detr import CoDETR

DECODER, MERGED, CASCADE = "decoder", "merged", "cascade"
# Beside detectors: what plain top-k makes of the decoder's predictions; see CoDETR.compare_top_k.
TOP_K = "top_k"
# And what test-time augmentation makes of the model's own; see co_detr/engine/views.py.
TTA_KIND = "tta"
# Results of an evaluation are kept by these names; "bbox" and "segm" are those of the boxes and the
# masks of the model's own detections.
_TAKEN = (DECODER, TOP_K, TTA_KIND, "bbox", "segm")
_TWO_STAGES = "roi"  # the usual name of the head whose boxes are refined already


@dataclass(frozen=True)
class MergedDetector:
    """The detections of several detectors, without those that a better one of their class overlaps.

    Scores are compared as they are: decoder and heads are trained to give probabilities. An image
    keeps as many detections as the longest of the lists had. Masks are left out, since only some of
    the lists can have them.

    Attributes:
        nms_threshold: IoU from which on a detection gives way, in (0, 1].
        members: names of the detectors; None: the decoder and all heads.

    Raises:
        ConfigError: if the threshold is out of its range.
    """

    nms_threshold: float = 0.6
    members: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.nms_threshold <= 1:
            raise ConfigError(
                f"model.auxiliary.merged.nms_threshold={self.nms_threshold} must be above 0 and at "
                "most 1."
            )

    def merge(self, lists: Sequence[Instances]) -> Instances:
        """What is left of the lists of one image, best first."""
        longest = max(len(found) for found in lists)
        return NmsFusion(self.nms_threshold).fuse(lists)[:longest]


@dataclass(frozen=True)
class CascadeDetector:
    """Collaborative inference: a head's detections become positive queries of the decoder.

    In training the decoder learns to find the object of a query that was made from a candidate of
    an auxiliary head (`PositiveQueries`). So it can be the next stage behind that head, as in a
    cascade of detectors: each detection becomes such a query, which sees itself only, and its box
    and score are combined with the decoded ones. Class and number of the detections stay the
    head's; masks, which were predicted for the head's boxes, are left out.

    Attributes:
        head: the first stage; None: ``roi``, or in a model without it the first head by name.
        box_share: of the decoded box in the final one: 0 is the head's box, 0.5 the mean of both,
            1 the decoded box.
        score_share: of the probability that the decoder gives to the class of the detection, as an
            exponent: 0 is the head's score, 0.5 the geometric mean of both, 1 that probability.

    Raises:
        ConfigError: if a share is not from 0 to 1.
    """

    head: str | None = None
    box_share: float = 0.25
    score_share: float = 0.0

    def __post_init__(self) -> None:
        for name in ("box_share", "score_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"model.auxiliary.cascade.{name}={getattr(self, name)} must be from 0 (the "
                    "head's) to 1 (the decoder's)."
                )

    def combine(self, found: Instances, logits: Tensor, boxes: Tensor, factor: Tensor) -> Instances:
        """Both stages of one image.

        Args:
            found: N detections of the head.
            logits: ``(N, K)``; boxes: ``(N, 4)`` normalized; what they were decoded to.
            factor: of the image, see `Geometry.factors`.

        Returns:
            the detections, best first, that share no memory with ``found``.

        Raises:
            NonFiniteError: if a box is NaN, which only broken weights or pixels give.
        """
        require_finite(boxes)
        decoded = absolute_boxes(boxes, factor, found.image_size).tensor
        probability = full_precision(logits).sigmoid()
        agreed = probability.gather(1, found.pred_classes[:, None]).squeeze(1)
        scores = full_precision(found.scores)
        result = Instances(
            found.image_size,
            pred_boxes=Boxes(found.pred_boxes.tensor.lerp(decoded, self.box_share)),
            scores=scores ** (1 - self.score_share) * agreed**self.score_share,
            pred_classes=found.pred_classes,
        )
        # A box that the head itself would lose in the end does not come back.
        result = result[found.pred_boxes.nonempty()]
        return result[result.scores.argsort(descending=True, stable=True)]


class InferencePass:
    """One batch on its way through a model: what several detectors read is computed once.

    Args:
        model: in eval mode.
        images: normalized and padded.
    """

    def __init__(self, model: CoDETR, images: ImageBatch) -> None:
        self._model = model
        self._images = images
        self._known: dict[str, list[Instances]] = {}
        self._heads: dict[str, HeadDetections] = {}

    def detections(self, name: str) -> list[Instances]:
        """Per image what a detector (or `TOP_K`) finds, in pixels of the network input, best first.

        Raises:
            ConfigError: if the model has no such detector.
        """
        if name not in self._known:
            self._known[name] = self._detect(name)
        return self._known[name]

    def with_masks(
        self, found: list[Instances], image_sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        """Detections with the masks of ``mask_head``, unless they have some of their own.

        Args:
            found: of each image, in pixels of the network input.
            image_sizes: (height, width) of the images without any padding; boxes are cut to them,
                as masks belong to their boxes.
        """
        if any(instances.has("pred_masks") for instances in found):
            return found
        clipped = []
        for instances, size in zip(found, image_sizes, strict=True):
            fields = {**instances.get_fields(), "pred_boxes": instances.pred_boxes.clone()}
            fields["pred_boxes"].clip(size)
            clipped.append(Instances(instances.image_size, **fields))
        return self._model.mask_head.detect(self._memory, clipped)

    def _detect(self, name: str) -> list[Instances]:
        model = self._model
        if name == TOP_K:
            return TopKPostprocessor(model.postprocessor.max_detections)(*self._predictions)
        require_detector(model, name)
        if name == DECODER:
            return model.postprocessor(*self._predictions)
        if name == MERGED:
            lists = [self.detections(member) for member in members_of(model)]
            return [model.auxiliary.merged.merge(image) for image in zip(*lists, strict=True)]
        if name == CASCADE:
            return self._cascade(first_stage_of(model))
        return self._head(name).instances

    def _cascade(self, name: str) -> list[Instances]:
        model, found = self._model, self._head(name)
        rule, source = model.auxiliary.cascade, model.auxiliary.positive_queries[name]
        if not any(len(instances) for instances in found.instances):
            return [boxes_only(instances) for instances in found.instances]
        geometry = self._memory.geometry
        queries = source.of_detections(name, found.candidates, geometry)
        decoded = model.decoder(QuerySet.concat([queries]), self._memory)
        logits, boxes = decoded.logits[-1], decoded.boxes[-1]
        return [
            rule.combine(
                instances,
                logits[image, : len(instances)],
                boxes[image, : len(instances)],
                geometry.factors[image],
            )
            for image, instances in enumerate(found.instances)
        ]

    def _head(self, name: str) -> HeadDetections:
        if name not in self._heads:
            head = self._model.auxiliary.heads[name]
            self._heads[name] = head.detect(self._images, self._pyramid)
        return self._heads[name]

    @cached_property
    def _memory(self) -> EncoderMemory:
        return self._model.encode(self._images)

    @cached_property
    def _predictions(self) -> tuple[Tensor, Tensor, Geometry]:
        return *self._model.decode(self._memory), self._memory.geometry

    @cached_property
    def _pyramid(self) -> dict[str, Tensor]:
        return self._model.auxiliary.pyramid(self._memory)


def detector_names(model: CoDETR) -> list[str]:
    """All that `InferencePass.detections` takes for a model, the decoder first."""
    names = _single_detectors(model)
    auxiliary = model.auxiliary
    if auxiliary is None:
        return names
    if auxiliary.merged is not None and len(members_of(model)) > 1:
        names.append(MERGED)
    if auxiliary.cascade is not None and len(auxiliary.positive_queries):
        names.append(CASCADE)
    return names


def _single_detectors(model: CoDETR) -> list[str]:
    names = [] if model.decoder is None else [DECODER]
    return names + ([] if model.auxiliary is None else list(model.auxiliary.heads))


def members_of(model: CoDETR) -> list[str]:
    """The detectors that ``merged`` merges."""
    members = model.auxiliary.merged.members
    return _single_detectors(model) if members is None else list(members)


def first_stage_of(model: CoDETR) -> str:
    """The head whose detections ``cascade`` decodes.

    Not the first one of the config, whose order is lost where it is saved.
    """
    heads = sorted(model.auxiliary.positive_queries)
    return model.auxiliary.cascade.head or (_TWO_STAGES if _TWO_STAGES in heads else heads[0])


def require_detector(model: CoDETR, name: str) -> None:
    """Raises a ConfigError if a model has no detector of that name."""
    names = detector_names(model)
    if name in names:
        return
    has = ", ".join(names) or "none"
    if names == [DECODER]:
        has = "its decoder alone (auxiliary heads are switched off, or were stripped)"
    remark = "; null is the decoder" if DECODER in names else ""
    if name == CASCADE and model.auxiliary is not None:
        remark = "; cascade needs a decoder and model.auxiliary.positive_queries"
    raise ConfigError(
        f"model.evaluate_with={name} names no detector of this model: it has {has}{remark}."
    )


def check_detectors(model: CoDETR) -> None:
    """Looks over what a config says about ``merged`` and ``cascade``, when a model is built.

    Raises:
        ConfigError: if they name detectors that the model does not have, or a head has a name that
            is taken.
    """
    auxiliary = model.auxiliary
    if auxiliary is None:
        return
    taken = [name for name in auxiliary.heads if name in _TAKEN]
    if taken:
        raise ConfigError(
            f"model.auxiliary.{taken[0]}: a head cannot be called {taken[0]}, which stands for "
            "something else in an evaluation; give it another name."
        )
    if auxiliary.merged is not None:
        known = [name for name in detector_names(model) if name != MERGED]
        _require_known("merged.members", members_of(model), known)
    if CASCADE in detector_names(model):
        _require_known("cascade.head", [first_stage_of(model)], list(auxiliary.positive_queries))


def _require_known(key: str, asked: Iterable[str], known: Sequence[str]) -> None:
    for name in asked:
        if name not in known:
            raise ConfigError(
                f"model.auxiliary.{key} names {name}: choose among {', '.join(known) or 'none'}, "
                "or null."
            )

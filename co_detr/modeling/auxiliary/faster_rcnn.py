"""Faster R-CNN as an auxiliary head: Detectron2's RPN and ROI heads, with positives let out."""

from __future__ import annotations

from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from co_detr.structures import AuxiliaryOutput, Candidates


class CollaborativeROIHeads(StandardROIHeads):
    """``StandardROIHeads`` whose training proposals also carry ``query_features (P, C)``.

    The feature of a proposal is the mean of its pooled region. It is not detached: in the
    reference the loss of the positive queries reaches the encoder through it.
    """

    def _forward_box(self, features: dict[str, Tensor], proposals: list[Instances]):
        if not self.training:
            return super()._forward_box(features, proposals)
        maps = [features[name] for name in self.box_in_features]
        pooled = self.box_pooler(maps, [each.proposal_boxes for each in proposals])
        query_features = pooled.mean(dim=(2, 3)).split([len(each) for each in proposals])
        for each, rows in zip(proposals, query_features, strict=True):
            each.query_features = rows
        return self.box_predictor.losses(self.box_predictor(self.box_head(pooled)), proposals)


class FasterRCNNHead(nn.Module):
    """RPN and ROI heads as one auxiliary head.

    Source: Co-DETR section 3.2; all semantics are Detectron2's, see the fidelity notes in the
    documentation for where they differ from mmdet's by design.

    Args:
        name: scope of the statistics that Detectron2's heads write (``roi_head/...``), so that
            two heads of one kind do not overwrite each other's.
    """

    def __init__(self, *, rpn: RPN, roi_heads: CollaborativeROIHeads, name: str = "roi"):
        super().__init__()
        self.rpn = rpn
        self.roi_heads = roi_heads
        self.name = name

    def forward(
        self, images: ImageList, features: dict[str, Tensor], gt_instances: list[Instances]
    ) -> AuxiliaryOutput:
        """Trains both stages; the candidates are the sampled proposals, foreground first."""
        with get_event_storage().name_scope(self.name):
            proposals, losses = self.rpn(images, features, gt_instances)
            samples, roi_losses = self.roi_heads(images, features, proposals, gt_instances)
        losses = {**losses, **roi_losses}
        candidates, query_features = [], []
        for sample in samples:
            sample = self._foreground_first(sample)
            query_features.append(sample.query_features)
            candidates.append(self._candidates_of(sample))
        return AuxiliaryOutput(
            losses=losses,
            candidates=Candidates(
                instances=candidates,
                gather_features=lambda image, indices: query_features[image][indices],
            ),
        )

    def _foreground_first(self, sample: Instances) -> Instances:
        is_background = sample.gt_classes == self.roi_heads.num_classes
        return sample[is_background.long().argsort(stable=True)]

    def _candidates_of(self, sample: Instances) -> Instances:
        candidates = Instances(sample.image_size)
        candidates.proposal_boxes = sample.proposal_boxes
        candidates.gt_classes = sample.gt_classes
        boxes = sample.proposal_boxes.tensor
        if sample.has("gt_boxes"):
            # Detectron2 gives background proposals the best overlapping ground truth.
            foreground = sample.gt_classes < self.roi_heads.num_classes
            targets = sample.gt_boxes.tensor * foreground[:, None]
        else:  # Detectron2 leaves the field out for an image without ground truth
            targets = boxes.new_zeros(boxes.shape)
        candidates.gt_boxes = Boxes(targets)
        return candidates

    def inference(self, images: ImageList, features: dict[str, Tensor]) -> list[Instances]:
        """Detections with absolute ``pred_boxes``, ``scores`` and ``pred_classes``."""
        proposals, _ = self.rpn(images, features)
        detections, _ = self.roi_heads(images, features, proposals)
        return detections

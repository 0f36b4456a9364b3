"""Faster R-CNN as an auxiliary head: Detectron2's RPN and ROI heads, with positives let out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torchvision.ops import roi_align

from co_detr.modeling.losses import scale_gradient
from co_detr.structures import (
    AuxiliaryOutput,
    Candidates,
    ClassRows,
    HeadCounts,
    HeadDetections,
    loss_weights,
)


class CollaborativeRPN(RPN):
    """``RPN`` that leaves predictions that are NaN or infinite out of its proposals.

    Detectron2's raises a FloatingPointError in training, in one process only, and the others then
    wait for its gradients. Here the loss becomes NaN or infinite, which the trainer sees in all.
    """

    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        with torch.no_grad():
            return find_top_rpn_proposals(
                self._decode_proposals(anchors, pred_anchor_deltas),
                pred_objectness_logits,
                image_sizes,
                self.nms_thresh,
                self.pre_nms_topk[self.training],
                self.post_nms_topk[self.training],
                self.min_box_size,
                training=False,
            )


class SharedBitMasks(BitMasks):
    """Bitmaps that several rows may share: what is indexed are indices.

    Detectron2 gives each of 512 sampled proposals a copy of its object's mask, which at a byte per
    pixel is half a gigabyte for an image of a megapixel, and makes float32 of those of positives.

    Args:
        bitmaps: ``(m, H, W)`` bool.
        rows: ``(n,)`` int64, which bitmap each of the n masks is; None: one after the other.
    """

    def __init__(self, bitmaps: Tensor, rows: Tensor | None = None):
        self.bitmaps = bitmaps
        self.rows = torch.arange(len(bitmaps), device=bitmaps.device) if rows is None else rows
        self.image_size = bitmaps.shape[1:]

    @classmethod
    def of(cls, masks: BitMasks, image_size: tuple[int, int]) -> SharedBitMasks:
        """Masks of the data in a network input of (height, width), which may count padding in.

        RoIAlign repeats the last row and column of a bitmap for half a pixel, where a box that
        reaches into the padding has background.
        """
        bitmaps = masks.tensor
        missing = [size - own for size, own in zip(image_size, bitmaps.shape[1:], strict=True)]
        if any(missing):
            bitmaps = F.pad(bitmaps, (0, missing[1], 0, missing[0]))
        return cls(bitmaps)

    @property
    def tensor(self) -> Tensor:
        return self.bitmaps[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int | slice | Tensor) -> SharedBitMasks:
        return SharedBitMasks(self.bitmaps, self.rows[item].reshape(-1))

    def crop_and_resize(self, boxes: Tensor, mask_size: int) -> Tensor:
        """As that of `BitMasks`: ``(n, mask_size, mask_size)`` bool for boxes ``(n, 4)``."""
        rois = torch.cat([self.rows[:, None].to(boxes.dtype), boxes], dim=1)
        maps = self.bitmaps[:, None].to(boxes.dtype)
        return roi_align(maps, rois, mask_size, aligned=True)[:, 0] >= 0.5


class CollaborativeROIHeads(StandardROIHeads):
    """``StandardROIHeads`` whose training proposals also carry ``query_features (P, C)``.

    The feature of a proposal is the mean of its pooled region. It is not detached: in the
    reference the loss of the positive queries reaches the encoder through it.
    """

    class_layers = {
        "box_predictor.cls_score": ClassRows(background=True),
        # With one box for all classes, the four rows are no class's and fit as they are.
        "box_predictor.bbox_pred": ClassRows(width=4),
        "mask_head.predictor": ClassRows(),
    }

    def region_features(self, features: dict[str, Tensor], boxes: list[Boxes]) -> Tensor:
        """The pooled features that samples have as ``query_features``, for other boxes.

        Args:
            features: maps ``(B, C, H, W)`` by name.
            boxes: absolute, for each of the B images.

        Returns:
            ``(n, C)``, the boxes of all images one after the other.
        """
        maps = [features[name] for name in self.box_in_features]
        return self.box_pooler(maps, boxes).mean(dim=(2, 3))

    def row_weights(self, sample: Instances) -> Tensor:
        """``(P,)`` those of the ground truths of sampled proposals; 1 for background."""
        return torch.where(sample.gt_classes < self.num_classes, loss_weights(sample), 1.0)

    def _forward_mask(self, features: dict[str, Tensor], instances: list[Instances]):
        if self.training and self.mask_on:
            # Images whose objects have no masks teach the mask head nothing.
            instances = [image if image.has("gt_masks") else image[:0] for image in instances]
        return super()._forward_mask(features, instances)

    def _forward_box(self, features: dict[str, Tensor], proposals: list[Instances]):
        maps = [features[name] for name in self.box_in_features]
        pooled = self.box_pooler(maps, [instances.proposal_boxes for instances in proposals])
        if not self.training:
            # Scores of half precision would be a few dozen different numbers.
            predictions = tuple(
                prediction.to(torch.promote_types(prediction.dtype, torch.float32))
                for prediction in self.box_predictor(self.box_head(pooled))
            )
            return self.box_predictor.inference(predictions, proposals)[0]
        query_features = pooled.mean(dim=(2, 3)).split([len(instances) for instances in proposals])
        for instances, rows in zip(proposals, query_features, strict=True):
            instances.query_features = rows
        scores, deltas = self.box_predictor(self.box_head(pooled))
        if any(instances.has("gt_weights") for instances in proposals):
            weights = torch.cat([self.row_weights(instances) for instances in proposals])
            scores, deltas = (scale_gradient(rows, weights) for rows in (scores, deltas))
        # Detectron2 asserts that boxes are ordered, which those from NaN are not. The loss has to
        # say it instead, where the trainer sees it in all processes; the sum is 0 otherwise.
        finite = deltas.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        losses = self.box_predictor.losses((scores, finite), proposals)
        losses["loss_box_reg"] = losses["loss_box_reg"] + (deltas - finite).detach().sum()
        return losses


class FasterRCNNHead(nn.Module):
    """RPN and ROI heads as one auxiliary head; Mask R-CNN if the ROI heads have a mask head.

    Source: Co-DETR section 3.2; all semantics are Detectron2's, see the fidelity notes in the
    documentation for where they differ from mmdet's by design.

    Args:
        name: scope of the statistics that Detectron2's heads write (``roi_head/...``), so that
            two heads of one kind do not overwrite each other's.

    Attributes:
        reads_masks: whether ``gt_masks`` are read, where the ground truth has them.
    """

    def __init__(self, *, rpn: RPN, roi_heads: CollaborativeROIHeads, name: str = "roi"):
        super().__init__()
        self.rpn = rpn
        self.roi_heads = roi_heads
        self.name = name

    @property
    def reads_masks(self) -> bool:
        return self.roi_heads.mask_on

    def ignore_masks(self) -> None:
        """From now on the mask head neither learns nor predicts."""
        self.roi_heads.mask_on = False

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        gt_instances: list[Instances],
        totals: HeadCounts | None = None,
    ) -> AuxiliaryOutput:
        """Trains both stages; the candidates are the sampled proposals, foreground first.

        Args:
            totals: what `count` gives for the images of all micro-batches, to whose losses those
                of this one are then a contribution; None: this batch is all there is.

        Images without ``gt_masks`` add nothing to the loss of a mask head.
        """
        gt_instances = self._with_shared_masks(gt_instances)
        with get_event_storage().name_scope(self.name):
            proposals, losses = self.rpn(images, features, gt_instances)
            samples, roi_losses = self.roi_heads(images, features, proposals, gt_instances)
        losses = {**losses, **roi_losses}
        if totals is not None:
            losses = self._contributions(losses, samples, totals)
        candidates, query_features = [], []
        for sample in samples:
            if sample.has("gt_masks"):
                sample.remove("gt_masks")  # queries do not need them, and sorting them takes long
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

    @torch.no_grad()
    def count(
        self, images: ImageList, features: dict[str, Tensor], gt_instances: list[Instances]
    ) -> HeadCounts:
        """What Detectron2 makes means over in this batch, see `_normalizers`."""
        gt_instances = self._with_shared_masks(gt_instances)
        with get_event_storage().name_scope(self.name):
            proposals, _ = self.rpn(images, features, gt_instances)
            samples = self.roi_heads.label_and_sample_proposals(proposals, gt_instances)
        positives = torch.stack([self._is_positive(sample).sum() for sample in samples])
        return HeadCounts(self._normalizers(samples), positives.tolist())

    def _normalizers(self, samples: list[Instances]) -> Tensor:
        """``(2,)`` int64: sampled proposals, positive ones that have a mask."""
        positive = torch.stack([self._is_positive(sample).sum() for sample in samples])
        with_masks = [int(sample.has("gt_masks")) for sample in samples]
        masked = sum(number * has for number, has in zip(positive, with_masks, strict=True))
        sampled = positive.new_full((), sum(map(len, samples)))
        return torch.stack([sampled, masked])

    def _with_shared_masks(self, gt_instances: list[Instances]) -> list[Instances]:
        """Copies whose masks are not copied for each proposal; none if this head reads none."""
        truths = []
        for given in gt_instances:
            truth = Instances(given.image_size, **given.get_fields())
            if truth.has("gt_masks"):
                masks = truth.gt_masks
                truth.remove("gt_masks")
                if self.reads_masks:
                    is_bitmap = isinstance(masks, BitMasks)
                    truth.gt_masks = (
                        SharedBitMasks.of(masks, given.image_size) if is_bitmap else masks
                    )
            truths.append(truth)
        return truths

    def _contributions(
        self, losses: dict[str, Tensor], samples: list[Instances], totals: HeadCounts
    ) -> dict[str, Tensor]:
        """Detectron2's means over this batch -> contributions to those over all micro-batches.

        The RPN's are means over images, whose number it multiplies by a constant.
        """
        images = len(samples) / len(totals.positives)
        sampled, masked = zip(self._normalizers(samples), totals.normalizers, strict=True)
        of_loss = {"loss_cls": sampled, "loss_box_reg": sampled, "loss_mask": masked}
        weighted = {}
        for name, value in losses.items():
            weight = images
            if name in of_loss:
                # Half precision cannot count to a thousand.
                dtype = torch.promote_types(value.dtype, torch.float32)
                number, total = (term.to(dtype) for term in of_loss[name])
                weight = number / total.clamp(min=1)
            weighted[name] = value * weight
        return weighted

    def _is_positive(self, sample: Instances) -> Tensor:
        """``(P,)`` bool."""
        return (sample.gt_classes >= 0) & (sample.gt_classes < self.roi_heads.num_classes)

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
        if sample.has("gt_weights"):
            candidates.gt_weights = self.roi_heads.row_weights(sample)
        return candidates

    def detect(self, images: ImageList, features: dict[str, Tensor]) -> HeadDetections:
        """Detects on its own; needs ``eval()``.

        With a mask branch, detections have ``pred_masks`` as Detectron2's ROI heads give them. A
        candidate is the detected box with the feature of its region: what would be a very good
        proposal in training, where ground truths are among the proposals.
        """
        proposals, _ = self.rpn(images, features)
        detections, _ = self.roi_heads(images, features, proposals)

        def gather_features(image: int, indices: Tensor) -> Tensor:
            own = {name: level_map[image : image + 1] for name, level_map in features.items()}
            return self.roi_heads.region_features(own, [starts[image][indices]])

        starts = [instances.pred_boxes for instances in detections]
        return HeadDetections(
            detections, Candidates.of_detections(detections, starts, gather_features)
        )

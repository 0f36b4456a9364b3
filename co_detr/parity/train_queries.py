"""Compares decoder outputs, assignments and positive queries of a training step."""

from __future__ import annotations

import torch
from torch import Tensor

from co_detr.modeling.boxes import normalise_boxes
from co_detr.parity import tolerances as tol
from co_detr.parity.compare import Deviation, deviation
from co_detr.parity.differences import REFERENCE_NAN
from co_detr.parity.report import Report, describe
from co_detr.parity.train_run import HEADS, TrainingRun
from co_detr.structures import AssignedTargets, QuerySet


@torch.no_grad()
def check_queries(report: Report, prefix: str, run: TrainingRun) -> None:
    """``cls_logits``, ``boxes_cxcywh``, ``hungarian`` and ``aux`` below ``prefix``."""
    output = run.output
    box = tol.normalised_box(output.memory.image_sizes)
    report.close(f"{prefix}.cls_logits", output.predictions[0].logits, tol.LOGIT)
    report.close(f"{prefix}.boxes_cxcywh", output.predictions[0].boxes, box)
    for layer in range(len(output.targets[0].labels)):
        name = f"{prefix}.hungarian.dec{layer}"
        _check_matching(report, run, name, output.targets[0], layer)
    proposals = output.proposal_targets["matching"]
    _check_matching(report, run, f"{prefix}.hungarian.enc", proposals, 0, binary=True)
    states = run.hidden.split([group.num_queries for group in output.groups], dim=2)
    for number in range(len(HEADS)):
        check = _PositiveQueryCheck(report, run, f"{prefix}.aux[{number}]", number, box)
        check.tuple_of_the_reference()
        check.decoded(states[number + 1])


def _check_matching(
    report: Report,
    run: TrainingRun,
    name: str,
    targets: AssignedTargets,
    layer: int,
    binary: bool = False,
) -> None:
    """Our labels and boxes against those that follow from the reference's matched indices."""
    for image, truth in enumerate(run.case.ground_truth()):
        indices = report.entries[f"{name}[{image}]"]
        is_matched = indices > 0
        row = torch.where(is_matched, indices - 1, len(truth))
        classes = truth.gt_classes * 0 if binary else truth.gt_classes
        labels = torch.cat([classes, torch.tensor([run.case.num_classes])])[row]
        boxes = normalise_boxes(truth.gt_boxes.tensor, truth.image_size)
        boxes = torch.cat([boxes, boxes.new_zeros(1, 4)])[row]
        other = (boxes != targets.boxes[layer, image]).any(-1) & is_matched
        wrong = int(((labels != targets.labels[layer, image]) | other).sum())
        found = Deviation(not wrong, wrong, wrong / len(labels), float(wrong))
        report.record(f"{name}[{image}]", found, "equal", f"{int(is_matched.sum())} matched")


class _PositiveQueryCheck:
    """The positive queries of one head against ``train.aux[number]``."""

    def __init__(self, report: Report, run: TrainingRun, name: str, number: int, box: float):
        self.report, self.name, self.number, self.box = report, name, number, box
        self.run = run
        self.group = run.output.groups[number + 1]
        self.predictions = run.output.predictions[number + 1]
        self.valid = self.group.targets.weights[0] > 0  # (B, Q)

    def tuple_of_the_reference(self) -> None:
        report, name, targets = self.report, self.name, self.group.targets
        weights = targets.weights[0]
        foreground = weights * (targets.labels[0] < self.run.case.num_classes)
        report.exact(f"{name}.head", list(self.run.model.auxiliary.heads)[self.number])
        report.close(f"{name}.coords", self.group.reference, self.box)
        report.exact(f"{name}.labels", targets.labels[0])
        report.close(f"{name}.targets", targets.boxes[0], self.box)
        report.exact(f"{name}.label_weights", weights)
        report.exact(f"{name}.bbox_weights", foreground[..., None].expand(-1, -1, 4))
        report.close(f"{name}.feats", self.run.query_features[self.number], tol.MAP)
        self._attention_mask()

    def _attention_mask(self) -> None:
        """The block of the decoder's mask in which the queries of this group see each other."""
        name = f"{self.name}.attn_masks"
        queries = QuerySet.concat(self.run.output.groups)
        start = sum(queries.sizes[: self.number + 1])
        block = slice(start, start + self.group.num_queries)
        blocked = ~queries.attend_mask[..., block, block]
        reference = self.report.entries[name]
        if reference is None:
            self.report.exact(name, blocked if bool(blocked.any()) else None)
            return
        reference = reference.unflatten(0, (len(self.valid), -1))  # (B, heads, Q, Q)
        found = deviation(
            reference, blocked.expand_as(reference), where=self.valid[:, None, :, None]
        )
        note = "rows of real queries; a padded one sees itself here"
        self.report.record(name, found, "equal", note)

    def decoded(self, states: Tensor) -> None:
        """``states`` (D, B, Q, C). Padded slots are in no loss and are not compared."""
        for entry, actual, atol in (
            ("cls_logits", self.predictions.logits, tol.LOGIT),
            ("boxes_cxcywh", self.predictions.boxes, self.box),
            ("decoder_hs", states.transpose(1, 2), tol.MAP),  # query-major in the reference
        ):
            name = f"{self.name}.{entry}"
            expected = self.report.entries[name]
            valid = self.valid.t() if entry == "decoder_hs" else self.valid
            compared = valid[..., None].expand_as(expected) if expected.ndim == 4 else None
            if bool(expected.isnan().any()):
                self._decoded_with_nan(name, expected, actual, compared, atol)
                continue
            note = "" if bool(valid.all()) else f"{int(valid.sum())} real queries"
            self.report.close(name, actual, atol, note=note, where=compared)

    def _decoded_with_nan(self, name: str, expected, actual, compared, atol) -> None:
        """Only images with padded queries may have NaN; whatever is finite must agree."""
        padded = ~self.valid.all(1)  # (B,)
        axis = 2 if name.endswith("decoder_hs") else 1
        may_be_nan = padded.view([-1 if i == axis else 1 for i in range(expected.ndim)])
        explained = not bool((expected.isnan() & ~may_be_nan).any())
        finite = compared & expected.isfinite()
        found = deviation(expected, actual, atol, where=finite)
        note = f"{int(finite.sum())} finite numbers of real queries"
        self.report.record(name, found, describe(atol), note, REFERENCE_NAN)
        holds = explained and self.run.reference_masks_rows and bool(actual.isfinite().all())
        self.report.known(name, REFERENCE_NAN, holds, f"{int(expected.isnan().sum())} NaN")

"""Compares decoder outputs, assignments and positive queries of a training step."""

from __future__ import annotations

import torch
from torch import Tensor

from co_detr.parity import tolerances as tol
from co_detr.parity.report import Report
from co_detr.parity.train_run import HEADS, TrainingRun


def check_queries(report: Report, prefix: str, run: TrainingRun) -> None:
    """``cls_logits``, ``boxes_cxcywh``, ``hungarian`` and ``aux`` below ``prefix``."""
    output = run.output
    box = tol.normalised_box(output.memory.image_sizes)
    report.close(f"{prefix}.cls_logits", output.predictions[0].logits, tol.LOGIT)
    report.close(f"{prefix}.boxes_cxcywh", output.predictions[0].boxes, box)
    for layer, labels in enumerate(output.targets[0].labels):
        _check_matching(report, run, f"{prefix}.hungarian.dec{layer}", labels, binary=False)
    labels = output.proposal_targets["matching"].labels[0]
    _check_matching(report, run, f"{prefix}.hungarian.enc", labels, binary=True)
    states = run.hidden.split([group.num_queries for group in output.groups], dim=2)
    for number in range(len(HEADS)):
        check = _PositiveQueryCheck(report, run, f"{prefix}.aux[{number}]", number, box)
        check.tuple_of_the_reference()
        check.decoded(states[number + 1])


def _check_matching(
    report: Report, run: TrainingRun, name: str, labels: Tensor, binary: bool
) -> None:
    """Our labels against those that follow from the reference's matched indices."""
    for image, gt_labels in enumerate(run.case.own["gt_labels"]):
        indices = report.entries[f"{name}[{image}]"]
        background = torch.tensor([run.case.num_classes])
        known = torch.cat([gt_labels * 0 if binary else gt_labels, background])
        expected = known[torch.where(indices > 0, indices - 1, len(gt_labels))]
        wrong = int((expected != labels[image]).sum())
        report.verdict(f"{name}[{image}]", wrong == 0, f"{wrong} labels differ")


class _PositiveQueryCheck:
    """The positive queries of one head against ``train.aux[number]``."""

    def __init__(self, report: Report, run: TrainingRun, name: str, number: int, box: float):
        self.report, self.name, self.number, self.box = report, name, number, box
        self.run = run
        self.group = run.output.groups[number + 1]
        self.predictions = run.output.predictions[number + 1]
        self.valid = self.group.targets.weights[0] > 0

    def tuple_of_the_reference(self) -> None:
        report, name, targets = self.report, self.name, self.group.targets
        weights = targets.weights[0]
        foreground = weights * (targets.labels[0] < self.run.case.num_classes)
        report.exact(f"{name}.head", HEADS[self.number])
        report.close(f"{name}.coords", self.group.reference, self.box)
        report.exact(f"{name}.labels", targets.labels[0])
        report.close(f"{name}.targets", targets.boxes[0], self.box)
        report.exact(f"{name}.label_weights", weights)
        report.exact(f"{name}.bbox_weights", foreground[..., None].expand(-1, -1, 4))
        report.close(f"{name}.feats", self.run.query_features[self.number], tol.MAP)
        blocked = report.entries[f"{name}.attn_masks"]
        if blocked is None:
            report.exact(f"{name}.attn_masks", None if self.valid.all() else self.valid)
            return
        blocked = blocked.unflatten(0, (len(self.valid), -1))  # (B, heads, Q, Q)
        ours = ~self.valid[:, None, None, :].expand_as(blocked)
        real = self.valid[:, None, :, None].expand_as(blocked)
        note = "rows of real queries; a padded one sees itself here, nothing in the reference"
        report.verdict(f"{name}.attn_masks", torch.equal(blocked[real], ours[real]), note)

    def decoded(self, states: Tensor) -> None:
        """``states`` (D, B, Q, C); padded slots are in no loss and are not compared."""
        for entry, actual, tolerance in (
            ("cls_logits", self.predictions.logits, tol.LOGIT),
            ("boxes_cxcywh", self.predictions.boxes, self.box),
            ("decoder_hs", states, tol.MAP),
        ):
            name = f"{self.name}.{entry}"
            expected = self.report.entries[name]
            if entry == "decoder_hs":
                expected = expected.transpose(1, 2)  # query-major in the reference
            finite = bool(actual.isfinite().all())
            if not expected.isfinite().all():
                note = "reference-nan: zero padding masks whole rows there; ours is finite"
                self.report.known(name, note, finite)
                continue
            worst = (expected - actual)[:, self.valid].abs().max().item()
            note = f"real queries {worst:.1e} abs, at most {tolerance:.1e}"
            self.report.verdict(name, finite and worst <= tolerance, note)

"""Compares decoder outputs, assignments and positive queries of a training step."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from co_detr.modeling.boxes import normalise_boxes
from co_detr.parity import tolerances as tol
from co_detr.parity.compare import Deviation, deviation
from co_detr.parity.denoising import check_denoising
from co_detr.parity.differences import REFERENCE_NAN
from co_detr.parity.report import Report, describe
from co_detr.parity.train_run import HEADS, TrainingRun
from co_detr.structures import AssignedTargets, QueryGroup, QuerySet


@torch.no_grad()
def check_queries(report: Report, prefix: str, run: TrainingRun) -> None:
    """``cls_logits``, ``boxes_cxcywh``, ``hungarian``, ``dn`` and ``aux`` below ``prefix``."""
    output = run.output
    box = tol.normalised_box(output.memory.image_sizes)
    # The reference has denoising queries in front.
    first = [run.predictions[name] for name in ("denoising", "matching") if name in run.groups]
    report.close(f"{prefix}.cls_logits", torch.cat([e.logits for e in first], 2), tol.LOGIT)
    report.close(f"{prefix}.boxes_cxcywh", torch.cat([e.boxes for e in first], 2), box)
    matched = output.targets[list(run.groups).index("matching")]
    for layer in range(len(matched.labels)):
        _check_matching(report, run, f"{prefix}.hungarian.dec{layer}", matched, layer)
    proposals, binary = output.proposal_targets["matching"], not run.case.is_dino
    _check_matching(report, run, f"{prefix}.hungarian.enc", proposals, 0, binary)
    if "denoising" in run.groups:
        with report.part(f"{prefix}.dn"):
            _check_noise(report, run, f"{prefix}.dn")
    for number, head in enumerate(HEADS):
        check = _PositiveQueryCheck(report, run, f"{prefix}.aux[{number}]", head, box)
        check.tuple_of_the_reference()
        check.decoded(run.states[f"{head}_queries"])


def _check_noise(report: Report, run: TrainingRun, name: str) -> None:
    if report.has(f"{name}.raw_draws"):  # nothing is drawn without ground truth
        report.given(f"{name}.raw_draws", "replayed")
    group, num_gts = run.groups["denoising"], run.case.num_gts
    check_denoising(report, name, run.output.groups, run.noised_labels, num_gts)
    report.exact(f"{name}.dn_meta.pad_size", group.num_queries)
    report.exact(f"{name}.dn_meta.num_dn_group", group.num_blocks)
    report.exact(f"{name}.single_pad", group.num_queries // (2 * group.num_blocks))


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

    def __init__(self, report: Report, run: TrainingRun, name: str, head: str, box: float):
        self.report, self.name, self.head, self.box = report, name, head, box
        self.run = run
        self.group = run.groups[f"{head}_queries"]
        self.predictions = run.predictions[f"{head}_queries"]
        self.real = self.group.targets.weights[0] > 0  # (B, Q)
        # Padded slots that others attend to are decoded as the reference does; hidden ones are
        # in no loss and see themselves only, so they are not compared.
        self.compared = self.real if self.group.valid is not None else torch.ones_like(self.real)

    def tuple_of_the_reference(self) -> None:
        report, name, targets = self.report, self.name, self.group.targets
        weights = targets.weights[0]
        foreground = weights * (targets.labels[0] < self.run.case.num_classes)
        report.exact(f"{name}.head", self.head)
        report.close(f"{name}.coords", self.group.reference, self.box)
        report.exact(f"{name}.labels", targets.labels[0])
        report.close(f"{name}.targets", targets.boxes[0], self.box)
        report.exact(f"{name}.label_weights", weights)
        report.exact(f"{name}.bbox_weights", foreground[..., None].expand(-1, -1, 4))
        report.close(f"{name}.feats", self.run.query_features[self.head], tol.MAP)
        self._attention_mask()

    def _attention_mask(self) -> None:
        """The block of the decoder's mask in which the queries of this group see each other.

        The reference's Co-DINO makes its mask for nothing: it is compared with the one that would
        hide the padded slots.
        """
        name = f"{self.name}.attn_masks"
        reference = self.report.entries[name]
        hidden = replace(self.group, valid=self.real) if self.group.valid is None else self.group
        if reference is None:
            blocked = self._blocked(self.group)
            self.report.exact(name, blocked if bool(blocked.any()) else None)
            return
        blocked = self._blocked(hidden)
        reference = reference.unflatten(0, (len(self.real), -1))  # (B, heads, Q, Q)
        found = deviation(
            reference, blocked.expand_as(reference), where=self.real[:, None, :, None]
        )
        unused = "; not used by the reference" if hidden is not self.group else ""
        note = f"rows of real queries; a padded one sees itself here{unused}"
        self.report.record(name, found, "equal", note)

    def _blocked(self, group: QueryGroup) -> Tensor:
        """What ``group``, in the place of its name, does not see of itself: (B, 1, Q, Q)."""
        groups = {**self.run.groups, group.name: group}
        queries = QuerySet.concat(list(groups.values()))
        start = sum(queries.sizes[: list(groups).index(group.name)])
        block = slice(start, start + group.num_queries)
        return ~queries.attend_mask[..., block, block]

    def decoded(self, states: Tensor) -> None:
        """``states`` (D, B, Q, C)."""
        for entry, actual, atol in (
            ("cls_logits", self.predictions.logits, tol.LOGIT),
            ("boxes_cxcywh", self.predictions.boxes, self.box),
            ("decoder_hs", states.transpose(1, 2), tol.MAP),  # query-major in the reference
        ):
            name = f"{self.name}.{entry}"
            expected = self.report.entries.get(name, actual)
            rows = self.compared.t() if entry == "decoder_hs" else self.compared
            compared = rows[..., None].expand_as(expected) if expected.ndim == 4 else None
            if bool(expected.isnan().any()):
                self._decoded_with_nan(name, expected, actual, compared, atol)
                continue
            note = "" if bool(rows.all()) else f"{int(rows.sum())} real queries"
            self.report.close(name, actual, atol, note=note, where=compared)

    def _decoded_with_nan(self, name: str, expected, actual, compared, atol) -> None:
        """Only images with padded queries may have NaN; whatever is finite must agree."""
        padded = ~self.real.all(1)  # (B,)
        axis = 2 if name.endswith("decoder_hs") else 1
        may_be_nan = padded.view([-1 if i == axis else 1 for i in range(expected.ndim)])
        explained = not bool((expected.isnan() & ~may_be_nan).any())
        finite = compared & expected.isfinite()
        found = deviation(expected, actual, atol, where=finite)
        note = f"{int(finite.sum())} finite numbers of real queries"
        self.report.record(name, found, describe(atol), note, REFERENCE_NAN)
        holds = explained and self.run.reference_masks_rows and bool(actual.isfinite().all())
        self.report.known(name, REFERENCE_NAN, holds, f"{int(expected.isnan().sum())} NaN")

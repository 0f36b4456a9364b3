"""Compares queries, losses and gradients of a training step."""

from __future__ import annotations

import re
import statistics
from dataclasses import replace
from math import inf, isnan

import torch
from torch import Tensor

from co_detr.checkpoint.official import rename_official
from co_detr.modeling.losses import normalize_boxes
from co_detr.structures import AssignedTargets, QueryGroup, QuerySet
from tests.parity.oracle import tolerances as tol
from tests.parity.oracle.eval_mode import check_denoising
from tests.parity.oracle.report import Deviation, Report, describe, deviation
from tests.parity.oracle.tolerances import REFERENCE_NAN, RPN_NORMALIZER
from tests.parity.oracle.training import HEADS, TrainingRun

_TERMS = {
    "loss_cls": "loss_cls",
    "loss_bbox": "loss_bbox",
    "loss_giou": "loss_iou",
    "loss_rpn_cls": "loss_rpn_cls",
    "loss_rpn_loc": "loss_rpn_bbox",
    "loss_box_reg": "loss_bbox",
    "loss_centerness": "loss_centerness",
}

_OF_MASKS = ("loss_mask", "loss_mask_iou")  # whose names have no suffix
_SUFFIX = {"roi_queries": "_aux0", "atss_queries": "_aux1", "roi": "0", "atss": "1"}

# No loss of the positive queries reaches these, so NaN there is no reason for NaN here.
UNREACHED = ("auxiliary.heads.", "queries.")


@torch.no_grad()
def check_queries(report: Report, prefix: str, run: TrainingRun) -> None:
    """``cls_logits``, ``boxes_cxcywh``, ``hungarian``, ``dn`` and ``aux`` below ``prefix``."""
    output = run.output
    box = tol.normalized_box(output.memory.image_sizes)
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
        factor = run.output.memory.geometry.factors[image]
        boxes = normalize_boxes(truth.gt_boxes.tensor, factor)
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
        reference = self.report.entries.get(name)
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


def official_loss_name(name: str) -> str:
    """``roi_queries.d0.loss_giou`` -> ``d0.loss_iou_aux0``, and so on."""
    group, *layer, term = name.split(".")
    if term in _OF_MASKS:
        return term
    if layer == ["enc"]:
        return f"enc_{_TERMS[term]}"
    start = "dn_" if group == "denoising" else ""
    suffix = "" if term.startswith("loss_rpn") else _SUFFIX.get(group, "")
    return ".".join([*layer, start + _TERMS[term] + suffix])


def check_losses(report: Report, prefix: str, run: TrainingRun) -> None:
    """``losses``, ``losses_raw`` (level lists are summed) and ``total_loss`` below ``prefix``."""
    losses = run.output.losses
    ours = {official_loss_name(name): float(value) for name, value in losses.items()}
    ours["acc0"] = float(_accuracy(run))
    total = float(torch.stack(list(losses.values())).sum())
    for kind in ("losses", "losses_raw"):
        start = f"{prefix}.{kind}."
        names = {
            re.sub(r"\[\d+\]$", "", entry.removeprefix(start)): None
            for entry in report.entries
            if entry.startswith(start)
        }
        if not names:
            report.fail(f"{prefix}.{kind}", "the file has none")
            continue
        # The sum of all is logged beside the terms, but not returned with them.
        expected = {**ours, "loss": total} if "loss" in names else ours
        for name in {**names, **dict.fromkeys(expected)}:
            _compare_loss(report, run, start + name, expected.get(name))
    _compare_loss(report, run, f"{prefix}.total_loss", total)


def _compare_loss(report: Report, run: TrainingRun, name: str, ours: float | None) -> None:
    if ours is None:
        report.fail(name, "we have no such loss")
        return
    values = [v for k, v in report.entries.items() if k == name or k.startswith(f"{name}[")]
    if not values:
        report.fail(name, "the file has no such entry")
        return
    reference = sum(float(value) for value in values)
    if isnan(reference):
        is_reached = "_aux" in name or name.endswith((".loss", ".total_loss"))
        holds = run.reference_masks_rows and is_reached and abs(ours) < inf
        report.known(name, REFERENCE_NAN, holds, f"ours is {ours:.7g}")
        return
    limits = {"rtol": tol.LOSS} if reference else {"atol": tol.ZERO_LOSS}
    found = deviation(reference, ours, **limits)
    note = f"{ours:.7g}" + (" is the sum over levels" if len(values) > 1 else "")
    bridged = RPN_NORMALIZER if "loss_rpn" in name else None
    report.record(name, found, describe(limits.get("atol", 0.0), tol.LOSS), note, bridged)


def _accuracy(run: TrainingRun) -> Tensor:
    """Percent of sampled proposals whose class the ROI head got right."""
    labels = run.entries["roi"]["targets"]["labels"]
    return 100.0 * (run.scores.argmax(1) == labels).float().mean()


def check_gradients(report: Report, prefix: str, run: TrainingRun) -> None:
    """``grads``, ``grad_norms`` and ``grad_none`` below ``prefix``."""
    check = _GradientCheck(report, prefix, run)
    check.norms()
    for key, gradient in run.entries["grads"].items():
        check.gradient(key, gradient)
    check.frozen()


class _GradientCheck:
    def __init__(self, report: Report, prefix: str, run: TrainingRun):
        self.report, self.prefix, self.run = report, prefix, run
        self.ours = {
            name: parameter.grad
            for name, parameter in run.model.named_parameters()
            if parameter.grad is not None
        }
        # A gradient of zeros is as good as none: without any ground truth, labels of denoising
        # queries have the former here so that distributed training finds all parameters used.
        self.moved = {name for name, gradient in self.ours.items() if gradient.any()}
        largest = max(gradient.norm().item() for gradient in self.ours.values())
        self.noise = tol.GRADIENT_NOISE * largest

    def norms(self) -> None:
        """Every norm, their median, and that both sides train the same parameters."""
        name, errors, trained = f"{self.prefix}.grad_norms", [], set()
        for key, norm in self.run.entries["grad_norms"].items():
            names = self.our_names(key)
            trained.update(names)
            actual = self.flat(names)
            if actual is None:
                self.report.fail(f"{name}.{key}", "no gradient here")
                continue
            found = self.deviate(abs(norm - actual.norm().item()), norm)
            if not isnan(norm):
                errors.append(found.relative)
            self.conclude(f"{name}.{key}", found, names, actual, isnan(norm))
        extra = sorted(self.moved - trained)
        note = f"trained only here: {extra[:5]}" if extra else f"{len(trained)} parameters"
        self.report.derived(f"<parameters in {name}>", _count(len(extra)), "equal", note)
        if errors:
            median = statistics.median(errors)
            ratio = median / tol.GRADIENT_MEDIAN
            found = Deviation(ratio <= 1, relative=median, ratio=ratio)
            self.report.derived(f"<median of {name}>", found, describe(0.0, tol.GRADIENT_MEDIAN))

    def gradient(self, key: str, gradient: Tensor) -> None:
        """A whole gradient; the error is the norm of the deviation."""
        name = f"{self.prefix}.grads.{key}"
        renamed = rename_official({key: gradient}, self.run.model).state_dict
        expected = torch.cat([value.flatten() for value in renamed.values()])
        actual = self.flat(list(renamed))
        if actual is None or actual.shape != expected.shape:
            self.report.fail(name, "no such gradient here")
            return
        found = self.deviate((expected - actual).norm().item(), expected.norm().item())
        self.conclude(name, found, list(renamed), actual, bool(expected.isnan().any()))

    def frozen(self) -> None:
        """``grad_none``: parameters without gradient."""
        name = f"{self.prefix}.grad_none"
        if not self.report.has(name):
            return
        keys = [key.removesuffix(" [frozen]") for key in self.run.entries["grad_none"]]
        trained = [key for key in keys if self.moved & {*self.our_names(key)}]
        note = f"trained here: {trained[:5]}" if trained else f"{len(keys)} parameters"
        self.report.record(name, _count(len(trained)), "equal", note)

    def our_names(self, key: str) -> list[str]:
        return list(rename_official({key: self.run.case.weights[key]}, self.run.model).state_dict)

    def flat(self, names: list[str]) -> Tensor | None:
        if not names or any(name not in self.ours for name in names):
            return None
        return torch.cat([self.ours[name].flatten() for name in names])

    def deviate(self, error: float, norm: float) -> Deviation:
        relative = error / max(norm, self.noise)
        return Deviation(relative <= tol.GRADIENT, error, relative, relative / tol.GRADIENT)

    def conclude(
        self, name: str, found: Deviation, names: list[str], actual: Tensor, is_nan: bool
    ) -> None:
        """An entry that NaN of the reference's padded queries spoilt is a known difference.

        They also spoil some finite ones: the gradient of a value projection of the decoder lacks
        what queries at NaN positions, which sample nothing, should have added.
        """
        lacks_queries = all("decoder." in name and ".value_proj." in name for name in names)
        if not is_nan and not (self.run.reference_masks_rows and lacks_queries):
            self.report.record(name, found, describe(0.0, tol.GRADIENT))
            return
        holds = self.run.reference_masks_rows and bool(actual.isfinite().all())
        holds = holds and not any(name.startswith(UNREACHED) for name in names)
        note = "NaN" if is_nan else f"finite, but without the padded queries ({found.relative:.1e})"
        self.report.known(name, REFERENCE_NAN, holds, note)


def _count(wrong: int) -> Deviation:
    return Deviation(not wrong, float(wrong), ratio=float(wrong))

"""The model: queries, masks, assignment, losses, geometry, post-processing, weights of a file."""

from tests.mutations import Mutation

MODELING = "tests/modeling"


def _mutation(name: str, file: str, old: str, new: str, *tests: str) -> Mutation:
    return Mutation(
        name,
        f"co_detr/{file}",
        old,
        new,
        tuple(f"{MODELING}/test_{test}.py" for test in tests),
    )


MUTATIONS = (
    # Queries and who sees whom
    _mutation(
        "heads-share-their-first-queries",
        "modeling/auxiliary/branch.py",
        "                source.reset_parameters()",
        "                pass",
        "positive_queries",
    ),
    _mutation(
        "code-of-an-uncut-box",
        "modeling/queries/positive.py",
        "encode_boxes(inverse_sigmoid(boxes).sigmoid(),",
        "encode_boxes(boxes,",
        "positive_queries",
    ),
    _mutation(
        "ignored-candidates-are-positive",
        "modeling/queries/positive.py",
        "((labels >= 0) & (labels < self.num_classes))",
        "(labels < self.num_classes)",
        "positive_queries",
    ),
    _mutation(
        "blocks-see-those-behind-them",
        "structures.py",
        "mask = block[:, None] == block[None, :]",
        "mask = block[:, None] <= block[None, :]",
        "denoising",
    ),
    _mutation(
        "empty-slots-are-keys",
        "structures.py",
        "(mask & valid[:, None, :])",
        "(mask | ~valid[:, None, :])",
        "denoising",
    ),
    _mutation(
        "denoising-sees-nothing",
        "modeling/queries/denoising.py",
        "sees=(self.sees,)",
        "sees=()",
        "denoising",
    ),
    _mutation(
        "negatives-as-near-as-positives",
        "modeling/queries/denoising.py",
        "shifts[:, :, 1] += 1.0",
        "shifts[:, :, 1] += 0.0",
        "denoising",
    ),
    _mutation(
        "references-in-half-precision",
        "modeling/queries/sources.py",
        "enabled=False):\n            points = self.point_head",
        "enabled=True):\n            points = self.point_head",
        "mixed_precision",
    ),
    # Decoder and encoder
    _mutation(
        "gradient-through-references",
        "modeling/queries/sources.py",
        "self.best[:, start:stop]).detach().sigmoid()",
        "self.best[:, start:stop]).sigmoid()",
        "co_dino_definition",
    ),
    _mutation(
        "position-of-the-padded-image",
        "modeling/transformer.py",
        "self.query_position(reference * level_scale[:, :, 0])",
        "self.query_position(reference)",
        "co_dino_definition",
    ),
    _mutation(
        "look-forward-once",
        "modeling/transformer.py",
        "base = refined if self.look_forward_twice else reference",
        "base = reference",
        "co_dino_definition",
    ),
    _mutation(
        "padding-is-attended-to",
        "modeling/transformer.py",
        "level_shapes, padding_mask, level_sizes\n        )\n        tokens",
        "level_shapes, None, level_sizes\n        )\n        tokens",
        "padding",
    ),
    _mutation(
        "ratios-of-the-other-axis",
        "modeling/geometry.py",
        "inside[:, 0, :].sum(1) / width, inside[:, :, 0].sum(1) / height",
        "inside[:, :, 0].sum(1) / height, inside[:, 0, :].sum(1) / width",
        "padding",
    ),
    # Matching and losses
    _mutation(
        "cost-without-its-balance",
        "modeling/losses.py",
        "* (1 - self.alpha) * probability",
        "* self.alpha * probability",
        "matching",
    ),
    _mutation(
        "background-has-boxes",
        "modeling/losses.py",
        "box_weights = targets.weights * (targets.labels < self.num_classes)",
        "box_weights = targets.weights",
        "matching",
    ),
    _mutation(
        "quality-has-a-gradient",
        "modeling/losses.py",
        "cxcywh_to_xyxy(boxes.detach())",
        "cxcywh_to_xyxy(boxes)",
        "co_dino_definition",
    ),
    _mutation(
        "counts-of-one-process",
        "modeling/losses.py",
        "return counts / dist.get_world_size()",
        "return counts",
        "distributed",
    ),
    _mutation(
        "gradient-of-parts-points-the-other-way",
        "modeling/losses.py",
        "                (found,) = torch.autograd.grad(ctx.loss(some, *rest), some, grad_part)",
        "                (found,) = torch.autograd.grad(ctx.loss(some, *rest), some, -grad_part)",
        "classification_losses",
    ),
    _mutation(
        "hull-is-added",
        "modeling/losses.py",
        "overlap / union - (hull - union) / hull",
        "overlap / union + (hull - union) / hull",
        "boxes",
    ),
    _mutation(
        "gradient-that-waits",
        "modeling/losses.py",
        "return size[..., 0] * size[..., 1]",
        "return size.prod(-1)",
        "emulated_cuda",
    ),
    _mutation(
        "proposals-count-half",
        "modeling/losses.py",
        'f"{group.name}.enc", 1.0,',
        'f"{group.name}.enc", 0.5,',
        "query_groups",
    ),
    # Auxiliary heads
    _mutation(
        "atss-threshold",
        "modeling/auxiliary/assigners.py",
        "overlaps.mean(0) + overlaps.std(0)",
        "overlaps.mean(0)",
        "atss_assigner",
    ),
    _mutation(
        "anchors-on-the-border-are-inside",
        "modeling/auxiliary/assigners.py",
        "(margin > 0.01)",
        "(margin > -0.01)",
        "atss_assigner",
    ),
    _mutation(
        "best-anchors-without-overlap",
        "modeling/auxiliary/assigners.py",
        "(best > 0)",
        "(best >= 0)",
        "max_iou_assigner",
    ),
    _mutation(
        "points-as-far-as-two-radii",
        "modeling/auxiliary/assigners.py",
        "< self.radius * stride",
        "< 2 * self.radius * stride",
        "center_sampling",
    ),
    _mutation(
        "mixtures-that-never-stop",
        "modeling/auxiliary/assigners.py",
        "running = running & ((bound - previous).abs() >= tolerance)",
        "running = running",
        "paa_assigner",
    ),
    _mutation(
        "padding-is-assigned",
        "modeling/auxiliary/dense_head.py",
        "cls(height, width, min(rows, height), min(columns, width), num_anchors)",
        "cls(height, width, height, width, num_anchors)",
        "atss_head",
    ),
    # Counts of a step of several micro-batches
    _mutation(
        "micro-batches-count-for-themselves",
        "engine/trainer.py",
        "counts = self._count(micro.batches) if steps > 1 else None",
        "counts = None",
        "accumulation",
    ),
    _mutation(
        "group-as-long-as-a-micro-batch",
        "modeling/queries/positive.py",
        "max(step_positives or map(len, positives))",
        "max(map(len, positives))",
        "accumulation",
    ),
    _mutation(
        "noise-for-a-micro-batch",
        "modeling/queries/denoising.py",
        "longest = max(num_truths)",
        "longest = max(len(truth.labels) for truth in ground_truth)",
        "accumulation",
    ),
    _mutation(
        "counting-with-another-dropout",
        "engine/trainer.py",
        "                self._seed(micro_step)\n",
        "",
        "accumulation",
    ),
    _mutation(
        "statistics-learn-from-counting",
        "engine/trainer.py",
        "        self.guard.restore_statistics()",
        "        pass",
        "accumulation",
    ),
    _mutation(
        "masks-are-means-over-all-samples",
        "modeling/auxiliary/faster_rcnn.py",
        "torch.stack([sampled, masked])",
        "torch.stack([sampled, sampled])",
        "accumulation",
    ),
    # Detectors beside the decoder
    _mutation(
        "detections-see-each-other",
        "modeling/queries/positive.py",
        "num_blocks=group.num_queries)",
        "num_blocks=1)",
        "detectors",
    ),
    _mutation(
        "features-of-another-image",
        "modeling/auxiliary/faster_rcnn.py",
        "level_map[image : image + 1]",
        "level_map[:1]",
        "detectors",
    ),
    _mutation(
        "features-of-the-first-cells",
        "modeling/auxiliary/dense_head.py",
        "origins[image][indices] // self.num_anchors",
        "indices // self.num_anchors",
        "detectors",
    ),
    _mutation(
        "score-of-whatever-class",
        "modeling/detectors.py",
        "probability.gather(1, found.pred_classes[:, None]).squeeze(1)",
        "probability.amax(1)",
        "detectors",
    ),
    _mutation(
        "empty-boxes-push-others-out",
        "modeling/fusion.py",
        "return found[found.pred_boxes.nonempty()]",
        "return found",
        "detectors",
    ),
    # Post-processing and weights
    _mutation(
        "classes-lower-each-other",
        "modeling/postprocess.py",
        "torch.where(classes[:, None] == classes, factor, 1.0)",
        "torch.where(classes[:, None] >= classes, factor, 1.0)",
        "soft_nms",
    ),
    _mutation(
        "the-best-detection-is-dropped",
        "modeling/postprocess.py",
        "keep[0] = True",
        "pass",
        "soft_nms",
    ),
    _mutation(
        "always-the-first-source",
        "checkpoint/reading.py",
        "names.index(model.queries.inference) not in places",
        "False",
        "strip",
    ),
)

"""Training, resuming, data and evaluation: what their tests have to notice."""

from tests.mutations import Mutation


def _mutation(name: str, file: str, old: str, new: str, *tests: str) -> Mutation:
    return Mutation(name, f"co_detr/{file}", old, new, tuple(f"tests/{test}.py" for test in tests))


MUTATIONS = (
    _mutation(
        "all-processes-draw-the-same",
        "engine/trainer.py",
        "self.iter, micro_step, comm.get_rank())",
        "self.iter, micro_step)",
        "engine/test_trainer",
    ),
    _mutation(
        "all-micro-batches-draw-the-same",
        "engine/trainer.py",
        "self.iter, micro_step, comm.get_rank())",
        "self.iter, comm.get_rank())",
        "engine/test_trainer",
    ),
    _mutation(
        "loss-scale-stays",
        "engine/trainer.py",
        "        self.grad_scaler.update()",
        "        pass",
        "engine/test_trainer",
    ),
    _mutation(
        "gradients-of-one-micro-batch",
        "engine/trainer.py",
        "divisor = self.settings.accumulation_steps if counts is None else 1",
        "divisor = 1",
        "engine/test_trainer",
    ),
    _mutation(
        "resume-repeats-a-batch",
        "engine/trainer.py",
        'self.plan.resume(state_dict["data"], self.iter + 1)',
        'self.plan.resume(state_dict["data"], self.iter)',
        "engine/test_resume",
    ),
    _mutation(
        "average-without-warm-up",
        "engine/hooks.py",
        "if warmup else 1.0",
        "if not warmup else 1.0",
        "engine/test_averaging",
    ),
    _mutation(
        "samples-of-one-augmentation",
        "data/loader.py",
        'locally_seeded("sample", self.seed, key.position)',
        'locally_seeded("sample", self.seed)',
        "data_loading/test_loader",
    ),
    _mutation(
        "masks-of-a-pixel-further-on",
        "data/masks.py",
        "np.arange(after) * (1 / (after / before))",
        "(np.arange(after) + 0.5) * (1 / (after / before))",
        "data_loading/test_masks",
    ),
    _mutation(
        "pasted-objects-weigh-one",
        "data/copy_paste.py",
        "torch.cat([kept, loss_weights(objects)])",
        "torch.cat([kept, torch.ones(len(objects))])",
        "data_loading/test_copy_paste",
    ),
    _mutation(
        "mixed-in-objects-weigh-one",
        "data/mixing.py",
        "placed.gt_weights = instances.gt_weights",
        "placed.gt_weights = torch.ones(len(instances))",
        "data_loading/test_mixing",
    ),
    _mutation(
        "hidden-objects-stay",
        "data/copy_paste.py",
        "stays = (left > 0) & (",
        "stays = (left >= 0) & (",
        "parity/test_units_masks",
    ),
    _mutation(
        "pasted-objects-hide-nothing",
        "data/copy_paste.py",
        "patch.pixels & ~covered[patch.window]",
        "patch.pixels",
        "parity/test_units_masks",
    ),
    _mutation(
        "masks-in-part-of-an-image",
        "data/loader.py",
        "if masks and all(mask is not None for mask in masks):",
        "if masks and any(mask is not None for mask in masks):",
        "data_loading/test_masks",
    ),
    _mutation(
        "damaged-run-lengths-are-read",
        "data/segmentation.py",
        "or codes.max() > 63 or codes[-1] & 32:",
        "or codes.max() > 63:",
        "data_loading/test_masks",
    ),
    _mutation(
        "processes-share-their-images",
        "data/loader.py",
        "for key in batch[self.rank :: self.world_size]",
        "for key in batch[: len(batch) // self.world_size]",
        "data_loading/test_loader",
    ),
    _mutation(
        "dropout-in-validation-losses",
        "engine/validation.py",
        "_KEPT_IN_EVAL = (_BatchNorm, _DropoutNd, StochasticDepth)",
        "_KEPT_IN_EVAL = (_BatchNorm, StochasticDepth)",
        "modeling/test_validation_loss",
    ),
    _mutation(
        "categories-of-the-model",
        "engine/evaluation.py",
        'detection | {"category_id": ids[detection["category_id"]]}',
        "detection",
        "engine/test_evaluation",
    ),
    _mutation(
        "limit-of-the-coco-api",
        "engine/evaluators.py",
        "limits = [min(1, limit), min(10, limit), limit]",
        "limits = [1, 10, 100]",
        "engine/test_evaluation",
    ),
    _mutation(
        "boxes-without-area-count",
        "engine/evaluation.py",
        "if boxes.clip(annotation, image) is None",
        "if False",
        "engine/test_evaluation",
    ),
)

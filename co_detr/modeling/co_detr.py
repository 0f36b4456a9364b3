"""The meta-architecture: images in, losses or detections out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling import Backbone
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from torch import Tensor, nn

from co_detr.errors import ConfigError
from co_detr.modeling.auxiliary.branch import AuxiliaryBranch, HybridAssignmentHeads, reads_masks_of
from co_detr.modeling.detectors import (
    DECODER,
    TOP_K,
    InferencePass,
    check_detectors,
    detector_names,
    require_detector,
)
from co_detr.modeling.fusion import boxes_only
from co_detr.modeling.geometry import BatchPadding, ImageBatch
from co_detr.modeling.losses import (
    Assignment,
    HungarianAssigner,
    SetCriterion,
    assign_targets,
    normalize_boxes,
    score_groups,
)
from co_detr.modeling.masks import RefineMaskHead
from co_detr.modeling.postprocess import TopKPostprocessor, in_output_resolution
from co_detr.modeling.queries.sources import QuerySource, QuerySources
from co_detr.modeling.transformer import DeformableDecoder, DeformableEncoder
from co_detr.structures import (
    EncoderMemory,
    GroundTruth,
    Predictions,
    QueryGroup,
    QuerySet,
    StepCounts,
    TrainingOutput,
    to_device,
)


class CoDETR(nn.Module):
    """DETR with collaborative hybrid assignments training (Zong et al., ICCV 2023).

    1. The backbone's maps are encoded into a memory.
    2. Training only: auxiliary heads are supervised on the memory by one-to-many assignment, and
       what they assigned becomes customized positive queries.
    3. Query sources make further groups, of which inference uses one.
    4. All groups are decoded in one pass, blind to each other, and scored by one criterion.

    With a mask head, the boxes that are detected in the end also get masks.

    In eval mode only the memory, the inference group and the decoder are computed, unless
    ``evaluate_with`` or ``compare_detectors`` asks for one of the other `detectors`.

    Without a decoder (all of ``decoder``, ``queries``, ``assigner``, ``criterion``,
    ``postprocessor`` None) the auxiliary heads are all there is: a dense detector on the same
    encoder, which the paper's introduction compares with.

    Args:
        num_classes: foreground classes K; every part must agree.
        backbone: Detectron2 backbone whose outputs all have the encoder's width, finest first.
        encoder, decoder, assigner, criterion, postprocessor: see their classes.
        queries: query sources by name, see `QuerySources`.
        auxiliary: the auxiliary heads, or None for the plain DETR.
        mask_head: predicts masks of detections and is trained on proposals of the decoder; None:
            boxes only.
        pixel_mean, pixel_std: per channel, in the order and range of the input images.
        padding: how images become a batch; None: to the largest size in it, masked.
        compare_top_k: in eval, also return what plain top-k makes of the same predictions.
        compare_detectors: in eval, also return what each of the other `detectors` finds in the same
            pass, unless ``evaluate_with`` names the only one that is wanted.
        evaluate_with: name of the detector in eval, see `co_detr.modeling.detectors`; None: the
            decoder.

    Raises:
        ConfigError: if parts disagree on ``num_classes``, no single inference source exists,
            ``evaluate_with`` names no detector, or only some of the decoder's parts are None.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        backbone: Backbone,
        encoder: DeformableEncoder,
        decoder: DeformableDecoder | None,
        queries: QuerySources | None,
        assigner: HungarianAssigner | None,
        criterion: SetCriterion | None,
        postprocessor: TopKPostprocessor | None,
        auxiliary: HybridAssignmentHeads | None = None,
        mask_head: RefineMaskHead | None = None,
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
        padding: BatchPadding | None = None,
        compare_top_k: bool = False,
        compare_detectors: bool = False,
        evaluate_with: str | None = None,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.backbone = backbone
        self.encoder = encoder
        self.decoder = decoder
        self.queries = queries
        self.assigner = assigner
        self.criterion = criterion
        self.postprocessor = postprocessor
        self.auxiliary = auxiliary
        self.mask_head = mask_head
        self.padding = padding or BatchPadding()
        self.compare_top_k = compare_top_k
        self.compare_detectors = compare_detectors
        self.evaluate_with = evaluate_with
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        check_parts(self)
        # In the order of the config, by which files of version 0.1 number them. They stay when the
        # model is stripped.
        self.query_names = [] if queries is None else list(queries)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def inference_source(self) -> QuerySource:
        """The one query source that is not for training alone; needs a decoder."""
        return self.queries[self.queries.inference]

    @property
    def detectors(self) -> list[str]:
        """Names of all detectors in the model, the decoder first."""
        return detector_names(self)

    @property
    def compared(self) -> list[str]:
        """Kinds of detections that eval mode gives beside ``instances``."""
        if self.evaluate_with is not None:
            return []
        kinds = [TOP_K] if self.compare_top_k else []
        if self.compare_detectors:
            kinds += [name for name in self.detectors if name != DECODER]
        return kinds

    @property
    def predicts_masks(self) -> bool:
        """Whether ``instances`` of eval mode have masks."""
        if self.mask_head is not None:
            return True
        heads = {} if self.auxiliary is None else self.auxiliary.heads
        return self.evaluate_with in heads and reads_masks_of(heads[self.evaluate_with])

    def forward(
        self, batched_inputs: list[dict], counts: StepCounts | None = None
    ) -> dict[str, Tensor] | list[dict]:
        """Detectron2's contract for detectors.

        Args:
            batched_inputs: dicts with ``image`` (3, H, W); in training also ``instances`` with
                ``gt_boxes`` (absolute) and ``gt_classes``; in eval optionally ``height`` and
                ``width`` of the output.
            counts: in training, what `count` gives for all micro-batches of an optimizer step;
                None: this batch is all of it.

        Returns:
            training: weighted losses by name, their sum is the total loss; with ``counts``, what
                this micro-batch contributes to the losses of the step;
            eval: per image ``{"instances": Instances}`` in output resolution, with `DetectedMasks`
                if the model `predicts_masks`; and for every kind that is `compared` an
                ``"instances_<kind>"`` without masks.
        """
        images = self.preprocess(batched_inputs)
        if self.training:
            gt_instances = [entry["instances"] for entry in batched_inputs]
            return self.forward_training(images, gt_instances, counts).losses
        with torch.no_grad():
            one_pass = InferencePass(self, images)
            found = one_pass.detections(self.evaluate_with or DECODER)
            if self.mask_head is not None:
                # A model that takes its padding for a part of the image detects there, too; a mask
                # is that of the part of a box that is left in the end.
                sizes = [tuple(entry["image"].shape[-2:]) for entry in batched_inputs]
                found = one_pass.with_masks(found, sizes)
            detections = {"instances": found}
            for kind in self.compared:
                found = one_pass.detections(kind)
                detections[f"instances_{kind}"] = [boxes_only(instances) for instances in found]
        return [
            {key: in_output_resolution(found[index], entry) for key, found in detections.items()}
            for index, entry in enumerate(batched_inputs)
        ]

    def forward_training(
        self,
        images: ImageBatch,
        gt_instances: list[Instances],
        counts: StepCounts | None = None,
    ) -> TrainingOutput:
        """One forward pass with all losses; ``forward`` returns its ``losses`` only.

        Args:
            images: normalized and padded.
            gt_instances: with ``gt_boxes`` (absolute) and ``gt_classes``, for heads that learn
                masks also ``gt_masks``, on any device. Where they have ``gt_weights``, these
                multiply what each object adds to the losses of queries and to the gradients of
                auxiliary heads (not of RPNs, and not of masks).
            counts: of all micro-batches of the step; None: this batch is all of it.
        """
        gt_masks = [
            instances.gt_masks if instances.has("gt_masks") else None for instances in gt_instances
        ]
        gt_instances = self._training_targets(images, gt_instances)
        memory = self.encode(images)
        geometry = memory.levels.images
        # Not in the precision of the memory: half precision would move boxes by pixels.
        dtype = torch.promote_types(memory.tokens.dtype, torch.float32)
        truth = [
            GroundTruth(
                instances.gt_classes,
                normalize_boxes(instances.gt_boxes.tensor.to(dtype), factor),
                factor,
                instances.gt_weights if instances.has("gt_weights") else None,
            )
            for instances, factor in zip(gt_instances, geometry.factors, strict=True)
        ]
        groups = [
            group
            for source in (() if self.queries is None else self.queries.values())
            for group in source.training_groups(memory, truth, counts)
        ]
        branch = AuxiliaryBranch({}, [])
        if self.auxiliary is not None:
            branch = self.auxiliary(images, memory, gt_instances, counts)
        groups = groups + branch.groups
        predictions, assignment, losses = [], Assignment([], {}), {}
        if self.decoder is not None:
            query_set = QuerySet.concat(groups)
            predictions = query_set.split(self.decoder(query_set, memory))
            assignment = assign_targets(groups, predictions, truth, self.assigner, self.num_classes)
            losses = score_groups(groups, predictions, assignment, geometry, self.criterion, counts)
        for name, output in branch.outputs.items():
            losses.update({f"{name}.{key}": value for key, value in output.losses.items()})
        if self.mask_head is not None:
            proposals = self._proposals(groups, predictions)
            of_masks = self.mask_head.losses(memory, proposals, gt_instances, gt_masks, counts)
            losses.update({f"mask_head.{key}": value for key, value in of_masks.items()})
        return TrainingOutput(
            losses,
            memory,
            groups,
            predictions,
            assignment.groups,
            assignment.proposals,
            branch.outputs,
        )

    def _proposals(self, groups: list[QueryGroup], predictions: list[Predictions]) -> Predictions:
        """The last layer's predictions for the queries of inference and those that see them, which
        are denoising queries."""
        name = self.queries.inference
        chosen = [
            predicted
            for group, predicted in zip(groups, predictions, strict=True)
            if group.name == name or name in group.sees
        ]
        return Predictions(
            torch.cat([part.logits[-1:] for part in chosen], dim=2),
            torch.cat([part.boxes[-1:] for part in chosen], dim=2),
        )

    def preprocess(self, batched_inputs: list[dict]) -> ImageBatch:
        """Normalizes the images and pads them to a common size; see `BatchPadding`."""
        device = self.device
        images = [to_device(entry["image"], device) for entry in batched_inputs]
        backbone = self.backbone
        return self.padding(
            images,
            self.pixel_mean,
            self.pixel_std,
            divisibility=backbone.size_divisibility,
            constraints=backbone.padding_constraints,
        )

    def encode(self, images: ImageBatch) -> EncoderMemory:
        """Backbone and encoder, of images that are normalized and padded."""
        return self.encoder(list(self.backbone(images.tensor).values()), images.geometry)

    def decode(self, memory: EncoderMemory) -> tuple[Tensor, Tensor]:
        """Logits ``(B, Q, K)`` and normalized boxes ``(B, Q, 4)`` of the last layer."""
        predictions = self.decoder(QuerySet.concat([self.inference_source(memory)]), memory)
        return predictions.logits[-1], predictions.boxes[-1]

    @torch.no_grad()
    def count(self, batched_inputs: list[dict], with_heads: bool = True) -> StepCounts:
        """Counts what the losses of one micro-batch are divided by, for `StepCounts.join`.

        Args:
            batched_inputs: as for training.
            with_heads: whether backbone, encoder and auxiliary heads run where these assign by what
                they predict. For the same assignment as in training, the generators have to be in
                the same state (dropout). Batch norms that learn update their statistics in both.
        """
        gt_instances = [entry["instances"] for entry in batched_inputs]
        heads = {}
        if self.auxiliary is not None:
            images = self.preprocess(batched_inputs)
            truth = self._training_targets(images, gt_instances)
            heads = self.auxiliary.count_without_memory(images, truth)
            if with_heads and self.auxiliary.counts_need_memory:
                heads |= self.auxiliary.count(images, self.encode(images), truth)
        return StepCounts([len(instances) for instances in gt_instances], heads)

    def _training_targets(
        self, images: ImageList, gt_instances: list[Instances]
    ) -> list[Instances]:
        """What training reads of the ground truth.

        Other fields are left out: heads would index them again and again. The sizes are those of
        the network input, which may count padding in.
        """
        device, auxiliary, truths = self.device, self.auxiliary, []
        for size, instances in zip(images.image_sizes, gt_instances, strict=True):
            truth = Instances(tuple(size))
            truth.gt_boxes = Boxes(to_device(instances.gt_boxes.tensor, device))
            truth.gt_classes = to_device(instances.gt_classes, device)
            if instances.has("gt_weights"):
                truth.gt_weights = to_device(instances.gt_weights, device)
            if instances.has("gt_masks") and auxiliary is not None and auxiliary.reads_masks:
                masks = instances.gt_masks
                is_bitmap = isinstance(masks, BitMasks)
                truth.gt_masks = BitMasks(to_device(masks.tensor, device)) if is_bitmap else masks
            truths.append(truth)
        return truths

    def compile_layers(self, **options) -> None:
        """Compiles every encoder and decoder layer in place with ``torch.compile(**options)``.

        Parameter names stay as they are. Layers and not the whole: matching, sampling of
        proposals and image sizes that change with every batch would break the graph.
        """
        decoder_layers = [] if self.decoder is None else self.decoder.layers
        for layer in [*self.encoder.layers, *decoder_layers]:
            layer.compile(**options)

    def strip_auxiliary(self) -> None:
        """Removes all that only training uses; detections of the decoder stay bit-identical.

        The decoder is then the only one of the `detectors` that is left, whatever
        ``evaluate_with`` was.

        Raises:
            ConfigError: without a decoder nothing would be left.
        """
        if self.decoder is None:
            raise ConfigError(
                "model.decoder is null: this model detects with its auxiliary head "
                f"{self.evaluate_with}, which cannot be stripped."
            )
        self.auxiliary = self.evaluate_with = None
        self.queries.strip()


OF_DECODER = ("queries", "assigner", "criterion", "postprocessor")


def check_parts(model: nn.Module) -> None:
    """Looks over a complete ``CoDETR``.

    Raises:
        ConfigError: if parts disagree on ``num_classes`` or strides, no single inference source
            exists, ``evaluate_with`` cannot be done, ``merged`` or ``cascade`` need what is not
            there, or the decoder is left out by half.
    """
    _check_class_counts(model)
    _check_strides(model)
    check_detectors(model)
    _check_mask_head(model)
    if model.decoder is None:
        _check_without_decoder(model)
        return
    missing = [name for name in OF_DECODER if getattr(model, name) is None]
    if missing:
        raise ConfigError(
            f"model.{missing[0]} is null but model.decoder is not: set it, or the decoder to null."
        )
    if model.evaluate_with is not None:
        _check_evaluated_detector(model)


def _check_class_counts(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if path.startswith("backbone"):
            continue  # an image classifier's own class count means nothing here
        found = getattr(module, "num_classes", model.num_classes)
        if found != model.num_classes:
            raise ConfigError(
                f"model.{path} is built for {found} classes but model.num_classes is "
                f"{model.num_classes}; let it interpolate ${{model.num_classes}}."
            )


def _check_strides(model: nn.Module) -> None:
    strides = getattr(model.encoder, "strides", None)
    if strides is None:
        return
    given = [shape.stride for shape in model.backbone.output_shape().values()]
    if list(strides) != given:
        raise ConfigError(
            f"model.encoder measures images in cells of {list(strides)} pixels, but the maps of "
            f"model.backbone have the strides {given}: give it these, or null."
        )


def _check_mask_head(model: nn.Module) -> None:
    if model.mask_head is None:
        return
    if model.decoder is None:
        raise ConfigError(
            "model.mask_head learns from what a decoder proposes, but model.decoder is null: set "
            "model.mask_head=null, too."
        )
    given = [shape.stride for shape in model.backbone.output_shape().values()]
    if len(given) == 1:
        raise ConfigError(
            f"model.mask_head needs maps of several strides, but this encoder has one, of stride "
            f"{given[0]}: take a model with a deformable encoder."
        )
    if model.mask_head.strides != given:
        raise ConfigError(
            f"model.mask_head.strides={model.mask_head.strides}, but the encoder's maps have the "
            f"strides {given}: give it these."
        )


def _check_without_decoder(model: nn.Module) -> None:
    for name in OF_DECODER:
        if getattr(model, name) is not None:
            raise ConfigError(f"model.decoder is null: set model.{name}=null, too.")
    if model.auxiliary is not None and len(model.auxiliary.positive_queries):
        raise ConfigError(
            "model.decoder is null: set model.auxiliary.positive_queries=null, nothing would "
            "decode them."
        )
    if model.evaluate_with is None:
        raise ConfigError(
            "model.decoder is null: name the auxiliary head that detects in model.evaluate_with."
        )
    _check_evaluated_detector(model)


def _check_evaluated_detector(model: nn.Module) -> None:
    require_detector(model, model.evaluate_with)
    if model.compare_top_k:
        raise ConfigError(
            "model.compare_top_k compares detections of the decoder: set it to false, or "
            "model.evaluate_with to null."
        )

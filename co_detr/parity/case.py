"""A golden case of the reference, and the model of ours that it describes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

from co_detr.checkpoint import convert_official
from co_detr.modeling import CoDETR
from co_detr.modeling.resnet import resnet_stages

CONFIGS = Path(__file__).parents[2] / "configs" / "models"


@dataclass(frozen=True)
class Case:
    """One file; a variant takes weights, inputs and eval entries of its base case.

    Attributes:
        own: the entries of the file itself, which must be accounted for.
        base: the file's content completed by its base case.
    """

    path: Path
    own: dict
    base: dict

    @classmethod
    def load(cls, path: Path) -> Case:
        """Reads a file and, if ``meta.base_case`` says so, the base beside it.

        Raises:
            FileNotFoundError: naming the missing base file.
        """
        own = torch.load(path, weights_only=True)
        name = own["meta"].get("base_case")
        if name is None:
            return cls(path, own, own)
        base_path = path.parent / f"case_{name}.pt"
        if not base_path.exists():
            raise FileNotFoundError(f"{path} builds on {base_path}, which does not exist.")
        return cls(path, own, torch.load(base_path, weights_only=True))

    @property
    def kind(self) -> str:
        return self.own["meta"]["kind"]

    @property
    def num_classes(self) -> int:
        return self.own["meta"]["num_classes"]

    def images(self, dtype: torch.dtype) -> ImageList:
        """The padded network input; sizes are those of the variant itself."""
        sizes = [tuple(size) for size in self.own["image_sizes_hw"]]
        return ImageList(self.base["batch"].to(dtype), sizes)

    def ground_truth(self, dtype: torch.dtype) -> list[Instances]:
        return [
            Instances(tuple(size), gt_boxes=Boxes(boxes.to(dtype)), gt_classes=labels)
            for size, boxes, labels in zip(
                self.own["image_sizes_hw"],
                self.own["gt_boxes_xyxy"],
                self.own["gt_labels"],
                strict=True,
            )
        ]

    def build(self, padding: str) -> CoDETR:
        """Our model with the widths of the case's ``state_dict`` and its weights.

        Args:
            padding: how short groups of positive queries are filled.
        """
        weights, meta = self.base["state_dict"], self.own["meta"]
        transformer = "query_head.transformer"
        model = LazyConfig.load(str(CONFIGS / "deformable_detr.py")).model
        model.auxiliary = LazyConfig.load(str(CONFIGS / "auxiliary.py")).auxiliary
        model.num_classes = meta["num_classes"]
        model.encoder.embed_dim = meta["embed_dims"]
        model.encoder.num_layers = meta["enc_layers"]
        model.encoder.feedforward_dim = weights[
            f"{transformer}.encoder.layers.0.ffns.0.layers.0.0.bias"
        ].numel()
        model.encoder.num_levels = len(weights[f"{transformer}.level_embeds"])
        model.decoder.num_layers = meta["dec_layers"]
        model.queries[0].num_queries = meta["num_query"]
        model.auxiliary.positive_queries.padding = padding
        model.auxiliary.roi.roi_heads.box_head.fc_dims = [
            weights[f"roi_head.0.bbox_head.shared_fcs.{i}.bias"].numel() for i in (0, 1)
        ]
        stem = weights["backbone.conv1.weight"].shape[0]
        bottom_up = model.backbone.bottom_up
        bottom_up.stem.out_channels = stem
        bottom_up.stages = L(resnet_stages)(
            depth=_resnet_depth(weights),
            stem_channels=stem,
            res2_channels=weights["backbone.layer1.0.conv3.weight"].shape[0],
        )
        built = instantiate(model)
        built.load_state_dict(convert_official(weights, built).state_dict, strict=True)
        return built


def _resnet_depth(weights: dict[str, Tensor]) -> int:
    blocks = sum(
        key.startswith("backbone.layer3.") and key.endswith("conv1.weight") for key in weights
    )
    return {6: 50, 23: 101, 36: 152}[blocks]

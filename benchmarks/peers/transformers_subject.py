"""Deformable-DETR of Hugging Face's transformers as a subject; nothing is downloaded."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
    ResNetConfig,
)

from benchmarks.step.case import NUM_CLASSES, Case, synthetic_images
from benchmarks.step.contestants import Contestant


class TransformersSubject:
    """Two-stage with box refinement, ResNet-50, 300 queries, random weights of seed 0.

    Its loss has no term for the encoder's proposals. Its own freezing rule misses the names of its
    own ResNet and freezes all of it; here the stem and the first stage are frozen, as everywhere.
    """

    def __init__(self, contestant: Contestant, case: Case):
        sizes = {}
        if contestant.wide:
            sizes = {"encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048}
            sizes |= {"auxiliary_loss": True, "dropout": 0.0}
        torch.manual_seed(0)
        self.model = DeformableDetrForObjectDetection(
            DeformableDetrConfig(
                use_timm_backbone=False,
                backbone_config=ResNetConfig(out_features=["stage2", "stage3", "stage4"]),
                two_stage=True,
                with_box_refine=True,
                two_stage_num_proposals=300,
                num_labels=NUM_CLASSES,
                **sizes,
            )
        ).to(case.device)
        for name, parameter in self.model.model.backbone.model.named_parameters():
            parameter.requires_grad_("embedder" not in name and "stages.0." not in name)
        self.processor = DeformableDetrImageProcessor()
        self.sizes = [(case.height, case.width)] * case.batch
        images = synthetic_images(case)
        pixels = torch.stack([image.pixels for image in images])
        mean, std = pixels.mean(dim=(0, 2, 3)), pixels.std(dim=(0, 2, 3))
        self.pixels = ((pixels - mean[:, None, None]) / std[:, None, None]).to(case.device)
        self.mask = torch.ones(
            case.batch, case.height, case.width, dtype=torch.long, device=case.device
        )
        extent = torch.tensor([case.width, case.height] * 2)
        self.labels = []
        for image in images:
            low, high = (image.boxes / extent).chunk(2, dim=1)
            boxes = torch.cat([(low + high) / 2, high - low], dim=1)
            self.labels.append(
                {"class_labels": image.classes.to(case.device), "boxes": boxes.to(case.device)}
            )

    def loss(self) -> Tensor:
        return self.model(pixel_values=self.pixels, pixel_mask=self.mask, labels=self.labels).loss

    def detect(self) -> int:
        outputs = self.model(pixel_values=self.pixels, pixel_mask=self.mask)
        found = self.processor.post_process_object_detection(
            outputs, threshold=0.0, target_sizes=self.sizes, top_k=100
        )
        return sum(len(detections["scores"]) for detections in found)

    def optimizer(self) -> torch.optim.Optimizer:
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trainable, lr=2e-4, weight_decay=1e-4)

"""This project's models as subjects, and the decoder that the reference's order would need."""

from __future__ import annotations

from dataclasses import replace

import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from benchmarks.step.case import NUM_CLASSES, Case, synthetic_images
from benchmarks.step.contestants import Contestant
from co_detr.engine.config import load_config
from co_detr.structures import EncoderMemory, Predictions, QuerySet


class CoDETRSubject:
    """A config of this project with the initial weights of seed 0."""

    def __init__(self, contestant: Contestant, case: Case):
        overrides = [f"model.num_classes={NUM_CLASSES}", f"train.device={case.device}"]
        overrides += contestant.overrides
        self.cfg = load_config(str(contestant.config_file()), overrides)
        torch.manual_seed(0)
        # Not by helpers of the package: it may be that of another commit, which lacks them.
        self.model = instantiate(self.cfg.model).to(case.device)
        if contestant.sequential:
            self.model.decoder = SequentialDecoder(self.model.decoder)
        self.batch = []
        for image in synthetic_images(case):
            instances = Instances((case.height, case.width))
            instances.gt_boxes = Boxes(image.boxes)
            instances.gt_classes = image.classes
            # Pixels as the data mapper gives them: a quarter of the bytes to copy to a GPU.
            self.batch.append({"image": image.pixels.byte(), "instances": instances})

    def loss(self) -> Tensor:
        with EventStorage():
            return sum(self.model(self.batch).values())

    def detect(self) -> int:
        return sum(len(result["instances"]) for result in self.model(self.batch))

    def optimizer(self) -> torch.optim.Optimizer:
        self.cfg.optimizer.params.model = self.model
        return instantiate(self.cfg.optimizer)


class SequentialDecoder(nn.Module):
    """Decodes one query group after the other, as the reference implementation does.

    Equal to the single pass up to rounding. Expects groups without masked slots, which is what
    ``padding="negatives"`` makes whenever there is enough background.
    """

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder = decoder

    def forward(self, queries: QuerySet, memory: EncoderMemory) -> Predictions:
        parts = zip(
            queries.content.split(queries.sizes, dim=1),
            queries.position.split(queries.sizes, dim=1),
            queries.reference.split(queries.sizes, dim=1),
            strict=True,
        )
        decoded = [
            self.decoder(
                replace(
                    queries,
                    content=content,
                    position=position,
                    reference=reference,
                    attend_mask=None,
                    sizes=[content.shape[1]],
                ),
                memory,
            )
            for content, position, reference in parts
        ]
        return Predictions(
            torch.cat([predictions.logits for predictions in decoded], dim=2),
            torch.cat([predictions.boxes for predictions in decoded], dim=2),
        )

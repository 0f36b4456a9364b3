"""Turns Deformable-DETR++ or Co-Deformable-DETR into what they are compared with, in place."""

import copy

from detectron2.config import LazyCall as L

from co_detr.modeling.auxiliary import HybridAssignmentHeads
from co_detr.modeling.queries import HybridMatchingQueries, LearnedQueries


def single_stage(model):
    """Deformable-DETR without its two additions: learned queries, and no refinement of boxes."""
    model.queries.matching = L(LearnedQueries)(
        num_queries=model.queries.matching.num_queries, embed_dim="${...encoder.embed_dim}"
    )
    # Learned queries have positions of their own.
    model.decoder.update(
        look_forward_twice=False, refine_boxes=False, from_points=True, query_position=None
    )


def hybrid_matching(model, num_extra=1500, repeats=6):
    """H-Deformable-DETR: more queries, matched to repeated ground truths, in training."""
    model.queries.matching._target_ = HybridMatchingQueries
    model.queries.matching.update(num_extra=num_extra, repeats=repeats, loss_weight=1.0)


def query_groups(model, count=11):
    """Group-DETR: `count` groups, matched one by one; the first one is that of inference."""
    for index in range(1, count):
        group = copy.deepcopy(model.queries.matching)
        group.training_only = True
        model.queries[f"group{index}"] = group


def head_on_encoder(model, name):
    """The auxiliary head `name` in place of the decoder, with the weights of its own paper."""
    model.update(decoder=None, queries=None, assigner=None, criterion=None, postprocessor=None)
    for other in set(HybridAssignmentHeads.head_names(model.auxiliary)) - {name}:
        model.auxiliary.pop(other)
    model.auxiliary.update(positive_queries=None, num_decoder_layers=1, lambda_2=1.0)
    model.evaluate_with = name

"""Names that parts had in earlier versions.

A finished training keeps a `config.yaml` with the dotted names of what its run was built from. When
a class or a function that a config may name moves, its old name goes into this table.
"""

from __future__ import annotations

# Old dotted name of a module, class or function -> the new one. What lies below moves with it.
MOVED: dict[str, str] = {
    "co_detr.data.augmentation": "co_detr.data.mapper",
    "co_detr.data.lvis": "co_detr.data.lvis_objects365",
    "co_detr.data.objects365": "co_detr.data.lvis_objects365",
    "co_detr.engine.evaluation.CocoBoxEvaluator": "co_detr.engine.evaluators.CocoBoxEvaluator",
    "co_detr.engine.lvis_evaluation": "co_detr.engine.evaluators",
}


def present_name(name: str) -> str:
    """What a dotted name of an earlier version is called now; any other name as it is."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if (prefix := ".".join(parts[:length])) in MOVED:
            return ".".join([MOVED[prefix], *parts[length:]])
    return name

"""Co-DETR: DETR detectors trained with collaborative hybrid assignments, on Detectron2."""

__version__ = "0.1.0"

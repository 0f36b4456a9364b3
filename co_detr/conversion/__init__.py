"""YOLO and VOC folders as COCO-format files.

Reading both formats is own code on PyYAML and the standard library: the converters in packages
(globox, supervision, datumaro) read image sizes without the EXIF orientation, pass over class ids
that do not exist or images without a label file, or bring half a gigabyte along.
"""

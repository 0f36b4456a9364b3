"""YOLO and VOC folders as COCO-format files.

Reading both formats is own code on PyYAML and the standard library. Of the packages that do it,
globox 2.9 reads image sizes without the EXIF orientation, drops images without a label file and
keeps class numbers that do not exist; supervision 0.31 takes folders but no lists of images,
forgets which objects are difficult, and brings 100 MB of video codecs; datumaro 1.13 needs an older
Pillow.
"""

"""The table of models: one `ZooEntry` per config but for baselines and ablations.

Most are those of the reference's model zoo: its configs, its results and where its weights are.
Source: README and ``projects/configs`` of https://github.com/Sense-X/Co-DETR.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

# Where the authors' page links the weights. These are pages for a browser, not files.
CO_DEFORMABLE_FOLDER = (
    "https://drive.google.com/drive/folders/1asWoZ3SuM6APTL9D-QUF_YW9mjULNdh9?usp=sharing"
)
CO_DINO_FOLDER = (
    "https://drive.google.com/drive/folders/1nAXOkzqrEgz-YnXxIEs4d5j9li_kmrnv?usp=sharing"
)
VIT_PAGE = "https://huggingface.co/zongzhuofan"
VIT_URL = "hf://zongzhuofan/co-detr-vit-large-{}/pytorch_model.pth"

TEST_ONLY = "official config is for testing only"
UNRELEASED = f"{TEST_ONLY}, no weights"
VIT_BACKBONE = "304 (backbone)"


@dataclass(frozen=True)
class ZooEntry:
    """One model.

    Attributes:
        name: of the file below ``configs``, without ``.py``.
        summary: what it is, in a few words.
        official_config: its counterpart below ``projects/configs`` of the reference; None: ours.
        ap: box AP (0 to 100) on the val set of ``dataset`` that the reference reports; None: none
            reported.
        dataset: what the model detects the classes of.
        parameters: published number of parameters in millions, with what it counts; "": none.
        note: how the config differs from the official one, or what that one leaves open.
        checkpoint: file name of the released weights; None: none released.
        page: where a person can fetch that file.
        url: where a program can fetch it (see `co_detr.checkpoint.fetching`); None: only by hand.
        sha256: of the file, in hexadecimal; None: not known, or told by the hub.
        package: that the model needs beside those of every installation.
    """

    name: str
    summary: str
    official_config: str | None = None
    ap: float | None = None
    dataset: str = "COCO"
    parameters: str = ""
    note: str = ""
    checkpoint: str | None = None
    page: str | None = None
    url: str | None = None
    sha256: str | None = None
    package: str | None = None

    def __post_init__(self) -> None:
        if self.sha256 is not None and self.url is None:
            raise ValueError(f"{self.name}: a sha256 needs a url")
        if (self.checkpoint is None) != (self.page is None):
            raise ValueError(f"{self.name}: a checkpoint needs a page, and a page a checkpoint")


def _co_deformable(
    name: str, summary: str, official: str, ap: float, parameters: str = ""
) -> ZooEntry:
    return ZooEntry(
        name,
        f"Co-Deformable-DETR, {summary}",
        official_config=f"co_deformable_detr/co_deformable_detr_{official}_coco.py",
        ap=ap,
        parameters=parameters,
        checkpoint=f"co_deformable_detr_{official}_coco.pth",
        page=CO_DEFORMABLE_FOLDER,
    )


def _co_dino(
    name: str,
    summary: str,
    official: str,
    ap: float | None,
    *,
    dataset: str = "COCO",
    parameters: str = "",
    note: str = "",
    page: str = CO_DINO_FOLDER,
    url: str | None = None,
    sha256: str | None = None,
) -> ZooEntry:
    return ZooEntry(
        name,
        f"Co-DINO, {summary}",
        official_config=official,
        ap=ap,
        dataset=dataset,
        parameters=parameters,
        note=note,
        # Weights come with every result, under the name of the config.
        checkpoint=None if ap is None else f"{PurePosixPath(official).stem}.pth",
        page=None if ap is None else page,
        url=url,
        sha256=sha256,
    )


# Of the reference's model zoo.
RELEASED = (
    _co_deformable("co_detr_r50", "ResNet-50, 12 epochs", "r50_1x", 49.5, "65.1"),
    _co_deformable("co_deformable_detr_swin_t_12ep", "Swin-T, 12 epochs", "swin_tiny_1x", 51.7),
    _co_deformable("co_deformable_detr_swin_t_36ep", "Swin-T, 36 epochs", "swin_tiny_3x", 54.1),
    _co_deformable("co_deformable_detr_swin_s_12ep", "Swin-S, 12 epochs", "swin_small_1x", 53.4),
    _co_deformable("co_deformable_detr_swin_s_36ep", "Swin-S, 36 epochs", "swin_small_3x", 55.3),
    _co_deformable("co_deformable_detr_swin_b_12ep", "Swin-B, 12 epochs", "swin_base_1x", 55.5),
    _co_deformable("co_deformable_detr_swin_b_36ep", "Swin-B, 36 epochs", "swin_base_3x", 57.5),
    _co_deformable("co_deformable_detr_swin_l_12ep", "Swin-L, 12 epochs", "swin_large_1x", 56.9),
    _co_deformable(
        "co_deformable_detr_swin_l_900q_36ep",
        "Swin-L, 900 queries, 36 epochs",
        "swin_large_900q_3x",
        58.5,
    ),
    _co_dino(
        "co_dino_r50",
        "ResNet-50, 12 epochs",
        "co_dino/co_dino_5scale_r50_1x_coco.py",
        52.1,
        parameters="65.2",
    ),
    _co_dino(
        "co_dino_r50_lsj_12ep",
        "ResNet-50, LSJ, 12 epochs",
        "co_dino/co_dino_5scale_lsj_r50_1x_coco.py",
        52.1,
    ),
    _co_dino(
        "co_dino_r50_9enc_lsj_12ep",
        "9 encoder layers, ResNet-50, LSJ, 12 epochs",
        "co_dino/co_dino_5scale_9encoder_lsj_r50_1x_coco.py",
        52.6,
    ),
    _co_dino(
        "co_dino_r50_lsj_36ep",
        "ResNet-50, LSJ, 36 epochs",
        "co_dino/co_dino_5scale_lsj_r50_3x_coco.py",
        54.8,
    ),
    _co_dino(
        "co_dino_r50_9enc_lsj_36ep",
        "9 encoder layers, ResNet-50, LSJ, 36 epochs",
        "co_dino/co_dino_5scale_9encoder_lsj_r50_3x_coco.py",
        55.4,
    ),
    _co_dino(
        "co_dino_swin_l_12ep",
        "Swin-L, 12 epochs",
        "co_dino/co_dino_5scale_swin_large_1x_coco.py",
        58.9,
    ),
    _co_dino(
        "co_dino_swin_l_24ep",
        "Swin-L, 24 epochs",
        "co_dino/co_dino_5scale_swin_large_2x_coco.py",
        59.8,
    ),
    _co_dino(
        "co_dino_swin_l_36ep",
        "Swin-L, 36 epochs",
        "co_dino/co_dino_5scale_swin_large_3x_coco.py",
        60.0,
    ),
    _co_dino(
        "co_dino_swin_l_lsj_12ep",
        "Swin-L, LSJ, 12 epochs",
        "co_dino/co_dino_5scale_lsj_swin_large_1x_coco.py",
        59.3,
    ),
    _co_dino(
        "co_dino_swin_l_lsj_24ep",
        "Swin-L, LSJ, 24 epochs",
        "co_dino/co_dino_5scale_lsj_swin_large_2x_coco.py",
        60.4,
    ),
    _co_dino(
        "co_dino_swin_l_lsj_36ep",
        "Swin-L, LSJ, 36 epochs",
        "co_dino/co_dino_5scale_lsj_swin_large_3x_coco.py",
        60.7,
    ),
    _co_dino(
        "co_dino_swin_l_o365_16ep",
        "Swin-L, from Objects365, 16 epochs",
        "co_dino/co_dino_5scale_swin_large_16e_o365tococo.py",
        64.1,
    ),
    _co_dino(
        "co_dino_vit_l_o365_12ep",
        "ViT-L, from Objects365, 12 epochs",
        "co_dino_vit/co_dino_5scale_vit_large_coco.py",
        65.9,
        parameters=VIT_BACKBONE,
        note="batch size is not official",
        page=VIT_PAGE,
        url=VIT_URL.format("coco"),
        sha256="733d2ccde180a55151a68a6cab7c9f42b117d24d38d6197b37caf3189243256c",
    ),
    _co_dino(
        "co_dino_vit_l_o365_instance_12ep",
        "ViT-L, boxes and masks, from Objects365, 12 epochs",
        "co_dino_vit/co_dino_5scale_vit_large_coco_instance.py",
        65.8,
        parameters=VIT_BACKBONE,
        note="mask AP 56.6; batch size is not official",
        page=VIT_PAGE,
        url=VIT_URL.format("coco-instance"),
    ),
    _co_dino(
        "co_dino_r50_lvis_12ep",
        "ResNet-50, 12 epochs",
        "co_dino/co_dino_5scale_r50_1x_lvis.py",
        None,
        dataset="LVIS",
        note=UNRELEASED,
    ),
    _co_dino(
        "co_dino_r50_lsj_lvis_12ep",
        "ResNet-50, LSJ, 12 epochs",
        "co_dino/co_dino_5scale_lsj_r50_1x_lvis.py",
        None,
        dataset="LVIS",
        note=UNRELEASED,
    ),
    _co_dino(
        "co_dino_swin_l_lsj_lvis_36ep",
        "Swin-L, LSJ, 36 epochs",
        "co_dino/co_dino_5scale_lsj_swin_large_3x_lvis.py",
        56.9,
        dataset="LVIS",
        note=f"{TEST_ONLY}; the same model as in co_dino_5scale_swin_large_3x_lvis.py",
    ),
    _co_dino(
        "co_dino_swin_l_o365_lsj_lvis_16ep",
        "Swin-L, from Objects365, LSJ, 16 epochs",
        "co_dino/co_dino_5scale_swin_large_16e_o365tolvis.py",
        64.5,
        dataset="LVIS",
        note=TEST_ONLY,
    ),
    _co_dino(
        "co_dino_vit_l_o365_lsj_lvis_16ep",
        "ViT-L, from Objects365, LSJ, 16 epochs",
        "co_dino_vit/co_dino_5scale_lsj_vit_large_lvis.py",
        68.0,
        dataset="LVIS",
        parameters=VIT_BACKBONE,
        note=TEST_ONLY,
        page=VIT_PAGE,
        url=VIT_URL.format("lvis"),
    ),
    _co_dino(
        "co_dino_vit_l_o365_lsj_lvis_instance_16ep",
        "ViT-L, boxes and masks, from Objects365, LSJ, 16 epochs",
        "co_dino_vit/co_dino_5scale_lsj_vit_large_lvis_instance.py",
        67.3,
        dataset="LVIS",
        parameters=VIT_BACKBONE,
        note=f"mask AP 60.7; {TEST_ONLY}",
        page=VIT_PAGE,
        url=VIT_URL.format("lvis-instance"),
    ),
    ZooEntry(
        "co_dino_swin_l_objects365",
        "Co-DINO, Swin-L, the checkpoint that fine-tuning starts from",
        dataset="Objects365",
        note="no official config; for testing only",
        checkpoint="co_dino_5scale_swin_large_22e_o365.pth",
        page=CO_DINO_FOLDER,
    ),
)


_OUR_OWN = (
    ZooEntry("co_detr_r50_atss", "Co-Deformable-DETR, ResNet-50, ATSS head alone, 12 epochs"),
    ZooEntry("co_detr_r50_k6", "Co-Deformable-DETR, ResNet-50, six auxiliary heads, 12 epochs"),
    ZooEntry(
        "co_detr_convnext_t",
        "Co-Deformable-DETR, ConvNeXt-T of timm, 12 epochs",
        package="timm",
    ),
    ZooEntry("co_detr_r50_mask_rcnn", "Co-Deformable-DETR, ResNet-50, Mask R-CNN head, 12 epochs"),
    ZooEntry("co_detr_r50_instance", "Co-Deformable-DETR, ResNet-50, masks, 12 epochs"),
    ZooEntry("co_dino_r50_instance", "Co-DINO-Inst, ResNet-50, boxes and masks, 12 epochs"),
    ZooEntry("co_dino_vit_l_o365_finetune", "Co-DINO, ViT-L, from Objects365 to data of your own"),
    ZooEntry("deformable_detr_r50", "Deformable-DETR++, ResNet-50, no auxiliary heads, 12 epochs"),
    ZooEntry(
        "co_conditional_detr_r50", "Co-Conditional-DETR-C5, ResNet-50, ROI and ATSS, 50 epochs"
    ),
    ZooEntry("co_dab_detr_r50", "Co-DAB-DETR-C5, ResNet-50, ROI and ATSS heads, 50 epochs"),
    ZooEntry(
        "conditional_detr_r50", "Conditional-DETR-C5, ResNet-50, no auxiliary heads, 50 epochs"
    ),
    ZooEntry("dab_detr_r50", "DAB-DETR-C5, ResNet-50, no auxiliary heads, 50 epochs"),
    ZooEntry("co_detr_small", "small Co-Deformable-DETR for your own data on a CPU, from scratch"),
    ZooEntry("co_detr_thin_r50", "small Co-Deformable-DETR for small data sets, thin ResNet-50"),
    ZooEntry(
        "quickstart", "small Co-Deformable-DETR for the digits, from scratch", dataset="digits"
    ),
    ZooEntry(
        "quickstart_k6", "small Co-Deformable-DETR with six auxiliary heads", dataset="digits"
    ),
    ZooEntry("quickstart_masks", "small Co-Deformable-DETR with masks", dataset="digits"),
    ZooEntry("quickstart_co_dino", "small Co-DINO for the digits, from scratch", dataset="digits"),
)

ZOO: dict[str, ZooEntry] = {entry.name: entry for entry in (*RELEASED, *_OUR_OWN)}

"""Any backbone of the package timm (PyTorch Image Models), and how its weights want their images.

timm is optional and is imported where it is needed. It knows a few hundred families: ConvNeXt,
EfficientNet, Swin V2, plain transformers with the weights of DINOv2, DINOv3, CLIP and others.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from co_detr.errors import CheckpointError, ConfigError, first_line

logger = logging.getLogger(__name__)

ADDRESS = "timm://"  # what train.init_checkpoint begins with for weights that timm fetches

# Under these licenses a trained model can be passed on without a look at the weights it began with.
_PERMISSIVE = ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause")
# What lets models that were made for images of one size take others: plain transformers, Swin.
_OF_ANY_SIZE = ({"dynamic_img_size": True}, {"strict_img_size": False})


class TimmBackbone(Backbone):
    """A model of timm without its classifier: ``timm.create_model(name, features_only=True)``.

    Its maps are named by their strides, ``c2`` (4) to ``c5`` (32) for most families, for
    `ChannelMapper`. A plain vision transformer has one map, ``last``, for `ViTPyramid`; timm's
    last norm is not applied to it.

    It is built with random weights. Those of timm come in with
    ``train.init_checkpoint=timm://NAME``, so that a resumed run or a prediction fetches nothing.

    Args:
        name: of timm, such as "convnext_tiny.fb_in1k"; what follows the dot are its weights, which
            also decide on the normalization of images, see `pixel_mean`.
        in_channels: of the images.
        out_indices: numbers of the maps, as timm counts them; None: all that timm gives.
        drop_path_rate: of the last block.
        freeze_batch_norm: batch norms keep their statistics, scale and shift, as usual for
            detectors, whose batches are small. Other norms learn.
        size_divisibility: images are padded to multiples of it; None: the largest stride, as many
            models of timm leave out what does not fill a cell.
        activation_checkpointing: in training, compute blocks again in the backward pass instead of
            keeping what is in them.
        model_options: other arguments of the model, as timm names them.

    Raises:
        ConfigError: if timm is not installed or knows no such model or option, maps share a
            stride, or ``size_divisibility`` is no multiple of the largest stride.
    """

    def __init__(
        self,
        *,
        name: str,
        in_channels: int = 3,
        out_indices: Sequence[int] | None = None,
        drop_path_rate: float = 0.0,
        freeze_batch_norm: bool = True,
        size_divisibility: int | None = None,
        activation_checkpointing: bool = False,
        model_options: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.name = name
        self.freeze_batch_norm = freeze_batch_norm
        self._options: dict[str, Any] = {"in_chans": in_channels, **(model_options or {})}
        if out_indices is not None:
            self._options["out_indices"] = tuple(out_indices)
        if drop_path_rate:
            self._options["drop_path_rate"] = drop_path_rate
        self.body = self._create(name)
        if activation_checkpointing:
            self._checkpoint_activations()

        # Swin and its kin give (B, H, W, C).
        self._channels_last = str(getattr(self.body, "output_fmt", "NCHW")).endswith("NHWC")

        strides, channels = self.body.feature_info.reduction(), self.body.feature_info.channels()
        if len(set(strides)) == 1:  # a plain transformer: maps of several blocks, the last counts
            strides, channels, names = strides[-1:], channels[-1:], ["last"]
        else:
            names = [f"c{stride.bit_length() - 1}" for stride in strides]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"maps of timm's {name} have the strides {strides}: choose one of each stride with "
                "out_indices."
            )
        self._out_features = names
        self._out_feature_strides = dict(zip(names, strides, strict=True))
        self._out_feature_channels = dict(zip(names, channels, strict=True))
        self._size_divisibility = size_divisibility or max(strides)
        if self._size_divisibility % max(strides):
            raise ConfigError(
                f"size_divisibility={size_divisibility} of timm's {name} must be a multiple of its "
                f"largest stride, {max(strides)}."
            )

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(
                channels=self._out_feature_channels[name], stride=self._out_feature_strides[name]
            )
            for name in self._out_features
        }

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``(B, in_channels, H, W)`` -> maps ``(B, C, H / stride, W / stride)`` by name."""
        maps = self.body(images)[-len(self._out_features) :]
        if self._channels_last:
            maps = [level_map.permute(0, 3, 1, 2).contiguous() for level_map in maps]
        return dict(zip(self._out_features, maps, strict=True))

    def timm_weights(self, address: str) -> dict[str, Tensor]:
        """What timm's own loader makes of weights: a state dict of this backbone.

        timm renames what was saved otherwise, resizes positions, and spreads the weights of red,
        green and blue over other numbers of channels.

        Args:
            address: ``timm://`` and a name of timm with the same model in front of the dot, whose
                weights are fetched from Hugging Face or its cache; or ``timm://`` and a
                .safetensors file of them.

        Raises:
            CheckpointError: if the weights are of another model, or cannot be fetched or read.
        """
        source = address.removeprefix(ADDRESS)
        is_file = os.path.isfile(source)
        name = self.name if is_file else source
        if name.partition(".")[0] != self.name.partition(".")[0]:
            raise CheckpointError(
                f"{address} has weights of another model than the backbone, which is timm's "
                f"{self.name}: set train.init_checkpoint={ADDRESS}{self.name}."
            )
        if is_file and not source.endswith(".safetensors"):
            raise CheckpointError(
                f"{address} is no .safetensors file: other files can run code while timm reads "
                "them; fetch the model's model.safetensors."
            )
        overlay = {"file": source} if is_file else {}
        try:
            body = self._create(name, pretrained=True, pretrained_cfg_overlay=overlay)
        except ConfigError:
            raise
        except Exception as error:  # of the network, of Hugging Face, of a file that does not fit
            raise CheckpointError(
                f"the weights {address} cannot be loaded ({first_line(error)}): fetch "
                f"model.safetensors of the model by other means and set train.init_checkpoint="
                f'{ADDRESS}PATH, or "" to start from random weights.'
            ) from error
        _tell_license(name)
        return {f"body.{key}": value for key, value in body.state_dict().items()}

    def _create(self, name: str, **weights: Any) -> nn.Module:
        timm = require_timm()
        if not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models(include_tags="." in name))
            hint = f"such as {', '.join(near)}" if near else "which timm.list_models() lists"
            raise ConfigError(
                f"timm {timm.__version__} has no model {name!r}: set the backbone's name to one "
                f"that it has, {hint}."
            )
        kinds = _OF_ANY_SIZE if _pretrained_settings(name).get("fixed_input_size") else ({},)
        for of_any_size in kinds:
            options = {**of_any_size, **self._options, **weights}
            try:
                body = timm.create_model(name, features_only=True, **options)
                break
            except (TypeError, AssertionError) as error:  # for an argument that does not fit
                if not any(key in str(error) for key in of_any_size):
                    raise ConfigError(
                        f"timm's {name} does not take {options} ({first_line(error)}): correct "
                        "model_options, or what else is set of the backbone."
                    ) from error
        else:
            raise ConfigError(
                f"timm's {name} takes images of one size only: choose another backbone."
            )
        if self.freeze_batch_norm:
            body = timm.layers.freeze_batch_norm_2d(body)
        return body

    def _checkpoint_activations(self) -> None:
        if any(isinstance(module, _BatchNorm) for module in self.body.modules()):
            raise ConfigError(
                f"activation_checkpointing of timm's {self.name} would count every batch twice in "
                "the statistics of its batch norms: set freeze_batch_norm=true."
            )
        try:
            # The wrappers of features_only pass it on, or are what has it.
            getattr(self.body, "model", self.body).set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            raise ConfigError(
                f"timm's {self.name} has no activation_checkpointing: set it to false."
            ) from error


def pixel_mean(name: str, in_channels: int = 3) -> list[float]:
    """Mean of each channel, from 0 to 255, with which the weights of timm's `name` were trained."""
    return _of_channels(_pretrained_settings(name)["mean"], in_channels)


def pixel_std(name: str, in_channels: int = 3) -> list[float]:
    """Standard deviation of each channel on the scale of 0 to 255, see `pixel_mean`."""
    return _of_channels(_pretrained_settings(name)["std"], in_channels)


def require_timm() -> ModuleType:
    """The module timm.

    Raises:
        ConfigError: if it is not installed.
    """
    try:
        import timm
        import timm.layers
    except ImportError as error:
        raise ConfigError(
            f"the backbone needs timm, which cannot be imported ({error}): install it with "
            "pip install timm."
        ) from error
    return timm


def _of_channels(of_rgb: Sequence[float], in_channels: int) -> list[float]:
    # timm repeats the filters of red, green and blue for further channels.
    return [255.0 * of_rgb[channel % len(of_rgb)] for channel in range(in_channels)]


def _pretrained_settings(name: str) -> dict[str, Any]:
    settings = require_timm().models.get_pretrained_cfg(name)
    if settings is None:
        raise ConfigError(f"timm has no model with weights {name!r}: correct the backbone's name.")
    return settings.to_dict()


def _tell_license(name: str) -> None:
    license_name = _pretrained_settings(name).get("license") or "not stated"
    if license_name in _PERMISSIVE:
        logger.info("The license of the weights of timm's %s is %s.", name, license_name)
    else:
        logger.warning(
            "The license of the weights of timm's %s is %s: what is trained from them may be bound "
            "to it, too; read it before you use or pass on the model.",
            *(name, license_name),
        )

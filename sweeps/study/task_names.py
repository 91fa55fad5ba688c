"""Titles and measures of the tasks, for pages: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["MEASURES", "TITLES", "Measure"]


@dataclass(frozen=True)
class Measure:
    """How a quality is shown.

    Attributes
    ----------
    name : str
        In `sweeps.study.folder.Result.quality`.
    title : str
        With its unit.
    factor : float
        From the stored value to the unit.
    digits : int
        Behind the point.
    """

    name: str
    title: str
    factor: float
    digits: int


_AGREEMENT = Measure("agreement", "agreement with fp32 %", 100.0, 1)
_ACCURACY = Measure("accuracy", "accuracy %", 100.0, 2)
MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        "lenet5": _ACCURACY,
        "resnet20": _ACCURACY,
        "autoencoder": Measure("mse", "MSE × 1000", 1000.0, 3),
        "crepe": Measure("pitch_accuracy", "pitch accuracy %", 100.0, 2),
        "efficientnet-lite0": _AGREEMENT,
        "mobilenetv2": _AGREEMENT,
        "minilm-l6": _AGREEMENT,
    }
)
TITLES: Mapping[str, str] = MappingProxyType(
    {
        "lenet5": "LeNet-5 (20-50-500-10) on Fashion-MNIST",
        "resnet20": "ResNet-20 for 28×28 images on Fashion-MNIST",
        "autoencoder": "Convolutional autoencoder on Fashion-MNIST",
        "crepe": "CREPE-tiny, the pitch of synthesised tones",
        "efficientnet-lite0": "EfficientNet-Lite0 (ImageNet), the class of crops of photographs",
        "mobilenetv2": "MobileNetV2 (ImageNet), the class of crops of photographs",
        "minilm-l6": "MiniLM-L6, the nearest neighbour of sentences",
    }
)

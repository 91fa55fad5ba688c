"""EfficientNet-Lite0.

Source: TensorFlow's `efficientnet/lite` (2020): EfficientNet-B0 (Tan and Le, ICML 2019, table 1) without
squeeze-and-excitation, with ReLU6, stem and head of fixed width.
"""

from __future__ import annotations

import re

import torch
from torch import nn

__all__ = ["EfficientNetLite0", "own_name"]

_STAGES = (  # expansion, kernel, stride of the first, channels, repeats
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


class _Block(nn.Module):
    """Expand by 1×1 (unless the expansion is 1), depthwise, project by 1×1 without activation."""

    def __init__(self, channels: int, width: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.expands = expansion != 1
        if self.expands:
            self.expand_conv = nn.Conv2d(channels, inner, 1, bias=False)
            self.bn0 = _norm(inner)
        self.pad, padding = _padding(kernel, stride)
        self.depthwise_conv = nn.Conv2d(inner, inner, kernel, stride, padding, groups=inner, bias=False)
        self.bn1 = _norm(inner)
        self.project_conv = nn.Conv2d(inner, width, 1, bias=False)
        self.bn2 = _norm(width)
        self.relu = nn.ReLU6()
        self.has_shortcut = stride == 1 and channels == width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn0(self.expand_conv(x))) if self.expands else x
        y = self.relu(self.bn1(self.depthwise_conv(self.pad(y))))
        y = self.bn2(self.project_conv(y))
        return x + y if self.has_shortcut else y


class EfficientNetLite0(nn.Module):
    """For images of 224², ``(pixel − 127) / 128``."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.pad, padding = _padding(3, 2)
        self.conv_stem = nn.Conv2d(3, 32, 3, 2, padding, bias=False)
        self.bn0 = _norm(32)
        blocks, channels = [], 32
        for expansion, kernel, stride, width, repeats in _STAGES:
            for position in range(repeats):
                blocks.append(_Block(channels, width, expansion, kernel, stride if position == 0 else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.conv_head = nn.Conv2d(channels, 1280, 1, bias=False)
        self.bn1 = _norm(1280)
        self.relu = nn.ReLU6()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(1280, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn0(self.conv_stem(self.pad(x))))
        x = self.relu(self.bn1(self.conv_head(self.blocks(x))))
        return self.fc(self.dropout(self.pool(x).flatten(1)))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def _padding(kernel: int, stride: int) -> tuple[nn.Module, int]:
    """TensorFlow's "same" for even sizes: with stride 2 one zero less in front than behind, which a module of its own adds."""
    if stride == 1:
        return nn.Identity(), kernel // 2
    before, after = (kernel - 2) // 2, (kernel - 1) // 2
    return nn.ZeroPad2d((before, after, before, after)), 0


def own_name(name: str) -> str:
    """A tensor of the published file under the name that it has here: without leading underscores."""
    return re.sub(r"(^|\.)_", r"\1", name)

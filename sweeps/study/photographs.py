"""Crops of the photographs that ship with scikit-learn and scikit-image, split by photograph."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hwsim.errors import InputError, Problem

__all__ = ["CALIBRATION", "TEST", "crops"]

_LEARN, _IMAGE = ("scikit-learn", "sklearn/datasets/images"), ("scikit-image", "skimage/data")
Photograph = tuple[tuple[str, str], str]

CALIBRATION: tuple[Photograph, ...] = (
    (_LEARN, "china.jpg"),
    (_IMAGE, "chelsea.png"),
    (_IMAGE, "rocket.jpg"),
    (_IMAGE, "motorcycle_left.png"),
    (_IMAGE, "coins.png"),
    (_IMAGE, "gravel.png"),
    (_IMAGE, "hubble_deep_field.jpg"),
    (_IMAGE, "clock_motion.png"),
)
TEST: tuple[Photograph, ...] = (
    (_LEARN, "flower.jpg"),
    (_IMAGE, "astronaut.png"),
    (_IMAGE, "coffee.png"),
    (_IMAGE, "camera.png"),
    (_IMAGE, "brick.png"),
    (_IMAGE, "grass.png"),
)
"""No photograph is in both lists."""

SIDES = 160, 224
"""Smallest and largest side of a crop, in pixels."""


def crops(photographs: tuple[Photograph, ...], each: int, seed: int) -> list[NDArray[np.uint8]]:
    """Square crops at random places, of random size, of every photograph.

    Parameters
    ----------
    photographs : tuple
    each : int
        Crops of one photograph.
    seed : int

    Returns
    -------
    list of uint8 array ``[side, side, 3]``
        Of a grey photograph with three equal channels.

    Raises
    ------
    InputError
        A package is not installed: with the command that installs it.
    """
    random = np.random.default_rng(seed)
    found = []
    for photograph in photographs:
        image = _read(photograph)
        for _ in range(each):
            side = int(random.integers(SIDES[0], SIDES[1] + 1))
            top, left = (int(random.integers(0, size - side + 1)) for size in image.shape[:2])
            found.append(image[top : top + side, left : left + side])
    return found


def _read(photograph: Photograph) -> NDArray[np.uint8]:
    from PIL import Image

    (package, folder), name = photograph
    try:
        path = Path(str(metadata.distribution(package).locate_file(f"{folder}/{name}")))
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (metadata.PackageNotFoundError, OSError) as error:
        hint = f"pip install --no-deps {package}"
        raise InputError("photographs", Problem(name, f"cannot be read: {error}", hint)) from None

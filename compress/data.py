"""Images to train and to calibrate on: Fashion-MNIST wherever it can be had, scikit-learn's digits where it
cannot.

Nothing is loaded without a check: an IDX file must have the right magic number, sizes and length, and what
claims to be Fashion-MNIST must have its checksums.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import urllib.request
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hwsim.errors import HwsimError, InputError, Problem, nearest_name
from hwsim.files import write_atomically

__all__ = ["BY_NAME", "DATASETS", "Dataset", "balanced_subset", "load_dataset", "parse_idx"]

BY_NAME = ("digits", "fashion-mnist")
DATASETS = (*BY_NAME, "idx")
"""The last needs the user's folder, so it cannot be had by its name alone."""
"""Names that `load_dataset` knows: ``idx`` is a folder of the user's own IDX files."""

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package ``dataset-fashion-mnist`` installs the files."""

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""SHA-256 of the *uncompressed* files, so that any gzip of them passes.

Source: measured on Debian's dataset-fashion-mnist 0.0~git20200523.55506a9-1; its deflate streams under the
gzip headers of the authors' files give the four MD5 sums that
https://github.com/zalandoresearch/fashion-mnist publishes.
"""

URLS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/{file}.gz",
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/{file}.gz",
)
"""Source: README of https://github.com/zalandoresearch/fashion-mnist. The first has no TLS: the checksums
stand in.
"""

DOWNLOAD_LIMIT_BYTES = 64 * 1024 * 1024
"""More than twice the largest file (26.4 MB): a server that sends more sends something else."""

FASHION_CLASSES: tuple[str, ...] = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

Opener = Callable[[str], Any]
"""``opener(url)`` gives an object with ``read(size)`` and ``close()``."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels for training and for testing.

    Attributes
    ----------
    name : str
    train_images, test_images : uint8 tensor ``[n, 1, height, width]``
    train_labels, test_labels : int64 tensor ``[n]``
    classes : tuple of str
    source : str
        Where the images came from, in words; stored with every result.
    mean, deviation : float
        Of a training pixel divided by 255; what `normalise` uses. A subset keeps those of the whole set.
    """

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: tuple[str, ...]
    source: str
    mean: float
    deviation: float

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image: ``(channels, height, width)``."""
        return tuple(self.train_images.shape[1:])

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """``(images / 255 − mean) / deviation``: uint8 ``[n, 1, h, w]`` to float32 of the same shape."""
        return images.to(torch.float32).mul_(1 / (255 * self.deviation)).sub_(self.mean / self.deviation)

    def subset(self, train: int | None = None, test: int | None = None, seed: int = 0) -> Dataset:
        """The same set with fewer images, as many of each class as possible (`balanced_subset`).

        Parameters
        ----------
        train, test : int or None
            Images to keep; None, or as many as there are and more, keeps all.
        seed : int

        Raises
        ------
        InputError
            Fewer than one image asked for.
        """
        problems = [
            Problem(field, f"{count} images, must be at least 1")
            for field, count in (("train", train), ("test", test))
            if count is not None and count < 1
        ]
        if problems:
            raise InputError(f"subset of {self.name}", problems)
        parts: dict[str, Any] = {}
        for part, count in (("train", train), ("test", test)):
            labels = getattr(self, f"{part}_labels")
            if count is not None and count < len(labels):
                chosen = torch.from_numpy(balanced_subset(labels.numpy(), count, seed))
                parts[f"{part}_images"] = getattr(self, f"{part}_images")[chosen]
                parts[f"{part}_labels"] = labels[chosen]
        if not parts:
            return self
        sizes = f"{len(parts.get('train_labels', self.train_labels))} training and "
        sizes += f"{len(parts.get('test_labels', self.test_labels))} test images"
        return replace(self, source=f"{self.source}; class-balanced subset of {sizes}, seed {seed}", **parts)


def load_dataset(
    name: str = "fashion-mnist",
    path: str | Path | None = None,
    *,
    train_limit: int | None = None,
    test_limit: int | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    opener: Opener | None = None,
) -> Dataset:
    """A data set by name.

    Fashion-MNIST comes from the first of: ``path``, Debian's package, the cache, a download (checked, then
    cached). If none can be had, scikit-learn's handwritten digits take its place with a warning, and
    `Dataset.source` says so.

    Parameters
    ----------
    name : {"fashion-mnist", "digits", "idx"}
        ``idx``: the four IDX files of the user's own in ``path``, named like those of MNIST, plain or
        ``.gz``.
    path : str or Path, optional
        Folder with the four files. What is found there is used or refused, never silently replaced.
    train_limit, test_limit : int, optional
        Keep a class-balanced subset of that many images.
    seed : int
        Of the subset, and of the digits' split.
    cache : str or Path, optional
        Folder of downloads; default ``$XDG_CACHE_HOME/hwsim/fashion-mnist``, else
        ``~/.cache/hwsim/fashion-mnist``.
    opener : callable, optional
        Opens a URL; default `urllib.request.urlopen` with a timeout of 30 seconds.

    Raises
    ------
    InputError
        Unknown name; files in ``path`` that are missing, damaged or not what the name says; no source at all.
    """
    if name not in DATASETS:
        raise InputError("data set", Problem("name", f'"{name}" is not known', nearest_name(name, DATASETS)))
    if name == "digits":
        data = _digits(seed)
    elif path is not None:
        data = _from_folder(Path(path), name)
    elif name == "idx":
        raise InputError("data set", Problem("path", 'missing; "idx" needs the folder of the four files'))
    else:
        data = _find_fashion_mnist(_cache_folder(cache), opener or _open_url, seed)
    return data.subset(train_limit, test_limit, seed)


def balanced_subset(labels: NDArray[np.integer], count: int, seed: int) -> NDArray[np.int64]:
    """``count`` ascending indices, as many of each class as possible.

    Classes take turns, each in an order drawn from ``seed``, until ``count`` is reached, so a smaller subset
    lies in a larger one of the same seed and class sizes differ by one at most (as long as no class runs
    out).

    Examples
    --------
    >>> balanced_subset(np.array([0, 0, 0, 0, 1, 1, 2]), 5, seed=0).tolist()
    [2, 3, 4, 5, 6]
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    shuffled = np.asarray(labels)[order]
    turn = np.empty(len(labels), np.int64)
    for value in np.unique(shuffled):
        mine = shuffled == value
        turn[mine] = np.arange(mine.sum())
    chosen = order[np.lexsort((shuffled, turn))[:count]]
    return np.sort(chosen).astype(np.int64)


def parse_idx(content: bytes, dimensions: int, source: str) -> NDArray[np.uint8]:
    """The unsigned bytes of an IDX file.

    Parameters
    ----------
    content : bytes
        The uncompressed file: two zero bytes, the type code 8, the number of dimensions, one big-endian
        32-bit size per dimension, the data. Source: http://yann.lecun.com/exdb/mnist/, "the IDX file format".
    dimensions : int
        Expected number of dimensions: 3 for images, 1 for labels.
    source : str
        Named in messages.

    Returns
    -------
    uint8 array of the sizes that the file states.

    Raises
    ------
    InputError
        Wrong magic number, wrong number of dimensions, an empty dimension, too few or too many bytes.
    """
    header_bytes = 4 + 4 * dimensions
    expected_magic = bytes((0, 0, 8, dimensions))
    if content[:4] != expected_magic:
        found = content[:4].hex(" ") or "an empty file"
        raise InputError(
            source,
            Problem(
                "magic",
                f"{found}, must be {expected_magic.hex(' ')} (unsigned bytes, {dimensions} dimensions)",
            ),
        )
    if len(content) < header_bytes:
        raise InputError(
            source, Problem("header", f"{len(content)} bytes, truncated: must be {header_bytes}")
        )
    sizes = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, offset=4))
    expected_bytes = header_bytes + math.prod(sizes)
    if 0 in sizes:
        raise InputError(source, Problem("dimensions", f"{sizes}, every size must be at least 1"))
    if len(content) != expected_bytes:
        what = "truncated" if len(content) < expected_bytes else "too long"
        raise InputError(
            source,
            Problem(
                "data", f"{len(content)} bytes, {what}: {sizes} needs {expected_bytes}", "get the file again"
            ),
        )
    return np.frombuffer(content, np.uint8, offset=header_bytes).reshape(sizes)


def _find_fashion_mnist(cache: Path, opener: Opener, seed: int) -> Dataset:
    """Fashion-MNIST from Debian's package, the cache or the net; else the digits, said loudly."""
    tried = []
    for folder, where in ((DEBIAN_FOLDER, "Debian package dataset-fashion-mnist"), (cache, "cache")):
        if not folder.is_dir():
            tried.append(f"{where}: no folder {folder}")
            continue
        try:
            return _from_folder(folder, "fashion-mnist", where)
        except InputError as error:
            tried.append(f"{where}: {error}")
    try:
        _download(cache, opener)
        return _from_folder(cache, "fashion-mnist", "download")
    except InputError as error:
        tried.append(f"download: {error}")
    summary = "\n".join(f"  - {line}" for line in tried)
    hint = "apt-get install dataset-fashion-mnist, or give the folder of the four files"
    try:
        data = _digits(seed)
    except HwsimError as error:
        raise InputError(
            "Fashion-MNIST", Problem("", f"found nowhere:\n{summary}\n  - {error}", hint)
        ) from None
    warnings.warn(
        f"Fashion-MNIST was found nowhere; scikit-learn's 8x8 digits take its place, so every accuracy is one of "
        f"DIGITS, not of Fashion-MNIST.\n{summary}\n{hint}",
        stacklevel=3,
    )
    return replace(data, source=f"{data.source} IN PLACE OF Fashion-MNIST, which was found nowhere")


def _from_folder(folder: Path, name: str, where: str = "folder given") -> Dataset:
    """The four IDX files of a folder; asked for "fashion-mnist", their checksums must be its own."""
    contents: dict[str, bytes] = {}
    problems: list[Problem] = []
    for file in FILES:
        try:
            contents[file] = _read_maybe_gzip(folder, file)
        except InputError as error:
            problems += error.problems
    foreign = [
        file for file, content in contents.items() if hashlib.sha256(content).hexdigest() != SHA256[file]
    ]
    if name == "fashion-mnist":
        hint = 'use the name "idx" for a set of your own'
        problems += [Problem(file, "SHA-256 is not that of Fashion-MNIST", hint) for file in foreign]
    if problems:
        raise InputError(str(folder), problems)
    arrays = {
        file: parse_idx(content, 3 if "images" in file else 1, str(folder / file))
        for file, content in contents.items()
    }
    problems = [
        Problem(part, f"{len(arrays[images])} images but {len(arrays[labels])} labels")
        for part, images, labels in (("train", *FILES[:2]), ("t10k", *FILES[2:]))
        if len(arrays[images]) != len(arrays[labels])
    ]
    if arrays[FILES[0]].shape[1:] != arrays[FILES[2]].shape[1:]:
        problems.append(
            Problem("t10k", f"images of {arrays[FILES[2]].shape[1:]}, train: {arrays[FILES[0]].shape[1:]}")
        )
    if problems:
        raise InputError(str(folder), problems)
    if not foreign:
        name, classes, title = "fashion-mnist", FASHION_CLASSES, "Fashion-MNIST"
    else:
        count = 1 + max(int(arrays[FILES[1]].max()), int(arrays[FILES[3]].max()))
        classes, title = tuple(str(index) for index in range(count)), "IDX files"
    return _dataset(
        name,
        (arrays[FILES[0]], arrays[FILES[1]], arrays[FILES[2]], arrays[FILES[3]]),
        classes,
        f"{title}, {where} ({folder})",
    )


def _read_maybe_gzip(folder: Path, file: str) -> bytes:
    plain, packed = folder / file, folder / f"{file}.gz"
    try:
        if plain.exists():
            return plain.read_bytes()
        if packed.exists():
            return gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            str(folder), Problem(file, f"cannot be read: {error}", "get the file again")
        ) from None
    raise InputError(str(folder), Problem(file, "missing; neither the plain file nor its .gz is there"))


def _download(cache: Path, opener: Opener) -> None:
    """Fetch the four files into the cache, each from the first URL that gives the right bytes."""
    for file in FILES:
        failures = []
        for url in (template.format(file=file) for template in URLS):
            try:
                response = opener(url)
                try:
                    packed = response.read(DOWNLOAD_LIMIT_BYTES)
                finally:
                    response.close()
                content = gzip.decompress(packed)
            except (OSError, EOFError, zlib.error) as error:
                failures.append(Problem(url, f"{type(error).__name__}: {error}"))
                continue
            if hashlib.sha256(content).hexdigest() == SHA256[file]:
                write_atomically(cache / f"{file}.gz", packed)
                break
            failures.append(Problem(url, "SHA-256 is not that of Fashion-MNIST"))
        else:
            raise InputError(f"{file}.gz", failures)


def _open_url(url: str) -> Any:
    return urllib.request.urlopen(url, timeout=30)


def _cache_folder(cache: str | Path | None) -> Path:
    if cache is not None:
        return Path(cache)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hwsim" / "fashion-mnist"


def _digits(seed: int) -> Dataset:
    """scikit-learn's 1,797 digits, 8×8 brought to 28×28; every fifth of a class is for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError(
            "digits", Problem("scikit-learn", "not installed", "pip install hwsim[digits]")
        ) from None
    bunch = load_digits()
    labels = np.asarray(bunch.target, np.uint8)
    small = torch.from_numpy(np.asarray(bunch.images, np.float32))[:, None]
    large = torch.nn.functional.interpolate(small, size=(28, 28), mode="bilinear", align_corners=False)
    images = (large * (255 / 16)).round().clamp(0, 255).to(torch.uint8).numpy()[:, 0]
    is_test = np.zeros(len(labels), bool)
    is_test[balanced_subset(labels, len(labels) // 5, seed)] = True
    source = "digits of scikit-learn (1,797 images of 8x8, resized to 28x28)"
    classes = tuple(str(index) for index in range(10))
    parts = (images[~is_test], labels[~is_test], images[is_test], labels[is_test])
    return _dataset("digits", parts, classes, source)


def _dataset(
    name: str,
    parts: tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]],
    classes: tuple[str, ...],
    source: str,
) -> Dataset:
    train_images, train_labels, test_images, test_labels = parts
    histogram = np.bincount(train_images.ravel(), minlength=256)
    levels = np.arange(256) / 255
    mean = float((histogram * levels).sum() / train_images.size)
    deviation = float(np.sqrt((histogram * (levels - mean) ** 2).sum() / train_images.size))

    def images(values: NDArray[np.uint8]) -> torch.Tensor:
        return torch.from_numpy(np.array(values)).unsqueeze(1)

    def labels(values: NDArray[np.uint8]) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64))

    return Dataset(
        name=name,
        train_images=images(train_images),
        train_labels=labels(train_labels),
        test_images=images(test_images),
        test_labels=labels(test_labels),
        classes=classes,
        source=source,
        mean=mean,
        deviation=deviation or 1.0,
    )

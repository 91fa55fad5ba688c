"""What a layer is to the hardware: its GEMM, its block types and, where at hand, its integer weights. NumPy only.

`compress` hands these objects over; nothing here knows torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hwsim.errors import InputError, Problem

__all__ = [
    "DENSE",
    "PRUNED",
    "STREAMS",
    "UNIFIED",
    "Layer",
    "LayerShape",
    "QuantizedWeights",
    "Requantizer",
    "accumulator_bits_needed",
    "check_types",
    "expand_blocks",
    "random_layers",
    "random_types",
    "type_counts",
]

PRUNED, UNIFIED, DENSE = 0, 1, 2
"""Codes of the block types."""

STREAMS = ("type", "sign", "magnitude", "dense")
"""What is stored of a layer, in the order of the memory image."""


@dataclass(frozen=True)
class LayerShape:
    """The geometry of a linear layer or of a convolution of any rank.

    Attributes
    ----------
    name : str
    kind : {"linear", "conv"}
    in_channels, out_channels : int
        Of all groups together; features of a linear layer.
    input_size : tuple of int
        Conv: spatial size of the input. Linear: the leading dimensions other than the batch (often empty).
    kernel, stride, dilation : tuple of int
        One entry per spatial dimension; empty for a linear layer.
    padding : tuple of (int, int)
        Zeros before and after, per spatial dimension.
    groups, batch : int
    """

    name: str
    kind: Literal["linear", "conv"]
    in_channels: int
    out_channels: int
    input_size: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    batch: int = 1

    def __post_init__(self) -> None:
        problems = []
        rank = len(self.kernel)
        for field in ("in_channels", "out_channels", "groups", "batch"):
            if getattr(self, field) < 1:
                problems.append(Problem(field, f"{getattr(self, field)}, must be at least 1"))
        if self.kind == "conv":
            for field in ("input_size", "stride", "padding", "dilation"):
                if len(getattr(self, field)) != rank:
                    problems.append(
                        Problem(field, f"has {len(getattr(self, field))} entries, the kernel has {rank}")
                    )
            if rank < 1:
                problems.append(Problem("kernel", "a convolution needs at least one spatial dimension"))
        elif rank or self.groups != 1:
            problems.append(Problem("kernel", "a linear layer has no kernel and no groups"))
        for field in ("input_size", "kernel", "stride", "dilation"):
            if any(size < 1 for size in getattr(self, field)):
                problems.append(Problem(field, f"{getattr(self, field)}, every entry must be at least 1"))
        if not problems and (self.in_channels % self.groups or self.out_channels % self.groups):
            problems.append(
                Problem("groups", f"{self.groups} does not divide {self.in_channels} and {self.out_channels}")
            )
        if not problems and any(size < 1 for size in self.output_size):
            problems.append(Problem("input_size", f"{self.input_size} is smaller than the kernel reaches"))
        if problems:
            raise InputError(f"layer {self.name}", problems)

    @property
    def output_size(self) -> tuple[int, ...]:
        """Spatial size of the output; the leading dimensions of a linear layer."""
        if self.kind == "linear":
            return self.input_size
        return tuple(
            (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, (before, after), dilation in zip(
                self.input_size, self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )

    @property
    def m(self) -> int:
        """Rows of the GEMM of one group: output channels."""
        return self.out_channels // self.groups

    @property
    def k(self) -> int:
        """Reduction length of the GEMM of one group, input channel fastest."""
        return math.prod(self.kernel) * self.in_channels // self.groups

    @property
    def n(self) -> int:
        """Columns of the GEMM: batch × output positions."""
        return self.batch * math.prod(self.output_size)

    @property
    def weight_count(self) -> int:
        """Weights of all groups, padding excluded."""
        return self.groups * self.m * self.k

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the uncompressed layer."""
        return self.weight_count * self.n

    def blocks(self, block: tuple[int, int]) -> tuple[int, int]:
        """``(Mb, Kb)``: block rows and block columns of one group."""
        return -(-self.m // block[0]), -(-self.k // block[1])


@dataclass(frozen=True, eq=False)
class Requantizer:
    """Per output channel: ``y = clamp(round_half_up((acc + bias) · scale / 2**shift))``, then ReLU if set.

    Attributes
    ----------
    bias : int32 array ``[out_channels]``
    scale : int16 array ``[out_channels]``
    shift : uint8 array ``[out_channels]``
    relu : bool
    """

    bias: NDArray[np.int32]
    scale: NDArray[np.int16]
    shift: NDArray[np.uint8]
    relu: bool = False

    def __post_init__(self) -> None:
        # Another dtype would wrap in the memory image without a word.
        problems = [
            Problem(name, f"dtype {values.dtype}, must be {dtype}")
            for name, values, dtype in (
                ("bias", self.bias, "int32"),
                ("scale", self.scale, "int16"),
                ("shift", self.shift, "uint8"),
            )
            if values.dtype != np.dtype(dtype)
        ]
        if not self.bias.shape == self.scale.shape == self.shift.shape:
            shapes = f"{self.bias.shape}, {self.scale.shape}, {self.shift.shape}"
            problems.append(
                Problem("bias, scale, shift", f"shapes {shapes}, must be one value per output channel each")
            )
        if problems:
            raise InputError("requantizer", problems)


@dataclass(frozen=True, eq=False)
class QuantizedWeights:
    """The integers of a compressed layer. Entries that a block's type does not use are 0.

    Attributes
    ----------
    dense : int16 array ``[groups, m, k]``
        Two's complement weights of DENSE blocks.
    signs : uint8 array ``[groups, m, k]``
        1 where the weight of a UNIFIED block is negative.
    magnitudes : uint16 array ``[groups, Mb, Kb]``
        The shared magnitude of UNIFIED blocks, at the block shape of the layer.
    weight_bits, magnitude_bits : int
    step_size : float
        One step size per layer, of dense weights and of magnitudes: weight = integer × step_size.
    requantizer : Requantizer or None
        None until activations were calibrated.
    """

    dense: NDArray[np.int16]
    signs: NDArray[np.uint8]
    magnitudes: NDArray[np.uint16]
    weight_bits: int
    magnitude_bits: int
    step_size: float
    requantizer: Requantizer | None = None


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer as the simulator takes it.

    Attributes
    ----------
    shape : LayerShape
    block : tuple of int
        ``(g_o, g_k)`` of ``types``: the native block of the machine or a multiple of it in both directions.
    types : uint8 array ``[groups, Mb, Kb]``
        Block types: 0 PRUNED, 1 UNIFIED, 2 DENSE.
    weights : QuantizedWeights or None
        None where only time and traffic are asked for.
    column_order : {"tap_major", "channel_major"}
        Order of the reduction dimension; the machine's is tap_major (input channel fastest).
    """

    shape: LayerShape
    block: tuple[int, int]
    types: NDArray[np.uint8]
    weights: QuantizedWeights | None = None
    column_order: Literal["tap_major", "channel_major"] = "tap_major"

    def __post_init__(self) -> None:
        source = f"layer {self.shape.name}"
        expected = (self.shape.groups, *self.shape.blocks(self.block))
        if not isinstance(self.types, np.ndarray) or self.types.shape != expected:
            found = getattr(self.types, "shape", type(self.types).__name__)
            raise InputError(
                source, Problem("types", f"shape {found}, expected {expected} for blocks {self.block}")
            )
        check_types(self.types, source)

    @property
    def name(self) -> str:
        """The name of the layer in its network."""
        return self.shape.name

    @cached_property
    def key(self) -> tuple[LayerShape, tuple[int, int], bytes, tuple[int, int]]:
        """The same for layers that take the same time, traffic, storage and energy on every machine, whatever their names."""
        formats = (0, 0)
        if self.weights is not None:
            formats = (self.weights.weight_bits, self.weights.magnitude_bits)
        digest = hashlib.sha256(np.ascontiguousarray(self.types).data).digest()
        return replace(self.shape, name=""), self.block, digest, formats

    def at_native_block(self, native: tuple[int, int]) -> Layer:
        """The same layer cut into native blocks, each with its own copy of type and magnitude.

        Raises
        ------
        InputError
            The layer's block is not a multiple of the native block in both directions.
        """
        if self.block == native:
            return self
        rows, columns = (mine / its for mine, its in zip(self.block, native, strict=True))
        if rows != int(rows) or columns != int(columns):
            raise InputError(
                f"layer {self.name}",
                Problem(
                    "block",
                    f"compressed with blocks {self.block[0]}x{self.block[1]}, which the machine's native block "
                    f"{native[0]}x{native[1]} does not divide",
                    "use a machine whose array.block divides the layer's in both directions, or compress again",
                ),
            )
        m_blocks, k_blocks = self.shape.blocks(native)

        def refine(values: NDArray) -> NDArray:
            fine = np.repeat(np.repeat(values, int(rows), axis=1), int(columns), axis=2)
            return np.ascontiguousarray(fine[:, :m_blocks, :k_blocks])

        weights = self.weights
        if weights is not None:
            weights = replace(weights, magnitudes=refine(weights.magnitudes))
        return replace(self, block=native, types=refine(self.types), weights=weights)

    def integer_matrix(self) -> NDArray[np.int32]:
        """``int32[groups, m, k]``: the effective integer weights (0, ±magnitude, or the dense weight).

        Raises
        ------
        InputError
            The layer has no weights.
        """
        if self.weights is None:
            raise InputError(
                f"layer {self.name}", Problem("weights", "only block types are at hand, no weights")
            )
        m, k = self.shape.m, self.shape.k
        types = expand_blocks(self.types, self.block, m, k)
        magnitudes = expand_blocks(self.weights.magnitudes, self.block, m, k).astype(np.int32)
        unified = np.where(self.weights.signs == 1, -magnitudes, magnitudes)
        matrix = np.where(types == DENSE, self.weights.dense.astype(np.int32), 0)
        return np.where(types == UNIFIED, unified, matrix).astype(np.int32)


def accumulator_bits_needed(weight: NDArray[np.integer], activation_bits: int) -> int:
    """Bits of a two's complement accumulator that no input whatever can overflow, at no point of the sum.

    Parameters
    ----------
    weight : integer array ``[out, ...]``
        Every row adds into an accumulator of its own.
    activation_bits : int
        Inputs are signed and may take every value of that many bits.

    Examples
    --------
    >>> accumulator_bits_needed(np.array([[1, -2, 1]]), 8)  # 4 · 128 = 512
    11
    """
    sums = np.abs(weight.reshape(len(weight), -1).astype(np.int64)).sum(axis=1)
    return (int(sums.max()) << (activation_bits - 1)).bit_length() + 1


def expand_blocks(values: NDArray, block: tuple[int, int], m: int, k: int) -> NDArray:
    """Every block's value at each of its real weights: ``[groups, Mb, Kb]`` to ``[groups, m, k]``.

    Examples
    --------
    >>> expand_blocks(np.array([[[1, 2]]]), (2, 3), 2, 5).tolist()
    [[[1, 1, 1, 2, 2], [1, 1, 1, 2, 2]]]
    """
    # Columns first, while there is one row per block: rows are then copied whole.
    return values.repeat(block[1], axis=2)[:, :, :k].repeat(block[0], axis=1)[:, :m]


def check_types(types: NDArray, source: str) -> None:
    """Refuse an array that is not one of block types.

    Raises
    ------
    InputError
        Not uint8, empty, or with a code above 2.
    """
    if types.dtype != np.uint8:
        raise InputError(
            source, Problem("types", f"dtype {types.dtype}, must be uint8", "types.astype(np.uint8)")
        )
    if types.size == 0:
        raise InputError(
            source, Problem("types", f"empty array of shape {types.shape}; at least one block is needed")
        )
    highest = int(types.max())
    if highest > DENSE:
        where = tuple(int(i) for i in np.argwhere(types > DENSE)[0])
        raise InputError(
            source,
            Problem("types", f"code {types[where]} at {list(where)}; allowed: 0 PRUNED, 1 UNIFIED, 2 DENSE"),
        )


def type_counts(blocks: int, pruned: float, unified: float) -> tuple[int, int]:
    """``(P, U)``: how many of ``blocks`` blocks are pruned and unified, in decimal arithmetic.

    ``P = floor(p·B)``; ``U = B − P`` where p + u = 1, else ``floor(u·B)``.

    Raises
    ------
    InputError
        A ratio outside [0, 1], or p + u > 1.

    Examples
    --------
    >>> type_counts(10, 0.3, 0.7)
    (3, 7)
    """
    p, u = Decimal(str(pruned)), Decimal(str(unified))
    problems = [
        Problem(name, f"{ratio}, must lie in [0, 1]")
        for name, ratio in (("pruned", p), ("unified", u))
        if not (ratio.is_finite() and 0 <= ratio <= 1)
    ]
    if not problems and p + u > 1:
        problems.append(Problem("pruned + unified", f"{p} + {u} = {p + u}, must not exceed 1"))
    if problems:
        raise InputError("ratios", problems)
    count_pruned = int(p * blocks)
    count_unified = blocks - count_pruned if p + u == 1 else int(u * blocks)
    return count_pruned, count_unified


def random_types(
    shape: LayerShape, block: tuple[int, int], pruned: float, unified: float, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """``uint8[groups, Mb, Kb]``: a random map with the exact counts of `type_counts`."""
    m_blocks, k_blocks = shape.blocks(block)
    total = shape.groups * m_blocks * k_blocks
    count_pruned, count_unified = type_counts(total, pruned, unified)
    flat = np.full(total, DENSE, np.uint8)
    flat[:count_pruned] = PRUNED
    flat[count_pruned : count_pruned + count_unified] = UNIFIED
    return rng.permutation(flat).reshape(shape.groups, m_blocks, k_blocks)


def random_layers(
    shapes: Sequence[LayerShape],
    block: tuple[int, int],
    pruned: float,
    unified: float,
    seed: int,
    *,
    exempt_first_last: bool = True,
) -> list[Layer]:
    """Layers with random block maps of exact ratios; with ``exempt_first_last`` the first and the last are all DENSE.

    The same seed gives each layer the same map, whatever the other layers are.
    """
    layers = []
    for index, shape in enumerate(shapes):
        exempt = exempt_first_last and index in (0, len(shapes) - 1)
        p, u = (0.0, 0.0) if exempt else (pruned, unified)
        layers.append(
            Layer(shape, block, random_types(shape, block, p, u, np.random.default_rng([seed, index])))
        )
    return layers

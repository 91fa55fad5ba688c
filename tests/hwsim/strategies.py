"""Hypothesis strategies: small layers of every kind, and machines whose memories are about as large as the layer asks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from hwsim.kernels.passes import PassConfig
from hwsim.layer import DENSE, UNIFIED, Layer, LayerShape, QuantizedWeights, Requantizer
from hwsim.machine import Machine, parse_machine

SHARES = (0.02, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5)
"""What a memory holds of what there is; drawn for each memory."""


def machine_dict(**changes: Any) -> dict[str, Any]:
    """A small valid machine file as a dict; ``changes`` name fields as ``part__field``."""
    data: dict[str, Any] = {
        "name": "small",
        "clock_mhz": 1000,
        "array": {"rows": 2, "columns": 3, "block": [2, 2], "multipliers": 2, "sign_adders": 4},
        "front_end": {"skip_window": 2, "queue_depth": 2},
        "activation_buffer": {"size_kib": 4},
        "operand_store": {"banks": 2, "size_kib": 1, "fill_words_per_cycle": 1},
        "weights": {
            "dense_port_bits": 32,
            "sign_port_bits": 16,
            "type_kib": 1,
            "sign_kib": 1,
            "magnitude_kib": 1,
            "dense_kib": 4,
        },
        "output": {"words_per_cycle": 4, "size_kib": 4},
        "precision": {"weight_bits": 8, "magnitude_bits": 8, "activation_bits": 8, "accumulator_bits": 32},
        "dram": {"gb_per_s": 12.8, "burst_bytes": 64, "pj_per_bit": 12.0},
        "features": {"skip_pruned": True, "unified_path": True, "row_balance": "none"},
    }
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            data.setdefault(part, {})[field] = value
        else:
            data[part] = value
    return data


def small_machine(**changes: Any) -> Machine:
    """A small machine with some fields changed, named as ``part__field``."""
    return parse_machine(machine_dict(**changes), "small machine")


@st.composite
def layer_shapes(draw: st.DrawFn, name: str = "layer") -> LayerShape:
    """Linear layers with leading dimensions; convolutions of rank 1 to 3 with everything a convolution can have."""
    if draw(st.integers(0, 3)) == 0:
        return LayerShape(
            name,
            "linear",
            in_channels=draw(st.integers(1, 30)),
            out_channels=draw(st.integers(1, 30)),
            input_size=tuple(draw(st.lists(st.integers(1, 4), max_size=2))),
            batch=draw(st.integers(1, 4)),
        )
    rank = draw(st.integers(1, 3))
    axes = [draw(_axes(largest=(24, 9, 5)[rank - 1])) for _ in range(rank)]
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    size, kernel, stride, padding, dilation = zip(*axes, strict=True)
    return LayerShape(
        name,
        "conv",
        in_channels=groups * draw(st.integers(1, 5)),
        out_channels=groups * draw(st.integers(1, 12)),
        input_size=size,
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        batch=draw(st.integers(1, 2)),
    )


@st.composite
def _axes(draw: st.DrawFn, largest: int) -> tuple[int, int, int, tuple[int, int], int]:
    kernel, dilation = draw(st.sampled_from([1, 2, 3, 3])), draw(st.sampled_from([1, 1, 2, 3]))
    stride = draw(st.sampled_from([1, 1, 2, 3]))
    padding = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    reach = dilation * (kernel - 1) + 1
    smallest = max(1, reach - sum(padding))
    size = draw(st.integers(smallest, max(smallest, largest)))
    return size, kernel, stride, padding, dilation


def block_types(
    shape: LayerShape, block: tuple[int, int], share: tuple[float, float], seed: int
) -> NDArray[np.uint8]:
    """Types drawn block by block with the probabilities ``share`` of PRUNED and UNIFIED."""
    p, u = share
    rng = np.random.default_rng(seed)
    return rng.choice(3, (shape.groups, *shape.blocks(block)), p=[p, u, 1 - p - u]).astype(np.uint8)


@st.composite
def type_shares(draw: st.DrawFn) -> tuple[float, float]:
    """Probabilities of PRUNED and UNIFIED, the corners included."""
    return draw(st.sampled_from([(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.8, 0.1), (0.4, 0.3)]))


@st.composite
def layers_on_machines(draw: st.DrawFn) -> tuple[Layer, Machine]:
    """A layer and a machine on which it fits or nearly fits, with every regime of section 4 within reach."""
    shape = draw(layer_shapes())
    block = draw(st.sampled_from([(1, 1), (2, 2), (1, 4), (4, 1), (3, 2), (4, 4)]))
    layer = Layer(
        shape, block, block_types(shape, block, draw(type_shares()), draw(st.integers(0, 2**32 - 1)))
    )
    return layer, draw(machines_for(layer))


@st.composite
def machines_for(draw: st.DrawFn, layer: Layer) -> Machine:
    """A machine of the layer's native block, its memories a drawn share of what the layer has."""
    shape, (g_o, g_k) = layer.shape, layer.block
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    weight_bits, magnitude_bits = draw(st.integers(2, 9)), draw(st.integers(1, 9))
    activation_bits = draw(st.integers(2, 9))
    m_blocks, k_blocks = shape.blocks(layer.block)
    n = g_o * g_k

    def share() -> float:
        return draw(st.sampled_from(SHARES))

    weight_share = share()

    def memory_kib(bits_per_block: int) -> float:
        """A memory over all rows; one block always fits a row's part."""
        everything = shape.groups * -(-m_blocks // rows) * -(-k_blocks * bits_per_block // 8)
        used = weight_share if draw(st.integers(0, 4)) else share()
        return rows * max(-(-bits_per_block // 8), int(everything * used)) / 1024

    def buffer_kib(everything: float, finest: float) -> float:
        """A double buffer; mostly the finest step fits a half of it."""
        least = 2 * math.ceil(finest) if draw(st.integers(0, 9)) else 1
        return max(1, least, int(everything * share())) / 1024

    word_bytes = g_k * columns * activation_bits / 8
    element_bytes = shape.in_channels // shape.groups * activation_bits / 8
    input_bytes = shape.batch * shape.groups * math.prod(shape.input_size) * element_bytes
    output_bytes = shape.m * shape.n * activation_bits / 8
    tile_channels, tile_columns = min(shape.m, rows * g_o), columns
    tile_input = element_bytes
    if shape.kind == "conv":
        tile_columns = min(columns, shape.output_size[-1])
        reach = (tile_columns - 1) * shape.stride[-1] + (shape.kernel[-1] - 1) * shape.dilation[-1] + 1
        tile_input *= math.prod(shape.kernel[:-1]) * min(reach, shape.input_size[-1])
    data = machine_dict(
        clock_mhz=draw(st.sampled_from([1000, 333.3, 700])),
        array={
            "rows": rows,
            "columns": columns,
            "block": [g_o, g_k],
            "multipliers": draw(st.integers(1, 8)),
            "sign_adders": draw(st.integers(1, 16)),
        },
        front_end={"skip_window": draw(st.integers(1, 6)), "queue_depth": draw(st.integers(1, 4))},
        activation_buffer={"size_kib": buffer_kib(input_bytes, tile_input)},
        operand_store={
            "banks": draw(st.integers(1, 5)),
            "size_kib": math.ceil(2 * word_bytes * max(1, k_blocks * share())) / 1024,
            "fill_words_per_cycle": draw(st.integers(1, 3)),
        },
        weights={
            "dense_port_bits": draw(st.sampled_from([5, 16, 64])),
            "sign_port_bits": draw(st.sampled_from([3, 16, 64])),
            "type_kib": memory_kib(2),
            "sign_kib": memory_kib(n),
            "magnitude_kib": memory_kib(magnitude_bits),
            "dense_kib": memory_kib(n * weight_bits),
        },
        output={
            "words_per_cycle": draw(st.sampled_from([1, 2, 5, 64])),
            "size_kib": buffer_kib(output_bytes, tile_channels * tile_columns * activation_bits / 8),
        },
        precision={
            "weight_bits": weight_bits,
            "magnitude_bits": magnitude_bits,
            "activation_bits": activation_bits,
            "accumulator_bits": 32,
        },
        dram={
            "gb_per_s": draw(st.sampled_from([0.3, 1, 2.5, 7.7, 12.8, 33.333, 400])),
            "burst_bytes": draw(st.sampled_from([1, 3, 7, 32, 64, 100])),
            "pj_per_bit": 12.0,
        },
        features={
            "skip_pruned": draw(st.integers(0, 5)) > 0,
            "unified_path": draw(st.integers(0, 5)) > 0,
            "row_balance": draw(st.sampled_from(["none", "sorted"])),
        },
    )
    return parse_machine(data, "drawn machine")


@dataclass(frozen=True, eq=False)
class PassCase:
    """What the pass kernel takes."""

    types: NDArray[np.uint8]
    order: NDArray[np.int64]
    config: PassConfig


def pass_case(
    types: Any,
    *,
    order: Any = None,
    rows: int = 4,
    skip_window: int = 4,
    queue_depth: int = 2,
    banks: int = 4,
    occ: tuple[int, int] = (1, 2),
    segment_words: int = 2**18,
) -> PassCase:
    """A case of one group; ``types`` is ``[Mb][Kb]`` or one string of digits per block row."""
    rows_of_types = [[int(code) for code in row] for row in types]
    natural = range(len(rows_of_types)) if order is None else order
    config = PassConfig(rows, skip_window, queue_depth, banks, *occ, segment_words)
    return PassCase(np.array([rows_of_types], np.uint8), np.array([list(natural)], np.int64), config)


@st.composite
def pass_cases(draw: st.DrawFn) -> PassCase:
    """Groups, row tiles, segments, orders and every field of the configuration, small."""
    groups, m_blocks, k_blocks = draw(st.integers(1, 2)), draw(st.integers(1, 9)), draw(st.integers(1, 40))
    p, u = draw(type_shares())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    types = rng.choice(3, (groups, m_blocks, k_blocks), p=[p, u, 1 - p - u]).astype(np.uint8)
    config = PassConfig(
        rows=draw(st.integers(1, 6)),
        skip_window=draw(st.sampled_from([1, 2, 3, 5, 8, 64])),
        queue_depth=draw(st.sampled_from([1, 2, 3, 4, 64])),
        banks=draw(st.sampled_from([1, 2, 3, 4, 7, 64])),
        unified_cycles=draw(st.sampled_from([1, 2, 3, 17])),
        dense_cycles=draw(st.sampled_from([1, 2, 3, 4, 17])),
        segment_words=draw(st.sampled_from([1, 2, 7, 20, 2**18])),
    )
    return PassCase(types, np.stack([rng.permutation(m_blocks) for _ in range(groups)]), config)


def random_weights(
    layer: Layer, seed: int, *, weight_bits: int = 8, magnitude_bits: int = 8, requantizer: bool = True
) -> Layer:
    """The layer with random integers over the whole range of its formats, extremes included; unused entries are 0."""
    rng = np.random.default_rng(seed)
    shape, (g_o, g_k) = layer.shape, layer.block
    full = (shape.groups, shape.m, shape.k)
    per_weight = np.repeat(np.repeat(layer.types, g_o, axis=1), g_k, axis=2)[:, : shape.m, : shape.k]
    low, high = -(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1) - 1
    dense = rng.choice([low, high, 0, -1, 1, *rng.integers(low, high + 1, 20)], full)
    top = 2**magnitude_bits - 1
    magnitudes = rng.choice([0, top, *rng.integers(0, top + 1, 20)], layer.types.shape)
    channels = shape.out_channels
    weights = QuantizedWeights(
        dense=np.where(per_weight == DENSE, dense, 0).astype(np.int16),
        signs=np.where(per_weight == UNIFIED, rng.integers(0, 2, full), 0).astype(np.uint8),
        magnitudes=np.where(layer.types == UNIFIED, magnitudes, 0).astype(np.uint16),
        weight_bits=weight_bits,
        magnitude_bits=magnitude_bits,
        step_size=0.01,
        requantizer=Requantizer(
            bias=rng.integers(-(2**31), 2**31, channels).astype(np.int32),
            scale=rng.integers(-(2**15), 2**15, channels).astype(np.int16),
            shift=rng.integers(0, 256, channels).astype(np.uint8),
        )
        if requantizer
        else None,
    )
    return replace(layer, weights=weights)

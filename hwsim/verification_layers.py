"""What is verified: machines at every corner of the contract, and random layers in a few integers each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from hwsim.causal import NO_STALLS, Stalls
from hwsim.errors import InputError, Problem
from hwsim.layer import (
    DENSE,
    UNIFIED,
    Layer,
    LayerShape,
    QuantizedWeights,
    Requantizer,
    expand_blocks,
    random_types,
)
from hwsim.machine import Machine, load_machine
from hwsim.rtl_simulator import rtl_parameters

__all__ = ["VERIFICATION_MACHINES", "LayerSpec", "random_machine", "random_spec", "verification_machine"]

_SMALL = {
    "array.rows": 4,
    "array.columns": 3,
    "array.block": [2, 2],
    "array.multipliers": 2,
    "array.sign_adders": 4,
    "front_end.skip_window": 3,
    "front_end.queue_depth": 2,
    "operand_store.banks": 4,
    "operand_store.size_kib": 1,
    "weights.type_kib": 4,
    "weights.sign_kib": 16,
    "weights.magnitude_kib": 16,
    "weights.dense_kib": 64,
    "output.words_per_cycle": 6,
}

_SMALL_MEMORIES = {
    "weights.type_kib": 0.125,
    "weights.sign_kib": 0.25,
    "weights.magnitude_kib": 0.5,
    "weights.dense_kib": 1.75,
    "activation_buffer.size_kib": 0.75,
    "output.size_kib": 0.1875,
}

VERIFICATION_MACHINES: dict[str, dict[str, object]] = {
    "small": {},
    "four-by-four": {
        "array.columns": 2,
        "array.block": [4, 4],
        "array.multipliers": 4,
        "array.sign_adders": 16,
        "output.words_per_cycle": 32,
        "weights.dense_kib": 128,
    },
    "one-row": {"array.rows": 1, "array.columns": 1, "array.block": [1, 1], "operand_store.banks": 1},
    "one-bank": {"operand_store.banks": 1, "array.rows": 5},
    "no-lookahead": {"front_end.skip_window": 1, "front_end.queue_depth": 1, "operand_store.banks": 3},
    "always-one-cycle": {
        "array.multipliers": 4,
        "weights.dense_port_bits": 64,
        "weights.sign_port_bits": 64,
        "front_end.queue_depth": 1,
        "front_end.skip_window": 8,
    },
    "seventeen-cycles": {
        "array.block": [1, 17],
        "array.multipliers": 1,
        "array.sign_adders": 1,
        "operand_store.size_kib": 2,
        "array.columns": 2,
    },
    "slow-drain": {"output.words_per_cycle": 1, "array.columns": 5, "output.size_kib": 0.25},
    "segments": {"operand_store.size_kib": 0.0390625, "operand_store.banks": 2, "output.size_kib": 0.125},
    "wide-fill": {
        "array.rows": 3,
        "array.block": [3, 2],
        "array.multipliers": 5,
        "array.sign_adders": 4,
        "operand_store.banks": 3,
        "operand_store.fill_words_per_cycle": 4,
        "operand_store.size_kib": 0.125,
        "weights.dense_port_bits": 20,
        "weights.sign_port_bits": 7,
        "activation_buffer.size_kib": 0.25,
    },
    "sorted": {"features.row_balance": "sorted", "array.rows": 3, "front_end.skip_window": 2},
    "dense": {"features.skip_pruned": False, "features.unified_path": False},
    "skip-only": {"features.unified_path": False, "features.row_balance": "sorted"},
    "unified-only": {"features.skip_pruned": False, "array.block": [4, 1], "array.multipliers": 1},
    "odd-formats": {
        "precision.weight_bits": 3,
        "precision.magnitude_bits": 11,
        "precision.activation_bits": 5,
        "precision.accumulator_bits": 13,
        "weights.dense_port_bits": 7,
        "weights.sign_port_bits": 5,
        "array.block": [1, 4],
        "operand_store.size_kib": 0.25,
    },
    "deep-queue": {"front_end.queue_depth": 33, "front_end.skip_window": 20, "operand_store.banks": 7},
    # Memories so small that weights, inputs and outputs come and go in groups, on channels slow and fast.
    "groups": {**_SMALL_MEMORIES, "dram.gb_per_s": 1.6},
    "groups-sorted": {
        **_SMALL_MEMORIES,
        "features.row_balance": "sorted",
        "array.rows": 3,
        "dram.gb_per_s": 0.7,
        "dram.burst_bytes": 8,
        "operand_store.size_kib": 0.0625,
    },
    "groups-wide-channel": {
        **_SMALL_MEMORIES,
        "array.rows": 2,
        "array.columns": 2,
        "array.block": [1, 3],
        "dram.gb_per_s": 25.6,
        "output.words_per_cycle": 1,
        "precision.activation_bits": 6,
    },
}
"""Machines of the verification: what each changes of a small one. Every corner of the contract is some machine's or layer's."""


@cache
def verification_machine(name: str) -> Machine:
    """A machine of `VERIFICATION_MACHINES` by its name."""
    return load_machine("msa-8x8").with_fields({**_SMALL, **VERIFICATION_MACHINES[name], "name": name})


def random_machine(seed: int) -> Machine:
    """A machine for a seed: every parameter drawn, as long as the RTL can be that machine."""
    for attempt in range(1000):
        rng = np.random.default_rng([seed, 6, attempt])
        try:
            machine = load_machine("msa-8x8").with_fields(
                {**_random_fields(rng), "name": f"random-{seed}", "technology.table": "45nm-horowitz"}
            )
            rtl_parameters(machine)
        except InputError:
            continue
        return machine
    raise InputError("verification", Problem("seed", f"{seed}: no machine found", "take another seed"))


def _random_fields(rng: np.random.Generator) -> dict[str, object]:
    def among(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    def one_of(*values: float) -> float:
        return float(rng.choice(values))

    size = one_of(1, 1, 0.1, 0.03)  # of the memories that hold weights, inputs and outputs
    return {
        "array.rows": among(1, 6),
        "array.columns": among(1, 5),
        "array.block": [among(1, 4), among(1, 5)],
        "array.multipliers": among(1, 8),
        "array.sign_adders": among(1, 16),
        "front_end.skip_window": among(1, 12),
        "front_end.queue_depth": among(1, 6),
        "operand_store.banks": among(1, 8),
        "operand_store.size_kib": one_of(0.0625, 0.125, 0.5, 2),
        "operand_store.fill_words_per_cycle": among(1, 3),
        "weights.type_kib": max(4 * size, 0.125),
        "weights.sign_kib": max(16 * size, 0.25),
        "weights.magnitude_kib": max(16 * size, 0.5),
        "weights.dense_kib": max(64 * size, 1.75),
        "weights.dense_port_bits": among(4, 72),
        "weights.sign_port_bits": among(4, 40),
        "activation_buffer.size_kib": one_of(0.75, 2, 64),
        "output.size_kib": one_of(0.1875, 1, 32),
        "output.words_per_cycle": among(1, 12),
        "precision.weight_bits": among(2, 9),
        "precision.magnitude_bits": among(1, 10),
        "precision.activation_bits": among(2, 9),
        "precision.accumulator_bits": among(12, 40),
        "dram.gb_per_s": one_of(0.3, 1.7, 6.4, 12.8),
        "dram.burst_bytes": int(rng.choice([1, 8, 32, 64])),
        "features.skip_pruned": bool(rng.random() < 0.9),
        "features.unified_path": bool(rng.random() < 0.9),
        "features.row_balance": str(rng.choice(["none", "sorted"])),
    }


@dataclass(frozen=True)
class LayerSpec:
    """A random layer in a few integers, so that a failing one can be shrunk and written down.

    Attributes
    ----------
    m, k, n, groups : int
        Output channels and input channels of a group; output columns, or vectors.
    height, kernel, stride : int
        Output rows; an odd kernel with as much padding as keeps sizes at stride 1.
    pruned, unified : float
        Shares of block types.
    seed : int
        Of types, weights, input and requantiser.
    linear : bool
        Every column an output row of its own (only with one group).
    relu : bool
    stalls : Stalls
    """

    m: int
    k: int
    n: int
    groups: int = 1
    height: int = 1
    kernel: int = 1
    stride: int = 1
    pruned: float = 0.4
    unified: float = 0.3
    seed: int = 0
    linear: bool = False
    relu: bool = False
    stalls: Stalls = NO_STALLS

    def layer(self, machine: Machine) -> Layer:
        """The layer with random types, weights and requantiser for a machine."""
        rng = np.random.default_rng([self.seed, 1])
        if self.linear and self.groups == 1:
            shape = LayerShape("random", "linear", self.k, self.m, batch=self.n)
        else:
            shape = LayerShape(
                name="random",
                kind="conv",
                in_channels=self.k * self.groups,
                out_channels=self.m * self.groups,
                input_size=tuple((size - 1) * self.stride + 1 for size in (self.height, self.n)),
                kernel=(self.kernel, self.kernel),
                stride=(self.stride, self.stride),
                padding=((self.kernel // 2, self.kernel // 2),) * 2,
                dilation=(1, 1),
                groups=self.groups,
            )
        block = machine.array.block
        types = random_types(shape, block, self.pruned, self.unified, rng)
        return Layer(
            shape,
            block,
            types,
            _random_weights(shape, block, types, machine, self._requantizer(machine), rng),
        )

    def inputs(self, machine: Machine) -> NDArray[np.int64]:
        """``int64[groups, k, n]``: random activations of this layer's amplitude, its extremes included."""
        low, high = _signed_range(self._amplitude_bits(machine))
        rng = np.random.default_rng([self.seed, 2])
        shape = self.layer(machine).shape
        values = rng.integers(low, high + 1, (shape.groups, shape.k, shape.n))
        return np.where(rng.random(values.shape) < 0.1, low, values)

    def _requantizer(self, machine: Machine) -> Requantizer:
        """Mostly such that results are neither all 0 nor all clamped; some of every kind that the formats allow."""
        rng = np.random.default_rng([self.seed, 5])
        channels = self.m * self.groups
        scale = rng.choice([-1, 1], channels) * rng.integers(1, 30, channels)
        precision = machine.precision
        widest = precision.magnitude_bits if self.unified else precision.weight_bits
        bits = self._amplitude_bits(machine) + widest + math.log2(self.k * self.kernel**2) / 2
        beyond = max(min(bits, precision.accumulator_bits) - precision.activation_bits, 0)
        # In three tenths of the channels the lowest bit of the sum moves the result.
        dropped = np.where(rng.random(channels) < 0.3, 0, beyond + rng.integers(-3, 3, channels))
        shift = np.clip(dropped + np.log2(np.abs(scale)), 0, 48).astype(np.int64)
        bias = rng.integers(-30, 30, channels)
        odd = rng.random(channels) < 0.1
        return Requantizer(
            np.where(odd, rng.integers(-(2**31), 2**31, channels), bias).astype(np.int32),
            np.where(odd, rng.integers(-(2**15), 2**15, channels), scale).astype(np.int16),
            np.where(odd, rng.integers(0, 256, channels), shift).astype(np.uint8),
            self.relu,
        )

    def _amplitude_bits(self, machine: Machine) -> int:
        """Small inputs make small sums, of which the requantiser lets every bit through."""
        return 1 + int(np.random.default_rng([self.seed, 4]).integers(machine.precision.activation_bits))


def _random_weights(
    shape: LayerShape,
    block: tuple[int, int],
    types: NDArray[np.uint8],
    machine: Machine,
    requantizer: Requantizer,
    rng: np.random.Generator,
) -> QuantizedWeights:
    precision = machine.precision
    full = (shape.groups, shape.m, shape.k)
    low, high = _signed_range(precision.weight_bits)
    # A unified block that runs as a dense one must fit the dense format.
    top = 2**precision.magnitude_bits - 1
    if not machine.features.unified_path:
        top = min(top, high)
    per_weight = expand_blocks(types, block, shape.m, shape.k)
    dense = np.where(rng.random(full) < 0.1, low, rng.integers(low, high + 1, full))
    magnitudes = np.where(rng.random(types.shape) < 0.2, top, rng.integers(0, top + 1, types.shape))
    return QuantizedWeights(
        dense=np.where(per_weight == DENSE, dense, 0).astype(np.int16),
        signs=np.where(per_weight == UNIFIED, rng.integers(0, 2, full), 0).astype(np.uint8),
        magnitudes=np.where(types == UNIFIED, magnitudes, 0).astype(np.uint16),
        weight_bits=precision.weight_bits,
        magnitude_bits=precision.magnitude_bits,
        step_size=1.0,
        requantizer=requantizer,
    )


def _signed_range(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def random_spec(seed: int) -> LayerSpec:
    """A spec for a seed: sizes, ragged on every side, corners of the ratios, stalling ports in every third."""
    rng = np.random.default_rng([seed, 3])
    shares = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.8, 0.1), (0.4, 0.3))
    pruned, unified = shares[int(rng.integers(len(shares)))]
    load, fill, drain = rng.integers(0, 200, 3).tolist() if rng.random() < 1 / 3 else (0, 0, 0)
    kernel, height = (3, int(rng.integers(1, 6))) if rng.random() < 1 / 3 else (1, 1)
    return LayerSpec(
        m=int(rng.integers(1, 28)),
        k=int(rng.integers(1, 90 // kernel**2)),
        n=int(rng.integers(1, 12)) if kernel == 1 else int(rng.integers(1, 8)),
        groups=int(rng.choice([1, 1, 1, 2, 3])),
        height=height,
        kernel=kernel,
        stride=int(rng.integers(1, 3)),
        pruned=pruned,
        unified=unified,
        seed=seed,
        linear=kernel == 1 and bool(rng.random() < 0.4),
        relu=bool(rng.random() < 0.3),
        stalls=Stalls(load, fill, drain, seed),
    )

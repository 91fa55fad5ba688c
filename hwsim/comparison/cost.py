"""What a machine of the comparison costs: per layer and in silicon, in the units that every machine shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hwsim.area import SCALE_BITS, Memory
from hwsim.energy import ENERGY_COMPONENTS, clock_tree_pj
from hwsim.machine import Machine
from hwsim.technology import Technology

__all__ = [
    "ENERGY_PARTS",
    "LayerCost",
    "MachineCost",
    "Silicon",
    "energy_parts",
    "largest",
    "pj_per_bit",
    "requantizer_pj",
]

ENERGY_PARTS = ("array", "delivery", "memories", "requantizer", "dram", "static")
"""Arithmetic with its registers; what brings operands to it; on-chip memories; output side; DRAM; clock and leakage."""

_PART_OF = {
    "multipliers": "array",
    "sign_adders": "array",
    "dense_adder_tree": "array",
    "accumulators": "array",
    "operand_registers": "array",
    "front_end": "delivery",
    "arbiter": "delivery",
    "multicast": "delivery",
    "weight_broadcast": "delivery",
    "expander": "delivery",
    "requantizer": "requantizer",
    "dram": "dram",
    "clock": "static",
    "leakage": "static",
}


@dataclass(frozen=True)
class LayerCost:
    """One layer on one machine.

    Attributes
    ----------
    layer : str
    weight_count, kept_weights : int
        Of the uncompressed layer, and what of it the machine's pattern keeps.
    products : int
        Weights that are worked on × output positions: for block-skip one per weight of a kept block, whichever way it is done.
    compute_cycles, latency_cycles : int
        Of the array alone, and with loads and stores.
    dram_bytes : int
        Over the channel, whole bursts.
    storage_bytes : int
        Weights as they lie in DRAM, with what addresses them and 7 bytes of bias and scale per output channel.
    energy_pj : dict of str to float
        By `ENERGY_PARTS`.
    """

    layer: str
    weight_count: int
    kept_weights: int
    products: int
    compute_cycles: int
    latency_cycles: int
    dram_bytes: int
    storage_bytes: int
    energy_pj: dict[str, float]


@dataclass(frozen=True)
class MachineCost:
    """A network on one machine.

    Attributes
    ----------
    array : str
        The size of the array, for people.
    multipliers : int
    area_mm2 : float
    layers : tuple of LayerCost
    """

    array: str
    multipliers: int
    area_mm2: float
    layers: tuple[LayerCost, ...]

    @property
    def latency_cycles(self) -> int:
        """Of all layers, one after the other."""
        return sum(layer.latency_cycles for layer in self.layers)


@dataclass(frozen=True)
class Silicon:
    """Logic and memories that are not those of a `Machine`.

    Attributes
    ----------
    cell_um2 : float
        Cell area of the logic, registers excluded.
    register_bits : int
    memories : dict of str to Memory
    """

    cell_um2: float
    register_bits: int = 0
    memories: dict[str, Memory] = field(default_factory=dict)

    def logic_um2(self, technology: Technology) -> float:
        """Cell area with the registers."""
        return self.cell_um2 + self.register_bits * technology.register_um2

    def logic_mm2(self, technology: Technology) -> float:
        """Placed area of the logic."""
        return self.logic_um2(technology) * 1e-6 / technology.logic_utilization.value

    def area_mm2(self, technology: Technology) -> float:
        """Placed logic and memory macros."""
        macros = (
            part.macros * technology.memory(part.capacity_bits, part.port_bits).area_mm2
            for part in self.memories.values()
        )
        return self.logic_mm2(technology) + sum(macros)

    def static_pj_per_cycle(self, technology: Technology, clock_mhz: float) -> float:
        """Clock tree and leakage in one cycle."""
        leakage_mw = self.logic_um2(technology) * 1e-6 * technology.leakage_mw_per_mm2 + sum(
            part.macros * technology.memory(part.capacity_bits, part.port_bits).leakage_mw
            for part in self.memories.values()
        )
        clock_pj = clock_tree_pj(self.register_bits, self.logic_mm2(technology), technology)
        return clock_pj + leakage_mw * 1000 / clock_mhz  # mW × ns = pJ


def pj_per_bit(memory: Memory, technology: Technology) -> tuple[float, float]:
    """``(read, write)`` energy of one bit of a memory whose whole port is used."""
    macro = technology.memory(memory.capacity_bits, memory.port_bits)
    return macro.read_energy_pj / memory.port_bits, macro.write_energy_pj / memory.port_bits


def requantizer_pj(machine: Machine, technology: Technology) -> float:
    """Energy of one requantised output, as for the block-skip machine."""
    accumulator_bits, activation_bits = machine.precision.accumulator_bits, machine.precision.activation_bits
    return (
        technology.multiplier_pj(accumulator_bits, SCALE_BITS)
        + 2 * technology.adder_pj(accumulator_bits)
        + technology.shifter_pj(accumulator_bits)
        + (accumulator_bits + activation_bits) * technology.register_pj
    )


def energy_parts(components: NDArray[np.float64], **more: float) -> dict[str, float]:
    """Energy by `ENERGY_PARTS` from energy by `hwsim.energy.ENERGY_COMPONENTS`, with more added to the parts named."""
    parts = dict.fromkeys(ENERGY_PARTS, 0.0)
    for name, value in zip(ENERGY_COMPONENTS, components.tolist(), strict=True):
        parts[_PART_OF.get(name, "memories")] += value
    for name, value in more.items():
        parts[name] += value
    return parts


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest size from 1 to ``limit`` that fits, 0 where none does; whatever is smaller than a size that fits, fits.

    >>> largest(lambda size: size * size <= 50, 4096)
    7
    """
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low

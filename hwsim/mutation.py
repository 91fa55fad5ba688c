"""Does the verification catch faults? Single faults planted in the RTL and in the compiled kernels, and what notices them.

`MUTANTS` is the one list. A fault of the RTL stands in the module's source as ``MUTANT(number, …)``, is compiled only with
``HWSIM_MUTANTS`` and chosen at run time; a fault of a kernel is a substitution in its source, compiled as a module of its own
and put in the kernel's place. Both meet the comparison of `hwsim.verify.check`, the one that ``hwsim verify`` makes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module, resources
from pathlib import Path
from types import ModuleType

from hwsim.errors import HwsimError
from hwsim.machine import Machine, load_machine
from hwsim.rtl_simulator import Mismatch, RtlSimulator
from hwsim.verify import LayerSpec, check, random_spec

__all__ = [
    "MUTANTS",
    "MUTATION_MACHINES",
    "KernelMutant",
    "Mutant",
    "RtlMutant",
    "Verdict",
    "mutant_source",
    "mutation_machine",
    "planted",
    "run_mutants",
    "sample",
]


@dataclass(frozen=True)
class RtlMutant:
    """A fault of the RTL.

    Attributes
    ----------
    number : int
        The one in the source's ``MUTANT(number, …)``.
    module : str
        The file in ``hwsim/rtl`` without its suffix.
    fault : str
        What is wrong, in one line.
    """

    number: int
    module: str
    fault: str

    @property
    def place(self) -> str:
        """The source file, short."""
        return f"{self.module}.sv"


@dataclass(frozen=True)
class KernelMutant:
    """A fault of a compiled kernel: ``correct``, which occurs once in ``hwsim/kernels/<module>.py``, becomes ``faulty``."""

    number: int
    module: str
    fault: str
    correct: str
    faulty: str

    @property
    def place(self) -> str:
        """The source file, short."""
        return f"{self.module}.py"


Mutant = RtlMutant | KernelMutant

MUTANTS: tuple[Mutant, ...] = (
    RtlMutant(1, "front_end", "the window is one code narrower"),
    RtlMutant(2, "front_end", "the window reaches past the end of the segment"),
    RtlMutant(3, "front_end", "the queue is one shallower"),
    RtlMutant(4, "front_end", "the queue takes one more than it holds"),
    RtlMutant(5, "front_end", "examined counts only the codes passed over or pushed"),
    RtlMutant(6, "front_end", "after a push the scan goes on behind the window"),
    RtlMutant(7, "front_end", "UNIFIED and DENSE are exchanged in the queue"),
    RtlMutant(8, "front_end", "a row is finished though its queue is not empty"),
    RtlMutant(9, "front_end", "the last block column of a segment is left out"),
    RtlMutant(10, "front_end", "the queue's read pointer does not wrap"),
    RtlMutant(11, "arbiter", "a bank grants the largest block column"),
    RtlMutant(12, "arbiter", "a bank grants what the lowest row asks for"),
    RtlMutant(13, "arbiter", "a bank serves one row at a time: no multicast"),
    RtlMutant(14, "arbiter", "the multicast misses the last row"),
    RtlMutant(15, "arbiter", "two neighbouring block columns share a bank"),
    RtlMutant(16, "array_row", "the PE takes an operand only when busy is 0"),
    RtlMutant(17, "array_row", "an operand that leaves in this cycle blocks the fetch"),
    RtlMutant(18, "array_row", "a DENSE block takes one cycle more"),
    RtlMutant(19, "array_row", "a DENSE block takes one cycle less"),
    RtlMutant(20, "array_row", "a UNIFIED block takes one cycle more"),
    RtlMutant(21, "array_row", "a row is finished while its PEs are busy"),
    RtlMutant(22, "array_row", "a fetch counts as a conflict"),
    RtlMutant(23, "array_row", "a finished row counts as starved"),
    RtlMutant(24, "array_row", "the last busy cycle counts as accept when an operand waits"),
    RtlMutant(25, "array_row", "the PE does not empty the operand register"),
    RtlMutant(26, "array_row", "the PE takes the word on the bus, not the operand's"),
    RtlMutant(27, "array_row", "after a DENSE block every block is DENSE"),
    RtlMutant(28, "array_row", "the type stream begins one bit late"),
    RtlMutant(29, "array_row", "outputs of every row tile go to the block rows of the first"),
    RtlMutant(30, "array_row", "the directory of the first row tile serves every row tile"),
    RtlMutant(31, "array_row", "two-bit type codes are addressed as one-bit ones"),
    RtlMutant(32, "weight_feed", "signs are flipped"),
    RtlMutant(33, "weight_feed", "signs are read column by column"),
    RtlMutant(34, "weight_feed", "every UNIFIED block gets the magnitude of the first"),
    RtlMutant(35, "weight_feed", "the dense stream begins one bit late"),
    RtlMutant(36, "weight_feed", "the sign stream begins one bit late"),
    RtlMutant(37, "weight_feed", "dense weights are taken as unsigned"),
    RtlMutant(38, "weight_feed", "magnitudes are taken as signed"),
    RtlMutant(39, "weight_feed", "the last multiplier lane is dead"),
    RtlMutant(40, "weight_feed", "bits of the dense block before stay in the register"),
    RtlMutant(41, "weight_feed", "bits of the magnitude before stay in the register"),
    RtlMutant(42, "bit_memory", "a read does not cross into the next word"),
    RtlMutant(43, "pe", "sums of signed activations are not cleared for a block"),
    RtlMutant(44, "pe", "the accumulators are not cleared"),
    RtlMutant(45, "pe", "every dense weight meets the first activation"),
    RtlMutant(46, "pe", "a subtraction takes the complement without the carry"),
    RtlMutant(47, "pe", "sums wrap one bit too early"),
    RtlMutant(48, "pe", "the set that accumulates is drained"),
    RtlMutant(49, "drain", "outputs of padded channels leave"),
    RtlMutant(50, "drain", "outputs leave under the place of their row, not under its block row"),
    RtlMutant(51, "drain", "every group is requantised by the first one's parameters"),
    RtlMutant(52, "drain", "the drain is over one cycle late"),
    RtlMutant(53, "drain", "the end of a drain ignores back pressure"),
    RtlMutant(54, "drain", "columns that the tile lacks are drained"),
    RtlMutant(55, "drain", "the drain port goes on under back pressure"),
    RtlMutant(56, "requantizer", "the requantiser rounds down"),
    RtlMutant(57, "requantizer", "halves are rounded down"),
    RtlMutant(58, "requantizer", "the scale is taken as unsigned"),
    RtlMutant(59, "requantizer", "the bias is added behind the scale"),
    RtlMutant(60, "requantizer", "the shift is logical"),
    RtlMutant(61, "requantizer", "the clamp is symmetric"),
    RtlMutant(62, "requantizer", "the ReLU is always on"),
    RtlMutant(63, "requantizer", "the clamp is one below the highest value"),
    RtlMutant(64, "counters", "counters go on while a segment waits"),
    RtlMutant(65, "counters", "words counts a multicast once for each row"),
    RtlMutant(66, "counters", "the last cycle of a segment is not counted"),
    RtlMutant(67, "counters", "the last cycle of a segment counts for the next one too"),
    RtlMutant(68, "operand_store", "the fill writes into both halves"),
    RtlMutant(69, "block_skip_array", "a wide fill writes beyond the segment"),
    RtlMutant(70, "sequencer", "the column tile before is taken for the next one"),
    RtlMutant(71, "sequencer", "a column tile that is in the store is filled again"),
    RtlMutant(72, "sequencer", "a stalled fill port counts as served"),
    RtlMutant(73, "sequencer", "the fill of the next segment is not waited for"),
    RtlMutant(74, "sequencer", "the drain of the pass before is not waited for"),
    RtlMutant(75, "sequencer", "the weight streams start again with every segment"),
    RtlMutant(76, "sequencer", "rows that the last row tile lacks work"),
    RtlMutant(77, "sequencer", "every group finds the row tiles of the first"),
    RtlMutant(78, "sequencer", "the accumulator sets are not switched"),
    RtlMutant(79, "sequencer", "the halves of the operand store are not switched"),
    RtlMutant(80, "sequencer", "a segment is one block column shorter than half the store"),
    RtlMutant(81, "sequencer", "a step does not wait for the loads of the next one"),
    RtlMutant(82, "sequencer", "a step's first fill does not wait for its inputs"),
    RtlMutant(83, "sequencer", "a store does not wait for the last drain of its step"),
    RtlMutant(84, "sequencer", "new weights go to the half that is in use"),
    RtlMutant(85, "sequencer", "the weight half is switched though no weights came"),
    RtlMutant(86, "sequencer", "the last store is left out"),
    RtlMutant(87, "channel", "a phase is done before its inputs are loaded"),
    RtlMutant(88, "channel", "inputs have arrived one cycle early"),
    RtlMutant(89, "channel", "a load that ends takes the store with it"),
    RtlMutant(90, "loader", "the stored row order is ignored"),
    RtlMutant(91, "loader", "parts of the streams go to rows in natural order"),
    RtlMutant(92, "loader", "the second half's weights are written into the first"),
    RtlMutant(93, "loader", "the directory points one byte too far"),
    RtlMutant(94, "loader", "the first byte of a transfer is not written"),
    RtlMutant(95, "loader", "the last lane of the load port is not written"),
    RtlMutant(96, "loader", "channel parameters are exchanged in pairs"),
    KernelMutant(
        101,
        "passes",
        "the window is one code wider",
        "1 + np.arange(k_blocks + 1) // config.skip_window",
        "1 + np.arange(k_blocks + 1) // (config.skip_window + 1)",
    ),
    KernelMutant(
        102,
        "passes",
        "the queue is one deeper",
        "to_grant = np.uint64(2 * config.queue_depth + 1)",
        "to_grant = np.uint64(2 * config.queue_depth + 3)",
    ),
    KernelMutant(
        103,
        "passes",
        "the queue is one shallower",
        "to_grant = np.uint64(2 * config.queue_depth + 1)",
        "to_grant = np.uint64(2 * config.queue_depth - 1)",
    ),
    KernelMutant(
        104,
        "passes",
        "a bank grants the largest block column",
        "best[bank] = min(old, stamp + entry)",
        "best[bank] = stamp + entry if old > newest else max(old, stamp + entry)",
    ),
    KernelMutant(
        105,
        "passes",
        "a bank grants who asks first in the list",
        "best[bank] = min(old, stamp + entry)",
        "best[bank] = stamp + entry if old > newest else old",
    ),
    KernelMutant(
        106,
        "passes",
        "a bank serves one row at a time: no multicast",
        "            was_free = state[r + _FREE]\n",
        "            best[np.uint64((entry >> 1) & _BANK_MASK)] = stamp\n            was_free = state[r + _FREE]\n",
    ),
    KernelMutant(
        107,
        "passes",
        "two neighbouring block columns share a bank",
        "entries[j] = (j << _COLUMN_SHIFT) | (bank << 1)",
        "entries[j] = (j << _COLUMN_SHIFT) | (((j >> 1) % banks) << 1)",
    ),
    KernelMutant(108, "passes", "every request counts as a word", "words += old > newest", "words += 1"),
    KernelMutant(
        109,
        "passes",
        "an operand is taken in the cycle of its grant",
        "taken = max(now + 1, was_free)",
        "taken = max(now, was_free)",
    ),
    KernelMutant(
        110,
        "passes",
        "occupancies are exchanged",
        "dense_cycles if entry & 1 else unified_cycles",
        "unified_cycles if entry & 1 else dense_cycles",
    ),
    KernelMutant(
        111,
        "passes",
        "a block is requested in the cycle of its push",
        "state[r + _READY] = max(pushed + 1, taken)",
        "state[r + _READY] = max(pushed, taken)",
    ),
    KernelMutant(
        112,
        "passes",
        "an operand that leaves in this cycle blocks the fetch",
        "state[r + _READY] = max(pushed + 1, taken)",
        "state[r + _READY] = max(pushed, taken) + 1",
    ),
    KernelMutant(
        113,
        "passes",
        "the scan behind the last block looks at one code more",
        "step = (end - 2 - (entry >> _COLUMN_SHIFT) + window) // window",
        "step = (end - 1 - (entry >> _COLUMN_SHIFT) + window) // window",
    ),
    KernelMutant(
        115,
        "passes",
        "a PE that is free in the cycle of the grant does not count as accept",
        "if now >= was_free:",
        "if now > was_free:",
    ),
    KernelMutant(
        116,
        "passes",
        "cycles that starve before the end are forgotten",
        "starved += max(scanned_at - is_free, 0)",
        "starved += 0",
    ),
    KernelMutant(
        117,
        "passes",
        "the window reaches past the end",
        "out[_EXAMINED] = scan_steps * window - shortfall",
        "out[_EXAMINED] = scan_steps * window",
    ),
    KernelMutant(
        118,
        "passes",
        "only one block is looked at for windows past the end",
        "if j < end - window:",
        "if j < end - 1:",
    ),
    KernelMutant(
        119,
        "passes",
        "rows that a tile lacks scan too",
        "out[_SCANNED] = n * (end - begin)",
        "out[_SCANNED] = config.rows * (end - begin)",
    ),
    KernelMutant(
        120,
        "passes",
        "rows that a tile lacks do not count as imbalance",
        "imbalance = config.rows * cycles - finish_sum",
        "imbalance = n * cycles - finish_sum",
    ),
    KernelMutant(
        121,
        "passes",
        "a row without blocks finishes at once",
        "            finish_sum += last\n            cycles = max(cycles, last)\n            continue",
        "            finish_sum += last\n            continue",
    ),
    KernelMutant(
        122,
        "steps",
        "a fill rounds down",
        "fill[s] = (words[s] + config.fill_words - 1) // config.fill_words",
        "fill[s] = words[s] // config.fill_words",
    ),
    KernelMutant(
        123,
        "steps",
        "a drain rounds down",
        "drain = (outputs + config.drain_words - 1) // config.drain_words",
        "drain = outputs // config.drain_words",
    ),
    KernelMutant(
        124,
        "steps",
        "a drain counts the columns that a tile lacks",
        "outputs = channels[group, t] * live_columns",
        "outputs = channels[group, t] * config.columns",
    ),
    KernelMutant(
        125,
        "steps",
        "the first segment stays for the next row tile",
        "refill = segments > 1\n                        elif",
        "refill = False\n                        elif",
    ),
    KernelMutant(
        126,
        "steps",
        "the next column tile is not filled",
        "                            refill = True",
        "                            refill = False",
    ),
    KernelMutant(
        127, "steps", "another group finds the column tile before", "or spans[i + 1, 0] != group", "or False"
    ),
    KernelMutant(
        128,
        "steps",
        "a fill does not overlap the segment before",
        "work[i, 1] += alike * max(next_fill - own, 0)",
        "work[i, 1] += alike * next_fill",
    ),
    KernelMutant(
        129,
        "steps",
        "the drain does not overlap a wait for a fill",
        "total += max(own, next_fill)",
        "total += own",
    ),
    KernelMutant(
        130,
        "steps",
        "the last drain is forgotten",
        "work[n - 1, 2] += drain",
        "work[n - 1, 2] += 0",
    ),
    KernelMutant(
        131,
        "steps",
        "the first fill is forgotten",
        "work[0, 1] += fill[0]",
        "work[0, 1] += 0",
    ),
    KernelMutant(
        132,
        "steps",
        "a transfer leaves out its last, partial burst",
        "return (size_bytes + channel.burst_bytes - 1) // channel.burst_bytes *",
        "return size_bytes // channel.burst_bytes *",
    ),
    KernelMutant(
        133,
        "steps",
        "a step does not wait for the store of the one before",
        "memory[phase] += cycles",
        "memory[phase] += cycles * (kind != STORE)",
    ),
    KernelMutant(
        134, "steps", "input rows that are resident are loaded again", "    if v1 > v0:", "    if False:"
    ),
    KernelMutant(
        135,
        "steps",
        "loads and stores do not overlap the passes",
        "max(work[i, 0] + work[i, 1] + work[i, 2], memory[i + 1])",
        "work[i, 0] + work[i, 1] + work[i, 2] + memory[i + 1]",
    ),
)
"""Every fault that is planted. Each is seen in cycles, counters or outputs; what no run can see is not listed."""

_BASE: dict[str, object] = {
    "array.rows": 3,
    "array.columns": 3,
    "array.block": [2, 2],
    "array.multipliers": 2,
    "array.sign_adders": 2,
    "front_end.skip_window": 3,
    "front_end.queue_depth": 2,
    "activation_buffer.size_kib": 0.75,
    "operand_store.banks": 3,
    "operand_store.fill_words_per_cycle": 2,
    "operand_store.size_kib": 0.10546875,  # 9 words in a half: as many as the banks have places, and odd
    "weights.dense_port_bits": 12,
    "weights.sign_port_bits": 7,
    "weights.type_kib": 4,
    "weights.sign_kib": 16,
    "weights.magnitude_kib": 16,
    "weights.dense_kib": 64,
    "output.words_per_cycle": 3,
    "output.size_kib": 0.1875,
    "dram.gb_per_s": 6.4,
    "precision.accumulator_bits": 15,
    "features.row_balance": "sorted",
}
_MACHINES: dict[str, dict[str, object]] = {
    "mutants": {},
    "mutants-groups": {
        # Memories that hold few row tiles: weights, inputs and outputs come and go in steps.
        "weights.type_kib": 0.125,
        "weights.sign_kib": 0.25,
        "weights.magnitude_kib": 0.5,
        "weights.dense_kib": 1.75,
        "array.rows": 4,
        "array.sign_adders": 4,
        "weights.sign_port_bits": 32,
        "weights.dense_port_bits": 64,
        "operand_store.banks": 4,
        "operand_store.size_kib": 1,
        "operand_store.fill_words_per_cycle": 1,
        "output.words_per_cycle": 6,
        "features.row_balance": "none",
    },
}


@cache
def mutation_machine(name: str) -> Machine:
    """A machine of the mutation run: small, so that everything waits for everything else in short layers."""
    return load_machine("msa-8x8").with_fields({**_BASE, **_MACHINES[name], "name": name})


MUTATION_MACHINES = tuple(_MACHINES)


def sample(one_in: int, seed: int) -> list[Mutant]:
    """Every ``one_in``-th mutant from ``seed`` on: seeds 0 … one_in - 1 together give all of them once."""
    return [mutant for index, mutant in enumerate(MUTANTS) if index % one_in == seed % one_in]


def mutant_source(mutant: KernelMutant) -> str:
    """The kernel's source with the fault in it.

    Raises
    ------
    HwsimError
        What is to be replaced does not occur exactly once.
    """
    source = resources.files("hwsim").joinpath("kernels", f"{mutant.module}.py").read_text("utf-8")
    found = source.count(mutant.correct)
    if found != 1:
        raise HwsimError(
            f"mutant {mutant.number}: {mutant.correct!r} occurs {found} times in hwsim/kernels/{mutant.module}.py, must once"
        )
    # A module that is no file has no compile cache.
    return source.replace(mutant.correct, mutant.faulty).replace("cache=True, ", "")


@contextmanager
def planted(mutant: KernelMutant) -> Iterator[None]:
    """The faulty kernel in the place of the right one, in every module of hwsim that uses it."""
    original = import_module(f"hwsim.kernels.{mutant.module}")
    faulty = ModuleType(f"{original.__name__}_{mutant.number}")
    exec(compile(mutant_source(mutant), f"<mutant {mutant.number}>", "exec"), vars(faulty))
    replaced: list[tuple[ModuleType, str, object]] = []
    users = [
        module for name, module in sys.modules.items() if name.startswith("hwsim.") and module is not original
    ]
    for name in original.__all__:
        right = getattr(original, name)
        if not hasattr(right, "py_func"):
            continue
        for module in users:
            if vars(module).get(name) is right:
                replaced.append((module, name, right))
                setattr(module, name, getattr(faulty, name))
    try:
        yield
    finally:
        for module, name, right in replaced:
            setattr(module, name, right)


_CORNERS = (
    LayerSpec(1, 1, 1),
    # Passes shorter than their fill and than the drain of the one before.
    LayerSpec(9, 6, 11, pruned=1, unified=0),
    # A column tile that stays for the next row tile, and one that does not stay for the next group.
    LayerSpec(12, 18, 1, pruned=1, unified=0),
    LayerSpec(2, 18, 1, groups=3, pruned=1, unified=0),
    # Output rows that come one by one, each with an input row beside the two that the one before left.
    LayerSpec(4, 16, 7, height=9, kernel=3),
    # Long runs of pruned blocks behind the last one executed.
    LayerSpec(9, 89, 4, pruned=0.95, unified=0.03),
)


def _layers(count: int, seed: int) -> list[LayerSpec]:
    return [*_CORNERS, *map(random_spec, range(seed, seed + count))]


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant.

    Attributes
    ----------
    mutant : Mutant
    caught : str
        The first difference; empty if it survived.
    machine : str
        That showed it.
    layers : int
        Run until then, over all machines.
    """

    mutant: Mutant
    caught: str
    machine: str
    layers: int


def run_mutants(
    mutants: Sequence[Mutant], *, layers: int, seed: int = 0, machines: Sequence[str] = MUTATION_MACHINES
) -> Iterator[Verdict]:
    """Each mutant against the layers ``seed … seed + layers - 1`` on each machine until something notices it.

    First the design and the kernels without a fault must pass all of these layers, on the same builds.

    Raises
    ------
    Mismatch
        They do not: nothing that is caught would mean anything.
    HwsimError
        The list of mutants and the sources disagree.
    """
    _check_sources()
    with ExitStack() as stack:
        sound = [stack.enter_context(RtlSimulator(mutation_machine(name), mutant=0)) for name in machines]
        work = [
            (
                simulator,
                [spec for spec in _layers(layers, seed) if check(simulator, spec)],
            )
            for simulator in sound
        ]
        for mutant in mutants:
            if isinstance(mutant, KernelMutant):
                with planted(mutant):
                    yield _hunt(mutant, work)
                continue
            with ExitStack() as faulty:
                yield _hunt(
                    mutant,
                    [
                        (faulty.enter_context(RtlSimulator(simulator.machine, mutant=mutant.number)), specs)
                        for simulator, specs in work
                    ],
                )


def _hunt(mutant: Mutant, work: Sequence[tuple[RtlSimulator, Sequence[LayerSpec]]]) -> Verdict:
    ran = 0
    for simulator, specs in work:
        for spec in specs:
            ran += 1
            try:
                check(simulator, spec)
            except Mismatch as difference:
                return Verdict(mutant, str(difference), simulator.machine.name, ran)
    return Verdict(mutant, "", "", ran)


def _check_sources() -> None:
    """Every fault of the list is planted once in its module, and none is planted that is not listed."""
    listed = sorted((mutant.number, mutant.module) for mutant in MUTANTS if isinstance(mutant, RtlMutant))
    there = []
    for entry in resources.files("hwsim").joinpath("rtl").iterdir():
        if entry.name.endswith(".sv"):
            numbers = re.findall(r"`MUTANT\((\d+),", entry.read_text("utf-8"))
            there += [(int(number), Path(entry.name).stem) for number in numbers]
    if listed != sorted(there):
        raise HwsimError(f"mutants listed and planted differ: {sorted(set(listed) ^ set(there))}")
    for mutant in MUTANTS:
        if isinstance(mutant, KernelMutant):
            mutant_source(mutant)

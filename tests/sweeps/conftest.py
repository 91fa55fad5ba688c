"""Tables with the shape and rough size of real results, made from simple formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

LAYERS = {"conv1": 288_000, "conv2": 1_600_000, "fc1": 400_000, "fc2": 5_000}
WEIGHTS = {"conv1": 500, "conv2": 25_000, "fc1": 400_000, "fc2": 5_000}
ENERGY_SHARES = {
    "dram": 0.42,
    "dense_memory": 0.16,
    "multipliers": 0.09,
    "clock_and_leakage": 0.08,
    "operand_store": 0.07,
    "accumulators": 0.05,
    "multicast_network": 0.04,
    "activation_buffer": 0.03,
    "sign_adders": 0.03,
    "expander": 0.02,
    "requantiser": 0.01,
}
Tables = dict[str, pd.DataFrame]


@pytest.fixture(scope="session")
def make_tables() -> Callable[..., Tables]:
    """A function from axes to the four tables of a result store."""
    return synthetic_tables


@pytest.fixture(scope="session")
def tables() -> Tables:
    """A sweep of the usual size: five block shapes, four ratios, both holds, two seeds."""
    return synthetic_tables()


@pytest.fixture(scope="session")
def many_tables() -> Tables:
    """Ten thousand points: the usual sweep, 125 times with other ratios and DRAM bandwidths."""
    return repeated(synthetic_tables(), 125)


@pytest.fixture(scope="session")
def many_page(many_tables: Tables, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report page of ten thousand points, with the two figures that draw them all."""
    from sweeps.figures import pareto_plot
    from sweeps.html import write_report

    runs = [
        {"started": "2026-01-02T03:04:05Z", "configuration": {"name": "many"}, "versions": {"hwsim": "0.1.0"}}
    ]
    points = many_tables["points"]
    return write_report(
        tmp_path_factory.mktemp("many") / "report.html",
        title="Ten thousand points",
        tables=many_tables,
        plots=[pareto_plot(points), pareto_plot(points, "energy_pj")],
        manifest={"runs": runs},
        assumptions="No bank timing.",
    )


def repeated(tables: Tables, times: int) -> Tables:
    """The same sweep again and again, a little slower and more accurate each time, under keys of their own."""
    rng = np.random.default_rng(5)
    copies: dict[str, list[pd.DataFrame]] = {name: [] for name in tables}
    for i in range(times):
        for name, table in tables.items():
            copy = table.assign(key=f"{i:03d}-" + table["key"])
            if name == "points":
                copy = copy.assign(**on_machine(round(12.8 - i / 10, 1)))
                copy["pruned"] = (copy["pruned"] * (1 - i / 1000)).round(6)
                copy["latency_ms"] *= 1 + 0.01 * i
                copy["accuracy_integer"] += 1e-5 * i + 0.002 * rng.normal(size=len(copy)).round(5)
            copies[name].append(copy)
    return {name: pd.concat(parts, ignore_index=True) for name, parts in copies.items()}


def on_machine(dram_gb_per_s: float) -> dict[str, float]:
    """Columns that a sweep over DRAM bandwidths adds to its points."""
    return {
        "dram.gb_per_s": dram_gb_per_s,
        "dram_gb_per_s": dram_gb_per_s,
        "clock_mhz": 1000.0,
        "peak_gmac_per_s": 1024.0,
    }


def synthetic_tables(
    blocks: Sequence[str] = ("4x4", "1x16", "8x1", "2x2", "16x16"),
    ratios: Sequence[tuple[float, float]] = ((0.0, 1.0), (0.5, 0.5), (0.75, 0.25), (0.5, 0.25)),
    holds: Sequence[str] = ("lanes", "area"),
    seeds: Sequence[int] = (0, 1),
) -> Tables:
    """Each table as the store returns it."""
    rng = np.random.default_rng(3)
    rows: dict[str, list[dict[str, object]]] = {"points": [], "layers": [], "energy": [], "storage": []}
    for block in blocks:
        for pruned, unified in ratios:
            for hold in holds:
                for seed in seeds:
                    _add_point(rows, rng, block, pruned, unified, hold, seed)
    return {name: pd.DataFrame(table) for name, table in rows.items()}


def _add_point(
    rows: dict[str, list[dict[str, object]]],
    rng: np.random.Generator,
    block: str,
    pruned: float,
    unified: float,
    hold: str,
    seed: int,
) -> None:
    key = f"{block}-{pruned}-{unified}-{hold}-{seed}"
    g_o, g_k = (int(size) for size in block.split("x"))
    size = g_o * g_k
    dense = 1 - pruned - unified
    weight_count = sum(WEIGHTS.values())
    streams = {
        "type": weight_count / size * (2 if dense else 1),
        "sign": unified * weight_count,
        "magnitude": unified * weight_count / size * 8,
        "dense": dense * weight_count * 8,
        "offsets": weight_count / 100,
        "requantizer": 56 * 580,
    }
    image_bits = sum(streams.values())
    speedup = 1 / (dense + unified / 2 + 0.05) * (size / 16) ** 0.1 * (1.1 if hold == "area" else 1)
    accuracy = 0.905 - 0.02 * pruned**2 - 0.004 * np.log2(size) * (1 - dense) / 4 + 0.001 * rng.normal()
    energy_pj = 9.1e6 * (0.25 + 0.5 / speedup)
    latency_cycles = int(61_000 / speedup)
    rows["points"].append(
        {
            "key": key,
            "network": "lenet-5",
            "block": block,
            "block_rows": g_o,
            "block_columns": g_k,
            "pruned": pruned,
            "unified": unified,
            "hold": hold,
            "machine": "msa-16x16",
            "seed": seed,
            "accuracy_dense_float": 0.909,
            "accuracy_float": accuracy,
            "accuracy_integer": accuracy - 0.002,
            "latency_cycles": latency_cycles,
            "latency_ms": latency_cycles / 1e6,
            "compute_cycles": latency_cycles // 2,
            "speedup_compute_only": speedup * 1.3 * (1 + 0.03 * rng.normal()),
            "speedup_with_memory": speedup * (1 + 0.03 * rng.normal()),
            "speedup_equal_area": speedup * 0.8,
            "energy_pj": energy_pj,
            "dense_energy_pj": 9.1e6,
            "dram_bytes": int(image_bits / 8),
            "average_bandwidth_gb_per_s": image_bits / 8 / latency_cycles,
            "peak_bandwidth_gb_per_s": 12.8,
            "peak_demand_gb_per_s": 31.5,
            "area_mm2": 3.5,
            "image_bytes": int(image_bits / 8),
            "file_bytes": int(image_bits / 9),
            "fp32_bytes": 4 * weight_count,
            "int8_bytes": weight_count,
            "bits_per_weight": image_bits / weight_count,
            "compression_vs_fp32": 32 * weight_count / image_bits,
            "weight_count": weight_count,
            "macs": sum(LAYERS.values()),
            "error": None,
        }
    )
    for layer, macs in LAYERS.items():
        share = WEIGHTS[layer] / weight_count
        rows["layers"].append(
            {
                "key": key,
                "layer": layer,
                "macs": macs,
                "weight_count": WEIGHTS[layer],
                "latency_cycles": int(macs / 400 + share * latency_cycles),
                "compute_cycles": macs // 500,
                "dram_bytes": int(image_bits / 8 * share + 700),
                "bound": "weights" if layer.startswith("fc") else "compute",
            }
        )
        rows["energy"] += [
            {
                "key": key,
                "layer": layer,
                "component": component,
                "energy_pj": energy_pj * part * share,
                "dense_energy_pj": 9.1e6 * part * share,
            }
            for component, part in ENERGY_SHARES.items()
        ]
        rows["storage"] += [
            {"key": key, "layer": layer, "stream": name, "size_bits": round(bits * share)}
            for name, bits in streams.items()
        ]

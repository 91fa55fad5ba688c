"""The comparison itself: rows, operating points, measurements, one JSON document."""

from __future__ import annotations

import copy
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress import zoo
from compress.codec import encode_network
from compress.codec.network import PRESETS
from compress.codec_bench import worker
from compress.codec_bench.networks import (
    EXACT_BITS,
    Problem,
    Rounding,
    block_compressed,
    densities,
    packaged_weights,
    save_problem,
)
from compress.codec_bench.processes import in_process, run_nncodec
from compress.curvature import Curvature, curvatures
from compress.data import Dataset, load_dataset
from compress.layers import CompressedLayer
from compress.quantize import dequantize
from compress.rate_distortion import coarsen, refit_biases, round_biases, set_weights
from compress.train import Checkpoint, evaluate, load_checkpoint, note_of, save_checkpoint, train
from hwsim.errors import InputError
from hwsim.errors import Problem as Fault

__all__ = ["ROWS", "compare"]

ROWS = (
    ("prune 75 %", 0.25, False),
    ("prune 90 %", 0.10, False),
    ("unify all", 1.0, True),
    ("prune 75 % + unify", 0.25, True),
)
"""Name, share of weights that stay, whether what stays is unified."""

RATIOS = ((0.5, 0.5), (0.75, 0.25))
"""Pruned and unified shares of the packaged networks."""

QP_ACCURACY = tuple(range(-34, -9))
QP_ERROR = (-38, -32, -26)

LOST_POINTS = 0.1
"""NNCodec's file is its smallest whose validation accuracy is at most so many points below the weights as given; ours is the
smallest that is at least as accurate there as NNCodec's."""

MARGIN_POINTS = 1.0
"""With refitted biases ours must be so many points above NNCodec's on the validation images, since both were selected there."""

MULTIPLIERS = tuple(2.5e-10 * 2.0**i for i in range(13))
VALIDATION_IMAGES, CALIBRATION_IMAGES = 5000, 2048
REPEATS, REPEATS_ERROR = 9, 3
"""Times that each is encoded and decoded for the medians of its seconds: networks of milliseconds, and of seconds."""


@dataclass(frozen=True, eq=False)
class _Images:
    calibration: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def compare(
    folder: Path,
    nncodec_python: Path | None,
    packages: dict[str, Path],
    *,
    epochs: int = 8,
    train_images: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run every row and give one JSON document.

    Parameters
    ----------
    folder : Path
        For the trained network, which is found again, and for what the processes hand over.
    nncodec_python : Path, optional
        A Python with NNCodec; without one its columns are missing.
    packages : dict of str to Path
        Wheels or weight files of packaged networks, by name.
    epochs : int
        Of training LeNet-5.
    train_images : int, optional
        Train on a subset.
    say : callable
        Called with a line for people as each row begins.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if nncodec_python is not None and not nncodec_python.is_file():
        raise InputError("codec-bench", Fault("nncodec", f"{nncodec_python} does not exist"))
    torch.set_num_threads(1)
    data = load_dataset("fashion-mnist", train_limit=train_images)
    network = _dense_network(folder, data, epochs, say)
    images = _images(data)
    document: dict[str, Any] = {
        "provenance": _provenance(data, epochs),
        "dense_accuracy": _percent(network.model, images.test),
        "rows": [],
    }
    for name, kept, unify in ROWS:
        say(f"LeNet-5, {name}")
        document["rows"].append(_accuracy_row(network, images, name, kept, unify, nncodec_python))
    for package, path in packages.items():
        weights = packaged_weights(path)
        for pruned, unified in RATIOS:
            say(f"{package}, p = {pruned}, u = {unified}")
            document["rows"] += _error_rows(package, weights, pruned, unified, nncodec_python)
    return document


def _provenance(data: Dataset, epochs: int) -> dict[str, Any]:
    versions = {name: metadata.version(name) for name in ("hwsim", "constriction", "numpy", "torch")}
    return {
        "packages": {"python": platform.python_version()} | versions,
        "dataset": data.source,
        "training": {"images": len(data.train_labels), "epochs": epochs, "seed": 0},
        "processors": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "timing": "processor seconds of one thread, median of the repetitions",
    }


def _dense_network(folder: Path, data: Dataset, epochs: int, say: Callable[[str], None]) -> Checkpoint:
    path = folder / f"lenet5-{len(data.train_labels)}-{epochs}.safetensors"
    if path.exists():
        return load_checkpoint(path)
    say(f"training LeNet-5 for {epochs} epochs")
    model = zoo.build("lenet5", 10, 0)
    history = train(model, data, epochs=epochs, seed=0)
    checkpoint = Checkpoint(model, "lenet5", 10, 0, history, note_of(data))
    save_checkpoint(path, checkpoint)
    return checkpoint


def _images(data: Dataset) -> _Images:
    order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(0))
    validation, calibration = order[:VALIDATION_IMAGES], order[VALIDATION_IMAGES:][:CALIBRATION_IMAGES]
    part = {
        name: (data.normalise(data.train_images[chosen]), data.train_labels[chosen])
        for name, chosen in (("validation", validation), ("calibration", calibration))
    }
    return _Images(**part, test=(data.normalise(data.test_images), data.test_labels))


def _percent(model: nn.Module, images: tuple[Tensor, Tensor]) -> float:
    return round(100 * evaluate(model, *images), 2)


# --- rows with an accuracy


def _accuracy_row(
    network: Checkpoint, images: _Images, name: str, kept: float, unify: bool, nncodec: Path | None
) -> dict[str, Any]:
    model = copy.deepcopy(network.model).eval()
    modules = {
        key: module for key, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }
    shapes = {key: tuple(module.weight.shape) for key, module in modules.items()}
    shares = densities(shapes, kept)
    layers = {}
    for key, module in modules.items():
        pruned = round(1 - shares[key], 6)
        layers[key] = block_compressed(
            key, module.weight.detach(), pruned, round(1 - pruned, 6) if unify else 0.0
        )
        with torch.no_grad():
            module.weight.copy_(dequantize(layers[key], shapes[key]))
    problem = Problem(layers, shapes, _biases(model), curvatures(model, layers, images.calibration[0]))
    with tempfile.TemporaryDirectory() as folder:
        row: dict[str, Any] = {
            "network": "LeNet-5",
            "weights": name,
            "fp32_bytes": problem.fp32_bytes,
            "quality": "accuracy",
            "given": _percent(model, images.test),
        }
        least = _percent(model, images.validation) - LOST_POINTS
        if nncodec is not None:
            peer = _best_of_nncodec(nncodec, problem, model, images, least, Path(folder))
            row["nncodec"] = peer
            least = peer["chosen"]["validation"]
        found = {
            "ours": _our_best(problem, model, images, least),
            "ours_refitted": _our_best_refitted(problem, model, images, least + MARGIN_POINTS),
        }
        for key, point in found.items():
            if point is not None:
                rounding = Rounding(**point["rounding"])
                measured = _measure_ours(point.pop("problem"), rounding, 8, REPEATS, Path(folder))
                row[key] = point | measured
    return row


def _biases(model: nn.Module) -> dict[str, np.ndarray]:
    return {key: values.numpy().copy() for key, values in model.state_dict().items() if key.endswith(".bias")}


def _best_of_nncodec(
    python: Path, problem: Problem, model: nn.Module, images: _Images, least: float, folder: Path
) -> dict[str, Any]:
    """NNCodec at every qp, and its smallest file that is good enough on the validation images."""
    points = run_nncodec(python, problem.weights(), QP_ACCURACY, folder)
    decoded = copy.deepcopy(model)
    for point in points:
        with np.load(folder / f"qp{point['qp']}.npz", allow_pickle=False) as stored:
            decoded.load_state_dict({key: torch.from_numpy(stored[key]) for key in stored.files})
        point["validation"] = _percent(decoded, images.validation)
    chosen = _smallest(points, least)
    with np.load(folder / f"qp{chosen['qp']}.npz", allow_pickle=False) as stored:
        decoded.load_state_dict({key: torch.from_numpy(stored[key]) for key in stored.files})
    chosen["accuracy"] = _percent(decoded, images.test)
    measured = run_nncodec(python, problem.weights(), (chosen["qp"],), folder, REPEATS)
    return {"chosen": chosen | measured[0], "points": points}


def step_of(qp: int) -> float:
    """NNCodec's step at a qp; with ``use_dq=False`` every weight becomes the nearest multiple of it.

    Source: ISO/IEC 15938-17, with ``qp_density`` 2, the default of NNCodec. Weights that 2.1.3 decoded at qp -26, -21, -19,
    -16, -14 and -11 were such multiples to the bit.

    >>> step_of(-14), step_of(-16)
    (0.09375, 0.0625)
    """
    return (4 + qp % 4) * 2.0 ** (qp // 4 - 2)


def _our_best(problem: Problem, model: nn.Module, images: _Images, least: float) -> dict[str, Any]:
    """Ours at every λ and at every step of NNCodec's, and the smallest file that is good enough on the validation images."""
    kinds = {"loss and rate": MULTIPLIERS, "one step": tuple(map(step_of, QP_ACCURACY))}
    points: list[dict[str, Any]] = []
    for rounding in (Rounding(kind, value) for kind, values in kinds.items() for value in values):
        tried, layers = _coarse(problem, model, rounding)
        points.append(
            {
                "rounding": asdict(rounding),
                "size_bytes": len(encode_network(layers, problem.weight_shapes, _biases(tried), "small")),
                "validation": _percent(tried, images.validation),
            }
        )
    chosen = _smallest(points, least)
    tried, _ = _coarse(problem, model, Rounding(**chosen["rounding"]))
    return chosen | {
        "accuracy": _percent(tried, images.test),
        "problem": replace(problem, state=_biases(tried)),
        "points": points,
    }


def _smallest(points: list[dict[str, Any]], least: float) -> dict[str, Any]:
    """The smallest file that is good enough on the validation images; where none is, the most accurate one."""
    enough = [point for point in points if point["validation"] >= least]
    if enough:
        return min(enough, key=lambda point: point["size_bytes"])
    return max(points, key=lambda point: point["validation"])


def _our_best_refitted(
    problem: Problem, model: nn.Module, images: _Images, least: float
) -> dict[str, Any] | None:
    """The coarsest that is good enough with refitted biases, by bisection; None where none is."""
    best, low, high = None, -1, len(MULTIPLIERS)
    while high - low > 1:
        middle = (low + high) // 2
        rounding = Rounding("loss and rate", MULTIPLIERS[middle])
        tried, layers = _coarse(problem, model, rounding)
        refit_biases(tried, layers, *images.calibration)
        validation = _percent(tried, images.validation)
        if validation < least:
            high = middle
            continue
        low = middle
        best = {
            "rounding": asdict(rounding),
            "validation": validation,
            "accuracy": _percent(tried, images.test),
            "problem": replace(problem, state=_biases(tried)),
        }
    return best


def _coarse(
    problem: Problem, model: nn.Module, rounding: Rounding
) -> tuple[nn.Module, dict[str, CompressedLayer]]:
    """A copy of the network with coarser weights of 8 bits and rounded biases."""
    tried = copy.deepcopy(model)
    layers = {
        name: rounding.of_layer(layer, problem.curvature[name], 8) for name, layer in problem.layers.items()
    }
    set_weights(tried, layers)
    round_biases(tried, layers, rounding.bias_fraction_bits)
    return tried, layers


# --- rows with an error


def _error_rows(
    package: str, weights: dict[str, Tensor], pruned: float, unified: float, nncodec: Path | None
) -> list[dict[str, Any]]:
    layers = {name: block_compressed(name, values, pruned, unified) for name, values in weights.items()}
    shapes = {name: tuple(values.shape) for name, values in weights.items()}
    constant = {
        name: Curvature.constant(1, layer.weights.dense.shape[1], layer.weights.dense.shape[2])
        for name, layer in layers.items()
    }
    problem = Problem(layers, shapes, {}, constant)
    given = problem.weights()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        points: list[dict[str, Any]] = [{"qp": qp} for qp in QP_ERROR]
        if nncodec is not None:
            points = [run_nncodec(nncodec, given, (qp,), folder, REPEATS_ERROR)[0] for qp in QP_ERROR]
        for point in points:
            row: dict[str, Any] = {
                "network": package,
                "weights": f"p = {pruned}, u = {unified}",
                "fp32_bytes": problem.fp32_bytes,
                "quality": "snr_db",
            }
            target = {-38: 30.0, -32: 20.0, -26: 10.0}[point["qp"]]
            if nncodec is not None:
                with np.load(folder / f"qp{point['qp']}.npz", allow_pickle=False) as stored:
                    target = point["snr_db"] = _snr_db(given, {key: stored[key] for key in stored.files})
                row["nncodec"] = {"chosen": point}
            found = _at_least(problem, given, target)
            rounding = Rounding("loss and rate", found["multiplier"])
            measured = _measure_ours(problem, rounding, EXACT_BITS, REPEATS_ERROR, folder)
            row["ours"] = found | measured
            rows.append(row)
    return rows


def _snr_db(exact: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> float:
    """Signal over error of all weights together, in dB."""
    signal = sum(float((values.astype(np.float64) ** 2).sum()) for values in exact.values())
    error = sum(
        float(((values - found[name]).astype(np.float64) ** 2).sum()) for name, values in exact.items()
    )
    return round(10 * float(np.log10(signal / max(error, 1e-300))), 3)


def _at_least(problem: Problem, given: dict[str, np.ndarray], target_db: float) -> dict[str, Any]:
    """Nearly the coarsest integers whose error is at most that of NNCodec.

    The error is proportional to the multiplier at high rate (λ/ln 2 a weight), so a few corrections find it.
    """
    count = sum(layer.weights.dense.size for layer in problem.layers.values())
    signal = sum(float((values.astype(np.float64) ** 2).sum()) for values in given.values())
    multiplier = float(np.log(2)) * signal / count * 10 ** (-target_db / 10)
    best: dict[str, Any] = {}
    for turn in range(8):
        layers: dict[str, CompressedLayer] = {
            name: coarsen(
                layer, problem.curvature[name], multiplier, weight_bits=EXACT_BITS, magnitude_bits=EXACT_BITS
            )
            for name, layer in problem.layers.items()
        }
        excess_db = _snr_db(given, replace(problem, layers=layers).weights()) - target_db
        if excess_db >= 0:
            best = {"multiplier": multiplier, "snr_db": round(target_db + excess_db, 3)}
        if best and (turn >= 3 or 0 <= excess_db < 0.05):
            break
        multiplier *= 10 ** ((excess_db - 0.02) / 10)
    return best


# --- processes of their own


def _measure_ours(
    problem: Problem, rounding: Rounding, bits: int, repeats: int, folder: Path
) -> dict[str, Any]:
    """Both presets, each measured in a process of its own."""
    save_problem(folder / "problem.npz", problem)
    job = {
        "problem": str(folder / "problem.npz"),
        "rounding": asdict(rounding),
        "bits": bits,
        "repeats": repeats,
    }
    command = [sys.executable, "-m", worker.__name__]
    return {preset: in_process(command, job | {"preset": preset}, folder) for preset in PRESETS}

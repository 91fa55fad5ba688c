"""What a command is asked about: a compressed file, a network of the zoo, an ONNX file, or a report, with its machine.

The origin of a subject goes into its report, so that `hwsim explain` can build the layers anew and `hwsim diff` can say what
differs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwsim.errors import InputError, Problem, nearest_name
from hwsim.layer import Layer, LayerShape, random_layers
from hwsim.machine import Machine

if TYPE_CHECKING:
    from hwsim.report import Report

__all__ = [
    "RandomMap",
    "Subject",
    "file_subject",
    "is_file",
    "load_subject",
    "network_shapes",
    "network_subject",
    "random_network",
    "report_subject",
]


@dataclass(frozen=True)
class RandomMap:
    """How the layers of a network by name get their block maps.

    Attributes
    ----------
    block : tuple of int or None
        None for the machine's native block.
    pruned, unified : float
    all_layers : bool
        Whether the first and the last layer are compressed too.
    seed : int
    """

    block: tuple[int, int] | None = None
    pruned: float = 0.5
    unified: float = 0.5
    all_layers: bool = False
    seed: int = 0
    input_shape: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Subject:
    """Layers with the machine that they run on.

    Attributes
    ----------
    network : str
    machine : Machine
    layers : list of Layer
    origin : dict
        Where the layers came from, as JSON values; ``kind`` is "file", "random", or "point" (of a sweep).
    notes : tuple of str
        Work of the network that these layers are not.
    """

    network: str
    machine: Machine
    layers: list[Layer]
    origin: dict[str, Any]
    notes: tuple[str, ...] = ()

    def simulate(self) -> Report:
        """The report, with the origin in it."""
        from hwsim.simulator import simulate

        report = simulate(self.machine, self.layers, network=self.network)
        return replace(report, origin=self.origin, warnings=(*report.warnings, *self.notes))


def load_subject(model: str, machine: Machine, random_map: RandomMap, batch: int = 1) -> Subject:
    """A compressed file by its path, or a network of the zoo by its name.

    Raises
    ------
    InputError
        There is neither, or the file is damaged.
    """
    if is_file(model):
        return file_subject(model, machine, batch)
    return network_subject(model, machine, random_map, batch)


def is_file(model: str) -> bool:
    """Whether the name of a model means a compressed file: neither a network of the zoo nor a graph of ONNX."""
    path = Path(model)
    return path.suffix == ".safetensors" or (path.exists() and path.suffix != ".onnx")


def network_shapes(
    network: str, batch: int = 1, input_shape: tuple[int, ...] | None = None
) -> list[LayerShape]:
    """Shapes of the layers of a network of the zoo by its name, or of an ONNX file by its path.

    Raises
    ------
    InputError
        Neither; or an ONNX file that cannot be read or that leaves the shape of its input open.
    """
    if Path(network).suffix != ".onnx":
        from compress.zoo_shapes import zoo_shapes

        return zoo_shapes(network, batch)
    from compress.onnx_import import import_onnx
    from compress.plain import to_plain
    from compress.shapes import layer_shapes

    found = import_onnx(Path(network), input_shape=input_shape, any_batch=batch > 1)
    return layer_shapes(to_plain(found.model).model, found.input_shape, batch, dtype=found.dtype)


def random_network(
    network: str, block: tuple[int, int], random_map: RandomMap, batch: int = 1
) -> list[Layer]:
    """The layers of a network with seeded random block maps; all uses of a weight have the map of the first."""
    layers = random_layers(
        network_shapes(network, batch, random_map.input_shape),
        block,
        random_map.pruned,
        random_map.unified,
        random_map.seed,
        exempt_first_last=not random_map.all_layers,
    )
    first = {layer.name: layer for layer in reversed(layers) if "#" not in layer.name}
    return [
        replace(layer, types=first[name].types) if (name := layer.name.split("#")[0]) in first else layer
        for layer in layers
    ]


def network_subject(network: str, machine: Machine, random_map: RandomMap, batch: int = 1) -> Subject:
    """A network of the zoo or an ONNX file with seeded random block maps of exact ratios."""
    block = random_map.block or machine.array.block
    layers = random_network(network, block, random_map, batch)
    origin = {
        "kind": "random",
        "block": f"{block[0]}x{block[1]}",
        "pruned": random_map.pruned,
        "unified": random_map.unified,
        "all_layers": random_map.all_layers,
        "seed": random_map.seed,
        "batch": batch,
    }
    if random_map.input_shape is not None:
        origin["input_shape"] = list(random_map.input_shape)
    return Subject(network, machine, layers, origin)


def file_subject(path: str | Path, machine: Machine, batch: int = 1) -> Subject:
    """The layers of a compressed file."""
    from compress.artifact import load_artifact

    artifact = load_artifact(path)
    config = dict(artifact.recipe.get("config", {}))
    block = config.pop("block", None)
    origin = {
        "kind": "file",
        "file": str(path),
        "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        **({"block": f"{block[0]}x{block[1]}"} if block else {}),
        **{name: config.pop(name) for name in ("pruned", "unified") if name in config},
        "seed": artifact.seed,
        "batch": batch,
        **{f"compression.{name}": value for name, value in config.items()},
        **{name: value for name, value in artifact.results.items() if name.startswith("accuracy_")},
    }
    untreated = artifact.recipe.get("untreated", [])
    notes = tuple(f"not among the layers: {row['name']}: {row['reason']}" for row in untreated)
    return Subject(Path(path).name, machine, artifact.layers(batch), origin, notes)


def report_subject(report: Report, source: str) -> Subject:
    """The layers that a report was made of, from its origin.

    Raises
    ------
    InputError
        The report does not say where its layers came from, or the file is not there any more or has changed.
    """
    origin: Mapping[str, Any] = report.origin
    kind = origin.get("kind")
    hint = "explain the network, the file or the point itself"
    if kind == "random":
        names = ("block", "pruned", "unified", "all_layers", "seed", "batch")
        if missing := [name for name in names if name not in origin]:
            raise InputError(source, [Problem(f"origin.{name}", "missing", hint) for name in missing])
        try:
            g_o, g_k = (int(size) for size in str(origin["block"]).split("x"))
            ratios = float(origin["pruned"]), float(origin["unified"])
            given = origin.get("input_shape")
            shape = None if given is None else tuple(int(size) for size in given)
            random_map = RandomMap(
                (g_o, g_k), *ratios, bool(origin["all_layers"]), int(origin["seed"]), shape
            )
            batch = int(origin["batch"])
        except (TypeError, ValueError) as error:
            raise InputError(source, Problem("origin", f"damaged: {error}", hint)) from None
        return network_subject(report.network, report.machine, random_map, batch)
    if kind == "file":
        subject = file_subject(str(origin.get("file")), report.machine, int(origin.get("batch", 1)))
        if subject.origin["sha256"] != origin.get("sha256"):
            raise InputError(source, Problem("origin.file", f"{origin.get('file')} has changed since", hint))
        return subject
    allowed = nearest_name(str(kind), ("random", "file"))
    raise InputError(
        source, Problem("origin.kind", f"found {kind!r}: the layers cannot be built anew ({allowed})", hint)
    )

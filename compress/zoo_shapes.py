"""Layer shapes of the networks of the zoo, kept as data so that simulating one by name need not import torch.

`tests/compress/test_zoo_shapes.py` holds the file against the definitions; `python -m compress.zoo_shapes` writes it again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cache
from importlib import resources
from typing import Any

from hwsim.errors import InputError, Problem, nearest_name
from hwsim.layer import LayerShape

__all__ = ["zoo_names", "zoo_shapes"]

_FILE = "zoo_shapes.json"


def zoo_shapes(network: str, batch: int = 1) -> list[LayerShape]:
    """Shapes of the layers of a network of the zoo, in order of execution.

    Raises
    ------
    InputError
        Unknown name, with the nearest one.
    """
    known = _known()
    if network not in known:
        raise InputError(
            "network", Problem("name", f'"{network}" is not in the zoo', nearest_name(network, known))
        )
    return [replace(_shape(entry), batch=batch) for entry in known[network]]


def zoo_names() -> list[str]:
    """The networks of the zoo."""
    return list(_known())


@cache
def _known() -> dict[str, list[dict[str, Any]]]:
    return json.loads(resources.files("compress").joinpath(_FILE).read_text("utf-8"))


def _shape(entry: dict[str, Any]) -> LayerShape:
    tuples = {name: tuple(entry[name]) for name in ("input_size", "kernel", "stride", "dilation")}
    padding = tuple((before, after) for before, after in entry["padding"])
    return LayerShape(**entry | tuples | {"padding": padding})


def shapes_from_definitions() -> dict[str, list[dict[str, Any]]]:
    """What the file must hold: every network of the zoo, traced without weights."""
    import torch

    from compress.shapes import layer_shapes
    from compress.zoo import NETWORKS

    found = {}
    for name, entry in NETWORKS.items():
        with torch.device("meta"):
            model = entry.make(entry.num_classes)
        shapes = layer_shapes(model, entry.input_shape, dtype=getattr(torch, entry.input_dtype))
        found[name] = [asdict(shape) for shape in shapes]
    return found | _from_onnx()


def _from_onnx() -> dict[str, list[dict[str, Any]]]:
    """Networks that come as ONNX files: from the installed package, else as the file has them."""
    from compress.onnx_import import import_onnx
    from compress.plain import to_plain
    from compress.pretrained.catalog import PRETRAINED, find_weights
    from compress.shapes import layer_shapes

    found = {}
    for name, entry in PRETRAINED.items():
        if not entry.is_onnx:
            continue
        try:
            content = find_weights(entry).read_bytes()
        except InputError:
            found[name] = _known()[name]
            continue
        model = to_plain(import_onnx(content, name, entry.input_shape).model).model
        found[name] = [asdict(shape) for shape in layer_shapes(model, entry.input_shape)]
    return found


def main() -> None:
    """Write the data file beside this module."""
    from pathlib import Path

    text = json.dumps(shapes_from_definitions(), indent=None, separators=(",", ":"))
    Path(__file__).with_name(_FILE).write_text(text.replace("]],", "]],\n") + "\n", "utf-8")


if __name__ == "__main__":
    main()

"""The packaged layer shapes against the definitions of the networks."""

from __future__ import annotations

import json

import pytest

from compress.zoo_shapes import shapes_from_definitions, zoo_shapes
from hwsim.errors import InputError

# Published parameter counts of weights alone (torchvision's models without biases and normalisation) and MACs of one input.
PUBLISHED = {"resnet18": (11_678_912, 1_814_073_344), "lenet5": (430_500, 2_293_000)}


def test_the_file_holds_what_the_definitions_say() -> None:
    definitions = json.loads(json.dumps(shapes_from_definitions()))
    for name, entries in definitions.items():
        assert [json.loads(json.dumps(shape.__dict__)) for shape in zoo_shapes(name)] == entries


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_totals_are_the_published_ones(name: str) -> None:
    shapes = zoo_shapes(name)
    assert (sum(shape.weight_count for shape in shapes), sum(shape.macs for shape in shapes)) == PUBLISHED[
        name
    ]


def test_batch_multiplies_positions_only() -> None:
    one, four = zoo_shapes("lenet5"), zoo_shapes("lenet5", batch=4)
    assert [(a.m, a.k, 4 * a.n) for a in one] == [(b.m, b.k, b.n) for b in four]


def test_an_unknown_network_names_the_nearest() -> None:
    with pytest.raises(InputError, match="lenet5"):
        zoo_shapes("lenet6")

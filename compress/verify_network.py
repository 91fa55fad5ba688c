"""Real layers through the RTL: image in, layer by layer, each output integer against the integer model's.

What is not an array layer (pooling, residual additions, reshaping) runs in the integer model, whose integers go into every
layer; where all of them come out again, the RTL's logits are the model's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from compress import zoo
from compress.artifact import Artifact
from compress.fit import compress
from compress.integer.arithmetic import LayerTrace
from compress.integer.calibration import quantize_activations
from compress.integer.model import IntegerModel
from compress.rebuild import make_artifact, rebuild_integer
from compress.rules import CompressionConfig, Recipe
from compress.shapes import layer_shapes
from hwsim.causal import StepTiming, step_timing
from hwsim.errors import InputError, Problem, nearest_name
from hwsim.layer import Layer
from hwsim.program import input_matrix
from hwsim.rtl_simulator import Mismatch, RtlSimulator
from hwsim.simulator import run_layer
from hwsim.verify import check_layer

__all__ = ["LayerCheck", "projected_artifact", "verify_network"]


@dataclass(frozen=True)
class LayerCheck:
    """A layer of which everything was equal.

    Attributes
    ----------
    layer : str
    image : int
    outputs : int
    rtl_cycles : int
        Latency of the layer in RTL, equal to the causal model's.
    timing : StepTiming
    weight_residence, input_residence : str
    rtl_seconds : float
    """

    layer: str
    image: int
    outputs: int
    rtl_cycles: int
    timing: StepTiming
    weight_residence: str
    input_residence: str
    rtl_seconds: float


def verify_network(
    artifact: Artifact,
    images: torch.Tensor,
    simulator: RtlSimulator,
    *,
    only: Collection[str] = (),
    model: IntegerModel | None = None,
) -> Iterator[LayerCheck]:
    """Run the layers of a network through the RTL, image by image, and compare counters, times and outputs.

    Parameters
    ----------
    artifact : Artifact
        With calibrated activations.
    images : float32 tensor ``[n, …]``
        Normalised.
    simulator : RtlSimulator
    only : collection of str
        Names of the layers to run; all where empty.
    model : IntegerModel, optional
        Of the artifact, where it is at hand.

    Raises
    ------
    InputError
        A name that is no layer's; a layer that the design cannot run.
    Mismatch
        At the first difference.
    """
    model = model or rebuild_integer(artifact)
    layers = {layer.name: layer for layer in artifact.layers()}
    unknown = [
        Problem("layer", f'"{name}" is none of the network', nearest_name(name, layers))
        for name in only
        if name not in layers
    ]
    if unknown:
        raise InputError("verification", unknown)
    for image in range(len(images)):
        for name, trace in _named(model.layer_trace(images[image : image + 1])):
            if not only or name in only:
                yield _check(layers[name], trace, image, simulator)


def _named(trace: list[LayerTrace]) -> Iterator[tuple[str, LayerTrace]]:
    """A module's second use has #2 behind its name, as in the list of shapes."""
    uses: Counter[str] = Counter()
    for entry in trace:
        uses[entry.name] += 1
        yield entry.name if uses[entry.name] == 1 else f"{entry.name}#{uses[entry.name]}", entry


def _check(layer: Layer, trace: LayerTrace, image: int, simulator: RtlSimulator) -> LayerCheck:
    before = simulator.rtl_seconds
    native = layer.at_native_block(simulator.machine.array.block)
    result = check_layer(simulator, layer, input_matrix(native, trace.input))
    expected = _output_matrix(trace.output, layer)
    if not np.array_equal(result.outputs, expected):
        channel, place = (int(i) for i in np.argwhere(result.outputs != expected)[0])
        raise Mismatch(
            f"layer {layer.name}, image {image}: output [{channel}, {place}] is {int(result.outputs[channel, place])} in RTL, "
            f"{int(expected[channel, place])} in the integer model"
        )
    run = run_layer(layer, simulator.machine)
    return LayerCheck(
        layer.name,
        image,
        result.outputs.size,
        result.layer_cycles,
        step_timing(run, simulator.machine),
        run.mapping.weight_residence,
        run.mapping.input_residence,
        simulator.rtl_seconds - before,
    )


def _output_matrix(output: NDArray[np.int64], layer: Layer) -> NDArray[np.int64]:
    """``int64[out_channels, n]`` of a module's output."""
    channels = layer.shape.out_channels
    axis = -1 if layer.shape.kind == "linear" else 1
    return np.moveaxis(output, axis, 0).reshape(channels, -1)


def projected_artifact(
    network: str, config: CompressionConfig, *, seed: int = 0, images: int = 1
) -> tuple[Artifact, torch.Tensor]:
    """A network of the zoo with seeded weights, projected and quantised without training, and random images.

    For verification: its integers are as real as a trained network's, its accuracy is not.
    """
    entry = zoo.network(network)
    model = zoo.build(network, entry.num_classes, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    inputs = entry.random_inputs(images, generator)
    calibration = entry.random_inputs(2, generator)
    recipe = Recipe(epochs_admm=0, epochs_retrain=0, seed=seed)
    layers = compress(model, config, [(calibration[:1], torch.zeros(1, dtype=torch.int64))], recipe).layers
    integers = quantize_activations(model, layers, calibration, batch_size=1)
    artifact = make_artifact(
        model,
        layers,
        entry.input_shape,
        entry.num_classes,
        network=network,
        integer_model=integers,
        seed=seed,
        shapes=layer_shapes(model, entry.input_shape, dtype=inputs.dtype),
    )
    return artifact, inputs

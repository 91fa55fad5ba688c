"""Imported ONNX files against onnxruntime, and the way from a file to a simulated, compressed network."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from compress.any_network import compress_network
from compress.artifact import load_artifact
from compress.cli_networks import _calibration, parse_shape
from compress.onnx_import import import_onnx
from compress.plain import to_plain
from compress.pretrained.catalog import PRETRAINED, find_weights
from compress.rules import CompressionConfig
from compress.shapes import layer_shapes
from compress.subjects import network_shapes
from hwsim.cli import cli
from hwsim.errors import FormatError, InputError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*one-shot")


def run(content: bytes, values: Tensor) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options)
    return session.run(None, {session.get_inputs()[0].name: values.numpy()})


class Mixed(nn.Module):
    """What torch exports of convolutions, pooling, attention-like products, normalisation, slices and shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Hardswish(), nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.AvgPool2d(2),
        )  # fmt: skip
        self.q, self.k, self.norm = nn.Linear(4, 6), nn.Linear(4, 6, bias=False), nn.LayerNorm(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).flatten(2).transpose(1, 2)
        q, k = self.q(x), self.k(x)
        x = torch.softmax(q @ k.transpose(1, 2) / 6**0.5, -1) @ k
        x = self.norm(x + q)[:, ::2]
        return self.head(torch.cat([x, nn.functional.gelu(x)], 1).mean(1))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = Mixed().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
    path = tmp_path_factory.mktemp("onnx") / "mixed.onnx"
    torch.onnx.export(
        model, (torch.randn(1, 3, 8, 8),), str(path), dynamo=False, input_names=["x"],
        dynamic_axes={"x": {0: "n"}},
    )  # fmt: skip
    return path


@torch.no_grad()
def test_what_torch_exports_comes_back(file: Path) -> None:
    found = import_onnx(file)
    values = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    (expected,) = run(file.read_bytes(), values)
    np.testing.assert_allclose(found.model(values).numpy(), expected, atol=1e-5)
    assert found.input_shape == (3, 8, 8)
    names = [
        shape.name for shape in layer_shapes(to_plain(found.model).model, (3, 8, 8)) if shape.kind == "linear"
    ]
    assert names == ["q", "k", "head"]
    q = found.model.get_submodule("q")
    assert isinstance(q, nn.Linear)
    assert q.bias is not None  # MatMul and Add became one layer


def test_from_the_file_to_cycles(file: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "inputs.npy", np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32))
    out = tmp_path / "mixed.hws.safetensors"
    arguments = ["compress", str(file), "--pruned", "0.5", "--unified", "0.5", "--out", str(out)]
    done = CliRunner().invoke(
        cli, [*arguments, "--inputs", str(tmp_path / "inputs.npy")], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert "interleaved" in done.output
    assert "random inputs" not in done.output
    artifact = load_artifact(out)
    assert artifact.recipe["onnx"]["file"] == "mixed.onnx"
    assert artifact.recipe["calibrated_on"] == "inputs.npy"
    assert artifact.recipe["one_shot"]["method"] == "projection"
    fitted = ["--inputs", str(tmp_path / "inputs.npy"), "--one-shot", "--rounding-error", "0.01"]
    CliRunner().invoke(cli, [*arguments, *fitted], catch_exceptions=False)
    assert (
        load_artifact(out).recipe["one_shot"].items() >= {"method": "hessian", "rounding_error": 0.01}.items()
    )
    assert artifact.activations
    for model in (out, file):
        done = CliRunner().invoke(cli, ["simulate", str(model), "--json"], catch_exceptions=False)
        report = json.loads(done.output)
        assert [row["layer"] for row in report["layers"]][-1] == "head"
    done = CliRunner().invoke(cli, arguments)
    assert "random inputs" in done.output
    done = CliRunner().invoke(cli, ["storage", str(file)], catch_exceptions=False)
    assert "mixed.onnx" in done.output


def test_arrays_of_inputs_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    path, shape = tmp_path / "inputs.npy", (3, 8, 8)
    for content in (b"", b"hello"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"as numpy\.save writes it"):
            _calibration(path, shape, torch.float32, 0)
    np.save(path, np.full((2, *shape), 0.5))
    with pytest.raises(InputError, match="must be integers"):
        _calibration(path, shape, torch.int64, 0)
    for dtype in (">f4", np.longdouble, np.float16):
        np.save(path, np.full((2, *shape), 0.5, dtype))
        assert _calibration(path, shape, torch.float32, 0).unique().tolist() == [0.5]
    with pytest.raises(InputError, match="is not a shape"):
        parse_shape("3x\N{SUPERSCRIPT TWO}")


def graph(
    *nodes: onnx.NodeProto,
    shape: tuple[object, ...] = (1, 2, 6, 6),
    opset: int = 12,
    kind: int = TensorProto.FLOAT,
    **stored: np.ndarray,
) -> bytes:
    """A file of these nodes from ``x`` to ``y``."""
    inputs = [helper.make_tensor_value_info("x", kind, shape)]
    outputs = [helper.make_tensor_value_info("y", kind, None)]
    tensors = [numpy_helper.from_array(values, name) for name, values in stored.items()]
    made = helper.make_graph(list(nodes), "g", inputs, outputs, tensors)
    return helper.make_model(
        made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8
    ).SerializeToString()


KERNEL = np.random.default_rng(0).normal(size=(3, 2, 2, 3)).astype(np.float32)
NO_ROI = np.zeros(0, np.float32)
node = helper.make_node


@pytest.mark.parametrize(
    "content",
    [
        graph(node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", strides=[2, 2]), w=KERNEL),
        graph(node("Conv", ["x", "w"], ["y"], auto_pad="SAME_LOWER"), w=KERNEL),
        graph(node("Conv", ["x", "w"], ["y"], pads=[0, 1, 2, 0], dilations=[2, 1]), w=KERNEL),
        graph(node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2], pads=[1, 0, 1, 0]), w=KERNEL[:2]),
        graph(node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], auto_pad="SAME_UPPER")),
        graph(node("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2])),
        graph(node("Softmax", ["x"], ["y"])),  # opset 12: the second axis and all behind it
        graph(node("Resize", ["x", "r", "s"], ["y"], mode="nearest", coordinate_transformation_mode="asymmetric",
                   nearest_mode="floor"), r=NO_ROI, s=np.array([1, 1, 2, 2], np.float32)),
        graph(node("Resize", ["x", "r", "s"], ["y"], mode="linear"), r=NO_ROI, s=np.array([1, 1, 2, 2], np.float32)),
        *(
            graph(node("Resize", ["x", "r", "s"], ["y"], mode="nearest", coordinate_transformation_mode=coordinates,
                       nearest_mode=rounding), r=NO_ROI, s=np.array([1, 1, factor, 1.5], np.float32))
            for coordinates in ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")
            for rounding in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")
            for factor in (0.5, 3.0)
        ),
        graph(node("Greater", ["x", "z"], ["c"]), node("Where", ["m", "x", "z"], ["y"]), z=np.array(0, np.float32),
              m=np.array([[True, False, True, True, False, True]])),
        graph(node("Shape", ["x"], ["s"]), node("Gather", ["s", "i"], ["k"]), node("Cast", ["k"], ["f"], to=1),
              node("Mul", ["x", "f"], ["y"]), i=np.array(2)),
        graph(node("Shape", ["x"], ["s"]), node("Slice", ["s", "a", "b"], ["t"]),
              node("Concat", ["t", "m"], ["u"], axis=0), node("Reshape", ["x", "u"], ["y"]),
              a=np.array([0]), b=np.array([1]), m=np.array([-1])),
        graph(node("Split", ["x"], ["a", "b"], axis=1), node("Sub", ["a", "b"], ["y"])),
        graph(node("Slice", ["x", "a", "b", "c", "d"], ["y"]), a=np.array([-1]), b=np.array([-9]), c=np.array([3]),
              d=np.array([-2])),
        graph(node("Gather", ["x", "i"], ["y"], axis=2), i=np.array([[0, -1]])),
        graph(node("BatchNormalization", ["x", "s", "s", "s", "s"], ["y"]), s=np.array([1, 2], np.float32)),
        graph(node("Pad", ["x", "p"], ["y"], mode="reflect"), p=np.array([0, 0, 1, 2, 0, 0, 2, 1])),
        graph(node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)),
        graph(node("HardSigmoid", ["x"], ["a"], alpha=0.3), node("Div", ["a", "c"], ["y"]), c=np.array(3.0, np.float32)),
        graph(node("Clip", ["x", "", "c"], ["y"]), c=np.array(0.1, np.float32)),
    ],
)  # fmt: skip
@torch.no_grad()
def test_operators_are_onnxruntimes(content: bytes) -> None:
    values = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    found = import_onnx(content).model(values)
    np.testing.assert_allclose(found.numpy(), run(content, values)[0], atol=1e-5)


def test_all_that_is_not_supported_is_named_at_once() -> None:
    content = graph(
        node("NonZero", ["x"], ["a"], name="first"), node("Softmx", ["x"], ["b"], name="second"),
        node("Conv", ["x", "x"], ["y"], name="third"),
    )  # fmt: skip
    with pytest.raises(InputError) as caught:
        import_onnx(content, "net.onnx")
    text = str(caught.value)
    assert "node first (NonZero)" in text
    assert 'did you mean "Softmax"' in text
    assert "node third (Conv): has a weight or bias that is computed from the input" in text


def test_uses_that_torch_has_no_module_for_are_refused() -> None:
    for nodes, stored, reason in (
        ((node("Gemm", ["x", "w", "c"], ["y"], transB=1),), {"w": np.eye(4, dtype=np.float32),
          "c": np.ones((4, 1), np.float32)}, "adds a matrix [4, 1]"),
        ((node("AveragePool", ["x"], ["y"], kernel_shape=[2, 2], dilations=[2, 2]),), {}, "is dilated"),
        ((node("Resize", ["x", "r", "s"], ["y"], mode="linear", coordinate_transformation_mode="asymmetric"),),
          {"r": NO_ROI, "s": np.array([1, 1, 2, 2], np.float32)}, "has the coordinates asymmetric"),
        ((node("Resize", ["x", "r", "s"], ["y"], mode="linear", exclude_outside=1),),
          {"r": NO_ROI, "s": np.array([1, 1, 2, 2], np.float32)}, "has exclude_outside 1"),
        ((node("Dropout", ["x"], ["d", "mask"]), node("Where", ["mask", "d", "x"], ["y"])), {}, "more than one output"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=re.escape(reason)):
            import_onnx(graph(*nodes, **stored))


def test_later_opsets_pad_and_reduce_along_given_axes() -> None:
    values = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    for content in (
        graph(node("Pad", ["x", "p", "", "a"], ["y"]), opset=18, p=np.array([1, 2]), a=np.array([-1])),
        graph(
            node("ReduceSum", ["x", "a"], ["y"], noop_with_empty_axes=1), opset=18, a=np.zeros(0, np.int64)
        ),
        graph(node("ReduceMean", ["x"], ["y"], keepdims=0), opset=18, shape=("n", 2, 6, 6)),
    ):
        found = import_onnx(content).model(values)
        np.testing.assert_allclose(found.numpy(), run(content, values)[0], atol=1e-5)


def test_open_dimensions_and_broken_files_are_said(tmp_path: Path) -> None:
    content = graph(node("Relu", ["x"], ["y"]), shape=("n", 2, "h", "w"))
    with pytest.raises(InputError, match=r"leaves it open: 2x\?x\? \(say which: --input-shape"):
        import_onnx(content)
    assert import_onnx(content, input_shape=(2, 4, 4)).input_shape == (2, 4, 4)
    with pytest.raises(InputError, match="the file says"):
        import_onnx(content, input_shape=(3, 4, 4))
    (tmp_path / "bad.onnx").write_bytes(b"no protobuf")
    with pytest.raises(FormatError, match="no ONNX file"):
        import_onnx(tmp_path / "bad.onnx")
    with pytest.raises(InputError, match="cannot be read"):
        import_onnx(tmp_path / "missing.onnx")


def values_of(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def flattened(first: int, *, target: list[int], image: tuple[int, ...] = (3, 6, 6)) -> bytes:
    """A convolution, a reshape to a stored target, and a Gemm, for ``first`` inputs at a time."""
    return graph(
        node("Conv", ["x", "c.weight"], ["h"], pads=[1, 1, 1, 1]),
        node("Reshape", ["h", "target"], ["f"]),
        node("Gemm", ["f", "fc.weight"], ["y"], transB=1),
        shape=(first, *image),
        target=np.array(target),
        **{"c.weight": values_of(4, 3, 3, 3), "fc.weight": values_of(8, 4 * 36, seed=1)},
    )


@pytest.mark.parametrize(
    ("first", "target"),
    [(1, [1, -1]), (1, [1, 144]), (1, [0, -1]), (1, [-1, 144]), (2, [2, -1]), (2, [2, 144])],
)
@torch.no_grad()
def test_a_stated_batch_in_reshapes_is_opened(first: int, target: list[int]) -> None:
    content, values = flattened(first, target=target), torch.from_numpy(values_of(6, 3, 6, 6))
    parts = [run(content, part)[0] for part in values.split(first)]
    np.testing.assert_allclose(import_onnx(content).model(values).numpy(), np.concatenate(parts), atol=1e-4)


def test_a_reshape_of_something_else_stays_as_it_is() -> None:
    # The 1 of the target is no batch: what comes in begins with 36.
    nodes = (node("Reshape", ["x", "a"], ["t"]), node("Reshape", ["t", "b"], ["y"]))
    content = graph(*nodes, shape=(1, 36), a=np.array([36, -1]), b=np.array([1, -1]))
    values = torch.from_numpy(values_of(1, 36))
    model = import_onnx(content, any_batch=False).model
    np.testing.assert_array_equal(model(values).numpy(), run(content, values)[0])
    with pytest.raises(InputError, match="the network holds to it: output 0 has shape"):
        import_onnx(content)


@pytest.mark.parametrize("with_inputs", [False, True])
def test_files_with_a_fixed_batch_are_compressed(tmp_path: Path, with_inputs: bool) -> None:
    path, out = tmp_path / "fixed.onnx", tmp_path / "fixed.hws.safetensors"
    path.write_bytes(flattened(1, target=[1, -1]))
    np.save(tmp_path / "inputs.npy", values_of(5, 3, 6, 6))
    more = ["--inputs", str(tmp_path / "inputs.npy"), "--one-shot"] if with_inputs else []
    rules = ["--pruned", "0", "--unified", "0", "--out", str(out)]
    done = CliRunner().invoke(cli, ["compress", str(path), *rules, *more], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert [layer.name for layer in load_artifact(out).layers()] == ["c", "fc"]


@pytest.mark.parametrize(
    ("nodes", "stored", "reason"),
    [
        ((node("Concat", ["x", "t"], ["y"], axis=1),), {"t": values_of(1, 1, 6)}, "at concat_0: Sizes of tensors"),
        ((node("ReduceMean", ["x"], ["m"], axes=[0]), node("Sub", ["x", "m"], ["y"])), {}, "changes with the other"),
        ((node("Gather", ["x", "i"], ["y"], axis=0),), {"i": np.array([0])}, "output 0 has shape (1, 2, 6)"),
    ],
)  # fmt: skip
def test_a_network_that_holds_to_its_batch_is_refused(
    nodes: tuple[onnx.NodeProto, ...], stored: dict[str, np.ndarray], reason: str, tmp_path: Path
) -> None:
    content = graph(*nodes, shape=(1, 2, 6), **stored)
    with pytest.raises(InputError, match=re.escape(reason)) as caught:
        import_onnx(content)
    assert 'dynamic_axes={"x": {0: "batch"}}' in str(caught.value)
    assert "While executing" not in str(caught.value)
    import_onnx(content, any_batch=False)
    (tmp_path / "fixed.onnx").write_bytes(content)
    done = CliRunner().invoke(cli, ["compress", str(tmp_path / "fixed.onnx")])
    assert isinstance(done.exception, InputError)


def test_a_fixed_batch_is_enough_for_shapes(tmp_path: Path) -> None:
    nodes = (node("Gemm", ["x", "fc.weight"], ["h"]), node("Concat", ["h", "t"], ["y"], axis=1))
    path = tmp_path / "fixed.onnx"
    path.write_bytes(graph(*nodes, shape=(1, 8), t=values_of(1, 1), **{"fc.weight": values_of(8, 8)}))
    assert [shape.name for shape in network_shapes(str(path))] == ["fc"]
    with pytest.raises(InputError, match="exported for 1 at a time"):
        network_shapes(str(path), 2)


def test_stored_matrices_that_are_no_layers_are_listed() -> None:
    content = graph(
        node("MatMul", ["x", "a.weight"], ["h"]), node("MatMul", ["left", "h"], ["i"], name="turned"),
        node("MatMul", ["i", "right"], ["j"]), node("Gather", ["table", "places"], ["k"]),
        node("Mul", ["j", "channels"], ["l"]), node("Add", ["l", "positions"], ["m"]), node("Gather", ["m", "one"], ["n"]),
        node("Shape", ["x"], ["s"]), node("Gather", ["table", "s"], ["o"]), node("ReduceMean", ["o"], ["p"], keepdims=0),
        node("Add", ["n", "p"], ["y"]),
        shape=("n", 6, 8), left=values_of(6, 6), right=values_of(1, 8, 8), table=values_of(9, 3), places=np.array([1]),
        channels=values_of(1, 6, 1), positions=values_of(6, 8), one=np.array([0]), **{"a.weight": values_of(8, 8)},
    )  # fmt: skip
    found = import_onnx(content)
    config = CompressionConfig(block=(2, 2), exempt_first_last=False)
    artifact = compress_network(found.model, torch.from_numpy(values_of(4, 6, 8)), config)
    assert list(artifact.compressed) == ["a"]
    reasons = {row["name"]: row["reason"] for row in artifact.recipe["untreated"]}
    assert reasons == {
        "matmul_1": "MatMul with a stored array of 6x6 on the left: only one of two dimensions on the right becomes a layer",
        "matmul_2": "MatMul with a stored array of 1x8x8 on the right: only one of two dimensions on the right becomes a layer",
        "add_5": "Add with a stored array of 6x8: no product of matrices",
        "gather_8": "Gather from a stored array of 9x3: rows are looked up, nothing is multiplied",
    }  # fmt: skip
    assert len([note for note in artifact.results["warnings"] if "outside the array: MatMul" in note]) == 2
    with pytest.warns(UserWarning, match="matmul_1 .*, matmul_2 "):
        layer_shapes(found.model, found.input_shape)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE])
@torch.no_grad()
def test_floats_of_every_width_become_float32(kind: int) -> None:
    width = np.float16 if kind == TensorProto.FLOAT16 else np.float64
    content = graph(
        node("MatMul", ["x", "a.weight"], ["h"]), node("Relu", ["h"], ["i"]), node("Cast", ["i"], ["j"], to=kind),
        node("Mul", ["j", "c"], ["k"]), node("MatMul", ["k", "b.weight"], ["y"]),
        shape=("n", 8), kind=kind, c=np.array(0.5, width),
        **{"a.weight": values_of(8, 8).astype(width), "b.weight": values_of(8, 4, seed=1).astype(width)},
    )  # fmt: skip
    found, values = import_onnx(content), torch.from_numpy(values_of(4, 8).astype(width))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(
        found.model(values.float()).numpy(), run(content, values)[0].astype(np.float32), atol=0.02
    )
    config = CompressionConfig(block=(2, 2), exempt_first_last=False)
    assert list(compress_network(found.model, values.float(), config).compressed) == ["a", "b"]


def test_names_that_nothing_gives_are_said() -> None:
    content = graph(node("Relu", ["z"], ["a"], name="first"), node("Tanh", ["a"], ["y"], name="second"))
    with pytest.raises(FormatError, match=r'node first \(Relu\): reads "z", which no input') as caught:
        import_onnx(content)
    assert "second" not in str(caught.value)  # it is behind the first
    with pytest.raises(FormatError, match="output y: no input, initializer or node gives it"):
        import_onnx(graph(node("Relu", ["x"], ["a"])))
    with pytest.raises(FormatError, match=r'node early \(Relu\): reads "b"'):  # its node comes later
        import_onnx(graph(node("Relu", ["b"], ["y"], name="early"), node("Tanh", ["x"], ["b"])))


def test_sparse_initializers_are_said() -> None:
    proto = onnx.load_model_from_string(graph(node("MatMul", ["x", "w"], ["y"]), shape=("n", 4)))
    values = numpy_helper.from_array(np.ones(2, np.float32), "w")
    places = numpy_helper.from_array(np.array([0, 5]), "places")
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [4, 4]))
    with pytest.raises(FormatError, match=r"sparse_initializer w: is not read \(store it as a dense"):
        import_onnx(proto.SerializeToString())


@pytest.mark.parametrize(
    ("name", "size"), [("ppocr-cls", (3, 48, 96)), ("ppocr-det", (3, 64, 64)), ("ppocr-rec", (3, 48, 64))]
)
@torch.no_grad()
def test_pp_ocr_is_onnxruntimes(name: str, size: tuple[int, ...]) -> None:
    try:
        content = find_weights(PRETRAINED[name]).read_bytes()
    except InputError as error:
        pytest.skip(str(error))
    values = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    found = import_onnx(content, name, size).model(values)
    np.testing.assert_allclose(found.numpy(), run(content, values)[0], atol=1e-4)

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

from compress.artifact import load_artifact
from compress.cli_networks import _calibration, parse_shape
from compress.onnx_import import import_onnx
from compress.plain import to_plain
from compress.pretrained.catalog import PRETRAINED, find_weights
from compress.shapes import layer_shapes
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
    CliRunner().invoke(
        cli, [*arguments, "--inputs", str(tmp_path / "inputs.npy"), "--one-shot"], catch_exceptions=False
    )
    assert load_artifact(out).recipe["one_shot"]["method"] == "hessian"
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
    *nodes: onnx.NodeProto, shape: tuple[object, ...] = (1, 2, 6, 6), opset: int = 12, **stored: np.ndarray
) -> bytes:
    """A file of these nodes from ``x`` to ``y``."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
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
        graph(node("ReduceMean", ["x"], ["y"], keepdims=0), opset=18),
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

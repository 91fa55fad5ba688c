"""Networks with everything in them: compressed, written, read, simulated, and what is left out is named."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from compress.any_network import compress_network
from compress.artifact import Artifact, load_artifact, save_artifact
from compress.integer.calibration import quantize_activations
from compress.one_shot import OneShotRecipe
from compress.rebuild import rebuild, rebuild_integer
from compress.rules import CompressionConfig, Recipe
from compress.shapes import layer_shapes, matrix_work
from compress.zoo import NETWORKS, build
from hwsim import simulate
from hwsim.errors import InputError
from hwsim.machine import load_machine

DENSE = CompressionConfig(block=(2, 2), pruned=0, unified=0, exempt_first_last=False)
HALF = CompressionConfig(block=(2, 2), pruned=0.5, unified=0.5, exempt_first_last=False)
pytestmark = pytest.mark.filterwarnings("ignore:.*one-shot")


class Everything(nn.Module):
    """Weight norm, a transposed convolution, reuse, a tie, attention twice over, calls on parameters, an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = parametrizations.weight_norm(nn.Conv1d(4, 8, 3, padding=1))
        self.up = nn.ConvTranspose1d(8, 8, 4, stride=2, padding=1)
        self.fc, self.tied = nn.Linear(8, 8), nn.Linear(8, 8)
        self.again, self.tied.weight = self.fc, self.fc.weight
        self.enc = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.w, self.gate = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.randn(5, 5))
        self.rnn, self.never, self.out = nn.LSTM(5, 5, batch_first=True), nn.Linear(3, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(torch.relu(self.conv(x))).relu().transpose(1, 2)
        x = self.enc(self.tied(torch.relu(self.again(self.fc(x)))))
        x = x + self.mha(x, x, x)[0]
        if len(x) > 10**6:  # torch.fx stops here, torch.export does not
            x = x * 2
        x = torch.einsum("nld,de->nle", x @ self.w, self.gate)
        return self.out(self.rnn(x)[0])


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return Everything().eval()


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return torch.randn(6, 4, 10, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def artifact(network: nn.Module, inputs: Tensor) -> Artifact:
    return compress_network(network, inputs, DENSE)


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@torch.no_grad()
def test_everything_survives_the_file(
    artifact: Artifact, network: nn.Module, inputs: Tensor, tmp_path: Path
) -> None:
    save_artifact(tmp_path / "a.safetensors", artifact)
    stored = load_artifact(tmp_path / "a.safetensors")
    wanted = network(inputs)
    # 8-bit weights, then 8-bit activations as well
    assert off(rebuild(stored, Everything)(inputs), wanted) < 0.01
    assert off(rebuild_integer(stored, Everything)(inputs), wanted) < 0.03
    names = [layer.name for layer in stored.layers()]
    assert names[:5] == ["conv", "up.conv", "fc.core", "fc.core#2", "fc.core#3"]
    assert "enc.self_attn.q" in names
    uses = {layer.name: layer for layer in stored.layers() if layer.name.startswith("fc.core")}
    assert len({id(layer.types) for layer in uses.values()}) == 1  # one weight, three uses
    assert not any("core.weight" in name or name.startswith("again") for name in stored.state)  # stored once
    machine = load_machine("msa-8x8").with_fields({"array.block": [2, 2]})
    assert set(simulate(machine, stored.layers()).layers["layer"]) == set(names)


def test_what_is_not_treated_is_listed(artifact: Artifact) -> None:
    rows = {row["name"]: row["reason"] for row in artifact.recipe["untreated"]}
    assert "LSTM is not" in rows["rnn"]
    assert "in lstm" in rows["rnn.weight_ih_l0"]
    assert "past any layer" in rows["w"]
    assert "einsum" in rows["gate"]
    assert "no forward pass runs it" in rows["never"]
    assert {row["kind"] for row in artifact.recipe["plain"]} >= {"ConvTranspose1d", "MultiheadAttention"}
    notes = artifact.results["warnings"]
    assert any("no fusion" in note for note in notes)
    assert any("rnn runs outside the array" in note for note in notes)


def test_pruned_and_unified_blocks_hold(network: nn.Module, inputs: Tensor) -> None:
    artifact = compress_network(network, inputs, HALF)
    for layer in artifact.compressed.values():
        blocks = layer.types.size
        assert (layer.types == 0).sum() == blocks // 2
    report = simulate(load_machine("msa-8x8").with_fields({"array.block": [2, 2]}), artifact.layers())
    assert report.layers["compute_cycles"].sum() > 0


class Kinds(nn.Module):
    """Transposed, grouped and depthwise convolutions, attention, and a tie: all that has a Hessian of its own kind."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(8, 8, 4, stride=2, padding=1)
        self.grouped, self.depthwise = nn.Conv1d(8, 8, 3, groups=2), nn.Conv1d(8, 8, 3, groups=8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc, self.tied = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(torch.relu(self.grouped(torch.relu(self.up(x))))).transpose(1, 2)
        x = x + self.attention(x, x, x)[0]
        return self.tied(torch.relu(self.fc(x)))


@torch.no_grad()
def test_one_shot_fits_every_kind_of_layer_to_its_inputs() -> None:
    torch.manual_seed(0)
    model = Kinds().eval()
    values = (torch.randn(64, 3) @ torch.randn(3, 8 * 12)).reshape(64, 8, 12)
    kept = CompressionConfig(block=(2, 2), pruned=0.0, unified=0.75, exempt_first_last=False)
    found = {
        method: compress_network(
            model, values, kept, one_shot=OneShotRecipe(method=method), allocation="hessian"
        )
        for method in ("projection", "hessian")
    }
    errors = {row["layer"]: row for row in found["hessian"].results["layer_errors"]}
    assert (
        set(errors) == set(found["hessian"].compressed) >= {"up.conv", "grouped", "depthwise", "attention.q"}
    )
    fitted = [row for row in errors.values() if row["is_fitted"]]
    assert len(fitted) > len(errors) / 2
    assert all(row["reached_percent"] <= row["projected_percent"] + 0.01 for row in fitted)
    lost = {
        method: off(rebuild(artifact, Kinds)(values), model(values)) for method, artifact in found.items()
    }
    assert lost["hessian"] < 0.9 * lost["projection"]
    assert found["hessian"].recipe["one_shot"]["method"] == "hessian"
    assert "layer_errors" not in found["projection"].results


@pytest.mark.parametrize(
    "budget", ["file_bytes=5500", "image_bytes=1100,machine=msa-8x8", "latency_cycles=700,machine=msa-8x8"]
)
def test_budgets_are_kept_without_labels(budget: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, values = (
        nn.Sequential(nn.Embedding(12, 32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)),
        torch.randint(0, 12, (32, 5)),
    )
    if "machine" in budget:
        config = CompressionConfig(exempt_first_last=False)  # the blocks of the machine
    else:
        config = CompressionConfig(block=(2, 2), exempt_first_last=False)
    artifact = compress_network(
        model.eval(), values, config, budget=budget, allocation="hessian", checkpoint=tmp_path
    )
    spent = artifact.results["budget"]
    assert 0.8 * spent["limit"] <= spent["reached"] <= spent["limit"]
    if spent["quantity"] == "file_bytes":
        assert save_artifact(tmp_path / "a.safetensors", artifact) == spent["reached"]
    assert artifact.recipe["input_dtype"] == "int64"


def test_what_needs_labels_or_goes_without_them_is_refused(network: nn.Module, inputs: Tensor) -> None:
    with pytest.raises(InputError, match="fisher"):
        compress_network(network, inputs, HALF, allocation="fisher")
    with pytest.raises(InputError, match="budget: goes without training"):
        compress_network(network, inputs, HALF, budget="file_bytes=9", train_data=(inputs, inputs))


def test_it_trains_with_admm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ConvTranspose1d(2, 4, 4, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )
    values, labels = torch.randn(64, 2, 8), torch.randint(0, 3, (64,))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    artifact = compress_network(
        model, values, HALF, Recipe(epochs_admm=1, epochs_retrain=1), train_data=(values, labels),
        evaluate=lambda net: float((net(values).argmax(1) == labels).float().mean()),
    )  # fmt: skip
    assert set(artifact.results) >= {"figure_dense", "figure_projected", "figure_retrained", "figure_integer"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert artifact.recipe["training"]["epochs_admm"] == 1


def test_frozen_normalisation_keeps_its_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).train()
    model[1].eval()
    values, labels = torch.randn(32, 4) + 3, torch.randint(0, 2, (32,))
    recipe = Recipe(epochs_admm=1, epochs_retrain=1)
    artifact = compress_network(model, values, DENSE, recipe, train_data=(values, labels))
    assert not artifact.state["1.running_mean"].any()


class Named(nn.Module):
    """Calls its layers by keyword; torch.fx can trace the one and not the other."""

    def __init__(self, is_traceable: bool) -> None:
        super().__init__()
        self.is_traceable, self.emb, self.head = is_traceable, nn.Embedding(9, 4), nn.Linear(4, 9)
        self.head.weight = self.emb.weight
        self.conv, self.up = (
            nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"),
            nn.ConvTranspose1d(4, 4, 2, 2),
        )
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.up(input=torch.relu(self.conv(input=self.emb(input=tokens).transpose(1, 2)))).transpose(1, 2)
        if not self.is_traceable and len(x) > 10**6:
            x = x * 2
        return self.head(input=torch.relu(self.b(input=torch.relu(self.a(input=x)))))


@pytest.mark.parametrize("is_traceable", [False, True])
@torch.no_grad()
def test_layers_may_be_called_by_keyword(is_traceable: bool) -> None:
    torch.manual_seed(0)
    model, tokens = Named(is_traceable).eval(), torch.randint(0, 9, (16, 6))
    artifact = compress_network(model, tokens, DENSE.model_copy(update={"permute_channels": True}))
    assert [layer.name for layer in artifact.layers()] == [
        "conv.conv",
        "up.conv",
        "a.core",
        "a.core#2",
        "head",
    ]
    assert off(rebuild_integer(artifact, lambda: Named(is_traceable))(tokens), model(tokens)) < 0.05


class Combined(nn.Module):
    """Multiplies by what it makes of weights."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(6, 6), nn.Linear(6, 6), how
        self.register_buffer("mask", torch.ones(6, 6).tril())

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        if self.how == "cat":
            return functional.linear(x, torch.cat([self.a.weight, self.b.weight]))
        return functional.linear(x, (self.b.weight * self.mask).t())


@pytest.mark.parametrize(
    ("how", "rows"),
    [
        ("cat", {"a.weight": "linear behind cat", "b.weight": "linear behind cat"}),
        ("mask", {"b.weight": "linear behind mul"}),
    ],
)
def test_the_work_of_combined_weights_is_listed(how: str, rows: dict[str, str]) -> None:
    torch.manual_seed(0)
    artifact = compress_network(Combined(how).eval(), torch.randn(8, 6), DENSE)
    found = {row["name"]: row["reason"] for row in artifact.recipe["untreated"]}
    assert found == {name: f"its work is not simulated (in {operation})" for name, operation in rows.items()}
    assert list(artifact.compressed) == ["a", "b"]


@torch.no_grad()
def test_integers_flow_through_an_interleaved_convolution() -> None:
    """Convolution, transposed convolution, ReLU and pooling, all on integers: nothing runs in float in between."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate"),
    )  # fmt: skip
    values = torch.randn(4, 2, 8, 8)
    artifact = compress_network(model, values, DENSE)
    integer = rebuild_integer(artifact, lambda: model)
    assert integer.float_operations == () or integer.float_operations == ("_5",)  # nn.ReflectionPad2d
    assert artifact.activations["2.conv"].producer == "0"
    assert off(integer(values), model(values)) < 0.03
    trace = {entry.name: entry for entry in integer.layer_trace(values[:1])}["2.conv"]
    weight = torch.from_numpy(artifact.integer_weight("2.conv")).double()
    sums = functional.conv2d(torch.from_numpy(trace.input).double(), weight, padding=1)
    assert np.array_equal(trace.accumulator, sums.numpy().astype(np.int64))


@torch.no_grad()
def test_a_weight_that_is_read_outside_its_layer_stays_float_there() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x))) * self.a.weight.abs().sum()

    torch.manual_seed(0)
    model, values = Reads().eval(), torch.randn(16, 6)
    artifact = compress_network(model, values, DENSE)
    assert "read outside" in " ".join(artifact.results["warnings"])
    assert off(rebuild_integer(artifact, Reads)(values), model(values)) < 0.03


@torch.no_grad()
def test_a_layer_that_never_runs_is_in_nobodys_way() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.spare = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    torch.manual_seed(0)
    model, values = Spare().eval(), torch.randn(16, 6)
    artifact = compress_network(model, values, DENSE)
    assert [row["name"] for row in artifact.recipe["untreated"]] == ["spare"]
    assert off(rebuild_integer(artifact, Spare)(values), model(values)) < 0.03


@torch.no_grad()
def test_tokens_are_inputs_too() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.mid = nn.Embedding(12, 8), nn.Linear(8, 8)

        def forward(self, tokens: Tensor) -> Tensor:
            return functional.linear(torch.relu(self.mid(self.emb(tokens))), self.emb.weight)

    torch.manual_seed(0)
    model, tokens = Language().eval(), torch.randint(0, 12, (8, 5))
    artifact = compress_network(model, tokens, DENSE)
    assert [layer.name for layer in artifact.layers()] == ["mid", "emb_layer"]
    assert sorted(artifact.state) == ["mid.bias"]  # the embedding is the head's weight
    assert artifact.recipe["input_dtype"] == "int64"
    assert off(rebuild_integer(artifact, Language)(tokens), model(tokens)) < 0.03
    with pytest.raises(InputError, match="indices as int64"):
        quantize_activations(rebuild(artifact, Language), artifact.compressed, tokens.to(torch.uint8))


@pytest.mark.parametrize("bad", [torch.zeros(0, 4, 10), torch.zeros(3)])
def test_inputs_that_are_none_are_refused(network: nn.Module, bad: Tensor) -> None:
    with pytest.raises(InputError, match="inputs: shape"):
        compress_network(network, bad, HALF)


# --- two ways to the shapes


SLOW = (
    "vgg16",
    "resnet18",
    "resnet50",
    "mobilenetv2",
    "efficientnet-lite0",
    "minilm-l6",
    "crepe-full",
    "resnet20",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NETWORKS]
)
def test_export_and_hooks_agree_on_the_zoo(name: str) -> None:
    entry = NETWORKS[name]
    model, dtype = build(name, device="meta"), getattr(torch, entry.input_dtype)
    by = {
        method: layer_shapes(model, entry.input_shape, 2, dtype=dtype, method=method)
        for method in ("hooks", "export", "auto")
    }
    assert by["hooks"] == by["export"] == by["auto"]


def test_export_sees_what_hooks_do_not(network: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hooks, _ = matrix_work(network, (4, 10), method="hooks")
    shapes, missing = matrix_work(network, (4, 10))
    found = {shape.name: shape for shape in shapes}
    assert {"w", "mha.in_proj", "mha.out_proj", "enc.self_attn.in_proj"} <= set(found)
    assert not {"w", "mha.in_proj"} & {shape.name for shape in hooks}
    assert (found["w"].m, found["w"].k, found["w"].n) == (5, 8, 20)
    assert (found["mha.in_proj"].m, found["mha.in_proj"].k) == (24, 8)
    assert [name for name in found if name.startswith("fc")] == ["fc", "fc#2"]
    assert set(missing) >= {"up.weight", "gate", "rnn.weight_ih_l0", "never"}


def test_a_call_on_a_layers_weight_counts_as_its_use() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(self.fc(x), self.fc.weight)

    model = Twice()
    assert [shape.name for shape in layer_shapes(model, (6,))] == ["fc", "fc#2"]
    assert next(model.parameters()).device.type == "cpu"


def test_a_network_that_cannot_be_exported_is_listed_by_hooks() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.w = nn.Linear(3, 2), nn.Parameter(torch.ones(2, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x if x.sum().item() == 0 else x[:1]) @ self.w

    with pytest.warns(UserWarning, match="torch.export cannot follow it"):
        (shape,) = layer_shapes(Reads(), (3,))
    assert shape.name == "fc"


def test_the_example_in_the_docs_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "networks.md").read_text("utf-8")
    code, expected = text.split("```python\n")[1].split("```")[0], text.split("```text\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "networks.md", "exec"), {"__name__": "example"})
    printed = capsys.readouterr().out
    assert printed.startswith(expected)
    assert printed.strip().endswith("cycles")

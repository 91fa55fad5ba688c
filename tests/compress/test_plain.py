"""Rewritten networks against torch's own modules: the same function, and only plain layers left."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from compress.plain import to_plain
from compress.rules import CompressionConfig, plan_layers
from compress.shapes import layer_shapes
from hwsim.errors import InputError

ALL = CompressionConfig(exempt_first_last=False)
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def same(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """The plain network, after its outputs were compared."""
    model.eval()
    plain = to_plain(model).model
    with torch.no_grad():
        torch.testing.assert_close(plain(*inputs), model(*inputs), atol=2e-6, rtol=1e-5)
    return plain


@st.composite
def transposed(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    rank, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    each = lambda least, most: tuple(draw(st.integers(least, most)) for _ in range(rank))  # noqa: E731
    stride, dilation, size = each(1, 4), each(1, 3), each(1, 5)
    most = [max(pair) - 1 for pair in zip(stride, dilation, strict=True)]
    torch.manual_seed(draw(st.integers(0, 9)))
    module = TRANSPOSED[rank](
        2 * groups,
        3 * groups,
        each(1, 5),
        stride=stride,
        padding=each(0, 4),
        output_padding=tuple(draw(st.integers(0, limit)) for limit in most),
        groups=groups,
        dilation=dilation,
        bias=draw(st.booleans()),
    )
    return module, torch.randn(2, 2 * groups, *size)


@given(transposed())
@settings(deadline=None, max_examples=25)
def test_a_transposed_convolution_is_one_with_interleaved_outputs(case: tuple[nn.Module, Tensor]) -> None:
    module, values = case
    try:
        with torch.no_grad():
            expected = module(values)
    except RuntimeError:
        assume(False)  # torch: the output would be empty
    assume(expected.numel())
    plain = same(module, values)
    same(module, values[0])  # without a batch, too
    conv = plain.get_submodule("conv")
    assert type(conv) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    assert set(conv.stride) == {1}


def test_transposed_convolution_wastes_nothing_where_the_stride_divides_the_kernel() -> None:
    module = nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1)
    (change,) = to_plain(module).changes
    plain = to_plain(module).model
    assert plain.get_parameter("conv.weight").shape == (16, 8, 2, 2)
    assert "4 outputs per channel" in change.became
    assert "zeros" not in change.became
    assert "78% more weights (zeros)" in to_plain(nn.ConvTranspose2d(8, 4, 3, stride=2)).changes[0].became
    with pytest.raises(InputError, match="output_size"):
        plain(torch.zeros(1, 8, 4, 4), output_size=[9, 9])


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=5)))
def test_attention_is_torchs(flags: tuple[bool, ...]) -> None:
    batch_first, other_width, extra, bias, need_weights = flags
    torch.manual_seed(0)
    width = 5 if other_width else 8
    module = nn.MultiheadAttention(
        8,
        2,
        bias=bias,
        add_bias_kv=extra,
        add_zero_attn=extra,
        kdim=width,
        vdim=width,
        batch_first=batch_first,
    ).eval()
    query, key = torch.randn(3, 4, 8), torch.randn(3, 6, width)
    if not batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    plain = to_plain(module).model
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[:, 5] = True
    variants = (
        {},
        {"key_padding_mask": padding},
        {"attn_mask": torch.randn(4, 6)},
        {"attn_mask": torch.rand(6, 4, 6) > 0.7, "average_attn_weights": False},
    )
    for arguments in variants:
        with torch.no_grad():
            expected = module(query, key, key, need_weights=need_weights, **arguments)
            found = plain(query, key, key, need_weights=need_weights, **arguments)
        torch.testing.assert_close(found[0], expected[0])
        assert (found[1] is None) == (expected[1] is None)
        if found[1] is not None:
            torch.testing.assert_close(found[1], expected[1])


@pytest.mark.filterwarnings("ignore:.*nested.tensor")
def test_transformers_of_torch_run_their_layers() -> None:
    """Also with a padding mask, for which torch's encoder would hand weights to a kernel of its own."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    plain = same(encoder, torch.randn(2, 5, 8))
    ran = []
    plain.get_submodule("layers.1.self_attn.q").register_forward_hook(lambda *_: ran.append(1))
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    values = torch.randn(2, 5, 8)
    with torch.no_grad():
        found, expected = (net(values, src_key_padding_mask=mask) for net in (plain, encoder))
    torch.testing.assert_close(found[~mask], expected[~mask])
    assert ran
    same(nn.Transformer(8, 2, 1, 1, 16), torch.randn(5, 2, 8), torch.randn(4, 2, 8))
    same(nn.MultiheadAttention(8, 2), *[torch.randn(4, 8)] * 3)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_parametrised_weights_are_computed_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
        parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)),
        weight_norm(nn.Conv2d(4, 4, 1)),
        spectral_norm(nn.Conv2d(4, 4, 1)),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    )
    prune.l1_unstructured(model[4], "weight", 0.5)
    values = torch.randn(2, 4, 8, 8)
    plain = same(model, values)
    assert [name for name, _ in plain.named_parameters() if name.endswith("weight")] == [
        "0.weight",
        "1.weight",
        "2.weight",
        "3.weight",
        "4.conv.weight",
    ]
    assert len(plan_layers(plain, ALL).layers) == 5
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    to_plain(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.eval()(values)  # the network that came in still computes its weights


class Tied(nn.Module):
    def __init__(self, head: str) -> None:
        super().__init__()
        self.emb, self.mid, self.kind = nn.Embedding(10, 6), nn.Linear(6, 6), head
        if head == "module":
            self.head = nn.Linear(6, 10)
            self.head.weight = self.emb.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.relu(self.mid(self.emb(tokens)))
        if self.kind == "module":
            return self.head(x)
        return functional.linear(x, self.emb.weight) if self.kind == "linear" else x @ self.emb.weight.T


@pytest.mark.parametrize(
    ("kind", "holder"), [("module", "head"), ("linear", "emb_layer"), ("product", "emb_layer")]
)
def test_an_embedding_looks_into_the_weight_of_the_head(kind: str, holder: str) -> None:
    torch.manual_seed(0)
    plain = same(Tied(kind), torch.randint(0, 10, (2, 5)))
    assert [name for name, value in plain.named_parameters() if value.dim() == 2] == [
        "mid.weight",
        f"{holder}.weight",
    ]
    assert holder in [layer.name for layer in plan_layers(plain, ALL).layers]
    with torch.no_grad():
        plain.get_parameter(f"{holder}.weight").zero_()
    assert not plain.get_submodule("emb")(torch.tensor([3])).any()


def test_layers_that_share_a_weight_become_uses_of_one() -> None:
    torch.manual_seed(0)
    one, two = nn.Linear(8, 8), nn.Linear(8, 8)
    two.weight = one.weight
    plain = same(nn.Sequential(one, nn.ReLU(), two), torch.randn(2, 8))
    assert [name for name, _ in plain.named_parameters()] == ["0.bias", "0.core.weight", "2.bias"]
    first, second = (nn.Conv2d(4, 4, 3, bias=False) for _ in range(2))
    second.weight = first.weight
    plain = same(nn.Sequential(first, nn.ReLU(), second), torch.randn(1, 4, 8, 8))
    assert plain[0] is plain[2]
    third = nn.Conv2d(4, 4, 3, stride=2, bias=False)
    third.weight = first.weight
    plan = to_plain(nn.Sequential(first, third, nn.Conv2d(4, 4, 1))).model
    reasons = {item.name: item.reason for item in plan_layers(plan, ALL).untreated}
    assert all("shared with another module" in reasons[name] for name in ("0", "1"))


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4, 3, 3)), nn.Parameter(torch.randn(4))
        self.p, self.inner = nn.Parameter(torch.randn(3, 6)), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.conv2d(x, self.weight, self.bias, padding=1)
        return self.inner(functional.conv2d(x, self.weight, stride=2) @ self.p)


def test_calls_on_parameters_become_layers() -> None:
    torch.manual_seed(0)
    plain = same(nn.Sequential(Calls()), torch.randn(2, 4, 8, 8))
    layers = {name: type(module) for name, module in plain.named_modules() if hasattr(module, "weight")}
    assert list(layers.values()).count(nn.Conv2d) == 2
    assert layers["0.p_layer"] is nn.Linear
    assert "0.inner" in layers


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


class Twice(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = self.b = Product()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def test_a_module_with_calls_under_two_names_stays_one() -> None:
    torch.manual_seed(0)
    plain = same(nn.Sequential(Twice()), torch.randn(2, 4))
    assert [name for name, _ in plain.named_parameters()] == ["0.a.w_layer.weight"]
    assert [shape.name for shape in layer_shapes(plain, (4,))] == ["0.a.w_layer", "0.a.w_layer#2"]


def test_what_a_rewritten_module_does_not_run_is_left_out_and_said_so() -> None:
    model = Product()
    model.idle = nn.Sequential(Product())
    assert isinstance(same(model, torch.randn(2, 4)).get_submodule("w_layer"), nn.Linear)
    assert "without what its forward never runs: idle.0" in to_plain(model).changes[0].became
    assert "never runs" not in to_plain(Product()).changes[0].became


class Frozen(nn.Module):
    """A frozen normalisation below a module that is rewritten."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.inner = nn.Parameter(torch.randn(4, 4)), nn.Sequential(nn.BatchNorm1d(4), nn.Dropout())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x @ self.w)


def test_modules_keep_their_modes() -> None:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4), Frozen(), nn.Linear(4, 4)
    )
    model[1].eval()
    model[2].inner[0].eval()
    plain = to_plain(model).model
    found = {name for name, module in plain.named_modules() if not module.training}
    assert found == {"1", "2.inner.0"}
    assert type(plain.get_submodule("2.w_layer")) is nn.Linear
    assert all(not module.training for module in to_plain(model.eval()).model.modules())


def test_a_forward_that_depends_on_the_mode_is_left_alone() -> None:
    class Noisy(Calls):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 2 if self.training else x)

    plain = to_plain(Noisy())
    assert plain.changes == ()
    (row,) = plan_layers(plain.model, ALL).untreated
    assert "Noisy is not a Linear" in row.reason


def test_a_plain_network_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Conv1d(1, 1, 1)))
    plain = to_plain(model)
    assert plain.changes == ()
    assert str(plain.model) == str(model)
    assert to_plain(to_plain(nn.MultiheadAttention(8, 2)).model).changes == ()


class Optional(nn.Module):
    """Asks whether an argument was given, which torch.fx cannot see."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(5, 6)), 3

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = nn.functional.linear(x, self.weight)
        return h if mask is None else h + 1


class Scaled(Optional):
    """Has an argument that goes the same way with any value."""

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return nn.functional.linear(x, self.weight) * scale


class Around(nn.Module):
    """Reads an attribute of the module that is rewritten."""

    def __init__(self, inner: Optional) -> None:
        super().__init__()
        self.inner, self.last = inner, nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x)) * self.inner.gain


@torch.no_grad()
@pytest.mark.parametrize(("kind", "layers"), [(Optional, ["last"]), (Scaled, ["inner.layer", "last"])])
def test_defaults_of_arguments_keep_their_meaning(kind: type[Optional], layers: list[str]) -> None:
    torch.manual_seed(0)
    model, x = Around(kind()), torch.randn(3, 6)
    plain = to_plain(model).model
    torch.testing.assert_close(plain(x), model(x))
    assert sorted(name for name, module in plain.named_modules() if isinstance(module, nn.Linear)) == layers

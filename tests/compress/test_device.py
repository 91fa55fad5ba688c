"""On an accelerator nothing in a step reads a value back; and it computes what the CPU computes.

Without one at hand: the meta device has no values to read, a dispatch mode refuses the operations that read, and the device's
way of assigning types runs on the CPU beside the other.
"""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from compress import assign_device, projection
from compress.admm import ADMM
from compress.assign import assign_types
from compress.assign_device import assign_on_device
from compress.loop import Gradients, LossLog
from compress.projection import project, project_to_counts
from compress.retrain import MaskedRetraining
from compress.rules import CompressionConfig, plan_layers
from hwsim.errors import InputError

CONFIG = CompressionConfig(block=(2, 3), pruned=0.4, unified=0.4, exempt_first_last=False)

READING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "item")
"""Operations whose result the host waits for. ``index`` and ``index_put`` with a boolean mask call nonzero themselves."""


class NothingIsRead(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = [
            part
            for part in (args[1] if name.startswith("index") and len(args) > 1 else ()) or ()
            if isinstance(part, torch.Tensor) and part.dtype == torch.bool
        ]
        if name in READING or masks:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5))


def batch(count=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 2, 4, 4, generator=generator), torch.arange(count) % 5


@pytest.fixture
def device_way(monkeypatch):
    monkeypatch.setattr(projection, "_is_host", lambda tensor: False)


@st.composite
def costs(draw):
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    largest = draw(st.sampled_from([1, 3, 1000, 1 << 40]))
    values = st.lists(st.integers(0, largest), min_size=rows * columns, max_size=rows * columns)
    prune, unify = (np.array(draw(values), float).reshape(1, rows, columns) for _ in range(2))
    balanced = draw(st.booleans())
    pruned = draw(st.integers(0, columns if balanced else rows * columns))
    unified = draw(st.integers(0, (columns if balanced else rows * columns) - pruned))
    times = rows if balanced else 1
    return prune, unify, times * pruned, times * unified, balanced


@settings(deadline=None, max_examples=100)
@given(costs(), st.sampled_from(["exact", "prune_first"]))
def test_the_device_assigns_the_very_same_types(case, method):
    prune, unify, pruned, unified, balanced = case
    expected = assign_types(prune, unify, pruned, unified, method, balanced_rows=balanced)
    types, total = assign_on_device(
        torch.from_numpy(prune), torch.from_numpy(unify), pruned, unified, method, balanced
    )
    assert np.array_equal(types.numpy(), expected)
    assert float(total) == pytest.approx(prune[expected == 0].sum() + unify[expected == 1].sum())


@pytest.mark.parametrize("method", ["exact", "prune_first"])
@pytest.mark.parametrize("seed", range(3))
def test_the_device_assigns_the_same_types_at_size(method, seed):
    generator = np.random.default_rng(seed)
    prune = generator.exponential(size=(1, 100, 211)).astype(np.float32)
    unify = (prune * generator.random(prune.shape)).astype(np.float32)
    for pruned, unified in ((5000, 9000), (21100, 0), (0, 4000), (10000, 11100)):
        types, _ = assign_on_device(torch.from_numpy(prune), torch.from_numpy(unify), pruned, unified, method)
        assert np.array_equal(types.numpy(), assign_types(prune, unify, pruned, unified, method))


@pytest.mark.parametrize("scale", [1.0, 1e-21, 3e19, 0.0])
@pytest.mark.parametrize("with_curvature", [False, True])
def test_the_device_projects_to_the_same_bits(device_way, monkeypatch, scale, with_curvature):
    """Also where the CPU has to take costs in float64."""
    generator = torch.Generator().manual_seed(1)
    for shape, groups, order in (((7, 30), 1, "tap_major"), ((12, 4, 3, 3), 3, "channel_major")):
        weight = scale * torch.randn(shape, generator=generator)
        h = torch.rand(shape, generator=generator) if with_curvature else None
        arguments = {"groups": groups, "column_order": order, "curvature": h}
        ours = project(weight, (2, 4), 0.3, 0.4, **arguments)
        with monkeypatch.context() as on_cpu:
            on_cpu.setattr(projection, "_is_host", lambda tensor: True)
            expected = project(weight, (2, 4), 0.3, 0.4, **arguments)
        assert torch.equal(ours.types, expected.types)
        torch.testing.assert_close(ours.weight, expected.weight, rtol=1e-6, atol=0)
        assert ours.cost == pytest.approx(expected.cost, rel=1e-5)


def run_admm(rounds=4, guard=None, **arguments):
    model, config = network(), arguments.pop("config", CONFIG)
    admm = ADMM(model, config, rho=0.1, **arguments)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(rounds):
        optimizer.zero_grad()
        with guard or torch.enable_grad():
            (nn.functional.cross_entropy(model(batch()[0]), batch()[1]) + admm.penalty()).backward()
            latest = admm.step()
            assert len(latest) == 2
        optimizer.step()
    return model, admm


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"ramp_updates": 2},
        {"curvature": {"3": torch.rand(5, 24, generator=torch.Generator().manual_seed(2))}},
        {"config": CONFIG.model_copy(update={"balanced_rows": True})},
        {"config": CONFIG.model_copy(update={"projection": "prune_first"})},
        {"config": CONFIG.model_copy(update={"pruned": 0.5, "unified": 0.5})},
    ],
)
def test_a_step_reads_nothing_and_comes_to_the_same(arguments, monkeypatch):
    expected_model, expected = run_admm(**arguments)
    monkeypatch.setattr(projection, "_is_host", lambda tensor: False)
    model, admm = run_admm(guard=NothingIsRead(), **arguments)
    for one, other in zip(model.parameters(), expected_model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for name, values in expected.state_dict().items():
        torch.testing.assert_close(admm.state_dict()[name], values, rtol=1e-4, atol=1e-5, msg=name)
    types = admm.finalize()
    assert all(torch.equal(codes, expected.finalize()[name]) for name, codes in types.items())


def test_the_guard_sees_a_read():
    for action in (
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
    ):
        with NothingIsRead(), pytest.raises(AssertionError, match="waits for the device"):
            action(torch.ones(3))


@pytest.mark.parametrize("with_curvature", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{}, {"balanced_rows": True}, {"projection": "prune_first"}, {"unified": 0.6}],
)
def test_on_the_meta_device_there_is_nothing_to_read(changes, with_curvature, monkeypatch):
    """Not one value exists there: reading any, or moving it to the CPU, is an error of torch."""
    monkeypatch.setattr(
        assign_device, "_BISECTIONS", 2
    )  # each is the same; torch is slow at working out shapes
    model = network().to("meta")
    h = {"3": torch.ones(5, 24, device="meta")} if with_curvature else {}
    admm = ADMM(model, CONFIG.model_copy(update=changes), curvature=h)
    for _ in range(2):
        outputs = model(torch.empty(16, 2, 4, 4, device="meta"))
        (outputs.square().mean() + admm.penalty()).backward()
        latest = admm.step()
    assert len(latest) == 2
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        latest[0]


def test_a_retraining_step_reads_nothing():
    model = network()
    plan = plan_layers(model, CONFIG)
    retraining = MaskedRetraining(model, plan, ADMM(model, plan).finalize())
    inputs, targets = batch()
    with NothingIsRead():
        nn.functional.cross_entropy(model(inputs), targets).backward()
        retraining.step()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loop_around_it_reads_nothing(device_way, precision):
    model = network()
    admm = ADMM(model, CONFIG)
    gradients = Gradients(
        model,
        lambda outputs, inputs, targets: nn.functional.cross_entropy(outputs, targets),
        precision=precision,
        accumulation=3,
        penalty=admm.penalty,
    )
    losses = LossLog(torch.device("cpu"), "here", "hint", together=4)
    with NothingIsRead():
        for _ in range(3):
            losses.add(gradients.backward(*batch()))
            admm.step()
    assert np.isnan(losses.latest)
    losses.read()
    assert losses.total == pytest.approx(3 * losses.latest)


def test_weights_that_are_not_finite_are_said_when_residuals_are_read(device_way):
    model = network()
    admm = ADMM(model, CONFIG)
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    latest = admm.step()
    with pytest.raises(InputError, match="3: weights were NaN or infinite at update 1"):
        list(latest)
    with pytest.raises(InputError, match="NaN or infinite"):
        admm.finalize()


def test_a_projection_given_counts_leaves_its_cost_on_the_device(device_way):
    found = project_to_counts(torch.randn(8, 8, device="meta"), (2, 2), 5, 6)
    assert found.distance.is_meta
    assert found.weight.is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_step_synchronises_nothing_and_comes_to_the_same():
    model = network().cuda()
    admm, expected = ADMM(model, CONFIG), ADMM(network(), CONFIG)
    inputs, targets = (part.cuda() for part in batch())
    torch.cuda.set_sync_debug_mode("error")
    try:
        (nn.functional.cross_entropy(model(inputs), targets) + admm.penalty()).backward()
        admm.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected.step()
    for name, codes in expected.finalize().items():
        assert torch.equal(admm.finalize()[name], codes)


# --- the user's own loop


def test_a_layer_frozen_after_the_plan_is_warned_of():
    model = network()
    admm = ADMM(model, CONFIG)
    model[3].weight.requires_grad_(False)
    before = model[3].weight.clone()
    admm.penalty().backward()
    admm.step()
    assert torch.equal(model[3].weight, before)
    assert [line for line in admm.warnings() if line.startswith("3: its weight is frozen")]
    assert not [line for line in admm.warnings() if line.startswith("0: its weight is frozen")]


def test_an_average_of_the_weights_can_be_what_is_projected():
    """Put the average into the network, then finalize."""
    model = network()
    admm = ADMM(model, CONFIG)
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(batch()[0]).square().mean() + admm.penalty()).backward()
        optimizer.step()
        average.update_parameters(model)
        admm.step()
    wanted = project(average.module[3].weight, (2, 3), 0.4, 0.4)
    model.load_state_dict(average.module.state_dict())
    assert torch.equal(admm.finalize()["3"], wanted.types)
    assert torch.equal(model[3].weight, wanted.weight)


# --- parts of a batch, number format


def gradients_of(model, count=16, **arguments):
    model = copy.deepcopy(model)
    admm = ADMM(model, CONFIG, rho=0.3)
    with torch.no_grad():
        model[3].weight.add_(0.1)
    loss = Gradients(
        model,
        lambda outputs, inputs, targets: nn.functional.cross_entropy(outputs, targets),
        penalty=admm.penalty,
        **arguments,
    ).backward(*batch(count))
    return loss, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("accumulation", [2, 3, 5, 16, 99])
@pytest.mark.parametrize("count", [16, 7, 1])
def test_parts_of_a_batch_add_up_to_the_batch(accumulation, count):
    """The penalty counts once; parts may differ in size, or be fewer than asked for."""
    loss, whole = gradients_of(network(), count)
    loss_of_parts, parts = gradients_of(network(), count, accumulation=accumulation)
    torch.testing.assert_close(loss_of_parts, loss)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other)


def test_bf16_is_near_and_keeps_weights_and_gradients_in_float32():
    loss, whole = gradients_of(network())
    rounded_loss, rounded = gradients_of(network(), precision="bf16")
    assert rounded_loss.dtype == torch.float32
    assert not torch.equal(loss, rounded_loss)
    torch.testing.assert_close(rounded_loss, loss, rtol=2e-2, atol=2e-2)
    for one, other in zip(rounded, whole, strict=True):
        assert one.dtype == torch.float32
        assert float((one - other).norm()) < 0.03 * float(other.norm())


def test_a_gpu_without_bf16_is_refused(monkeypatch):
    class OnGpu(nn.Linear):
        def parameters(self, recurse=True):
            return iter([type("P", (), {"device": torch.device("cuda")})()])

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GTX 1080")
    with pytest.raises(InputError, match="GTX 1080 does not have it"):
        Gradients(OnGpu(1, 1), lambda *_: torch.zeros(()), precision="bf16")


@pytest.mark.parametrize("together", [1, 2, 7])
def test_a_loss_that_is_not_finite_is_said_with_its_batch_however_late_it_is_read(together):
    losses = LossLog(torch.device("cpu"), "epoch 3", "try less", together)
    with pytest.raises(InputError, match=r"loss: nan at epoch 3, batch 5 \(try less\)"):  # noqa: PT012
        for number in range(1, 8):
            losses.add(torch.tensor(float("nan") if number >= 5 else 1.0))
        losses.read()
    assert losses.latest != 1.0

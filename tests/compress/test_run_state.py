"""A run that was stopped and goes on ends bit for bit like one that was not."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from compress.fit import Recipe, compress
from compress.rules import CompressionConfig
from compress.run_state import RUN_FILE, digest, optimizer_tensors, restore_optimizer
from compress.train import channels_last
from hwsim.errors import FormatError, InputError

CONFIG = CompressionConfig(block=(2, 3), pruned=0.3, unified=0.4, exempt_first_last=False)
RECIPE = Recipe(
    epochs_admm=3,
    epochs_retrain=3,
    updates_per_epoch=2,
    ramp_updates=3,
    distill=0.3,
    batch_size=16,
    lr=5e-3,
    seed=7,
)


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 2, groups=2),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(6 * 9, 4),
        )


def data(count=56):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 6, 6, generator=generator), torch.randint(
        0, 4, (count,), generator=generator
    )


class Stopped(Exception):
    pass


def stop_at(phase, epoch, batch=1):
    def progress(now):
        if (now.phase, now.epoch, now.batch) == (phase, epoch, batch):
            raise Stopped

    return progress


def run(folder=None, progress=None, recipe=RECIPE, batches=None, model=None, config=CONFIG):
    model = network() if model is None else model
    inputs, targets = data()
    with channels_last(model, inputs[:2]):
        result = compress(
            model,
            config,
            batches or (inputs, targets),
            recipe,
            evaluate=lambda net: float(net(inputs).abs().mean()),
            checkpoint=folder,
            progress=progress,
        )
    return model, result


def assert_same(one, other):
    (model, result), (model2, result2) = one, other
    state, state2 = model.state_dict(), model2.state_dict()
    assert list(state) == list(state2)
    assert all(torch.equal(state[name], state2[name]) for name in state)
    assert result.residuals == result2.residuals
    assert result.warnings == result2.warnings
    for name in ("accuracy_dense", "accuracy_projected", "accuracy_retrained"):
        assert getattr(result, name) == getattr(result2, name)
    for name, layer in result.layers.items():
        other = result2.layers[name]
        assert np.array_equal(layer.types, other.types)
        for field in ("dense", "signs", "magnitudes", "step_size"):
            assert np.array_equal(getattr(layer.weights, field), getattr(other.weights, field))


@pytest.fixture(scope="module")
def uninterrupted():
    return run()


@pytest.mark.parametrize(
    "stops",
    [
        [("admm", 1)],
        [("admm", 2)],
        [("admm", 3, 3)],
        [("retrain", 1)],
        [("retrain", 2)],
        [("retrain", 3, 4)],
        [("admm", 2), ("admm", 3), ("retrain", 1), ("retrain", 3)],
    ],
    ids=str,
)
def test_stopped_and_resumed_is_the_same_bit_for_bit(tmp_path, uninterrupted, stops):
    for stop in stops:
        with pytest.raises(Stopped):
            run(tmp_path, stop_at(*stop))
    seen = []
    resumed = run(tmp_path, seen.append)
    assert_same(resumed, uninterrupted)
    phase, epoch = stops[-1][:2]
    assert (seen[0].phase, seen[0].epoch, seen[0].batch) == (phase, epoch, 1)


def test_a_part_in_bf16_is_kept_to_the_bit(tmp_path):
    """The method leaves such a part alone, and NumPy cannot hold it."""

    class Halved(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()
            self.gain = nn.Parameter(torch.full((1, 4), 1.007, dtype=torch.bfloat16))

        def forward(self, inputs):
            return self.inner(inputs) * self.gain

    with pytest.raises(Stopped):
        run(tmp_path, stop_at("retrain", 2), model=Halved())
    resumed = run(tmp_path, model=Halved())
    assert resumed[0].gain.dtype == torch.bfloat16
    assert_same(resumed, run(model=Halved()))


def test_writing_checkpoints_changes_nothing_and_a_finished_run_only_repeats_its_end(tmp_path, uninterrupted):
    assert_same(run(tmp_path), uninterrupted)
    seen = []
    assert_same(run(tmp_path, seen.append), uninterrupted)
    assert seen == []
    assert [path.name for path in tmp_path.iterdir()] == [RUN_FILE]


def test_a_loader_with_a_generator_keeps_its_order(tmp_path):
    def loader():
        return DataLoader(
            TensorDataset(*data()), 16, shuffle=True, generator=torch.Generator().manual_seed(3)
        )

    whole = run(batches=loader())
    with pytest.raises(Stopped):
        run(tmp_path, stop_at("admm", 3), batches=loader())
    assert_same(run(tmp_path, batches=loader()), whole)


def test_a_loader_on_the_global_generator_keeps_its_order(tmp_path):
    def loader():
        return DataLoader(TensorDataset(*data()), 16, shuffle=True)

    whole = run(batches=loader())
    with pytest.raises(Stopped):
        run(tmp_path, stop_at("retrain", 2), batches=loader())
    assert_same(run(tmp_path, batches=loader()), whole)


def test_permuted_channels_resume_too(tmp_path):
    config = CONFIG.model_copy(update={"permute_channels": True, "unified": 0.7})

    def chain():
        torch.manual_seed(5)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 12), nn.Linear(12, 4)
        )

    whole = run(config=config, model=chain())
    assert whole[1].permutation.permuted
    with pytest.raises(Stopped):
        run(tmp_path, stop_at("retrain", 2), config=config, model=chain())
    assert_same(run(tmp_path, config=config, model=chain()), whole)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"recipe": RECIPE.model_copy(update={"rho": 0.5})}, "recipe.rho"),
        ({"recipe": RECIPE.model_copy(update={"epochs_retrain": 9})}, "recipe.epochs_retrain"),
        ({"config": CONFIG.model_copy(update={"pruned": 0.5})}, "plan.0.counts"),
        ({"config": CONFIG.model_copy(update={"weight_bits": 4})}, "plan.0.weight_bits"),
        ({"batches": tuple(part[:32] for part in data())}, "data"),
        ({"batches": (data()[0] + 1e-6, data()[1])}, "data"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(tmp_path, changes, field):
    with pytest.raises(Stopped):
        run(tmp_path, stop_at("admm", 2))
    with pytest.raises(InputError, match="another folder") as error:
        run(tmp_path, **changes)
    assert field in [problem.field for problem in error.value.problems]


def test_another_dense_network_is_refused(tmp_path):
    with pytest.raises(Stopped):
        run(tmp_path, stop_at("admm", 2))
    model = network()
    with torch.no_grad():
        model[0].bias[0] += 1e-4
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="dense_network"):
        run(tmp_path, model=model)
    assert all(torch.equal(before[name], values) for name, values in model.state_dict().items())


@pytest.mark.parametrize("where", [0, 100, -1])
def test_a_damaged_checkpoint_is_refused(tmp_path, where):
    with pytest.raises(Stopped):
        run(tmp_path, stop_at("admm", 2))
    path = tmp_path / RUN_FILE
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    with pytest.raises(FormatError):
        run(tmp_path)
    path.write_bytes(bytes(content[:-7]))
    with pytest.raises(FormatError):
        run(tmp_path)


def test_a_folder_that_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be"):
        run(tmp_path / "file")


def test_the_digest_sees_names_values_and_types():
    tensors = {"a": torch.zeros(2, 3), "b": torch.ones(2, dtype=torch.int64)}
    same = {"a": torch.zeros(2, 3), "b": torch.ones(2, dtype=torch.int64)}
    assert digest(tensors) == digest(same)
    for other in (
        {"a": torch.zeros(3, 2), "b": tensors["b"]},
        {"a": tensors["a"], "c": tensors["b"]},
        {"a": tensors["a"], "b": tensors["b"].int()},
        {"a": tensors["a"], "b": tensors["b"] + 1},
        {"a": tensors["a"].bfloat16(), "b": tensors["b"]},
    ):
        assert digest(other) != digest(tensors)


def test_an_optimizer_of_another_network_is_refused():
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    model(data()[0]).sum().backward()
    optimizer.step()
    state = optimizer_tensors(optimizer)
    other = torch.optim.Adam(nn.Linear(2, 2).parameters())
    with pytest.raises(FormatError, match="fits no parameter"):
        restore_optimizer(other, state)
    with pytest.raises(FormatError, match="fits no parameter"):
        restore_optimizer(optimizer, {"x/step": torch.zeros(())})

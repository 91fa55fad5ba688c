"""Dense training, accuracy, checkpoints."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from compress import zoo
from compress.data import Dataset, load_dataset
from compress.fit import Progress
from compress.train import (
    Checkpoint,
    Epoch,
    evaluate,
    load_checkpoint,
    load_weights,
    note_of,
    save_checkpoint,
    train,
)
from hwsim.errors import FormatError, InputError


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", train_limit=640, test_limit=200)


def perceptron(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 10))


def state(model: nn.Module) -> list[torch.Tensor]:
    return [values.clone() for values in model.state_dict().values()]


def test_training_learns(digits: Dataset) -> None:
    model = perceptron()
    seen: list[Progress] = []
    history = train(model, digits, epochs=6, lr=3e-3, batch_size=32, progress=seen.append)
    assert [epoch.epoch for epoch in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1].loss < history[0].loss / 4
    assert history[-1].test_accuracy > 0.85
    assert history[-1].test_accuracy == evaluate(
        model, digits.normalise(digits.test_images), digits.test_labels
    )
    assert not model.training
    assert [(now.epoch, now.batch) for now in seen] == [
        (epoch, batch) for epoch in range(1, 7) for batch in range(1, 21)
    ]
    assert {(now.phase, now.epochs, now.batches) for now in seen} == {("train", 6, 20)}


def test_a_convolutional_network_learns_and_keeps_its_layout(digits: Dataset) -> None:
    model = zoo.build("lenet5")
    history = train(model, digits, epochs=1)
    assert history[0].test_accuracy > 0.5
    assert model.conv1.weight.stride() == (25, 25, 5, 1)
    assert model.conv2.weight.stride() == (500, 25, 5, 1)


def test_a_network_that_calls_view_trains_as_well(digits: Dataset) -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 3, 5, stride=4), nn.Linear(108, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.conv(x).view(len(x), -1))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Viewing()
    assert len(train(model, digits.subset(64), epochs=1)) == 1


def test_the_same_seed_gives_the_same_bits(digits: Dataset) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    results = []
    for seed in (1, 1, 2):
        model = perceptron()
        train(model, digits, epochs=1, seed=seed)
        results.append(state(model))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not torch.equal(results[0][0], results[2][0])


def test_a_stopped_training_goes_on_to_the_same_bits(digits: Dataset, tmp_path: Path) -> None:
    """Stopped in the third epoch, then again in the fourth: weights, running statistics, losses and accuracies are the same."""

    class Stop(Exception):
        pass

    def network() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(2)
            head = nn.Flatten(), nn.Dropout(0.2), nn.Linear(4 * 26 * 26, 10)
            return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *head)

    def trained(folder: Path | None, stop_in: int = 99) -> tuple[nn.Module, tuple[Epoch, ...]]:
        def stop(now: Progress) -> None:
            begun.append(now.epoch)
            if now.epoch == stop_in and now.batch == 2:
                raise Stop

        model = network()
        return model, train(model, data, epochs=5, lr=2e-3, seed=4, progress=stop, resume_from=folder)

    data = digits.subset(320, 100)
    begun: list[int] = []
    whole, history = trained(None)
    for stop_in in (3, 4):
        with pytest.raises(Stop):
            trained(tmp_path, stop_in)
    begun.clear()
    resumed, again = trained(tmp_path)
    assert min(begun) == 4
    for name, values in whole.state_dict().items():
        assert torch.equal(values, resumed.state_dict()[name]), name
    told = [[(epoch.epoch, epoch.loss, epoch.test_accuracy) for epoch in one] for one in (history, again)]
    assert told[0] == told[1]
    with pytest.raises(InputError, match=r"training\.seed"):
        train(resumed, data, epochs=5, lr=2e-3, seed=5, resume_from=tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs: 0"),
        ({"epochs": 1, "batch_size": 0}, "batch_size: 0"),
        ({"epochs": 1, "lr": 0.0}, "lr: 0.0"),
        ({"epochs": 1, "lr": math.nan}, "lr: nan"),
        ({"epochs": 3, "lr": 1e30}, "loss: (nan|inf) at epoch"),
    ],
)
def test_wrong_settings_are_refused(digits: Dataset, settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(perceptron(), digits, **settings)


def test_a_network_must_fit_the_images_and_the_classes(digits: Dataset) -> None:
    with pytest.raises(InputError, match="does not take images of"):
        train(nn.Sequential(nn.Linear(5, 10)), digits, epochs=1)
    with pytest.raises(InputError, match=r"num_classes: outputs of shape \(2, 7\)"):
        train(zoo.build("lenet5", num_classes=7), digits, epochs=1)


def test_a_batch_may_be_larger_than_the_set(digits: Dataset) -> None:
    assert len(train(perceptron(), digits.subset(20), epochs=2, batch_size=1000)) == 2


@pytest.mark.parametrize("batch_size", [1, 3, 7, 8])
def test_accuracy_counts_every_image_once(batch_size: int) -> None:
    logits = torch.eye(4)[[0, 1, 2, 3, 0, 1, 2]]
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 2])
    assert evaluate(lambda part: part, logits, labels, batch_size) == 4 / 7


def test_accuracy_is_measured_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Dropout(1 - 1e-9))
    model.train()
    assert evaluate(model, torch.eye(50), torch.arange(50)) == 1.0
    assert model[0].training


def test_accuracy_of_nothing_is_refused() -> None:
    for images, labels in ((torch.zeros(0, 2), torch.zeros(0)), (torch.zeros(2, 2), torch.zeros(3))):
        with pytest.raises(InputError, match="images and"):
            evaluate(lambda part: part, images, labels)


# --- checkpoints


@pytest.fixture
def checkpoint(digits: Dataset) -> Checkpoint:
    history = (Epoch(1, 0.5, 0.75, 1.25), Epoch(2, 0.25, 0.875, 1.0))
    return Checkpoint(zoo.build("resnet20", seed=3), "resnet20", 10, 3, history, note_of(digits))


def test_a_checkpoint_comes_back(tmp_path: Path, checkpoint: Checkpoint) -> None:
    path = tmp_path / "dense.safetensors"
    assert save_checkpoint(path, checkpoint) == path.stat().st_size
    found = load_checkpoint(path)
    for name in ("network", "num_classes", "seed", "history", "dataset", "packages"):
        assert getattr(found, name) == getattr(checkpoint, name)
    expected = checkpoint.model.state_dict()
    assert list(found.model.state_dict()) == list(expected)
    assert all(torch.equal(values, expected[name]) for name, values in found.model.state_dict().items())
    assert not found.model.training
    assert all(parameter.requires_grad for parameter in found.model.parameters())


def test_a_damaged_checkpoint_is_refused(tmp_path: Path, checkpoint: Checkpoint) -> None:
    path = tmp_path / "dense.safetensors"
    save_checkpoint(path, checkpoint)
    content = bytearray(path.read_bytes())
    for position in (3, 60, len(content) // 2, len(content) - 1):
        damaged = content.copy()
        damaged[position] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(FormatError):
            load_checkpoint(path)
    with pytest.raises(InputError, match="cannot be read"):
        load_checkpoint(tmp_path / "missing.safetensors")


def test_weights_that_do_not_fit_the_network_are_listed(tmp_path: Path, checkpoint: Checkpoint) -> None:
    path = tmp_path / "dense.safetensors"
    save_checkpoint(path, replace(checkpoint, network="lenet5"))
    with pytest.raises(FormatError, match=r"fc1\.weight: missing") as caught:
        load_checkpoint(path)
    assert len(caught.value.problems) > 20


def test_plain_safetensors_weights(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    weights = zoo.build("lenet300", seed=8).state_dict()
    safetensors.torch.save_file({name: values.half() for name, values in weights.items()}, path)
    found = load_weights(path, "lenet300")
    assert torch.equal(found.model.fc1.weight, weights["fc1.weight"].half().float())
    weights["fc2.weight"][0, 0] = math.nan
    weights["fc3.weigth"] = weights.pop("fc3.weight")
    safetensors.torch.save_file(weights, path)
    with pytest.raises(FormatError) as caught:
        load_weights(path, "lenet300")
    assert [str(problem) for problem in caught.value.problems] == [
        "fc3.weight: missing",
        "fc2.weight: holds values that are not finite",
        'fc3.weigth: unknown (did you mean "fc3.weight"?)',
    ]
    path.write_bytes(b"not safetensors")
    with pytest.raises(FormatError, match="not a valid safetensors file"):
        load_weights(path, "lenet300")

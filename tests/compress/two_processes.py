"""What each of two processes does in the tests of `test_parallel`: ``python two_processes.py RANK SIZE FOLDER``.

Also imported by the tests, which run the same scenarios in one process.
"""

import json
import sys
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from compress.admm import ADMM
from compress.data import Dataset
from compress.fit import Recipe, compress
from compress.parallel import ranks
from compress.retrain import MaskedRetraining
from compress.rules import CompressionConfig
from compress.train import train
from hwsim.errors import InputError

CONFIG = CompressionConfig(block=(2, 3), pruned=0.3, unified=0.4, exempt_first_last=False)
RECIPE = Recipe(epochs_admm=2, epochs_retrain=2, ramp_updates=2, distill=0.3, batch_size=16, lr=5e-3, seed=7)


def network(with_norm=False):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        middle = [nn.BatchNorm2d(4), nn.Dropout(0.2)] if with_norm else []
        return nn.Sequential(
            nn.Conv2d(1, 4, 3),
            *middle,
            nn.ReLU(),
            nn.Conv2d(4, 6, 2, groups=2),
            nn.Flatten(),
            nn.Linear(6 * 9, 4),
        )


class Unused(nn.Module):
    """A linear layer and a parameter that the forward pass leaves out."""

    def __init__(self):
        super().__init__()
        self.body, self.head = network(), nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(3))
        nn.init.eye_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        return self.body(x)


def data(count=49):
    """The last batch of 16 has one sample, so one of two processes has none."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 1, 6, 6, generator=generator)
    return inputs, torch.randint(0, 4, (count,), generator=generator)


class Stopped(Exception):
    pass


def fit(folder=None, stop=None, model=None, batches=None, **changes):
    """Compress; everything that came out as tensors, and the residuals."""
    model = model or network()
    stopped = torch.zeros(())

    def evaluate(net):
        return float(net(data()[0]).square().mean())

    def adjust(net, plan, types):
        if stop is not None:
            raise Stopped
        stopped.add_(1)
        return types

    try:
        result = compress(
            model,
            CONFIG,
            batches or data(),
            RECIPE.model_copy(update=changes),
            evaluate=evaluate,
            checkpoint=folder,
            adjust=adjust,
        )
    except Stopped:
        return {}
    tensors = {f"model/{name}": values for name, values in model.state_dict().items()}
    for name, layer in result.layers.items():
        tensors[f"types/{name}"] = torch.from_numpy(layer.types)
        tensors[f"dense/{name}"] = torch.from_numpy(layer.weights.dense)
        tensors[f"magnitudes/{name}"] = torch.from_numpy(layer.weights.magnitudes.astype("int32"))
    changes = [(r.primal, r.dual, r.type_changes, r.sign_flips) for r in result.residuals]
    tensors["residuals"] = torch.tensor(changes, dtype=torch.float64)
    tensors["accuracies"] = torch.tensor(
        [result.accuracy_dense, result.accuracy_projected, result.accuracy_retrained], dtype=torch.float64
    )
    return tensors


def own_loop(accumulation, penalty_each_time=False):
    """The loop that `ADMM` documents, with DistributedDataParallel where there are two processes; then retraining."""
    here, model = ranks(), network()
    is_split = here.size > 1
    wrapped = DistributedDataParallel(model) if is_split else model
    admm = ADMM(wrapped, CONFIG, rho=0.1)
    out = {}
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.02}, {"params": list(model[2:].parameters())}], lr=0.05
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    inputs, targets = (part[:48] for part in data())

    def step(net, penalty):
        optimizer.zero_grad()
        for first in range(0, 48, 16):
            rows = torch.arange(first, first + 16)[here.rank :: here.size]
            parts = rows.chunk(accumulation)
            for number, part in enumerate(parts, start=1):
                loss = nn.functional.cross_entropy(net(inputs[part]), targets[part]) / len(parts)
                is_last = number == len(parts)
                if is_split and not is_last:
                    with net.no_sync():
                        loss.backward()
                    continue
                (loss + penalty() if penalty else loss).backward()
        optimizer.step()
        schedule.step()

    for epoch in range(4):
        step(wrapped, admm.penalty)
        admm.step()
        for name, values in admm.state_dict().items():
            if name.endswith("types"):
                out[f"{epoch}/{name}"] = values
    types = admm.finalize()
    retraining = MaskedRetraining(model, admm.plan, types)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    wrapped = DistributedDataParallel(model) if is_split else model
    for _ in range(2):
        step(wrapped, None)
        retraining.step()
    retraining.harvest()
    return out | {name: values.clone() for name, values in model.state_dict().items()}


def loader():
    """Two samplers that share the data, or the batches that their processes see together, in one process."""
    inputs, targets = data(48)
    dataset = TensorDataset(inputs, targets)
    if ranks().size > 1:
        return DataLoader(dataset, 8, sampler=DistributedSampler(dataset, shuffle=False))
    rows = torch.arange(48).reshape(3, 8, 2).reshape(3, 16)
    return [(inputs[part], targets[part]) for part in rows]


def dense():
    """Dense training on random images, the batch not a multiple of the processes."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (40, 1, 6, 6), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (40,), generator=generator)
    images_set = Dataset("random", images, labels, images[:8], labels[:8], tuple("abcd"), "made up", 0.5, 0.3)
    model = network()
    history = train(model, images_set, epochs=2, batch_size=13, accumulation=2)
    losses = torch.tensor([epoch.loss for epoch in history], dtype=torch.float64)
    return {"losses": losses, **model.state_dict()}


def refusals(rank):
    """Messages about data and checkpoints that the processes do not share."""
    inputs, targets = data(32)
    uneven = [(inputs[:8], targets[:8])] * (1 + rank)
    messages = []
    for arguments in ({"batches": uneven},):
        try:
            fit(**arguments)
        except InputError as error:
            messages.append(str(error))
    try:
        MaskedRetraining(DistributedDataParallel(network()), None, {})
    except InputError as error:
        messages.append(str(error))
    return messages


def main(rank, size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    scenarios = {
        "plain": lambda: fit(),
        "stopped": lambda: fit(
            folder / "run", stop=True, precision="bf16", accumulation=2, model=network(True)
        ),
        "resumed": lambda: fit(folder / "run", precision="bf16", accumulation=2, model=network(True)),
        "uninterrupted": lambda: fit(precision="bf16", accumulation=2, model=network(True)),
        "unused": lambda: fit(model=Unused()),
        "accumulated": lambda: fit(accumulation=3),
        "loader": lambda: fit(batches=loader()),
        "own_loop": lambda: own_loop(1),
        "own_loop_accumulated": lambda: own_loop(2),
        "dense": dense,
    }
    for name, scenario in scenarios.items():
        tensors = {key: values.contiguous() for key, values in scenario().items()}
        safetensors.torch.save_file(tensors, folder / f"{name}.{rank}.safetensors")
    (folder / f"refusals.{rank}.json").write_text(json.dumps(refusals(rank)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

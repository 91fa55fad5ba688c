"""What the method costs: the projection of ten million weights, and ADMM beside a plain training step.

Run with ``pytest tests/bench/test_bench_compress.py --benchmark-enable``. Nothing here fails for being slow.
"""

import pytest
import torch
from torch import nn

from compress.admm import ADMM
from compress.projection import project
from compress.retrain import MaskedRetraining
from compress.rules import CompressionConfig, plan_layers


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.benchmark(group="projection of 10 M weights, one core")
@pytest.mark.parametrize(("pruned", "unified"), [(0.5, 0.5), (0.5, 0.25)])
@pytest.mark.parametrize("block", [(4, 4), (1, 4)], ids=["4x4", "1x4"])
@pytest.mark.parametrize("shape", [(3200, 3136), (1024, 1088, 3, 3)], ids=["linear", "conv"])
def test_projection(benchmark, shape, block, pruned, unified):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = benchmark(project, weight, block, pruned, unified)
    assert result.weight.shape == weight.shape


@pytest.mark.benchmark(group="100 M weights, one core: projection beside copying the same bytes")
@pytest.mark.parametrize("what", ["copy", "linear 4x4", "conv 4x4"])
def test_projection_against_a_copy(benchmark, what):
    """The physical limit: every weight read once and written once."""
    shape = (3334, 3334, 3, 3) if what.startswith("conv") else (10_000, 10_000)
    weight = torch.empty(shape).normal_(generator=torch.Generator().manual_seed(0))
    action = weight.clone if what == "copy" else lambda: project(weight, (4, 4), 0.5, 0.25).weight
    assert benchmark.pedantic(action, rounds=3, warmup_rounds=1).shape == weight.shape


def lenet():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 20, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(20, 50, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(800, 500),
            nn.ReLU(),
            nn.Linear(500, 10),
        )


@pytest.mark.benchmark(group="training step of LeNet-5 (431k weights), batch 64, Adam, one core")
@pytest.mark.parametrize("kind", ["plain", "admm", "retrain"])
def test_training_step(benchmark, kind):
    model = lenet()
    plan = plan_layers(model, CompressionConfig())
    admm = ADMM(model, plan)
    retraining = MaskedRetraining(model, plan, admm.finalize()) if kind == "retrain" else None
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (
        torch.randn(64, 1, 28, 28, generator=generator),
        torch.randint(0, 10, (64,), generator=generator),
    )

    def step():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        (loss + admm.penalty() if kind == "admm" else loss).backward()
        optimizer.step()
        if retraining is not None:
            retraining.step()
        return float(loss.detach())

    assert benchmark.pedantic(step, rounds=300, warmup_rounds=20) >= 0


@pytest.mark.benchmark(group="ADMM update of LeNet-5, one core")
def test_admm_update(benchmark):
    admm = ADMM(lenet(), CompressionConfig())
    assert len(benchmark(admm.step)) == 2

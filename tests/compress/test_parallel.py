"""Two processes against one: the same masks on both, and the same network as one process makes of the same batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from torch import nn

from compress.artifact import load_artifact
from compress.cli import compress as compress_command
from compress.cli import train as train_command
from compress.parallel import Ranks, choose_device, processes, ranks, unwrapped
from hwsim.errors import InputError
from tests.compress import two_processes

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything that two processes with Gloo did, under ``-W error``."""
    folder = tmp_path_factory.mktemp("two")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "error", two_processes.__file__, str(rank), "2", str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output
    return folder


def both(folder, name):
    return [safetensors.torch.load_file(folder / f"{name}.{rank}.safetensors") for rank in (0, 1)]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_close(one, other):
    """Types to the last one, numbers to float's tolerance, integers of the trained weights to one step."""
    assert one.keys() == other.keys()
    for name, values in one.items():
        if "types" in name:
            assert torch.equal(values, other[name]), name
        elif values.is_floating_point():
            torch.testing.assert_close(values, other[name], rtol=2e-3, atol=2e-4, msg=name)
        else:
            assert (values.long() - other[name].long()).abs().max() <= 1, name


@pytest.mark.parametrize(
    "name",
    ["plain", "resumed", "unused", "accumulated", "loader", "own_loop", "own_loop_accumulated", "dense"],
)
def test_both_processes_end_with_the_same_bits(folder, name):
    one, other = both(folder, name)
    assert one
    assert_equal(one, other)


def test_the_data_are_shared_not_repeated(folder):
    """Were both to train on everything, or on the same half, the network would be another one."""
    assert both(folder, "plain")[0]["residuals"].shape == (2 * 2 * 3, 4)
    half = two_processes.fit(batches=[(x[::2], y[::2]) for x, y in two_processes.loader()])
    with pytest.raises(AssertionError):
        assert_close(both(folder, "loader")[0], half)


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("plain", lambda: two_processes.fit()),
        ("accumulated", lambda: two_processes.fit()),
        ("unused", lambda: two_processes.fit(model=two_processes.Unused())),
        ("loader", lambda: two_processes.fit(batches=two_processes.loader())),
        ("own_loop", lambda: two_processes.own_loop(1)),
        ("own_loop_accumulated", lambda: two_processes.own_loop(1)),
        ("dense", two_processes.dense),
    ],
)
def test_two_processes_are_one_with_the_same_batches(folder, name, alone):
    """Also with a last batch of one sample, with parts, with layers left out of the forward pass, in the user's own loop."""
    assert_close(both(folder, name)[0], alone())


def test_stopped_and_resumed_is_the_same_bit_for_bit_on_both(folder):
    """With batch normalisation, dropout that differs between the processes, bf16 and parts."""
    for resumed, whole in zip(both(folder, "resumed"), both(folder, "uninterrupted"), strict=True):
        assert_equal(resumed, whole)
    assert [path.name for path in (folder / "run").iterdir()] == ["compress-run.safetensors"]


def test_a_run_of_two_processes_is_not_continued_by_one(folder):
    with pytest.raises(InputError, match="processes: the stopped run has 2, this one 1"):
        two_processes.fit(folder / "run", precision="bf16", accumulation=2, model=two_processes.network(True))


def test_what_does_not_fit_together_is_refused_on_both(folder):
    for rank in (0, 1):
        uneven, wrapped = json.loads((folder / f"refusals.{rank}.json").read_text())
        assert "[1, 2] batches in the processes by rank" in uneven
        assert "DistributedSampler" in uneven
        assert "is wrapped already" in wrapped


# --- without other processes


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8])
def test_shares_are_a_partition_and_weigh_to_the_mean(size, count):
    rows = torch.arange(count) + 10
    values = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, mean = [], 0.0
    for rank in range(size):
        own, weight = Ranks(rank, size).share(rows)
        mean += weight * values[own].mean() / size
        found += own.tolist() if weight else []
    assert sorted(found) == rows.tolist()
    torch.testing.assert_close(mean, values[rows].mean())


def test_seeds_differ_between_processes_and_rank_0_has_the_run_s():
    seeds = {Ranks(rank, 8).seed(seed) for rank in range(8) for seed in (0, 1, 2, (1 << 63) - 1)}
    assert len(seeds) == 32
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert Ranks(0, 8).seed(5) == 5


def test_alone_there_is_no_group():
    with processes(torch.device("cpu")) as here:
        assert here == Ranks(0, 1) == ranks()


@pytest.mark.parametrize(
    ("name", "gpus", "message"),
    [
        ("gpu", 0, "must be auto, cpu, cuda or cuda:N"),
        ("cdua", 0, 'did you mean "cuda"'),
        ("cuda:x", 2, "must be auto"),
        ("cpu:1", 2, "must be auto"),
        ("cuda", 0, "cuda is asked for, but torch"),
        ("cuda:2", 2, "GPU 2 is asked for, this machine has 2"),
    ],
)
def test_a_device_that_is_not_there_is_refused(monkeypatch, name, gpus, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(InputError, match=message):
        choose_device(name)


def test_every_process_has_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 1)
    assert choose_device("cuda:0") == torch.device("cuda", 0)
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="start at most 2 processes"):
        choose_device("auto")


@pytest.mark.parametrize("command", [train_command, compress_command])
def test_the_help_shows_how_to_start_several(command):
    text = CliRunner().invoke(command, ["--help"], prog_name="hwsim").output
    assert "torchrun --nproc-per-node 2 -m hwsim" in text
    assert all(option in text for option in ("--device", "--precision", "--accumulation"))


@pytest.mark.slow
def test_the_command_line_under_torchrun(tmp_path):
    """Only rank 0 writes and prints; the types are those of one process."""
    images = ["--data", "digits", "--train-images", "320", "--test-images", "100"]
    quick = [*images, "--epochs-admm", "1", "--epochs-retrain", "1", "--calibration-images", "50"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]

    def run(*command):
        found = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path
        )
        assert found.returncode == 0, found.stderr
        return found

    trained = run(*launch, "hwsim", "train", "lenet300", *images, "--epochs", "2", "--out", "dense")
    assert [line.split()[0] for line in trained.stdout.splitlines()] == ["data", "accuracy", "written"]
    run(*launch, "hwsim", "compress", "dense", *quick, "--out", "two", "--checkpoint", "run")
    run(sys.executable, "-m", "hwsim", "compress", "dense", *quick, "--out", "one")
    two, one = load_artifact(tmp_path / "two"), load_artifact(tmp_path / "one")
    for name, layer in one.compressed.items():
        assert (layer.types == two.compressed[name].types).mean() > 0.999
    assert two.recipe["training"]["precision"] == "fp32"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "one", "run", "two"]


def test_a_single_network_is_its_own():

    model = nn.Linear(2, 2)
    assert unwrapped(model) is model

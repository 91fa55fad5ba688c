"""What projecting a large network takes, in a process of its own: never a second copy of the matrices beside the result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, re, sys
from pathlib import Path
import torch
from compress.projection import project

torch.set_num_threads(1)
shapes, block, groups, order = json.loads(sys.argv[1])

def peak_bytes():
    # Not ru_maxrss: that of a child starts at what its parent held.
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

project(torch.randn(512, 512), tuple(block), 0.3, 0.4)  # what is imported and compiled on first use
generator = torch.Generator().manual_seed(0)
weights = [torch.empty(shape).normal_(generator=generator) for shape in shapes]
size_bytes = sum(4 * weight.numel() for weight in weights)
before = peak_bytes()
projected = [
    project(weight, tuple(block), 0.3, 0.4, groups=groups, column_order=order).weight for weight in weights
]
print(json.dumps({"above": (peak_bytes() - before) / size_bytes, "weights": size_bytes // 4}))
"""


pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")


def memory_above(shapes, block, groups=1, order="tap_major"):
    """Peak of resident memory above that with the weights alone, in sizes of the weights; the projected weights count."""
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([shapes, block, groups, order])],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    return json.loads(found.stdout)["above"]


def test_a_convolution_is_not_copied_whole():
    """19 M weights: the result, a few numbers per block, and chunks: 1.3. With the whole matrix copied it is 3.9."""
    assert 1 <= memory_above([[2048, 1024, 3, 3]], [4, 4]) < 1.8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shapes", "block"),
    [
        ([[10_000, 10_000]], [4, 4]),
        ([[3334, 3334, 3, 3]], [4, 4]),
        ([[10_000, 10_000]], [8, 8]),
        ([[3162, 3162]] * 10, [1, 4]),
        ([[10_000, 10_000]], [1, 4]),
    ],
    ids=["one linear layer", "one convolution", "8x8", "ten layers of 1x4", "one layer of 1x4"],
)
def test_100_million_weights_take_less_than_twice_their_memory(shapes, block):
    """1.2 with 4×4 blocks; 1.9 where one layer has all weights in blocks of four: 25 million blocks, three integers each."""
    assert memory_above(shapes, block) < 2

"""Measures our encoder and decoder in a process of their own: ``python -m compress.codec_bench.worker JOB.json``."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.codec_bench.peer_nncodec import memory_kib

if TYPE_CHECKING:
    from compress.codec_bench.networks import Problem, Rounding
    from compress.layers import CompressedLayer


class _Coarse(Mapping[str, "CompressedLayer"]):
    """Layers that are made coarse as the encoder comes to them."""

    def __init__(self, problem: Problem, rounding: Rounding, bits: int) -> None:
        self._problem, self._rounding, self._bits = problem, rounding, bits

    def __getitem__(self, name: str) -> CompressedLayer:
        return self._rounding.of_layer(self._problem.layers[name], self._problem.curvature[name], self._bits)

    def __iter__(self) -> Iterator[str]:
        return iter(self._problem.layers)

    def __len__(self) -> int:
        return len(self._problem.layers)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Coarsen, encode and decode with the preset of a job."""
    import torch

    from compress.artifact import matrix_to_weight
    from compress.codec import encode_network, open_network
    from compress.codec_bench.networks import Rounding, load_problem

    torch.set_num_threads(1)
    imports_kib = memory_kib("VmRSS")
    problem = load_problem(job["problem"])
    coarse = _Coarse(problem, Rounding(**job["rounding"]), job["bits"])
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    encode_s, decode_s = [], []
    content = b""
    for _ in range(job["repeats"]):
        start = time.process_time()
        content = encode_network(coarse, problem.weight_shapes, problem.state, job["preset"])
        encode_s.append(time.process_time() - start)
        start = time.process_time()
        opened = open_network(content)
        decoded = {}
        for name, shape in opened.weight_shapes.items():
            layer = opened.layer(name)
            decoded[name] = matrix_to_weight(layer.float_matrix(), shape, layer.column_order)
        decode_s.append(time.process_time() - start)
        del opened, decoded, layer
    return {
        "size_bytes": len(content),
        "encode_s": statistics.median(encode_s),
        "decode_s": statistics.median(decode_s),
        "peak_mb": (memory_kib("VmHWM") - imports_kib) * 1024 / 1e6,
    }


if __name__ == "__main__":
    job_file = Path(sys.argv[1])
    outcome = run(json.loads(job_file.read_text()))
    job_file.with_suffix(".result.json").write_text(json.dumps(outcome))

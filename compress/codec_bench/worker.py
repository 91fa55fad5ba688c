"""Measures our encoder and decoder in a process of their own: ``python -m compress.codec_bench.worker JOB.json``."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from compress.codec_bench.peer_nncodec import memory_kib


def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Coarsen, encode and decode with every preset of a job; gives one result each."""
    import numpy as np
    import torch

    from compress.artifact import integer_weight
    from compress.codec import decode_network, encode_network
    from compress.codec_bench.networks import load_problem
    from compress.rate_distortion import coarsen

    torch.set_num_threads(1)
    imports_kib = memory_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    problem = load_problem(job["problem"])
    results = []
    for preset in ("small", "fast"):
        encode_s, decode_s = [], []
        content = b""
        for _ in range(job["repeats"]):
            start = time.process_time()
            coarse = {
                name: coarsen(
                    layer,
                    problem.curvature[name],
                    job["multiplier"],
                    weight_bits=job["bits"],
                    magnitude_bits=job["bits"],
                )
                for name, layer in problem.layers.items()
            }
            content = encode_network(coarse, problem.weight_shapes, problem.state, preset)
            encode_s.append(time.process_time() - start)
            del coarse
            start = time.process_time()
            found = decode_network(content)
            decoded = {
                name: integer_weight(layer, found.weight_shapes[name]).astype(np.float32)
                * np.float32(layer.weights.step_size)
                for name, layer in found.layers.items()
            }
            decode_s.append(time.process_time() - start)
            del found, decoded
        results.append(
            {
                "preset": preset,
                "size_bytes": len(content),
                "encode_s": statistics.median(encode_s),
                "decode_s": statistics.median(decode_s),
                "peak_mb": (memory_kib("VmHWM") - imports_kib) * 1024 / 1e6,
            }
        )
    return results


if __name__ == "__main__":
    job_file = Path(sys.argv[1])
    outcome = run(json.loads(job_file.read_text()))
    job_file.with_suffix(".result.json").write_text(json.dumps(outcome))

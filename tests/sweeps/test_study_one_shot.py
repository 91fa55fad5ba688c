"""The study of networks that nobody retrains: its inputs do not overlap, its runs write what they measure, its page says it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress import zoo
from compress.artifact import load_artifact
from compress.pretrained import Pretrained
from hwsim.errors import InputError
from hwsim.files import write_atomically
from hwsim.layer import UNIFIED
from sweeps.study import one_shot, photographs, sentences
from sweeps.study.catalogue import STUDIES
from sweeps.study.folder import Result, StudyFolder
from sweeps.study.methods import execute
from sweeps.study.one_shot_page import frontier, points_of
from sweeps.study.report import write_results_page
from sweeps.study.runs import Run


@pytest.fixture
def subject(monkeypatch: pytest.MonkeyPatch) -> Iterator[one_shot.Subject]:
    """LeNet-300 with random weights in the place of a network from a package."""
    model = zoo.build("lenet300", 10, 0).eval()
    random = torch.Generator().manual_seed(0)

    def inputs(network: Pretrained) -> tuple[Tensor, Tensor]:
        del network
        basis = torch.randn(
            24, 784, generator=random
        )  # as real inputs, in far fewer dimensions than the layer has
        return tuple((torch.randn(96, 24, generator=random) @ basis).reshape(96, 1, 28, 28) for _ in range(2))  # type: ignore[return-value]

    def load(name: str) -> Pretrained:
        copied = zoo.build(name, 10, 0).eval()
        copied.load_state_dict(model.state_dict())
        return Pretrained(name, copied, lambda values: values, (1, 28, 28), ())

    found = one_shot.Subject("lenet300", inputs, one_shot.same_class, "noise")
    monkeypatch.setattr(one_shot, "SUBJECTS", {"lenet300": found})
    monkeypatch.setattr(one_shot, "load_pretrained", load)
    one_shot._ready.cache_clear()
    yield found
    one_shot._ready.cache_clear()


def test_a_run_measures_the_file_that_it_wrote(subject: one_shot.Subject, tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    start = execute(Run("lenet300", "start"), folder)
    assert start.quality == {"agreement": 1.0}
    run = Run("lenet300", "hessian", 0, "half", unified=0.5, allocation="hessian", weight_bits=6)
    seen: list[int] = []
    found = execute(run, folder, lambda now: seen.append(now.epoch))
    assert seen == [1, 2, 3]
    plain = execute(replace(run, method="projection", allocation="magnitude"), folder)
    # On inputs of a few dimensions the Hessian has nearly everything to gain.
    assert found.quality["agreement"] > plain.quality["agreement"] + 0.05
    path = folder.file_path(run)
    assert found.file_bytes == path.stat().st_size
    assert found.details["layer_bytes"] < found.file_bytes < start.file_bytes
    artifact = load_artifact(path)
    shares = {name: float((layer.types == UNIFIED).mean()) for name, layer in artifact.compressed.items()}
    assert shares == {"fc1": 0.0, "fc2": pytest.approx(0.5, abs=1e-3), "fc3": 0.0}
    assert all(layer.weights.weight_bits == 6 for layer in artifact.compressed.values())
    assert execute(run, StudyFolder(tmp_path / "again")).quality == found.quality


def test_a_share_of_rounding_reaches_the_file(subject: one_shot.Subject, tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    fine, coarse = (
        execute(Run("lenet300", "hessian", 0, f"{share}", rounding_error=share), folder)
        for share in (0.0, 0.05)
    )
    assert coarse.details["recipe"]["rounding_error"] == 0.05
    assert coarse.details["layer_bytes"] < 0.8 * fine.details["layer_bytes"]


def test_depthwise_convolutions_stay_dense() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
    )
    plan = one_shot._plan(Run("x", "projection", unified=1.0), model, torch.zeros(1, 4, 5, 5))
    assert [layer.exempt for layer in plan.layers] == [True, True, False, True]


def test_nothing_is_in_both_halves() -> None:
    assert not {*photographs.CALIBRATION} & {*photographs.TEST}
    both = sentences.calibration_sentences(), sentences.measured_sentences()
    assert (len(both[0]), len(both[1])) == (90, 170)
    assert len({*both[0], *both[1]}) == 260


def test_crops_are_reproducible_and_of_the_right_sizes() -> None:
    pytest.importorskip("sklearn")
    only = photographs.TEST[:1]
    first, second = (photographs.crops(only, 5, seed=3) for _ in range(2))
    assert all(np.array_equal(one, two) for one, two in zip(first, second, strict=True))
    for crop in first:
        assert crop.dtype == np.uint8
        assert 160 <= crop.shape[0] == crop.shape[1] <= 224
    with pytest.raises(InputError, match=r"flower.*pip install --no-deps nothing-of-the-kind"):
        photographs.crops(((("nothing-of-the-kind", "x"), "flower.jpg"),), 1, seed=0)


def test_neighbours() -> None:
    wanted = nn.functional.normalize(torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]]))
    assert one_shot.same_neighbour(wanted, wanted) == pytest.approx({"agreement": 1.0, "cosine": 1.0})
    moved = wanted[[0, 2, 1, 3]]  # 0 and 3 get other neighbours, and so do the two that changed places
    found = one_shot.same_neighbour(moved, wanted)
    assert found["agreement"] == 0
    assert found["cosine"] < 0.7


# --- the page


def stored(run: Run, agreement: float, layer_bytes: int) -> Result:
    details = {"layer_bytes": layer_bytes, "treated_fp32_bytes": 16_000_000, "examples": "crops"}
    quality = {"agreement": agreement}
    return Result(
        run, quality, layer_bytes + 600_000, None, 18_000_000, {}, 60.0, 90.0, 0, details, {}, "abc"
    )


def test_the_page_has_every_series_and_where_it_ends(tmp_path: Path) -> None:
    runs = [run for run in STUDIES["one-shot"]() if run.task == "mobilenetv2"]
    start, dense = runs[0], [run for run in runs if run.point == "100% dense, 8 bits"]
    unified = [run for run in runs if run.point == "100% unified" and run.shape == "4x4"]
    folder = StudyFolder(tmp_path)
    folder.write(stored(start, 1.0, 16_000_000))
    for run, agreement, size in zip(
        [*dense, *unified], (0.97, 0.95, 0.55, 0.012), (3_200_000,) * 2 + (800_000,) * 2, strict=True
    ):
        folder.write(stored(run, agreement, size))
    peers = {"points": [{"qp": -32, "bytes": 2_000_000, "quality": {"agreement": 0.885}}]}
    write_atomically(folder.peer_path(start), json.dumps(peers).encode())
    page = tmp_path / "page.md"
    written = write_results_page(tmp_path, page)
    assert "study-mobilenetv2.png" in {path.name for path in written}
    text = page.read_text()
    assert "|  | 100% dense, 8 bits | 95.0 | 97.0 | 3,200,000 | 5.0 | 6.40 | 3,800,000 |" in text
    assert "| 4×4 | 100% unified | 1.2 | 55.0 | 800,000 | 20.0 | 1.60 | 1,400,000 |" in text
    assert "| blocks, Hessian | 1 | none |  | 20.0× | 4×4 100% unified |" in text
    assert "| blocks, projection | 1 | none |  | none |  |" in text
    assert "| NNCodec | 1 | none |  | 8.0× | qp -32 |" in text
    assert "points are *missing*" in text
    # From the file beside the page the same page is written again.
    write_results_page(page.with_suffix(".json"), tmp_path / "again.md")
    assert (tmp_path / "again.md").read_text() == text


def test_the_frontier_is_not_beaten() -> None:
    random = np.random.default_rng(0)
    run = Run("mobilenetv2", "hessian", unified=1.0)
    results = [
        stored(run, float(quality), int(size))
        for quality, size in zip(random.random(40), random.integers(1, 99, 40), strict=True)
    ]
    points = points_of("mobilenetv2", results)
    best = frontier(points)
    for point in points:
        beaten = any(
            other.layer_bytes <= point.layer_bytes and other.agreement_percent >= point.agreement_percent
            for other in best
        )
        assert beaten
    assert [point.agreement_percent for point in best] == sorted(point.agreement_percent for point in best)

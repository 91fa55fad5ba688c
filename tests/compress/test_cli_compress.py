"""`hwsim train` and `hwsim compress` from the outside."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from compress import data, fit
from compress.artifact import load_artifact
from compress.cli import compress, pack, train
from compress.rebuild import rebuild_integer
from compress.rules import CompressionConfig, Recipe
from compress.train import evaluate, load_checkpoint
from hwsim.errors import FormatError, HwsimError, InputError
from hwsim.simulator import simulate

DIGITS = ["--data", "digits", "--train-images", "320", "--test-images", "100"]


def run(command: click.Command, *arguments: str | Path) -> Result:
    """Errors of the project come out as they are, as the group that holds the commands wants them."""
    return CliRunner().invoke(command, [str(part) for part in arguments], standalone_mode=False)


def error_of(command: click.Command, *arguments: str | Path) -> BaseException:
    result = run(command, *arguments)
    assert result.exception is not None, result.output
    return result.exception


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "lenet300.safetensors"
    result = run(train, "lenet300", *DIGITS, "--epochs", 3, "--out", path)
    assert result.exception is None, result.output
    return path


QUICK = [*DIGITS, "--epochs-admm", "1", "--epochs-retrain", "1", "--calibration-images", "50"]


def test_train_writes_what_it_says(dense: Path) -> None:
    checkpoint = load_checkpoint(dense)
    assert (checkpoint.network, checkpoint.num_classes, checkpoint.seed) == ("lenet300", 10, 0)
    assert [epoch.epoch for epoch in checkpoint.history] == [1, 2, 3]
    assert checkpoint.dataset is not None
    assert checkpoint.dataset.name == "digits"
    images = data.load_dataset("digits", train_limit=320, test_limit=100)
    found = evaluate(checkpoint.model, images.normalise(images.test_images), images.test_labels)
    assert found == checkpoint.history[-1].test_accuracy > 0.6


def test_train_reports_on_stdout_and_progress_on_stderr(tmp_path: Path) -> None:
    result = run(train, "lenet300", *DIGITS, "--epochs", 1, "--out", tmp_path / "a")
    accuracy = load_checkpoint(tmp_path / "a").history[-1].test_accuracy
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["data", "accuracy", "written"]
    assert f"{accuracy:.2%} of 100 test images" in lines[1]
    assert f"({(tmp_path / 'a').stat().st_size:,} bytes)" in lines[2]
    assert "train epoch 1/1" in result.stderr


def test_the_same_command_gives_the_same_model(tmp_path: Path, dense: Path) -> None:
    for name in ("a", "b"):
        assert run(compress, dense, *QUICK, "--out", tmp_path / name).exception is None
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_compress_writes_what_it_says(tmp_path: Path, dense: Path) -> None:
    path = tmp_path / "model.hws.safetensors"
    result = run(
        compress,
        dense,
        "--block",
        "2x8",
        "--pruned",
        0.25,
        "--unified",
        0.5,
        *QUICK,
        "--seed",
        3,
        "--out",
        path,
    )
    assert result.exception is None, result.output
    artifact = load_artifact(path)
    assert (artifact.network, artifact.seed) == ("lenet300", 3)
    config = artifact.recipe["config"]
    assert (config["block"], config["pruned"], config["unified"]) == ([2, 8], 0.25, 0.5)
    assert artifact.recipe["training"]["epochs_admm"] == 1
    counts = [int((artifact.compressed["fc2"].types == code).sum()) for code in (0, 1, 2)]
    assert counts == [50 * 38 // 4, 50 * 38 // 2, 50 * 38 - 50 * 38 // 4 - 50 * 38 // 2]
    assert (artifact.compressed["fc1"].types == 2).all()
    images = data.load_dataset("digits", train_limit=320, test_limit=100, seed=3)
    found = evaluate(rebuild_integer(artifact), images.normalise(images.test_images), images.test_labels)
    assert artifact.results["accuracy_integer"] == found
    assert f"8-bit integers {found:.2%}" in result.stdout
    assert f"{path.stat().st_size:,} bytes" in result.stdout
    assert "retrain epoch 1/1" in result.stderr


def test_precision_and_parts_are_kept_in_the_file(tmp_path: Path, dense: Path) -> None:
    path = tmp_path / "model"
    options = ["--precision", "bf16", "--accumulation", "4", "--device", "cpu"]
    assert run(compress, dense, *QUICK, *options, "--out", path).exception is None
    training = load_artifact(path).recipe["training"]
    assert (training["precision"], training["accumulation"]) == ("bf16", 4)


def test_dense_training_takes_parts_and_a_number_format(tmp_path: Path) -> None:
    options = ["--precision", "bf16", "--accumulation", "2", "--epochs", 1]
    assert run(train, "lenet300", *DIGITS, *options, "--out", tmp_path / "a").exception is None
    assert run(train, "lenet300", *DIGITS, "--epochs", 1, "--out", tmp_path / "b").exception is None
    one, other = (load_checkpoint(tmp_path / name).model.fc1.weight.detach() for name in ("a", "b"))
    assert 0 < float((one - other).norm()) < 0.1 * float(other.norm())
    error = error_of(train, "lenet300", *DIGITS, "--accumulation", 0, "--out", tmp_path / "c")
    assert "accumulation: 0, must be at least 1" in str(error)


def test_the_default_name_of_the_result(dense: Path) -> None:
    result = run(compress, dense, *QUICK)
    assert result.exception is None, result.output
    assert load_artifact(dense.with_name("lenet300.hws.safetensors")).network == "lenet300"


def test_options_win_over_the_file(tmp_path: Path, dense: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        'block = [8, 8]\npruned = 0.75\nunified = 0.25\n[[rules]]\npattern = "fc2"\nweight_bits = 4\n'
    )
    path = tmp_path / "model"
    result = run(compress, dense, *QUICK, "--config", config, "--block", "4x4", "--out", path)
    assert result.exception is None, result.output
    found = load_artifact(path)
    assert found.recipe["config"]["pruned"] == 0.75
    assert found.compressed["fc2"].block == (4, 4)
    assert found.compressed["fc2"].weights.weight_bits == 4
    assert found.compressed["fc1"].weights.weight_bits == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pruned", "0.7", "--unified", "0.5"], "must not exceed 1"),
        (["--pruned", "-0.1"], "pruned"),
        (["--block", "4by4"], "not a block shape"),
        (["--weight-bits", "9"], "weight_bits"),
        (["--epochs-admm", "-1"], "epochs_admm"),
        (["--accumulation", "0"], "accumulation"),
        (["--device", "gpu"], "must be auto, cpu, cuda or cuda:N"),
        (["--activation-bits", "1"], "activation_bits: 1, must lie in 2 to 16"),
        (["--calibration-images", "0"], "calibration_images: 0, must be at least 1"),
        (["--data", "fashionmnist"], 'did you mean "fashion-mnist"'),
        (["--train-images", "0"], "train: 0 images"),
        (["--config", "missing.toml"], "missing.toml"),
    ],
)
def test_wrong_options_are_input_errors(dense: Path, arguments: list[str], message: str) -> None:
    found = error_of(compress, dense, *QUICK, *arguments)
    assert isinstance(found, InputError)
    assert message in str(found)


def test_wrong_networks_and_files_are_named(tmp_path: Path, dense: Path) -> None:
    found = error_of(train, "lenet", *DIGITS)
    assert isinstance(found, InputError)
    assert 'did you mean "lenet5"' in str(found)
    found = error_of(train, "vgg16", *DIGITS, "--epochs", "1")
    assert "does not take images" in str(found)
    assert isinstance(error_of(compress, tmp_path / "missing", *QUICK), HwsimError)
    result = run(compress, dense, *QUICK, "--out", tmp_path / "model")
    assert result.exception is None
    found = error_of(compress, tmp_path / "model", *QUICK)
    assert isinstance(found, FormatError)
    assert "a compressed model already" in str(found)


def test_the_substitute_data_is_said_on_stderr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(_url: str) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(data, "DEBIAN_FOLDER", tmp_path / "none")
    monkeypatch.setattr(data, "_open_url", no_network)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small = ["--train-images", "64", "--test-images", "20", "--epochs", "1"]
    result = run(train, "lenet300", *small, "--out", tmp_path / "a")
    assert result.exception is None, result.output
    assert "warning: Fashion-MNIST was found nowhere" in result.stderr
    assert "IN PLACE OF Fashion-MNIST" in result.stdout
    assert "IN PLACE OF" in load_checkpoint(tmp_path / "a").dataset.source


def test_a_result_that_cannot_be_written_is_said_before_the_training(tmp_path: Path, dense: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "model"):
        for command in ((train, "lenet300"), (compress, dense)):
            result = run(*command, *DIGITS, "--out", out)
            assert "cannot be written" in str(result.exception)
            assert "epoch" not in result.stderr


def test_a_budget_is_kept_by_the_file_and_said(tmp_path: Path, dense: Path) -> None:
    path = tmp_path / "model"
    result = run(
        compress,
        dense,
        *QUICK,
        "--budget",
        "latency_cycles=3000,machine=msa-16x16",
        "--all-layers",
        "--out",
        path,
    )
    assert result.exception is None, result.output
    artifact = load_artifact(path)
    latency = simulate("msa-16x16", artifact.layers()).summary["latency_cycles"]
    assert 0.95 * 3000 < latency <= 3000
    spent = artifact.results["budget"]
    assert spent == {"quantity": "latency_cycles", "limit": 3000, "reached": latency}
    assert f"budget    latency_cycles {latency:,} of 3,000" in result.stdout
    rows = artifact.recipe["plan"]["layers"]
    assert [row["layer"] for row in rows] == list(artifact.compressed)
    for row in rows:
        types = artifact.compressed[row["layer"]].types
        assert [row["pruned"], row["unified"], row["dense"]] == [
            int((types == code).sum()) for code in (0, 1, 2)
        ]
    assert artifact.recipe["plan"]["allocation"]["method"] == "magnitude"
    lines = result.stdout.splitlines()
    assert lines[0].split()[:3] == ["layer", "block", "blocks"]
    assert [line.split()[0] for line in lines[1:4]] == ["fc1", "fc2", "fc3"]


def test_block_shapes_are_chosen_per_layer(tmp_path: Path, dense: Path) -> None:
    path = tmp_path / "model"
    shapes = ["--block", "1x4", "--block", "4x4", "--block", "8x8"]
    result = run(
        compress, dense, *QUICK, *shapes, "--budget", "file_bytes=12000", "--all-layers", "--out", path
    )
    assert result.exception is None, result.output
    artifact = load_artifact(path)
    assert {layer.block for layer in artifact.compressed.values()} <= {(1, 4), (4, 4), (8, 8)}
    size = path.stat().st_size
    assert artifact.results["budget"] == {"quantity": "file_bytes", "limit": 12000, "reached": size}
    assert f"budget    file_bytes {size:,} of 12,000" in result.stdout
    missed = "does not keep the budget of 12,000 file_bytes"
    assert (missed in result.stderr) == (size > 12000)
    assert 0.9 * 12000 < size < 1.1 * 12000


def test_an_allocation_of_ratios(tmp_path: Path, dense: Path) -> None:
    path = tmp_path / "model"
    ratios = ["--pruned", "0.75", "--unified", "0.25", "--all-layers"]
    options = ["--allocation", "erdos-renyi", "--balanced-rows", "--permute-channels", "--ramp-updates", "1"]
    result = run(compress, dense, *QUICK, *ratios, *options, "--distill", "0.5", "--out", path)
    assert result.exception is None, result.output
    artifact = load_artifact(path)
    kept = {row["layer"]: row["kept_percent"] for row in artifact.recipe["plan"]["layers"]}
    assert kept["fc1"] < kept["fc2"] < kept["fc3"]
    for layer in artifact.compressed.values():
        assert len(set((layer.types == 0).sum(axis=-1).ravel().tolist())) == 1
    assert artifact.recipe["training"]["distill"] == 0.5
    assert [item["layer"] for item in artifact.recipe["permutation"]["permuted"]] == ["fc1", "fc2"]


def test_a_stopped_command_goes_on_and_writes_the_same_file(
    tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*QUICK, "--epochs-admm", 2, "--epochs-retrain", 2, "--allocation", "magnitude"]
    whole = run(compress, dense, *arguments, "--out", tmp_path / "whole")
    assert whole.exception is None, whole.output
    folder = ["--checkpoint", tmp_path / "state"]
    write = fit.write_run
    written: list[object] = []

    def write_and_stop(*parts: object) -> None:
        write(*parts)  # type: ignore[arg-type]
        written.append(parts)
        if len(written) in (1, 3):
            raise KeyboardInterrupt

    monkeypatch.setattr(fit, "write_run", write_and_stop)
    for _ in range(2):
        run(compress, dense, *arguments, *folder, "--out", tmp_path / "resumed")
        assert not (tmp_path / "resumed").exists()
    result = run(compress, dense, *arguments, *folder, "--out", tmp_path / "resumed")
    assert result.exception is None, result.output
    assert len(written) == 4
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()
    found = error_of(compress, dense, *arguments, *folder, "--rho", "0.5", "--out", tmp_path / "other")
    assert isinstance(found, InputError)
    assert "recipe.rho" in str(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "image_bytes=40", "--all-layers"], "cannot be reached"),
        (["--budget", "image_byte=40"], 'did you mean "image_bytes"'),
        (["--budget", "image_bytes=9000", "--pruned", "0.5"], "--pruned: a budget decides the ratios"),
        (["--budget", "image_bytes=9000", "--allocation", "erdos-renyi"], "spreads a ratio"),
        (["--block", "4x4", "--block", "8x8"], "by --budget only"),
        (["--ramp-updates", "-1"], "ramp_updates"),
        (["--distill", "1.5"], "distill"),
    ],
)
def test_wrong_choices_are_input_errors(dense: Path, arguments: list[str], message: str) -> None:
    found = error_of(compress, dense, *QUICK, *arguments)
    assert isinstance(found, InputError)
    assert message in str(found)


@pytest.mark.parametrize("command", [train, compress])
def test_help_shows_an_example(command: click.Command) -> None:
    result = run(command, "--help")
    assert result.exception is None
    assert f"Example: hwsim {command.name}" in result.output
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.opts[0] in result.output


def test_help_names_the_defaults_of_the_settings() -> None:
    fields = CompressionConfig.model_fields | Recipe.model_fields
    seen = []
    for option in compress.params:
        stated = re.search(r"\[default: ([^\];]+)\]", getattr(option, "help", None) or "")
        if option.name in fields and stated:
            default = fields[option.name].default
            shown = "x".join(map(str, default)) if isinstance(default, tuple) else default
            assert type(shown)(stated[1]) == shown, option.name
            seen.append(option.name)
    assert {"epochs_admm", "epochs_retrain", "lr", "rho", "pruned", "precision", "batch_size"} <= set(seen)


def test_a_misspelt_network_and_options_of_others_are_said(dense: Path) -> None:
    assert 'did you mean "efficientnet-lite0"' in str(error_of(compress, "eficientnet-lite0"))
    assert "2 problems" in str(error_of(compress, dense, "--inputs", "x.npy", "--input-shape", "3x3"))
    assert "3 problems" in str(
        error_of(compress, dense, "--pruned", "3", "--rho", "-1", "--accumulation", "0")
    )


def test_importing_the_commands_is_cheap() -> None:
    code = (
        "import sys, compress.cli; "
        "print(sorted({'torch', 'numpy', 'rich', 'pydantic', 'numba', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_preset_makes_a_smaller_file_that_says_what_it_cost(tmp_path: Path, dense: Path) -> None:
    plain, small = tmp_path / "plain", tmp_path / "small"
    assert run(compress, dense, *QUICK, "--out", plain).exception is None
    result = run(compress, dense, *QUICK, "--preset", "small", "--max-loss", "0.05", "--out", small)
    assert result.exception is None, result.output
    assert small.stat().st_size < 0.8 * plain.stat().st_size
    artifact = load_artifact(small)
    assert artifact.results["max_loss"] == 0.05
    assert artifact.results["multiplier"] > 0
    images = data.load_dataset("digits", train_limit=320, test_limit=100)
    found = evaluate(rebuild_integer(artifact), images.normalise(images.test_images), images.test_labels)
    assert artifact.results["accuracy_integer"] == found
    assert f"coarser {artifact.results['accuracy_coarse']:.2%}" in result.stdout


def test_pack_changes_bytes_and_nothing_else(tmp_path: Path) -> None:
    old = Path(__file__).parent / "data" / "version1.hws.safetensors"
    result = run(pack, old, "--out", tmp_path / "new")
    assert result.exception is None, result.output
    before, after = load_artifact(old), load_artifact(tmp_path / "new")
    for name in before.compressed:
        assert (before.weight(name) == after.weight(name)).all()
    size = (tmp_path / "new").stat().st_size
    assert f"({size:,} bytes, before {old.stat().st_size:,}:" in result.stdout
    assert run(pack, tmp_path / "new", "--preset", "fast").exception is None
    assert (load_artifact(tmp_path / "new").weight("fc") == before.weight("fc")).all()


def test_wrong_uses_of_presets_are_input_errors(tmp_path: Path, dense: Path) -> None:
    assert "add --preset small" in str(error_of(compress, dense, *QUICK, "--max-loss", "0.1"))
    assert "max_loss: -1.0" in str(error_of(compress, dense, *QUICK, "--preset", "fast", "--max-loss", "-1"))
    assert "cannot be read" in str(error_of(pack, tmp_path / "missing"))
    assert isinstance(error_of(pack, dense), FormatError)


# --- in one shot

ONE_SHOT = [*DIGITS, "--one-shot", "--all-layers", "--calibration-images", "100"]


def test_one_shot_needs_no_training(tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit._Trainer, "epoch", lambda *_: pytest.fail("trained"))
    path = tmp_path / "model"
    result = run(compress, dense, *ONE_SHOT, "--pruned", 0.5, "--unified", 0.5, "--out", path)
    assert result.exception is None, result.output
    artifact = load_artifact(path)
    assert artifact.recipe["one_shot"]["method"] == "hessian"
    assert "training images" in artifact.recipe["one_shot"]["calibration"]
    assert artifact.recipe["calibration_images"] == 100
    assert "training" not in artifact.recipe
    assert [row["layer"] for row in artifact.results["layer_errors"]] == ["fc1", "fc2", "fc3"]
    assert artifact.results["accuracy_one_shot"] > artifact.results["accuracy_dense"] - 0.1
    assert f"one-shot {artifact.results['accuracy_one_shot']:.2%}" in result.stdout
    assert "layer fc3" in result.stderr


def test_a_rounding_error_makes_the_file_smaller(tmp_path: Path, dense: Path) -> None:
    sizes = []
    for share in (0.0, 0.02):
        path = tmp_path / f"model-{share}"
        whole = ("--pruned", 0, "--unified", 0, "--rounding-error", share, "--out", path)
        result = run(compress, dense, *ONE_SHOT, *whole)
        assert result.exception is None, result.output
        artifact = load_artifact(path)
        assert artifact.recipe["one_shot"]["rounding_error"] == share
        assert artifact.results["accuracy_one_shot"] > artifact.results["accuracy_dense"] - 0.05
        sizes.append(path.stat().st_size)
    assert sizes[1] < 0.7 * sizes[0]


def test_a_rounding_error_is_a_share_and_of_one_shot(tmp_path: Path, dense: Path) -> None:
    error = error_of(compress, dense, *QUICK, "--rounding-error", 1.5, "--out", tmp_path / "a")
    assert isinstance(error, InputError)
    assert [problem.message for problem in error.problems] == ["is of one shot", "1.5, must be from 0 to 1"]


def test_one_shot_takes_no_options_of_training(tmp_path: Path, dense: Path) -> None:
    error = error_of(compress, dense, *ONE_SHOT, "--epochs-admm", 2, "--lr", 0.1, "--out", tmp_path / "a")
    assert isinstance(error, InputError)
    assert [problem.field for problem in error.problems] == ["--epochs-admm", "--lr"]


def test_one_shot_is_one_process_on_the_cpu(
    tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "x"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    error = error_of(compress, dense, *ONE_SHOT, "--device", "cuda", "--out", tmp_path / "a")
    assert isinstance(error, InputError)
    assert [problem.field for problem in error.problems] == ["--device", "torchrun"]


def test_the_file_of_one_shot_keeps_its_budget(tmp_path: Path, dense: Path) -> None:
    path, state = tmp_path / "model", tmp_path / "state"
    options = [*ONE_SHOT, "--budget", "file_bytes=15000", "--checkpoint", state, "--out", path]
    result = run(compress, dense, *options)
    assert result.exception is None, result.output
    assert 14_700 <= path.stat().st_size <= 15_000
    assert {"turn-0", "turn-1"} <= {folder.name for folder in state.iterdir()}

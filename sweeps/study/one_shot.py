"""Networks that nobody retrains: compressed in one shot from published weights, and how often they still agree with fp32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from compress.allocation import AllocationMethod, allocate
from compress.artifact import load_artifact, save_artifact
from compress.fit import Progress
from compress.one_shot import OneShotRecipe, one_shot
from compress.one_shot.network import OneShotProgress
from compress.pretrained import Pretrained, load_pretrained
from compress.rebuild import make_artifact, rebuild
from compress.rules import CompressionConfig, Plan, plan_layers
from compress.shapes import evaluation_mode, layer_shapes
from sweeps.study.folder import StudyFolder
from sweeps.study.photographs import CALIBRATION, TEST, crops
from sweeps.study.runs import Run
from sweeps.study.sentences import calibration_sentences, measured_sentences

__all__ = ["SUBJECTS", "Found", "Subject", "compressed", "treated_layers"]

CALIBRATION_CROPS, TEST_CROPS = 6, 40
"""Of each photograph. 48 crops are 1,200 positions where a layer has most inputs (1,152), and all time goes with them."""

SIDE = 160
"""Of an image as the network gets it: both were trained at 224, and take half the time so."""

TOKENS = 32
"""The longest of the sentences has 22 with its two marks."""

_BATCH = 32


@dataclass(frozen=True, eq=False)
class Subject:
    """A network with published weights, and what it is asked.

    Attributes
    ----------
    name : str
        Of `compress.pretrained`.
    inputs : callable
        ``inputs(network)``: those of calibration and those of the test, no photograph or topic in both.
    qualities : callable
        ``qualities(outputs, outputs_fp32)`` on the test inputs, every measure by name.
    source : str
        Where the inputs come from, in words.
    """

    name: str
    inputs: Callable[[Pretrained], tuple[Tensor, Tensor]]
    qualities: Callable[[Tensor, Tensor], dict[str, float]]
    source: str

    def measure(self, model: nn.Module) -> dict[str, float]:
        """How a network answers the test inputs, against the fp32 network."""
        ready = _ready(self.name)
        return self.qualities(_outputs(model, ready.test), ready.outputs)


@dataclass(frozen=True, eq=False)
class _Ready:
    """A network with its inputs, and what it answers in fp32: found once per process."""

    network: Pretrained
    calibration: Tensor
    test: Tensor
    outputs: Tensor


@lru_cache(maxsize=1)
def _ready(name: str) -> _Ready:
    network = load_pretrained(name)
    calibration, test = SUBJECTS[name].inputs(network)
    return _Ready(network, calibration, test, _outputs(network.model, test))


def _outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    with evaluation_mode(model), torch.no_grad():
        return torch.cat([model(batch) for batch in inputs.split(_BATCH)])


def _photographs(network: Pretrained) -> tuple[Tensor, Tensor]:
    images: Callable[..., Tensor] = network.preprocess
    calibration, test = crops(CALIBRATION, CALIBRATION_CROPS, seed=0), crops(TEST, TEST_CROPS, seed=1)
    return images(calibration, size=(SIDE, SIDE)), images(test, size=(SIDE, SIDE))


def _sentences(network: Pretrained) -> tuple[Tensor, Tensor]:
    tokenize: Callable[..., Tensor] = network.preprocess
    return tokenize(calibration_sentences(), length=TOKENS), tokenize(measured_sentences(), length=TOKENS)


def same_class(outputs: Tensor, wanted: Tensor) -> dict[str, float]:
    """Share of inputs with the same class as in fp32.

    >>> same_class(torch.eye(4), torch.eye(4)[[0, 1, 2, 2]])
    {'agreement': 0.75}
    """
    return {"agreement": float((outputs.argmax(dim=1) == wanted.argmax(dim=1)).double().mean())}


def same_neighbour(outputs: Tensor, wanted: Tensor) -> dict[str, float]:
    """Share of sentences whose nearest other sentence is the same as in fp32, and the mean cosine to the fp32 vector.

    Parameters
    ----------
    outputs, wanted : Tensor ``[n, d]``
        Of length 1.
    """

    def nearest(vectors: Tensor) -> Tensor:
        near = vectors @ vectors.T
        return near.fill_diagonal_(-2.0).argmax(dim=1)

    return {
        "agreement": float((nearest(outputs) == nearest(wanted)).double().mean()),
        "cosine": float((outputs * wanted).sum(dim=1).double().mean()),
    }


_PHOTOGRAPHS = (
    f"{CALIBRATION_CROPS * len(CALIBRATION)} crops of {len(CALIBRATION)} photographs to calibrate, "
    f"{TEST_CROPS * len(TEST)} of {len(TEST)} others to test, {SIDE}x{SIDE} pixels"
)
_ALL = (
    Subject("efficientnet-lite0", _photographs, same_class, _PHOTOGRAPHS),
    Subject("mobilenetv2", _photographs, same_class, _PHOTOGRAPHS),
    Subject(
        "minilm-l6",
        _sentences,
        same_neighbour,
        "90 sentences of 9 topics to calibrate, 170 of 17 others to test",
    ),
)
SUBJECTS: Mapping[str, Subject] = MappingProxyType({subject.name: subject for subject in _ALL})
"""The networks by name."""


@dataclass(frozen=True)
class Found:
    """What a run gave: see `sweeps.study.folder.Result`."""

    quality: dict[str, float]
    file_bytes: int
    fp32_bytes: int
    examples: str
    details: dict[str, Any]


def treated_layers(model: nn.Module) -> dict[str, Tensor]:
    """The weights that are compressed, by module name."""
    return {
        layer.name: layer.module.get_parameter("weight")
        for layer in plan_layers(model, CompressionConfig()).layers
    }


def compressed(run: Run, folder: StudyFolder, progress: Callable[[Progress], None] | None) -> Found:
    """Carry out a run: allocate, compress in one shot, write the file, read it back, compare.

    Parameters
    ----------
    run : Run
        Of a task in `SUBJECTS`.
    folder : StudyFolder
        Gets the file, and finished layers while the run lasts.
    progress : callable, optional
        Called after every layer.

    Raises
    ------
    InputError
        A package with weights or photographs is not installed.
    """
    subject = SUBJECTS[run.task]
    ready = _ready(run.task)
    model = load_pretrained(run.task).model
    fp32_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    weights = treated_layers(model)
    treated = 4 * sum(values.numel() for values in weights.values())
    if run.method == "start":
        details = {"measure": "agreement", "layer_bytes": treated, "treated_fp32_bytes": treated}
        return Found(subject.measure(model), fp32_bytes, fp32_bytes, subject.source, details)
    plan = _plan(run, model, ready.calibration)
    report = None if progress is None else partial(_report, progress)
    result = one_shot(
        model,
        _batches(ready.calibration),
        plan,
        OneShotRecipe(
            method="hessian" if run.method == "hessian" else "projection", rounding_error=run.rounding_error
        ),
        progress=report,
        checkpoint=folder.state_folder(run.key),
    )
    input_shape = tuple(ready.calibration.shape[1:])
    artifact = make_artifact(
        model,
        result.layers,
        input_shape,
        ready.outputs.shape[1],
        network=run.task,
        recipe={"study_run": run.key},
        shapes=layer_shapes(model, input_shape, dtype=ready.calibration.dtype),
    )
    path = folder.file_path(run)
    file_bytes = save_artifact(path, artifact)
    sizes = artifact.size_report().set_index("layer")["total_bytes"]
    details = {
        "measure": "agreement",
        "layer_bytes": round(float(sizes.loc[list(weights)].sum())),
        "treated_fp32_bytes": treated,
        "warnings": list(result.warnings),
        "plan": plan.to_dict(),
        "layer_errors": [vars(error) for error in result.errors],
        "recipe": result.recipe.model_dump(mode="json"),
    }
    quality = subject.measure(rebuild(load_artifact(path)))
    return Found(quality, file_bytes, fp32_bytes, subject.source, details)


def _report(progress: Callable[[Progress], None], now: OneShotProgress) -> None:
    progress(Progress("layer", now.number, now.layers, 1, 1, 0.0))


def _batches(inputs: Tensor) -> list[Tensor]:
    """Images a few at a time; sentences of one length together, for what pads them would count as inputs.

    >>> [batch.tolist() for batch in _batches(torch.tensor([[1, 2, 0], [3, 0, 0], [4, 5, 0]]))]
    [[[3]], [[1, 2], [4, 5]]]
    """
    if inputs.is_floating_point():
        return list(inputs.split(_BATCH))
    lengths = (inputs != 0).sum(dim=1)
    return [inputs[lengths == length, : int(length)] for length in lengths.unique()]


def _plan(run: Run, model: nn.Module, calibration: Tensor) -> Plan:
    """Depthwise convolutions stay dense: a few per cent of the weights, and blocks do not fit their single input channel."""
    depthwise = [layer.name for layer in plan_layers(model, CompressionConfig()).layers if layer.groups > 1]
    config = CompressionConfig(
        block=run.block,
        pruned=run.pruned,
        unified=run.unified,
        weight_bits=run.weight_bits,
        exempt_first_last=run.exempt_first_last,
        rules=tuple({"pattern": name, "exempt": True} for name in depthwise),
    )
    if not run.allocation:
        return plan_layers(model, config)
    method: AllocationMethod = run.allocation  # type: ignore[assignment]
    samples = [(batch, batch) for batch in _batches(calibration)]  # targets are not looked at
    return allocate(model, samples, config, method=method)

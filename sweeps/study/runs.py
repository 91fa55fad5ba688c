"""One training run of a study, described completely: its result is a function of this description and of the code."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from compress.loop import Precision
from hwsim.errors import InputError, Problem, nearest_name

__all__ = ["METHODS", "ONE_SHOT", "STUDY_VERSION", "Method", "Run", "Training", "run_from_json"]

STUDY_VERSION = 1
"""Part of every key. Raised whenever the same description gives another result: older results are not reused."""


@dataclass(frozen=True)
class Method:
    """A way to make a network small.

    Attributes
    ----------
    label : str
        In tables and legends.
    about : str
        One sentence for the page.
    """

    label: str
    about: str


METHODS = {
    "dense": Method("dense", "fp32, trained in one go for as many epochs as a compressed network sees altogether"),
    "start": Method("dense, start", "fp32, the network that every compression of the same seed starts from"),
    "int8": Method("int8", "the start network rounded to 8 bits, no training"),
    "rounded": Method("int8, coarser", "int8, then rounded by rate and distortion, no training"),
    "int8-trained": Method("int8, trained", "the recipe of the compressed networks with nothing compressed but the width"),
    "unstructured": Method("single weights", "ADMM that prunes single weights, layers by one ranking; the rest in 8 bits"),
    "channels": Method("channels", "the filters and neurons of least norm taken out, then the same retraining; 8 bits"),
    "pruned": Method("blocks pruned", "blocks pruned, the rest in 8 bits"),
    "unified": Method("blocks unified", "blocks unified, the rest in 8 bits"),
    "binary": Method("all unified", "every block unified: one bit a weight and the magnitudes"),
    "joint": Method("joint", "blocks pruned or unified, the same ratio in every layer but the first and the last"),
    "budget": Method("joint, budget", "joint, types dealt out by a budget of bytes over all layers, channels permuted"),
    "projection": Method("one shot, projection", "published weights, each layer to the nearest blocks and integers"),
    "hessian": Method("one shot, Hessian", "the same, fitted to what the original gives on calibration inputs"),
}  # fmt: skip
"""The methods by name, in the order of the tables."""

ONE_SHOT = ("projection", "hessian")
"""Methods without any training of ours."""

_LATER_FIELDS = {"weight_bits": 8, "rounding_error": 0.0}
_LATER_TRAINING_FIELDS = {"teacher_epochs": 0}
"""Fields that came after results had been stored; at these values they are no part of a key."""


@dataclass(frozen=True)
class Training:
    """How long and how the networks of a run are trained.

    Attributes
    ----------
    dense_epochs : int
        Of the start network.
    admm_epochs, retrain_epochs : int
        Of the compression.
    lr, lr_dense : float
        First learning rate of Adam: of the compression, of the start network.
    rho, rho_growth : float
        See `compress.rules.Recipe`, as the next two.
    updates_per_epoch, ramp_updates : int
    distill : float
        Share of the loss that is the distance to the teacher.
    temperature : float
        Of the distillation of classes.
    batch_size : int
    max_loss : float
        Nats of calibration loss that coarser integers may cost at the end; 0: 8 bits stay as trained. Of runs without
        ``target_bytes``.
    train_images : int
        The first so many, 0: all.
    held_out : bool
        Train without the last 5,000 training examples, and measure on these instead of the test set: for choosing recipes.
    precision : {"fp32", "bf16"}
        Of the training alone (`compress.loop.Gradients`); everything is measured in fp32.
    teacher_epochs : int
        Of a dense network that is trained to teach; 0: the start network teaches.
    """

    dense_epochs: int = 12
    admm_epochs: int = 4
    retrain_epochs: int = 8
    lr: float = 1e-3
    lr_dense: float = 1e-3
    rho: float = 3e-2
    rho_growth: float = 1.3
    updates_per_epoch: int = 2
    ramp_updates: int = 0
    distill: float = 0.5
    temperature: float = 4.0
    batch_size: int = 128
    max_loss: float = 0.0
    train_images: int = 0
    held_out: bool = False
    precision: Precision = "fp32"
    teacher_epochs: int = 0

    @property
    def epochs(self) -> int:
        """Altogether, of the start network and its compression."""
        return self.dense_epochs + self.admm_epochs + self.retrain_epochs


@dataclass(frozen=True)
class Run:
    """One point of a study and one seed.

    Attributes
    ----------
    task : str
        See `sweeps.study.tasks.TASKS`.
    method : str
        One of `METHODS`.
    seed : int
        Of initial weights, order of the data and everything else that is drawn.
    point : str
        What the run stands for in a table (``"50x"``); the same for all seeds.
    variant : str
        In what it differs from the run that it is compared with (``"no distillation"``), in words.
    block : (int, int)
    pruned, unified : float
        Shares of blocks.
    allocation : str
        How ratios are spread over the layers (`compress.allocation`); empty: the same in every layer.
    budget : str
        In place of ratios, such as ``"file_bytes=30000"``.
    permute : bool
    exempt_first_last : bool
        Whether the first and the last layer stay dense.
    width : float
        Share of the channels that stay; 1: no channel pruning.
    target_bytes : int
        Integers are made coarser after training until the file has at most so many bytes; 0: no target.
    training : Training
        Of no meaning in one shot.
    weight_bits : int
        Of a dense weight in one shot.
    rounding_error : float
        In one shot, see `compress.one_shot.OneShotRecipe`.

    Raises
    ------
    InputError
        Values that make no run.
    """

    task: str
    method: str
    seed: int = 0
    point: str = ""
    variant: str = ""
    block: tuple[int, int] = (4, 4)
    pruned: float = 0.0
    unified: float = 0.0
    allocation: str = ""
    budget: str = ""
    permute: bool = False
    exempt_first_last: bool = True
    width: float = 1.0
    target_bytes: int = 0
    training: Training = field(default_factory=Training)
    weight_bits: int = 8
    rounding_error: float = 0.0

    def __post_init__(self) -> None:
        problems = []
        if self.method not in METHODS:
            problems.append(Problem("method", f'"{self.method}"', nearest_name(self.method, METHODS)))
        if self.seed < 0:
            problems.append(Problem("seed", f"{self.seed}, must be at least 0"))
        if not 0 < self.width <= 1:
            problems.append(Problem("width", f"{self.width}, must be above 0 and at most 1"))
        if self.target_bytes < 0:
            problems.append(Problem("target_bytes", f"{self.target_bytes}, must be at least 0"))
        if not (0 <= self.pruned <= 1 and 0 <= self.unified <= 1 and self.pruned + self.unified <= 1 + 1e-9):
            problems.append(Problem("pruned, unified", f"{self.pruned}, {self.unified}: shares of one whole"))
        if self.training.dense_epochs < 0 or self.training.batch_size < 1 or not self.training.lr > 0:
            problems.append(Problem("training", "epochs, batch size or learning rate out of range"))
        if problems:
            raise InputError("run", problems)

    @property
    def key(self) -> str:
        """16 hexadecimal digits of everything that decides the result: all fields and `STUDY_VERSION`."""
        fields = _without(asdict(self), _LATER_FIELDS)
        fields["training"] = _without(fields["training"], _LATER_TRAINING_FIELDS)
        content = json.dumps({"version": STUDY_VERSION, **fields}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def shape(self) -> str:
        """``"4x4"``; empty where the method has no blocks."""
        blocks = ("pruned", "unified", "binary", "joint", "budget")
        in_blocks = self.method in blocks or (self.method in ONE_SHOT and self.pruned + self.unified > 0)
        return f"{self.block[0]}x{self.block[1]}" if in_blocks else ""

    @property
    def group(self) -> tuple[str, ...]:
        """What runs of different seeds have in common."""
        return (self.task, self.method, self.shape, self.point, self.variant)

    @property
    def title(self) -> str:
        """A line for people."""
        parts = (
            self.task,
            METHODS[self.method].label,
            self.shape,
            self.point,
            self.variant,
            f"seed {self.seed}",
        )
        return ", ".join(part for part in parts if part)

    @property
    def trained_epochs(self) -> int:
        """Epochs that this run trains itself, the start network not counted."""
        if self.method == "dense":
            return self.training.epochs
        return (
            0
            if self.method in ("start", "int8", "rounded", *ONE_SHOT)
            else self.training.epochs - self.training.dense_epochs
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON values; `run_from_json` is the inverse."""
        return asdict(self)


def _without(fields: dict[str, Any], later: Mapping[str, object]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in later or later[name] != value}


def run_from_json(data: dict[str, Any], source: str) -> Run:
    """A run from what `Run.to_json` gave.

    Raises
    ------
    InputError
        Fields that are missing, unknown or of the wrong kind.
    """
    problems = [
        Problem(prefix + name, "unknown field", nearest_name(name, known))
        for prefix, given, known in (
            ("", data, [entry.name for entry in fields(Run)]),
            ("training.", data.get("training") or {}, [entry.name for entry in fields(Training)]),
        )
        for name in given
        if name not in known
    ]
    if not isinstance(data.get("block"), list | tuple) or not isinstance(data.get("training"), dict):
        problems.append(Problem("block, training", "missing or damaged"))
    if problems:
        raise InputError(source, problems)
    numbers = [value for value in (*data.values(), *data["training"].values()) if isinstance(value, float)]
    if not all(map(math.isfinite, numbers)):
        raise InputError(source, "holds a number that is not finite")
    g_o, g_k = data["block"]
    return Run(**{**data, "block": (int(g_o), int(g_k)), "training": Training(**data["training"])})

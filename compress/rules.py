"""What is to be done to which layer: the configuration, the training recipe, and the plan for one network.

The configuration needs no torch, so that a sweep can read, compare and hash thousands of them.
"""

from __future__ import annotations

import html
import math
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hwsim.errors import InputError, Problem, nearest_name
from hwsim.layer import type_counts
from hwsim.machine import validation_problems
from hwsim.tables import format_table

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Allocation",
    "CompressionConfig",
    "LayerSettings",
    "Plan",
    "PlannedLayer",
    "Recipe",
    "Rule",
    "Untreated",
    "block_counts",
    "load_config",
    "parse_config",
    "plan_layers",
    "types_shape",
]

Block = tuple[
    Annotated[int, Field(strict=True, ge=1, le=256)], Annotated[int, Field(strict=True, ge=1, le=256)]
]
Ratio = Annotated[float, Field(ge=0, le=1)]
Bits = Annotated[int, Field(strict=True, ge=2, le=8)]
Epochs = Annotated[int, Field(strict=True, ge=0, le=100_000)]
Positive = Annotated[float, Field(gt=0, le=1e6)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LayerSettings(_Settings):
    """What is done to one layer.

    Attributes
    ----------
    block : tuple of int
        ``(g_o, g_k)``: output channels × reduction positions.
    pruned, unified : float
        Shares of the layer's blocks; their sum must not exceed 1, the rest is dense.
    column_order : {"tap_major", "channel_major"}
        Fastest index of a row of the matrix: the input channel, or the kernel tap.
    projection : {"exact", "prune_first"}
    weight_bits, magnitude_bits : int
        2 to 8: bits of a dense weight (two's complement) and of a shared magnitude (unsigned).
    balanced_rows : bool
        Every block row of the layer holds the same number of blocks of each type, so that the rows of an array, however
        many it has, end a pass together. The counts are then taken per block row.
    permute_channels : bool
        The layer's output channels may be reordered, together with the inputs of the layers that read them, so that
        small weights share blocks. The function of the network stays (`compress.permute`).
    """

    block: Block = (4, 4)
    pruned: Ratio = 0.5
    unified: Ratio = 0.5
    column_order: Literal["tap_major", "channel_major"] = "tap_major"
    projection: Literal["exact", "prune_first"] = "exact"
    weight_bits: Bits = 8
    magnitude_bits: Bits = 8
    balanced_rows: Annotated[bool, Field(strict=True)] = False
    permute_channels: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _ratios_fit_together(self) -> Self:
        type_counts(1, self.pruned, self.unified)
        return self


class Rule(_Settings):
    """Settings for the layers whose name matches; what is left out stays as it was.

    Attributes
    ----------
    pattern : str
        A layer's name, or a shell pattern (``*``, ``?``, ``[…]``; ``*`` also spans dots): ``"features.*"``.
    exempt : bool, optional
        True: every block stays dense (the layer is only quantised). False: lifts the exemption of the first
        and last layer.
    """

    pattern: Annotated[str, Field(min_length=1)]
    exempt: bool | None = None
    block: Block | None = None
    pruned: Ratio | None = None
    unified: Ratio | None = None
    column_order: Literal["tap_major", "channel_major"] | None = None
    projection: Literal["exact", "prune_first"] | None = None
    weight_bits: Bits | None = None
    magnitude_bits: Bits | None = None
    balanced_rows: bool | None = None
    permute_channels: bool | None = None

    def changes(self) -> dict[str, Any]:
        """The layer settings that the rule sets."""
        return self.model_dump(exclude={"pattern", "exempt"}, exclude_none=True)


class CompressionConfig(LayerSettings):
    """Settings of every layer, and rules for some.

    Attributes
    ----------
    rules : tuple of Rule
        All rules whose pattern matches apply, in order: the later one wins.
    exempt_first_last : bool
        Whether the first and the last layer that the method can treat, in order of registration, stay dense.

    Examples
    --------
    >>> config = CompressionConfig(block=(4, 4), pruned=0.75, unified=0.25, rules=[{"pattern": "fc*", "pruned": 0.5}])
    >>> config.rules[0].changes()
    {'pruned': 0.5}
    """

    rules: tuple[Rule, ...] = ()
    exempt_first_last: bool = True


class Recipe(_Settings):
    """How a network is trained into its compressed form.

    Attributes
    ----------
    epochs_admm, epochs_retrain : int
        Epochs with the ADMM penalty, and of masked retraining. With ``epochs_admm = 0`` the weights are
        projected in one shot.
    lr, lr_retrain : float
        Learning rate of Adam at the start of every ADMM update and of the retraining.
    lr_floor : float
        Share of the learning rate that is left at the end of each (cosine).
    rho, rho_growth, rho_max : float
        Penalty of the first update, its growth per update and its ceiling.
    updates_per_epoch : int
        ADMM updates in an epoch.
    ramp_updates : int
        ADMM updates over which the counts of pruned and unified blocks grow to their full number; 0: full from the start.
    distill : float
        Share of the loss that is the distance to the outputs of the uncompressed network, in ADMM and retraining; 0: none.
    distill_loss : {"kl", "mse"}
        Distance of distillation: between softened class probabilities, or the squared error of any outputs.
    distill_temperature : float
        Softens the probabilities of "kl".
    batch_size : int
        Samples of a step, all processes together; used where the training data comes as tensors.
    accumulation : int
        Parts that every batch is cut into, one after the other through the network; the step is the same but for rounding
        (and for batch normalisation, which sees one part), the memory that of a part.
    precision : {"fp32", "bf16"}
        bf16: the network trains under autocast; weights, penalty and projection stay in float32.
    seed : int

    Notes
    -----
    Defaults measured on LeNet-5 and 20,000 images of Fashion-MNIST, one seed: of twelve epochs, four with ADMM and eight
    of retraining end higher than eight and four, and two updates per epoch bring ADMM to rest in that time.

    Source: ADMM for weights: Zhang et al., "A Systematic DNN Weight Pruning Framework using Alternating Direction
    Method of Multipliers", ECCV 2018; ρ and its growth are found by trial. Distillation: Hinton, Vinyals, Dean, "Distilling
    the Knowledge in a Neural Network", arXiv 1503.02531 (2015).
    """

    epochs_admm: Epochs = 4
    epochs_retrain: Epochs = 8
    lr: Positive = 1e-3
    lr_retrain: Positive = 1e-3
    lr_floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    rho: Positive = 3e-2
    rho_growth: Annotated[float, Field(ge=1, le=100)] = 1.3
    rho_max: Positive = 1.0
    updates_per_epoch: Annotated[int, Field(strict=True, ge=1, le=10_000)] = 2
    ramp_updates: Annotated[int, Field(strict=True, ge=0, le=1_000_000)] = 0
    distill: Ratio = 0.0
    distill_loss: Literal["kl", "mse"] = "kl"
    distill_temperature: Positive = 4.0
    batch_size: Annotated[int, Field(strict=True, ge=1, le=1 << 20)] = 64
    accumulation: Annotated[int, Field(strict=True, ge=1, le=1 << 16)] = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: Annotated[int, Field(strict=True, ge=0, lt=1 << 63)] = 0


def parse_config(data: dict[str, Any], source: str = "compression config") -> CompressionConfig:
    """A configuration from a dict, such as the content of a TOML file.

    Raises
    ------
    InputError
        With every problem found; ``source`` stands in front.
    """
    problems = []
    rules = data.get("rules", ())
    if not isinstance(rules, list | tuple):
        problems.append(
            Problem("rules", "must be a list of rules", "in TOML: [[rules]], one heading per rule")
        )
        rules = ()
    for position, rule in enumerate(rules):
        problems += [
            Problem(f"rules.{position}.{problem.field}", problem.message, problem.hint)
            for problem in _problems_of(Rule, rule)
        ]
    problems += _problems_of(CompressionConfig, {key: value for key, value in data.items() if key != "rules"})
    if problems:
        raise InputError(source, problems)
    return CompressionConfig.model_validate(data)


def _problems_of(kind: type[_Settings], data: Any) -> list[Problem]:
    try:
        kind.model_validate(data)
    except ValidationError as error:
        return validation_problems(error, kind)
    return []


def load_config(path: str | Path) -> CompressionConfig:
    """A configuration from a TOML file.

    Raises
    ------
    InputError
        The file cannot be read, is not TOML, or is not a valid configuration.
    """
    try:
        data = tomllib.loads(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(str(path), f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(str(path), f"not valid TOML: {error}") from None
    return parse_config(data, str(path))


@dataclass(frozen=True, eq=False)
class PlannedLayer:
    """A layer that the method treats, with everything resolved.

    Attributes
    ----------
    name : str
    module : nn.Module
        The Linear or Conv1d/2d/3d itself.
    weight_shape : tuple of int
    groups : int
    settings : LayerSettings
        Of an exempt layer both ratios are 0.
    exempt : bool
    counts : tuple of int
        ``(P, U)``: blocks to prune and to unify. They follow from the ratios of the settings, or an allocation chose them
        (`compress.allocation`).
    """

    name: str
    module: nn.Module
    weight_shape: tuple[int, ...]
    groups: int
    settings: LayerSettings
    exempt: bool
    counts: tuple[int, int]

    @property
    def m(self) -> int:
        """Output channels of one group."""
        return self.weight_shape[0] // self.groups

    @property
    def k(self) -> int:
        """Reduction positions of one group."""
        return math.prod(self.weight_shape[1:])

    @property
    def types_shape(self) -> tuple[int, int, int]:
        """``(groups, Mb, Kb)``."""
        return types_shape(self.weight_shape, self.groups, self.settings.block)

    def with_counts(self, pruned: int, unified: int) -> PlannedLayer:
        """The same layer with other counts; its ratios become what they are."""
        blocks = math.prod(self.types_shape)
        ratios = {"pruned": pruned / blocks, "unified": unified / blocks}
        return replace(self, counts=(pruned, unified), settings=self.settings.model_copy(update=ratios))


def types_shape(weight_shape: tuple[int, ...], groups: int, block: tuple[int, int]) -> tuple[int, int, int]:
    """``(groups, Mb, Kb)`` of a weight cut into blocks.

    Examples
    --------
    >>> types_shape((50, 20, 5, 5), 1, (4, 4))
    (1, 13, 125)
    """
    g_o, g_k = block
    return groups, -(-(weight_shape[0] // groups) // g_o), -(-math.prod(weight_shape[1:]) // g_k)


def block_counts(settings: LayerSettings, shape: tuple[int, int, int]) -> tuple[int, int]:
    """``(P, U)`` that the ratios of a layer ask for; with balanced rows so many of each block row.

    Examples
    --------
    >>> settings = LayerSettings(pruned=0.5, unified=0.5)
    >>> block_counts(settings, (1, 2, 5)), block_counts(settings.model_copy(update={"balanced_rows": True}), (1, 2, 5))
    ((5, 5), (4, 6))
    """
    groups, m_blocks, _ = shape
    rows = groups * m_blocks if settings.balanced_rows else 1
    pruned, unified = type_counts(math.prod(shape) // rows, settings.pruned, settings.unified)
    return rows * pruned, rows * unified


@dataclass(frozen=True)
class Untreated:
    """A module with weights that the method leaves alone, and why."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Allocation:
    """How blocks were dealt out over the layers of a plan.

    Attributes
    ----------
    method : str
        "uniform", "erdos-renyi", "magnitude", "fisher", "hessian".
    quantity : str
        What the budget is counted in, with its unit (``"image_bytes"``); empty without a budget.
    limit, reached : float
        The budget, and what the block types of the plan cost, measured.
    machine : str
        Name of the machine that it is measured on; empty where none is needed.
    layers : dict from layer name to dict
        With a budget: ``cost`` in its unit, and ``energy_kept_percent``, the share of the (curvature-weighted) energy that the
        layer keeps.
    """

    method: str
    quantity: str = ""
    limit: float = 0.0
    reached: float = 0.0
    machine: str = ""
    layers: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def summary(self) -> dict[str, Any]:
        """Everything but the layers, as JSON values."""
        return {name: value for name, value in vars(self).items() if name != "layers" and value != ""}

    def __str__(self) -> str:
        if not self.quantity:
            return f"allocation: {self.method}"
        on = f" on {self.machine}" if self.machine else ""
        return (
            f"allocation: {self.method}; {self.quantity} {self.reached:,.10g} of {self.limit:,.10g}{on} "
            f"({self.reached / self.limit:.2%})"
        )


@dataclass(frozen=True, eq=False)
class Plan:
    """What happens to every module of a network.

    Attributes
    ----------
    layers : tuple of PlannedLayer
        In order of registration.
    untreated : tuple of Untreated
        Every other module with weights of its own, biases and normalisation apart, which the method never
        touches.
    config : CompressionConfig
    allocation : Allocation or None
        How the counts were chosen; None where each layer has the ratios of its settings.
    """

    layers: tuple[PlannedLayer, ...]
    untreated: tuple[Untreated, ...]
    config: CompressionConfig
    allocation: Allocation | None = None

    def with_counts(self, counts: Mapping[str, tuple[int, int]]) -> Plan:
        """The same plan with other ``(P, U)`` for some layers, whose ratios become what these counts are."""
        layers = tuple(layer.with_counts(*counts.get(layer.name, layer.counts)) for layer in self.layers)
        return replace(self, layers=layers)

    def rows(self) -> list[dict[str, Any]]:
        """One row per layer as JSON values: block shape, blocks, how many of each type, share of the weights' blocks kept."""
        rows = []
        for layer in self.layers:
            blocks, (pruned, unified) = math.prod(layer.types_shape), layer.counts
            row: dict[str, Any] = {
                "layer": layer.name,
                "block": "x".join(map(str, layer.settings.block)),
                "blocks": blocks,
                "pruned": pruned,
                "unified": unified,
                "dense": blocks - pruned - unified,
                "kept_percent": 100 * (1 - pruned / blocks),
            }
            if self.allocation is not None:
                row |= self.allocation.layers.get(layer.name, {})
            rows.append(row)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values of six digits, as an artifact keeps it."""
        chosen = None if self.allocation is None else self.allocation.summary
        rows = [
            {
                name: float(f"{value:.6g}") if isinstance(value, float) else value
                for name, value in row.items()
            }
            for row in self.rows()
        ]
        return {"allocation": chosen, "layers": rows}

    def __str__(self) -> str:
        table = format_table(self.rows())
        return table if self.allocation is None else f"{table}\n{self.allocation}"

    def _repr_html_(self) -> str:
        rows = self.rows()
        head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_cell(value))}</td>" for value in row.values()) + "</tr>"
            for row in rows
        )
        note = "" if self.allocation is None else f"<p>{html.escape(str(self.allocation))}</p>"
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"


def _cell(value: Any) -> str:
    return (
        f"{value:,.4g}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )


def plan_layers(model: nn.Module, config: CompressionConfig) -> Plan:
    """Decide for every module of a network what is done to it.

    Parameters
    ----------
    model : nn.Module
    config : CompressionConfig

    Raises
    ------
    InputError
        A rule that matches no layer, or only layers on which it has no effect; ratios that do not fit
        together after the rules; a network in which the method can treat nothing.
    """
    found, untreated = _sort_modules(model)
    problems = list(_rule_problems(config, [name for name, _ in found], untreated))
    if not found:
        problems.append(
            Problem("", "no Linear or Conv1d/2d/3d that the method can treat", _listed(untreated))
        )
    layers = []
    for position, (name, module) in enumerate(found):
        exempt = config.exempt_first_last and position in (0, len(found) - 1)
        changes: dict[str, Any] = {}
        for rule in config.rules:
            if fnmatchcase(name, rule.pattern):
                changes |= rule.changes()
                exempt = exempt if rule.exempt is None else rule.exempt
        base = config.model_dump(include=set(LayerSettings.model_fields))
        if exempt:
            changes |= {"pruned": 0.0, "unified": 0.0}
        try:
            settings = LayerSettings.model_validate(base | changes)
        except ValidationError as error:
            problems += [
                Problem(f"{name}.{problem.field}", problem.message, "after all rules that match this layer")
                for problem in validation_problems(error, LayerSettings)
            ]
            continue
        shape, groups = tuple(module.get_parameter("weight").shape), getattr(module, "groups", 1)
        counts = block_counts(settings, types_shape(shape, groups, settings.block))
        layers.append(PlannedLayer(name, module, shape, groups, settings, exempt, counts))
    if not problems:
        problems += _idle_rules(config, layers)
    if problems:
        raise InputError("compression plan", problems)
    return Plan(tuple(layers), tuple(untreated), config)


def _listed(untreated: list[Untreated]) -> str:
    return "; ".join(f"{item.name}: {item.reason}" for item in untreated) or "it has no weights at all"


def _rule_problems(
    config: CompressionConfig, names: list[str], untreated: list[Untreated]
) -> Iterator[Problem]:
    for position, rule in enumerate(config.rules):
        if any(fnmatchcase(name, rule.pattern) for name in names):
            continue
        field = f"rules.{position}.pattern"
        refused = [item for item in untreated if fnmatchcase(item.name, rule.pattern)]
        if refused:
            yield Problem(
                field, f'"{rule.pattern}" matches only what the method cannot treat', _listed(refused)
            )
        else:
            yield Problem(field, f'"{rule.pattern}" matches no layer', nearest_name(rule.pattern, names))


def _idle_rules(config: CompressionConfig, layers: list[PlannedLayer]) -> Iterator[Problem]:
    """Ratios asked for layers that stay dense: refused, since the user would look for an effect in vain."""
    for position, rule in enumerate(config.rules):
        asked = [field for field in ("pruned", "unified") if getattr(rule, field)]
        matched = [layer for layer in layers if fnmatchcase(layer.name, rule.pattern)]
        if asked and rule.exempt is None and all(layer.exempt for layer in matched):
            yield Problem(
                f"rules.{position}.{asked[0]}",
                f'every layer that "{rule.pattern}" matches is exempt and stays dense',
                "set exempt = false in the rule, or exempt_first_last = false",
            )
    if (config.pruned or config.unified) and all(layer.exempt for layer in layers) and not config.rules:
        yield Problem(
            "exempt_first_last",
            f"all of the {len(layers)} treatable layer(s) are first or last: nothing would be compressed",
            "set exempt_first_last = false",
        )


def _sort_modules(model: nn.Module) -> tuple[list[tuple[str, nn.Module]], list[Untreated]]:
    """Treatable modules with their names, and all others that have weights."""
    from torch import nn

    owners = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    inside_attention = {
        id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)
    }
    found: list[tuple[str, nn.Module]] = []
    untreated: list[Untreated] = []
    for name, module in model.named_modules():
        reason: str | None
        if id(module) in inside_attention:
            reason = f"its weight is read by MultiheadAttention itself, past the layer's forward{_PLAIN}"
        else:
            reason = _refusal(module, owners)
        if reason is None:
            found.append((name, module))
        elif reason:
            untreated.append(Untreated(name, reason))
    return found, untreated


_PLAIN = "; compress.plain.to_plain rewrites that"
"""Where the network can be rewritten so that the method treats it."""


def _refusal(module: nn.Module, owners: Counter[int]) -> str | None:
    """None where the method can treat a module, empty where it has no weights, else the reason."""
    import torch
    from torch import nn
    from torch.nn.parameter import is_lazy
    from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

    kind = type(module).__name__
    if reason := getattr(module, "untreated_reason", ""):  # an operator from an ONNX file: no parameters
        return str(reason)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm | ParametrizationList):
        return ""
    if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
        return f"{kind} has no shape yet; run one batch through the network first"
    treatable = next(
        (base for base in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, base)), None
    )
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return f"{kind}: rows are looked up, nothing is multiplied"
    if treatable is None:
        # Normalisation and other per-channel parameters have one dimension; the method never touches those.
        has_weights = any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
        if not has_weights and not is_parametrized(module):
            return ""
        transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
        hint = _PLAIN if isinstance(module, nn.MultiheadAttention | transposed) else ""
        return f"{kind} is not a Linear or Conv1d/2d/3d{hint}"
    weight = module._parameters.get("weight")
    if weight is None or is_parametrized(module, "weight"):
        computed = "computed from other parameters (weight norm or another parametrisation)"
        return f"the weight of {kind} is {computed}{_PLAIN}"
    if type(module).forward is not treatable.forward:
        return f"{kind} overrides {treatable.__name__}.forward"
    if owners[id(weight)] > 1:
        return f"its weight is shared with another module{_PLAIN}"
    if weight.dtype != torch.float32:
        return f"its weight is {weight.dtype}; the method works in float32 (model.float())"
    if weight.numel() == 0:
        return f"its weight is empty, shape {tuple(weight.shape)}"
    if not weight.requires_grad:
        return "its weight is frozen (requires_grad is False)"
    return None

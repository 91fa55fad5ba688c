"""What ONNX operators without weights compute, on torch tensors.

Shapes travel as tensors on the CPU, also where the network runs on torch's meta device.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["OPERATORS", "SCALE_FREE", "Operator", "SamePad", "dtype_of"]

Integers = Sequence[int] | Tensor | int


class Operator(nn.Module):
    """An ONNX operator as a module, so that tracing keeps it whole.

    Parameters
    ----------
    kind : str
        A key of `OPERATORS`.
    places : sequence of int
        Which inputs are tensors that come in; the others are ``constants``.
    constants : dict from place to value
    attributes : dict

    Attributes
    ----------
    numbers : dict from place to value
        The constants that are no float tensors: sizes, axes, indices.
    untreated_reason : str
        Why `compress.rules.plan_layers` leaves a stored array alone that has more than one dimension; empty without one.
    is_stored_product : bool
        Whether it multiplies matrices of which one is stored, work that `compress.shapes.matrix_work` cannot list.
    """

    def __init__(
        self, kind: str, places: Sequence[int], constants: dict[int, Any], attributes: dict[str, Any]
    ) -> None:
        super().__init__()
        self.kind, self.places, self.attributes = kind, tuple(places), attributes
        self.is_scale_free = kind in SCALE_FREE
        self.untreated_reason = _untreated_reason(kind, constants)
        self.is_stored_product = kind == "MatMul" and self.untreated_reason != ""
        self.numbers: dict[int, Any] = {}
        for place, value in constants.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                self.register_buffer(f"constant{place}", value)
            else:
                self.numbers[place] = value

    def forward(self, *values: Tensor) -> Any:
        arguments = dict(zip(self.places, values, strict=True)) | self.numbers
        arguments |= {int(name.removeprefix("constant")): value for name, value in self.named_buffers()}
        ordered = [arguments.get(place) for place in range(max(arguments, default=-1) + 1)]
        return OPERATORS[self.kind](*ordered, **self.attributes)

    def extra_repr(self) -> str:
        return self.kind


def _untreated_reason(kind: str, constants: dict[int, Any]) -> str:
    for place, value in constants.items():
        if not isinstance(value, Tensor):
            continue
        # What scales or shifts channels (1x8x1x1) is as good as one-dimensional, like the parameters of a normalisation.
        is_weight = kind in ("MatMul", "Gather")
        if (value.dim() if is_weight else sum(size > 1 for size in value.shape)) < 2:
            continue
        stored = f"stored array of {'x'.join(map(str, value.shape))}"
        if kind == "MatMul":
            hint = "only one of two dimensions on the right becomes a layer"
            return f"MatMul with a {stored} on the {('left', 'right')[place]}: {hint}"
        if kind == "Gather":
            return f"Gather from a {stored}: rows are looked up, nothing is multiplied"
        return f"{kind} with a {stored}: no product of matrices"
    return ""


class SamePad(nn.Module):
    """``auto_pad`` of SAME_UPPER or SAME_LOWER: as many outputs as inputs over the stride, rounded up."""

    is_scale_free = True

    def __init__(
        self, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], more_behind: bool, value: float = 0.0
    ) -> None:  # fmt: skip
        super().__init__()
        self.kernel, self.stride, self.dilation = tuple(kernel), tuple(stride), tuple(dilation)
        self.more_behind, self.value = more_behind, value

    def forward(self, x: Tensor) -> Tensor:
        sides: list[int] = []
        sizes = x.shape[-len(self.kernel) :]
        for size, kernel, stride, dilation in zip(
            sizes, self.kernel, self.stride, self.dilation, strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
            small, large = total // 2, total - total // 2
            sides = [*((small, large) if self.more_behind else (large, small)), *sides]
        return functional.pad(x, sides, value=self.value) if any(sides) else x


def _list(values: Integers) -> list[int]:
    if isinstance(values, Tensor):
        return [int(value) for value in values.flatten().tolist()]
    return [values] if isinstance(values, int) else [int(value) for value in values]


def dtype_of(code: int) -> torch.dtype:
    """Of ONNX's TensorProto.DataType. All floats are float32: stored weights become that, too.

    Raises
    ------
    KeyError
    """
    return {
        1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
        10: torch.float32, 11: torch.float32,
    }[code]  # fmt: skip


def _shape(x: Tensor, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(list(x.shape)[start:end], dtype=torch.int64, device="cpu")


def _reshape(x: Tensor, shape: Integers, allowzero: int = 0) -> Tensor:
    sizes = _list(shape)
    if not allowzero:
        sizes = [x.shape[place] if size == 0 else size for place, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(x: Tensor, axis: int = 1) -> Tensor:
    return x.flatten(axis) if axis == 1 else x.reshape(x.shape[:axis].numel(), -1)


def _squeeze(x: Tensor, axes: Integers | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(_list(axes)))


def _unsqueeze(x: Tensor, axes: Integers) -> Tensor:
    rank = x.dim() + len(_list(axes))
    for axis in sorted(axis % rank for axis in _list(axes)):
        x = x.unsqueeze(axis)
    return x


def _slice(
    x: Tensor, starts: Integers, ends: Integers, axes: Integers | None = None, steps: Integers | None = None
) -> Tensor:
    first, last = _list(starts), _list(ends)
    places = list(range(len(first))) if axes is None else _list(axes)
    strides = [1] * len(first) if steps is None else _list(steps)
    for axis, start, end, step in zip(places, first, last, strides, strict=True):
        if step < 0:
            size = x.shape[axis]
            chosen = range(size)[slice(start, None if end < -size else end, step)]
            x = x.index_select(axis, torch.tensor(list(chosen), dtype=torch.int64, device=x.device))
        else:
            index = [slice(None)] * x.dim()
            index[axis] = slice(start, end, step)
            x = x[tuple(index)]
    return x


def _gather(x: Tensor, indices: Any, axis: int = 0) -> Tensor:
    if not isinstance(indices, Tensor):
        indices = torch.tensor(indices, device=x.device)
    picked = torch.where(indices < 0, indices + x.shape[axis], indices)
    flat = x.index_select(axis, picked.reshape(-1))
    return flat.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis % x.dim() + 1 :]))


def _split(x: Tensor, split: Integers | None = None, axis: int = 0, num_outputs: int = 0) -> Any:
    if split is None:
        return x.split(-(-x.shape[axis] // num_outputs), axis)
    return x.split(_list(split), axis)


def _expand(x: Tensor, shape: Integers) -> Tensor:
    return x.expand(torch.broadcast_shapes(tuple(x.shape), tuple(_list(shape))))


def _pad(
    x: Tensor, pads: Integers, value: Any = None, axes: Integers | None = None, mode: str = "constant"
) -> Tensor:
    both, rank = _list(pads), x.dim()
    if axes is not None:
        given, places = both, _list(axes)
        both = [0] * 2 * rank
        for place, axis in enumerate(places):
            both[axis % rank], both[axis % rank + rank] = given[place], given[place + len(places)]
    sides = [side for axis in reversed(range(rank)) for side in (both[axis], both[axis + rank])]
    if mode == "constant":
        return functional.pad(x, sides, value=0.0 if value is None else float(value))
    while sides[-2:] == [0, 0]:
        sides = sides[:-2]
    return functional.pad(
        x, sides, mode={"edge": "replicate", "reflect": "reflect", "wrap": "circular"}[mode]
    )


def _reduce(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduce(
        x: Tensor, axes: Integers | None = None, keepdims: int = 1, noop_with_empty_axes: int = 0
    ) -> Tensor:
        places = [] if axes is None else _list(axes)
        if not places and noop_with_empty_axes:
            return x
        places = places or list(range(x.dim()))
        return function(x, dim=tuple(places), keepdim=bool(keepdims))

    return reduce


def _clip(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    low = None if min is None else float(min)
    return x.clamp(low, None if max is None else float(max))


def _resize(
    x: Tensor,
    roi: object = None,
    scales: Any = None,
    sizes: Integers | None = None,
    mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel",
    nearest_mode: str = "round_prefer_floor",
    **_: object,
) -> Tensor:
    rank = x.dim() - 2
    size: list[int] | None = None
    factors: list[float] | None = None
    if sizes is not None and len(_list(sizes)):
        size = _list(sizes)[2:]
    else:
        factors = [float(scale) for scale in (scales.tolist() if isinstance(scales, Tensor) else scales)][2:]
    if mode == "nearest":
        for axis in range(2, x.dim()):
            before = x.shape[axis]
            if size is not None:
                after, factor = size[axis - 2], size[axis - 2] / before
            elif factors is not None:
                after, factor = int(before * factors[axis - 2]), factors[axis - 2]
            chosen = _nearest(before, after, factor, coordinate_transformation_mode, nearest_mode)
            x = x.index_select(axis, torch.tensor(chosen, dtype=torch.int64, device=x.device))
        return x
    kind = {1: "linear", 2: "bilinear", 3: "trilinear"}[rank] if mode == "linear" else "bicubic"
    aligned = coordinate_transformation_mode == "align_corners"
    return functional.interpolate(
        x, size, factors, kind, align_corners=aligned, recompute_scale_factor=False if size is None else None
    )


_ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round_prefer_floor": lambda at: torch.ceil(at - 0.5),
    "round_prefer_ceil": lambda at: torch.floor(at + 0.5),
}


def _nearest(before: int, after: int, factor: float, coordinates: str, rounding: str) -> list[int]:
    """Which of ``before`` positions each of ``after`` takes.

    Source: the formulas of the operator Resize, https://onnx.ai/onnx/operators/onnx__Resize.html
    """
    at = torch.arange(after, dtype=torch.float32, device="cpu")
    if coordinates == "align_corners":
        at = at * (before - 1) / (after - 1) if after > 1 else torch.zeros_like(at)
    elif coordinates == "asymmetric":
        at = at / factor
    elif coordinates == "half_pixel" or after > 1:
        at = (at + 0.5) / factor - 0.5
    else:  # pytorch_half_pixel of a single position
        at = torch.zeros_like(at)
    return [int(place) for place in _ROUNDINGS[rounding](at).clamp(0, before - 1).tolist()]


def _layer_norm(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, axis: int = -1, epsilon: float = 1e-5, **_: object
) -> Tensor:
    return functional.layer_norm(x, x.shape[axis % x.dim() :], scale, bias, epsilon)


def _softmax(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def apply(x: Tensor, axis: int = -1, is_flat: bool = False) -> Tensor:
        if not is_flat:
            return function(x, axis)
        axis %= x.dim()
        return function(x.flatten(axis), axis).reshape(x.shape)

    return apply


def _batch_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    variance: Tensor,
    epsilon: float = 1e-5,
    **_: object,
) -> Tensor:
    return functional.batch_norm(x, mean, variance, scale, shift, False, 0.0, epsilon)


def _tensors(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of operands of which some may be constants."""

    def apply(*values: Any) -> Tensor:
        device = next(value.device for value in values if isinstance(value, Tensor))
        return function(
            *(value if isinstance(value, Tensor) else torch.tensor(value, device=device) for value in values)
        )

    return apply


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _concat(*parts: Any, axis: int) -> Tensor:
    return torch.cat(
        [part if isinstance(part, Tensor) else torch.tensor(part, device="cpu") for part in parts], axis
    )


OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": _tensors(operator.add),
    "Sub": _tensors(operator.sub),
    "Mul": _tensors(operator.mul),
    "Div": _tensors(_divide),
    "Pow": _tensors(torch.pow),
    "MatMul": torch.matmul,
    "Equal": _tensors(torch.eq),
    "Greater": _tensors(torch.gt),
    "Less": _tensors(torch.lt),
    "Where": _tensors(torch.where),
    "Sqrt": torch.sqrt,
    "Reciprocal": torch.reciprocal,
    "Exp": torch.exp,
    "Log": torch.log,
    "Erf": torch.erf,
    "Neg": torch.neg,
    "Abs": torch.abs,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "HardSigmoid": lambda x, alpha=0.2, beta=0.5: (alpha * x + beta).clamp(0, 1),
    "HardSwish": functional.hardswish,
    "Softplus": functional.softplus,
    "Elu": lambda x, alpha=1.0: functional.elu(x, alpha),
    "LeakyRelu": lambda x, alpha=0.01: functional.leaky_relu(x, alpha),
    "PRelu": lambda x, slope: torch.where(x < 0, x * slope, x),
    "Gelu": lambda x, approximate="none": functional.gelu(x, approximate=approximate),
    "Softmax": _softmax(functional.softmax),
    "LogSoftmax": _softmax(functional.log_softmax),
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Cast": lambda x, to, **_: x.to(dtype_of(to)),
    "Shape": _shape,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": lambda x, perm=None: x.permute(*(perm or reversed(range(x.dim())))),
    "Slice": _slice,
    "Gather": _gather,
    "Split": _split,
    "Concat": _concat,
    "Expand": _expand,
    "Pad": _pad,
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMin": _reduce(torch.amin),
    "Resize": _resize,
    "LayerNormalization": _layer_norm,
    "GlobalAveragePool": lambda x: x.mean(dim=tuple(range(2, x.dim())), keepdim=True),
    "GlobalMaxPool": lambda x: x.amax(dim=tuple(range(2, x.dim())), keepdim=True),
}

SCALE_FREE = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "GlobalMaxPool")
"""Those that may act on integers: they commute with a positive scale."""

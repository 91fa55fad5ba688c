"""The geometry of all matrix work of a network, in the order in which a forward pass does it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from compress.exported import exported_work, without_attention_kernel
from hwsim.errors import HwsimError, InputError, Problem
from hwsim.layer import LayerShape

__all__ = ["evaluation_mode", "layer_shapes", "matrix_work", "module_name"]

REUSE_MARK = "#"
"""Between the name of a module and the number of its second and later use: ``"shared#2"``."""


def module_name(layer_name: str) -> str:
    """The module that a layer belongs to: its name, without the mark of a second use.

    Examples
    --------
    >>> module_name("features.0"), module_name("head#2")
    ('features.0', 'head')
    """
    return layer_name.split(REUSE_MARK)[0]


def layer_shapes(
    model: nn.Module,
    input_shape: tuple[int, ...],
    batch: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    method: Literal["auto", "export", "hooks"] = "auto",
) -> list[LayerShape]:
    """The GEMM geometry of all matrix work of a network, in order of execution.

    Two ways lead there. Hooks on the Linear and Conv1d/2d/3d modules during a forward pass on torch's ``meta`` device take
    milliseconds, but see only what these modules do. `torch.export` takes about ten times as long, and also sees
    ``functional.linear`` and ``functional.convNd`` on any parameter, products with a parameter, and torch's own attention.
    "auto" runs the hooks, and exports where that pass showed work on a parameter outside such modules, or where a module with a
    weight matrix is none of them. Where the network cannot be exported, the hooks' list stands, with a warning.

    Parameters
    ----------
    model : nn.Module
    input_shape : tuple of int
        Of one input, without the batch.
    batch : int
        Inputs per pass.
    dtype : torch.dtype
        Of the input; integers for networks that begin with an embedding.
    method : {"auto", "export", "hooks"}

    Returns
    -------
    list of LayerShape
        Named like the modules; work on a parameter of no such module like the parameter, without ``weight``. What runs
        more than once appears once per use, from the second on as ``"name#2"``: every use is work of its own. The batch
        of a layer is the first dimension of the tensor that reached it.

    Raises
    ------
    InputError
        The network does not take such an input, a convolution pads with something other than zeros, or
        nothing of the network is a layer.

    Warns
    -----
    UserWarning
        Weight matrices whose work is not in the list, or that no forward pass reaches.

    Examples
    --------
    >>> [(shape.m, shape.k, shape.n) for shape in layer_shapes(nn.Sequential(nn.Conv2d(3, 8, 3)), (3, 8, 8))]
    [(8, 27, 36)]
    """
    shapes, missing = matrix_work(model, input_shape, batch, dtype=dtype, method=method)
    if missing:
        listed = ", ".join(f"{name} ({reason})" for name, reason in missing.items())
        warnings.warn(
            f"the work of these weights is not in the list of layers: {listed}", UserWarning, stacklevel=2
        )
    return shapes


def matrix_work(
    model: nn.Module,
    input_shape: tuple[int, ...],
    batch: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    method: Literal["auto", "export", "hooks"] = "auto",
) -> tuple[list[LayerShape], dict[str, str]]:
    """What `layer_shapes` gives, and what it warns of: names of weights or modules, each with the reason.

    Raises
    ------
    InputError
        As `layer_shapes`.
    """
    problems = [
        Problem(field, f"{value}, must be at least 1")
        for field, value in (
            ("batch", batch),
            *((f"input_shape[{i}]", size) for i, size in enumerate(input_shape)),
        )
        if value < 1
    ]
    if problems:
        raise InputError("layer shapes", problems)
    size = (batch, *input_shape)
    names: dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if isinstance(module, _LAYERS)
    }
    with evaluation_mode(model), torch.no_grad():
        shapes, missing, is_complete = _by_hooks(model, names, size, dtype)
        if method == "export" or (method == "auto" and not is_complete):
            found = _by_export(model, names, size, dtype)
            if isinstance(found, str):
                missing |= {"work on parameters past the modules": found}
            else:
                shapes, missing = found
    missing |= {
        name: module.untreated_reason
        for name, module in model.named_modules()
        if getattr(module, "is_stored_product", False)
    }
    if not shapes:
        raise InputError(
            type(model).__name__, Problem("", "no Linear or Conv1d/2d/3d ran; there is nothing to list")
        )
    return shapes, missing


def _by_hooks(
    model: nn.Module, names: dict[nn.Module, str], size: tuple[int, ...], dtype: torch.dtype
) -> tuple[list[LayerShape], dict[str, str], bool]:
    """``(shapes, work that is missing, whether that is all)`` as the modules of a forward pass show it."""
    shapes: list[LayerShape] = []
    uses: Counter[str] = Counter()
    watch = _ParameterWatch()

    def enter(module: nn.Module, _inputs: object) -> None:
        watch.inside += 1

    def record(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], _output: object) -> None:
        watch.inside -= 1
        inputs = next(iter((*given, *named.values())))  # a layer may be called by keyword
        name = names[module]
        uses[name] += 1
        mark = f"{REUSE_MARK}{uses[name]}" if uses[name] > 1 else ""
        shapes.append(_shape_of(name + mark, module, tuple(inputs.shape)))

    with ExitStack() as stack:
        stack.enter_context(without_attention_kernel())
        for module in names:
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(record, with_kwargs=True).remove)
        try:
            _forward_on_meta(model, size, dtype, watch)
        except HwsimError:
            raise
        except Exception:
            shapes.clear()
            uses.clear()
            _forward_for_real(model, size, dtype, watch)
    missing = {
        name or "the network itself": type(module).__name__
        for name, module in model.named_modules()
        if module not in names
        and not isinstance(module, nn.Embedding | nn.EmbeddingBag)
        and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    }
    is_complete = not missing and not watch.has_seen_work
    return shapes, missing | _never_run(names, uses), is_complete


def _never_run(names: dict[nn.Module, str], uses: Counter[str]) -> dict[str, str]:
    return {name: "never run as a module" for name in names.values() if not uses[name]}


def _by_export(
    model: nn.Module, names: dict[nn.Module, str], size: tuple[int, ...], dtype: torch.dtype
) -> tuple[list[LayerShape], dict[str, str]] | str:
    """``(shapes, work that is missing)`` as the exported graph shows it, or why there is none."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    try:
        work = exported_work(model, torch.zeros(size, dtype=dtype, device=device), names)
    except Exception as error:  # whatever torch.export meets in a forward pass
        return f"torch.export cannot follow it: {type(error).__name__}: {_first_line(error)}"
    uses = Counter(module_name(shape.name) for shape in work.shapes)
    missing = {path: f"in {operation}" for path, operation in work.other.items()}
    # Not that nobody runs a layer of which something else reads the weight: that has its own reason.
    read = {id(model.get_parameter(path)) for path in work.other}
    unread = {
        module: name
        for module, name in names.items()
        if not any(id(parameter) in read for parameter in module.parameters())
    }
    return work.shapes, missing | _never_run(unread, uses)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


class _ParameterWatch(TorchFunctionMode):
    """Notes whether an operation outside the layers' own forward reads a matrix of the network, or one made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0
        self.matrices: set[int] = set()
        self.constants: set[int] = set()
        self.has_seen_work = False
        self._made: list[torch.Tensor] = []  # held, so that no other tensor gets the identity of one

    def start(self, model: nn.Module) -> None:
        """Look at the parameters and buffers that a network has at this moment."""
        self.inside = 0
        self.matrices = {id(parameter) for parameter in model.parameters() if parameter.dim() > 1}
        self.constants = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.inside:
            read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
            reads_matrix = any(id(value) in self.matrices for value in read)
            self.has_seen_work |= reads_matrix and func not in _WITHOUT_WORK
            # Two weights side by side, or one times a mask, are a weight still; with an activation they are none.
            if reads_matrix and func in _COMBINATIONS and all(id(value) in self.constants for value in read):
                self._made.append(result)
                self.matrices.add(id(result))
                self.constants.add(id(result))
        return result


_COMBINATIONS = {
    torch.cat,
    torch.stack,
    torch.Tensor.add,
    torch.Tensor.__add__,
    torch.Tensor.__radd__,
    torch.Tensor.mul,
    torch.Tensor.__mul__,
}
_WITHOUT_WORK = _COMBINATIONS | {
    nn.functional.embedding,
    torch.embedding,
    nn.functional.layer_norm,
    torch.Tensor.size,
    torch.Tensor.dim,
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device")),
}
"""What may be done with a matrix without its being matrix work; anything else is a reason to look at the exported graph."""

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and each back in its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _forward_on_meta(
    model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, watch: _ParameterWatch
) -> None:
    with _stand_ins(model), torch.device("meta"):
        watch.start(model)
        inputs = torch.empty(shape, dtype=dtype)
        with watch:
            model(inputs)


@contextmanager
def _stand_ins(model: nn.Module) -> Iterator[None]:
    """Parameters and buffers without values in place of those of the network.

    (`torch.func.functional_call` leaves them behind in a network that has one module under two names.)
    """
    kept: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    made: dict[int, torch.Tensor] = {}
    try:
        for module in model.modules():
            for table in _tables(module):
                for name, tensor in table.items():
                    if tensor is None:
                        continue
                    kept.append((table, name, tensor))
                    if id(tensor) not in made:
                        empty = torch.empty_like(tensor, device="meta")
                        is_parameter = isinstance(tensor, nn.Parameter)
                        made[id(tensor)] = nn.Parameter(empty, False) if is_parameter else empty
                    table[name] = made[id(tensor)]
        yield
    finally:
        for table, name, tensor in kept:
            table[name] = tensor


def _tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module._parameters, module._buffers


def _forward_for_real(
    model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, watch: _ParameterWatch
) -> None:
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    watch.start(model)
    try:
        with watch:
            model(torch.zeros(shape, dtype=dtype, device=device))
    except HwsimError:
        raise
    except Exception as error:
        raise InputError(
            type(model).__name__,
            Problem(
                "input_shape", f"no forward pass with an input of {shape}: {type(error).__name__}: {error}"
            ),
        ) from error


def _shape_of(name: str, module: nn.Module, size: tuple[int, ...]) -> LayerShape:
    if isinstance(module, nn.Linear):
        batch, leading = (size[0], size[1:-1]) if len(size) > 1 else (1, ())
        return LayerShape(name, "linear", module.in_features, module.out_features, leading, batch=batch)
    if not isinstance(module, _LAYERS[1:]):  # for the type checker: hooks sit on _LAYERS only
        raise TypeError(type(module).__name__)
    if module.padding_mode != "zeros":
        raise InputError(
            f"layer {name}",
            Problem(
                "padding_mode",
                f'"{module.padding_mode}"; the array pads with zeros only, since padding is not fetched',
                'use padding_mode="zeros", or let compress.plain.to_plain rewrite the network',
            ),
        )
    rank = len(module.kernel_size)
    return LayerShape(
        name=name,
        kind="conv",
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        input_size=size[-rank:],
        kernel=tuple(module.kernel_size),
        stride=tuple(module.stride),
        padding=_padding(module),
        dilation=tuple(module.dilation),
        groups=module.groups,
        batch=size[0] if len(size) == rank + 2 else 1,
    )


def _padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[tuple[int, int], ...]:
    """Zeros before and after. "same" puts the odd one of an odd total behind, as torch does."""
    if module.padding == "valid":
        return ((0, 0),) * len(module.kernel_size)
    if module.padding == "same":
        totals = [
            dilation * (kernel - 1)
            for kernel, dilation in zip(module.kernel_size, module.dilation, strict=True)
        ]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((int(padding), int(padding)) for padding in module.padding)

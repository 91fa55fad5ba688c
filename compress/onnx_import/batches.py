"""Files that were exported for a fixed number of inputs at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor

from compress.onnx_import.operators import Operator
from hwsim.errors import InputError, Problem

__all__ = ["check_batches", "free_batch"]


class _Run(torch.fx.Interpreter):
    """A forward pass that knows where it is, and how many there were of what each node read."""

    def __init__(self, model: torch.fx.GraphModule) -> None:
        super().__init__(model)
        self.at = ""
        self.first_sizes: dict[torch.fx.Node, int] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        self.at = str(n.target)
        read = self.env[n.all_input_nodes[0]] if n.all_input_nodes else None
        if isinstance(read, Tensor) and read.dim():
            self.first_sizes[n] = read.shape[0]
        return super().run_node(n)


def free_batch(
    model: torch.fx.GraphModule, batch: int, shape: tuple[int, ...], dtype: torch.dtype, source: str
) -> None:
    """Open the stored targets of reshapes that begin with the stated batch; for that batch they give what they gave.

    Raises
    ------
    InputError
        The network does not take the stated batch of such inputs.
    """
    unsure: dict[torch.fx.Node, list[int]] = {}
    for node in model.graph.nodes:
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, Operator) or module.kind != "Reshape" or module.attributes.get("allowzero"):
            continue
        sizes = module.numbers.get(1, [])
        if -1 not in sizes and any(sizes[:1]):
            sizes[0] = -1  # whatever the other sizes leave
        elif sizes[:1] == [batch]:
            unsure[node] = sizes
    if unsure:
        run = _Run(model)
        _outputs(run, _inputs(batch, shape, dtype), source)
        for node, sizes in unsure.items():
            if run.first_sizes.get(node) == batch:
                sizes[0] = 0  # the size of what comes in


def check_batches(
    model: torch.fx.GraphModule, batch: int, shape: tuple[int, ...], dtype: torch.dtype, source: str
) -> None:
    """Run the stated batch alone, and with an input in front of it and one behind it.

    Raises
    ------
    InputError
        The network does not take more inputs at a time, or the others change what it gives for one.
    """
    values = _inputs(batch + 2, shape, dtype)
    alone = _outputs(_Run(model), values[1:-1], source)
    hint = f'export it with dynamic_axes={{"{_input_name(model)}": {{0: "batch"}}}} (torch.onnx.export)'
    stated = f"the file was exported for {batch} at a time, and the network holds to it"
    try:
        among = _outputs(_Run(model), values, source)
    except InputError as error:
        raise InputError(source, Problem("batch", f"{stated}: {error.problems[0].message}", hint)) from None
    for number, (one, other) in enumerate(zip(alone, among, strict=True)):
        sizes = (batch + 2, *one.shape[1:])
        if not one.dim() or one.shape[0] != batch or tuple(other.shape) != sizes:
            found = f"output {number} has shape {tuple(other.shape)} for {batch + 2} inputs"
        elif not _is_close(one, other[1:-1]):
            found = f"output {number} for one input changes with the other inputs"
        else:
            continue
        raise InputError(source, Problem("batch", f"{stated}: {found}", hint))


def _inputs(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return torch.randn(count, *shape, generator=generator)
    return torch.randint(0, 2, (count, *shape), generator=generator).to(dtype)


@torch.no_grad()
def _outputs(run: _Run, values: Tensor, source: str) -> Sequence[Tensor]:
    try:
        result = run.run(values)
    except Exception as error:  # whatever torch says to sizes that do not fit
        said = (str(error).splitlines() or [type(error).__name__])[
            0
        ]  # behind it torch.fx tells of its own graph
        text = f"no forward pass with an input of {tuple(values.shape)}, at {run.at}: {said}"
        raise InputError(source, Problem("input_shape", text)) from None
    return [result] if isinstance(result, Tensor) else result


def _input_name(model: torch.fx.GraphModule) -> str:
    return next(str(node.target) for node in model.graph.nodes if node.op == "placeholder")


def _is_close(one: Tensor, other: Tensor) -> bool:
    """To float tolerance: the order of sums depends on the batch."""
    if not one.is_floating_point():
        return torch.equal(one, other)
    scale = float(one.nan_to_num(0, 0, 0).abs().max()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=1e-3, atol=1e-3 * scale, equal_nan=True)

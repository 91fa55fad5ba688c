"""Matrix work that a module's own forward does on a parameter, turned into layers by torch.fx."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional

from compress.plain.tree import replace_module

__all__ = ["with_layers_for_calls"]

_CONVOLUTIONS: dict[Any, tuple[type[nn.Module], int]] = {
    functional.conv1d: (nn.Conv1d, 1),
    functional.conv2d: (nn.Conv2d, 2),
    functional.conv3d: (nn.Conv3d, 3),
}
_PRODUCTS = (operator.matmul, torch.matmul)
_SETTINGS = ("stride", "padding", "dilation", "groups")


class _OwnForward(torch.fx.Tracer):
    """One module's forward alone: all of its children are leaves.

    Parameters
    ----------
    takes_defaults : bool
        Arguments that have a default are that value, not symbols.
    """

    def __init__(self, takes_defaults: bool = False) -> None:
        super().__init__()
        self._takes_defaults = takes_defaults

    def create_args_for_root(self, *arguments: Any, **settings: Any) -> Any:
        function, inputs = super().create_args_for_root(*arguments, **settings)
        if self._takes_defaults:
            inputs = [_default_of(value) for value in inputs]
        return function, inputs

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def with_layers_for_calls(model: nn.Module) -> tuple[nn.Module, list[tuple[str, str, str]]]:
    """The network with layers in place of ``functional.linear(x, self.weight)`` and the like.

    Only modules whose forward torch.fx can trace, and that takes the same way in training as in evaluation and with its default
    arguments as with any others (``if mask is not None`` does not), are rewritten; what is left is listed by
    `compress.rules.plan_layers` and `compress.shapes.layer_shapes`.
    """
    found = []
    made: dict[int, tuple[nn.Module, list[str]] | None] = {}
    # Under each of their names: one module used in two places stays one.
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) not in made:
            made[id(module)] = _rewritten(module)
        result = made[id(module)]
        if result is not None and _has_place(model, name):
            rewritten, layers = result
            model = replace_module(model, name, rewritten)
            became = f"calls on a parameter as layers: {', '.join(layers)}"
            if idle := _left_out(module, rewritten):
                became += f"; without what its forward never runs: {', '.join(idle)}"
            found.append((name, type(module).__name__, became))
    return model, found


def _has_place(model: nn.Module, name: str) -> bool:
    """Whether the parent of a module is still there: what a rewritten module does not run does not come along with it."""
    try:
        model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return False
    return True


def _left_out(module: nn.Module, rewritten: nn.Module) -> list[str]:
    """Parts with weights of their own that did not come along."""
    known = set(rewritten.modules())
    return [
        name
        for name, part in module.named_modules()
        if name and part not in known and next(part.parameters(recurse=False), None) is not None
    ]


def _rewritten(module: nn.Module) -> tuple[nn.Module, list[str]] | None:
    """A module with layers in place of its calls on parameters, and their names; None where it stays as it is."""
    if _is_torchs(module) or module._forward_hooks or module._forward_pre_hooks:
        return None
    graph = _graph_of(module)
    if graph is None:
        return None
    known = set(module.modules())
    layers = _insert_layers(module, graph)
    if not layers:
        return None
    rewritten = torch.fx.GraphModule(module, graph, class_name=type(module).__name__)
    for attribute, value in vars(module).items():  # what other modules may read
        if attribute not in vars(rewritten):
            setattr(rewritten, attribute, value)
    for part in rewritten.modules():  # what was there before keeps its mode: a normalisation may be frozen
        if part not in known:
            part.training = module.training
    return rewritten, layers


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.") and not isinstance(module, torch.fx.GraphModule)


def _graph_of(module: nn.Module) -> torch.fx.Graph | None:
    """The graph of a module's own forward, or None where it cannot be traced, or depends on the mode or on a default."""
    training = module.training
    try:
        graphs = []
        for mode in (True, False):
            module.training = mode
            graphs.append(_OwnForward().trace(module))
        with_defaults = _OwnForward(takes_defaults=True).trace(module)
    except Exception:  # whatever the user's forward does to a symbolic tensor
        return None
    finally:
        module.training = training
    is_one = str(graphs[0]) == str(graphs[1]) and _steps(graphs[0]) == _steps(with_defaults)
    return graphs[0] if is_one else None


def _default_of(value: Any) -> Any:
    """The default of an argument that a tracer made a symbol of, or that symbol where it has none."""
    is_optional = isinstance(value, torch.fx.Proxy) and value.node.op == "placeholder" and value.node.args
    return value.node.args[0] if is_optional else value


def _steps(graph: torch.fx.Graph) -> list[str]:
    """What a graph does where every argument with a default has that value."""

    def known(node: torch.fx.Node) -> Any:
        return node.args[0] if node.op == "placeholder" and node.args else node

    return [
        str((node.op, node.target, torch.fx.node.map_arg((node.args, node.kwargs), known)))
        for node in graph.nodes
        if node.op != "placeholder"
    ]


def _insert_layers(module: nn.Module, graph: torch.fx.Graph) -> list[str]:
    """New layers for all calls on parameters; gives their names. One layer for each parameter that is called alike."""
    made: dict[tuple[object, ...], str] = {}
    for node in list(graph.nodes):
        call = _call_of(module, node)
        if call is None:
            continue
        source, make, key = call
        if key not in made:
            made[key] = _free_name(module, key[0])
            module.add_module(made[key], make())
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_module(made[key], (source,)))
        graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if not node.users and (node.op == "get_attr" or _turned(node) is not None):
            graph.erase_node(node)
    return list(made.values())


def _free_name(module: nn.Module, parameter: object) -> str:
    """``"weight"`` as ``"linear"``, ``"emb.weight"`` as ``"emb_linear"``."""
    base = str(parameter).removesuffix("weight").rstrip("._").replace(".", "_")
    name = f"{base}_layer" if base else "layer"
    while hasattr(module, name):
        name += "_"
    return name


def _call_of(
    module: nn.Module, node: torch.fx.Node
) -> tuple[torch.fx.Node, Callable[[], nn.Module], tuple[object, ...]] | None:
    """What a call reads, how its layer is made, and what tells it from others; None where it is no such call."""
    if node.op == "call_method" and node.target == "matmul":
        return _product(module, node)
    if node.op != "call_function":
        return None
    if node.target in _PRODUCTS:
        return _product(module, node)
    if node.target is functional.linear:
        arguments = _arguments(node, ("input", "weight", "bias"))
        return _layer_call(module, arguments, lambda weight: _empty_linear(weight), ())
    if node.target in _CONVOLUTIONS:
        kind, rank = _CONVOLUTIONS[node.target]
        arguments = _arguments(node, ("input", "weight", "bias", *_SETTINGS))
        settings = {name: arguments[name] for name in _SETTINGS if arguments.get(name) is not None}
        if any(isinstance(value, torch.fx.Node) for value in settings.values()):
            return None
        return _layer_call(
            module,
            arguments,
            lambda weight: _empty_convolution(kind, rank, weight, settings),
            tuple(str(value) for value in settings.items()),
        )
    return None


def _arguments(node: torch.fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _layer_call(
    module: nn.Module,
    arguments: dict[str, Any],
    make: Callable[[Tensor], nn.Module],
    settings: tuple[str, ...],
) -> tuple[torch.fx.Node, Callable[[], nn.Module], tuple[object, ...]] | None:
    weight = _parameter(module, arguments.get("weight"))
    bias = _parameter(module, arguments.get("bias"))
    source = arguments.get("input")
    if weight is None or (arguments.get("bias") is not None and bias is None):
        return None
    if not isinstance(source, torch.fx.Node):
        return None

    def build() -> nn.Module:
        layer = make(weight)
        layer.weight = weight
        layer.register_parameter("bias", bias)
        return layer

    return source, build, (arguments["weight"].target, str(arguments.get("bias")), *settings)


def _product(
    module: nn.Module, node: torch.fx.Node
) -> tuple[torch.fx.Node, Callable[[], nn.Module], tuple[object, ...]] | None:
    """``x @ p.T`` reads a weight as a Linear does; ``x @ p`` reads one that stands the other way."""
    if len(node.args) != 2 or not isinstance(node.args[0], torch.fx.Node):
        return None
    source, right = node.args
    turned = _turned(right)
    weight = _parameter(module, right if turned is None else turned)
    if weight is None or weight.dim() != 2 or _parameter(module, source) is not None:
        return None
    if turned is None:
        users = [user for user in right.users if user is not node]  # type: ignore[union-attr]
        if users or sum(parameter is weight for parameter in module.parameters()) != 1:
            return None  # somebody else reads the parameter as it stands

    def build() -> nn.Module:
        values = weight if turned is not None else nn.Parameter(weight.detach().t().contiguous())
        layer = _empty_linear(values)
        layer.weight = values
        return layer

    read = right if turned is None else turned
    if not isinstance(source, torch.fx.Node) or not isinstance(read, torch.fx.Node):
        return None
    return source, build, (read.target, "product", turned is None)


def _turned(node: object) -> torch.fx.Node | None:
    """The matrix that a node transposes."""
    if not isinstance(node, torch.fx.Node) or not node.args or not isinstance(node.args[0], torch.fx.Node):
        return None
    matrix = node.args[0]
    if node.target in ("t", torch.t) or (node.target is getattr and node.args[1] in ("T", "mT")):
        return matrix
    axes = set(node.args[1:]) if node.target in ("transpose", torch.transpose) else set()
    swaps = axes in ({0, 1}, {-2, -1})
    return matrix if swaps else None


def _parameter(module: nn.Module, node: object) -> nn.Parameter | None:
    if not isinstance(node, torch.fx.Node) or node.op != "get_attr":
        return None
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value if isinstance(value, nn.Parameter) else None


def _empty_linear(weight: Tensor) -> nn.Linear:
    with torch.device("meta"):
        return nn.Linear(weight.shape[1], weight.shape[0], bias=False)


def _empty_convolution(
    kind: type[nn.Module], rank: int, weight: Tensor, settings: dict[str, Any]
) -> nn.Module:
    groups = settings.get("groups", 1)
    with torch.device("meta"):
        return kind(
            weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[-rank:]), bias=False, **settings
        )

"""The graph of a network: which normalisation, ReLU and integers belong to which array layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.fx
from torch import nn
from torch.nn import functional

from compress.norms import NORMS
from compress.plain.convolution import Interleave, Pad
from compress.plain.ties import TiedEmbedding

__all__ = ["Graph", "Surroundings", "is_size", "surroundings_of", "traced_graph"]

Nonlinearity = Literal["none", "relu", "relu6"]


@dataclass(frozen=True)
class Surroundings:
    """What the requantiser of a layer carries out, and whose integers the layer reads. Empty: nothing, nobody."""

    norm: str = ""
    nonlinearity: Nonlinearity = "none"
    producer: str = ""
    feeds_output: bool = True


_WHOLE = (Interleave, Pad, TiedEmbedding)


class _Tracer(torch.fx.Tracer):
    """Compressed modules stay whole even where they are subclasses of torch's, and so do those that to_plain puts in."""

    def __init__(self, leaves: set[str]) -> None:
        super().__init__()
        self._leaves = leaves

    def create_args_for_root(self, *arguments: Any, **settings: Any) -> Any:
        """The network gets one tensor; an argument with a default has that value, so that ``if mask is None`` is decided."""
        function, inputs = super().create_args_for_root(*arguments, **settings)
        return function, [self._default_of(value) for value in inputs]

    def _default_of(self, value: Any) -> Any:
        if not isinstance(value, torch.fx.Proxy) or value.node.op != "placeholder" or not value.node.args:
            return value
        default = value.node.args[0]
        self.graph.erase_node(value.node)
        return default

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_whole = (
            module_qualified_name in self._leaves or isinstance(m, _WHOLE) or hasattr(m, "is_scale_free")
        )
        return is_whole or super().is_leaf_module(m, module_qualified_name)


# Operations that commute with a positive scale, so that they may act on the integers.
_POOLS = (
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_SCALE_FREE_MODULES = (
    *(*_POOLS, *_DROPOUTS, nn.Flatten, nn.Unflatten, nn.Identity, nn.ReLU),
    *(Interleave, Pad, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
)
_RESHAPING = "flatten view reshape squeeze unsqueeze permute transpose contiguous clone"
_SCALE_FREE_METHODS = {*_RESHAPING.split(), "relu"}
_SCALE_FREE_FUNCTIONS = {
    *(functional.max_pool1d, functional.max_pool2d, functional.max_pool3d, functional.dropout),
    *(torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.permute, torch.transpose),
    *(functional.relu, torch.relu),
}


class Graph:
    """A traced network and the surroundings of its array layers."""

    def __init__(self, model: nn.Module, names: set[str]) -> None:
        graph = _Tracer(names).trace(model)
        self.module = torch.fx.GraphModule(model, graph)
        self.nodes = {node: str(node.target) for node in graph.nodes if _calls(node, names)}
        uses = Counter(self.nodes.values())
        self.ends: dict[torch.fx.Node, torch.fx.Node] = {}
        self.surroundings: dict[str, Surroundings] = {}
        chains: dict[torch.fx.Node, tuple[torch.fx.Node, str, Nonlinearity]] = {}
        for node, name in self.nodes.items():
            # A module that runs twice has one requantiser: nothing is fused that only one of its uses has.
            chains[node] = self._chain(node) if uses[name] == 1 else (node, "", "none")
            self.ends[node] = chains[node][0]
        producers = {end: self.nodes[node] for node, end in self.ends.items() if uses[self.nodes[node]] == 1}
        for node, name in self.nodes.items():
            end, norm, nonlinearity = chains[node]
            source = self._source(node.all_input_nodes[0])
            producer = producers.get(source, "") if uses[name] == 1 else ""
            self.surroundings[name] = Surroundings(norm, nonlinearity, producer, self._reaches_output(end))

    def _chain(self, node: torch.fx.Node) -> tuple[torch.fx.Node, str, Nonlinearity]:
        """The last node that the requantiser can stand for, with the normalisation and the nonlinearity up to it."""
        end, norm = node, ""
        following = _only_user(end)
        if following is not None and following.op == "call_module" and self._is_norm(following, node):
            end, norm = following, str(following.target)
            following = _only_user(end)
        nonlinearity = "none" if following is None else self._nonlinearity(following)
        if following is not None and nonlinearity != "none":
            end = following
        return end, norm, nonlinearity

    def _is_norm(self, node: torch.fx.Node, layer: torch.fx.Node) -> bool:
        norm = self.module.get_submodule(str(node.target))
        channels = self.module.get_submodule(str(layer.target)).get_parameter("weight").shape[0]
        if not isinstance(norm, NORMS) or norm.running_mean is None:
            return False
        return norm.num_features == channels and node.all_input_nodes == [layer]

    def _nonlinearity(self, node: torch.fx.Node) -> Nonlinearity:
        if node.op == "call_module":
            module = self.module.get_submodule(str(node.target))
            if isinstance(module, nn.ReLU6):
                return "relu6"
            return "relu" if isinstance(module, nn.ReLU) else "none"
        if node.target in (functional.relu, torch.relu, "relu"):
            return "relu"
        return "relu6" if node.target is functional.relu6 else "none"

    def _source(self, node: torch.fx.Node) -> torch.fx.Node:
        """Back over everything that acts on integers as they are."""
        while node not in self.ends.values() and self.is_scale_free(node):
            node = node.all_input_nodes[0]
        return node

    def _reaches_output(self, node: torch.fx.Node) -> bool:
        return any(
            user.op == "output" or (self.is_scale_free(user) and self._reaches_output(user))
            for user in node.users
        )

    def is_scale_free(self, node: torch.fx.Node) -> bool:
        """Whether a node may act on integers: it commutes with a positive scale and reads one tensor."""
        source, *others = node.all_input_nodes or [node]
        reads_one = not is_size(source) and all(is_size(other) for other in others)
        if not reads_one or node.kwargs.get("return_indices"):
            return False
        if node.op == "call_module":
            module = self.module.get_submodule(str(node.target))
            is_free = isinstance(module, _SCALE_FREE_MODULES) or getattr(module, "is_scale_free", False)
            return is_free and not getattr(module, "return_indices", False)
        if node.op == "call_function":
            return node.target in _SCALE_FREE_FUNCTIONS
        return node.op == "call_method" and node.target in _SCALE_FREE_METHODS


def _calls(node: torch.fx.Node, names: set[str]) -> bool:
    return node.op == "call_module" and str(node.target) in names


def _only_user(node: torch.fx.Node) -> torch.fx.Node | None:
    """The one node that reads the values of this one; reading its size is no matter."""
    users = [user for user in node.users if not is_size(user)]
    return users[0] if len(users) == 1 else None


def is_size(node: torch.fx.Node) -> bool:
    """Whether a node is a size of a tensor, or computed from sizes alone (``x.size(0)``, ``x.shape[1] * 2``)."""
    if node.op == "call_method" and node.target in ("size", "dim"):
        return True
    if node.op != "call_function" or not node.all_input_nodes:
        return False
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    is_arithmetic = getattr(node.target, "__module__", "") == "_operator"
    return is_arithmetic and all(is_size(source) for source in node.all_input_nodes)


def traced_graph(model: nn.Module, names: set[str]) -> tuple[Graph | None, tuple[str, ...]]:
    """The graph of a network, or None and why there is none."""
    try:
        graph = Graph(model, names)
    except Exception as error:  # whatever the user's forward does to a symbolic tensor
        return None, (f"no fusion: torch.fx cannot trace the network ({type(error).__name__}: {error})",)
    read = sorted({name for name in names for node in graph.module.graph.nodes if _reads_weight(node, name)})
    if read:
        return None, (f"no fusion: the weights of {', '.join(read)} are read outside their modules, too",)
    unseen = sorted(names - set(graph.nodes.values()))
    if unseen:
        return None, (f"no fusion: {', '.join(unseen)} do not show in the traced graph",)
    return graph, ()


def _reads_weight(node: torch.fx.Node, name: str) -> bool:
    return node.op == "get_attr" and str(node.target).rpartition(".")[0] == name


def surroundings_of(graph: Graph | None, name: str) -> Surroundings:
    return Surroundings() if graph is None else graph.surroundings[name]

"""Reorder channels so that small weights share blocks, without changing what the network computes.

The output channels of a layer are reordered together with everything that sees them one by one: its bias, normalisation and
depthwise convolutions behind it, and the inputs of the layers that read them. Where channels meet those of another tensor (a
residual addition), reach the output of the network, or pass something that mixes them, they stay as they are, and the reason
is given.

Source: gathering by permutation: Ji et al., "TETRIS: TilE-matching the TRemendous Irregular Sparsity", NeurIPS 2018; by swaps:
Pool, Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021. What a channel is worth at a place is derived here for blocks
of the three types.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.fx
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from compress.assign import assign_types
from compress.blocks import real_entries, weight_to_matrix
from compress.norms import NORMS
from compress.projection import layer_costs
from compress.rules import Plan, PlannedLayer, Untreated
from compress.shapes import evaluation_mode
from hwsim.layer import DENSE, PRUNED, UNIFIED

__all__ = ["Chain", "Permutation", "PermutedLayer", "find_chains", "output_tensors", "permute_channels"]

_ROUNDS = 20
"""Most times that the types are chosen anew; each round loses less than the one before, few are needed."""

_POLISH_ENTRIES = 1 << 20
"""Block sums that are looked at in swaps by their true loss: thousands of swaps for a small layer, some for a large one."""

_RANDOM_STARTS, _RANDOM_CHANNELS = 6, 512
"""Random orders that swaps start from, too, and the most channels of a layer for which they are tried."""


@dataclass(frozen=True)
class PermutedLayer:
    """A layer whose output channels were reordered.

    Attributes
    ----------
    name : str
    readers : tuple of str
        Layers whose inputs were reordered with them.
    order : tuple of int
        Which old channel stands at each place.
    cost_before, cost_after : float
        Of projecting the layer and its readers: shares of their energy that are lost, summed.
    """

    name: str
    readers: tuple[str, ...]
    order: tuple[int, ...]
    cost_before: float
    cost_after: float


@dataclass(frozen=True)
class Permutation:
    """What was reordered, and what was left alone and why."""

    permuted: tuple[PermutedLayer, ...]
    left: tuple[Untreated, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, without the orders."""
        return {
            "permuted": [
                {
                    "layer": item.name,
                    "readers": list(item.readers),
                    "cost": [item.cost_before, item.cost_after],
                }
                for item in self.permuted
            ],
            "left": [{"layer": item.name, "reason": item.reason} for item in self.left],
        }


class Reader(NamedTuple):
    """A layer that reads channels; channel ``c`` is its inputs ``c·spread … (c + 1)·spread − 1``."""

    layer: PlannedLayer
    spread: int


@dataclass(eq=False)
class Chain:
    """Everything that sees the output channels of one layer one by one.

    Attributes
    ----------
    producer : PlannedLayer
    readers : list of Reader
    beside : list of (Module, int)
        Normalisations (parameters and statistics per channel, or per ``spread`` features of one) and depthwise
        convolutions.
    refusal : str
        Why the channels must stay; empty where they may move.
    """

    producer: PlannedLayer
    readers: list[Reader] = field(default_factory=list)
    beside: list[tuple[nn.Module, int]] = field(default_factory=list)
    refusal: str = ""


# --- the graph: who sees a channel

_ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.LogSigmoid, nn.Softsign),
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
)
_POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ELEMENTWISE_FUNCTIONS = {
    *(torch.relu, functional.relu, functional.relu6, functional.gelu, functional.silu, functional.leaky_relu),
    *(functional.elu, functional.hardswish, functional.hardsigmoid, functional.hardtanh, functional.dropout),
    *(torch.sigmoid, torch.tanh, functional.sigmoid, functional.tanh, functional.mish, functional.softplus),
}
_POOL_FUNCTIONS = {
    *(functional.max_pool1d, functional.max_pool2d, functional.max_pool3d),
    *(functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d),
    *(functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d),
}
_ELEMENTWISE_METHODS = {"relu", "sigmoid", "tanh", "contiguous", "clone", "detach"}
_MEETING = {
    operator.add,
    operator.iadd,
    operator.mul,
    operator.imul,
    operator.sub,
    torch.add,
    torch.mul,
    torch.cat,
}


class _Refused(Exception):
    """The channels must stay; the text is the reason."""


def find_chains(model: nn.Module, plan: Plan) -> list[Chain]:
    """One chain for every layer of the plan whose settings ask for `permute_channels`, with its readers or a refusal."""
    wanted = [layer for layer in plan.layers if layer.settings.permute_channels]
    try:
        graph = torch.fx.symbolic_trace(model).graph
    except Exception as error:  # whatever the user's forward does to a symbolic tensor
        reason = f"torch.fx cannot trace the network ({type(error).__name__}: {error})"
        return [Chain(layer, refusal=reason) for layer in wanted]
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    nodes = {str(node.target): node for node in graph.nodes if node.op == "call_module"}
    walk = _Walk(model, {layer.name: layer for layer in plan.layers}, calls)
    return [walk.chain(layer, nodes.get(layer.name)) for layer in wanted]


@dataclass(eq=False)
class _Walk:
    """From a layer forward to everything that reads its channels."""

    model: nn.Module
    layers: dict[str, PlannedLayer]
    calls: Counter[str]

    def chain(self, layer: PlannedLayer, node: torch.fx.Node | None) -> Chain:
        chain = Chain(layer)
        try:
            if node is None or self.calls[layer.name] != 1:
                raise _Refused("it does not run exactly once as a module of the traced network")
            if layer.groups != 1:
                raise _Refused("its channels are bound to groups")
            self._follow(node, chain, 1, flat=isinstance(layer.module, nn.Linear))
            if not chain.readers:
                raise _Refused("no other layer reads its channels")
        except _Refused as reason:
            chain.refusal = str(reason)
        return chain

    def _follow(self, node: torch.fx.Node, chain: Chain, spread: int, flat: bool) -> None:
        """Every user of a node; ``flat``: the channels (``spread`` features each) are the last dimension, else the second."""
        for user in node.users:
            if _reads_size(user):
                continue
            if user.op == "output":
                raise _Refused("its channels reach the output of the network")
            if user.op == "call_module":
                self._module(user, chain, spread, flat)
            elif user.target in _MEETING:
                raise _Refused(
                    f"its channels meet those of another tensor in {user.name} (a residual or the like)"
                )
            elif _flattens(user) and not flat:
                self._follow(user, chain, 0, flat=True)
            elif _keeps_channels(user, flat):
                self._follow(user, chain, spread, flat)
            else:
                raise _Refused(f"what {user.name} does with its channels is not known")

    def _module(self, node: torch.fx.Node, chain: Chain, spread: int, flat: bool) -> None:
        name = str(node.target)
        module = self.model.get_submodule(name)
        channels = chain.producer.weight_shape[0]
        if isinstance(module, nn.Flatten) and not flat and (module.start_dim, module.end_dim) == (1, -1):
            self._follow(node, chain, 0, flat=True)
        elif isinstance(module, _ELEMENTWISE) or (isinstance(module, _POOLS) and not flat):
            if getattr(module, "return_indices", False):
                raise _Refused(f"what {name} does with its channels is not known")
            self._follow(node, chain, spread, flat)
        elif isinstance(module, NORMS) and module.num_features % channels == 0 and self.calls[name] == 1:
            chain.beside.append((module, module.num_features // channels))
            self._follow(node, chain, spread, flat)
        elif name in self.layers and self.calls[name] == 1:
            self._layer(node, self.layers[name], chain, channels, flat)
        else:
            raise _Refused(f"what {name} ({type(module).__name__}) does with its channels is not known")

    def _layer(
        self, node: torch.fx.Node, layer: PlannedLayer, chain: Chain, channels: int, flat: bool
    ) -> None:
        module = layer.module
        if isinstance(module, _CONVS) and not flat and layer.groups == channels == layer.weight_shape[0]:
            chain.beside.append((module, 1))
            self._follow(node, chain, 1, flat)
        elif isinstance(module, _CONVS) and not flat and layer.groups == 1:
            chain.readers.append(Reader(layer, 1))
        elif isinstance(module, nn.Linear) and flat:
            chain.readers.append(Reader(layer, module.in_features // channels))
        else:
            raise _Refused(f"{layer.name} reads its channels in groups or across another dimension")


def _reads_size(node: torch.fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "dim")
    return node.target is getattr and str(node.args[1]) in ("shape", "ndim")


def _flattens(node: torch.fx.Node) -> bool:
    """``flatten(x, 1)`` in any spelling; ``view(n, -1)`` and ``reshape(n, -1)`` with a size in front."""
    arguments = node.args[1:]
    if node.target in (torch.flatten, "flatten"):
        start = node.kwargs.get("start_dim", arguments[0] if arguments else 0)
        end = node.kwargs.get("end_dim", arguments[1] if len(arguments) > 1 else -1)
        return (start, end) == (1, -1)
    if node.target in ("view", "reshape", torch.reshape):
        sizes = arguments[0] if len(arguments) == 1 and isinstance(arguments[0], tuple | list) else arguments
        return len(sizes) == 2 and isinstance(sizes[0], torch.fx.Node) and sizes[1] in (-1,)
    return False


def _keeps_channels(node: torch.fx.Node, flat: bool) -> bool:
    if node.op == "call_method":
        return node.target in _ELEMENTWISE_METHODS
    if node.op != "call_function" or len([n for n in node.all_input_nodes if not _reads_size(n)]) != 1:
        return False
    return node.target in _ELEMENTWISE_FUNCTIONS or (node.target in _POOL_FUNCTIONS and not flat)


# --- the order: what a channel costs at a place


def permute_channels(model: nn.Module, plan: Plan, sample: Tensor) -> Permutation:
    """Reorder, in place, the channels of every layer that asks for it, so that projecting costs less.

    Parameters
    ----------
    model : nn.Module
        In float; its function stays the same up to the order of float additions.
    plan : Plan
        Of this very model: its counts say how many blocks will be pruned.
    sample : Tensor ``[n, …]``
        Inputs on which the outputs before and after are compared; a layer that changes them is put back.

    Returns
    -------
    Permutation
    """
    permuted: list[PermutedLayer] = []
    left: list[Untreated] = []
    sample = sample[:8]
    for chain in find_chains(model, plan):
        name = chain.producer.name
        if chain.refusal:
            left.append(Untreated(name, chain.refusal))
            continue
        before = _cost(chain)
        order = _best_order(chain)
        inverse = np.argsort(order)
        wanted = _outputs(model, sample)
        _reorder(chain, order)
        after = _cost(chain)
        if not wanted:
            _reorder(chain, inverse)
            left.append(Untreated(name, "the network gives no tensors to compare before and after"))
        elif after >= before:
            _reorder(chain, inverse)
            left.append(Untreated(name, "no order of its channels was found that makes projecting cheaper"))
        elif not _same(wanted, _outputs(model, sample)):
            _reorder(chain, inverse)
            left.append(Untreated(name, "reordering its channels changed the network's outputs"))
        else:
            readers = tuple(reader.layer.name for reader in chain.readers)
            permuted.append(PermutedLayer(name, readers, tuple(order.tolist()), before, after))
    return Permutation(tuple(permuted), tuple(left))


def output_tensors(outputs: Any) -> list[Tensor]:
    """The tensors among the outputs of a network, however they are packed."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _outputs(model: nn.Module, sample: Tensor) -> list[Tensor]:
    with evaluation_mode(model), torch.no_grad():
        return output_tensors(model(sample))


def _same(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Equal up to the rounding of sums in another order."""
    return all(
        torch.allclose(after, before, rtol=1e-4, atol=1e-5 * max(float(before.abs().max()), 1e-30))
        if before.numel() and (before.is_floating_point() or before.is_complex())
        else torch.equal(after, before)
        for before, after in zip(wanted, found, strict=True)
    )


def _cost(chain: Chain) -> float:
    """What projecting the layer and its readers loses: shares of each one's energy, summed."""
    return sum(_layer_cost(layer) for layer in (chain.producer, *(reader.layer for reader in chain.readers)))


def _layer_cost(layer: PlannedLayer) -> float:
    settings = layer.settings
    weight = layer.module.get_parameter("weight")
    costs = layer_costs(weight, settings.block, layer.groups, settings.column_order, name=layer.name)
    prune, unify = costs.prune.cpu().double().numpy(), costs.unify.cpu().double().numpy()
    types = assign_types(
        prune, unify, *layer.counts, settings.projection, balanced_rows=settings.balanced_rows
    )
    lost = prune[types == PRUNED].sum() + unify[types == UNIFIED].sum()
    return float(lost / max(prune.sum(), np.finfo(np.float64).tiny))


@dataclass(eq=False)
class _View:
    """What one layer of a chain loses to its projection, as a function of where each channel stands.

    Attributes
    ----------
    energy, size : float64 array ``[channels, lines, strips]``
        ``Σ w²`` and ``Σ |w|`` of channel ``c`` in strip ``s`` of the blocks across it, as shares of the layer's energy and of
        its root; ``lines`` are the places of one channel along the blocked dimension (kernel taps, or features of a channel).
    block_of : int64 array ``[channels, lines]``
        The block in which a channel at that place lies.
    entries : int64 array ``[blocks, strips]``
        Real weights of every block.
    layer : PlannedLayer
        Says how many blocks take which type.
    is_across : bool
        Whether the strips are the block rows of the layer, in place of the blocks.
    """

    energy: NDArray[np.float64]
    size: NDArray[np.float64]
    block_of: NDArray[np.int64]
    entries: NDArray[np.int64]
    layer: PlannedLayer
    is_across: bool

    def loss(self, order: NDArray[np.int64]) -> tuple[float, NDArray[np.float64]]:
        """What projecting loses with the channels in this order, and ``[channels, places]``: what a channel is worth there.

        A dense block keeps its ``Σ w²``, a unified one ``(Σ |w|)²/n``. The worth is the tangent of what is kept, which is
        convex in the sums of the blocks: an order that is worth more keeps more, by at least the difference.
        """
        energy, size = (self._sums(values[order]) for values in (self.energy, self.size))
        unify = np.maximum(energy - size**2 / self.entries, 0)
        types = self._types(energy, unify)
        loss = float(energy[types == PRUNED].sum() + unify[types == UNIFIED].sum())
        tangents = (types == DENSE) * 1.0, (types == UNIFIED) * 2 * size / self.entries
        worth = sum(
            values.reshape(len(values), -1) @ tangent[self.block_of].reshape(len(values), -1).T
            for values, tangent in zip((self.energy, self.size), tangents, strict=True)
        )
        return loss, np.asarray(worth)

    def _types(self, prune: NDArray[np.float64], unify: NDArray[np.float64]) -> NDArray[np.uint8]:
        counts, settings = self.layer.counts, self.layer.settings
        if not settings.balanced_rows:
            return assign_types(prune, unify, *counts, settings.projection)
        if self.is_across:
            prune, unify = prune.T, unify.T
        types = assign_types(prune, unify, *counts, settings.projection, balanced_rows=True)
        return types.T if self.is_across else types

    def _sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """``[blocks, strips]``: sums over the channels and lines of every block."""
        sums = np.zeros(self.entries.shape)
        np.add.at(sums, self.block_of.ravel(), values.reshape(-1, values.shape[2]))
        return sums


def _best_order(chain: Chain) -> NDArray[np.int64]:
    """The best of several local optima: swaps from the order as it is, from channels sorted by their energy, and from random
    orders.
    """
    views = [_output_view(chain.producer), *(_input_view(reader) for reader in chain.readers)]
    energy = np.asarray(sum(view.energy.sum(axis=(1, 2)) for view in views))
    starts = [np.arange(energy.size), np.argsort(energy, kind="stable")]
    if energy.size <= _RANDOM_CHANNELS:
        rng = np.random.default_rng(0)
        starts += [rng.permutation(energy.size) for _ in range(_RANDOM_STARTS)]
    loss, order = min((_improve(views, start) for start in starts), key=lambda found: found[0])
    return _polish(views, loss, order)


def _polish(views: list[_View], loss: float, order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Single swaps by their true loss, which may change types on the way; as many as a fixed effort allows."""
    order = order.copy()
    trials = _POLISH_ENTRIES // max(1, sum(view.energy.size for view in views))
    pairs = np.stack(np.triu_indices(order.size, 1), axis=1)
    pairs = np.random.default_rng(0).permutation(pairs)[:trials]
    improved = True
    while improved and trials > 0:
        improved = False
        trials -= len(pairs)
        for a, b in pairs:
            order[[a, b]] = order[[b, a]]
            found = sum(view.loss(order)[0] for view in views)
            if found < loss * (1 - 1e-9):
                loss, improved = found, True
            else:
                order[[a, b]] = order[[b, a]]
    return order


def _improve(views: list[_View], order: NDArray[np.int64]) -> tuple[float, NDArray[np.int64]]:
    """Swap channels by what they are worth, choose the types anew, and so on: the loss of projecting never grows."""
    best = np.inf
    for _ in range(_ROUNDS):
        losses, worths = zip(*(view.loss(order) for view in views), strict=True)
        if sum(losses) >= best * (1 - 1e-9):
            break
        best, found = sum(losses), order
        order = _swap(-np.sum(worths, axis=0), order)
    return best, found


def _swap(at: NDArray[np.float64], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Swap pairs of channels, best pairs first, until none pays. ``at``: cost of each channel at each place."""
    order = order.copy()
    tiny = 1e-12 * max(float(np.abs(at).max()), np.finfo(np.float64).tiny)
    while True:
        here = at[order]
        own = np.diag(here)
        gain = own[:, None] + own[None, :] - here - here.T
        first, second = np.nonzero(np.triu(gain > tiny, 1))
        if first.size == 0:
            return order
        used = np.zeros(len(order), bool)
        for pair in np.argsort(-gain[first, second], kind="stable"):
            a, b = first[pair], second[pair]
            if not (used[a] or used[b]):
                order[a], order[b] = order[b], order[a]
                used[a] = used[b] = True


def _sizes(layer: PlannedLayer) -> NDArray[np.float64]:
    """``[m, k]``: absolute weights, divided by the root of the layer's energy."""
    weight = layer.module.get_parameter("weight").detach()
    sizes: NDArray[np.float64] = (
        weight_to_matrix(weight, layer.groups, layer.settings.column_order)[0].cpu().double().abs().numpy()
    )
    return sizes / max(float(np.sqrt((sizes**2).sum())), np.finfo(np.float64).tiny)


def _output_view(layer: PlannedLayer) -> _View:
    """Channels are rows: blocks of ``g_o`` rows, strips of ``g_k`` columns."""
    g_o, g_k = layer.settings.block
    starts, sizes = np.arange(0, layer.k, g_k), _sizes(layer)
    energy, size = (np.add.reduceat(values, starts, axis=1)[:, None, :] for values in (sizes**2, sizes))
    entries = real_entries(layer.m, layer.k, layer.settings.block).numpy()
    return _View(energy, size, np.arange(layer.m)[:, None] // g_o, entries, layer, is_across=False)


def _input_view(reader: Reader) -> _View:
    """Channels are groups of columns: blocks of ``g_k`` columns, strips of ``g_o`` rows."""
    layer = reader.layer
    g_o, g_k = layer.settings.block
    starts, sizes, columns = np.arange(0, layer.m, g_o), _sizes(layer), _columns(reader)
    energy, size = (
        np.add.reduceat(values, starts, axis=0)[:, columns].transpose(1, 2, 0) for values in (sizes**2, sizes)
    )
    entries = real_entries(layer.m, layer.k, layer.settings.block).numpy().T
    return _View(energy, size, columns // g_k, entries, layer, is_across=True)


def _columns(reader: Reader) -> NDArray[np.int64]:
    """``[channels, lines]``: the columns of the reader's matrix that each channel feeds."""
    _, inputs, *kernel = reader.layer.weight_shape
    channels, taps = inputs // reader.spread, int(np.prod(kernel, dtype=int))
    if reader.spread > 1 or not kernel:
        return np.arange(inputs).reshape(channels, reader.spread)
    place, tap = np.arange(channels)[:, None], np.arange(taps)[None, :]
    return tap * channels + place if reader.layer.settings.column_order == "tap_major" else place * taps + tap


# --- the change


def _reorder(chain: Chain, order: NDArray[np.int64]) -> None:
    """Put channel ``order[i]`` at place ``i`` in every tensor that holds one entry per channel."""
    index = torch.from_numpy(order)
    for tensor, dim, spread in _tensors(chain):
        spots = (index[:, None] * spread + torch.arange(spread)).flatten().to(tensor.device)
        with torch.no_grad():
            tensor.copy_(tensor.index_select(dim, spots))


def _tensors(chain: Chain) -> Iterator[tuple[Tensor, int, int]]:
    """Tensors with the dimension of the channels, and how many entries each channel has there."""
    rows: list[tuple[nn.Module, int]] = [(chain.producer.module, 1), *chain.beside]
    for module, spread in rows:
        for name, values in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if values is not None and values.dim() and name != "num_batches_tracked":
                yield values, 0, spread
    for reader in chain.readers:
        yield reader.layer.module.get_parameter("weight"), 1, reader.spread

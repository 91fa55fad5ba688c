"""Weights that several modules share: one module holds them, the others use it."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from compress.plain.tree import replace_module

__all__ = ["Biased", "TiedEmbedding", "merge_ties"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class TiedEmbedding(nn.Module):
    """Looks up rows of a layer's weight, whatever becomes of it. It holds no weight of its own."""

    def __init__(self, layer: nn.Module, embedding: nn.Embedding) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, so that the layer does not become a child of this module
        self._settings: dict[str, Any] = {
            name: getattr(embedding, name)
            for name in ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        }
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim

    @property
    def weight(self) -> Tensor:
        """The layer's."""
        return self._layer[0].weight  # type: ignore[return-value]

    def forward(self, input: Tensor) -> Tensor:
        """The argument has the name of torch's, for those who call it by keyword."""
        return functional.embedding(input, self.weight, **self._settings)


class Biased(nn.Module):
    """A layer that other modules use too, with the bias that only this one adds."""

    def __init__(self, core: nn.Module, bias: nn.Parameter | None, rank: int) -> None:
        super().__init__()
        self.core, self.bias, self._rank = core, bias, rank

    def forward(self, input: Tensor) -> Tensor:
        """The argument has the name of torch's, for those who call it by keyword."""
        values = self.core(input)
        return values if self.bias is None else values + self.bias.reshape(-1, *(1,) * self._rank)


def merge_ties(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Let one module hold every shared weight, in place; gives ``(module, its class, what was done)``.

    Layers that share a weight but not their geometry keep it, and `compress.rules.plan_layers` lists them.
    """
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1:
                owners.setdefault(id(parameter), []).append((name, module))
    for group in owners.values():
        layers = [(name, module) for name, module in group if type(module) in _LAYERS]
        embeddings = [(name, module) for name, module in group if type(module) is nn.Embedding]
        if len(group) < 2 or not layers or len(layers) + len(embeddings) < len(group):
            continue
        if len({_geometry(module) for _, module in layers}) > 1:
            continue
        holder_name, holder = layers[0]
        if len(layers) > 1:
            holder_name, holder = yield from _merge_layers(model, layers)
        for name, embedding in embeddings:
            _put(model, embedding, TiedEmbedding(holder, embedding))
            yield name, "Embedding", f"a look-up in the weight of {holder_name}"


def _merge_layers(
    model: nn.Module, layers: list[tuple[str, nn.Module]]
) -> Generator[tuple[str, str, str], None, tuple[str, nn.Module]]:
    """All of them become uses of the first; where their biases differ, of the first without its bias."""
    name, first = layers[0]
    if len({id(module.bias) for _, module in layers}) == 1:
        for other, module in layers[1:]:
            _put(model, module, first)
            yield other, type(module).__name__, f"another use of {name}"
        return name, first
    biases = [module._parameters["bias"] for _, module in layers]
    rank = first.get_parameter("weight").dim() - 2
    first.register_parameter("bias", None)
    for (other, module), bias in zip(layers, biases, strict=True):
        _put(model, module, Biased(first, bias, max(rank, 0)))
        yield other, type(module).__name__, f"a use of {name}.core, and a bias of its own"
    return f"{name}.core", first


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """In every place where a module stands."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            replace_module(model, name, new)


def _geometry(module: nn.Module) -> tuple[object, ...]:
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    return (type(module), *(getattr(module, name, None) for name in names))

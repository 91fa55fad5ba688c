"""`nn.MultiheadAttention` as four Linears and a scaled dot product."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.plain.tree import linear_of

__all__ = ["Attention"]


class Attention(nn.Module):
    """Takes the place of an `nn.MultiheadAttention`: same arguments, same results.

    ``q``, ``k``, ``v`` and ``out`` are layers for the array. Scores, softmax and weighted sums have no weights; they run in
    float outside the array.
    """

    in_proj_bias = None
    """`nn.TransformerEncoderLayer` reads it to decide for a path that goes past its modules; None decides against."""
    in_proj_weight = None
    _qkv_same_embed_dim = True

    def __init__(
        self, q: nn.Linear, k: nn.Linear, v: nn.Linear, out: nn.Linear, heads: int, dropout: float = 0.0,
        batch_first: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.q, self.k, self.v, self.out = q, k, v, out
        self.embed_dim, self.num_heads, self.dropout = q.out_features, heads, dropout
        self.batch_first, self.add_zero_attn = batch_first, False
        self.bias_k: Tensor | None = None
        self.bias_v: Tensor | None = None

    @classmethod
    def of(cls, module: nn.MultiheadAttention) -> Self:
        """The same function as a module of torch's."""
        embed = module.embed_dim
        like = module.out_proj.weight
        if module.in_proj_weight is None:
            weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
        else:
            weights = list(module.in_proj_weight.split(embed))
        biases = [None] * 3 if module.in_proj_bias is None else list(module.in_proj_bias.split(embed))
        q, k, v = (linear_of(w, b, like) for w, b in zip(weights, biases, strict=True))
        out = linear_of(like, module.out_proj.bias, like)
        plain = cls(q, k, v, out, module.num_heads, module.dropout, module.batch_first)
        plain.add_zero_attn = module.add_zero_attn
        plain.bias_k, plain.bias_v = module.bias_k, module.bias_v
        return plain

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As that of `nn.MultiheadAttention`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, which is missing")  # as torch does
        has_batch = query.dim() == 3
        if not has_batch:
            query, key, value = (tensor.unsqueeze(0) for tensor in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        q, k, v = (self._heads(tensor) for tensor in (self.q(query), *self._extended(key, value)))
        mask = self._mask(attn_mask, key_padding_mask, k.shape[2] - key.shape[1], q)
        mixed, weights = self._attend(q, k, v, mask, need_weights)
        result = self.out(mixed.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not has_batch:
            return result.squeeze(0), None if weights is None else weights.squeeze(0)
        return result if self.batch_first else result.transpose(0, 1), weights

    def _extended(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with the learnt and the zero entry that torch can add behind the sequence."""
        k, v = self.k(key), self.v(value)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), 1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(len(v), 1, -1)], dim=1)
        if self.add_zero_attn:
            k, v = functional.pad(k, (0, 0, 0, 1)), functional.pad(v, (0, 0, 0, 1))
        return k, v

    def _heads(self, values: Tensor) -> Tensor:
        return values.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, extra: int, q: Tensor
    ) -> Tensor | None:
        """What is added to the scores, for ``[batch, heads, queries, keys]``; entries added behind are never masked."""
        total = None
        if attn_mask is not None:
            total = functional.pad(_additive(attn_mask, q.dtype), (0, extra))
            if total.dim() == 3:
                total = total.unflatten(0, (len(q), self.num_heads))
        if key_padding_mask is not None:
            padding = functional.pad(_additive(key_padding_mask, q.dtype), (0, extra))[:, None, None]
            total = padding if total is None else total + padding
        return total

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return functional.scaled_dot_product_attention(q, k, v, mask, dropout), None
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        weights = functional.softmax(scores if mask is None else scores + mask, dim=-1)
        weights = functional.dropout(weights, dropout) if dropout else weights
        return weights @ v, weights


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """True of a bool mask forbids: minus infinity."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)

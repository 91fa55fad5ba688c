"""The squared error of a layer's outputs as a function of its weights, and its minimum near a point.

``½·Σ (w − t)·H·(w − t)ᵀ`` over the rows of a layer, one H per group. Columns are in the order of the block view.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Quadratic"]


@dataclass(frozen=True, eq=False)
class Quadratic:
    """What is made least.

    Attributes
    ----------
    hessian : float64 Tensor ``[groups, k, k]``
        Symmetric and positive definite.
    target : float64 Tensor ``[groups, m, k]``
        Weights without any constraint that are best.
    """

    hessian: Tensor
    target: Tensor

    @classmethod
    def of_products(cls, products: Tensor, cross: Tensor | None, weight: Tensor, damping: float) -> Quadratic:
        """From mean products of inputs; the weights are drawn to the original ones by the damping.

        Parameters
        ----------
        products : float64 Tensor ``[groups, k, k]``
            Mean ``x·xᵀ`` of the inputs ``x`` that reach the layer.
        cross : float64 Tensor ``[groups, k, k]``, optional
            Mean ``x·zᵀ`` with the inputs z of the original network, whose outputs ``W·z`` are wanted; without it those of the
            original layer, ``W·x``.
        weight : float64 Tensor ``[groups, m, k]``
            W.
        damping : float
            Share of the mean of the diagonal of all groups that is added to it. A layer that sees nothing but zeros gets the
            identity.

        Notes
        -----
        With cross products the minimum solves the ridge regression ``T·(P + λI) = W·crossᵀ + λ·W``.
        """
        mean = float(products.diagonal(dim1=-2, dim2=-1).mean())
        ridge = damping * mean if mean > 0 else 1.0
        hessian = (products + products.mT) / 2
        hessian.diagonal(dim1=-2, dim2=-1).add_(ridge)
        if cross is None:
            return cls(hessian, weight)
        return cls(
            hessian, torch.linalg.solve(hessian, cross @ weight.mT + ridge * weight.mT).mT.contiguous()
        )

    def loss(self, weight: Tensor) -> float:
        """``½·Σ (w − t)·H·(w − t)ᵀ``."""
        return 0.5 * float(((weight - self.target) * self.gradient(weight)).sum())

    def gradient(self, weight: Tensor) -> Tensor:
        """``(w − t)·H`` of every row."""
        return (weight - self.target) @ self.hessian

    @cached_property
    def diagonal(self) -> Tensor:
        """Of H: ``[groups, 1, k]``."""
        return self.hessian.diagonal(dim1=-2, dim2=-1).unsqueeze(1)

    def near(self, scale: Tensor) -> Near:
        """For minima near a point in a norm: ``Σ (w − v)²·scale²``."""
        return Near(self, scale)


@dataclass(frozen=True, eq=False)
class Near:
    """The W-step of ADMM: the minimum of the quadratic and a penalty, for any ρ from one eigendecomposition.

    Attributes
    ----------
    quadratic : Quadratic
    scale : float64 Tensor ``[groups, 1, k]``
        Positive: the square root of the norm's weights.
    """

    quadratic: Quadratic
    scale: Tensor

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues and vectors of the scaled H, and the target in their basis, for iterations in float32."""
        scaled = self.quadratic.hessian / self.scale / self.scale.mT
        values, vectors = torch.linalg.eigh(scaled)
        target = (self.quadratic.target * self.scale) @ vectors
        return values.unsqueeze(1).float(), vectors.float(), target.float()

    def minimum(self, point: Tensor, rho: float) -> Tensor:
        """The w with the least ``½(w − t)·H·(w − t)ᵀ + ρ/2·Σ (w − point)²·scale²``, in float32.

        It solves ``w·(H + ρ·scale²) = t·H + ρ·point·scale²``.
        """
        values, vectors, target = self._spectrum
        scale = self.scale.float()
        rotated = (point * scale) @ vectors
        return ((values * target + rho * rotated) / (values + rho)) @ vectors.mT / scale

"""A layer in blocks with free parameters, and how these are fitted exactly once types and signs stand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.blocks import block_sums, expand_blocks, real_entries
from compress.one_shot.quadratic import Quadratic
from hwsim.layer import DENSE, UNIFIED

__all__ = ["Form", "choose_levels", "refit"]

_COLUMNS = 64
"""Columns between two updates of all gradients: within, only those of the same columns are kept up."""


@dataclass(frozen=True, eq=False)
class Form:
    """Block types, and the values that they leave free.

    Attributes
    ----------
    block : tuple of int
    types : uint8 Tensor ``[groups, Mb, Kb]``
    signs : float64 Tensor ``[groups, m, k]``
        ±1.
    magnitudes : float64 Tensor ``[groups, Mb, Kb]``
        Not negative; 0 but for UNIFIED blocks.
    dense : float64 Tensor ``[groups, m, k]``
        0 outside of DENSE blocks.
    """

    block: tuple[int, int]
    types: Tensor
    signs: Tensor
    magnitudes: Tensor
    dense: Tensor

    @classmethod
    def of_matrix(cls, matrix: Tensor, types: Tensor, block: tuple[int, int]) -> Form:
        """Of a projected matrix."""
        is_unified, is_dense = (
            expand_blocks(types == code, block, *matrix.shape[1:]) for code in (UNIFIED, DENSE)
        )
        # Entries of a block are alike, so their mean is each of them.
        entries = real_entries(matrix.shape[1], matrix.shape[2], block).to(matrix)
        magnitudes = block_sums(matrix.abs() * is_unified, block) / entries
        signs = torch.where(matrix < 0, -1.0, 1.0).to(matrix)
        return cls(block, types, signs, magnitudes, matrix * is_dense)

    def mask(self, code: int) -> Tensor:
        """Where the blocks of a type are: ``bool[groups, m, k]``."""
        return expand_blocks(self.types == code, self.block, *self.dense.shape[1:])

    @property
    def levels(self) -> Tensor:
        """The magnitude at every weight, 0 outside of UNIFIED blocks."""
        return expand_blocks(self.magnitudes, self.block, *self.dense.shape[1:])

    def matrix(self) -> Tensor:
        """``float64[groups, m, k]``."""
        return self.dense + self.signs * self.levels


def refit(quadratic: Quadratic, form: Form) -> Form:
    """The magnitudes and dense weights with the least loss for these types and signs: linear least squares, exactly.

    A magnitude is shared by the rows of its block, so a block row is one system. Its dense columns are the same in all rows:
    they are eliminated with one Cholesky factor of their part of H, and what is left is a system in the magnitudes alone. A
    magnitude that comes out negative flips the signs of its block, which is the same weights.

    Cost per block row, with d dense columns, c columns of U unified blocks: ``d³/3 + d²·c + g_o·c² + U³/3`` multiplications.
    """
    magnitudes, dense, signs = (
        torch.zeros_like(form.magnitudes),
        torch.zeros_like(form.dense),
        form.signs.clone(),
    )
    wanted = quadratic.target @ quadratic.hessian
    groups, block_rows, _ = form.types.shape
    g_o, g_k = form.block
    block_of = torch.arange(form.dense.shape[2], device=dense.device) // g_k
    for group in range(groups):
        hessian = quadratic.hessian[group]
        for block_row in range(block_rows):
            rows = slice(block_row * g_o, (block_row + 1) * g_o)
            codes = form.types[group, block_row]
            if bool((codes == DENSE).all()):
                dense[group, rows] = quadratic.target[group, rows]
                continue
            at = codes[block_of]
            shared, free = (at == UNIFIED).nonzero()[:, 0], (at == DENSE).nonzero()[:, 0]
            right = wanted[group, rows]
            inner, sought = hessian[shared][:, shared], right[:, shared]
            if len(free):
                factor = torch.linalg.cholesky(hessian[free][:, free])
                between = hessian[free][:, shared]
                lifted = torch.cholesky_solve(torch.cat([between, right[:, free].mT], dim=1), factor)
                inner = inner - between.mT @ lifted[:, : len(shared)]
                sought = sought - (between.mT @ lifted[:, len(shared) :]).mT
            if len(shared):
                sign = signs[group, rows][:, shared]
                owner = torch.unique_consecutive(block_of[shared], return_inverse=True)[1]
                found = _shared_magnitudes(inner, sought, sign, owner)
                magnitudes[group, block_row, codes == UNIFIED] = found.abs()
                signs[group, rows, shared] = sign * torch.where(found < 0, -1.0, 1.0).to(found)[owner]
                weights = sign * found[owner]
            if len(free):
                solved = lifted[:, len(shared) :]
                if len(shared):
                    solved = solved - lifted[:, : len(shared)] @ weights.mT
                dense[group, rows, free] = solved.mT
    return replace(form, magnitudes=magnitudes, dense=dense, signs=signs)


def _shared_magnitudes(inner: Tensor, sought: Tensor, signs: Tensor, owner: Tensor) -> Tensor:
    """Least squares of one block row: ``inner[c, c]``, ``sought`` and ``signs`` ``[rows, c]``, block numbers ``owner[c]``."""
    count = int(owner[-1]) + 1
    products = (signs.mT @ signs) * inner
    left = products.new_zeros(count, len(owner)).index_add_(0, owner, products)
    left = products.new_zeros(count, count).index_add_(1, owner, left)
    right = products.new_zeros(count).index_add_(0, owner, (signs * sought).sum(dim=0))
    return torch.cholesky_solve(right[:, None], torch.linalg.cholesky(left))[:, 0]


def choose_levels(
    quadratic: Quadratic, form: Form, grid: tuple[float, int, int] | None = None
) -> tuple[Form, int]:
    """One sweep of coordinate descent over the columns: signs, and where a grid is given dense weights, chosen anew.

    Each weight goes to the allowed value that is nearest to the minimum along it, all others fixed: plus or minus the magnitude
    of its block, or a point of the grid. No step raises the loss. Rows do not meet in the loss, so all of them move at once;
    ``m·k²`` multiplications.

    Parameters
    ----------
    quadratic : Quadratic
    form : Form
    grid : (step, least, greatest), optional
        Of dense weights: integer times step.

    Returns
    -------
    Form, int
        And how many weights changed.

    Notes
    -----
    Source: coordinate descent on the layer's quadratic, column by column: Behdin et al., "QuantEase: Optimization-based
    Quantization for Language Models", arXiv 2309.01885 (2023).
    """
    weights = form.matrix()
    gradient = quadratic.gradient(weights)
    levels, is_unified, is_dense = form.levels, form.mask(UNIFIED), form.mask(DENSE)
    changed = 0
    k = weights.shape[2]
    for start in range(0, k, _COLUMNS):
        columns = slice(start, min(start + _COLUMNS, k))
        before = weights[:, :, columns].clone()
        slope, inner = gradient[:, :, columns].clone(), quadratic.hessian[:, columns, columns]
        for j in range(columns.stop - start):
            here = start + j
            now = weights[:, :, here]
            best = now - slope[:, :, j] / inner[:, j, j, None]
            chosen = torch.where(is_unified[:, :, here], torch.copysign(levels[:, :, here], best), now)
            if grid is not None:
                step, least, greatest = grid
                rounded = torch.round(best / step).clamp_(least, greatest) * step
                chosen = torch.where(is_dense[:, :, here], rounded, chosen)
            delta = chosen - now
            weights[:, :, here] = chosen
            slope += delta[:, :, None] * inner[:, None, j]
        moved = weights[:, :, columns] - before
        changed += int(torch.count_nonzero(moved))
        gradient += moved @ quadratic.hessian[:, columns]
    signs = torch.where(
        is_unified & (levels > 0), torch.where(weights < 0, -1.0, 1.0).to(weights), form.signs
    )
    return replace(form, signs=signs, dense=weights * is_dense), changed

"""How a network is compressed in one shot: settings without torch, for files and command lines."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["OneShotRecipe"]


class OneShotRecipe(BaseModel):
    """Settings of `compress.one_shot.one_shot`.

    Attributes
    ----------
    method : {"hessian", "projection"}
        hessian: types, signs, magnitudes and dense weights by what the layer's outputs lose on calibration inputs.
        projection: by the weights alone, as if all inputs were independent and alike.
    target : {"network", "layer"}
        What a layer's outputs are fitted to: those of the original network on the original inputs, so that a layer makes up
        for the ones before it; or those of the original layer on the inputs that now reach it.
    damping : float
        Added to the diagonal of the Hessian, as a share of its mean. It stands for inputs that calibration did not show.
    held_out : float
        Share of the calibration inputs that no layer is fitted to. They decide, layer by layer, between what was fitted and the
        plain projection: by the error of the network's outputs, since a layer's own may be large where nothing depends on it.
        0: whatever was fitted is taken.
    norm : {"diagonal", "euclidean"}
        In which ADMM penalises and projects: weighted by the Hessian's diagonal, or not.
    rho : float
        First penalty, against a Hessian whose diagonal is 1.
    max_iterations : int
        Of ADMM.
    sign_turns : int
        Turns in which signs are chosen anew and magnitudes refitted, while that helps.
    refit_bias : bool
        Biases, or the means of the batch normalisation that follows, take back the shift of a layer's outputs.
    rounding_error : float
        Coarser integers for a smaller file: share of the energy of the network's outputs that rounding dense weights may cost,
        by a first-order estimate (`compress.one_shot.steps`). Steps grow beyond what the bits ask for, in each layer so far
        that a bit saved costs the outputs the same everywhere. 0: as fine as the bits allow.
    refit_variance : bool
        The variances of the batch normalisation that follows change as the outputs' did.
    batch_size : int
        Calibration inputs per forward pass.

    Notes
    -----
    Source: one-shot ADMM with a damped Hessian: Meng, Behdin, Wang, Mazumder, "ALPS: Improved Optimization for Highly Sparse
    One-Shot Pruning for Large Language Models", NeurIPS 2024; 1 % of damping: Frantar, Alistarh, "SparseGPT: Massive Language
    Models Can Be Accurately Pruned in One-Shot", ICML 2023.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Literal["hessian", "projection"] = "hessian"
    target: Literal["network", "layer"] = "network"
    damping: Annotated[float, Field(gt=0, le=1e3)] = 0.01
    held_out: Annotated[float, Field(ge=0, le=0.5)] = 0.125
    norm: Literal["diagonal", "euclidean"] = "diagonal"
    rho: Annotated[float, Field(gt=0, le=1e6)] = 0.1
    max_iterations: Annotated[int, Field(strict=True, ge=0, le=10_000)] = 200
    sign_turns: Annotated[int, Field(strict=True, ge=0, le=1_000)] = 8
    refit_bias: Annotated[bool, Field(strict=True)] = True
    refit_variance: Annotated[bool, Field(strict=True)] = False
    rounding_error: Annotated[float, Field(ge=0, le=1)] = 0.0
    batch_size: Annotated[int, Field(strict=True, ge=1, le=1 << 20)] = 32

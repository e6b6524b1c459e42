"""Geometry of the unit sphere S^(d-1), as pure functions on rows: the last dimension is the vector's."""

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length 1. `x`: (..., d), no row of norm 0."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def project(v: Tensor, g: Tensor) -> Tensor:
    """The part of `g` that is tangent to the sphere at `v`: g - (gᵀv) v. Both (..., d), `v` of unit rows (paper, section 4)."""
    return g - (g * v).sum(-1, keepdim=True) * v


def retract(v: Tensor, step: Tensor) -> Tensor:
    """Walk along a tangent `step` from `v` and come back to the sphere: (v + step) / ‖v + step‖."""
    return unit(v + step)


def angle(a: Tensor, b: Tensor) -> Tensor:
    """Angle between rows in radians, (...). Exact near 0 and π too, where an arc cosine loses half of its digits."""
    a, b = unit(a), unit(b)
    return 2 * torch.atan2(torch.linalg.vector_norm(a - b, dim=-1), torch.linalg.vector_norm(a + b, dim=-1))


def slerp(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    """The point at share `t` of the great circle arc from `a` (t = 0) to `b` (t = 1), row by row.

    Args:
        a, b: (..., d), of any length; the result has unit rows.
        t: share of the arc; below 0 and above 1 it goes on along the circle.

    Raises:
        ValueError: for opposite rows, which no single arc joins.
    """
    a, b = unit(a), unit(b)
    omega = angle(a, b)[..., None]
    if (omega > torch.pi - 1e-3).any():
        raise ValueError("slerp between opposite directions is not defined: move one of them a little first.")
    sine = omega.sin()
    close = omega < 1e-4  # there sin(tω)/sin(ω) is t to float32 precision
    safe = torch.where(close, torch.ones_like(sine), sine)
    left = torch.where(close, torch.ones_like(omega) * (1 - t), ((1 - t) * omega).sin() / safe)
    right = torch.where(close, torch.ones_like(omega) * t, (t * omega).sin() / safe)
    return unit(left * a + right * b)

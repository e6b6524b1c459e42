"""Geometry of the unit sphere S^(d-1), as pure functions on rows: the last dimension is the vector's."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def project(v: Tensor, g: Tensor) -> Tensor:
    """The part of `g` that is tangent to the sphere at `v`: g - (gᵀv) v. Both (..., d), `v` of unit rows (paper, section 4)."""
    return g - (g * v).sum(-1, keepdim=True) * v


def retract(v: Tensor, step: Tensor) -> Tensor:
    """Walk along a tangent `step` from `v` and come back to the sphere: (v + step) / ‖v + step‖."""
    return normalize(v + step, dim=-1)


def angle(a: Tensor, b: Tensor) -> Tensor:
    """Angle between rows in radians, (...). Exact near 0 and π too, where an arc cosine loses half of its digits."""
    a, b = normalize(a, dim=-1), normalize(b, dim=-1)
    return 2 * torch.atan2(torch.linalg.vector_norm(a - b, dim=-1), torch.linalg.vector_norm(a + b, dim=-1))


def slerp(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    """The point at share `t` of the great circle arc from `a` (t = 0) to `b` (t = 1), row by row.

    Args:
        a, b: (..., d), of any length; the result has unit rows.
        t: share of the arc; below 0 and above 1 it goes on along the circle.

    Raises:
        ValueError: for opposite rows, which no single arc joins.
    """
    a, b = normalize(a, dim=-1), normalize(b, dim=-1)
    omega = angle(a, b)[..., None]
    if (omega > torch.pi - 1e-3).any():
        raise ValueError("slerp between opposite directions is not defined: move one of them a little first.")
    sine = omega.sin()
    close = omega < 1e-4  # there sin(tω)/sin(ω) is t to float32 precision
    safe = torch.where(close, torch.ones_like(sine), sine)
    left = torch.where(close, torch.ones_like(omega) * (1 - t), ((1 - t) * omega).sin() / safe)
    right = torch.where(close, torch.ones_like(omega) * t, (t * omega).sin() / safe)
    return normalize(left * a + right * b, dim=-1)


def frechet_mean(points: Tensor, weights: Tensor) -> Tensor:
    """The weighted Fréchet mean on the sphere, row by row: the point of the least weighted sum of squared angles.

    By gradient descent with step 1, which never overshoots (the Hessian of half a squared angle is at most 1), from the
    weighted mean in space. The mean is unique where the points of a row fit in an open half of the sphere, as two that are not
    opposite always do (Afsari 2011); for points that do not, it may be one of several.

    Args:
        points: (k, ..., d), of any length; the result, (..., d), has unit rows.
        weights: (k,), not negative, their sum positive; only their ratios count.

    Raises:
        ValueError: for weights that are none, and for opposite rows, or rows whose weighted mean is nothing.
    """
    if weights.shape != points.shape[:1] or not (weights.isfinite().all() and (weights >= 0).all() and weights.sum() > 0):
        raise ValueError(
            f"{len(points)} directions need as many weights, finite, not negative, one at least positive: {weights.tolist()}."
        )
    dtype, p = points.dtype, normalize(points[weights > 0].double(), dim=-1)
    w = weights[weights > 0].to(p)
    w = (w / w.sum()).view(-1, *[1] * (p.ndim - 1))
    start = (w * p).sum(0)
    for i in range(1, len(p)):
        if (angle(p[:i], p[i]) > torch.pi - 1e-3).any():
            raise ValueError("The mean of opposite directions is not defined: move one of them a little first.")
    if (torch.linalg.vector_norm(start, dim=-1) < 1e-6).any():
        raise ValueError("These directions balance each other and have no mean: give them other weights.")
    x = normalize(start, dim=-1)
    for _ in range(1000):
        omega, tangent = angle(x, p)[..., None], project(x, p)
        length = torch.linalg.vector_norm(tangent, dim=-1, keepdim=True)  # sin ω
        step = (w * tangent * torch.where(length > 0, omega / length, 1.0)).sum(0)  # of the logarithms at x
        size = torch.linalg.vector_norm(step, dim=-1, keepdim=True)
        x = normalize(size.cos() * x + torch.special.sinc(size / torch.pi) * step, dim=-1)
        if (size < 1e-12).all():
            break
    return x.to(dtype)

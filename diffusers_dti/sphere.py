"""Geometry of the unit sphere S^(d-1), as pure functions of rows: the last dimension is that of the vectors."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def project(v: Tensor, g: Tensor) -> Tensor:
    """Project `g` onto the tangent space of the sphere at `v`: g - (gᵀv) v (paper, section 4).

    Args:
        v: unit rows, (..., d).
        g: rows, (..., d).

    Returns:
        Tangent rows, (..., d).
    """
    return g - (g * v).sum(-1, keepdim=True) * v


def retract(v: Tensor, step: Tensor) -> Tensor:
    """Take a tangent step from `v` and return to the sphere: (v + step) / ‖v + step‖ (paper, section 4).

    Args:
        v: unit rows, (..., d).
        step: tangent rows, (..., d).

    Returns:
        Unit rows, (..., d).
    """
    return normalize(v + step, dim=-1)


def angle(a: Tensor, b: Tensor) -> Tensor:
    """Return the angle between rows in radians, between 0 and π.

    Args:
        a: rows of any length, (..., d).
        b: rows of any length, (..., d).

    Returns:
        Angles, (...).
    """
    # Kahan's formula. The arc cosine of the inner product would lose half of the digits near 0 and π.
    a, b = normalize(a, dim=-1), normalize(b, dim=-1)
    return 2 * torch.atan2(torch.linalg.vector_norm(a - b, dim=-1), torch.linalg.vector_norm(a + b, dim=-1))


def slerp(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    """Move along the great circle from `a` to `b`, row by row.

    Args:
        a: where t = 0 is: rows of any length, (..., d).
        b: where t = 1 is: rows of any length, (..., d).
        t: the share of the arc, one for all or (..., 1). Below 0 and above 1 the motion continues along the circle.

    Returns:
        Unit rows, (..., d).

    Raises:
        ValueError: if rows are opposite, because many great circles join them.

    Example:

        ```py
        >>> import torch
        >>> from diffusers_dti import slerp

        >>> slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5)
        tensor([0.7071, 0.7071])
        ```
    """
    a, b = normalize(a, dim=-1), normalize(b, dim=-1)
    omega = angle(a, b)[..., None]
    if (omega > torch.pi - 1e-3).any():
        raise ValueError("The arc between opposite directions is not defined: move one of them a little first.")
    sine = omega.sin()
    close = omega < 1e-4  # then sin(tω)/sin(ω) equals t in float32
    safe = torch.where(close, torch.ones_like(sine), sine)
    left = torch.where(close, torch.ones_like(omega) * (1 - t), ((1 - t) * omega).sin() / safe)
    right = torch.where(close, torch.ones_like(omega) * t, (t * omega).sin() / safe)
    return normalize(left * a + right * b, dim=-1)


def frechet_mean(points: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted Fréchet mean on the sphere, row by row: the point with the smallest weighted sum of squared angles.

    The mean is unique if the points of a row fit in an open hemisphere (Afsari, 2011), as any two do that are not opposite.
    Otherwise the result may be one of several.

    Args:
        points: rows of any length, (k, ..., d).
        weights: (k,), not negative, with a positive sum; only their ratios count.

    Returns:
        Unit rows, (..., d), in the dtype of `points`.

    Raises:
        ValueError: if the weights do not fit, if rows are opposite, or if their weighted sum is zero.
    """
    # Gradient descent with step 1 from the weighted mean in space. It never overshoots: the Hessian of half a squared angle is
    # at most 1.
    if weights.shape != points.shape[:1] or not (weights.isfinite().all() and (weights >= 0).all() and weights.sum() > 0):
        raise ValueError(
            f"{len(points)} directions need as many weights, finite, not negative, and not all zero; got {weights.tolist()}."
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
        step = (w * tangent * torch.where(length > 0, omega / length, 1.0)).sum(0)  # the weighted sum of the logarithms at x
        size = torch.linalg.vector_norm(step, dim=-1, keepdim=True)
        x = normalize(size.cos() * x + torch.special.sinc(size / torch.pi) * step, dim=-1)
        if (size < 1e-12).all():
            break
    return x.to(dtype)

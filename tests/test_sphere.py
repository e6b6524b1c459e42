"""Against float64 formulas and geoopt's sphere."""

import warnings

import pytest
import torch

from diffusers_dti.sphere import angle, project, retract, slerp, unit


def rows(seed, n=5, d=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=dtype)


@pytest.fixture(scope="module")
def sphere():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import geoopt
    return geoopt.Sphere()


@pytest.mark.parametrize("seed", range(5))
def test_project_and_retract_are_geoopts(sphere, seed):
    v, g = unit(rows(seed)), rows(seed + 100)
    torch.testing.assert_close(project(v, g), sphere.proju(v, g))
    step = project(v, g)
    torch.testing.assert_close(retract(v, step), sphere.retr(v, step))
    torch.testing.assert_close(angle(v, unit(g)), sphere.dist(v, unit(g)))


@pytest.mark.parametrize("seed", range(5))
def test_slerp_walks_the_geodesic(sphere, seed):
    a, b, t = unit(rows(seed)), unit(rows(seed + 50)), 0.3
    torch.testing.assert_close(slerp(3 * a, b, t), sphere.expmap(a, t * sphere.logmap(a, b)))
    torch.testing.assert_close(angle(slerp(a, b, t), a), t * angle(a, b))
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)


def test_small_angles_keep_their_digits_in_float32():
    a = unit(rows(0, dtype=torch.float32))
    tangent = unit(project(a, rows(1, dtype=torch.float32)))
    for size in (1e-3, 1e-5, 1e-6):
        assert angle(a, retract(a, size * tangent)).sub(size).abs().max() < 2e-7
    near = retract(a, 1e-5 * tangent)
    torch.testing.assert_close(slerp(a, near, 0.5), retract(a, 0.5e-5 * tangent))
    torch.testing.assert_close(slerp(a, a, 0.5), a)


def test_opposite_rows_have_no_arc():
    a = unit(rows(0))
    with pytest.raises(ValueError, match="opposite"):
        slerp(a, -a, 0.5)

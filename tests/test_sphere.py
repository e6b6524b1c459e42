"""The sphere's geometry, checked against float64 formulas and geoopt."""

import math
import warnings

import pytest
import torch
from torch.nn.functional import normalize

from diffusers_dti.sphere import angle, frechet_mean, project, retract, slerp


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
    v, g = normalize(rows(seed), dim=-1), rows(seed + 100)
    torch.testing.assert_close(project(v, g), sphere.proju(v, g))
    step = project(v, g)
    torch.testing.assert_close(retract(v, step), sphere.retr(v, step))
    torch.testing.assert_close(angle(v, normalize(g, dim=-1)), sphere.dist(v, normalize(g, dim=-1)))


@pytest.mark.parametrize("seed", range(5))
def test_slerp_walks_the_geodesic(sphere, seed):
    a, b, t = normalize(rows(seed), dim=-1), normalize(rows(seed + 50), dim=-1), 0.3
    torch.testing.assert_close(slerp(3 * a, b, t), sphere.expmap(a, t * sphere.logmap(a, b)))
    torch.testing.assert_close(angle(slerp(a, b, t), a), t * angle(a, b))
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)


def test_small_angles_keep_their_digits_in_float32():
    a = normalize(rows(0, dtype=torch.float32), dim=-1)
    tangent = normalize(project(a, rows(1, dtype=torch.float32)), dim=-1)
    for size in (1e-3, 1e-5, 1e-6):
        assert angle(a, retract(a, size * tangent)).sub(size).abs().max() < 2e-7
    near = retract(a, 1e-5 * tangent)
    torch.testing.assert_close(slerp(a, near, 0.5), retract(a, 0.5e-5 * tangent))
    torch.testing.assert_close(slerp(a, a, 0.5), a)


def test_opposite_rows_have_no_arc():
    a = normalize(rows(0), dim=-1)
    with pytest.raises(ValueError, match="opposite"):
        slerp(a, -a, 0.5)


def test_slerp_goes_on_along_the_circle(sphere):
    a, b = normalize(rows(1), dim=-1), normalize(rows(51), dim=-1)
    for t in (-0.4, 1.7):
        torch.testing.assert_close(slerp(a, b, t), sphere.expmap(a, t * sphere.logmap(a, b)))
    each = torch.linspace(-1, 2, len(a), dtype=a.dtype)[:, None]  # a share for each row
    torch.testing.assert_close(slerp(a, b, each), sphere.expmap(a, each * sphere.logmap(a, b)))


@pytest.mark.parametrize("seed", range(5))
def test_the_mean_of_two_is_on_their_arc(seed):
    a, b = rows(seed), rows(seed + 50)
    found = frechet_mean(torch.stack([2 * a, b]), torch.tensor([3, 1]))
    torch.testing.assert_close(found, slerp(a, b, 0.25), rtol=0, atol=1e-12)
    torch.testing.assert_close(frechet_mean(torch.stack([b]), torch.tensor([0.1])), normalize(b, dim=-1))
    # at 170 degrees, where the mean in space is at another point of the arc
    a, tangent = normalize(a, dim=-1), normalize(project(normalize(a, dim=-1), b), dim=-1)
    far = normalize(math.cos(math.radians(170)) * a + math.sin(math.radians(170)) * tangent, dim=-1)
    found = frechet_mean(torch.stack([a, far]), torch.tensor([0.9, 0.1], dtype=torch.float64))
    torch.testing.assert_close(found, slerp(a, far, 0.1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_mean_is_where_geoopts_logarithms_balance(sphere, seed):
    points = normalize(torch.stack([rows(seed + 10 * i) for i in range(4)]) + 0.7, dim=-1)  # in one half of the sphere
    weights = torch.tensor([0.5, 0.2, 0.0, 2.0], dtype=torch.float64)
    found = frechet_mean(points, weights)
    balance = sum(w * sphere.logmap(found, p) for w, p in zip(weights, points))
    assert balance.abs().max() < 1e-10

    def spread(x):
        return sum(w * sphere.dist(x, p) ** 2 for w, p in zip(weights, points))

    for other in range(20):  # no other point does better, near or far
        for size in (1e-3, 0.5):
            x = sphere.expmap(found, size * normalize(project(found, rows(other + 200)), dim=-1))
            assert (spread(x) > spread(found)).all()
    torch.testing.assert_close(frechet_mean(points, 7 * weights), found)
    turned = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    torch.testing.assert_close(frechet_mean(points @ turned, weights), found @ turned)


def test_the_mean_in_high_dimensions_and_float32():
    points = torch.stack(
        [normalize(rows(i, n=2, d=768, dtype=torch.float32), dim=-1) for i in range(6)]
    )  # nearly at right angles
    found = frechet_mean(points, torch.arange(1.0, 7.0))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(found.double(), frechet_mean(points.double(), torch.arange(1.0, 7.0)), rtol=0, atol=1e-7)


def test_directions_without_a_mean_are_refused():
    a = normalize(rows(0), dim=-1)
    with pytest.raises(ValueError, match="opposite"):
        frechet_mean(torch.stack([a, -a]), torch.tensor([0.7, 0.3]))
    triangle = torch.tensor([[[1.0, 0.0]], [[-0.5, 0.75**0.5]], [[-0.5, -(0.75**0.5)]]])
    with pytest.raises(ValueError, match="balance"):
        frechet_mean(triangle, torch.ones(3))
    for bad in ([1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")], [float("inf"), 1.0]):
        with pytest.raises(ValueError, match="weights"):
            frechet_mean(torch.stack([a, a]), torch.tensor(bad))

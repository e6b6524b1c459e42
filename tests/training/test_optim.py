"""RiemannianSGD against the written method in float64, and against geoopt's optimizer."""

import math
import warnings

import pytest
import torch
from helpers import written_method
from torch.nn.functional import normalize

from diffusers_dti import RiemannianSGD
from diffusers_dti.sphere import angle
from diffusers_dti.training.optim import RiemannianAdam


def problem(n=3, d=64, steps=500, dtype=torch.float32, seed=0):
    """Unit rows and a loss that changes from step to step, as with photos and noise: `loss(v, t)`.

    (On a loss that stands still, steps of one length end by jumping about the minimum, where rounding decides.)
    """
    generator = torch.Generator().manual_seed(seed)
    start = normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=-1)
    matrix = torch.randn(n, d, d, generator=generator, dtype=torch.float64) / d
    pull = torch.randn(steps, n, d, generator=generator, dtype=torch.float64)

    def loss(v, t=0):
        return torch.einsum("nd,nde,ne->", v, matrix.to(v), v) + (pull[t].to(v) * v).sum()

    return start.to(dtype), loss


@pytest.mark.parametrize(("kappa", "beta"), [(0.0, 0.0), (1.0, 0.0), (1.0, 0.9)])
def test_500_steps_are_the_written_method(kappa, beta):
    start, loss = problem()
    expected = written_method(start, loss, start, 0.04, kappa, beta, 500)
    v = torch.nn.Parameter(start.clone())
    optimizer = RiemannianSGD([{"params": [v], "prior": start}], lr=0.04, kappa=kappa, beta=beta)
    for t in range(500):
        optimizer.zero_grad()
        loss(v, t).backward()
        optimizer.step()
    difference = (v.detach().double() - expected).abs().max().item()
    print(f"greatest difference after 500 steps, kappa {kappa}, beta {beta}: {difference:.1e}")
    assert difference < 1e-5
    assert (v.detach().norm(dim=-1) - 1).abs().max() < 1e-6
    assert angle(v.detach(), start).min() > 0.3  # it went somewhere


def test_500_steps_are_geoopts():
    """geoopt's SGD does not normalize: it gets the normalized gradient."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import geoopt
    start, loss = problem()
    ours = torch.nn.Parameter(start.clone())
    theirs = geoopt.ManifoldParameter(start.double().clone(), manifold=geoopt.Sphere())
    optimizer = RiemannianSGD([ours], lr=0.04)
    peer = geoopt.optim.RiemannianSGD([theirs], lr=0.04)
    for t in range(500):
        for v, o in ((ours, optimizer), (theirs, peer)):
            o.zero_grad()
            loss(v, t).backward()
            if o is peer:
                v.grad = normalize(v.grad - (v.grad * v.detach()).sum(-1, keepdim=True) * v.detach(), dim=-1)
            o.step()
    difference = (ours.detach().double() - theirs.detach()).abs().max().item()
    print(f"greatest difference from geoopt after 500 steps: {difference:.1e}")
    assert difference < 1e-5


def test_riemannian_adam_with_a_second_moment_per_row_is_geoopts():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import geoopt
    start, loss = problem(dtype=torch.float64)
    ours = torch.nn.Parameter(start.clone())
    theirs = geoopt.ManifoldParameter(start.clone(), manifold=geoopt.Sphere())
    optimizer = RiemannianAdam([ours], lr=0.05, per_coordinate=False)
    peer = geoopt.optim.RiemannianAdam([theirs], lr=0.05, eps=1e-8)
    for t in range(200):
        for v, o in ((ours, optimizer), (theirs, peer)):
            o.zero_grad()
            loss(v, t).backward()
            o.step()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=0, atol=1e-9)
    assert angle(ours.detach(), start).min() > 0.3


def test_riemannian_adam_per_coordinate_is_the_written_method():
    """Formulas of Adam, with the momentum in the tangent space and steps of lr / √d per coordinate."""
    start, loss = problem(dtype=torch.float64)
    prior = normalize(start + 0.3, dim=-1)
    v = torch.nn.Parameter(start.clone())
    optimizer = RiemannianAdam([{"params": [v], "prior": prior}], lr=0.05, kappa=0.5, betas=(0.8, 0.99))
    x, m, s = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for t in range(100):
        optimizer.zero_grad()
        loss(v, t).backward()
        optimizer.step()
        y = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(y, t) - 0.5 * (prior * y).sum(), y)
        g = g - (g * x).sum(-1, keepdim=True) * x
        m = 0.8 * (m - (m * x).sum(-1, keepdim=True) * x) + 0.2 * g
        s = 0.99 * s + 0.01 * g**2
        u = (m / (1 - 0.8 ** (t + 1))) / ((s / (1 - 0.99 ** (t + 1))) ** 0.5 + 1e-8)
        u = u - (u * x).sum(-1, keepdim=True) * x
        x = x - 0.05 / 8 * u  # √64
        x = x / x.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(v.detach(), x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("width", [16, 4096])
@pytest.mark.parametrize("per_coordinate", [True, False])
def test_the_rate_of_riemannian_adam_is_an_angle_at_every_width(width, per_coordinate):
    start, loss = problem(d=width, steps=1)
    v = torch.nn.Parameter(start.clone())
    optimizer = RiemannianAdam([v], lr=0.1, per_coordinate=per_coordinate)
    loss(v).backward()
    optimizer.step()
    torch.testing.assert_close(angle(start, v.detach()), torch.full((3,), math.atan(0.1)), rtol=0.05, atol=0)


def test_every_step_turns_by_the_same_angle():
    start, loss = problem()
    v = torch.nn.Parameter(start.clone())
    optimizer = RiemannianSGD([v], lr=0.04)
    loss(v).backward()
    optimizer.step()
    torch.testing.assert_close(angle(start, v.detach()), torch.full((3,), math.atan(0.04)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_rows_without_a_usable_gradient_stay(bad, beta):
    start, loss = problem()
    v = torch.nn.Parameter(start.clone())
    alone = torch.nn.Parameter(start.clone())
    optimizer = RiemannianSGD([{"params": [v], "prior": normalize(start + 1, dim=-1)}], lr=0.04, kappa=0.1, beta=beta)
    reference = RiemannianSGD([{"params": [alone], "prior": normalize(start + 1, dim=-1)}], lr=0.04, kappa=0.1, beta=beta)
    for step in range(4):
        for p, o in ((v, optimizer), (alone, reference)):
            p.grad = None
            loss(p).backward()
            if p is v and step % 2:
                p.grad[1] = bad  # a whole row, as when the token is not in the batch
            if p is alone and step % 2:
                before = alone.detach()[1].clone(), {k: s[1].clone() for k, s in reference.state[alone].items()}
            o.step()
            if p is alone and step % 2:  # the row's step never happened
                alone.data[1] = before[0]
                for k, s in reference.state[alone].items():
                    s[1] = before[1][k]
    torch.testing.assert_close(v, alone)
    assert optimizer.state[v]["skipped"].flatten().tolist() == [0, 0 if bad == 0 else 2, 0]


def test_only_one_bad_value_stops_its_row_alone():
    start, loss = problem()
    v = torch.nn.Parameter(start.clone())
    optimizer = RiemannianSGD([v], lr=0.04)
    loss(v).backward()
    v.grad[0, 3] = float("nan")
    optimizer.step()
    assert torch.equal(v[0], start[0])
    assert (v[1:] != start[1:]).any(-1).all() and v.isfinite().all()


def test_state_dict_goes_round():
    start, loss = problem()

    def run(v, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            loss(v).backward()
            optimizer.step()

    def make(v):
        return RiemannianSGD([{"params": [v], "prior": start}], lr=0.02, kappa=1e-2, beta=0.9)

    whole = torch.nn.Parameter(start.clone())
    run(whole, make(whole), 20)
    first = torch.nn.Parameter(start.clone())
    optimizer = make(first)
    run(first, optimizer, 10)
    second = torch.nn.Parameter(first.detach().clone())
    resumed = make(second)
    resumed.load_state_dict(optimizer.state_dict())
    run(second, resumed, 10)
    assert torch.equal(whole, second)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr and kappa"),
        ({"lr": 0.1, "beta": 1.0}, "beta in"),
        ({"lr": 0.1, "kappa": 0.1}, "prior"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RiemannianSGD([torch.nn.Parameter(problem()[0])], **settings)
    with pytest.raises(ValueError, match="float32"):
        RiemannianSGD([torch.nn.Parameter(problem()[0].bfloat16())], lr=0.1)


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_a_row_recovers_from_an_enormous_gradient(beta):
    """Its square is infinite in float32: a running mean of it would stay so for ever."""
    start, loss = problem()
    v = torch.nn.Parameter(start.clone())
    optimizer = RiemannianSGD([v], lr=0.04, beta=beta)
    for step in range(3):
        v.grad = None
        loss(v).backward()
        if step == 1:
            v.grad[0] = 1e20
        before = v.detach().clone()
        optimizer.step()
        moved = (v.detach() - before).norm(dim=-1) > 0.01
        assert moved.tolist() == [step != 1, True, True]

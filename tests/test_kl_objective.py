"""The KL as an objective of its own: the estimator's value, the gradient of the exact KL, zero where a bound bites."""

from __future__ import annotations

import pytest
import torch

import fastrl
from fastrl.kl import kl_objective


def value_and_gradient(estimator, x, *, clamp=None, bound=20.0):
    x = x.clone().requires_grad_()
    rollouts = fastrl.Rollouts(
        torch.zeros(1, len(x), dtype=torch.long),
        advantages=torch.ones(1),
        old_logps=torch.full((1, len(x)), -2.0).double(),
    )
    spec = fastrl.LossSpec(objective=kl_objective(estimator, clamp), log_ratio_clamp=bound, aggregation="token-sum")
    loss = fastrl.policy_loss((x - 2)[None], rollouts, spec).loss
    (gradient,) = torch.autograd.grad(loss, x)
    return loss.detach(), gradient


X = torch.tensor([-1.5, -0.2, 0.0, 0.3, 2.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [
        ("k1", lambda x: x, lambda x: x + 1),
        ("k2", lambda x: x**2 / 2, lambda x: x**2 / 2 + x),
        ("k3", lambda x: (-x).exp() - 1 + x, lambda x: x),
        ("abs", lambda x: x.abs(), lambda x: x.abs() + x.sign()),
    ],
)
def test_value_and_gradient(estimator, value, gradient):
    """d(w·k)/dlogp at w = 1 is k + k': for k3, x, the gradient of the KL itself on the policy's own samples."""
    loss, slope = value_and_gradient(estimator, X)
    torch.testing.assert_close(loss, value(X).sum(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(slope, gradient(X), rtol=1e-12, atol=1e-14)


def test_both_bounds_take_the_gradient_of_the_weight_too():
    loss, slope = value_and_gradient("k2", X, clamp=1.0)
    torch.testing.assert_close(loss, (X**2 / 2).clamp(max=1.0).sum())
    torch.testing.assert_close(slope, torch.where(X**2 / 2 > 1, 0.0, X**2 / 2 + X))
    loss, slope = value_and_gradient("k2", X, bound=1.0)
    torch.testing.assert_close(loss, (X.clamp(-1, 1) ** 2 / 2).sum())
    torch.testing.assert_close(slope, torch.where(X.abs() > 1, 0.0, X**2 / 2 + X))


def test_weights_of_another_policy():
    """w = π/π_behaviour from the advantages, ref − behaviour: d(w·k)/dlogp = w·(k + k')."""
    behind = torch.tensor([0.4, -0.3, 0.1, 0.0, -0.2], dtype=torch.float64)
    x = X.clone().requires_grad_()
    loss = kl_objective("k3", weighted=True)(x, behind).sum()
    loss.backward()
    weight, k3 = (X + behind).exp(), (-X).exp() - 1 + X
    torch.testing.assert_close(loss.detach(), (weight * k3).sum())
    torch.testing.assert_close(x.grad, weight * X)


def test_one_function_per_setting():
    """Specs with the same penalty are equal."""
    assert kl_objective("k3", 10.0) is kl_objective("k3", 10.0)
    with pytest.raises(ValueError, match="^estimator: expected one of 'k1', 'abs', 'k2', 'k3', got 'full'"):
        kl_objective("full")

"""The one entry: its numbers, its settings, its repeatability."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from small_nets import Y, batch_norm, exact_hessian, images, made, mlp, relu_mlp

from fl_common.determinism import seed_of
from fl_flatness.measure import Settings, measure
from fl_flatness.products import Curvature, cut
from fl_flatness.trace import hutchinson

ALL = Settings(batch_size=5, tolerance=1e-6, top=3, density_probes=2, density_steps=5, layers=True)


@pytest.mark.parametrize("factory", [mlp, batch_norm])
def test_numbers_are_those_of_the_exact_hessian(factory):
    net, x = made(factory), images()
    h = exact_hessian(net, x, Y)
    exact = torch.linalg.eigvalsh(h)
    found = measure(net, x, Y, ALL, seed=0)
    assert found["converged"]
    assert found["lambda_max"] == pytest.approx(exact[-1].item(), rel=1e-5)
    assert found["eigenvalues"] == pytest.approx(exact[-3:].flip(0).tolist(), rel=1e-5)
    assert max(found["eigenvalue_residuals"]) <= 1e-6
    assert abs(found["trace"] - h.trace().item()) < 3 * found["trace_error"]
    assert sum(found["density"]["weights"]) == pytest.approx(1)
    assert found["layers"][0]["lambda_max"] <= found["lambda_max"]
    assert net.training and all(p.grad is None for p in net.parameters())
    whole = measure(net, x, Y, Settings(batch_size=5, tolerance=0, steps=200), seed=0)
    assert whole["lambda_min"] == pytest.approx(exact[0].item(), rel=1e-5)
    assert whole["lambda_min_residual"] <= 1e-6


def test_the_trace_profits_from_the_eigenvalues():
    """Its probes leave out the subspace that is known by then."""
    net, x = made(relu_mlp), images()
    plain = hutchinson(Curvature(net, cut(x, Y, 13)), probes=16, seed=seed_of("flatness", 0))
    found = measure(net, x, Y, Settings(batch_size=13), seed=0)
    assert found["trace_error"] < 0.8 * plain.error


def test_only_what_was_asked_for():
    found = measure(made(), images(), Y, Settings(), seed=0)
    assert list(found) == [
        "lambda_max", "lambda_max_residual", "lambda_min", "lambda_min_residual", "converged",
        "products", "trace", "trace_error",
    ]  # fmt: skip


def test_equal_seeds_give_equal_text():
    """Of a second call on the same model, and after other draws."""
    net, x = made(batch_norm), images()
    first = json.dumps(measure(net, x, Y, ALL, seed=7), allow_nan=False)
    torch.randn(3)
    assert json.dumps(measure(net, x, Y, ALL, seed=7), allow_nan=False) == first
    other = measure(net, x, Y, ALL, seed=8)
    assert other["trace"] != json.loads(first)["trace"]
    assert other["layers"][0]["trace"] != json.loads(first)["layers"][0]["trace"]


def test_batches_change_nothing_but_rounding():
    net, x = made(batch_norm), images()
    results = [
        measure(net, x, Y, Settings(batch_size=size, tolerance=1e-8), seed=0) for size in (13, 5, 1)
    ]
    for found in results[1:]:
        assert found["lambda_max"] == pytest.approx(results[0]["lambda_max"], rel=1e-10)
        assert found["trace"] == pytest.approx(results[0]["trace"], rel=1e-10)


def test_an_error_without_text_is_told_by_its_class():
    class Silent(torch.nn.Linear):
        def forward(self, x):
            raise RuntimeError

    with pytest.raises(ValueError, match=r"^torch cannot compute the curvature: RuntimeError$"):
        measure(Silent(4, 3), torch.zeros(2, 4), Y[:2], Settings(), seed=0)


def test_bad_input_is_one_clear_line(monkeypatch):
    net, x = made(), images()
    with pytest.raises(ValueError, match="not finite at these parameters"):
        measure(net, x / 0, Y, Settings(), seed=0)
    with pytest.raises(ValueError, match="0 samples"):
        measure(net, x[:0], Y[:0], Settings(), seed=0)
    with pytest.raises(ValueError, match="3 eigenvalues: from 1 to 2"):
        measure(net, x, Y, Settings(top=3, steps=2), seed=0)
    monkeypatch.setitem(sys.modules, "pyhessian.hessian", None)
    with pytest.raises(ValueError, match=r"^flatness.engine = pyhessian: .*flatness.engine=own"):
        measure(net, x, Y, Settings(engine="pyhessian"), seed=0)

"""H_N and H_D: the worked example in both modes, like clients, and noise."""

from __future__ import annotations

import pytest
import torch
from small_nets import Y, curvature_of, exact_hessian, images, relu_mlp

from fl_flatness.diagonals import as_sent
from fl_flatness.match import match
from fl_flatness.trace import diagonal


def example() -> list[torch.Tensor]:
    return [torch.tensor(d, dtype=torch.float64) for d in ((1.0, 2.0), (2.0, 1.0), (3.0, 0.0))]


def test_three_vectors_as_in_the_paper():
    """||D||^2 = 5, 5, 9: H_N = (0 + 16 + 16) / 3 = 32 / 3.
    H_D = (4 / 5 + 3 / sqrt 45 + 6 / sqrt 45) / 3 = 0.7138802622."""
    found = match(example())
    assert found.h_n == pytest.approx(32 / 3, rel=1e-14)
    assert found.h_d == pytest.approx(0.7138802622, rel=1e-9)


def test_three_vectors_as_in_the_code():
    """||D|| = sqrt 5, sqrt 5, 3: H_N = 4 (3 - sqrt 5)^2 / 9 = 0.2593742823, of nine pairs.
    H_D = (3 + 2 * 2.1416407865) / 9 = 0.8092535081."""
    found = match(example(), "fedalign-code")
    assert found.h_n == pytest.approx(0.2593742823, rel=1e-9)
    assert found.h_d == pytest.approx(0.8092535081, rel=1e-9)


def test_the_code_adds_up_the_entries_of_a_tensor():
    """(1, 2 | 4) and (0, 3 | 4) both become (3, 4)."""
    net = torch.nn.Linear(2, 1)
    pair = [torch.tensor([d, d], dtype=torch.float64) for d in ((1, 2, 4), (0, 3, 4))]
    sent = [as_sent(halves, "fedalign-code", net) for halves in pair]
    assert all(torch.equal(halves, torch.tensor([[3.0, 4], [3, 4]])) for halves in sent)
    found = match(sent, "fedalign-code")
    assert (found.h_n, found.h_d) == (0, 1)
    assert match(pair, "fedalign-code").h_d < 1


@pytest.mark.parametrize("mode", ["paper", "fedalign-code"])
def test_like_clients_give_exactly_zero_and_one(mode):
    clients, hessians = zip(*(curvature_of(relu_mlp, batch_size=13) for _ in range(3)), strict=True)
    for estimates in (
        [h.diagonal() for h in hessians],
        [as_sent(diagonal(c, probes=16), mode, c.net) for c in clients],
    ):
        found = match(estimates, mode)
        assert (found.h_n, found.h_d) == (0, 1)


def test_noise_does_not_bias_the_squared_norms():
    """Halves D + e and D - e of one client: their product is ||D||^2 - ||e||^2, and not
    ||D||^2.  With D = (3, 0), e = (0, 1): 9 - 1 = 8; beside (1, 2), H_N = (8 - 5)^2 and
    H_D = 3 / sqrt(8 * 5)."""
    noisy = torch.tensor([[3.0, 1], [3.0, -1]])
    found = match([noisy, torch.tensor([1.0, 2.0])])
    assert found.h_n == pytest.approx(9)
    assert found.h_d == pytest.approx(3 / 40**0.5)


def test_estimates_come_near_the_exact_values():
    clients = [curvature_of(relu_mlp, batch_size=13)[0] for _ in range(2)]
    with torch.no_grad():
        clients[1].net[1].weight.mul_(1.5)
    exact = match([exact_hessian(c.net, images(), Y).diagonal() for c in clients])
    found = match([diagonal(c, probes=400) for c in clients])
    assert exact.h_d < 0.99
    assert found.h_d == pytest.approx(exact.h_d, abs=0.02)
    assert found.h_n == pytest.approx(exact.h_n, rel=0.3)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"1 client: .* two"):
        match(example()[:1])
    with pytest.raises(ValueError, match=r"client 1: .* use more probes"):
        match([torch.ones(2), torch.tensor([[1.0, 0], [-1.0, 0]])])
    with pytest.raises(ValueError, match=r"client 0: .* use more probes"):
        match([torch.zeros(2), torch.ones(2)])

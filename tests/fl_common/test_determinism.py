"""Seed streams, and that a process is set up without importing what it does not need."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_common.determinism import (
    generator_state,
    seed_device,
    seed_of,
    set_generator_state,
    step_seed,
    uniform,
    words,
)

KEYS = st.lists(st.integers(0, 2**40), max_size=4)


@settings(deadline=None)
@given(KEYS, KEYS)
def test_streams_differ_unless_their_keys_are_equal(one, two):
    assert (seed_of("step", *one) == seed_of("step", *two)) == (one == two)


@settings(deadline=None)
@given(KEYS)
def test_purposes_have_streams_of_their_own(key):
    assert len({seed_of(purpose, *key) for purpose in ("init", "cohort", "order", "step")}) == 4


def test_seeds_are_pinned():
    """They are part of every published result: changing them changes all results.

    The number is that of `printf init:0 | b2sum -l 64`, without its last bit.
    """
    assert seed_of("init", 0) == 0x2081B935380E4465 >> 1
    assert 0 <= seed_of("step", 1, 2, 3, 4) < 2**63


def test_the_seed_of_a_step_can_be_read_after_draws():
    with torch.random.fork_rng():
        seed_device("cpu", 7)
        torch.rand(3)
        assert step_seed("cpu") == 7


def test_preparing_a_process_imports_no_compiler():
    code = """
import os, sys
from fl_common import determinism
assert os.environ["MKL_CBWR"] == "AUTO,STRICT"
determinism.prepare_process()
import torch
assert torch.are_deterministic_algorithms_enabled()
assert torch.get_num_threads() == 1
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_words_are_splitmix64():
    """The first numbers of seed 1234567, as its public test vectors have them."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    found = words(1234567, 4, torch.device("cpu"))
    assert [number % 2**64 for number in found.tolist()] == known
    several = words(torch.tensor([[5], [1234567]]), 4, torch.device("cpu"))
    assert torch.equal(several[1, 0], found)


def test_uniform_numbers():
    u = uniform(words(7, 100_000, torch.device("cpu")))
    assert 0 <= u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    assert abs(u.double().mean() - 0.5) < 0.003  # three standard deviations
    assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 0.01


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_draws_on_the_host_are_of_the_devices_stream(monkeypatch, device):
    """The card's generator is one of the CPU's, so that a GPU is not needed."""
    card = torch.Generator()
    monkeypatch.setattr(torch.cuda, "manual_seed", card.manual_seed)
    monkeypatch.setattr(torch.cuda, "get_rng_state", card.get_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", card.set_state)

    def draws() -> list[float]:
        both = torch.rand(2), torch.rand(2, generator=card if device == "cuda" else None)
        return torch.cat(both).tolist()

    with torch.random.fork_rng(devices=[]):
        seed_device(device, 5)
        first, state, second = draws(), generator_state(device), draws()
        set_generator_state(device, state)
        assert draws() == second
        seed_device(device, 5)
        assert draws() == first
        torch.manual_seed(5)
        assert torch.rand(2).tolist() == first[:2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_words_are_the_same_on_a_card():
    keys = torch.tensor([3, -5, 2**62])
    on_cpu = words(keys, 1000, torch.device("cpu"))
    assert torch.equal(words(keys.cuda(), 1000, torch.device("cuda")).cpu(), on_cpu)
    assert torch.equal(uniform(on_cpu.cuda()).cpu(), uniform(on_cpu))

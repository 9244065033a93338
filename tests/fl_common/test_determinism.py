"""Seed streams, and that a process is set up without importing what it does not need."""

from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from fl_common.determinism import seed_of

KEYS = st.lists(st.integers(0, 2**40), max_size=4)


@given(KEYS, KEYS)
def test_streams_differ_unless_their_keys_are_equal(one, two):
    assert (seed_of("step", *one) == seed_of("step", *two)) == (one == two)


@given(KEYS)
def test_purposes_have_streams_of_their_own(key):
    assert len({seed_of(purpose, *key) for purpose in ("init", "cohort", "order", "step")}) == 4


def test_seeds_are_pinned():
    """They are part of every published result: changing them changes all results.

    The number is that of `printf init:0 | b2sum -l 64`, without its last bit.
    """
    assert seed_of("init", 0) == 0x2081B935380E4465 >> 1
    assert 0 <= seed_of("step", 1, 2, 3, 4) < 2**63


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

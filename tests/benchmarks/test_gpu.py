"""The GPU benchmark runs, without a GPU too, and reads a profile rightly."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ("abcd", ["(a)", "lenet", "cnn", "(b)", "2 at once", "(c)", "proximal", "(d)"]),
        pytest.param("e", ["(e)", "resnet8 on Ray"], marks=pytest.mark.long),
    ],
)
def test_everything_runs_in_a_tiny_form(parts: str, told: list[str], capsys):
    assert gpu.main(["--device", "cpu", "--small", "--only", parts]) == 0
    printed = capsys.readouterr().out
    for text in told:
        assert text in printed


def test_without_a_card_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("no GPU that torch can use; ")


def test_what_a_profile_says():
    """Work from 10 to 40, 50 to 60 and 90 to 100 of 90 us, of two streams: 40 us without any."""
    events = [
        {"cat": "kernel", "name": "conv", "ts": 10, "dur": 20},
        {"cat": "kernel", "name": "conv", "ts": 20, "dur": 20},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pageable -> Device)", "ts": 50, "dur": 10,
         "args": {"bytes": 4000}},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pageable)", "ts": 90, "dur": 10,
         "args": {"bytes": 8}},
        {"cat": "cpu_op", "name": "aten::conv2d", "ts": 0, "dur": 1000},
        {"ph": "M"},
    ]  # fmt: skip
    found = gpu.of_trace(events[::-1])
    assert found == {"idle": pytest.approx(40 / 90), "to_device": 4000, "launches": 2}
    assert gpu.of_trace([]) == {"idle": 0.0, "to_device": 0, "launches": 0}


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H200", 989), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362),
     ("Tesla V100-SXM2-16GB", 125), ("NVIDIA GeForce RTX 3090", 0), ("NVIDIA L40", 0),
     ("NVIDIA RTX A1000", 0)],
)  # fmt: skip
def test_peaks(name: str, peak: float):
    assert gpu.peak_of(name) == peak

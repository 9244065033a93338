"""A run on a GPU: where the model lies changes no bit, and nothing goes to the card."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks import gpu

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Runner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CARD = ("train.device=cuda", "run.rounds=3")


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fednova", "fedsam", "fedpart"])
def test_sums_on_the_card_are_those_of_the_cpu(runner: Runner, strategy: str) -> None:
    """The mean of all clients' models is kept on the disk, and with it all sums on the CPU."""
    settings = (*CARD, "model.name=mlp", f"strategy.name={strategy}")
    on_card, on_cpu = (runner(*settings, f"eval.models={m}") for m in ("cloud", "cloud,all"))
    assert on_card.code == on_cpu.code == 0
    assert on_card.summary["model_sha256"] == on_cpu.summary["model_sha256"]


@pytest.mark.parametrize("model", ["digits-cnn", "resnet8"])
@pytest.mark.parametrize("graphs", ["auto", "off"])
def test_a_run_repeats_bit_for_bit(runner: Runner, model: str, graphs: str) -> None:
    """Recorded passes or not, over eager kernels that warn of pooling."""
    settings = (*CARD, f"model.name={model}", "clients.number=4")
    first, again = (runner(*settings, f"train.graphs={g}") for g in ("auto", graphs))
    assert first.summary["model_sha256"] == again.summary["model_sha256"]


@pytest.mark.parametrize("cohort", ["1", "10"])
def test_a_later_round_brings_nothing_to_the_card(tmp_path: Path, cohort: str) -> None:
    bench = gpu.Bench("cuda", small=False, peak=0, folder=tmp_path, console=None)
    values = {
        "model.name": "lenet",
        "clients.number": 30,
        "clients.per-round": 10,
        "engine.cohort": cohort,
        "data.augment": "crop-flip",
    }
    found = gpu.profiled(bench, bench.settings(values))
    assert found["launches"] > 0
    assert found["to_device"] == 0

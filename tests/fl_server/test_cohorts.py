"""Clients trained at once by the in-process engine: the wiring of `engine.cohort`."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest

from fl_client.client import Clients
from fl_client.cohort import cohort_round
from fl_server.cli import main

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Result, Runner


def difference(one: Result, other: Result) -> float:
    return max(float((one.model[k].double() - other.model[k].double()).abs().max())
               for k in one.model)  # fmt: skip


def test_a_cohort_trains_what_one_by_one_trains(runner: Runner) -> None:
    """10 clients, 4 at once: 4 + 4 + 2.  Equal but for the rounding of sums, and not by luck: the
    bits differ."""
    settings = (
        "run.rounds=2", "strategy.name=scaffold", "regularizers=man", "model.norm=group",
        "train.dtype=float64",
    )  # fmt: skip
    alone, together = (runner(*settings, f"engine.cohort={k}") for k in ("1", "4"))
    assert together.code == 0
    assert 0 < difference(alone, together) < 1e-10
    for a, b in zip(alone.history, together.history, strict=True):
        assert a["cohort"] == b["cohort"] and a["bytes_up"] == b["bytes_up"]
        assert a["client_loss"] == pytest.approx(b["client_loss"], abs=1e-10)


def test_one_client_that_fails_does_not_fail_the_others(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(self: Clients, partition: int, *message: object) -> object:
        if partition == 2:
            raise RuntimeError("its disk is gone")
        return whole(self, partition, *message)

    whole = Clients.begin
    monkeypatch.setattr(Clients, "begin", begin)
    run = runner("run.rounds=1", "engine.cohort=10")
    assert run.code == 0
    place = f"{__file__}:{begin.__code__.co_firstlineno + 2}"
    assert run.history[0]["failed"] == {"2": f"RuntimeError: its disk is gone ({place})"}
    assert run.history[0]["replies"] == [0, 1, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(("chosen", "workers"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_auto_writes_what_it_chose_and_keeps_it(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, chosen: int, workers: int
) -> None:
    """The measurement is `Clients.choose_cohort`'s; here it says a number, once.  With 1 the run
    goes on one by one, in as many processes as there may be."""
    asked, sizes = [], []
    runner.always = ["run.pictures=false"]

    def choose(self: Clients, jobs: list[object], count: int) -> tuple[int, str]:
        assert count == workers
        asked.append(len(jobs))
        return chosen, f"engine.cohort = auto: {chosen}"

    def together(self: Clients, jobs: list[object], at_once: int) -> list[object]:
        sizes.append(len(jobs))
        return whole(self, jobs, at_once)

    whole = Clients.train_together
    monkeypatch.setattr(Clients, "choose_cohort", choose)
    monkeypatch.setattr(Clients, "train_together", together)
    settings = ("strategy.name=scaffold", "run.rounds=2", f"engine.workers={workers}")
    run = runner(*settings, "engine.cohort=auto")
    assert run.code == 0 and asked == [10]
    at_once = [3, 3, 3, 1] * 2 if chosen == 3 else [1] * (workers == 1)
    assert sizes == at_once
    assert stored(run.folder)["engine.cohort"] == str(chosen)
    if chosen == 3:
        assert main(["resume", str(run.folder), "run.rounds=3"]) == 0
        assert sizes[: len(at_once)] == at_once and 3 in sizes[len(at_once) :]
    if chosen == 1:
        alone = runner(*settings)
        assert run.summary["model_sha256"] == alone.summary["model_sha256"]
        assert run.history_less_times == alone.history_less_times


def stored(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())


def test_auto_on_this_machine_says_why(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    run = runner("run.rounds=1", "engine.cohort=auto")
    assert run.code == 0
    told = next(line for line in capsys.readouterr().out.splitlines() if "engine.cohort" in line)
    number = stored(run.folder)["engine.cohort"]
    assert told.startswith(f"engine.cohort = auto: {number}; ")


def test_a_resumed_run_keeps_its_cohort(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    whole = runner("run.rounds=4", "engine.cohort=5")
    half = runner("run.rounds=2", "engine.cohort=5")
    assert main(["resume", str(half.folder), "run.rounds=4", "engine.cohort=2"]) == 2
    assert "engine.cohort = 2: the run in" in capsys.readouterr().err
    assert main(["resume", str(half.folder), "run.rounds=4"]) == 0
    assert half.summary["model_sha256"] == whole.summary["model_sha256"]


@pytest.mark.parametrize("strategy", ["scaffold", "fedpart"])
def test_clients_that_lost_something_are_trained_beside_the_same_others(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """A resumed run's clients have lost their memory, or a part of the model, and ask for it; those
    who have nothing to ask for wait for them."""
    beside: list[tuple[int, list[int]]] = []

    def noted(net: object, members: list[Any], *args: Any, **kwargs: Any) -> None:
        beside.append((kwargs["server_round"], [member.partition for member in members]))
        cohort_round(net, members, *args, **kwargs)

    monkeypatch.setattr("fl_client.together.cohort_round", noted)
    settings = [f"strategy.name={strategy}", "model.name=mlp", "engine.cohort=4"]
    settings += ["clients.number=8", "clients.per-round=4"]
    settings += ["fedpart.warm-up=1"] * (strategy == "fedpart")
    whole = runner(*settings, "run.rounds=3")
    cohorts = [row["cohort"] for row in whole.history]
    assert beside == list(enumerate(cohorts, 1))
    newcomers = set(cohorts[2]) - set(cohorts[0] + cohorts[1])
    assert newcomers and newcomers != set(cohorts[2])
    half = runner(*settings, "run.rounds=2")
    beside.clear()
    assert main(["resume", str(half.folder), "run.rounds=3"]) == 0
    assert beside == [(3, cohorts[2])]
    assert half.summary["model_sha256"] == whole.summary["model_sha256"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (("engine.cohort=0",), 'engine.cohort = "0": must be auto, or a number, at least 1'),
        (("engine.cohort=4", "engine.name=ray"), "belongs to engine.name=inprocess"),
        (("engine.cohort=4", "engine.workers=2"), "leave one of them out"),
        (("engine.client-gpus=0.5",), "belongs to engine.name=ray; leave it at 0 with inprocess"),
        (("engine.name=ray", "train.device=cuda"), "Ray gives its clients no GPU; set engine.cl"),
        (("engine.name=ray", "engine.client-gpus=99"), "client-gpus = 99: this machine has "),
    ],
)
def test_what_has_no_meaning_is_refused(
    runner: Runner, capsys: pytest.CaptureFixture[str], settings: tuple[str, ...], told: str
) -> None:
    runner.always = []
    assert runner(*settings).code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["engine.cohort=4", "engine.workers=2"])
def test_plain_flwr_run_refuses_what_is_for_one_process(
    runner: Runner,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    setting: str,
) -> None:
    """There engine.name says nothing: which engine runs the ServerApp is seen from its grid."""
    monkeypatch.setattr("fl_server.app.engine_of", lambda grid: "ray")
    runner.always = []
    assert runner(setting).code == 3
    told = f"{setting.replace('=', ' = ')}: belongs to engine.name=inprocess; leave it out with ray"
    assert told in capsys.readouterr().out


def test_flowers_own_draws_do_not_say_who_is_trained_beside_whom(runner):
    """Its strategies write to the clients in the order of Python's global random numbers."""
    models = set()
    for seed in (1, 2, 3):
        random.seed(seed)
        result = runner(
            "strategy.name=flwr:FedAvg", "clients.number=4", "engine.cohort=3", "run.rounds=1"
        )
        models.add(result.summary["model_sha256"])
    assert len(models) == 1

"""`flatfed cost` and `flatfed groups`: FedPart's published costs, the true ones, mistakes."""

from __future__ import annotations

import json
import re

import pytest

from fl_common.config import resolve
from fl_common.groups import Groups
from fl_report.cost import Plan, passing, report
from fl_server.cli import main

# Wang et al., NeurIPS 2024, main table: cycles, then communication and computation, each of full
# updates and of FedPart.
TABLE = {
    "cifar10": [
        (1, (4.83, 1.35), (4.38, 3.21)),
        (2, (9.65, 2.70), (8.76, 6.43)),
        (3, (14.5, 4.05), (13.2, 9.64)),
        (4, (19.3, 5.40), (17.5, 12.9)),
    ],
    "cifar100": [
        (1, (4.92, 1.38), (4.39, 3.22)),
        (2, (9.65, 2.75), (8.78, 6.44)),
        (3, (14.8, 4.13), (13.2, 9.66)),
        (4, (19.7, 5.51), (17.6, 12.9)),
        (5, (24.6, 6.88), (21.9, 16.1)),
    ],
    "tiny-imagenet": [
        (1, (5.02, 1.40), (17.5, 12.9)),
        (2, (10.0, 2.81), (35.1, 25.7)),
        (3, (15.1, 4.21), (52.6, 38.6)),
        (4, (20.1, 5.62), (70.1, 51.4)),
        (5, (25.1, 7.02), (87.7, 64.3)),
    ],
}
MISPRINT = ("cifar100", 2, "published_gb")
"""Its first number is that of CIFAR-10."""
CELLS = [
    (source, cycles, key, printed)
    for source, rows in TABLE.items()
    for cycles, gb, tmacs in rows
    for key, printed in (("published_gb", gb), ("published_tmacs", tmacs))
]
SETTING = ["model.name=resnet8", "clients.number=40", "train.epochs=8", "--samples", "500"]


def planned(*settings: str, shape=None, classes=None) -> Plan:
    values = dict(setting.split("=") for setting in settings)
    return Plan.of(resolve({"strategy.name": "fedpart", **values}), shape, classes)


@pytest.fixture
def told(capsys):
    """`told("model.name=mlp", ...)`: what `flatfed cost` says, as JSON."""

    def run(*arguments: str):
        assert main(["cost", *arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


_KNOWN: dict[tuple[str, int], dict] = {}


@pytest.mark.parametrize(("source", "cycles", "key", "printed"), CELLS)
def test_published_costs(told, source, cycles, key, printed):
    place = (source, cycles)
    if place not in _KNOWN:  # a row has two cells
        rounds = [f"fedpart.cycles={cycles}", f"run.rounds={25 * cycles}"]
        _KNOWN[place] = told(f"data.source={source}", *SETTING, *rounds)["costs"][-1]
    ours = _KNOWN[place][key]
    assert _KNOWN[place]["rounds"] == 25 * cycles
    if (source, cycles, key) == MISPRINT:
        assert printed[0] / ours[0] < 0.985
        assert printed[0] == TABLE["cifar10"][1][1][0]
        ours, printed = ours[1:], printed[1:]
    assert ours == pytest.approx(list(printed), rel=0.005)


@pytest.mark.parametrize(
    ("source", "published"),
    # The table's computation / (3 x 25 rounds x 8 epochs x 500 samples), as exact as it gets.
    [("cifar10", 14.606e6), ("cifar100", 14.629e6), ("tiny-imagenet", 58.465e6)],
)
def test_published_forward(source, published):
    plan = planned("model.name=resnet8", f"data.source={source}", "engine.name=grpc")
    assert passing(plan.net, plan.shape).published == pytest.approx(published, abs=500)


# ResNet-8 at 32 px: MACs of each layer, (height x width) x outputs x inputs x kernel.
RESNET8 = {
    "stem.conv": 16 * 16 * 64 * 3 * 49,
    "stages.0.0.conv1": 8 * 8 * 64 * 64 * 9,
    "stages.0.0.conv2": 8 * 8 * 64 * 64 * 9,
    "stages.1.0.conv1": 4 * 4 * 128 * 64 * 9,
    "stages.1.0.conv2": 4 * 4 * 128 * 128 * 9,
    "stages.1.0.shortcut.conv": 4 * 4 * 128 * 64,
    "stages.2.0.conv1": 2 * 2 * 256 * 128 * 9,
    "stages.2.0.conv2": 2 * 2 * 256 * 256 * 9,
    "stages.2.0.shortcut.conv": 2 * 2 * 256 * 128,
    "fc": 256 * 10,
}
# The layers that a gradient passes on its way back to the trained one: none that is beside it.
STAGE2 = ["stages.2.0.conv1", "stages.2.0.conv2", "stages.2.0.shortcut.conv", "fc"]
STAGE1 = ["stages.1.0.conv1", "stages.1.0.conv2", "stages.1.0.shortcut.conv", *STAGE2]
BEHIND = {
    "stem.conv": ["stages.0.0.conv1", "stages.0.0.conv2", *STAGE1],
    "stages.0.0.conv1": ["stages.0.0.conv2", *STAGE1],
    "stages.0.0.conv2": STAGE1,
    "stages.1.0.conv1": ["stages.1.0.conv2", *STAGE2],
    "stages.1.0.conv2": STAGE2,
    "stages.1.0.shortcut.conv": STAGE2,
    "stages.2.0.conv1": ["stages.2.0.conv2", "fc"],
    "stages.2.0.conv2": ["fc"],
    "stages.2.0.shortcut.conv": ["fc"],
    "fc": [],
}


def test_a_backward_pass_ends_at_the_active_group():
    plan = planned("model.name=resnet8", "data.source=synthetic")
    forward = sum(RESNET8.values())
    assert forward == 14_469_632
    steps = []
    for group in plan.groups.names:
        with plan.groups.only(plan.net, [group]):
            found = passing(plan.net, plan.shape)
        back = RESNET8[group] + sum(RESNET8[layer] for layer in BEHIND[group])
        assert (found.forward, found.backward) == (forward, back), group
        steps.append(forward + back)
    told = report(plan, 1, lambda t: [0]).macs
    assert told["partial_step"] == sum(steps) / 10
    assert round(told["partial_step"] / forward, 2) == 1.41
    # A full step: all weights, and all inputs but the image.
    assert told["full_step"] == 3 * forward - RESNET8["stem.conv"] == 41_000_448


def test_a_model_of_ones_own(tmp_path, monkeypatch, told):
    (tmp_path / "owncost.py").write_text(
        "from torch import nn\n"
        "def net(shape, classes):\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1),\n"
        "        nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ConvTranspose2d(4, 2, 2, stride=2),\n"
        "        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    macs = told("model.name=owncost:net")["macs_per_sample"]
    layers = [8 * 8 * 4 * 9, 8 * 8 * 4 * (4 // 2) * 9, 4 * 8 * 8 * (2 * 2 * 2), 128 * 10]
    assert macs["forward"] == sum(layers)
    assert macs["full_step"] == 3 * sum(layers) - layers[0]
    # Each of 2 x 8 x 8 averages: four additions and a division.
    assert macs["published_forward"] == sum(layers) + 2 * 8 * 8 * 5


def test_bytes_of_a_cycle_of_resnet8(told):
    costs = told("data.source=cifar10", *SETTING, "run.rounds=25")["costs"]
    n, buffers = 1_235_274, 4 * 2_688 + 8 * 9
    # Up: five full rounds, and twice every group.
    up = 4 * (5 + 2) * n + 25 * buffers
    # Down: everything at first, then what changed in the round before: that is not the last
    # round's, in which the classifier changes.
    down = 4 * (n + 5 * n + 2 * n - 2_570) + 25 * buffers
    whole = 25 * (4 * n + buffers)
    assert [(cost["rounds"], cost["bytes_up"], cost["bytes_down"]) for cost in costs] == [
        (25, [40 * whole, 40 * up], [40 * whole, 40 * down])
    ]


RUNS = [
    ["fedpart.order=random", "train.dtype=float64", "engine.cohort=2"],
    ["clients.per-round=2", "fedpart.reopen=false", "fedpart.bn-stats=local"],
    ["clients.per-round=2", "clients.sampling=bernoulli", "model.norm=group"],
    ["fedpart.bn-frozen=eval"],
    ["sync.mode=full", "fedpart.groups=conv1.*+norm1.*+conv2.*, norm2.*+fc.*"],
]


@pytest.mark.parametrize("settings", RUNS, ids=",".join)
def test_bytes_are_those_of_a_run(runner, told, settings):
    schedule = ["fedpart.warm-up=1", "fedpart.rounds-per-group=1", "run.rounds=6"]
    common = ["data.source=digits", "clients.number=4", *schedule, *settings]
    costs = told(*common)["costs"]
    place = ["train.device=cpu", "eval.every=6", "train.batch-size=512", "strategy.name=fedpart"]
    rows = runner(*place, *common).history
    assert costs[0]["rounds"] < costs[1]["rounds"] == len(rows) == 6
    for cost in costs:
        for way in ("bytes_up", "bytes_down"):
            assert cost[way][1] == sum(row[way] for row in rows[: cost["rounds"]]), way


@pytest.mark.parametrize(
    "engine",
    ["engine.workers=2", "engine.name=ray engine.client-gpus=0.25", "engine.name=grpc"],
)
def test_who_trains_does_not_matter(told, engine):
    settings = ["data.source=digits", "run.rounds=3"]
    assert told(*settings, *engine.split()) == told(*settings)


def test_full_updates_are_those_of_fedavg(runner, told):
    common = ["data.source=digits", "clients.number=4", "clients.per-round=3", "run.rounds=3"]
    costs = {cost["rounds"]: cost for cost in told(*common)["costs"]}
    rows = runner("train.device=cpu", *common).history
    for way in ("bytes_up", "bytes_down"):
        assert costs[3][way][0] == sum(row[way] for row in rows)


def test_macs_grow_with_samples_and_epochs(told):
    one = told("run.rounds=11")
    # 1,438 samples of digits over 10 clients.
    assert one["samples"] == 143.8
    more = told("run.rounds=11", "train.epochs=3", "--samples", "287.6")
    for key in ("published_tmacs", "tmacs"):
        assert more["costs"][0][key] == pytest.approx([6 * v for v in one["costs"][0][key]])
    assert one["costs"][0]["tmacs"][0] * 1e12 == pytest.approx(
        11 * 143.8 * one["macs_per_sample"]["full_step"]
    )


def test_the_groups_of_resnet8(capsys):
    assert main(["groups", "resnet8"]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.endswith("% ")]
    sizes = [int(row[-3].replace(",", "")) for row in rows]
    # FLAIR-Community/Fling: stem, three stages of two layers (and a shortcut), classifier.
    published = [9_536, 36_992, 36_992, 73_984, 147_712, 8_448, 295_424, 590_336, 33_280, 2_570]
    assert sizes == [*published, 1_235_274, 2_688, 9]
    assert [row[-2:] for row in rows[-3:-1]] == [["4,941,096", "100.00%"], ["10,752", "0.22%"]]


@pytest.mark.parametrize("model", ["resnet8", "resnet20", "lenet64", "mlp"])
def test_printed_parameters_are_patterns(model, capsys):
    assert main(["groups", model]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.endswith("% ")]
    patterns = [row[1] for row in rows[: [row[0] for row in rows].index("all")]]
    plan = planned(f"model.name={model}", "data.source=synthetic")
    again = Groups.matching(plan.net, ", ".join(patterns))
    assert list(again.members.values()) == list(plan.groups.members.values())


def test_groups_take_settings(capsys):
    settings = ["fedpart.groups=stem.*,stages.[01].*+stages.2.*,fc.*", "--classes", "100"]
    assert main(["groups", "resnet8", "model.norm=group", *settings]) == 0
    printed = capsys.readouterr().out
    # 256 x 100 + 100; no statistics without BatchNorm.
    assert re.search(r"fc\.\* +fc\.\* +25,700 ", printed)
    assert re.search(r"stages\.\[01\]\.\*\+stages\.2\.\* +stages\.\* ", printed)
    assert "1,258,404 parameters in 3 groups" in printed
    assert "stats" not in printed


@pytest.mark.parametrize("command", [["groups", "text-cnn"], ["cost", "model.name=text-cnn"]])
def test_a_sample_may_be_described_as_token_ids(command, capsys):
    samples = ["--samples", "8"] if command[0] == "cost" else []
    assert main([*command, *samples, "--shape", "50,9", "--classes", "4"]) == 0
    assert "samples of 50 x 9, 4 classes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["groups", "resnet9"], "did you mean resnet8"),
        (["groups", "nowhere:net"], "no module nowhere can be imported"),
        (["groups", "json:loads"], "json:loads: "),
        (["groups", "resnet8", "model.name=mlp"], "model.name: given twice"),
        (["groups", "lenet", "--shape", "3,8,8"], "at least 16 x 16 pixels"),
        (["groups", "resnet8", "--shape", "3x32x32"], "--shape 3x32x32: write"),
        (["groups", "resnet8", "--shape", "3,0,32"], "--shape 3,0,32: write"),
        (["groups", "resnet8", "--classes", "0"], "--classes 0: must be"),
        (["groups", "resnet8", "data.source=digits", "--shape", "3,8,8"], "1 x 8 x 8"),
        (["groups", "resnet8", "fedpart.groups=stem.*"], "in no group"),
        (["cost", "model.nam=resnet8"], "did you mean model.name"),
        (["cost", "strategy.name=fedavg"], "strategy.name = fedavg: has no partial updates"),
        (["cost", "fedpart.cycles=2"], "set run.rounds=22"),
        (["cost", "--samples", "0"], "--samples 0: must be at least 1"),
        (["cost", "--samples", "nan"], "--samples nan: must be at least 1"),
        (["cost", "--shape", "3,32,32"], "--samples: not known"),
        (["cost", "--config", "/nowhere.toml"], "--config /nowhere.toml"),
    ],
)
def test_a_mistake_is_one_line(arguments, said, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err

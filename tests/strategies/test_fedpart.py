"""FedPart: its schedule, what a partial round trains, sends and averages, and what it goes with."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fl_client.app
import fl_client.client
from fl_client.client import Clients
from fl_client.trainer import batches
from fl_common import wire
from fl_common.config import methods, resolve
from fl_common.groups import Groups
from fl_common.layout import COUNTERS, PARAMS, STATS, concatenate, tensors_of
from fl_common.models.catalogue import build
from fl_common.models.layers import Chain, with_head
from fl_common.models.resnet import BasicBlock, conv2d
from fl_server.cli import main
from fl_server.evaluator import Evaluator
from regularizers.moon import MOON
from strategies.fedpart import FedPart, FedPartParams, Schedule
from tests.trace import Trace

FEDPART = "strategy.name=fedpart"
ON_CPU = ["train.device=cpu", "train.lr=0.05", "data.alpha=5"]
DIGITS = [*ON_CPU, "eval.every=100", FEDPART]
SHORT = ["fedpart.warm-up=1", "fedpart.rounds-per-group=1"]
LOCAL = "fedpart.bn-stats=local"
CNN = ("conv1", "conv2", "fc")
SIZES = {"conv1": 192, "conv2": 4704, "fc": 5130}
"""digits-cnn: two convolutions, each with BatchNorm, and a classifier."""
N = 10_026
S = 4 * 2 * (16 + 32) + 8 * 2
"""Bytes of its running statistics and its two counters."""
CLIENTS = 3


def tiny(path: str, seed: int):
    """7 random images of 16 px for each client, of 4 classes."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (7 * CLIENTS + 8, 3, 16, 16), dtype=np.uint8)
    y = np.arange(len(x)) % 4
    return (x[8:], y[8:]), (x[:8], y[:8]), tuple("abcd")


STEPS = 2
"""Of a client's epoch, of 4 and of 3 samples."""


def small(shape: tuple[int, ...], classes: int) -> Chain:
    """A residual network of seven groups."""
    stem = nn.Sequential(conv2d(shape[0], 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
    stages = [BasicBlock(8, 8, 1, "batch", "B"), BasicBlock(8, 32, 2, "batch", "B")]
    return Chain(
        [
            ("stem", stem),
            ("stages", nn.Sequential(*(nn.Sequential(block) for block in stages))),
            ("pool", nn.AdaptiveAvgPool2d(1)),
            ("flatten", nn.Flatten()),
            ("fc", nn.Linear(32, classes)),
        ]
    )


def with_moons_head(shape: tuple[int, ...], classes: int) -> Chain:
    return with_head(small(shape, classes), width=16)


HERE = "tests.strategies.test_fedpart"
TINY = [
    f"data.source={HERE}:tiny",
    "data.partition=iid",
    "train.batch-size=4",
    "train.lr=0.05",
    "train.device=cpu",
    FEDPART,
]
SMALL, HEAD = f"model.name={HERE}:small", f"model.name={HERE}:with_moons_head"
THREE = "fedpart.groups=stem.*+stages.*, head.*, fc.*"
"""With their head: three groups."""

Arrays = dict[str, torch.Tensor]


@dataclass
class Local:
    """One client's local round."""

    before: Arrays
    after: Arrays = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)
    """The parameters that required a gradient."""
    stepped: int = 0
    """The elements that the optimizer was given."""
    forwards: list[int] = field(default_factory=list)
    """How often the first layer was called in each step."""
    modes: set[tuple[str, bool]] = field(default_factory=set)
    """Every norm in whose forward pass of a step, with gradients, it was in training mode."""
    uploaded: Arrays = field(default_factory=dict)


@dataclass
class Watched:
    trace: Trace
    locals: dict[tuple[int, int], Local]
    """By round and partition."""
    groups: Groups

    def of(self, server_round: int) -> list[tuple[int, Local]]:
        return [(i, local) for (t, i), local in sorted(self.locals.items()) if t == server_round]


def flat(net: nn.Module) -> Arrays:
    return {kind: concatenate(tensors.values()) for kind, tensors in tensors_of(net).items()}


@pytest.fixture(autouse=True)
def only_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not looked at here: pictures, and waiting for the disk."""
    monkeypatch.setattr("fl_server.recorder.Recorder._draw", lambda self: None)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def watched(traced, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Watched]:
    """`watched(3, "key=value", ...)`: a traced run with all of its local rounds."""

    def play(number: int, *settings: str) -> Watched:
        locals_: dict[tuple[int, int], Local] = {}
        known: list[Groups] = []
        honest, answer = fl_client.client.local_round, fl_client.app.app
        bound = FedPart.bind

        def local_round(net, data, methods, correction, optimizer, settings, **key):
            named = dict(net.named_parameters())
            local = Local(before=flat(net))
            local.trained = {name for name, p in named.items() if p.requires_grad}
            locals_[key["server_round"], key["partition"]] = local
            first = next(m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear))
            norms = [(n, m) for n, m in net.named_modules() if hasattr(m, "running_mean")]
            handles = [first.register_forward_hook(lambda *_: calls.append(1))]
            calls: list[int] = []

            def see(name):
                def hook(module, *_):
                    if torch.is_grad_enabled():
                        local.modes.add((name, module.training))

                return hook

            handles += [norm.register_forward_hook(see(name)) for name, norm in norms]
            step = optimizer.step

            def stepping(params, grads, lr, decay=0.0):
                local.stepped = sum(p.numel() for p in params)
                local.forwards.append(len(calls))
                calls.clear()
                step(params, grads, lr, decay)

            optimizer.step = stepping
            try:
                return honest(net, data, methods, correction, optimizer, settings, **key)
            finally:
                del optimizer.step
                for handle in handles:
                    handle.remove()
                local.after = flat(net)

        def app(message, context):
            reply = answer(message, context)
            if message.metadata.message_type == "train" and reply.has_content():
                at = int(message.metadata.group_id), int(context.node_config["partition-id"])
                locals_[at].uploaded = {
                    k: v.clone() for k, v in wire.vectors(reply.content).items()
                }
            return reply

        def bind(self, groups):
            known.append(groups)
            bound(self, groups)

        with monkeypatch.context() as patch:
            patch.setattr(fl_client.client, "local_round", local_round)
            patch.setattr(fl_client.app, "app", app)
            patch.setattr(FedPart, "bind", bind)
            trace = traced(number, *settings)
        return Watched(trace, locals_, known[0] if known else None)

    return play


# The schedule


def schedule(rounds: int, *, names: str = "abc", seed: int = 0, **params) -> list[str]:
    """The active groups of the first rounds, "abc" for all of three."""
    plan = Schedule(FedPartParams(**params), tuple(names), seed)
    return ["".join(plan.active(t)) for t in range(1, rounds + 1)]


def test_warm_up_opens_every_cycle():
    one = ["abc", "abc", "a", "a", "b", "b", "c", "c"]
    assert schedule(17, warm_up=2, rounds_per_group=2) == [*one, *one, "abc"]
    assert schedule(10, warm_up=1, rounds_per_group=1) == ["abc", *"abc", "abc", *"abc", "abc", "a"]


def test_or_the_first_one_only():
    opened = schedule(16, warm_up=2, rounds_per_group=2, reopen=False)
    assert opened == ["abc", "abc", *"aabbccaabbccaa"]
    assert schedule(7, warm_up=0, rounds_per_group=1) == list("abcabca")
    assert schedule(7, warm_up=0, rounds_per_group=1, reopen=False) == list("abcabca")


def test_reverse_is_sequential_mirrored():
    for reopen in (True, False):
        plain, mirrored = (
            schedule(24, warm_up=2, rounds_per_group=3, names="abcd", reopen=reopen, order=order)
            for order in ("sequential", "reverse")
        )
        assert "".join(mirrored[2:14]) == "dddcccbbbaaa" == "".join(plain[2:14])[::-1]
        assert mirrored[:2] == plain[:2] == ["abcd"] * 2
        assert [{"a": "d", "b": "c", "c": "b", "d": "a"}.get(g, g) for g in plain] == mirrored


@pytest.mark.parametrize("reopen", [True, False])
def test_random_draws_an_order_for_each_cycle(reopen):
    params = {"warm_up": 1, "rounds_per_group": 2, "order": "random", "reopen": reopen}
    cycle, names = 1 + 2 * 6, "abcdef"
    played = schedule(1 + 10 * 12 + (9 if reopen else 0), names=names, **params)
    assert played == schedule(len(played), names=names, **params)  # the same on every side
    partial = [group for group in played if group != names]
    assert len(played) - len(partial) == (10 if reopen else 1)
    cycles = ["".join(partial[start : start + 12]) for start in range(0, 120, 12)]
    for drawn in cycles:
        assert drawn[::2] == drawn[1::2]  # two rounds in a row
        assert sorted(drawn[::2]) == list(names)
    assert len(set(cycles)) > 5
    assert schedule(cycle, names=names, **params, seed=1) != played[:cycle]
    # What came before a round does not matter.
    assert Schedule(FedPartParams(**params), tuple(names), 0).active(77) == tuple(played[76])


@pytest.mark.parametrize("order", ["sequential", "reverse", "random"])
def test_a_cycle_visits_each_group_r_times_and_sends_w_plus_r_models(order):
    warm_up, r, size = 5, 2, dict(zip("abcdefghij", range(1, 11), strict=True))
    played = schedule(
        25, names="".join(size), warm_up=warm_up, rounds_per_group=r, order=order
    )  # FedPart's ResNet-8: 10 groups
    assert all(played.count(group) == r for group in size)
    sent = sum(size[group] for active in played for group in active)
    assert sent == (warm_up + r) * sum(size.values())


@pytest.mark.parametrize(
    ("cycles", "reopen", "groups", "rounds"),
    [(5, True, 10, 125), (3, True, 21, 141), (5, True, 8, 105), (3, False, 10, 65)],
)
def test_rounds_of_so_many_cycles(cycles, reopen, groups, rounds):
    """The first three are the paper's runs; 65 = 5 + 3 * 20."""
    params = FedPartParams(cycles=cycles, reopen=reopen)
    assert Schedule(params, tuple("abcdefghijklmnopqrstu"[:groups]), 0).rounds == rounds


def test_cycles_and_rounds_that_differ_are_told_with_the_remedy(runner, capsys):
    groups = "fedpart.groups=stem.*, stages.*, fc.*"
    settings = [*TINY, SMALL, groups, "clients.number=2", "fedpart.cycles=2", *SHORT]
    assert runner(*settings, "run.rounds=9").code == 3  # the shape is not known before
    assert (
        "run failed: fedpart.cycles = 2: over 3 groups these are 8 rounds, but run.rounds = 9; set "
        "run.rounds=8, or fedpart.cycles=0" in capsys.readouterr().out.splitlines()
    )
    assert runner(*settings, "run.rounds=8").code == 0
    assert runner(*settings, "fedpart.reopen=false", "run.rounds=7").code == 0


@pytest.mark.parametrize(
    ("rounds", "told"),
    [
        (5, "all of them are full rounds, as fedavg's (fedpart.warm-up = 5); a cycle is 11 rounds"),
        (6, "a cycle is 11 rounds; groups that get all their partial rounds: 0 of 3"),
        (10, "a cycle is 11 rounds; groups that get all their partial rounds: 2 of 3"),
        (11, ""),
        (12, ""),
    ],
)
def test_a_run_that_ends_before_its_first_cycle_is_told_so(rounds, told):
    config = resolve({"strategy.name": "fedpart", "run.rounds": rounds})
    strategy = FedPart(config)
    strategy.bind(Groups({"a": (0,), "b": (1,), "c": (2,)}, (1, 1, 1)))
    expected = [f"fedpart with run.rounds = {rounds}: {told}"] if told else []
    assert strategy.warnings(config, {}) == expected


def test_settings_of_batchnorm_without_one_are_told_to_have_no_effect():
    settings = {"fedpart.bn-stats": "local", "fedpart.bn-frozen": "eval", "run.rounds": 20}
    config = resolve({"strategy.name": "fedpart", **settings})
    strategy = FedPart(config)
    strategy.bind(Groups({"a": (0,)}, (1,)))
    w = torch.zeros(1)
    assert strategy.warnings(config, {PARAMS: w}) == [
        'fedpart.bn-stats = "local" has no effect without BatchNorm',
        'fedpart.bn-frozen = "eval" has no effect without BatchNorm',
    ]
    assert strategy.warnings(config, {PARAMS: w, STATS: w}) == []


# A partial round


def test_what_is_not_active_stays_bit_for_bit_and_is_not_sent(watched):
    """ResNet-8: in each of ten partial rounds one of ten groups, and all 18 statistics, change."""
    run = watched(2, *TINY, "model.name=resnet8", *SHORT, "run.rounds=11")
    groups, moments = run.groups, run.trace.moments
    assert len(groups.names) == 10
    net = build("resnet8", classes=4, shape=(3, 16, 16))
    net_names = [name for name, _ in net.named_parameters()]
    for t in range(1, 12):
        active = groups.names if t == 1 else (groups.names[t - 2],)
        expected = {net_names[i] for g in active for i in groups.members[g]}
        start, end = (as_tensors(moments[t + when].model) for when in (-1, 0))
        assert len(run.of(t)) == 2
        for _, local in run.of(t):
            assert local.trained == expected
            assert local.stepped == sum(map(groups.numel, active))
            assert same(local.before, start)
            assert set(local.uploaded) == {*active, STATS, COUNTERS}
            for model in (local.after, end):
                for group in groups.names:
                    part, was = (groups.part(group, v[PARAMS]) for v in (model, start))
                    assert torch.equal(part, was) == (group not in active), (t, group)
                statistics = zip(pieces(model[STATS]), pieces(start[STATS]), strict=True)
                assert not any(torch.equal(new, old) for new, old in statistics)
            for group in active:
                assert torch.equal(local.uploaded[group], groups.part(group, local.after[PARAMS]))
            assert torch.equal(local.uploaded[STATS], local.after[STATS])
    up = [row["bytes_up"] for row in run.trace.result.history]
    buffers = 4 * 2688 + 8 * 9
    total = sum(groups.sizes)  # W + r = 2 models in a cycle
    assert sum(up) == 2 * (2 * 4 * total + 11 * buffers)


def pieces(stats: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """ResNet-8's running means and variances."""
    channels = [64, 64, 64, 128, 128, 128, 256, 256, 256]
    return stats.split([c for c in channels for _ in range(2)])


def as_tensors(model: dict[str, np.ndarray]) -> Arrays:
    return {kind: torch.from_numpy(array) for kind, array in model.items()}


def same(ours: Arrays, theirs: Arrays) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_the_active_group_is_averaged_by_samples_over_those_who_answered(watched):
    run = watched(4, *DIGITS, *SHORT, "run.rounds=5", "clients.per-round=3", "data.alpha=0.5")
    samples = json.loads((run.trace.result.folder / "clients.json").read_text())["samples"]
    for t in range(1, 6):
        end = as_tensors(run.trace.moments[t].model)
        cohort = run.of(t)
        assert [i for i, _ in cohort] == sorted(run.trace.cohorts[t - 1])
        assert len(cohort) == 3
        weights = [samples[i] for i, _ in cohort]
        assert len(set(weights)) > 1
        for group in set(cohort[0][1].uploaded) - {COUNTERS}:
            total = torch.zeros(cohort[0][1].uploaded[group].shape, dtype=torch.float64)
            for n, (_, local) in zip(weights, cohort, strict=True):
                total.add_(local.uploaded[group], alpha=n)
            mean = (total / sum(weights)).float()
            found = end[STATS] if group == STATS else run.groups.part(group, end[PARAMS])
            assert torch.equal(mean, found), (t, group)


def test_what_goes_down_is_what_changed_since_a_client_last_answered(watched):
    """A_{t-1} alone when all take part; after a break, all that was active meanwhile."""
    run = watched(3, *DIGITS, *SHORT, "run.rounds=9")
    alone = [(group,) for group in CNN]
    active = [CNN, *alone, CNN, *alone, CNN]
    down = [row["bytes_down"] for row in run.trace.result.history]
    before = [CNN, *active[:-1]]  # at first nobody has anything
    assert down == [3 * (S + 4 * sum(SIZES[g] for g in groups)) for groups in before]

    run = watched(5, *DIGITS, *SHORT, "run.rounds=10", "clients.per-round=2")
    active = [CNN if t % 4 == 1 else (CNN[(t - 2) % 4],) for t in range(1, 11)]
    assert active[:5] == [CNN, ("conv1",), ("conv2",), ("fc",), CNN]
    last: dict[int, int] = {}
    partial = 0
    for t, row in enumerate(run.trace.result.history, start=1):
        expected = 0
        for i in row["cohort"]:
            missing = {g for r in range(last[i], t) for g in active[r - 1]} if i in last else CNN
            expected += S + 4 * sum(SIZES[g] for g in missing)
            partial += len(missing) == 2
            last[i] = t
        assert row["bytes_down"] == expected <= 2 * (4 * N + S)
        assert row["bytes_up"] == 2 * (S + 4 * sum(SIZES[g] for g in active[t - 1]))
    assert partial


def test_a_reply_with_another_group_than_the_active_one_is_rejected(traced, monkeypatch):
    """The server says what is active; who trains something else does not count."""
    answer = fl_client.app.app

    def app(message, context):
        train = message.metadata.message_type == "train"
        if train and context.node_config["partition-id"] == 1:
            message.content[wire.CONFIG]["active"] = ["conv2"]
        return answer(message, context)

    monkeypatch.setattr(fl_client.app, "app", app)
    trace = traced(3, *DIGITS, *SHORT, "run.rounds=4")
    replies = [row["replies"] for row in trace.result.history]
    assert replies == [[0, 2], [0, 2], [0, 1, 2], [0, 2]]
    reason = trace.result.history[1]["rejected"]["1"]
    assert reason == "arrays (conv2, counters, stats) instead of (conv1, counters, stats)"


# One group that covers the model


@pytest.mark.parametrize(
    "more",
    [
        [SMALL],
        [SMALL, "train.momentum=0.9", "train.weight-decay=0.01", "sync.mode=full"],
        [HEAD, "regularizers=moon", "eval.models=cloud,sel,all"],
        [SMALL, "eval.on=both", "train.clip-norm=1"],
    ],
)
def test_one_group_that_covers_the_model_is_fedavg(runner, more):
    settings = ["clients.number=3", "clients.per-round=2", "run.rounds=5", *more]
    ours = runner(*TINY, *SHORT, "fedpart.groups=*", *settings)
    theirs = runner(*TINY[:-1], *settings)
    assert ours.code == theirs.code == 0
    assert ours.summary["strategy"] == "fedpart" != theirs.summary["strategy"]
    assert ours.summary["model_sha256"] == theirs.summary["model_sha256"]
    rows = [
        [{k: v for k, v in row.items() if not k.startswith("bytes")} for row in run]
        for run in (ours.history_less_times, theirs.history_less_times)
    ]
    assert rows[0] == rows[1]


# BatchNorm


def test_local_statistics_stay_with_their_client(watched):
    """The parameters are the server's; the server has the first client's statistics."""
    run = watched(CLIENTS, *TINY, SMALL, *SHORT, LOCAL, "clients.per-round=2", "run.rounds=9")
    own: dict[int, torch.Tensor] = {}
    kept = 0
    for t in range(1, 10):
        start, end = (as_tensors(run.trace.moments[t + when].model) for when in (-1, 0))
        cohort = run.of(t)
        for i, local in cohort:
            assert torch.equal(local.before[PARAMS], start[PARAMS])
            assert torch.equal(local.before[STATS], own.get(i, start[STATS]))
            kept += i in own and not torch.equal(own[i], start[STATS])
            own[i] = local.after[STATS]
        assert torch.equal(end[STATS], cohort[0][1].after[STATS])
    assert kept > 5


OWN = [*ON_CPU, FEDPART, *SHORT, LOCAL]


@pytest.mark.parametrize("on", ["clients", "both"])
def test_clients_evaluate_with_their_own_statistics(runner, on):
    """What a client finds after a round, it finds before its next one too."""
    settings = [*OWN, "clients.number=3"]
    result = runner(*settings, "clients.per-round=2", "run.rounds=4", f"eval.on={on}")
    assert result.code == 0
    for last, row in itertools.pairwise(result.history):
        known = last["client_accuracy"]
        assert row["client_accuracy_before"] == {str(i): known[str(i)] for i in row["replies"]}


@pytest.mark.parametrize("disk", [True, False])
def test_statistics_that_were_lost_before_an_evaluation_are_given_back(
    runner, monkeypatch, tmp_path, disk
):
    place = tmp_path / "state"
    settings = [*OWN, "eval.on=clients", "clients.number=2"]
    settings += ["run.rounds=2", *([f"client.state-dir={place}"] if disk else [])]
    whole = runner(*settings)
    evaluate, given = Clients.evaluate, []

    def forgetful(self, partition, content, state):
        given.append(wire.MEMORY in content)
        if wire.MEMORY not in content:
            shutil.rmtree(place, ignore_errors=True)
            for key in [*state]:
                del state[key]
        return evaluate(self, partition, content, state)

    monkeypatch.setattr(Clients, "evaluate", forgetful)
    lossy = runner(*settings)
    assert lossy.history_less_times == whole.history_less_times
    assert given == [False, False, True, True] * 2


def test_moon_remembers_the_same_statistics(traced):
    trace = traced(2, *TINY, HEAD, *SHORT, "regularizers=moon", LOCAL, "run.rounds=2")
    for memory in trace.moments[-1].clients.values():
        assert np.array_equal(memory["moon.stats"], memory["strategy.stats"])


def test_moons_global_model_has_the_clients_own_statistics(traced, monkeypatch):
    """As in the authors' code: it is a copy of the model that the client starts from."""
    seen: list[tuple[Arrays, Arrays]] = []
    begin = MOON.begin

    def begun(self, net, sent, memory):
        begin(self, net, sent, memory)
        if self.references:
            held = self.references[0].items()
            reference = {k.removeprefix("net."): v.clone() for k, v in held}
            seen.append((reference, {k: v.clone() for k, v in net.state_dict().items()}))

    monkeypatch.setattr(MOON, "begin", begun)
    local = [*TINY, HEAD, *SHORT, "regularizers=moon", LOCAL]
    traced(2, *local, "run.rounds=3")
    assert len(seen) == 4
    for reference, start in seen:
        assert all(torch.equal(reference[name], tensor) for name, tensor in start.items())


NORMS = {
    "stem.1": 8,
    "stages.0.0.norm1": 8,
    "stages.0.0.norm2": 8,
    "stages.1.0.norm1": 32,
    "stages.1.0.norm2": 32,
    "stages.1.0.shortcut.norm": 32,
}
"""Of the small network, with their channels, one for each group but the classifier."""


def test_frozen_norms_use_and_keep_their_statistics(watched):
    """bn-frozen=eval: running statistics of the active group's norm alone change."""
    settings = [*TINY, SMALL, *SHORT, "run.rounds=8"]
    run = watched(2, *settings, "fedpart.bn-frozen=eval")
    ends = np.cumsum([2 * c for c in NORMS.values()])
    places = {n: slice(end - 2 * c, end) for (n, c), end in zip(NORMS.items(), ends, strict=True)}
    active = [list(NORMS), *([norm] for norm in NORMS), []]
    for t, norms in enumerate(active, start=1):
        start, end = (as_tensors(run.trace.moments[t + when].model) for when in (-1, 0))
        for _, local in run.of(t):
            assert local.modes == {(norm, norm in norms) for norm in NORMS}
            for model in (local.after, end):
                for norm, place in places.items():
                    kept = torch.equal(model[STATS][place], start[STATS][place])
                    assert kept == (norm not in norms), (t, norm)
    plain = watched(2, *settings)
    for local in plain.locals.values():
        assert local.modes == {(norm, True) for norm in NORMS}


@pytest.mark.parametrize("more", [[SMALL, "eval.on=both"], [HEAD, "regularizers=moon"]])
def test_frozen_norms_stay_frozen_whoever_looks_at_the_network(watched, more):
    """Evaluation before training and MOON's other passes switch modes too."""
    run = watched(2, *TINY, *SHORT, *more, "fedpart.bn-frozen=eval", "run.rounds=8")
    for t, active in enumerate(NORMS, start=2):
        for _, local in run.of(t):
            assert local.modes == {(norm, norm == active) for norm in NORMS}, t


# With other methods


def test_the_proximal_term_is_on_the_active_group_alone(watched):
    """Two full-batch steps by hand: g <- grad + mu (theta_g - w_g), nothing else moves."""
    mu, lr = 2.0, 0.05
    more = {"train.batch-size": 7, "train.epochs": 2, "run.rounds": 8, "clients.number": 2}
    given = {"data.source": f"{HERE}:tiny", "data.partition": "iid", "train.device": "cpu"}
    values = {**given, **more, "train.lr": lr, "model.name": f"{HERE}:small"}
    settings = [FEDPART, *SHORT, *(f"{key}={value}" for key, value in values.items())]
    run = watched(2, *settings, "regularizers=proximal", f"proximal.mu={mu}")
    clients = fl_client.client.Clients(resolve(values))
    clients._make_resident()
    net, groups = clients.net, run.groups
    params = list(net.parameters())
    for t, active in enumerate(groups.names, start=2):
        for i, local in run.of(t):
            clients._install(local.before)
            net.train()
            data = clients.local_data(i)
            mine = [params[j] for j in groups.members[active]]
            start = [p.detach().clone() for p in mine]
            for x, y in batches(data, clients.config.train, (0, t, i)):
                grads = torch.autograd.grad(cross_entropy(net(x), y), mine)
                with torch.no_grad():
                    for p, g, w in zip(mine, grads, start, strict=True):
                        p -= lr * (g + mu * (p - w))
            found = groups.part(active, local.after[PARAMS])
            torch.testing.assert_close(found, concatenate(mine), rtol=1e-5, atol=1e-6)
            assert not torch.equal(found, groups.part(active, local.before[PARAMS]))
    free = watched(2, *settings)
    none = watched(2, *settings, "regularizers=proximal", "proximal.mu=0")
    ours, theirs, zero = (r.trace.result.summary["model_sha256"] for r in (run, free, none))
    assert zero == theirs != ours


def test_moon_looks_twice_more_where_it_has_a_gradient_and_nowhere_else(watched):
    """z does not depend on the classifier: rounds of fc alone need no z_g and no z_p."""
    settings = [*TINY, *SHORT, HEAD, THREE, "regularizers=moon", "moon.mu=5", "run.rounds=8"]
    run = watched(CLIENTS, *settings)
    # In round 1 nobody has a previous model.
    expected = [1, 3, 3, 1, 3, 3, 3, 1]
    for t, calls in enumerate(expected, start=1):
        for _, local in run.of(t):
            assert local.forwards == [calls] * STEPS, t
    # z_p is the client's whole last model, frozen groups included.
    for t in range(1, 9):
        for i, local in run.of(t):
            memory = run.trace.moments[t].clients[i]
            ledger = run.trace.moments[t].ledger[i]
            for kind in (PARAMS, STATS, COUNTERS):
                assert np.array_equal(memory[f"moon.{kind}"], local.after[kind].numpy())
                assert np.array_equal(ledger[f"moon.{kind}"], local.after[kind].numpy())


def test_moons_gradient_reaches_the_active_group(watched):
    settings = [*TINY, *SHORT, HEAD, THREE, "run.rounds=4"]
    plain = watched(CLIENTS, *settings)
    off = watched(CLIENTS, *settings, "regularizers=moon", "moon.mu=0")
    run = watched(CLIENTS, *settings, "regularizers=moon", "moon.mu=5")
    # In round 1 nobody has a previous model, and no term.
    assert np.array_equal(run.trace.w[1], plain.trace.w[1])
    assert not np.array_equal(run.trace.w[2], plain.trace.w[2])
    assert np.array_equal(off.trace.w, plain.trace.w)


@pytest.mark.parametrize("name", methods("regularizers"))
def test_every_regularizer_goes_with_partial_rounds(watched, name):
    """Of a convolution, of a shortcut, of a linear layer: nine groups."""
    drops = ["stochastic-depth.p-l=0.5"] if name == "stochastic-depth" else []
    run = watched(
        CLIENTS, *TINY, *SHORT, HEAD, f"regularizers={name}", "run.rounds=10",
        "clients.per-round=2", *drops,
    )  # fmt: skip
    assert len(run.groups.names) == 9
    for t, group in enumerate(run.groups.names, start=2):
        row = run.trace.result.history[t - 1]
        assert len(row["replies"]) == 2, row
        assert all(np.isfinite(row[key]) for key in ("client_loss", "loss", "accuracy"))
        start, end = (as_tensors(run.trace.moments[t + when].model) for when in (-1, 0))
        assert all(torch.isfinite(tensor).all() for tensor in end.values())
        moved = {
            other for other in run.groups.names
            if not torch.equal(*(run.groups.part(other, m[PARAMS]) for m in (start, end)))
        }  # fmt: skip
        assert moved == {group} or (drops and not moved), t


def test_a_step_that_drops_the_active_layers_trains_nothing(watched):
    """Stochastic depth: without the last block's residual its layers have no gradient."""
    groups = "fedpart.groups=stages.1.0.[cn]*, stem.*+stages.0.*+stages.1.0.shortcut.*+fc.*"
    run = watched(
        CLIENTS, *TINY, SMALL, "regularizers=stochastic-depth", "stochastic-depth.p-l=1e-9", groups,
        "fedpart.warm-up=0", "fedpart.rounds-per-group=1", "run.rounds=2",
    )  # fmt: skip
    for row in run.trace.result.history:
        assert row["replies"] == [0, 1, 2], row["failed"]
        assert np.isfinite(row["client_loss"])
    assert np.array_equal(run.trace.w[0], run.trace.w[1])
    assert not np.array_equal(run.trace.w[1], run.trace.w[2])


class Spare(nn.Module):
    """A layer that the forward pass never meets."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.spare = nn.Linear(3, 3)
        self.first, self.fc = nn.Linear(int(np.prod(shape)), 4), nn.Linear(4, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.first(x.flatten(1)).relu())


def test_a_layer_that_is_never_met_has_its_rounds_too(watched):
    run = watched(
        CLIENTS, *TINY, "model.name=tests.strategies.test_fedpart:Spare", *SHORT, "run.rounds=4"
    )
    assert run.groups.names == ("first", "fc", "spare")
    for row in run.trace.result.history:
        assert row["replies"] == [0, 1, 2], row["failed"]
    assert np.array_equal(run.trace.w[3], run.trace.w[4])


@pytest.fixture
def evaluated(monkeypatch) -> list[Arrays]:
    """The models that the server evaluates, one after the other."""
    seen: list[Arrays] = []
    evaluate = Evaluator.evaluate

    def on_server(self, model):
        seen.append({kind: vector.clone() for kind, vector in model.items()})
        return evaluate(self, model)

    monkeypatch.setattr(Evaluator, "evaluate", on_server)
    return seen


def test_the_means_of_the_clients_models_are_of_whole_models(watched, evaluated):
    """eval.models: sel is the plain mean of the cohort's, all of everyone's last."""
    run = watched(
        3, *TINY, SMALL, *SHORT, "clients.per-round=2", "run.rounds=8", "eval.models=cloud,sel,all"
    )
    first = as_tensors(run.trace.moments[0].model)
    last = {i: {**first} for i in range(3)}
    for t in range(1, 9):
        cloud, sel, all_ = evaluated[3 * t - 3 : 3 * t]
        assert same(cloud, as_tensors(run.trace.moments[t].model))
        last |= {i: local.after for i, local in run.of(t)}
        for found, models in ((sel, [m.after for _, m in run.of(t)]), (all_, [*last.values()])):
            mean = sum(model[PARAMS].double() for model in models) / len(models)
            torch.testing.assert_close(found[PARAMS].double(), mean, rtol=0, atol=1e-7)


@pytest.mark.parametrize("strategy", ["fedavg", "fedpart"])
def test_the_global_model_with_the_first_clients_statistics(watched, evaluated, strategy):
    """eval.models=first, with a cohort that the clients take turns in."""
    own = [*TINY, SMALL, "clients.per-round=2", "run.rounds=6", f"strategy.name={strategy}"]
    run = watched(3, *own, *SHORT * (strategy == "fedpart"), "eval.models=first")
    assert {run.of(t)[0][0] for t in range(1, 7)} == {0, 1}
    for t, row in enumerate(run.trace.result.history, start=1):
        cloud, first = evaluated[2 * t - 2 : 2 * t]
        assert same(cloud, as_tensors(run.trace.moments[t].model))
        assert same(first, cloud | {STATS: run.of(t)[0][1].after[STATS]})
        assert not torch.equal(first[STATS], cloud[STATS])
        assert row["loss_first"] != row["loss"]


def test_the_first_clients_statistics_are_those_of_local_ones(watched):
    """Averaged or local, they leave training as it is; both evaluate alike until a client's own
    differ from those that it was sent."""
    averaged = watched(3, *TINY, SMALL, *SHORT, "run.rounds=4", "eval.models=first")
    local = watched(3, *TINY, SMALL, *SHORT, "run.rounds=4", LOCAL)
    for t in range(1, 5):
        one, other = (as_tensors(run.trace.moments[t].model) for run in (averaged, local))
        assert torch.equal(one[PARAMS], other[PARAMS])
    one, other = (run.trace.result.history[0] for run in (averaged, local))
    assert one["loss_first"] == other["loss"] != one["loss"]


def test_a_network_without_statistics_is_evaluated_as_it_is(runner):
    first = runner("model.norm=group", *DIGITS, "run.rounds=1", "eval.models=first").history[0]
    assert first["loss_first"] == first["loss"]


def test_an_optimizer_that_is_kept_is_refused(runner, capsys):
    code = runner(*DIGITS, "train.momentum=0.9", "train.keep-optimizer=true").code
    assert code == 2
    said = capsys.readouterr()
    assert (
        "train.keep-optimizer = true: not with strategy.name=fedpart, whose optimizer has another "
        "group's state; leave it at false" in said.err + said.out
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_momentum_and_decay_touch_no_frozen_tensor(watched, optimizer):
    """And end with their round: it would be another group's."""
    more = [f"train.optimizer={optimizer}", "train.weight-decay=0.1", "train.clip-norm=1"]
    if optimizer == "sgd":
        more.append("train.momentum=0.9")
    run = watched(2, *TINY, SMALL, *SHORT, *more, "run.rounds=8")
    for t, active in enumerate(run.groups.names, start=2):
        start = as_tensors(run.trace.moments[t - 1].model)
        for _, local in run.of(t):
            for group in run.groups.names:
                parts = [run.groups.part(group, m[PARAMS]) for m in (start, local.after)]
                assert torch.equal(*parts) == (group != active)


def test_patterns_that_do_not_fit_the_model_are_refused_with_a_line(runner, capsys):
    result = runner(*DIGITS, "fedpart.groups=conv1.*, fc.*")
    assert result.code == 2
    assert not result.folder.exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: fedpart.groups = "conv1.*, fc.*": ') and "in no group" in line


PARTLY = """
from torch import nn


class Net(nn.Sequential):
    def __init__(self, shape, classes):
        super().__init__(
            nn.Linear(*shape, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, classes)
        )
        self[0].requires_grad_(False)
"""


def test_a_network_that_trains_a_part_of_itself(runner, tmp_path, monkeypatch):
    """Every round trains something, and every gradient that there is has its norm recorded."""
    (tmp_path / "partly.py").write_text(PARTLY)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = runner(
        "data.source=breast-cancer", "model.name=partly:Net", "clients.number=2", "run.rounds=3",
        "strategy.name=fedpart", "fedpart.warm-up=1", "fedpart.rounds-per-group=1",
        "eval.grad-norm=true", "train.device=cpu",
    )  # fmt: skip
    assert result.code == 0
    recorded = [sorted(row["grad_norm"]) for row in result.history]
    assert recorded == [["2", "4", "all"], ["2", "all"], ["4", "all"]]
    assert all(min(norms) > 0 for row in result.history for norms in row["grad_norm"].values())


# A run that is cut


@pytest.mark.parametrize(
    "more",
    [
        ["fedpart.order=random"],
        ["fedpart.bn-stats=local", "client.state-dir={}"],
        ["fedpart.bn-stats=local", "server.checkpoint-every=2"],
        [HEAD, "regularizers=moon", "eval.on=both", "fedpart.order=reverse"],
    ],
)
def test_a_run_that_is_cut_in_a_cycle_and_resumed_gives_the_same_bits(runner, tmp_path, more):
    """History and bytes included, by a process that knows nothing."""
    own = [
        *TINY, SMALL, "clients.number=3", "clients.per-round=2", "fedpart.warm-up=1",
        *(setting.format(tmp_path / "state") for setting in more),
    ]  # fmt: skip
    own = [s for s in own if s != SMALL or HEAD not in own]  # the last of a key
    whole = runner(*own, "run.rounds=9")
    fl_client.app.release()
    cut = runner(*own, "run.rounds=4")
    assert cut.summary["model_sha256"] != whole.summary["model_sha256"]
    fl_client.app.release()
    assert main(["resume", str(cut.folder), "run.rounds=9"]) == 0
    assert cut.summary["model_sha256"] == whole.summary["model_sha256"]
    assert cut.history_less_times == whole.history_less_times
    assert cut.summary["bytes_down"] == whole.summary["bytes_down"]

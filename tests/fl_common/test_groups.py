"""Groups of layers: which parameters belong together, and where they lie in a model's vector."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from fl_common.groups import Groups
from fl_common.layout import COUNTERS, PARAMS, STATS, concatenate
from fl_common.models.catalogue import MODELS, build

IMAGE = (3, 32, 32)

# FedPart's tables: parameters by group, in the order of the forward pass, for 10 classes.
RESNET8 = [9536, 36992, 36992, 73984, 147712, 8448, 295424, 590336, 33280, 2570]
RESNET18 = [
    9536, *4 * [36992],
    73984, 147712, 8448, *2 * [147712],
    295424, 590336, 33280, *2 * [590336],
    1180672, 2360320, 132096, *2 * [2360320],
    512 * 10 + 10,
]  # fmt: skip
STAGE0 = [f"stages.0.0.conv{i}" for i in (1, 2)]
STAGES = [f"stages.{s}.0.{part}" for s in (1, 2) for part in ("conv1", "conv2", "shortcut.conv")]


def members(net: nn.Module, groups: Groups) -> dict[str, list[str]]:
    """The names of the parameters of each group."""
    names = [name for name, _ in net.named_parameters()]
    return {group: [names[i] for i in indices] for group, indices in groups.members.items()}


def vector(net: nn.Module) -> torch.Tensor:
    """Every element another."""
    return torch.arange(float(sum(p.numel() for p in net.parameters())))


def test_resnet8_has_the_published_groups():
    net = build("resnet8", classes=10, shape=IMAGE)
    groups = Groups.of(net, IMAGE)
    assert list(groups.names) == ["stem.conv", *STAGE0, *STAGES, "fc"]
    assert [groups.numel(name) for name in groups.names] == RESNET8
    assert sum(RESNET8) == 1_235_274
    found = members(net, groups)
    assert all(len(names) == 3 for group, names in found.items() if group != "fc")
    assert found["fc"] == ["fc.weight", "fc.bias"]
    # A shortcut is a group of its own, with its norm and nothing else.
    assert {name.rpartition(".")[0] for name in found["stages.1.0.shortcut.conv"]} == {
        "stages.1.0.shortcut.conv", "stages.1.0.shortcut.norm",
    }  # fmt: skip


def test_resnet18_has_the_published_groups():
    net = build("resnet18-imagenet", classes=10, shape=IMAGE)
    groups = Groups.of(net, IMAGE)
    assert len(groups.names) == 21
    assert [groups.numel(name) for name in groups.names] == RESNET18
    assert sum(RESNET18) == 11_181_642


def test_groups_do_not_depend_on_the_norms_kind_nor_on_the_head():
    plain = Groups.of(build("resnet8", classes=10, shape=IMAGE), IMAGE)
    grouped = build("resnet8", classes=10, shape=IMAGE, norm="group")
    assert Groups.of(grouped, IMAGE) == plain
    head = build("resnet8", classes=10, shape=IMAGE, head="moon")
    assert Groups.of(head, IMAGE).names == (*plain.names[:-1], "head.fc1", "head.fc2", "fc")


@pytest.mark.parametrize("name", MODELS)
def test_groups_of_every_model_are_disjoint_and_cover_it(name):
    info = MODELS[name]
    shape = (256, 32) if info.input == "tokens" else IMAGE
    net = build(name, classes=10, shape=shape, norm=info.norms[0] if info.norms else "batch")
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    groups = Groups.of(net, shape)
    found = sorted(i for indices in groups.members.values() for i in indices)
    assert found == list(range(len(list(net.parameters()))))
    assert list(groups.sizes) == [p.numel() for p in net.parameters()]
    assert sum(map(groups.numel, groups.names)) == sum(groups.sizes)
    # To look for them leaves the network as it was: its mode, its buffers, no hooks.
    assert net.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    assert not any(module._forward_pre_hooks for module in net.modules())
    # A layer's weight and bias are together, and every group begins with a layer, not a norm.
    for group, names in members(net, groups).items():
        assert names[0] == f"{group}.weight"
        owners = {n.rpartition(".")[0] for n in names}
        norms = {
            n for n, m in net.named_modules()
            if isinstance(m, nn.BatchNorm2d | nn.GroupNorm) and n in owners
        }  # fmt: skip
        assert owners == {group} | norms


class Crossed(nn.Module):
    """Registered in another order than that of the forward pass, and with all oddities."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.late_norm = nn.LayerNorm(4)
        self.unused = nn.Linear(2, 3)
        self.last = nn.Linear(4, 4)
        self.first = nn.Linear(3, 4, bias=False)
        self.scale = nn.Parameter(torch.ones(1))
        self.norm = nn.BatchNorm1d(3)
        self.unused_norm = nn.LayerNorm(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.norm(x))
        return self.fc(self.late_norm(self.last(self.last(x)))) * self.scale


def test_the_order_is_that_of_the_forward_pass():
    net = Crossed()
    groups = Groups.of(net, (3,))
    assert members(net, groups) == {
        # The network's own parameter; a norm that no layer stands before is with it.
        "model": ["scale", "norm.weight", "norm.bias"],
        "first": ["first.weight"],
        "last": ["late_norm.weight", "late_norm.bias", "last.weight", "last.bias"],
        "fc": ["fc.weight", "fc.bias"],
        # Never met: last, by registration.
        "unused": ["unused.weight", "unused.bias", "unused_norm.weight", "unused_norm.bias"],
    }
    assert list(groups.names) == ["model", "first", "last", "fc", "unused"]


def test_a_norm_before_any_layer_is_a_group_that_a_layer_does_not_join():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.LayerNorm(3), nn.Linear(3, 4), nn.RMSNorm(4))
    assert members(net, Groups.of(net, (3,))) == {
        "0": ["0.weight", "0.bias", "1.weight", "1.bias"],
        "2": ["2.weight", "2.bias", "3.weight"],
    }


def test_a_tied_weight_is_with_the_layer_that_meets_it_first():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decode, self.encode = nn.Linear(3, 3), nn.Linear(3, 3)
            self.decode.weight = self.encode.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.decode(self.encode(x))

    net = Tied()
    found = members(net, Groups.of(net, (3,)))
    # PyTorch names the shared tensor by its first registration.
    assert found == {"encode": ["decode.weight", "encode.bias"], "decode": ["decode.bias"]}
    assert list(found) == ["encode", "decode"]


def test_a_layer_whose_tensors_are_all_another_ones_makes_no_group():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    assert Groups.of(Shared(), (3,)).names == ("a",)


@pytest.mark.parametrize("bias", [True, False])
def test_a_parametrized_layer_is_one_group(bias: bool):
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3, bias=bias))
    net = nn.Sequential(nn.Linear(3, 3), normed, nn.LayerNorm(3), nn.Linear(3, 2))
    groups = Groups.of(net, (3,))
    assert groups.names == ("0", "1", "3")
    assert groups.numel("1") == 3 + 9 + 3 * bias + 6


@pytest.mark.parametrize("name", [STATS, COUNTERS, PARAMS])
def test_a_layer_cannot_have_the_name_of_what_travels_beside_groups(name):
    net = nn.Sequential()
    net.add_module(name, nn.Linear(3, 3))
    net.add_module("fc", nn.Linear(3, 2))
    with pytest.raises(ValueError, match=name):
        Groups.of(net, (3,))


def test_one_group_of_all_is_the_vector_of_other_strategies():
    net = Crossed()
    groups = Groups.whole(net)
    assert groups.names == (PARAMS,)
    whole = vector(net)
    assert groups.part(PARAMS, whole) is whole
    flat = {PARAMS: whole, STATS: torch.zeros(3)}
    assert groups.joined(flat) is flat


@pytest.mark.parametrize(("first", "second"), [((0,), (0, 1)), ((0,), ()), ((0, 1), (2,))])
def test_groups_that_overlap_or_leave_something_out_are_refused(first, second):
    with pytest.raises(ValueError, match="exactly once"):
        Groups({"a": first, "b": second}, (3, 4))


# Patterns


def test_patterns_are_groups_in_their_order():
    net = Crossed()
    patterns = " fc.* + unused*,last.*, n*.weight+first.*+norm.bias+late*, scale"
    groups = Groups.matching(net, patterns)
    assert members(net, groups) == {
        "fc.* + unused*": [
            "fc.weight", "fc.bias", "unused.weight", "unused.bias", "unused_norm.weight",
            "unused_norm.bias",
        ],
        "last.*": ["last.weight", "last.bias"],
        "n*.weight+first.*+norm.bias+late*": [
            "late_norm.weight", "late_norm.bias", "first.weight", "norm.weight", "norm.bias",
        ],
        "scale": ["scale"],
    }  # fmt: skip
    assert [name[:2] for name in groups.names] == ["fc", "la", "n*", "sc"]


def test_a_pattern_matches_whole_names():
    """Not part of one: conv1 is not in stages.0.conv1, nor conv10 in conv1.*."""
    net = nn.ModuleDict({"conv1": nn.Linear(2, 2), "conv10": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=re.escape("conv10.weight, conv10.bias: in no group")):
        Groups.matching(net, "conv1.*")
    net = nn.ModuleDict({"a": nn.ModuleDict({"conv1": nn.Linear(2, 2)})})
    with pytest.raises(ValueError, match="no parameter has such a name"):
        Groups.matching(net, "conv1.*")


WRONG = {
    "fc.*, nothing.*": "nothing.*: no parameter has such a name; see `flatfed groups`",
    "FC.*": "FC.*: no parameter has such a name",
    "*, fc.bias": "fc.bias is in * and in fc.bias",
    "fc.*+*.bias": "fc.bias is in fc.*+*.bias and in fc.*+*.bias",
    "fc.*, fc.*": "fc.weight is in fc.* and in fc.*",
    "fc.*": "scale, late_norm.weight, late_norm.bias and 9 more: in no group",
    "fc.*, l*, u*, norm.*, scale": "first.weight: in no group",
    " , ,": "scale, fc.weight, fc.bias and 11 more: in no group",
}


@pytest.mark.parametrize("patterns", WRONG)
def test_patterns_that_are_wrong(patterns):
    with pytest.raises(ValueError) as wrong:
        Groups.matching(Crossed(), patterns)
    assert WRONG[patterns] in str(wrong.value)
    assert "\n" not in str(wrong.value)


# Networks that train a part of themselves


def frozen(*layers: str) -> Crossed:
    net = Crossed()
    for layer in layers:
        net.get_submodule(layer).requires_grad_(False)
    return net


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        (["first", "last", "late_norm"], [["model"], ["first", "last", "fc"], ["unused"]]),
        # The last ones go with the one before; of a layer that trains its norm it trains something.
        (["fc", "unused", "unused_norm"], [["model"], ["first"], ["last", "fc", "unused"]]),
        (["last"], [["model"], ["first"], ["last"], ["fc"], ["unused"]]),
        ([""], [["model", "first", "last", "fc", "unused"]]),
    ],
)
def test_what_a_network_does_not_train_is_no_group_of_its_own(layers, names):
    apart = members(Crossed(), Groups.of(Crossed(), (3,)))
    joined = members(frozen(*layers), Groups.of(frozen(*layers), (3,)))
    assert [set(found) for found in joined.values()] == [
        {parameter for name in together for parameter in apart[name]} for together in names
    ]


def test_a_group_of_which_the_network_trains_nothing_is_refused():
    why = re.escape(
        "fc.bias+last.*: the network trains none of its parameters; join it to another with +"
    )
    with pytest.raises(ValueError, match=why):
        Groups.matching(
            frozen("fc", "last"), "fc.bias+last.*, fc.weight+first.*+scale, *norm*, unused.*"
        )


def test_norms_are_of_the_parameters_that_are_trained():
    net = frozen("first", "last")
    groups = Groups.of(net, (3,))
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    lengths = {name: float(k + 1) for k, name in enumerate(names)}
    found = groups.norms(torch.tensor([list(lengths.values())]), groups.names, net)
    for group, own in members(net, groups).items():
        square = sum(lengths.get(name, 0.0) ** 2 for name in own)
        assert found[group].item() ** 2 == pytest.approx(square, rel=1e-6)


# Parts of a vector


SCATTERED = "fc.bias+last.weight+scale, fc.weight+first.*, *norm*, unused.*+last.bias"


def test_parts_are_the_groups_parameters_in_their_order():
    net = Crossed()
    groups = Groups.matching(net, SCATTERED)
    whole = vector(net)
    for name, indices in groups.members.items():
        start = [sum(groups.sizes[:i]) for i in indices]
        by_hand = [
            torch.arange(s, s + groups.sizes[i]) for s, i in zip(start, indices, strict=True)
        ]
        assert torch.equal(groups.part(name, whole), torch.cat(by_hand).float())
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.fill_(i)
    filled = groups.split(concatenate(net.parameters()))
    assert {name: sorted({*part.int().tolist()}) for name, part in filled.items()} == {
        name: list(indices) for name, indices in groups.members.items()
    }


@pytest.mark.parametrize("patterns", [SCATTERED, "", "*"])
def test_split_and_joined_give_back_the_vector(patterns):
    net = Crossed()
    groups = Groups.matching(net, patterns) if patterns else Groups.of(net, (3,))
    whole, stats = vector(net), torch.ones(3)
    parts = groups.split(whole)
    assert sum(len(part) for part in parts.values()) == len(whole)
    shuffled = dict(reversed(parts.items()))
    joined = groups.joined({**shuffled, STATS: stats, "c": stats})
    assert set(joined) == {PARAMS, STATS, "c"}
    assert joined[STATS] is stats
    assert torch.equal(joined[PARAMS], whole)
    assert joined[PARAMS].data_ptr() != whole.data_ptr()


def test_what_is_not_joined_is_the_bases():
    net = Crossed()
    groups = Groups.matching(net, SCATTERED)
    base, new = vector(net), -1 - vector(net)
    for name in groups.names:
        joined = groups.joined({name: groups.part(name, new), STATS: new[:3]}, base)[PARAMS]
        changed = joined != base
        assert int(changed.sum()) == groups.numel(name)
        assert torch.equal(joined[changed], new[changed])
        assert torch.equal(groups.part(name, joined), groups.part(name, new))
    assert torch.equal(base, vector(net))  # it is the server's own


def test_put_writes_groups_alone():
    net = Crossed()
    groups = Groups.matching(net, SCATTERED)
    first, second, *_ = groups.names
    target = vector(net)
    parts = {name: -groups.part(name, target) for name in (first, second)}
    groups.put(target, {**parts, STATS: torch.zeros(5)})
    whole = vector(net)
    for name in groups.names:
        sign = -1 if name in (first, second) else 1
        assert torch.equal(groups.part(name, target), sign * groups.part(name, whole))


# Training some


@pytest.mark.parametrize("frozen_norms", [False, True])
def test_only_the_active_groups_require_gradients(frozen_norms):
    net = Crossed().train()
    groups = Groups.of(net, (3,))
    names = [name for name, _ in net.named_parameters()]
    net.fc.bias.requires_grad_(False)  # the user's own
    for active in [("first",), ("last", "fc"), ("model",)]:
        trained = {names[i] for group in active for i in groups.members[group]} - {"fc.bias"}
        with groups.only(net, active, frozen_norms=frozen_norms):
            assert {n for n, p in net.named_parameters() if p.requires_grad} == trained
            assert net.training
            # LayerNorm has no mode that matters.
            assert net.norm.training == (not frozen_norms or "model" in active)
        assert {n for n, p in net.named_parameters() if not p.requires_grad} == {"fc.bias"}
        assert net.norm.training


def test_a_frozen_norm_may_be_one_that_the_network_never_trains():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=0.5), nn.Linear(3, 2))
    net[1].requires_grad_(False)
    groups = Groups.of(net, (4,))
    assert members(net, groups)["0"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    x = torch.tensor([[1.0, 0, 0, 0], [3.0, 0, 0, 0]])
    with torch.no_grad():
        net[0].weight.zero_()[0, 0] = 1  # the norm meets 1 and 3, of mean 2
        net[0].bias.zero_()
    with groups.only(net, ("2",), frozen_norms=True):
        net(x)
    assert net[1].running_mean[0] == 0  # as it was
    with groups.only(net, ("0",), frozen_norms=True):
        net(x)
    assert net[1].running_mean[0] == 1  # half way to 2
    assert net[1].training
    assert not net[1].weight.requires_grad


def test_the_network_is_as_before_even_after_an_error():
    net = Crossed().train()
    groups = Groups.of(net, (3,))
    with pytest.raises(RuntimeError), groups.only(net, ("fc",), frozen_norms=True):
        raise RuntimeError
    assert all(p.requires_grad for p in net.parameters())
    assert net.norm.training


def test_the_backward_pass_ends_at_the_active_group():
    """Activations below it have no graph at all."""
    net = build("resnet8", classes=10, shape=IMAGE)
    groups = Groups.of(net, IMAGE)
    x = torch.randn(2, *IMAGE)
    graph: dict[str, bool] = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(
                lambda m, a, out, name=name: graph.__setitem__(name, out.requires_grad)
            )
    with groups.only(net, ("stages.1.0.conv2",)):
        net(x).sum().backward()
        with_gradient = {n for n, p in net.named_parameters() if p.grad is not None}
    assert {name for name, has in graph.items() if has} == {
        "stages.1.0.conv2", *(f"stages.2.0.{part}" for part in ("conv1", "conv2", "shortcut.conv")),
        "fc",
    }  # fmt: skip
    assert with_gradient == {
        f"stages.1.0.{p}" for p in ("conv2.weight", "norm2.weight", "norm2.bias")
    }  # fmt: skip

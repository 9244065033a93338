"""Stochastic depth: how often which block drops its residual, and what is computed then."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fl_client.optimizers import SGD
from fl_client.trainer import LocalData, local_round
from fl_common import assembly
from fl_common.config import ConfigError, Train, resolve
from fl_common.local import Affine, Work
from fl_common.models.catalogue import build
from regularizers.sam import SAM, SAMParams
from regularizers.stochastic_depth import StochasticDepth, StochasticDepthParams, blocks_of

WORK = Work(omega=1.0, steps=1, lr=0.1, nominal_steps=1, base_lr=0.1)
DEPTH = "regularizers=stochastic-depth"


def resnet(name: str = "resnet8", **params) -> nn.Module:
    torch.manual_seed(0)
    net = build(name, classes=3, shape=(3, 32, 32))
    StochasticDepth.prepare(net, StochasticDepthParams(**params))
    return net


def begun(net: nn.Module, **params) -> StochasticDepth:
    method = StochasticDepth(StochasticDepthParams(**params), WORK)
    method.begin(net, {}, {})
    return method


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 1, 2, 1])


def test_keep_probabilities_of_both_conventions():
    """L = 18 blocks, p_L = 0.9: 1 - (l / 18) 0.1, or 1 - ((l - 1) / 17) 0.1."""
    paper = [block.keep for block in blocks_of(resnet("resnet56-bottleneck"))]
    assert paper == pytest.approx([1 - l / 18 * 0.1 for l in range(1, 19)])  # noqa: E741
    code = [block.keep for block in blocks_of(resnet("resnet56-bottleneck", convention="code"))]
    assert code == pytest.approx([1 - (l - 1) / 17 * 0.1 for l in range(1, 19)])  # noqa: E741
    assert code[0] == 1.0 and paper[-1] == pytest.approx(0.9) == code[-1]
    assert len(blocks_of(resnet("resnet18"))) == 8
    assert StochasticDepthParams(convention="code").keep(1) == [1.0]


def test_blocks_drop_as_often_as_they_should_and_independently():
    net = resnet(p_l=0.4)  # keeps 0.8, 0.6, 0.4
    method, (x, y), rows = begun(net, p_l=0.4), batch(), []
    for seed in range(2000):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        assert method.transform(x, y) == (x, y)
        assert torch.equal(torch.get_rng_state(), before)  # other draws are as without it
        rows.append([not block.dropped for block in method.blocks])
    kept = torch.tensor(rows).double()
    # standard deviation at most sqrt(0.25 / 2000) = 0.011
    assert kept.mean(0).tolist() == pytest.approx([0.8, 0.6, 0.4], abs=0.045)
    assert kept.prod(1).mean() == pytest.approx(0.8 * 0.6 * 0.4, abs=0.04)
    method.finish()
    assert not any(block.dropped for block in blocks_of(net))


def test_a_dropped_block_is_relu_of_the_shortcut_and_leaves_its_norms_alone():
    net = resnet()
    first, second, _ = blocks_of(net)
    x = torch.randn(4, 64, 8, 8)
    second.dropped = first.dropped = True
    before = {name: value.clone() for name, value in second.state_dict().items()}
    expected = second.shortcut(x).relu()
    second.load_state_dict(before)
    calls = []
    for module in (second.conv1, second.norm1, second.conv2, second.norm2):
        module.register_forward_hook(lambda *args: calls.append(args))
    assert torch.equal(second(x), expected)
    assert calls == []
    after = second.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(name.startswith("shortcut.norm.") for name in changed) and changed
    assert torch.equal(first(x), x.relu())


def test_kept_blocks_are_plain_in_training():
    net, plain = resnet(), build("resnet8", classes=3, shape=(3, 32, 32))
    plain.load_state_dict(net.state_dict())
    x, _ = batch()
    assert torch.equal(net(x), plain(x))
    assert list(net.state_dict()) == list(plain.state_dict())


def test_evaluation_weighs_residuals_and_is_deterministic():
    net = resnet(p_l=0.4)
    x, _ = batch()
    net(x)
    net.eval()
    for block in blocks_of(net):
        block.dropped = True  # of a step that was interrupted
    z = net.stem(x)
    for block, p in zip(blocks_of(net), (0.8, 0.6, 0.4), strict=True):
        z = (p * block.residual(z) + block.shortcut(z)).relu()
    expected = net.fc(z.mean((2, 3)))
    torch.testing.assert_close(net(x), expected)
    assert torch.equal(net(x), net(x))


def test_client_and_server_build_the_network_with_its_weights():
    config = resolve(
        {"regularizers": "stochastic-depth", "model.name": "resnet8", "stochastic-depth.p-l": 0.4}
    )
    net = assembly.new_model(config, 3, (3, 32, 32), torch.device("cpu"))
    assert [block.keep for block in blocks_of(net)] == pytest.approx([0.8, 0.6, 0.4])


def test_both_passes_of_sam_run_the_same_blocks():
    net, (x, y) = resnet(p_l=0.1), batch()
    method, seen = begun(net, p_l=0.1), []
    net.register_forward_pre_hook(lambda *_: seen.append([b.dropped for b in method.blocks]))
    methods = [SAM(SAMParams(), WORK), method]
    settings = Train(batch_size=2, epochs=4)
    local_round(
        net, LocalData(x, y, lambda b: b), methods, Affine(), SGD(), settings,
        seed=3, server_round=1, partition=0,
    )  # fmt: skip
    assert len(seen) == 16
    assert seen[0::2] == seen[1::2]
    assert len({tuple(row) for row in seen}) > 1


def test_bfloat16_autocast_with_a_dropped_block():
    net, (x, y) = resnet(), batch()
    blocks_of(net)[1].dropped = True
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(net(x), y)
    loss.backward()
    for name, p in net.named_parameters():
        dropped = name.startswith("stages.1.0.") and ".shortcut." not in name
        assert (p.grad is None) == dropped
        assert dropped or torch.isfinite(p.grad).all()


def test_p_1_is_the_plain_run_bit_for_bit(runner):
    base = ("run.rounds=1", "model.name=resnet8", "model.norm=group", "clients.per-round=3")
    plain = runner(*base)
    neutral = runner(*base, DEPTH, "stochastic-depth.p-l=1")
    active = runner(*base, DEPTH)
    assert neutral.history_less_times == plain.history_less_times
    sha = "model_sha256"
    assert neutral.summary[sha] == plain.summary[sha] != active.summary[sha]
    assert active.code == 0


def test_a_model_without_residual_blocks_is_refused(tmp_path, monkeypatch, runner):
    with pytest.raises(
        ConfigError, match=r"digits-cnn has none; choose one of resnet8, .*leave it"
    ):
        resolve({"regularizers": "stochastic-depth"})
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def Net(shape, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"mine:Net has none; choose one of resnet8, .*leave it"):
        resolve({"regularizers": "stochastic-depth", "model.name": "mine:Net"})
    # Seen when it is built, if it cannot be before.
    monkeypatch.setattr("regularizers.stochastic_depth.skeleton", lambda config: None)
    refused = runner("run.rounds=1", DEPTH, "model.name=mine:Net")
    assert refused.code == 3
    assert "choose another or leave it out" in refused.summary["error"]


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("stochastic-depth.p-l", 0.0, "greater than 0"),
        ("stochastic-depth.p-l", 1.1, "at most 1"),
        ("stochastic-depth.convention", "papers", "did you mean paper"),
        ("stochastic-depth.p-L", 0.5, "did you mean stochastic-depth.p-l"),
    ],
)
def test_wrong_parameters_are_refused(key, value, remedy):
    settings = {"regularizers": "stochastic-depth", "model.name": "resnet8", key: value}
    with pytest.raises(ConfigError, match=f"^{key}.*{remedy}"):
        resolve(settings)


def test_its_keys_have_no_effect_without_it():
    with pytest.raises(ConfigError, match="set that") as refused:
        resolve({"stochastic-depth.p-l": 0.5})
    assert refused.value.errors == [
        "stochastic-depth.p-l = 0.5: has no effect without regularizers=stochastic-depth; leave it "
        "out or set that"
    ]

"""Documents through the whole system: the network, partial updates, MAN, curvature, runs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import conv1d, cross_entropy

from fl_common.config import ConfigError, methods, resolve
from fl_common.groups import Groups
from fl_common.local import Work
from fl_common.models.catalogue import build
from fl_common.models.text import Words
from fl_flatness.products import Curvature
from fl_server.cli import main
from regularizers.man import MAN, MANParams

SHAPE = (256, 32)
TEXT = ("data.source=synthetic-text", "model.name=text-cnn", "train.device=cpu")
SHORT = (*TEXT, "clients.number=3", "data.max-samples=40", "run.rounds=2", "data.partition=iid")


def net(classes: int = 6, shape: tuple[int, int] = SHAPE, **settings) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return build("text-cnn", classes=classes, shape=shape, **settings).eval()


def documents(n: int = 4, vocabulary: int = 256, length: int = 32) -> torch.Tensor:
    """(n, length) ids, the last quarter of each padding."""
    ids = torch.randint(1, vocabulary, (n, length), generator=torch.Generator().manual_seed(1))
    ids[:, -length // 4 :] = 0
    return ids


def test_a_word_is_its_vector_and_a_column_of_weights_a_sum_of_vectors():
    words = Words(3, 2, padding_idx=0)
    words.weight.data = torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 5.0]])
    # (B, L) to (B, width, L): padding, word 1, word 2
    assert words(torch.tensor([[0, 1, 2]])).tolist() == [[[0, 1, 3], [0, 2, 5]]]
    columns = torch.tensor([[[1.0, 0], [0, 0.5], [0, 0.5]]])  # (1, V, 2): padding; half 1, half 2
    assert words(columns).tolist() == [[[0, 2], [0, 3.5]]]


def test_ids_and_their_columns_have_the_same_output():
    model, ids = net(), documents()
    columns = torch.nn.functional.one_hot(ids, 256).mT.float()  # (B, V, L)
    torch.testing.assert_close(model(columns), model(ids))


def written_out(model: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """The ReLUs' outputs (B, 32, L - w + 1) for w = 3, 4, 5, from the parameters alone."""
    p = dict(model.named_parameters())
    x = p["words.weight"][ids].transpose(1, 2)
    names = [f"windows.width{w}.conv" for w in (3, 4, 5)]
    return [conv1d(x, p[f"{n}.weight"], p[f"{n}.bias"]).clamp(min=0) for n in names]


def test_output_is_that_of_the_layers_written_out():
    model, ids = net(), documents()
    z = torch.cat([a.max(dim=2).values for a in written_out(model, ids)], dim=1)
    assert torch.equal(model.represent(ids), z)
    torch.testing.assert_close(model(ids), z @ model.fc.weight.T + model.fc.bias)


def test_padding_gets_no_gradient():
    model = net()
    cross_entropy(model(documents()), torch.tensor([0, 1, 2, 3])).backward()
    grad = model.words.weight.grad
    assert not model.words.weight[0].any() and not grad[0].any()
    assert grad[documents()[0, 0]].any()


def test_groups_are_the_layers_and_cover_all():
    model = net()
    groups = Groups.of(model, SHAPE)
    windows = [f"windows.width{w}.conv" for w in (3, 4, 5)]
    assert groups.names == ("words", *windows, "fc")
    # 256 x 32; 32 x 32 x w + 32; 6 x 96 + 6
    assert list(map(groups.numel, groups.names)) == [8192, 3104, 4128, 5152, 582]
    assert sum(map(groups.numel, groups.names)) == sum(p.numel() for p in model.parameters())
    head = Groups.of(net(head="moon"), SHAPE)
    assert head.names == ("words", *windows, "head.fc1", "head.fc2", "fc")


class Plain(torch.nn.Sequential):
    """A network of one's own that takes ids alone."""

    def __init__(self):
        super().__init__(torch.nn.EmbeddingBag(9, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))


def test_groups_of_a_network_that_takes_ids_alone():
    assert Groups.of(Plain(), (9, 5)).names == ("0", "2")


def test_mans_penalty_by_hand():
    """(zeta / 2) sum over the three ReLUs of the mean square of what they give."""
    model, ids = net().double().train(), documents()
    man = MAN(MANParams(zeta=0.2), Work(1.0, 1, 0.1, 1, 0.1))
    man.begin(model, {}, {})
    value = man.data_term(ids, model(ids), torch.tensor([0, 1, 2, 3]))
    man.finish()
    expected = 0.1 * sum(a.square().mean() for a in written_out(model, ids))
    torch.testing.assert_close(value, expected.detach())
    assert 0 < value < 1


def test_products_with_the_hessian_are_differences_of_gradients():
    model = net(classes=3, shape=(7, 6)).double()
    ids, y = documents(5, vocabulary=7, length=6), torch.tensor([0, 1, 2, 0, 1])
    curvature = Curvature(model, [(ids, y)])
    v = torch.randn(curvature.d, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    v[:32] = 0  # padding's vector, which ids do not move
    step, pieces = 1e-6, v.split([p.numel() for p in model.parameters()])

    def gradient(sign: int) -> torch.Tensor:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, piece in zip(moved.parameters(), pieces, strict=True):
                p.add_(piece.view_as(p), alpha=sign * step)
        return Curvature(moved, [(ids, y)]).gradient()

    difference = (gradient(1) - gradient(-1)) / (2 * step)
    torch.testing.assert_close(curvature.product(v), difference, rtol=1e-5, atol=1e-7)


def test_it_learns(runner):
    result = runner(
        *TEXT, "clients.number=3", "data.alpha=1.0", "data.max-samples=400", "run.rounds=4",
        "train.epochs=2", "train.lr=0.3", "eval.every=4",
    )  # fmt: skip
    assert result.code == 0
    right = result.summary["accuracy"] * 1200
    assert right == pytest.approx(round(right), abs=1e-9)
    # Of 1200 documents guesses have 200 right, single words at most 480 (tests/.../test_text.py).
    assert right > 700


def test_equal_seeds_give_equal_bits_and_flatness(runner):
    settings = (*SHORT, "flatness.every=2", "flatness.samples=40")
    first, again, other = runner(*settings), runner(*settings), runner(*SHORT, "run.seed=1")
    assert again.history_less_times == first.history_less_times
    assert again.summary["model_sha256"] == first.summary["model_sha256"]
    assert other.summary["model_sha256"] != first.summary["model_sha256"]
    assert first.history[-1]["lambda_max"] > 0


@pytest.mark.parametrize(
    "method",
    [
        ["strategy.name=fedpart", "fedpart.warm-up=1", "regularizers=man"],
        ["strategy.name=scaffold", "regularizers=sam", "data.partition=pathological"],
        ["strategy.name=feddyn", "regularizers=moon", "model.head=moon", "eval.on=both"],
        ["strategy.name=fedasam", "train.dtype=bfloat16", "data.partition=dirichlet-balanced"],
    ],
    ids=lambda method: method[0],
)
def test_it_runs_with_other_methods(method, runner):
    overridden = {setting.partition("=")[0] for setting in method}
    settings = [s for s in SHORT if s.partition("=")[0] not in overridden]
    result = runner(*settings, *method)
    assert result.code == 0
    assert [row["failed"] | row["rejected"] for row in result.history] == [{}, {}]
    assert all(vector.isfinite().all() for vector in result.model.values())


def refused(**settings) -> str:
    values = {"data.source": "synthetic-text", "model.name": "text-cnn"}
    with pytest.raises(ConfigError) as error:
        resolve(values | {key.replace("__", "."): value for key, value in settings.items()})
    (line,) = error.value.errors
    return line


def test_what_has_no_meaning_for_ids_is_refused_in_one_line():
    assert "fedalign with model.name = text-cnn: it is not a Seq" in refused(
        regularizers="fedalign"
    )
    assert "gradaug with model.name = text-cnn: Windows cannot" in refused(regularizers="gradaug")
    assert "synthetic-text: token ids have no mixtures" in refused(regularizers="mixup")
    assert "model.name = text-cnn has none" in refused(regularizers="stochastic-depth")
    assert "synthetic-text has no crop-flip" in refused(data__augment="crop-flip")
    assert "these models fit: text-cnn" in refused(model__name="mlp")
    assert "needs token ids (V, L)" in refused(data__source="breast-cancer")


def test_everything_else_is_accepted():
    accepted = set(methods("regularizers")) - {
        "fedalign", "gradaug", "mixup", "stochastic-depth"
    }  # fmt: skip
    for name in accepted:
        head = "moon" if name == "moon" else "none"
        values = {"data.source": "synthetic-text", "model.name": "text-cnn"}
        resolve(values | {"regularizers": name, "model.head": head})


def test_its_groups_are_listed(capsys):
    assert main(["groups", "text-cnn"]) == 0
    printed = capsys.readouterr().out
    assert "21,158 parameters in 5 groups; samples of 256 x 32, 6 classes" in printed

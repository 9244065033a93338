import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fl_common.data import partition as module
from fl_common.data.errors import DataError
from fl_common.data.partition import cached_partition, partition
from fl_common.data.sources import load

quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def balanced_labels(n: int, classes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.arange(n) % classes)


def assert_exact_cover(parts: list[np.ndarray], n: int) -> None:
    """Every sample once, ascending within a client."""
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(n))
    for part in parts:
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()


def label_counts(parts: list[np.ndarray], y: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(y[part], minlength=y.max() + 1) for part in parts])


labels = st.lists(st.integers(0, 5), min_size=1, max_size=120).map(np.array)
seeds = st.integers(0, 2**63 - 1)
alphas = st.sampled_from([1e-3, 0.1, 0.5, 2.0, 100.0])


@quick
@given(labels, seeds, st.data())
def test_iid(y, seed, data):
    clients = data.draw(st.integers(1, len(y)))
    parts = partition(y, scheme="iid", clients=clients, seed=seed)
    assert_exact_cover(parts, len(y))
    sizes = [*map(len, parts)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


@quick
@given(labels, seeds, alphas, st.data())
def test_dirichlet_balanced(y, seed, alpha, data):
    clients = data.draw(st.integers(1, len(y)))
    parts = partition(y, scheme="dirichlet-balanced", clients=clients, seed=seed, alpha=alpha)
    assert_exact_cover(parts, len(y))
    small, more = divmod(len(y), clients)
    assert [*map(len, parts)] == [small + 1] * more + [small] * (clients - more)


@quick
@given(seeds, st.sampled_from([0.3, 0.5, 2.0]), st.integers(1, 8), st.integers(0, 12))
def test_dirichlet(seed, alpha, clients, min_size):
    y = balanced_labels(400, 10, seed % 7)
    parts = partition(
        y, scheme="dirichlet", clients=clients, seed=seed, alpha=alpha, min_size=min_size
    )
    assert_exact_cover(parts, 400)
    assert min(map(len, parts)) >= min_size


SCHEMES = ["iid", "dirichlet", "dirichlet-balanced", "pathological"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_equal_seeds_agree_and_others_do_not(scheme):
    y = balanced_labels(600, 10)
    one, same, other = (
        partition(y, scheme=scheme, clients=12, seed=seed, min_size=1) for seed in (3, 3, 4)
    )
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))


class Scripted:
    """A generator whose Dirichlet draws are given."""

    def __init__(self, *draws):
        self._draws = iter(draws)

    def dirichlet(self, alpha, size):
        return np.array(next(self._draws), dtype=float)


def test_dirichlet_shares_by_hand():
    """Two classes of 10 samples, three clients, so that 20/3 = 6.67 is a full client.

    Class 0: cumsum(.71, .15, .14) 10 = 7.1, 8.6, 10 -> cuts 7, 8, 10 -> 7, 1, 2.
    Class 1: client 0 has 7 >= 6.67, so q = (0, .3, .5) / .8; cumsum 10 = 0, 3.75, 10 -> 0, 3, 7.
    """
    rng = Scripted([[0.71, 0.15, 0.14], [0.2, 0.3, 0.5]])
    shares = module._dirichlet_shares([10, 10], 3, rng, alpha=1.0, min_size=4)
    assert [s.tolist() for s in shares] == [[7, 1, 2], [0, 3, 7]]


def test_dirichlet_draws_again_below_the_minimum_and_where_no_share_is_left():
    """Two classes of 10 for two clients, at least 8 each; 10 is a full client.

    First try: 9, 1 and 9, 1, so that client 1 has 2. Second: class 0 fills client 0, and q is
    (0, 0) for class 1. Third: 3, 7 and 5, 5.
    """
    rng = Scripted(
        [[0.95, 0.05], [0.95, 0.05]],
        [[1.0, 0.0], [1.0, 0.0]],
        [[0.3, 0.7], [0.5, 0.5]],
    )
    shares = module._dirichlet_shares([10, 10], 2, rng, alpha=1.0, min_size=8)
    assert [s.tolist() for s in shares] == [[3, 7], [5, 5]]


def one_by_one(prior, takers, left, u):
    """The procedure as written: each taker draws from its prior over the non-empty classes."""
    left, drawn = left.copy(), []
    for client, value in zip(takers, u, strict=True):
        p = np.where(left > 0, prior[client], 0)
        p = p / p.sum() if p.sum() > 0 else (left > 0) / (left > 0).sum()
        drawn.append(int(np.searchsorted(np.cumsum(p), value, side="right")))
        left[drawn[-1]] -= 1
    return drawn


@pytest.mark.parametrize("alpha", [0.01, 0.3, 5.0])
@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_drawing_in_chunks_is_drawing_one_by_one(alpha, chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    rng = np.random.default_rng(5)
    prior = rng.dirichlet([alpha] * 4, 6)
    takers = rng.permutation(np.repeat(np.arange(6), 10))
    left = np.array([30, 5, 0, 25])
    drawn = module._draw_classes(prior, takers, left, np.random.default_rng(9))
    expected = one_by_one(prior, takers, left, np.random.default_rng(9).random(60))
    assert drawn.tolist() == expected
    assert np.bincount(drawn, minlength=4).tolist() == left.tolist()


def test_a_prior_without_mass_on_what_is_left_is_uniform():
    prior = np.array([[1.0, 0.0, 0.0]])
    drawn = module._draw_classes(
        prior, np.zeros(3000, int), np.array([0, 2000, 1000]), np.random.default_rng(0)
    )
    assert (drawn > 0).all()
    assert 400 < (drawn[:1000] == 1).sum() < 600


def test_takers_are_uniform_until_they_are_full():
    sizes = np.array([2000, 2000, 2000, 10])
    takers = module._takers(sizes, np.random.default_rng(0))
    assert np.bincount(takers).tolist() == sizes.tolist()
    # The small client is full within its first hundred or so draws; the others share evenly.
    assert np.flatnonzero(takers == 3).max() < 200
    assert np.abs(np.bincount(takers[:3000]) - 1000)[:3].max() < 100


def test_a_small_alpha_gives_clients_few_classes():
    y = balanced_labels(5000, 10)
    few, many = (
        label_counts(partition(y, scheme="dirichlet-balanced", clients=20, seed=0, alpha=alpha), y)
        for alpha in (0.1, 100.0)
    )
    assert few.max(axis=1).mean() > 2.5 * many.max(axis=1).mean()


def test_dirichlet_sizes_are_like_the_published_ones():
    """CIFAR-10's labels, alpha .5 and K = 16: sizes of some 1,800 to 4,400 for one seed."""
    y = balanced_labels(50_000, 10)
    sizes = [len(p) for p in partition(y, scheme="dirichlet", clients=16, seed=0, alpha=0.5)]
    assert 500 < min(sizes) < 2_800
    assert 3_400 < max(sizes) < 7_500


def test_pathological():
    y = balanced_labels(1000, 10)
    parts = partition(y, scheme="pathological", clients=20, seed=1, classes_per_client=3)
    assert_exact_cover(parts, 1000)
    held = label_counts(parts, y) > 0
    assert (held.sum(axis=1) == 3).all()
    assert (held.sum(axis=0) == 6).all(), "20 clients of 3 classes: each class has 6 holders"
    # The holders of a class share it: sizes differ by at most one.
    for label, counts in enumerate(label_counts(parts, y).T):
        shares = counts[held[:, label]]
        assert shares.max() - shares.min() <= 1


@pytest.mark.parametrize("seed", range(5))
def test_pathological_leaves_no_class_to_nobody_where_it_can_be_avoided(seed):
    y = balanced_labels(1000, 10)
    for clients, per_client in [(5, 2), (6, 2), (7, 2), (1, 10), (4, 3)]:
        parts = partition(
            y, scheme="pathological", clients=clients, seed=seed, classes_per_client=per_client
        )
        assert_exact_cover(parts, 1000)
        assert ((label_counts(parts, y) > 0).sum(axis=1) == per_client).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_samples_of_a_class_are_dealt_in_random_order(scheme):
    """In the order of the data a client would have neighbours alone."""
    y = np.repeat([0, 1], 50)
    parts = partition(y, scheme=scheme, clients=4, seed=0, classes_per_client=1, min_size=5)
    for label in (0, 1):
        several = [own for part in parts if len(own := part[y[part] == label]) > 4]
        assert several
        assert all(np.diff(own).max() > 1 for own in several)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"scheme": "iid", "clients": 101}, "100 training samples cannot be split over 101"),
        ({"scheme": "dirichlet", "clients": 20}, "lower data.min-size"),
        ({"scheme": "dirichlet", "clients": 9, "alpha": 1e-6}, "raise data.alpha"),
        (
            {"scheme": "pathological", "clients": 3, "classes_per_client": 1},
            "cannot hold 5 classes; change clients.number",
        ),
        (
            {"scheme": "pathological", "clients": 10, "classes_per_client": 6},
            "of 6 classes each cannot hold 5 classes",
        ),
        ({"scheme": "linear", "clients": 2}, "known: iid, dirichlet"),
    ],
)
def test_what_cannot_be_split_is_refused(arguments, words, monkeypatch):
    monkeypatch.setattr(module, "_TRIES", 50)
    with pytest.raises(DataError, match=words):
        partition(balanced_labels(100, 5), seed=0, **arguments)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return load("digits", cache_dir=tmp_path_factory.mktemp("cache"))


def test_a_cached_partition_is_the_partition(digits, tmp_path):
    arguments = {"scheme": "dirichlet", "clients": 8, "seed": 5, "alpha": 0.3, "min_size": 4}
    parts = partition(digits.train.y, **arguments)
    cached = cached_partition(digits, **arguments, cache_dir=tmp_path)
    assert len(cached) == 8
    for i, part in enumerate(parts):
        np.testing.assert_array_equal(cached[i], part)
    with pytest.raises(IndexError, match="client 8 of 8"):
        cached[8]
    assert len(list(cached)) == 8


def test_a_partition_that_an_earlier_version_cached_is_still_read(digits, tmp_path, monkeypatch):
    fetch, scheme = module.cache.fetch, {"scheme": "iid", "clients": 8, "seed": 5}

    def with_counts(root, name, make):
        def make_more(writer):
            writer.add("label_counts", [np.zeros((8, 10), np.int64)], 8)
            return make(writer)

        return fetch(root, name, make_more)

    with monkeypatch.context() as patch:
        patch.setattr(module.cache, "fetch", with_counts)
        before = cached_partition(digits, **scheme, cache_dir=tmp_path)
    again = cached_partition(digits, **scheme, cache_dir=tmp_path)
    assert len(list(tmp_path.rglob("label_counts.npy"))) == 1
    assert all(np.array_equal(one, other) for one, other in zip(before, again, strict=True))


def test_a_cached_partition_is_computed_once_per_data_and_parameters(digits, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "partition", lambda *a, **k: calls.append(k) or partition(*a, **k))

    def ask(data=digits, **changes):
        arguments = {"scheme": "dirichlet", "clients": 5, "seed": 0, "alpha": 0.5} | changes
        return cached_partition(data, **arguments, cache_dir=tmp_path)

    ask(), ask()
    assert len(calls) == 1
    for changes in ({"seed": 1}, {"alpha": 0.6}, {"clients": 6}, {"min_size": 3}):
        ask(**changes)
    assert len(calls) == 5
    ask(dataclasses.replace(digits, fingerprint="other"))
    assert len(calls) == 6
    ask(scheme="iid"), ask(scheme="iid", alpha=9.0, min_size=1)
    assert len(calls) == 7

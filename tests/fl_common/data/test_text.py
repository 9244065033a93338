"""The made-up documents, and token ids in general: stored, split, and handed to the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fl_common.data.catalogue import SOURCES
from fl_common.data.errors import DataError
from fl_common.data.partition import partition
from fl_common.data.sources import load
from fl_common.data.transforms import pipeline

INFO = SOURCES["synthetic-text"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load("synthetic-text", cache_dir=tmp_path_factory.mktemp("cache"))


def test_documents(data):
    assert data.shape == INFO.shape == (256, 32)
    assert len(data.train) == INFO.train_size == 4200 and len(data.test) == 1200
    assert data.classes == tuple(f"topic {k}" for k in range(INFO.classes))
    for split, each in ((data.train, 700), (data.test, 200)):
        assert split.x.dtype == np.uint8 and split.x.shape[1:] == (32,)
        assert split.y.dtype == np.int64
        assert np.bincount(split.y).tolist() == [each] * 6
        lengths = (split.x > 0).sum(1)
        # Every length from 16 to 32 occurs, and what is behind a document's end is zero.
        assert np.unique(lengths).tolist() == list(range(16, 33))
        assert ((split.x > 0) == (np.arange(32) < lengths[:, None])).all()
    assert np.unique(data.train.x).tolist() == list(range(256))
    assert len(np.unique(np.concatenate([data.train.x, data.test.x]), axis=0)) == 5400


def test_they_are_the_same_for_every_seed(data, tmp_path):
    assert load("synthetic-text", cache_dir=tmp_path, seed=1).fingerprint == data.fingerprint


def bayes(features, data) -> float:
    """Test accuracy of naive Bayes with add-one smoothing on features (n, L') of ids from 0; the
    feature 0 counts for nothing."""
    train, test = features(data.train.x.astype(int)), features(data.test.x.astype(int))
    known = max(train.max(), test.max()) + 1
    counts = np.ones((6, known))
    np.add.at(counts, (np.broadcast_to(data.train.y[:, None], train.shape), train), 1)
    counts[:, 0] = 1
    logs = np.log(counts / counts[:, 1:].sum(1, keepdims=True))
    logs[:, 0] = 0
    return float((logs[:, test].sum(2).argmax(0) == data.test.y).mean())


def pairs(x: np.ndarray) -> np.ndarray:
    return np.where(x[:, 1:] > 0, x[:, :-1] * 256 + x[:, 1:], 0)


def test_single_words_tell_little_and_pairs_nearly_all(data):
    assert 1 / 6 < bayes(lambda x: x, data) < 0.4
    assert bayes(pairs, data) > 0.97


def test_half_of_the_words_are_their_topics_followers(data):
    """In a topic the commonest follower of a frequent word is the one of half of its places, and
    another one in other topics: of families of eight."""
    x, y = data.train.x.astype(int), data.train.y
    commonest = np.zeros((6, 8), int)
    for topic in range(6):
        before, after = x[y == topic, :-1], x[y == topic, 1:]
        for word in range(1, 9):
            follows = np.bincount(after[(before == word) & (after > 0)], minlength=256)
            commonest[topic, word - 1] = follows.argmax()
            # 1/2 + p/2 with p its own frequency, 0.02 to 0.16; 500 places or more each
            assert 0.45 < follows.max() / follows.sum() < 0.65
    assert (np.sort(commonest, axis=1) == np.arange(1, 9)).all()  # permutations of the family
    assert len(np.unique(commonest, axis=0)) == 6


def test_ids_reach_the_model_as_they_are(data):
    transform, x = pipeline("synthetic-text"), torch.from_numpy(data.train.x[:5])
    for batch in (transform.train(x), transform.eval(x)):
        assert batch.dtype == torch.int64
        assert batch.tolist() == x.tolist()
    assert transform.shape(data.shape) == (256, 32)
    with pytest.raises(ValueError, match="augmentation needs images, token ids have none"):
        pipeline("folder", "crop-flip").train(x)


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "dirichlet-balanced", "pathological"])
def test_every_document_is_some_clients(scheme, data):
    parts = partition(data.train.y, scheme=scheme, clients=12, seed=3, alpha=0.3)
    assert sorted(np.concatenate(list(parts))) == list(range(4200))
    if scheme == "pathological":
        assert all(len(np.unique(data.train.y[part])) == 2 for part in parts)


MODULE = """
import numpy as np

def text(ids):
    x, y = np.array(ids), np.array([0, 1])
    return (x, y), (x[:1], y[:1]), ("a", "b")

def letters(path, seed):
    return text(np.frombuffer(b"hello  world!!", np.uint8).reshape(2, 7))

def words(path, seed):
    return text([[5, 0, 0], [3, 999, 1]])

def negative(path, seed):
    return text([[5, 0, 0], [3, -2, 1]])

def short(path, seed):
    return text(np.array([[5, 0, 0], [3, 2, 1]], np.int16))
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_texts.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_own_ids(mine):
    """Of bytes there are 256 kinds; of other ids as many as the largest, 999, needs."""
    letters, words = load("my_texts:letters"), load("my_texts:words")
    assert letters.shape == (256, 7) and letters.train.x[0].tobytes() == b"hello  "
    assert words.shape == (1000, 3)
    batch = pipeline("my_texts:words").eval(torch.from_numpy(words.train.x))
    assert batch.dtype == torch.int64 and batch.tolist() == [[5, 0, 0], [3, 999, 1]]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("my_texts:negative", "train has the token id -2; ids count from 0"),
        ("my_texts:short", "train x is int16 (2, 3); it must be uint8 images"),
    ],
)
def test_wrong_ids(mine, source, words):
    with pytest.raises(DataError) as error:
        load(source)
    assert words in str(error.value) and "\n" not in str(error.value)

"""Documents of a made-up language: what tells topics apart is which word follows which.

Every topic is a Markov chain over the same words.  Half of the time the next word is drawn from
word frequencies that all topics share (Zipf's law, the w-th word in proportion to 1 / w); else it
is the one word that follows the last one in this topic.  A topic's followers permute the words of
every family of eight neighbours in frequency, so that single words are nearly as frequent in one
topic as in another: they say little, pairs of words say nearly all.
"""

from __future__ import annotations

import numpy as np

from fl_common.data.splits import Raw, RawSplit

TOPICS, TRAIN, TEST = 6, 4200, 1200
WORDS = 255
"""Their ids are 1..255; 0 fills a document up to LENGTH."""
LENGTH, SHORTEST = 32, 16
FAMILY, FOLLOWS = 8, 0.5


def read() -> Raw:
    """Documents (n, LENGTH) uint8, the same ones whatever the run's seed; topics take turns."""
    rng = np.random.default_rng(0)
    followers = np.stack([_followers(rng) for _ in range(TOPICS)])
    frequencies = 1 / np.arange(1, WORDS + 1)
    y = np.arange(TRAIN + TEST) % TOPICS
    x = rng.choice(WORDS, (len(y), LENGTH), p=frequencies / frequencies.sum())
    led = rng.random(x.shape) < FOLLOWS
    for t in range(1, LENGTH):
        x[:, t] = np.where(led[:, t], followers[y, x[:, t - 1]], x[:, t])
    ends = rng.integers(SHORTEST, LENGTH + 1, len(y))
    x = np.where(np.arange(LENGTH) < ends[:, None], x + 1, 0).astype(np.uint8)
    train, test = (RawSplit(y[part], [x[part]]) for part in (slice(TRAIN), slice(TRAIN, None)))
    return Raw(tuple(f"topic {k}" for k in range(TOPICS)), train, test)


def _followers(rng: np.random.Generator) -> np.ndarray:
    """Which word follows which, (WORDS,), both counted from 0."""
    families = np.split(np.arange(WORDS), range(FAMILY, WORDS, FAMILY))
    return np.concatenate([rng.permutation(family) for family in families])

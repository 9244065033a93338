"""Splitting training samples over clients.

Every scheme gives a disjoint and exact cover, and depends on its arguments alone.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fl_common.data import cache
from fl_common.data.catalogue import PARTITIONS
from fl_common.data.errors import DataError

if TYPE_CHECKING:
    from fl_common.data.sources import Dataset

_PROCEDURE = 2  # part of every key: to be raised when equal arguments give other partitions
_TRIES = 5_000
_CHUNK = 4_096


@dataclass(frozen=True, eq=False)
class Partition:
    """The clients' samples: `len(p)` clients, `p[i]` the ascending indices of client i, int64.

    indices: (n,) int64, client after client. offsets: (K + 1,) int64, where each begins and ends.
    """

    indices: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, client: int) -> np.ndarray:
        if not 0 <= client < len(self):
            raise IndexError(f"client {client} of {len(self)}")
        return self.indices[self.offsets[client] : self.offsets[client + 1]]


def cached_partition(
    dataset: Dataset,
    *,
    scheme: str,
    clients: int,
    seed: int,
    alpha: float = 0.5,
    min_size: int = 10,
    classes_per_client: int = 2,
    cache_dir: str | Path | None = None,
) -> Partition:
    """`partition` of the training samples, computed once and memory-mapped afterwards."""
    parameters = {
        "dirichlet": {"alpha": alpha, "min_size": min_size},
        "dirichlet-balanced": {"alpha": alpha},
        "pathological": {"classes_per_client": classes_per_client},
    }.get(scheme, {})

    def make(writer: cache.Writer) -> dict[str, Any]:
        labels = dataset.train.y
        parts = partition(labels, scheme=scheme, clients=clients, seed=seed, **parameters)
        offsets = np.cumsum([0, *map(len, parts)])
        writer.add("indices", parts, len(labels))
        writer.add("offsets", [offsets], len(offsets))
        return {"scheme": scheme, "clients": clients, "seed": seed, **parameters}

    key = json.dumps([_PROCEDURE, dataset.fingerprint, scheme, clients, seed, parameters])
    name = f"{scheme}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    root = Path(cache_dir or cache.default_cache_dir())
    arrays = cache.fetch(root / "partitions", name, make).arrays  # earlier versions stored more
    return Partition(arrays["indices"], arrays["offsets"])


def partition(
    labels: np.ndarray,
    *,
    scheme: str,
    clients: int,
    seed: int,
    alpha: float = 0.5,
    min_size: int = 10,
    classes_per_client: int = 2,
) -> list[np.ndarray]:
    """Each client's ascending indices into `labels` (n,), int64.

    scheme: iid: a permutation in K parts whose sizes differ by at most one;
        dirichlet: every class is cut by shares from Dir(alpha), sizes differ (`_dirichlet`);
        dirichlet-balanced: equal sizes, one class prior per client (`_dirichlet_balanced`);
        pathological: `classes_per_client` classes each (`_pathological`).
    Raises DataError if the samples cannot be split so.
    """
    n = len(labels)
    if not 1 <= clients <= n:
        raise DataError(
            f"{n} training samples cannot be split over {clients} clients; lower clients.number"
        )
    rng = np.random.default_rng(seed)
    if scheme == "iid":
        owner = np.empty(n, np.int64)
        owner[rng.permutation(n)] = np.repeat(np.arange(clients), _equal_sizes(n, clients))
    elif scheme == "dirichlet":
        owner = _dirichlet(labels, clients, rng, alpha, min_size)
    elif scheme == "dirichlet-balanced":
        owner = _dirichlet_balanced(labels, clients, rng, alpha)
    elif scheme == "pathological":
        owner = _pathological(labels, clients, rng, classes_per_client)
    else:
        raise DataError(f"data.partition = {scheme} is unknown; known: {', '.join(PARTITIONS)}")
    order = np.argsort(owner, kind="stable")
    return np.split(order, np.cumsum(np.bincount(owner, minlength=clients))[:-1])


def _equal_sizes(n: int, clients: int) -> np.ndarray:
    return n // clients + (np.arange(clients) < n % clients)


def _dirichlet(
    labels: np.ndarray, clients: int, rng: np.random.Generator, alpha: float, min_size: int
) -> np.ndarray:
    """(n,) owner of every sample; the procedure of FedML, MOON and FedAlign.

    For each class, q ~ Dir(alpha 1_K); q_i = 0 where client i already holds n/K or more;
    the shuffled class is cut at floor(cumsum(q / sum q) n_c). Again from the start until every
    client has `min_size`, and where a whole q is zero. flwr-datasets' DirichletPartitioner is
    another procedure: it cuts classes unshuffled and passes over a client only above n/K.
    """
    n = len(labels)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    lengths = [len(m) for m in members]
    possible = clients * min_size <= n
    shares = possible and _dirichlet_shares(lengths, clients, rng, alpha, min_size)
    if not shares:
        raise DataError(
            f"Dir({alpha:g}) did not split {n} samples over {clients} clients so that each has at "
            f"least {min_size}; lower data.min-size or clients.number, or raise data.alpha"
        )
    owner = np.empty(n, np.int64)
    for indices, counts in zip(members, shares, strict=True):
        owner[rng.permutation(indices)] = np.repeat(np.arange(clients), counts)
    return owner


def _dirichlet_shares(
    lengths: list[int], clients: int, rng: np.random.Generator, alpha: float, min_size: int
) -> list[np.ndarray] | None:
    """How many samples of each class each client gets, (K,) per class; None after _TRIES."""
    fair = sum(lengths) / clients
    for _ in range(_TRIES):
        sizes, shares = np.zeros(clients, np.int64), []
        for length, q in zip(lengths, rng.dirichlet([alpha] * clients, len(lengths)), strict=True):
            q[sizes >= fair] = 0
            total = q.sum()
            if not total > 0:
                break
            cuts = (np.cumsum(q / total) * length).astype(np.int64)
            cuts[-1] = length
            shares.append(np.diff(cuts, prepend=0))
            sizes += shares[-1]
        else:
            if sizes.min() >= min_size:
                return shares
    return None


def _dirichlet_balanced(
    labels: np.ndarray, clients: int, rng: np.random.Generator, alpha: float
) -> np.ndarray:
    """(n,) owner of every sample; the procedure of FedDyn and FedDC.

    A prior Dir(alpha 1_C) per client; then, sample by sample, a random client that is not full
    takes one of a class drawn from its prior over the classes that are not empty (uniform if
    their mass is zero). All sizes are n/K; where K does not divide n the first n mod K clients
    have one more.
    """
    names, y = np.unique(labels, return_inverse=True)
    left = np.bincount(y)
    prior = rng.dirichlet([alpha] * len(names), clients)
    takers = _takers(_equal_sizes(len(y), clients), rng)
    classes = _draw_classes(prior, takers, left, rng)
    owner = np.empty(len(y), np.int64)
    for label in range(len(names)):
        owner[rng.permutation(np.flatnonzero(y == label))] = takers[classes == label]
    return owner


def _takers(sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n,) clients in order of taking, each uniform among those that are not full.

    Uniform draws from all clients, of which those that come to a full client are dropped.
    """
    taken, room = [np.empty(0, np.int64)], sizes.copy()
    while room.any():
        drawn = rng.integers(len(sizes), size=max(_CHUNK, 2 * int(room.sum())))
        order = np.argsort(drawn, kind="stable")
        starts = np.searchsorted(drawn[order], np.arange(len(sizes)))
        rank = np.empty_like(drawn)
        rank[order] = np.arange(len(drawn)) - starts[drawn[order]]
        taken.append(drawn[rank < room[drawn]])
        room -= np.bincount(taken[-1], minlength=len(sizes))
    return np.concatenate(taken)


def _draw_classes(
    prior: np.ndarray, takers: np.ndarray, left: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """(n,) class of every taking: takers[t] draws from its prior over the non-empty classes.

    Draws are made in chunks, each from the classes that are not empty when it starts.  A chunk is
    valid up to the draw that empties a class, and the next one starts after that.
    """
    n, left = len(takers), left.copy()
    u, classes, t = rng.random(n), np.empty(n, np.int64), 0
    while t < n:
        cdf = np.cumsum(prior * (left > 0), axis=1)
        dead = cdf[:, -1] <= 0
        cdf[dead] = np.cumsum(left > 0)
        cdf /= cdf[:, -1:]
        chunk = slice(t, min(t + _CHUNK, n))
        drawn = (u[chunk, None] >= cdf[takers[chunk]]).sum(axis=1)
        valid = len(drawn)
        for label in np.flatnonzero(np.bincount(drawn, minlength=len(left)) >= left):
            if left[label]:
                valid = min(valid, np.flatnonzero(drawn == label)[left[label] - 1] + 1)
        classes[t : t + valid] = drawn[:valid]
        left -= np.bincount(drawn[:valid], minlength=len(left))
        t += valid
    return classes


def _pathological(
    labels: np.ndarray, clients: int, rng: np.random.Generator, classes_per_client: int
) -> np.ndarray:
    """(n,) owner of every sample: each client holds samples of `classes_per_client` classes.

    Classes are dealt in random order, again and again, to one client after the other, so that all
    are held by about equally many, who share a class equally.  flwr-datasets' partitioner may leave
    classes to nobody where this does not.  "#C = k" of https://arxiv.org/abs/2102.02079.
    """
    names = np.unique(labels)
    if classes_per_client > len(names) or clients * classes_per_client < len(names):
        raise DataError(
            f"{clients} clients of {classes_per_client} classes each cannot hold {len(names)} "
            "classes; change clients.number or data.classes-per-client"
        )
    holders: dict[int, list[int]] = {label: [] for label in range(len(names))}
    deck: list[int] = []
    for client in range(clients):
        for _ in range(classes_per_client):
            if not deck:
                deck = rng.permutation(len(names)).tolist()
            label = next(label for label in deck if client not in holders[label])
            deck.remove(label)
            holders[label].append(client)
    owner = np.empty(len(labels), np.int64)
    for label, name in enumerate(names):
        members = rng.permutation(np.flatnonzero(labels == name))
        sizes = _equal_sizes(len(members), len(holders[label]))
        owner[members] = np.repeat(holders[label], sizes)
    if len(np.unique(owner)) < clients:
        raise DataError(
            f"{clients} clients are too many for {len(labels)} samples in classes of their own; "
            "lower clients.number"
        )
    return owner

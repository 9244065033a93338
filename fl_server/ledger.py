"""What every client remembers, on the server's disk, and each client's last round that counted.

The server computes a client's memory from what it sent and received, by the same code as the
client.  A client that has lost its own is given it back, so that the result does not change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fl_common import wire
from fl_common.layout import COUNTERS, PARAMS, STATS
from fl_common.local import blank_memory, local_methods, new_memory
from fl_common.snapshots import OnDisk
from fl_server.exchange import RunFailed
from strategies.base import Reply, WeightedMean, over

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from typing import Any

    from flwr.app import ConfigRecord, Message

    from fl_common.config import CoreConfig
    from fl_common.groups import Groups
    from fl_common.layout import Flat

LAST = "last"
"""Prefix of a client's last model, which only the mean of all clients' models needs."""


class Ledger:
    """The clients' memories of one run."""

    def __init__(
        self,
        folder: Path,
        config: CoreConfig,
        model: Flat,
        groups: Groups,
        experiment: str,
        note: Callable[[str], None],
    ) -> None:
        """`model`: the one that the run begins with, which counts as every client's last."""
        self.folder, self.config, self.groups, self.note = folder, config, groups, note
        self.experiment = experiment
        self.rounds: dict[int, int] = {}
        """The last round of each client whose reply was accepted."""
        methods = local_methods(config, {wire.SAMPLES: config.clients.number}, 1, 1)
        self.remembers = any(method.memory for method in methods)
        self.needed = self.remembers or config.train.keeps_state
        self.initial: Flat = {}
        self.sum: Flat = {}
        """The sum of all clients' last models, float64, if their mean is evaluated."""
        if "all" in config.eval.model_names:
            self.initial = _averaged(model)
            self.sum = {k: v.double() * config.clients.number for k, v in self.initial.items()}
        self.begin()

    def settings(self, name: int, checkpoints: list[int]) -> dict[str, str | int | list[int]]:
        """What a message to client `name` says of its memory."""
        if not self.needed:
            return {}
        return {
            wire.EXPERIMENT: self.experiment,
            wire.MEMORY_ROUND: self.rounds.get(name, 0),
            wire.CHECKPOINTS: checkpoints,
        }

    def begin(self) -> None:
        """Begin a round, before its first reply."""
        self.counts = False
        """Whether the round has enough good replies; only then its models are evaluated."""
        self.sel: dict[str, WeightedMean] = {}
        """By kind, the mean of the models of the round's cohort."""
        self.first: Flat | None = None
        """BatchNorm's statistics of the cohort's first client."""
        self.change: dict[str, WeightedMean] = {}
        """What is added to `sum` when the round counts: how far each client's last model moved."""

    def take(self, name: int, message: Message, reply: Message, checkpoints: list[int]) -> None:
        """Enter a good reply to `message`: the client's memory after the round goes to the disk,
        and counts once the round is accepted.  Raises RunFailed, OSError."""
        answer, sent = Reply.of(reply), wire.vectors(message.content)
        model = self.groups.joined(answer.model, sent[PARAMS])
        evaluated = self.config.eval.model_names
        if "first" in evaluated and self.first is None:
            self.first = {STATS: model[STATS].clone()} if STATS in model else {}
        if "sel" in evaluated:
            for kind, vector in _averaged(model).items():
                self.sel.setdefault(kind, WeightedMean()).add(vector)
        if not ((self.remembers and self.config.server.ledger) or self.sum):
            return
        settings: ConfigRecord = message.content[wire.CONFIG]
        server_round, base = int(settings["server-round"]), self.rounds.get(name, 0)
        before = self._of(name).load(base) if base else {}
        if before is None:
            if self.sum:
                raise RunFailed(f"{self._damaged(name, base)}; eval.models=all cannot go on")
            self.note(f"{self._damaged(name, base)}; the client has its own copy")
            return
        new: Flat = {}
        if self.remembers:
            methods = local_methods(self.config, settings, server_round, answer.samples)
            known = before or blank_memory(methods, sent)
            new = new_memory(methods, known, sent, model)
        if self.sum:
            for kind, vector in _averaged(model).items():
                last = before[f"{LAST}.{kind}"] if before else self.initial[kind]
                change = vector.double() - last.double()
                self.change.setdefault(kind, WeightedMean()).add(change)
                new[f"{LAST}.{kind}"] = vector.clone()  # a method may remember the same vector
        self._of(name).save(server_round, new, base, checkpoints)

    def accept(self, server_round: int, names: list[int]) -> None:
        """The round counts: these clients took part in it."""
        self.rounds |= dict.fromkeys(names, server_round)
        self.counts = True
        for kind, change in self.change.items():
            self.sum[kind] = self.sum[kind] + change.take_sum()

    def give_back(self, name: int, request: Mapping[str, Any]) -> Flat | None:
        """What this client remembered after the last round that counted; None if it has no
        reason to ask.  Raises RunFailed if the server does not know it."""
        base = self.rounds.get(name, 0)
        if not self.needed or not base or request != {wire.MEMORY_LOST: base}:
            return None
        who = f"client {name} has lost its memory of round {base}"
        if self.config.train.keeps_state:
            raise RunFailed(
                f"{who}, and the server cannot know the momentum in it (train.keep-optimizer); "
                "set client.state-dir (a node has its own, --state-dir) to keep it on disk"
            )
        if not self.config.server.ledger:
            raise RunFailed(f"{who}, and server.ledger = false keeps no copy")
        entry = self._of(name).load(base)
        if entry is None:
            raise RunFailed(f"{who}, and {self._damaged(name, base)}")
        return {key: v for key, v in entry.items() if not key.startswith(f"{LAST}.")}

    def means(self) -> dict[str, Flat]:
        """The models sel, all and first, as far as they are evaluated beside the global one: of
        each, the vectors that take the place of the global one's."""
        number = self.config.clients.number
        found: dict[str, Flat] = {}
        if self.counts and self.sel:
            found["sel"] = {kind: over(m.sum, m.weight) for kind, m in self.sel.items()}
        if self.sum:
            found["all"] = {kind: total / number for kind, total in self.sum.items()}
        if self.counts and self.first is not None:
            found["first"] = self.first
        return found

    def _of(self, name: int) -> OnDisk:
        return OnDisk(self.folder / f"{name:06d}")

    def _damaged(self, name: int, base: int) -> str:
        place = self.folder / f"{name:06d}"
        return f"{place}: what client {name} remembered of round {base} is missing or damaged"


def _averaged(model: Flat) -> Flat:
    return {kind: vector for kind, vector in model.items() if kind != COUNTERS}

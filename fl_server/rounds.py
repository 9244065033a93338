"""The round loop that every engine and strategy shares."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from fl_common import determinism  # isort: skip  (sets MKL's environment before torch loads)
import torch
from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from fl_common import assembly, wire
from fl_common.config import methods
from fl_common.fingerprint import code_sha256, versions
from fl_common.guards import Expected
from fl_common.layout import PARAMS, on
from fl_common.sync import Holdings
from fl_server.checkpoint import Checkpoint
from fl_server.drift import Drift
from fl_server.evaluator import Evaluator
from fl_server.exchange import (
    POLL_S,
    Outcome,
    RoundFailed,
    RunFailed,
    addressed,
    by_reason,
    payload_bytes,
)
from fl_server.ledger import Ledger
from fl_server.roster import Cohort, draw
from strategies.base import Reply

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from flwr.app import MetricRecord

    from fl_common.config import CoreConfig
    from fl_common.groups import Groups
    from fl_common.guards import Spec
    from fl_common.layout import Flat
    from fl_server.exchange import Exchange
    from fl_server.progress import Progress
    from fl_server.recorder import Recorder
    from fl_server.roster import Member, Roster


class Rounds:
    """The round loop, the same for every strategy and engine."""

    def __init__(
        self,
        config: CoreConfig,
        exchange: Exchange,
        roster: Roster,
        recorder: Recorder,
        progress: Progress,
    ) -> None:
        self.device = assembly.training_device(config)
        determinism.prepare_process(
            config.train.threads, config.train.deterministic, self.device.type
        )
        self.waits = exchange.held_bytes is not None
        """Whether this process trains nobody: it then returns memory while it waits."""
        if self.waits:
            determinism.return_memory()
        self.config, self.exchange, self.roster = config, exchange, roster
        self.recorder, self.progress = recorder, progress
        first = roster.members[0]
        self.evaluator = Evaluator(config, first, self.device, getattr(exchange.grid, "workers", 1))
        model = self.evaluator.model()
        self.layers: Groups | None = None
        """With eval.grad-norm: the groups whose norms are reported."""
        self.strategy = methods("strategies")[config.strategy.name](config)
        try:
            groups = assembly.groups_of(config, self.evaluator.net, first.shape)
            if config.eval.grad_norm:
                self.layers = assembly.layers_of(config, self.evaluator.net, first.shape)
            self.strategy.bind(groups)
        except ValueError as error:
            raise RunFailed(str(error)) from error
        self._rest()
        # Where every round changes the whole model, a message can leave nothing out, unless
        # clients have evaluated the model on which they then train.
        useful = self.strategy.partial or config.eval.on != "server"
        tracked = useful and self.strategy.tracked and config.sync.mode == "versions"
        self.holdings = Holdings(groups, tracked)
        if config.eval.on != "clients":
            self.evaluator.load_data(first)
        self.samples = [roster.members[i].samples for i in sorted(roster.members)]
        """n_i of all clients at the roll call."""
        self.done = 0
        """The last round that was played."""
        self.failures = 0
        """Rounds in a row that changed nothing."""
        self.unwritten: tuple[Checkpoint, dict[str, Any]] | None = None
        """The last round's checkpoint and history row.  The checkpoint is written while clients
        train in the next round; the row is shown once the checkpoint is on the disk."""
        self.ledger = Ledger(
            recorder.folder / "ledger", config, model, groups, uuid4().hex, progress.note
        )
        self.place = self._place()
        """Where the global model is kept and replies are summed."""
        self.model: Flat = on(self.place, model)
        recorder.summary["experiment"] = self.ledger.experiment

    def _place(self) -> torch.device:
        """The card if this very process trains on it, which saves copies to and fro; the CPU if
        replies come from other processes, or if clients' memories go to the disk."""
        apart = getattr(self.exchange.grid, "clients_apart", True)
        kept = self.ledger.needed or self.ledger.sum or self.config.client.state_dir
        usable = self.strategy.on_card and not (apart or kept)
        return self.device if usable else torch.device("cpu")

    def play(self) -> None:
        """Play the rounds that are left; afterwards `model` is the final one."""
        try:
            self._rounds()
        except BaseException:  # keep what was reached, whatever ended the rounds
            try:
                self.write()
            except RunFailed as error:
                self.progress.note(str(error))
            raise
        self.write()

    def _rounds(self) -> None:
        for server_round in range(self.done + 1, self.config.run.rounds + 1):
            started, row = time.perf_counter(), {}
            try:
                self.train(server_round, row)
                if self._due(self.config.eval.every, server_round):
                    self.evaluate(server_round, row)
                if self._due(self.config.flatness.every, server_round):
                    self.measure(server_round, row)
                self._rest()
                self._record(row, started)
                self.done = server_round
            except OSError as error:
                raise self._disk_error(server_round, error) from error
            except RunFailed:
                if row:  # who was refused, and why, is what the run ended for
                    try:
                        self._record(row, started, done=False)
                    except OSError as error:
                        self.progress.note(str(self._disk_error(server_round, error)))
                raise
            if self._due(self.config.server.checkpoint_every, server_round):
                self.unwritten = self.checkpoint(), row
            else:
                self.progress.row(row)

    def _record(self, row: dict[str, Any], started: float, *, done: bool = True) -> None:
        row["seconds"] = round(time.perf_counter() - started, 4)
        self.recorder.row(row, done=done)

    def _due(self, every: int, server_round: int) -> bool:
        """Whether something is due that is done every so many rounds and in the last; 0: never."""
        return every > 0 and (server_round == self.config.run.rounds or not server_round % every)

    def checkpoint(self) -> Checkpoint:
        """All that the next round depends on; tensors are not copied, since nobody changes them."""
        return Checkpoint(
            round=self.done,
            tensors={
                "model": dict(self.model),
                "strategy": self.strategy.state(),
                "ledger": dict(self.ledger.sum),
            },
            facts={
                "experiment": self.ledger.experiment,
                "clients": {str(name): r for name, r in sorted(self.ledger.rounds.items())},
                "held": self.holdings.state(),
                "failures": self.failures,
                "samples": self.samples,
                "data": sorted({member.data for member in self.roster.known.values()}),
                "code": code_sha256(),
                "versions": versions(),
                **self.recorder.facts(),
            },
        )

    def write(self) -> None:
        """Write the last round's checkpoint unless that is done already.  Raises RunFailed."""
        if self.unwritten:
            last, row = self.unwritten
            try:
                self.recorder.checkpoints.write(last)
            except OSError as error:
                self.unwritten = None
                raise self._disk_error(last.round, error) from error
            self.unwritten = None
            self.progress.row(row)

    def _disk_error(self, server_round: int, error: OSError) -> RunFailed:
        """The end of a run whose disk refused a write."""
        return RunFailed(
            f"round {server_round}: {error.filename or self.recorder.folder}: "
            f"{error.strerror or error}; the rounds done before it are kept"
        )

    def resume(self) -> None:
        """Go back to the newest good checkpoint.  Raises RunFailed."""
        saved = self.recorder.checkpoints.newest(self.progress.note)
        facts, rounds = saved.facts, self.config.run.rounds
        if saved.round > rounds:
            raise RunFailed(f"run.rounds = {rounds}: {saved.round} rounds are already done")
        for kind, vector in saved.tensors["model"].items():
            if kind not in self.model or vector.shape != self.model[kind].shape:
                raise RunFailed(
                    f"the checkpoint's {kind} are not those of {self.config.model.name}"
                )
        self._check_data(facts)
        for what, now in (("code", code_sha256()), ("versions", versions())):
            if facts[what] != now:
                self.progress.note(f"warning: other {what} than before: bits may differ")
        self.model = on(self.place, saved.tensors["model"])
        self.done, self.failures = saved.round, facts["failures"]
        self.strategy.load_state(on(self.place, saved.tensors.get("strategy", {})))
        self.ledger.experiment = self.recorder.summary["experiment"] = facts["experiment"]
        self.ledger.rounds = {int(name): r for name, r in facts["clients"].items()}
        self.holdings.load_state(facts.get("held", {}))
        self.ledger.sum = saved.tensors.get("ledger", {})
        self.recorder.rewind(saved.round, facts)

    def _check_data(self, facts: Mapping[str, Any]) -> None:
        """Raises RunFailed unless the clients hold the data that a checkpoint's facts tell of."""
        data = sorted({member.data for member in self.roster.known.values()})
        changed = {
            i: f"{now} training samples, {was} when the run began"
            for i, (was, now) in enumerate(zip(facts["samples"], self.samples, strict=True))
            if was != now
        } or {
            i: "other data than when the run began"
            for i, member in self.roster.known.items()
            if member.data not in facts["data"]
        }
        if changed or facts["data"] != data:
            told = [f"{who}: {what}" for what, who in by_reason(changed, "client")]
            told = told or ["the clients hold other data than when the run began"]
            raise RunFailed("; ".join([*told, "give them the same data again, or start a new run"]))

    def train(self, server_round: int, row: dict[str, Any]) -> None:
        """Play one round and fill in its history row: draw a cohort, push the strategy's messages,
        and hand good replies to the strategy in partition order, as they come.  Raises RunFailed,
        with the row filled in if the round was played."""
        config = self.config
        names = draw(config.clients, config.run.seed, server_round)
        # A bernoulli cohort may be smaller than the replies that are asked for.
        at_least = min(config.clients.min_replies, len(names))
        self._gather(names, at_least, server_round)
        cohort, absent = self.roster.drawn(names)
        outcome = Outcome(failed=absent)
        settings = ConfigRecord({wire.SAMPLES: sum(self.samples)})
        evaluates = self._due(config.eval.every, server_round)
        if config.eval.on != "server" and evaluates:
            settings["evaluate"] = True
        messages = self.strategy.configure_train(
            server_round, wire.pack(self.model), settings, Cohort(self.exchange.grid, cohort)
        )
        samples = {member.partition: member.samples for member in cohort}
        records, series = self.strategy.expected(), self._series(messages)

        def expected(name: int) -> Expected:
            n, metrics = samples[name], metrics_of(settings)
            return Expected(records, server_round, n, metrics, config.train.steps(n), series)

        phase, asked = f"round {server_round}", _by_partition(messages, cohort)
        replies = self._replies(
            asked, server_round, phase, outcome, expected, at_least, meanwhile=self.write
        )
        drift = Drift(self.model[PARAMS], self.holdings.groups) if evaluates else None
        loss, shortage = None, ""
        try:
            arrays, metrics = self.strategy.aggregate_train(
                server_round, self._entered(replies, asked, drift)
            )
            if arrays is None:
                raise RoundFailed(f"{phase}: the strategy gave no model")
            self.model, loss, self.failures = wire.unpack(arrays), float(metrics["loss"]), 0
            self.ledger.accept(server_round, list(outcome.accepted))
        except RoundFailed as error:  # kept, it and this frame would keep each other alive
            shortage = str(error)
        self._tell(phase, outcome)
        row |= _row(server_round, names, outcome, loss, series)
        active = _active(messages)
        if 0 < len(active) < len(self.holdings.groups.names):
            row["active"] = active
        if drift:
            row |= drift.row()
        if shortage:
            self._round_failed(shortage, outcome, len(names))
        results = {"the new model": self.model, "the strategy's state": self.strategy.state()}
        for what, vectors in results.items():
            if not all(torch.isfinite(vector).all() for vector in vectors.values()):
                raise RunFailed(
                    f"{phase}: {what} has NaN or infinite values; lower the learning rates "
                    "(train.lr, or the strategy's)"
                )

    def _gather(self, names: Sequence[int], at_least: int, server_round: int) -> None:
        """Wait for the cohort: for each client until its time to come back is up, and for
        `at_least` of them until a round's deadline."""
        end = time.monotonic() + self.config.clients.deadline_s
        if len(self.roster.drawn(names)[0]) < len(names):
            self.write()  # so that a crash during the wait loses nothing
        self.roster.wait_for(names)
        told = -1
        while (here := len(self.roster.drawn(names)[0])) < at_least:
            if (left := end - time.monotonic()) < 0:
                return
            if here != told:
                told = here
                self.progress.note(
                    f"round {server_round}: {here} of {len(names)} clients are connected, "
                    f"clients.min-replies = {at_least}; waiting, {left:.0f} s at most "
                    "(clients.deadline-s)"
                )
            time.sleep(POLL_S)
            self.roster.refresh()

    def _replies(
        self,
        asked: Mapping[int, Message],
        server_round: int,
        phase: str,
        outcome: Outcome,
        expected: Callable[[int], Expected],
        at_least: int = 0,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[int, Message]]:
        """The good replies to a strategy's messages, each with the name of its client.  A client is
        sent what it lacks as far as is known, and the rest once it says that it lacks more."""

        def sent() -> None:
            meanwhile()
            self.progress.asked(phase, len(asked))

        if not asked:
            self.holdings.current = {}
        else:
            self.holdings.offer(wire.unpack(next(iter(asked.values())).content[wire.ARRAYS]))
        slim = {name: self._slim(name, message) for name, message in asked.items()}

        def give_back(name: int, request: MetricRecord) -> RecordDict | None:
            content, lacks = slim[name].content, dict(request)
            if lacks.pop("server-round", None) != server_round:
                return None
            if wire.GROUPS_LOST in lacks:
                if not self.holdings.withholds(content):
                    return None
                del lacks[wire.GROUPS_LOST]
                content = self.holdings.content(name, content, whole=True)
            if lacks:
                memory = self.ledger.give_back(name, lacks)
                if memory is None:
                    return None
                content = RecordDict({**content, wire.MEMORY: wire.pack(memory)})
            return content

        replies = self.exchange.replies(
            slim, phase, outcome, self._counted(expected), at_least, give_back, sent,
            large=max(map(payload_bytes, asked.values()), default=0),
        )  # fmt: skip
        try:
            for name, reply in replies:
                self.holdings.answered(name)
                yield name, reply
                del reply  # before the next one comes
        finally:
            self.holdings.rest()
            if outcome.restored:
                self.recorder.restored(server_round, outcome.restored)

    def _counted(self, expected: Callable[[int], Expected]) -> Callable[[int], Expected]:
        """`expected`, which is called once per reply, made to count that reply in the progress."""

        def counted(name: int) -> Expected:
            self.progress.reply()
            return expected(name)

        return counted

    def _slim(self, name: int, message: Message) -> Message:
        """The message with only the arrays that the client lacks, and with what it should know of
        its memory."""
        content = self.holdings.content(name, message.content)
        own = self.ledger.settings(name, self.recorder.checkpoints.rounds)
        if self.holdings.tracked:
            own[wire.EXPERIMENT] = self.ledger.experiment
        content[wire.CONFIG] = ConfigRecord({**content[wire.CONFIG], **own})
        return addressed(message.metadata.dst_node_id, message, content)

    def _entered(
        self,
        replies: Iterable[tuple[int, Message]],
        asked: Mapping[int, Message],
        drift: Drift | None,
    ) -> Iterator[Message]:
        """The replies, each entered in the ledger, and in `drift`, on its way to the strategy."""
        self.ledger.begin()
        for name, reply in replies:
            self.ledger.take(name, asked[name], reply, self.recorder.checkpoints.rounds)
            if drift:
                drift.add(Reply.of(reply))
            yield reply
            del reply  # before the next one comes

    def _series(self, messages: Sequence[Message]) -> frozenset[str]:
        """The metrics of a reply that are lists, with a number for every local step."""
        if not (self.config.eval.grad_norm and messages):
            return frozenset()
        active = _active(messages) or self.layers.names
        return frozenset({wire.GRAD_NORM, *(f"{wire.GRAD_NORM}.{name}" for name in active)})

    def _round_failed(self, shortage: str, outcome: Outcome, asked: int) -> None:
        """Too few good replies.  Too few answers end the run at once; enough answers of which too
        many are bad, after clients.max-failed-rounds such rounds in a row."""
        answers = len(outcome.accepted) + len(outcome.rejected)
        if answers < min(self.config.clients.min_replies, asked):
            raise RunFailed(shortage)
        self.failures += 1
        self.progress.note(f"{shortage}; the model stays as it was")
        if self.failures >= self.config.clients.max_failed_rounds:
            raise RunFailed(
                f"{shortage}; failed round {self.failures} in a row (clients.max-failed-rounds)"
            )

    def _tell(self, phase: str, outcome: Outcome) -> None:
        """Note whose replies are missing, and why."""
        for name, reason in sorted((outcome.failed | outcome.rejected).items()):
            word = "rejected: " if name in outcome.rejected else ""
            self.progress.note(f"{phase}, client {name}: {word}{reason}")

    def _rest(self) -> None:
        """Give back the network's memory until the next evaluation, if this process only waits."""
        if self.waits:
            self.evaluator.put_away()

    def measure(self, server_round: int, row: dict[str, Any]) -> None:
        """Flatness at the new global model, and H_N and H_D between clients, into the row."""
        from fl_server.flatness import expected_diagonal, matched

        config, flatness = self.config, self.evaluator.flatness
        try:
            self.evaluator.install(self.model)
            row |= flatness.row(self.evaluator.net)
            if config.flatness.match != "none":
                expected = expected_diagonal(config, self.evaluator.net)
                row |= matched(config, self._diagonals(server_round, row, expected))
        except ValueError as error:  # not finite, zero, or lost in the noise: training goes on
            row["flatness_error"] = str(error)
            self.progress.note(f"round {server_round}: flatness: {error}")

    def _diagonals(
        self, server_round: int, row: dict[str, Any], expected: dict[str, dict[str, Spec]]
    ) -> Iterator[tuple[int, Message]]:
        """Every client's name and answer.  Its bytes go into the summary, as the cost of measuring,
        and not into the row, which has those of the algorithm."""
        members, outcome = self._everyone()
        phase = f"flatness of round {server_round}"
        settings = ConfigRecord({"server-round": server_round})
        content = {wire.ARRAYS: wire.pack(self.model), wire.CONFIG: settings}
        # The whole model, past `holdings`: measuring does not change what training sends.
        kind, group = MessageType.QUERY, str(server_round)
        asked = {
            member.partition: Message(RecordDict(content), member.node_id, kind, group_id=group)
            for member in members
        }
        samples = {member.partition: member.samples for member in members}
        self.progress.asked(phase, len(asked))
        replies = self.exchange.replies(
            asked,
            phase,
            outcome,
            self._counted(
                lambda name: Expected(expected, server_round, samples[name], frozenset())
            ),
        )
        for name, reply in replies:
            yield name, reply
            del reply  # before the next one comes
        self._tell(phase, outcome)
        row["flatness_failed"] = _reasons(outcome.failed | outcome.rejected)
        self.recorder.measured(outcome.bytes_down, outcome.bytes_up)

    def evaluate(self, server_round: int, row: dict[str, Any]) -> None:
        """Evaluate the new global model on the server's test set, all clients' held-out samples, or
        both, into the round's row."""
        if self.config.eval.on != "server":
            self._on_clients(server_round, row)
        if self.evaluator.data is not None:
            row["accuracy"], row["loss"] = self.evaluator.evaluate(self.model)
            for name, mean in self.ledger.means().items():
                found = self.evaluator.evaluate(self.model | mean)
                row[f"accuracy_{name}"], row[f"loss_{name}"] = found

    def _everyone(self) -> tuple[list[Member], Outcome]:
        """All clients that are here or come back in time, and an outcome that names the others:
        evaluation and flatness ask everyone, not a round's cohort."""
        everyone = range(self.config.clients.number)
        self.roster.wait_for(everyone)
        members, absent = self.roster.drawn(everyone)
        return members, Outcome(failed=absent)

    def _on_clients(self, server_round: int, row: dict[str, Any]) -> None:
        """Evaluate the new model on every client's held-out samples, into the row: the mean,
        weighted by samples, and each client's accuracy.  Raises RunFailed if nobody answers."""
        members, outcome = self._everyone()
        phase = f"evaluation of round {server_round}"
        held_out = {member.partition: member.held_out for member in members}
        messages = self.strategy.configure_evaluate(
            server_round,
            wire.pack(self.model),
            ConfigRecord({wire.SAMPLES: sum(self.samples)}),
            Cohort(self.exchange.grid, members),
        )
        replies = self._replies(
            _by_partition(messages, members),
            server_round,
            phase,
            outcome,
            lambda name: Expected(
                {}, server_round, held_out[name], frozenset({"accuracy", "loss"})
            ),
        )
        metrics = self.strategy.aggregate_evaluate(server_round, (reply for _, reply in replies))
        self._tell(phase, outcome)
        row |= {
            "evaluation_failed": _reasons(outcome.failed | outcome.rejected),
            "bytes_down": row["bytes_down"] + outcome.bytes_down,
            "bytes_up": row["bytes_up"] + outcome.bytes_up,
        }
        if metrics is None:
            raise RunFailed(f"{phase}: no client answered")
        accuracies = _by_client(outcome, "accuracy")
        worst = sorted(accuracies.values())[: math.ceil(len(accuracies) / 10)]
        row |= {
            "accuracy": float(metrics["accuracy"]),
            "loss": float(metrics["loss"]),
            "client_accuracy": accuracies,
            "client_accuracy_mean": sum(accuracies.values()) / len(accuracies),
            "client_accuracy_worst_decile": sum(worst) / len(worst),
        }


def _active(messages: Sequence[Message]) -> list[str]:
    """The groups of layers that a round trains, as its messages say; empty where they do not say,
    which means all."""
    return list(messages[0].content[wire.CONFIG].get(wire.ACTIVE, ())) if messages else []


def _by_partition(messages: Sequence[Message], cohort: Sequence[Member]) -> dict[int, Message]:
    """Each message by its receiver, in partition order.  A strategy may list them in any order;
    Flower's list them in a random one."""
    partition_of = {member.node_id: member.partition for member in cohort}
    asked = {partition_of[message.metadata.dst_node_id]: message for message in messages}
    return dict(sorted(asked.items()))


def _row(
    server_round: int,
    names: Sequence[int],
    outcome: Outcome,
    loss: float | None,
    series: frozenset[str],
) -> dict[str, Any]:
    """What the history says of a round's messages and replies."""
    row = {
        "round": server_round,
        "cohort": list(names),
        "replies": sorted(outcome.accepted),
        "failed": _reasons(outcome.failed),
        "rejected": _reasons(outcome.rejected),
        "bytes_up": outcome.bytes_up,
        "bytes_down": outcome.bytes_down,
        "client_cpu_s": round(sum(m["cpu-s"] for m in outcome.accepted.values()), 4),
        "client_loss": loss,
    }
    if series and outcome.accepted:
        row["grad_norm"] = {
            key.removeprefix(wire.GRAD_NORM).lstrip(".") or "all": _mean_by_step(outcome, key)
            for key in sorted(series)
        }
    for moment in ("before", "after"):
        if accuracies := _by_client(outcome, f"accuracy-{moment}"):
            row[f"client_accuracy_{moment}"] = accuracies
    return row


def _reasons(reasons: Mapping[int, str]) -> dict[str, str]:
    return {str(name): reason for name, reason in sorted(reasons.items())}


def metrics_of(settings: ConfigRecord) -> frozenset[str]:
    """The numbers that come with a reply to training, besides round and samples."""
    moments = ("before", "after") if settings.get("evaluate") else ()
    held_out = {f"{kind}-{moment}" for kind in ("accuracy", "loss") for moment in moments}
    return frozenset({"steps", "loss", "cpu-s"} | held_out)


def _mean_by_step(outcome: Outcome, key: str) -> list[float]:
    """For each local step the mean of `key` over the clients that made it, to six digits."""
    series = [outcome.accepted[name][key] for name in sorted(outcome.accepted)]
    longest = max(map(len, series))
    by_step = [[s[k] for s in series if k < len(s)] for k in range(longest)]
    return [float(f"{sum(norms) / len(norms):.6g}") for norms in by_step]


def _by_client(outcome: Outcome, key: str) -> dict[str, float]:
    """A metric of the accepted replies, by client; those that do not have it are left out."""
    return {str(name): m[key] for name, m in sorted(outcome.accepted.items()) if key in m}

"""The in-process engine: a Flower Grid whose nodes are answered by this very process.

`push_messages` queues, `pull_messages` lets one client work and hands its reply on, so that one
model is alive at a time.  Nothing is serialised and no port is opened.  With several workers the
clients work in processes forked from this one, and replies are handed on as they come.  What
touches Flower's non-public parts (task identity, message ids) is all in this module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fl_common.config import AUTO
from fl_common.failures import reason
from fl_common.wire import array_records
from fl_server.workers import Job, Pool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

    from flwr.clientapp import ClientApp

    from fl_common.config import Scalar

RUN_ID = SERVER_ID = TASK_ID = 1


class InProcessGrid(Grid):
    """`clients` nodes with partitions 0 .. clients-1, each with a context of its own.

    workers: how many processes train, each one client at a time; 1: this process alone.  cohort:
    how many clients this process trains at once instead, or `auto`; then `chosen` is told the
    number, and why, and if it is 1 the workers train.
    """

    def __init__(
        self,
        client_app: ClientApp,
        clients: int,
        run_config: Mapping[str, Scalar],
        workers: int = 1,
        cohort: str = "1",
        chosen: Callable[[int, str], None] = lambda number, why: None,
    ) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id = TASK_ID, RUN_ID
        TaskIdentity.node_id = SERVER_ID
        self._run = Run.create_empty(run_id=RUN_ID)
        self._client_app = client_app
        shared = dict(run_config)
        self._contexts = {
            SERVER_ID + 1 + partition: Context(
                run_id=RUN_ID,
                node_id=SERVER_ID + 1 + partition,
                node_config={"partition-id": partition, "num-partitions": clients},
                state=RecordDict(),
                run_config=shared,
            )
            for partition in range(clients)
        }
        self._queue: dict[str, Message] = {}
        self._out: dict[str, Message] = {}
        """What the workers have been given."""
        self._newest: dict[int, str] = {}
        """The message id of each node's newest work."""
        self.workers, self._threads = workers, int(run_config.get("train.threads", 1))
        self._pool = self._fork() if workers > 1 and cohort == "1" else None
        self._cohort, self._chosen = cohort, chosen

    @property
    def clients_apart(self) -> bool:
        """Whether clients work in other processes."""
        return self._pool is not None

    def close(self) -> None:
        """End the worker processes."""
        if self._pool:
            self._pool.close()

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        queued = {message.metadata.message_id: message for message in map(_named, messages)}
        if work := list(filter(_is_work, queued.values())):
            self._forget_others(work[0])
        self._newest |= {m.metadata.dst_node_id: m.metadata.message_id for m in work}
        self._queue |= queued
        if self._pool:
            self._to_workers()
        return list(queued)

    def _fork(self) -> Pool:
        """The workers, no more than there are clients: others would have nothing to do."""
        return Pool(min(self.workers, len(self._contexts)), self._work, self._threads)

    def _forget_others(self, work: Message) -> None:
        """Drop the work of other phases, for which nobody waits any more."""
        waiting = [m for m in (*self._queue.values(), *self._out.values()) if _is_work(m)]
        stale = {m.metadata.message_id for m in waiting if _phase(m) != _phase(work)}
        self._queue = {key: m for key, m in self._queue.items() if key not in stale}
        if self._pool:
            self._out = {key: m for key, m in self._out.items() if key not in stale}
            self._pool.withdraw(stale)

    def _to_workers(self) -> None:
        """Hand all queued work to the workers."""
        work = {key: message for key, message in self._queue.items() if _is_work(message)}
        self._queue = {key: m for key, m in self._queue.items() if key not in work}
        self._out |= work
        self._pool.put([self._job(message) for message in work.values()])

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The reply to the next queued message among `message_ids`, or all that the workers have
        given since, to whatever message; empty when none is left."""
        if self._queue:
            waiting = (self._queue[i] for i in message_ids if i in self._queue)
            if first := next(waiting, None):
                if self._cohort != "1" and first.metadata.message_type == "train":
                    return self._at_once([first, *waiting])
                return [self._answer(self._queue.pop(first.metadata.message_id))]
        return self._of_workers() if self._pool else []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        left = set(self.push_messages(messages))
        replies = []
        while left:
            arrived = self.pull_messages(left)
            replies += arrived
            left -= {reply.metadata.reply_to_message_id for reply in arrived}
        return replies

    def _answer(self, message: Message) -> Message:
        context = self._contexts[message.metadata.dst_node_id]
        try:
            reply = self._client_app(message, context)
        except Exception as error:  # as on the other engines: a failed client is a reply
            reply = _failure(reason(error), message)
        return _named(reply)

    def _job(self, message: Message) -> Job:
        metadata = message.metadata
        header = {
            "id": metadata.message_id,
            "to": metadata.dst_node_id,
            "type": metadata.message_type,
            "group": metadata.group_id,
        }
        state = self._contexts[metadata.dst_node_id].state
        return Job(metadata.message_id, header, message.content, state)

    def _work(
        self, header: dict[str, Any], content: RecordDict, state: RecordDict
    ) -> tuple[RecordDict, RecordDict]:
        """In a worker: the client's reply and its new state."""
        message = Message(content, header["to"], header["type"], group_id=header["group"])
        message.metadata.__dict__["_message_id"] = header["id"]
        context = self._contexts[header["to"]]
        context.state = state
        try:
            return self._client_app(message, context).content, context.state
        finally:
            context.state = RecordDict()  # the server's process keeps it

    def _at_once(self, messages: list[Message]) -> list[Message]:
        """The replies to as many of these as are trained at once, in the order of the nodes."""
        from fl_client.app import partition_of, resident

        messages = [m for m in messages if m.metadata.message_type == "train"]
        messages.sort(key=lambda message: message.metadata.dst_node_id)
        contexts = [self._contexts[message.metadata.dst_node_id] for message in messages]
        requests = [
            (partition_of(context), message.content, context.state)
            for message, context in zip(messages, contexts, strict=True)
        ]
        try:
            clients = resident(contexts[0])
            if self._cohort == AUTO:
                number, why = clients.choose_cohort(requests, self.workers)
                self._cohort = str(number)
                self._chosen(number, why)
                if number == 1 and self.workers > 1:
                    self._pool = self._fork()
                    self._to_workers()
                    return self._of_workers()
            number = int(self._cohort)
            answers = clients.train_together(requests[:number], number)
        except Exception as error:  # why this process can train nobody
            answers = [error]
        replies = []
        for message, answer in zip(messages, answers, strict=False):
            if answer is None:
                continue
            del self._queue[message.metadata.message_id]
            if isinstance(answer, Exception):
                replies.append(_failure(reason(answer), message))
            else:
                replies.append(Message(answer, reply_to=message))
        return [_named(reply) for reply in replies]

    def _of_workers(self) -> list[Message]:
        replies = []
        for done in self._pool.collect():
            message = self._out.pop(done.key)
            node = message.metadata.dst_node_id
            if done.state is not None and self._newest[node] == done.key:
                self._contexts[node].state = done.state
            failed = done.error and _failure(done.error, message)
            replies.append(_named(failed or Message(done.content, reply_to=message)))
        return replies


def _is_work(message: Message) -> bool:
    """The roll call, which has no arrays, is answered at once."""
    return bool(array_records(message.content))


def _phase(message: Message) -> tuple[str, str]:
    return message.metadata.group_id, message.metadata.message_type


def _failure(reason: str, message: Message) -> Message:
    error = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason)
    return Message(error, reply_to=message)


def _named(message: Message) -> Message:
    message.metadata.__dict__["_message_id"] = str(uuid4())
    return message

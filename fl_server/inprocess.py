"""The in-process engine: a Flower Grid whose nodes are answered by this very process.

`push_messages` queues, `pull_messages` lets one client work and hands its reply on, so that one
model is alive at a time.  Nothing is serialised and no port is opened.  What touches Flower's
non-public parts (task identity, message ids) is all in this module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from flwr.clientapp import ClientApp

    from fl_common.config import Scalar

RUN_ID = SERVER_ID = TASK_ID = 1


class InProcessGrid(Grid):
    """`clients` nodes with partitions 0 .. clients-1, each with a context of its own."""

    def __init__(
        self, client_app: ClientApp, clients: int, run_config: Mapping[str, Scalar]
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
        pushed = list(messages)
        for message in pushed:
            message.metadata.__dict__["_message_id"] = str(uuid4())
        self._queue |= {message.metadata.message_id: message for message in pushed}
        return [message.metadata.message_id for message in pushed]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The reply of the next queued message among `message_ids`; empty when none is left."""
        for message_id in message_ids:
            if message_id in self._queue:
                return [self._answer(self._queue.pop(message_id))]
        return []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        ids = self.push_messages(messages)
        return [reply for _ in ids for reply in self.pull_messages(ids)]

    def _answer(self, message: Message) -> Message:
        context = self._contexts[message.metadata.dst_node_id]
        try:
            reply = self._client_app(message, context)
        except Exception as error:  # as on the other engines: a failed client is a reply
            reason = f"{type(error).__name__}: {error}"
            reply = Message(
                Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=message
            )
        reply.metadata.__dict__["_message_id"] = str(uuid4())
        return reply

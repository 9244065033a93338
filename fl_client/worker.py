"""A resident trainer: one process of a node that keeps model, data and device between messages.

Flower starts a process for every message.  With the node's `worker-socket` that process imports no
torch: it hands the message to the worker over a Unix socket and passes the answer on.  This half of
the module is the standard library's and Flower's alone; the worker's own half imports the rest.

On the socket, each way: lengths, a JSON header, the content, the node's state (Flower's own
serialisation).  One message is worked on at a time; others wait in the socket's queue.  Model and
data are kept for the last message's run: runs that take turns get right results, slowly.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import struct
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from flwr.app import Context, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from fl_common.failures import Failed, reason
from fl_common.fingerprint import code_sha256
from fl_common.sockets import read

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import NoReturn

LENGTHS = struct.Struct("!QQQ")
CONNECT_S = 30.0
"""How long a starting worker is waited for [s]."""
ANSWER_S = 3600.0
"""How long an answer is waited for if the run has no clients.deadline-s [s]."""
WATCH_S = 1.0
"""Pause between two looks at whether the worker's node still lives [s]."""
ANSWERS = ("query", "train", "evaluate")


class WorkerError(Failed):
    """Why this message has no answer; one line, which becomes the client's failure."""


class DeviceLost(RuntimeError):
    """This worker can no longer use its device: it ends, and another takes its place."""


def run(path: str) -> None:
    """Run a worker until a signal ends it.  Raises OSError."""
    import torch

    from fl_client.app import answer, release

    def answer_afresh(kind: str, content: RecordDict, context: Context) -> RecordDict:
        """After an error nothing is kept: it may fill a GPU, and a fresh start may not fail."""
        try:
            return answer(kind, content, context)
        except torch.AcceleratorError as error:  # this process cannot use its device again
            raise DeviceLost(reason(error)) from error
        except Exception:
            release()
            raise

    code_sha256()  # now, while the files are the code that is imported
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        serve(path, answer_afresh)
    except DeviceLost as error:
        sys.exit(f"error: {error}; this trainer ends; another can take its place")


def ask(path: str, kind: str, content: RecordDict, context: Context) -> RecordDict:
    """The worker's answer to a message; `context.state` is brought up to date.

    Raises WorkerError if there is no worker, if it dies before it answers, if it is silent until
    the round is over, if its code differs from ours, and with the reason if answering fails.
    """
    header = {
        "kind": kind,
        "code": code_sha256(),
        "run-id": context.run_id,
        "run": dict(context.run_config),
        "node": dict(context.node_config),
    }
    limit = float(context.run_config.get("clients.deadline-s", ANSWER_S))
    with _connected(path) as connection:
        # A worker that dies closes the connection; one that hangs is waited for to the round's end.
        connection.settimeout(limit)
        try:
            _send(connection, header, content, context.state)
            answer, reply, state = _receive(connection)
        except TimeoutError:
            raise WorkerError(
                f"the trainer at {path} gave no answer within {limit:g} s (clients.deadline-s)"
            ) from None
        except (OSError, EOFError):
            raise WorkerError(f"the trainer at {path} died while handling the message") from None
    if "error" in answer:
        raise WorkerError(answer["error"])
    context.state = state
    return reply


def _connected(path: str) -> socket.socket:
    """A connection to the worker, which may be starting.  Raises WorkerError."""
    end = time.monotonic() + CONNECT_S
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
            return connection
        except OSError as error:
            connection.close()
            if time.monotonic() > end:
                raise WorkerError(
                    f"no trainer at {path} ({error.strerror or error}): start it with `flatfed "
                    "worker --socket PATH`, or leave worker-socket out"
                ) from None
        time.sleep(0.1)


def serve(path: str, answer: Callable[[str, RecordDict, Context], RecordDict]) -> NoReturn:
    """Answer whoever connects.  The socket is for this user alone.

    Raises OSError if it cannot be made; one that a dead worker left is replaced.  Raises DeviceLost
    if `answer` does, after the reply has said so.
    """
    with socket.socket(socket.AF_UNIX) as server:
        _bind(server, path)
        try:
            server.listen(64)
            print(f"trainer ready at {path}", flush=True)
            while True:
                caller, _ = server.accept()
                with caller, suppress(OSError, EOFError):  # it went away: nobody waits
                    _serve(caller, answer)
        finally:
            with suppress(OSError):
                os.unlink(path)


def _bind(server: socket.socket, path: str) -> None:
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(f"{path}: exists and is not a socket; give another --socket")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
            else:
                raise OSError(f"{path}: another trainer is there; end it, or give another --socket")
    before = os.umask(0o177)
    try:
        server.bind(path)
    finally:
        os.umask(before)


def _serve(caller: socket.socket, answer: Callable[..., RecordDict]) -> None:
    header, content, state = _receive(caller)
    if header["code"] != code_sha256():
        error = (
            "the trainer runs other code than the app that was sent; restart it with that version"
        )
    elif header["kind"] not in ANSWERS:
        error = f"{header['kind']}: the trainer answers {', '.join(ANSWERS)}"
    else:
        try:
            context = Context(header["run-id"], 0, header["node"], state, header["run"])
            reply = answer(header["kind"], content, context)
        except DeviceLost as failure:
            with suppress(OSError):
                _send(caller, {"error": str(failure)}, RecordDict(), RecordDict())
            raise
        except Exception as failure:  # as Flower has it: a failed client is a reply
            error = reason(failure)
        else:
            return _send(caller, {}, reply, context.state)
    return _send(caller, {"error": error}, RecordDict(), RecordDict())


def _send(
    connection: socket.socket, header: Mapping[str, Any], content: RecordDict, state: RecordDict
) -> None:
    parts = [json.dumps(header).encode()]
    parts += [recorddict_to_proto(records).SerializeToString() for records in (content, state)]
    connection.sendall(LENGTHS.pack(*map(len, parts)))
    for part in filter(None, parts):  # an empty send fails once the receiver, having all, has left
        connection.sendall(part)


def _receive(connection: socket.socket) -> tuple[dict[str, Any], RecordDict, RecordDict]:
    lengths = LENGTHS.unpack(read(connection, LENGTHS.size))
    header, *records = (read(connection, length) for length in lengths)
    content, state = (
        recorddict_from_proto(ProtoRecordDict.FromString(bytes(data))) for data in records
    )
    return json.loads(header), content, state


def _end_with(node: int) -> None:
    """End this process, whatever it is doing, when its parent is no longer `node`."""
    while os.getppid() == node:
        time.sleep(WATCH_S)
    os._exit(1)


if __name__ == "__main__":  # of the node with this process id, which may have died meanwhile
    threading.Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
    with suppress(KeyboardInterrupt):
        run(sys.argv[1])

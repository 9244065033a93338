"""What every test may use: a cache of its own, and runs through the real command."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fl_common import determinism  # noqa: F401  # isort: skip  (sets MKL's environment first)
import torch
from safetensors.torch import load_file

from fl_server.cli import main

# A script's background job, and nohup's, inherit an ignored SIGINT, and so would the processes here
# that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Decoded data goes to the session's folder, never to the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLATFED_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Two torch threads on a busy machine of two cores can be fifteen times slower than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Result:
    """What a run left: exit code and results folder."""

    code: int
    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "history.jsonl").open()]

    @property
    def history_less_times(self) -> list[dict[str, Any]]:
        times = ("seconds", "client_cpu_s")
        return [{k: v for k, v in row.items() if k not in times} for row in self.history]

    @property
    def model(self) -> dict[str, Any]:
        return load_file(self.folder / "model.safetensors")


class Runner:
    """`runner("train.lr=0.1", ...)` is `flatfed run train.lr=0.1 ...` in this process."""

    def __init__(self, base: Path) -> None:
        self.base, self.count = base, 0
        self.always = ["run.pictures=false", "engine.workers=1"]

    def __call__(self, *settings: str) -> Result:
        self.count += 1
        name = f"run{self.count}"
        place = [f"run.output-dir={self.base}", f"run.name={name}"]
        return Result(main(["run", *place, *self.always, *settings]), self.base / name)


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    from fl_client.app import release

    yield Runner(tmp_path)
    release()

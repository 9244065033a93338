"""The yardstick of the overhead benchmark takes the same steps as the engine's local round."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from benchmarks import bare
from fl_client.optimizers import SGD
from fl_client.trainer import LocalData, batches, local_round
from fl_common.config import Train
from fl_common.local import Affine
from fl_common.models.catalogue import build


@pytest.mark.parametrize("name", ["lenet", "cnn"])
def test_bare_steps_are_the_engines(name):
    settings = Train(lr=0.1, batch_size=10)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(25, 3, 32, 32, generator=generator)
    data = LocalData(x, torch.randint(10, (25,), generator=generator), lambda x: x)
    net, yardstick = build(name, classes=10, shape=(3, 32, 32)), getattr(bare, name)()
    for p, q in zip(yardstick.parameters(), net.parameters(), strict=True):
        p.data.copy_(q.data)
    for model in (net, yardstick):  # two streams of random numbers: dropout would differ
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    key = {"seed": 1, "server_round": 2, "partition": 3}
    local_round(net, data, [], Affine(), SGD(), settings, **key)
    bare.Bare(yardstick, 0.1).steps(list(batches(data, settings, (1, 2, 3))))
    for p, q in zip(yardstick.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_the_yardstick_is_small_and_needs_torch_alone():
    text = Path(bare.__file__).read_text()
    assert len(text.splitlines()) <= 50
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import)]
    froms = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in imports for alias in node.names} | {n.module for n in froms}
    assert {name.partition(".")[0] for name in names} == {"torch"}

"""Which node may be which client: keys.json, and the roll call that compares it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)

from fl_client.app import app as client_app
from fl_common.config import ConfigError, resolve
from fl_server.app import _keys
from fl_server.certificates import make_node_key
from fl_server.exchange import Exchange, RunFailed
from fl_server.federation import Connection
from fl_server.inprocess import InProcessGrid
from fl_server.keys import KeysError, of_flower, openssh, read_keys, read_public, register
from fl_server.roster import Roster


@pytest.fixture(scope="module")
def keys() -> list[str]:
    """Public keys as in keys.json; the last is in no file."""
    return [openssh(ec.generate_private_key(ec.SECP384R1()).public_key()) for _ in range(4)]


@dataclass(frozen=True)
class Told:
    node_id: int
    public_key: bytes
    last_activated_at: str = ""


class Keyed(InProcessGrid):
    """A grid whose nodes have keys, as those of a SuperLink; the test says who is there."""

    held: dict[int, str]

    def get_nodes(self):
        return [Told(node, pem(key)) for node, key in self.held.items()]

    def get_node_ids(self):
        return [node.node_id for node in self.get_nodes()]

    def push_messages(self, messages):
        for message in messages:
            told = "refused" in message.content["config"]
            (self.told if told else self.asked).append(message.metadata.dst_node_id)
        return super().push_messages(messages)


def pem(key: str) -> bytes:
    """A public key in the form in which Flower gives it."""
    if not key:
        return b""
    public = load_ssh_public_key(key.encode())
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@pytest.fixture
def grid(runner, keys) -> Keyed:
    config = resolve({"clients.number": 3, "train.device": "cpu"})
    grid = Keyed(client_app, 3, config.flat())
    grid.held = dict(zip(grid._contexts, keys, strict=False))
    grid.asked, grid.told = [], []
    return grid


def rostered(grid: Keyed, keys: list[str], said: list[str]) -> Roster:
    return Roster(Exchange(grid, 1.0, said.append), 3, keys=dict(enumerate(keys[:3])))


def test_every_key_at_its_place(grid, keys):
    roster = rostered(grid, keys, [])
    roster.assemble(nodes_may_come=False)
    assert {p: m.node_id for p, m in roster.members.items()} == dict(enumerate(grid._contexts))


def test_a_key_with_anothers_partition_is_refused_and_the_right_one_is_taken(grid, keys):
    said: list[str] = []
    _, second, third = grid._contexts
    # The node that says partition 1 comes with client 0's key, beside the real client 1.
    impostor = 99
    grid._contexts[impostor] = SimpleNamespace(**vars(grid._contexts[second]))
    grid.held = {impostor: keys[0], third: keys[2]}
    roster = rostered(grid, keys, said)
    with pytest.raises(RunFailed, match=r"but 1 can take part after .*; node 99: it says part"):
        roster.assemble(nodes_may_come=True)
    line = "it says partition-id 1, but its key is that of client 0 (clients.keys)"
    assert f"roll call: refused node {impostor}: {line}" in said

    grid.held |= {second: keys[1]}
    roster.refresh()
    assert {p: m.node_id for p, m in roster.members.items()} == {1: second, 2: third}
    assert grid.asked.count(impostor) == grid.told.count(impostor) == 1


def test_an_unknown_key_is_refused_before_anything_is_sent(grid, keys):
    said: list[str] = []
    first, second, third = grid._contexts
    grid.held = {first: keys[3], second: keys[1], third: ""}
    roster = rostered(grid, keys, said)
    roster.refresh()
    roster.refresh()
    assert sorted(roster.members) == [1]
    assert (grid.asked, grid.told) == ([second], [])
    refusals = [line for line in said if "its key was not in clients.keys" in line]
    assert refusals == [
        f"roll call: refused nodes {first}, {third}: its key was not in clients.keys when the "
        "run began; start it with the --auth-key made for it, or add the key there and start the "
        "run again"
    ]
    # Who comes later is looked at in the same way.
    grid._contexts[98] = SimpleNamespace(**vars(grid._contexts[first]))
    grid.held |= {98: keys[0]}
    roster.refresh()
    assert sorted(roster.members) == [0, 1]
    assert grid.asked == [second, 98]


def test_without_the_setting_keys_do_not_matter(grid, keys):
    grid.held = dict.fromkeys(grid.held, keys[3])
    roster = Roster(Exchange(grid, 1.0, print), 3)
    roster.assemble(nodes_may_come=False)
    assert sorted(roster.members) == [0, 1, 2]


def test_the_setting(tmp_path: Path, keys):
    with pytest.raises(ConfigError, match=r"keys = \"/k\.json\": only nodes on their own have"):
        resolve({"clients.keys": "/k.json"})
    with pytest.raises(ConfigError, match=r"clients\.keys = \"k\.json\": a relative path"):
        resolve({"clients.keys": "k.json", "engine.name": "grpc"})
    resolve({"clients.keys": "/k.json", "engine.name": "grpc"})
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"0": keys[0]}))
    assert _keys(str(path), "grpc") == {0: keys[0]}
    for engine in ("inprocess", "ray"):
        with pytest.raises(RunFailed, match=f"nodes of engine.name={engine} have no keys"):
            _keys(str(path), engine)
    with pytest.raises(RunFailed, match=r"clients\.keys: .*gone\.json: No such file"):
        _keys(str(tmp_path / "gone.json"), "grpc")


def test_what_flower_tells():
    assert of_flower(b"") == of_flower(b"nonsense") == ""


def test_a_key_is_the_same_in_all_three_forms(tmp_path: Path):
    public = make_node_key(tmp_path / "3")
    (key,) = read_public(tmp_path).values()
    assert of_flower(pem(key)) == key == public.read_text()
    # A comment, as ssh-keygen writes it, is no part of the key.
    public.write_text(f"{key} someone@somewhere\n")
    assert read_public(tmp_path) == {3: key}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not a table of partitions and public keys"),
        ("[]", "not a table of partitions and public keys"),
        ('{"one": "KEY"}', "not a table of partitions and public keys"),
        ('{"0": 5}', "0: not a public key; it begins with"),
        ('{"0": "ssh-ed25519 AAAA"}', "0: not a public key; it begins with"),
        ('{"0": "KEY", "4": "KEY"}', "partitions 0, 4 have one key; give each its own"),
    ],
)
def test_damaged_files(tmp_path: Path, keys, text: str, reason: str):
    path = tmp_path / "keys.json"
    path.write_text(text.replace("KEY", keys[0]))
    with pytest.raises(KeysError, match=reason) as error:
        read_keys(path)
    assert str(path) in str(error.value)


def test_registering_at_the_port_for_nodes(tmp_path: Path, monkeypatch, keys):
    server = grpc.server(ThreadPoolExecutor(1))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    text = f'[superlink.lab]\naddress = "{address}"\ninsecure = true\n'
    (tmp_path / "config.toml").write_text(text)
    link = Connection("lab", address, tmp_path)
    try:
        with pytest.raises(KeysError, match=f"SuperLink {address}: that is its port for nodes"):
            register(dict(enumerate(keys)), link, remove=False)
    finally:
        server.stop(0)


def test_a_key_that_was_unregistered_is_told_before_any_is_registered(tmp_path, monkeypatch, keys):
    """Flower's own word is "Public key already in use", after the keys before it."""
    nodes = [SimpleNamespace(public_key=pem(keys[1]), status="unregistered", node_id=7)]
    client = SimpleNamespace(
        ListNodes=lambda request: SimpleNamespace(nodes_info=nodes),
        RegisterNode=lambda request: pytest.fail("a key was registered"),
        close=lambda: None,
    )
    monkeypatch.setattr("flwr.cli.utils.init_http_client_from_connection", lambda way: client)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    (tmp_path / "config.toml").write_text('[superlink.lab]\naddress = "h:1"\ninsecure = true\n')
    link = Connection("lab", "h:1", tmp_path)
    with pytest.raises(KeysError, match=r"node 1: its key was unregistered.*delete nodes/1 and"):
        register(dict(enumerate(keys)), link, remove=False)

"""Who may take part: the public keys of nodes, by partition, and the SuperLink's list of them.

A public key is written as OpenSSH writes it, type and base64, without a comment.  What touches
Flower's non-public parts (its client of the SuperLink's control port) is all in this module.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from fl_server.federation import Connection


class KeysError(ValueError):
    """What is wrong with keys or certificates, as one line with the remedy."""


def read_public(folder: Path) -> dict[int, str]:
    """The public keys of `folder`, where that of partition 3 is the file 3.pub."""
    found = {}
    for path in folder.glob("*.pub"):
        if not path.stem.isdecimal():
            raise KeysError(f"{path}: name it for its partition, e.g. 3.pub")
        found[int(path.stem)] = _key(path.read_text(errors="replace"), str(path))
    for path in folder.glob("*"):
        if path.stem.isdecimal() and not path.suffix and int(path.stem) not in found:
            raise KeysError(f"{path}: its public key is gone; write it with ssh-keygen -y -f {path}"
                            f" > {path}.pub")  # fmt: skip
    return _one_each(found, str(folder))


def read_keys(path: Path) -> dict[int, str]:
    """The keys of a keys.json, by partition.  Raises KeysError."""
    try:
        table = json.loads(path.read_text())
    except OSError as error:
        raise KeysError(f"{path}: {error.strerror}") from None
    except ValueError:
        table = None
    if not isinstance(table, dict) or not all(name.isdecimal() for name in table):
        raise KeysError(
            f'{path}: not a table of partitions and public keys like {{"0": "ecdsa-sha2-nistp384 '
            'AAAA..."}; `flatfed certs` writes one'
        )
    keys = {int(name): _key(text, f"{path}: {name}") for name, text in table.items()}
    return _one_each(keys, str(path))


def _key(text: object, where: str) -> str:
    try:
        key = load_ssh_public_key(str(text).encode())
        if isinstance(key, ec.EllipticCurvePublicKey):
            return openssh(key)
    except (ValueError, UnsupportedAlgorithm):
        pass
    raise KeysError(f'{where}: not a public key; it begins with "ecdsa-sha2-nistp384 "')


def _one_each(keys: dict[int, str], where: str) -> dict[int, str]:
    for key, count in Counter(keys.values()).items():
        if count > 1:
            who = ", ".join(str(i) for i in sorted(keys) if keys[i] == key)
            raise KeysError(f"{where}: partitions {who} have one key; give each its own")
    return keys


def openssh(key: ec.EllipticCurvePublicKey) -> str:
    """A public key as keys.json has it."""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def of_flower(pem: bytes) -> str:
    """A public key that Flower gives (PEM), as keys.json has it; "" if there is none."""
    try:
        return openssh(load_pem_public_key(pem))
    except (ValueError, UnsupportedAlgorithm):
        return ""


def register(keys: Mapping[int, str], link: Connection, *, remove: bool) -> None:
    """Tell the SuperLink of `link` of every key that it has not yet, one line each.

    With `remove`, nodes whose key is not among `keys` are unregistered.
    Raises KeysError if the SuperLink does not do it, or, before anything is changed, would not.
    """
    import click
    import httpx
    from flwr.cli.flower_config import read_superlink_connection
    from flwr.cli.utils import flwr_cli_exc_handler, init_http_client_from_connection
    from flwr.proto.control_pb2 import (
        ListNodesRequest,
        RegisterNodeRequest,
        UnregisterNodeRequest,
    )

    try:
        with flwr_cli_exc_handler():
            way = read_superlink_connection(link.name)
            client = init_http_client_from_connection(way)
            try:
                listed = client.ListNodes(ListNodesRequest()).nodes_info
                known = {of_flower(node.public_key): node for node in listed}
                there = {k: node for k, node in known.items() if node.status != "unregistered"}
                for partition, key in sorted(keys.items()):
                    if key in known.keys() - there.keys():
                        raise ValueError(
                            f"node {partition}: its key was unregistered, and Flower takes no "
                            f"key twice; delete nodes/{partition} and nodes/{partition}.pub, make "
                            "new ones with `flatfed certs --nodes N`, and bring the node its new "
                            "key"
                        )
                for partition, key in sorted(keys.items()):
                    name = f"node {partition}"
                    if key in there:
                        print(f"{name}: is registered already ({there[key].status})")
                    else:
                        pem = load_ssh_public_key(key.encode()).public_bytes(
                            Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
                        )
                        made = client.RegisterNode(RegisterNodeRequest(public_key=pem, name=name))
                        print(f"{name}: registered, Flower's node {made.node_id}")
                for key in there if remove else ():
                    if key not in keys.values():
                        id_ = there[key].node_id
                        client.UnregisterNode(UnregisterNodeRequest(node_id=id_))
                        print(f"Flower's node {id_}: unregistered, its key is not in the file")
            finally:
                client.close()
    except (click.ClickException, httpx.HTTPError, OSError, ValueError) as error:
        why = getattr(error, "message", None) or str(error)
        raise KeysError(
            why_unavailable(link, why) or f"SuperLink {link.address}: {' '.join(why.split())}"
        ) from None


def why_unavailable(link: Connection, told: str) -> str:
    """What is wrong with a SuperLink of the user's own Flower configuration, if Flower has `told`
    that it is unavailable; "" if nothing is found."""
    from flwr.cli.flower_config import read_superlink_connection

    from fl_client import node_checks

    if "unavailable" not in told:
        return ""
    way, address = read_superlink_connection(link.name), link.address.removeprefix("https://")
    return node_checks.why_unavailable(address.rstrip("/"), way.root_certificates, way.insecure)

"""What a node is given, and what is wrong with that or with its server.

A stock SuperNode says "Connection attempt failed, retrying" for ever, whatever is wrong.  Here
every mistake is told in one line, with its remedy, before anything starts.
"""

from __future__ import annotations

import os
import socket
import ssl
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from fl_common import sockets
from fl_common.files import flower_home, home, unwritable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fl_common.config import Scalar

ANSWER_S = 1.5
"""How long one connection to the server may take [s]."""
CURVES = ("secp256r1", "secp384r1", "secp521r1")
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
"""Where gRPC looks for a proxy; the first that is set counts."""


class NodeError(ValueError):
    """Why the node cannot start, as one line with the remedy."""


class NotFleet(NodeError):
    """What answers is not a SuperLink's port for nodes."""

    def __init__(self, where: str) -> None:
        super().__init__(
            f"{where}: that is not its port for nodes; give the one of --fleet-api-address "
            "(Flower's default is 9092)"
        )


@dataclass(frozen=True)
class Node:
    """What `flatfed node` was given."""

    superlink: str
    config: Mapping[str, Scalar] = field(default_factory=dict)
    root_certificates: Path | None = None
    auth_key: Path | None = None
    insecure: bool = False
    port: int = 0
    """of the node's own loopback API; 0: any free one"""
    poll_interval: float = 0.2
    """shortest pause between two polls for work [s]"""
    wait: float = 3.0
    """how long the server may take to come up [s]"""
    preload: bool = True
    """start ClientApps from a process that has imported torch already"""
    worker: bool = False
    """keep a resident trainer (`fl_client.worker`), and start it anew when it dies"""
    trusted_entities: Path | None = None
    """whose signature an app needs (Flower's YAML file: key ids and ed25519 public keys)"""


def check(node: Node) -> None:
    """Raise NodeError for the first thing that is wrong with `node` or its server."""
    host, port = _address(node.superlink)
    check_settings(node)
    if node.root_certificates:
        _check_certificates(node.root_certificates)
    if node.auth_key:
        _check_key(node.auth_key)
    if node.trusted_entities:
        _check_trusted(node.trusted_entities)
    if node.port:
        _check_port_is_free(node.port)
    _check_flower_home()
    proxy = next((name for name in PROXIES if name in os.environ), "")
    _check_server(node, host, port, proxy if os.environ.get(proxy) else "")


def check_settings(node: Node) -> None:
    """Raise NodeError for the first thing that is wrong with `node` itself, its server unasked."""
    _check_options(node)
    _check_config(node.config)


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise NodeError(f"--superlink {text}: must be HOST:PORT, e.g. 127.0.0.1:9092")
    return host.strip("[]"), int(port)


def _check_options(node: Node) -> None:
    if node.worker and "worker-socket" in node.config:
        raise NodeError("--worker with worker-socket: leave one of them out")
    if node.insecure and node.root_certificates:
        raise NodeError("--insecure with --root-certificates: leave one of them out")
    if node.insecure and node.auth_key:
        raise NodeError("--insecure with --auth-key: a key needs TLS; leave --insecure out")
    if not node.poll_interval > 0:
        raise NodeError(f"--poll-interval {node.poll_interval:g}: must be greater than 0")
    if not node.wait >= 0:
        raise NodeError(f"--wait {node.wait:g}: must be at least 0")
    if not 0 <= node.port < 65536:
        raise NodeError(f"--port {node.port}: must be between 1 and 65535, or 0 for any free one")


def _check_config(config: Mapping[str, Scalar]) -> None:
    from fl_common.config import ConfigError, with_node

    try:
        with_node({}, config)
    except ConfigError as error:
        raise NodeError(error.errors[0]) from None
    partition, of = config.get("partition-id"), config.get("num-partitions")
    if partition is None:
        raise NodeError("no partition: give --partition N, this node's number from 0 on")
    for key, value, least in (
        ("partition-id", partition, 0),
        ("num-partitions", of, 1),
        ("threads", config.get("threads"), 1),
    ):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and (not whole or value < least):
            raise NodeError(f"{key} = {value}: must be a whole number, at least {least}")
    for key, below in (("dp-clip", float("inf")), ("dp-epsilon", float("inf")), ("dp-delta", 1)):
        value = config.get(key)
        if value is not None and not (isinstance(value, int | float) and 0 < value < below):
            end = " and less than 1" if below == 1 else ""
            raise NodeError(f"{key} = {value}: must be a number greater than 0{end}")
    if of is not None and partition >= of:
        raise NodeError(f"partition-id = {partition}: must be less than num-partitions = {of}")
    path = config.get("data-path")
    if path is not None and not os.access(str(path), os.R_OK):
        what = "cannot be read" if Path(str(path)).exists() else "does not exist"
        raise NodeError(f"data-path {path}: {what}; give this node's folder or file of data")
    if (worker := config.get("worker-socket")) and not Path(str(worker)).is_socket():
        raise NodeError(
            f"worker-socket {worker}: no trainer is there; start it with `flatfed worker --socket "
            f"{worker}`, or give --worker instead"
        )
    if state := config.get("state-dir"):
        check_state_dir(Path(str(state)))
    if device := config.get("device"):
        _check_device(str(device))


def default_state_dir() -> Path:
    """Where a node keeps what it must remember, unless it is told."""
    return home() / "state"


def check_state_dir(folder: Path) -> None:
    """Make the folder; raise NodeError if that fails, or it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise NodeError(
            f"state-dir {folder}: {error.strerror}; give a folder that this node may write to"
        ) from None


def _check_flower_home() -> None:
    """Raise NodeError if Flower's home, where the SuperNode unpacks apps, is not writable."""
    folder = flower_home() / "apps"
    if problem := unwritable(folder):
        raise NodeError(f"FLWR_HOME: {problem}; set it to a folder that this node may write to")


def _check_device(device: str) -> None:
    from fl_common.config import is_device

    if not is_device(device):
        raise NodeError(f"device {device}: must be auto, cpu, cuda or cuda:K")
    if device in ("auto", "cpu"):
        return
    import torch

    found = torch.cuda.device_count()
    if int(device.partition(":")[2] or 0) >= found:
        have = f"{found} CUDA device(s)" if found else "no CUDA device"
        raise NodeError(f"device {device}: this machine has {have}; give another, or auto")


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NodeError(f"{option} {path}: {error.strerror}") from None


def _check_certificates(path: Path) -> None:
    from cryptography import x509

    option = "--root-certificates"
    data = _read(option, path)
    try:
        certificates = x509.load_pem_x509_certificates(data)
    except ValueError:
        raise NodeError(f"{option} {path}: not a PEM certificate; give the CA's ca.crt") from None
    for certificate in certificates:
        end = certificate.not_valid_after_utc
        if end.timestamp() < time.time():
            raise NodeError(f"{option} {path}: expired on {end:%Y-%m-%d}; get the CA's new one")
        if certificate.not_valid_before_utc.timestamp() > time.time():
            begin = certificate.not_valid_before_utc
            raise NodeError(
                f"{option} {path}: valid from {begin:%Y-%m-%d %H:%M} UTC on; check this clock"
            )


def _check_key(path: Path) -> None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    data, make = _read("--auth-key", path), 'make one: ssh-keygen -t ecdsa -b 384 -N "" -f KEY'
    try:
        key = load_ssh_private_key(data, None)
    except TypeError:
        raise NodeError(f"--auth-key {path}: has a passphrase; {make}") from None
    except (ValueError, UnsupportedAlgorithm):
        raise NodeError(f"--auth-key {path}: not an OpenSSH private key; {make}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in CURVES:
        raise NodeError(f"--auth-key {path}: not an EC key on a NIST curve; {make}")
    if path.stat().st_mode & 0o077:
        why = f"others than its owner have rights to it; chmod 600 {quote(str(path))}"
        print(f"warning: --auth-key {path}: {why}", file=sys.stderr, flush=True)


def _check_trusted(path: Path) -> None:
    import yaml
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ed25519
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    data = _read("--trusted-entities", path)
    try:
        keys = [load_ssh_public_key(text.encode()) for text in yaml.safe_load(data).values()]
    except (yaml.YAMLError, AttributeError, ValueError, UnsupportedAlgorithm):
        keys = []
    if not keys or not all(isinstance(key, ed25519.Ed25519PublicKey) for key in keys):
        raise NodeError(
            f"--trusted-entities {path}: not a YAML table of key ids and public keys, each "
            "ssh-ed25519 AAAA..."
        )


def _check_port_is_free(port: int) -> None:
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    except OSError as error:
        raise NodeError(
            f"--port {port}: {error.strerror}; give another, or 0 for any free one"
        ) from None


def _check_server(node: Node, host: str, port: int, proxy: str = "") -> None:
    """`proxy`: the environment variable that names gRPC's proxy; "" if there is none."""
    where, end = f"SuperLink {node.superlink}", time.monotonic() + node.wait
    context = None
    if not node.insecure:
        context = ssl.create_default_context(
            cafile=node.root_certificates and str(node.root_certificates)
        )
        context.set_alpn_protocols(["h2"])
    while not (proxy and _grpc_connects(node)):
        try:
            with socket.create_connection((host, port), ANSWER_S) as connection:
                connection.settimeout(ANSWER_S)
                if context is None:
                    _check_plaintext(connection, where)
                else:
                    _check_tls(connection, context, host, where, node.root_certificates)
            if not proxy:
                return
            problem = (
                f"{where}: answers, but not through the proxy that gRPC takes from {proxy}; have "
                f"the proxy let it through, or add {host} to no_proxy"
            )
        except (socket.gaierror, UnicodeError) as error:  # a name that no host can have
            if getattr(error, "errno", None) != socket.EAI_AGAIN:
                raise NodeError(f"{where}: no such host; correct --superlink") from None
            problem = (
                f"{where}: no DNS server answers; check this machine's network, or wait for it "
                "with --wait SECONDS"
            )
        except TimeoutError:
            problem = f"{where}: no answer; correct --superlink, or open the port in the firewall"
        except OSError as error:
            problem = (
                f"{where}: {(error.strerror or str(error)).lower()}; start the SuperLink, correct "
                "--superlink, or wait for it with --wait SECONDS"
            )
        if time.monotonic() > end:
            raise NodeError(problem)
        time.sleep(0.2)


def _grpc_connects(node: Node) -> bool:
    """Whether the SuperNode will reach the server: only gRPC knows where it takes a proxy."""
    import grpc

    os.environ |= sockets.direct()
    if node.insecure:
        channel = grpc.insecure_channel(node.superlink)
    else:
        root = node.root_certificates and node.root_certificates.read_bytes()
        channel = grpc.secure_channel(node.superlink, grpc.ssl_channel_credentials(root))
    with channel, suppress(grpc.FutureTimeoutError):
        grpc.channel_ready_future(channel).result(ANSWER_S)
        return True
    return False


def _check_tls(
    connection: socket.socket,
    context: ssl.SSLContext,
    host: str,
    where: str,
    root: Path | None,
) -> None:
    """A handshake as gRPC makes it."""
    try:
        with context.wrap_socket(connection, server_hostname=host) as secure:
            if secure.selected_alpn_protocol() != "h2":
                raise NotFleet(where)
    except ssl.SSLCertVerificationError as error:
        ca = str(root) if root else "this machine's certificate authorities"
        raise NodeError(_why(error, host, where, ca)) from None
    except (ssl.SSLError, ConnectionResetError, EOFError) as error:
        if getattr(error, "reason", "") == "WRONG_VERSION_NUMBER":
            raise NodeError(
                f"{where}: speaks plaintext, not TLS; give the server certificates, or "
                "type --insecure on a network that you trust"
            ) from None
        raise NodeError(f"{where}: TLS failed: {getattr(error, 'reason', error)}") from None


def _why(error: ssl.SSLCertVerificationError, host: str, where: str, ca: str) -> str:
    """What is wrong with the server's certificate, by OpenSSL's X509_V_ERR codes."""
    if error.verify_code == 10:
        return (
            f"{where}: its certificate has expired; renew it on the server, or correct this "
            "machine's clock"
        )
    if error.verify_code == 9:
        return f"{where}: its certificate is not valid yet; check the clocks of both machines"
    if error.verify_code in (62, 64):
        return (
            f"{where}: its certificate does not name {host} (SAN); add it to the certificate, or "
            "give a name in --superlink that it has"
        )
    if error.verify_code in (18, 19, 20, 21):
        return (
            f"{where}: its certificate is not signed by {ca}; give the ca.crt of that server as "
            "--root-certificates"
        )
    return f"{where}: its certificate is refused: {error.verify_message}"


def _check_plaintext(connection: socket.socket, where: str) -> None:
    """Greet as HTTP/2 does: a gRPC server answers with a SETTINGS frame, anything else differs."""
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
    answer = b""
    with suppress(ConnectionResetError, TimeoutError):
        while len(answer) < 9 and (part := connection.recv(64)):
            answer += part
    if answer[3:4] == b"\x04":
        return
    if answer.startswith(b"HTTP/"):
        raise NotFleet(where)
    raise NodeError(
        f"{where}: does not speak plaintext gRPC; leave --insecure out if it has TLS, and give "
        "--root-certificates ca.crt"
    )


def why_unavailable(address: str, root_certificates: str | None, insecure: bool) -> str:
    """What is wrong with a connection to a SuperLink's control port; "" if nothing is found."""
    where = f"SuperLink {address}"
    root = Path(root_certificates) if root_certificates else None
    try:
        host, port = _address(address)
        node = Node(address, root_certificates=root, insecure=insecure, wait=0)
        _check_server(node, host, port)
    except OSError:  # the certificates cannot be read
        return ""
    except NotFleet:  # as it should be
        return ""
    except NodeError as error:
        why = str(error).replace("--insecure", "insecure = true").replace("--superlink", "address")
        return why.replace("--root-certificates", "root-certificates")
    return f"{where}: that is its port for nodes; give the one of --port (Flower's default is 8000)"

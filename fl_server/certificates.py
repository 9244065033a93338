"""Certificates and keys for a federation: a CA, the SuperLink's certificate, a key per node.

All keys are on the curve P-384.  Private keys are readable by their owner alone.
"""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fl_common.files import write_atomically, write_object
from fl_server.keys import KeysError, openssh, read_public

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

CA, CA_KEY, SERVER, SERVER_KEY = "ca.crt", "ca.key", "server.pem", "server.key"
NODES, KEYS = "nodes", "keys.json"
CA_DAYS = 3650
"""Every node has the CA's certificate: it outlives many of the server's."""
SERVER_DAYS = 365
"""Unless --days says otherwise."""
CLOCK_SKEW = timedelta(minutes=5)
_LABEL = r"\w([\w-]{0,61}\w)?"
HOST = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*", re.ASCII)
LOOPBACK = ("localhost", "127.0.0.1")
"""Names by which the SuperLink's own processes reach it."""


def make_certificates(folder: Path, hosts: Sequence[str], *, days: float = SERVER_DAYS) -> None:
    """Write a CA's certificate and the certificate and key of a server that is reached as `hosts`
    (names or IP addresses) into `folder`.

    The CA's key is not kept: for another server certificate make a new CA.  `issue` keeps it.
    Raises KeysError for what is neither a name nor an address, OSError.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    ca, ca_key = _authority(days)
    write_atomically(folder / CA, ca.public_bytes(Encoding.PEM), 0o644)
    _write_server(folder, hosts, days, ca, ca_key)


@dataclass(frozen=True)
class Issued:
    """What `issue` left in its folder."""

    made: frozenset[str]
    """Names of what is new, or has grown."""
    there: frozenset[str]
    """Names of all that is in the folder."""
    nodes: tuple[int, ...]
    """All partitions with a key."""
    hosts: tuple[str, ...]
    """All names of the server's certificate."""
    ends: Mapping[str, datetime]
    """Until when the two certificates hold, by file."""


def issue(
    folder: Path, hosts: Sequence[str] = (), nodes: int = 0, *, days: float = SERVER_DAYS
) -> Issued:
    """Fill `folder`: a CA, the server's certificate, a key for each of `nodes` partitions, and
    keys.json, the public keys by partition.

    What is there stays: the CA, and the keys in nodes/ (of a node whose key never was here, its
    nodes/I.pub is enough).  The server's certificate is made anew whenever `hosts` is given; it
    names them and LOOPBACK, and holds for `days`, not longer than the CA.

    Raises KeysError with one line, before anything is changed unless the disk is at fault.
    """
    for host in hosts:
        _host(host)
    if nodes < 0:
        raise KeysError(f"--nodes {nodes}: must be at least 0")
    if not 0 < days < math.inf:
        raise KeysError(f"--days {days:g}: must be greater than 0")
    if days != SERVER_DAYS and not hosts:
        raise KeysError(f"--days {days:g}: is for a new server certificate; give --host NAME too")
    own = {CA, CA_KEY, SERVER, SERVER_KEY, NODES, KEYS}
    try:
        there = {path.name for path in folder.iterdir()} if folder.exists() else set()
        if there and not there & own:
            raise KeysError(f"{folder}: holds other files; give a folder of its own, or a new one")
        ca = _read_certificate(folder / CA) if CA in there else None
        if ca is None and there & {CA_KEY, SERVER}:
            raise KeysError(f"{folder / CA}: is gone; restore it, or begin in another folder")
        if ca is None and not hosts:
            raise KeysError(
                f"{folder / CA}: is not there yet; give --host NAME, as nodes call the server"
            )
        if SERVER not in there and not hosts:
            raise KeysError(f"{folder / SERVER}: is not there; give --host NAME to make one")
        if not hosts:
            _read_certificate(folder / SERVER)
        ca_key = _read_ca_key(folder / CA_KEY, ca) if ca and hosts else None
        keys = read_public(folder / NODES)
        (folder / NODES).mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        if ca is None:
            ca, ca_key = _authority(max(days, CA_DAYS))
            write_atomically(folder / CA_KEY, _pem(ca_key), 0o600)
            write_atomically(folder / CA, ca.public_bytes(Encoding.PEM), 0o644)
        if hosts:
            names = dict.fromkeys([*hosts, *LOOPBACK])
            _write_server(folder, list(names), days, ca, ca_key)
        new = sorted(set(range(nodes)) - set(keys))
        for partition in new:
            make_node_key(folder / NODES / str(partition))
        keys = read_public(folder / NODES)
        write_object(folder / KEYS, {str(i): keys[i] for i in sorted(keys)}, 0o644)
    except OSError as error:
        raise KeysError(f"{error.filename or folder}: {error.strerror or error}") from None
    server = _read_certificate(folder / SERVER)
    has = frozenset(path.name for path in folder.iterdir())
    made = {CA, CA_KEY} - there | ({SERVER, SERVER_KEY} if hosts else set()) | {KEYS}
    return Issued(
        made=frozenset(made | ({NODES} if new else set())) & has,
        there=has,
        nodes=tuple(sorted(keys)),
        hosts=_names(server),
        ends={CA: ca.not_valid_after_utc, SERVER: server.not_valid_after_utc},
    )


def make_node_key(path: Path) -> Path:
    """Write a node's private key to `path` and its public key beside it; gives the latter's path.

    Both are in OpenSSH's format, which Flower reads.
    """
    key, public = _key(), path.with_name(path.name + ".pub")
    write_atomically(
        path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), 0o600
    )
    write_atomically(public, openssh(key.public_key()).encode(), 0o644)
    return public


def _authority(days: float) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A new CA."""
    key, issuer = _key(), _name("FlatFed CA")
    ca = (
        _certificate(issuer, issuer, key.public_key(), key, datetime.now(UTC) + _days(days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    return ca, key


def _write_server(
    folder: Path,
    hosts: Sequence[str],
    days: float,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
) -> None:
    """A new key and certificate of the server, which holds no longer than the CA."""
    key, end = _key(), min(datetime.now(UTC) + _days(days), ca.not_valid_after_utc)
    server = (
        _certificate(_name("FlatFed SuperLink"), ca.subject, key.public_key(), ca_key, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_host(h) for h in hosts]), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    write_atomically(folder / SERVER_KEY, _pem(key), 0o600)
    write_atomically(folder / SERVER, server.public_bytes(Encoding.PEM), 0o644)


def _days(days: float) -> timedelta:
    return timedelta(days=min(days, 36500))  # certificates know years of four digits


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError:
        raise KeysError(f"{path}: not a PEM certificate; restore it from a backup") from None
    if path.name == CA and certificate.not_valid_after_utc < datetime.now(UTC):
        raise KeysError(
            f"{path}: expired on {certificate.not_valid_after_utc:%Y-%m-%d}; make a new CA in "
            "another folder, and give its ca.crt to every node"
        )
    return certificate


def _read_ca_key(path: Path, ca: x509.Certificate) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except FileNotFoundError:
        raise KeysError(f"{path}: is not there; --host needs it, to sign with") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise KeysError(f"{path}: not a private key; restore it from a backup") from None
    if key.public_key() != ca.public_key():
        raise KeysError(f"{path}: is not the key of {path.with_name(CA)}; restore both")
    return key


def _names(certificate: x509.Certificate) -> tuple[str, ...]:
    extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return tuple(str(name.value) for name in extension.value)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        if len(text) > 253 or not HOST.fullmatch(text):
            raise KeysError(
                f"--host {text}: must be a name or an IP address, without a port"
            ) from None
        return x509.DNSName(text)


def _usage(**granted: bool) -> x509.KeyUsage:
    names = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement "
        "key_cert_sign crl_sign encipher_only decipher_only"
    )
    return x509.KeyUsage(**(dict.fromkeys(names.split(), False) | granted))


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    end: datetime,
) -> x509.CertificateBuilder:
    now, authority = datetime.now(UTC), x509.AuthorityKeyIdentifier
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - CLOCK_SKEW)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(authority.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )

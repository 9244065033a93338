"""Certificates and keys for a federation: a CA, the SuperLink's certificate, a key per node.

All keys are on the curve P-384.  Private keys are readable by their owner alone.
"""

from __future__ import annotations

import ipaddress
import os
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CA, SERVER, SERVER_KEY = "ca.crt", "server.pem", "server.key"
CLOCK_SKEW = timedelta(minutes=5)


def make_certificates(
    folder: Path, hosts: Sequence[str], *, days: float = 365, name: str = "FlatFed"
) -> None:
    """Write a CA's certificate and the certificate and key of a server that is reached as `hosts`
    (names or IP addresses) into `folder`.

    The CA's key is not kept: for another server certificate make a new CA.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    ca_key, server_key = _key(), _key()
    issuer = _name(f"{name} CA")
    ca = (
        _certificate(issuer, issuer, ca_key.public_key(), ca_key, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(ca_key, hashes.SHA384())
    )
    server = (
        _certificate(_name(f"{name} SuperLink"), issuer, server_key.public_key(), ca_key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_host(h) for h in hosts]), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    _write(folder / CA, ca.public_bytes(Encoding.PEM), 0o644)
    _write(folder / SERVER, server.public_bytes(Encoding.PEM), 0o644)
    secret = server_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    _write(folder / SERVER_KEY, secret, 0o600)


def make_node_key(path: Path) -> Path:
    """Write a node's private key to `path` and its public key beside it; gives the latter's path.

    Both are in OpenSSH's format, which Flower reads.
    """
    key, public = _key(), path.with_name(path.name + ".pub")
    _write(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), 0o600)
    _write(public, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH), 0o644)
    return public


def _key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
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
    days: float,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    end, authority = now + timedelta(days=days), x509.AuthorityKeyIdentifier
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


def _write(path: Path, data: bytes, mode: int) -> None:
    """A file with these permissions from the start; one that is there is replaced."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)

"""Certificates for tests of TLS."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Certificate(NamedTuple):
    """Files (PEM)."""

    cert: Path
    key: Path
    authority: Path


def certificate(folder: Path, days: int) -> Certificate:
    """A new certificate for 127.0.0.1 from the folder's own authority; negative days: it has expired."""
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    files = Certificate(folder / "cert.pem", folder / "key.pem", folder / "authority.pem")
    ca_key_file = folder / "authority-key.pem"
    if not ca_key_file.exists():
        ca_key = _write_key(ca_key_file)
        basic = x509.BasicConstraints(ca=True, path_length=None)
        files.authority.write_bytes(_signed("authority", "authority", ca_key, ca_key, 30, [(basic, True)]))
    signing: Any = serialization.load_pem_private_key(ca_key_file.read_bytes(), None)
    assert isinstance(signing, ec.EllipticCurvePrivateKey)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    files.cert.write_bytes(_signed("localhost", "authority", _write_key(files.key), signing, days, [(address, False)]))
    return files


def _write_key(path: Path) -> Any:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    how = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(key.private_bytes(*how))
    return key


def _signed(name: str, by: str, key: Any, signing: Any, days: int, extensions: list[tuple[Any, bool]]) -> bytes:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    names = [x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, one)]) for one in (name, by)]
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(names[0])
        .issuer_name(names[1])
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=30))
        .not_valid_after(now + datetime.timedelta(days=days))
    )
    for extension, critical in extensions:
        made = made.add_extension(extension, critical=critical)
    return made.sign(signing, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

"""Make secret seeds, commitments to them, a campaign's signing key, and the certificate of a server. Only this module imports `cryptography`."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat


def new_seed() -> str:
    """Return 32 random bytes from the operating system, as hex."""
    return secrets.token_hex(32)


def commitment(label: str, seed_hex: str) -> str:
    """Return sha256(label, NUL, seed), which fixes a seed and hides it. The label keeps one seed from passing for another."""
    return hashlib.sha256(label.encode() + b"\0" + bytes.fromhex(seed_hex)).hexdigest()


def make_key(path: Path) -> str:
    """Write a new ed25519 key with mode 0600 and return its public key as hex. Raises FileExistsError where `path` exists."""
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def new_certificate(host: str, days: int = 30) -> bytes:
    """Return a new P-256 key and a certificate for `host` that it signed itself, as PEM: both sides of a connection show and accept it alone."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "agent server")])
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
             "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")  # fmt: skip
    usage = x509.KeyUsage(**{each: each in ("digital_signature", "key_cert_sign") for each in names})
    own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    building = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    building = building.not_valid_before(now - datetime.timedelta(hours=1))  # clocks of nodes differ
    building = building.not_valid_after(now + datetime.timedelta(days=days))
    for extension, is_critical in (
        (x509.SubjectAlternativeName([x509.DNSName(host)]), False), (x509.BasicConstraints(True, 0), True), (usage, True), (own, False),
        (x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own), False),
    ):  # fmt: skip
        building = building.add_extension(extension, is_critical)
    certificate = building.sign(key, SHA256()).public_bytes(Encoding.PEM)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + certificate


def sign(path: Path, message: bytes) -> str:
    """Sign with the key at `path`; returns the signature as hex."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = load_pem_private_key(path.read_bytes(), password=None)
    assert isinstance(key, Ed25519PrivateKey)
    return key.sign(message).hex()


def signature_holds(public_key_hex: str, message: bytes, signature_hex: str) -> bool:
    """Whether the signature is of this message by this key; False also for text that is no key or no signature."""
    from cryptography.exceptions import InvalidSignature

    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key_hex)).verify(bytes.fromhex(signature_hex), message)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True

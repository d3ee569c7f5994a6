"""Make secret seeds, commitments to them, and a campaign's signing key. Only this module imports `cryptography`."""

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

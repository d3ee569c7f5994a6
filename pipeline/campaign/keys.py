"""Secret seeds, commitments to them, and the signing key of a campaign. The one door of `cryptography`."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat


def new_seed() -> str:
    """32 random bytes as hex, from the operating system."""
    return secrets.token_hex(32)


def commitment(label: str, seed_hex: str) -> str:
    """sha256("label" NUL seed): hides the seed, binds to it; the label keeps one seed from standing for another."""
    return hashlib.sha256(label.encode() + b"\0" + bytes.fromhex(seed_hex)).hexdigest()


def make_key(path: Path) -> str:
    """Write a new ed25519 key, mode 0600, exclusively; returns the public key as hex."""
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def sign(path: Path, message: bytes) -> str:
    """Signature as hex, by the key at `path`."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = load_pem_private_key(path.read_bytes(), password=None)
    assert isinstance(key, Ed25519PrivateKey)
    return key.sign(message).hex()


def signature_holds(public_key_hex: str, message: bytes, signature_hex: str) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key_hex)).verify(bytes.fromhex(signature_hex), message)
    except (InvalidSignature, ValueError, TypeError):  # what is no key or no signature holds for nothing
        return False
    return True

"""Secrets of backends: read from the environment or a file, never from the configuration, and never shown.

Belongs here: where a secret comes from. An option of a backend names a variable (`password_env`) or a file
(`password_file`); there is no option that holds the secret itself, so that a configuration can be printed, logged and
committed. What is read is a pydantic SecretStr, whose repr and str are asterisks.
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import SecretStr

from storage_backends.base import OptionError
from storage_backends.seal import KEY_BYTES, Seal


def load_secret(option: str, env: str, file: Path | None) -> SecretStr | None:
    """The secret that `<option>_env` or `<option>_file` names; None where neither is given. Raises OptionError."""
    if env and file:
        raise OptionError(f"{option}_env", env, f"{option}_file is given too", "name one of them")
    if env:
        value = os.environ.get(env)
        if not value:
            raise OptionError(f"{option}_env", env, "is not set in the environment", "export it, or use a file")
        return SecretStr(value)
    if file is None:
        return None
    try:
        value = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not text"
        raise OptionError(f"{option}_file", str(file), f"cannot be read: {reason}", "check path and rights") from None
    if not value:
        raise OptionError(f"{option}_file", str(file), "is empty", "put the secret there, on one line")
    return SecretStr(value)


def load_seal(env: str, file: Path | None) -> Seal | None:
    """The seal whose key (32 bytes, as 64 hex digits) `seal_key_env` or `seal_key_file` names. Raises OptionError."""
    secret = load_secret("seal_key", env, file)
    if secret is None:
        return None
    key, named = ("seal_key_env", env) if env else ("seal_key_file", str(file))
    try:
        raw = bytes.fromhex(secret.get_secret_value())
    except ValueError:
        raw = b""
    if len(raw) != KEY_BYTES:
        raise OptionError(key, named, "does not hold 32 bytes as 64 hex digits", "make one with `openssl rand -hex 32`")
    try:
        return Seal(raw)
    except ImportError:
        raise OptionError(key, named, "sealing needs `cryptography`", "pip install 'hicache-ext[seal]'") from None

"""Secrets of the environment, kept out of all that is printed and written."""

from __future__ import annotations

import json
import os
import re
from typing import Any
from urllib.parse import quote, unquote

KEYS = ("TOKEN", "PASSWORD", "SECRET", "_KEY")  # how the name of a variable ends whose value is one
SHORTEST = 6  # characters: "true" and "1" stand in such variables too
RESERVED = "/?#@[] \t\r\n"  # what parsers of addresses split at: in a password it is written as %2F, ...


def credentials(address: str) -> str:
    """What stands between :// and the last @; "" for an address without a host (``sqlite:////home/a@b``)."""
    rest = address.partition("://")[2] or address
    return "" if rest.startswith("/") else rest.rpartition("@")[0]


def without_credentials(address: str) -> str:
    """The address without user name, password and query, which may hold a password too."""
    given = credentials(address)
    return (address.replace(f"{given}@", "", 1) if given else address).partition("?")[0]


def _forms(secret: str) -> tuple[str, ...]:
    return repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret), quote(secret, safe="")


def secrets() -> set[str]:
    """Every secret in the environment, in each form that a library may print."""
    found = set[str]()
    for name, value in os.environ.items():
        if name.upper().endswith(KEYS):
            found.add(value.strip())
        elif "@" in value and ("://" in value or name.upper().endswith("_PROXY")):
            user, _, password = (given := credentials(value)).partition(":")
            found |= {f"{given}@", password or (user if value.startswith("http") else "")}
            if set(given) & set(RESERVED):  # each parser ends such a password elsewhere
                found |= set(re.split(r"[/?#@\[\]:&=\s]+", given))
        query = value.partition("://")[2].partition("?")[2]
        pairs = (part.partition("=") for part in query.split("&"))
        found |= {text for key, _, text in pairs if key.upper().endswith(KEYS)}
    found |= {unquote(secret) for secret in found}
    found |= {form for secret in found for form in _forms(secret)}
    return {secret for secret in found if len(secret) >= SHORTEST}


def redacted(value: Any) -> Any:
    """Text, or what JSON holds, with *** for each secret of the environment."""
    hidden = sorted(secrets(), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, hidden)) or r"(?!)")

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub("***", value)
        if isinstance(value, dict):
            return type(value)({name: clean(item) for name, item in value.items()})
        return [clean(item) for item in value] if isinstance(value, list) else value

    return clean(value)

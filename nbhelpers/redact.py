"""What may be printed and written: no secrets of the environment, no characters that act on a terminal."""

import json
import os
import re
from typing import Any
from urllib.parse import quote, unquote

KEYS = ("TOKEN", "PASSWORD", "SECRET", "_KEY")  # how the name of a variable ends whose value is one
SHORTEST = 6  # characters: "true" and "1" stand in such variables too
RESERVED = "/?#@[] \t\r\n"  # what parsers of addresses split at: in a password it is written as %2F, ...
IN_QUERY = re.compile(rf"[?&][^=&]*(?:{'|'.join(KEYS)})=([^&]+)", re.IGNORECASE)
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """U+FFFD for controls (but line feed and tab), direction marks and halves of surrogate pairs."""
    return _UNPRINTABLE.sub("\ufffd", text)


def credentials(address: str) -> str:
    """What stands between :// and the last @; "" for an address without a host (``sqlite:////home/a@b``)."""
    after_scheme = address.partition("://")[2] or address
    return "" if after_scheme.startswith("/") else after_scheme.rpartition("@")[0]


def secrets() -> set[str]:
    """Every secret in the environment, in each form that a library may print."""
    forms = set[str]()
    for name, value in os.environ.items():
        forms |= set(IN_QUERY.findall(value))
        if name.upper().endswith(KEYS):
            forms.add(value.strip())
        elif "@" in value and ("://" in value or name.upper().endswith("_PROXY")):
            login = credentials(value)
            fragments = re.split(r"[/?#@\[\]:&=\s]+", login)[1:]  # parsers end a password at different ones
            forms |= {f"{login}@", login.partition(":")[2] or login, *fragments}
    forms |= {unquote(secret) for secret in forms}
    forms |= {literal(secret)[1:-1] for secret in forms for literal in (repr, json.dumps)}
    forms |= {quote(secret, safe=safe) for secret in forms for safe in ("/", "")}
    return {secret for secret in forms if len(secret) >= SHORTEST}


def redacted(value: Any) -> Any:
    """Text, or what JSON holds, with asterisks for each secret of the environment."""
    pattern = re.compile("|".join(map(re.escape, sorted(secrets(), key=len, reverse=True))) or r"(?!)")

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return type(value)({name: clean(item) for name, item in value.items()})
        if isinstance(value, list):
            return [clean(item) for item in value]
        return pattern.sub("***", value) if isinstance(value, str) else value

    return clean(value)

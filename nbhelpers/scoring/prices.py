"""The figures of data/prices.toml: what is assumed, and what APIs ask. US dollars."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nbhelpers import store
from nbhelpers.records import Record, Sample

DAYS_PER_YEAR = 365
SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class ApiPrice(Record):
    """What one API asks, US dollars per million tokens, on a date; basis "secondary" or "assumed"."""

    name: str
    input_usd_per_million: float
    output_usd_per_million: float
    as_of: str
    basis: str
    encoding: str = ""  # tiktoken's name of the API's tokenizer; "" where the seller has not published one

    def usd(self, input_tokens: float, output_tokens: float) -> float:
        """Price of one request."""
        return (input_tokens * self.input_usd_per_million + output_tokens * self.output_usd_per_million) / 1e6


@dataclass(frozen=True)
class Assumptions(Record):
    """The assumed figures of data/prices.toml; units are in the names, ``watts`` is by device."""

    as_of: str
    tariff_usd_per_kwh: float
    hardware_usd: float
    hardware_years: float
    requests_per_day: float
    api_characters_per_token: float
    value_usd_per_piece: float
    review_minutes_per_piece: float
    review_usd_per_hour: float
    watts: dict[str, float]

    def watts_of(self, device: str) -> float:
        """Power while generating on a device such as "cpu" or "cuda:1"."""
        return self.watts.get(device.split(":")[0], self.watts["cpu"])

    @property
    def review_usd_per_piece(self) -> float:
        return self.review_minutes_per_piece / 60 * self.review_usd_per_hour

    @property
    def life_requests(self) -> float:
        """Requests in the life of the hardware, at the assumed volume."""
        return self.hardware_years * DAYS_PER_YEAR * self.requests_per_day

    def utilisation(self, seconds_per_request: float) -> float:
        """Share of its life that the hardware is busy at the assumed volume; above 1 one is not enough."""
        return seconds_per_request * self.requests_per_day / SECONDS_PER_DAY

    def hardware_usd_per_request(self, seconds_per_request: float) -> float:
        """The purchase of as many machines as the volume needs, spread over the requests of their life."""
        return (
            self.hardware_usd * max(1, math.ceil(self.utilisation(seconds_per_request))) / self.life_requests
        )


@dataclass(frozen=True)
class Prices:
    assumptions: Assumptions
    api: tuple[ApiPrice, ...]  # the first is the one that summaries compare with
    published: dict[str, float]  # the published cost statement


def load_prices() -> Prices:
    """Prices and assumptions of data/prices.toml. Raises LabError for a file that does not hold them."""
    return store.read_table("prices.toml", _prices)


def _prices(data: dict[str, Any]) -> Prices:
    return Prices(
        assumptions=store.from_plain(data["assumptions"], Assumptions, "[assumptions]"),
        api=tuple(store.from_plain(row, ApiPrice, "[[api]]") for row in data["api"]),
        published={name: float(value) for name, value in data["published"].items()},
    )


def token_counter(api: ApiPrice, characters_per_token: float) -> tuple[Callable[[str], float], str]:
    """How many tokens an API bills for a text, and how that is known.

    The API's own tokenizer if tiktoken is installed and TIKTOKEN_CACHE_DIR says where its vocabularies are
    (without that it would go to the network), otherwise characters / characters_per_token. Not the local
    model's own counts: its tokenizer is another one, and a poor tokenizer must not make the API look dear.
    The few tokens by which an API wraps each message are left out.
    """
    if api.encoding and os.environ.get("TIKTOKEN_CACHE_DIR"):
        try:
            import tiktoken

            encode = tiktoken.get_encoding(api.encoding).encode_ordinary
            return lambda text: len(encode(text)), f"counted by tiktoken's {api.encoding}"
        except (ImportError, ValueError, OSError):  # not installed, unknown, or neither cached nor reachable
            pass
    return (
        lambda text: len(text) / characters_per_token,
        f"{characters_per_token:g} characters a token, assumed",
    )


def api_usd(samples: Sequence[Sample], api: ApiPrice, characters_per_token: float) -> list[float]:
    """What an API would ask for the prompt and text of each sample; 0 for a failed one, which is no text."""
    count, _ = token_counter(api, characters_per_token)
    return [0.0 if s.error is not None else api.usd(count(s.prompt), count(s.text)) for s in samples]

"""What a text costs: electricity, hardware, review, and the same text bought from an API. US dollars.

Arithmetic on what the samples measured and on data/prices.toml, which says of each figure whether it is
assumed. Electricity is that of generating; a machine that waits draws power as well.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from nbhelpers import store
from nbhelpers.devices.device import DeviceReport
from nbhelpers.records import Estimate, Record, Sample
from nbhelpers.stats.estimate import estimate

DAYS_PER_YEAR = 365
SECONDS_PER_DAY = 86_400
JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class ApiPrice(Record):
    name: str
    input_usd_per_million: float  # tokens
    output_usd_per_million: float
    as_of: str
    basis: str  # "secondary" or "assumed"
    encoding: str = ""  # tiktoken's name of the API's tokenizer; "" where the seller has not published one

    def usd(self, input_tokens: float, output_tokens: float) -> float:
        """Price of one request."""
        return (input_tokens * self.input_usd_per_million + output_tokens * self.output_usd_per_million) / 1e6


@dataclass(frozen=True)
class Assumptions(Record):
    as_of: str
    tariff_usd_per_kwh: float
    hardware_usd: float
    hardware_years: float
    requests_per_day: float
    api_characters_per_token: float
    value_usd_per_piece: float
    review_minutes_per_piece: float
    review_usd_per_hour: float
    watts: dict[str, float]  # while generating, by kind of device

    def watts_of(self, device: str) -> float:
        """Of a device such as "cpu" or "cuda:1"."""
        return self.watts.get(device.split(":")[0], self.watts["cpu"])

    @property
    def life_requests(self) -> float:
        """Requests in the life of the hardware, at the assumed volume."""
        return self.hardware_years * DAYS_PER_YEAR * self.requests_per_day


@dataclass(frozen=True)
class Prices(Record):
    """data/prices.toml."""

    assumptions: Assumptions
    api: tuple[ApiPrice, ...]  # the first is the one that summaries compare with
    published: dict[str, float]  # the published cost statement


@dataclass(frozen=True)
class BreakEven:
    """Requests until API bills not received have paid for hardware bought for the purpose."""

    requests: float | None = None
    requests_low: float | None = None
    requests_high: float | None = None  # None with a lower end: the saving may be zero
    years: float | None = None  # at the assumed volume
    utilisation: float | None = None  # share of the machine's life that these requests take
    reason: str | None = None  # for no number, no interval or no upper end, or a number that comes too late


def load_prices() -> Prices:
    """Raises LabError for a data/prices.toml that does not hold them."""
    return store.read_table("prices.toml", lambda data: store.from_plain(data, Prices, "prices"))


def electricity_usd(joules: float, tariff_usd_per_kwh: float) -> float:
    """Joules are watts x seconds; 3.6 million joules are one kilowatt hour."""
    return joules / JOULES_PER_KWH * tariff_usd_per_kwh


def token_counter(api: ApiPrice, characters_per_token: float) -> tuple[Callable[[str], float], bool, str]:
    """What counts the tokens that an API bills for a text, whether it counts exactly, and how.

    By the API's tokenizer where tiktoken is installed and TIKTOKEN_CACHE_DIR says where its vocabularies are
    (without that it would go to the network), otherwise by length. Not by the local model's own counts: its
    tokenizer is another one, and a poor tokenizer must not make the API look dear.
    """
    if api.encoding and os.environ.get("TIKTOKEN_CACHE_DIR"):
        try:
            import tiktoken

            encode = tiktoken.get_encoding(api.encoding).encode_ordinary
            return lambda text: len(encode(text)), True, f"counted by tiktoken's {api.encoding}"
        except (ImportError, ValueError, OSError):  # not installed, unknown, or neither cached nor reachable
            pass
    how = f"{characters_per_token:g} characters a token, assumed"
    return lambda text: len(text) / characters_per_token, False, how


def api_usd(samples: Sequence[Sample], api: ApiPrice, characters_per_token: float) -> list[float]:
    """What an API would ask for the prompt and text of each sample; 0 for a failed one, which is no text."""
    count = token_counter(api, characters_per_token)[0]
    return [0.0 if s.error is not None else api.usd(count(s.prompt), count(s.text)) for s in samples]


def sample_joules(samples: Sequence[Sample], watts: float) -> list[float]:
    """Energy of each sample: measured, or watts x its share of the time; 0 for a row without either."""
    return [watts * (s.share_s or 0.0) if s.energy_j is None else s.energy_j for s in samples]


def cost_summary(samples: Sequence[Sample], report: DeviceReport) -> dict[str, float]:
    """Money and energy per request (attempted) and per piece (finished), under flat names with their unit.

    A request is charged its share of the machine's time, a finished piece the requests that failed as well.
    ``energy_measured`` is 1.0 only if every timed row carries measured energy; otherwise the watts, and with
    them every cost, are assumed. ``_low`` and ``_high`` are 95% intervals over prompts (bootstrap-t), to
    which assumed figures add nothing. What cannot be computed is absent.
    """
    prices = load_prices()
    given, api = prices.assumptions, prices.api[0]
    watts = given.watts_of(report.device)
    found: dict[str, float | None] = {
        "tariff_usd_per_kwh": given.tariff_usd_per_kwh,
        "hardware_usd": given.hardware_usd,
        "requests_per_day": given.requests_per_day,
        "watts_assumed": watts,
    }
    joules = sample_joules(samples, watts)
    if any(joules):
        energy = _over_prompts(samples, joules)
        local = electricity_usd(fmean(joules), given.tariff_usd_per_kwh)
        seconds = _seconds_per_request(samples)
        utilisation = seconds * given.requests_per_day / SECONDS_PER_DAY  # above 1 one machine is not enough
        found |= {
            "energy_measured": float(all(s.energy_j is not None for s in samples if s.share_s is not None)),
            "joules_per_request": fmean(joules),
            "joules_per_request_low": energy.low,
            "joules_per_request_high": energy.high,
            "usd_per_request": local,
            "seconds_per_request": seconds,
            "utilisation": utilisation,
        }
        if finished := sum(sample.error is None for sample in samples):
            hardware = given.hardware_usd * max(1, math.ceil(utilisation)) / given.life_requests
            machine = (local + hardware) * (len(samples) / finished)
            review = given.review_minutes_per_piece / 60 * given.review_usd_per_hour
            found |= {
                "hardware_usd_per_request": hardware,
                "usd_per_piece_machine": machine,
                "usd_per_piece_review": review,
                "usd_per_piece": machine + review,
                "return_usd_per_piece": given.value_usd_per_piece - (machine + review),
            }
        if bought := fmean(api_usd(samples, api, given.api_characters_per_token)):
            found |= {
                "api_usd_per_request": bought,
                "api_tokens_counted": float(token_counter(api, given.api_characters_per_token)[1]),
                "savings_percent": 100 * (1 - local / bought),
                "savings_usd_per_year": (bought - local) * given.requests_per_day * DAYS_PER_YEAR,
            }
        even = vars(break_even_of(samples, report))
        found |= {f"break_even_{name}": value for name, value in even.items() if name != "reason"}
    return {name: value for name, value in found.items() if value is not None}


def break_even_of(samples: Sequence[Sample], report: DeviceReport) -> BreakEven:
    """Against the first API of the list."""
    prices = load_prices()
    given = prices.assumptions
    joules = sample_joules(samples, given.watts_of(report.device))
    if not any(joules):
        return BreakEven(reason="no time or energy was measured")
    bought = api_usd(samples, prices.api[0], given.api_characters_per_token)
    local = (electricity_usd(value, given.tariff_usd_per_kwh) for value in joules)
    saved = [api - own for api, own in zip(bought, local, strict=True)]
    return break_even(_over_prompts(samples, saved), _seconds_per_request(samples), given)


def break_even(saving: Estimate, seconds_per_request: float, given: Assumptions) -> BreakEven:
    """Requests are hardware / saving (US dollars a request): the ends of the intervals are exchanged."""
    if not saving.mean or saving.mean <= 0:
        return BreakEven(reason="the API asks no more than the local electricity costs")
    requests = given.hardware_usd / saving.mean
    busy = requests * seconds_per_request / (given.hardware_years * DAYS_PER_YEAR * SECONDS_PER_DAY)
    if busy > 1 or not math.isfinite(requests + busy):
        return BreakEven(reason="it takes more requests than one machine can make in its life")
    low = given.hardware_usd / saving.high if saving.high else None
    high = given.hardware_usd / saving.low if saving.low and saving.low > 0 else None
    reason = saving.reason
    if low and not high:
        reason = "the interval of the saving includes zero: it may never break even"
    elif requests > given.life_requests:
        reason = f"at {given.requests_per_day:,.0f} requests a day the machine is worn out before"
    return BreakEven(requests, low, high, requests / given.requests_per_day / DAYS_PER_YEAR, busy, reason)


def _seconds_per_request(samples: Sequence[Sample]) -> float:
    """The machine's time for one request; a failed row's time is not known and counts as none."""
    return fmean(sample.share_s or 0.0 for sample in samples)


def _over_prompts(samples: Sequence[Sample], values: Sequence[float]) -> Estimate:
    """The mean over prompts, repeats averaged within their prompt first."""
    prompts: dict[str, list[float]] = {}
    for sample, value in zip(samples, values, strict=True):
        prompts.setdefault(sample.prompt_id, []).append(value)
    return estimate([fmean(group) for group in prompts.values()], method="bootstrap-t")

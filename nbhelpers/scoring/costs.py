"""What a text costs, in US dollars: electricity while generating, hardware, review, the same from an API.

Arithmetic on what the samples measured and on data/prices.toml, which says which figures are assumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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


@dataclass(frozen=True)
class Prices(Record):
    """data/prices.toml."""

    assumptions: Assumptions
    api: tuple[ApiPrice, ...]  # the first is the one that summaries compare with
    published: dict[str, float]  # the published cost statement


def load_prices() -> Prices:
    """Raises LabError for a data/prices.toml that does not hold them."""
    return store.read_table("prices.toml", lambda data: store.from_plain(data, Prices, "prices"))


def electricity_usd(joules: float, tariff_usd_per_kwh: float) -> float:
    """Joules are watts x seconds."""
    return joules / JOULES_PER_KWH * tariff_usd_per_kwh


def api_usd(samples: Sequence[Sample], api: ApiPrice, characters_per_token: float) -> list[float]:
    """What an API would ask for the prompt and text of each sample; 0 for a failed one, which is no text.

    By length: the tokens of a poor local tokenizer must not make the API look dear.
    """
    sizes = [(len(s.prompt), len(s.text)) if s.error is None else (0, 0) for s in samples]
    return [api.usd(*(size / characters_per_token for size in pair)) for pair in sizes]


def cost_summary(samples: Sequence[Sample], report: DeviceReport) -> dict[str, float]:
    """Money and energy per request (attempted) and per piece (finished), under flat names with their unit.

    A request is charged its measured energy, else watts x its share of the machine's time; a finished piece
    the requests that failed as well. ``energy_measured`` is 1.0 only if every timed row carries measured
    energy. ``_low`` and ``_high`` are 95% intervals over prompts (bootstrap-t). What cannot be computed is
    absent.
    """
    prices = load_prices()
    given, api = prices.assumptions, prices.api[0]
    daily, tariff = given.requests_per_day, given.tariff_usd_per_kwh
    watts = given.watts.get(report.device.split(":")[0], given.watts["cpu"])
    found: dict[str, float | None] = {"tariff_usd_per_kwh": tariff, "hardware_usd": given.hardware_usd}
    found |= {"requests_per_day": daily, "watts_assumed": watts}
    joules = [watts * (s.share_s or 0.0) if s.energy_j is None else s.energy_j for s in samples]
    if any(joules):  # otherwise no time or energy was measured
        bills = api_usd(samples, api, given.api_characters_per_token)
        gains = [bill - electricity_usd(j, tariff) for bill, j in zip(bills, joules, strict=True)]
        energy = _over_prompts(samples, joules)
        local, bought = electricity_usd(fmean(joules), tariff), fmean(bills) or math.nan
        attempts = len(samples) / (sum(s.error is None for s in samples) or math.nan)  # for one piece
        seconds = fmean(s.share_s or 0.0 for s in samples)  # a failed row's time is not known
        utilisation = seconds * daily / SECONDS_PER_DAY  # above 1 one machine is not enough
        life = given.hardware_years * DAYS_PER_YEAR * daily
        hardware = given.hardware_usd * max(1, math.ceil(utilisation)) / life
        machine = (local + hardware) * attempts
        review = given.review_minutes_per_piece / 60 * given.review_usd_per_hour
        found |= {
            "energy_measured": float(all(s.energy_j is not None for s in samples if s.share_s is not None)),
            "joules_per_request": fmean(joules),
            "joules_per_request_low": energy.low,
            "joules_per_request_high": energy.high,
            "usd_per_request": local,
            "seconds_per_request": seconds,
            "utilisation": utilisation,
            "hardware_usd_per_request": hardware,
            "usd_per_piece_machine": machine,
            "usd_per_piece_review": review,
            "usd_per_piece": machine + review,
            "return_usd_per_piece": given.value_usd_per_piece - (machine + review),
            "api_usd_per_request": bought,
            "savings_percent": 100 * (1 - local / bought),
            "savings_usd_per_year": (bought - local) * daily * DAYS_PER_YEAR,
            **break_even(_over_prompts(samples, gains), seconds, given),
        }
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


def break_even(saving: Estimate, seconds_per_request: float, given: Assumptions) -> dict[str, float | None]:
    """Requests until API bills not received have paid for the hardware, the years and share of its life.

    ``saving``: US dollars a request. Empty where nothing is saved or one machine cannot make so many.
    """
    usd = {"": saving.mean, "_low": saving.high, "_high": saving.low}
    ends = {end: given.hardware_usd / value if value and value > 0 else None for end, value in usd.items()}
    requests = ends[""] or math.inf
    busy = requests * seconds_per_request / (given.hardware_years * DAYS_PER_YEAR * SECONDS_PER_DAY)
    if not busy <= 1:  # inf x 0 is NaN
        return {}
    years = requests / given.requests_per_day / DAYS_PER_YEAR
    found = {f"break_even_requests{end}": value for end, value in ends.items()}
    return {**found, "break_even_years": years, "break_even_utilisation": busy}


def _over_prompts(samples: Sequence[Sample], values: Sequence[float]) -> Estimate:
    """The mean over prompts, repeats averaged within their prompt first."""
    prompts: dict[str, list[float]] = {}
    for sample, value in zip(samples, values, strict=True):
        prompts.setdefault(sample.prompt_id, []).append(value)
    return estimate([fmean(group) for group in prompts.values()], method="bootstrap-t")

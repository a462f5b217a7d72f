"""What a text costs: electricity, hardware, review, and the same text bought from an API.

Pure arithmetic on what the samples measured and on the figures of data/prices.toml, where each says whether
it is assumed. US dollars. Electricity is that of generating; a machine that waits draws power as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from nbhelpers.devices.device import DeviceReport
from nbhelpers.records import Estimate, Sample
from nbhelpers.scoring.prices import (
    DAYS_PER_YEAR,
    SECONDS_PER_DAY,
    Assumptions,
    Prices,
    api_usd,
    load_prices,
    token_counter,
)
from nbhelpers.stats.estimate import estimate

JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Claim:
    """A published figure and what the other published figures make it."""

    statement: str
    published: float | None
    recomputed: float
    unit: str


@dataclass(frozen=True)
class BreakEven:
    """Requests until API bills not received have paid for the hardware, with their interval.

    ``reason`` says why there is no number, no interval or no upper end, or why it comes too late.
    """

    requests: float | None = None
    low: float | None = None
    high: float | None = None  # None with a ``low``: the saving may be zero
    years: float | None = None  # at the assumed volume
    utilisation: float | None = None  # share of the machine's life that these requests take
    reason: str | None = None


def electricity_usd(joules: float, tariff_usd_per_kwh: float) -> float:
    """Joules are watts x seconds; 3.6 million joules are one kilowatt hour."""
    return joules / JOULES_PER_KWH * tariff_usd_per_kwh


def implied_watts(usd: float, seconds: float, tariff_usd_per_kwh: float) -> float:
    """The power that a claimed electricity cost needs: the inverse of :func:`electricity_usd`."""
    return usd / tariff_usd_per_kwh * JOULES_PER_KWH / seconds


def savings_percent(local_usd: float, api_usd: float) -> float:
    """How much cheaper local is than the API, percent of the API's price; negative when it is dearer."""
    return 100 * (1 - local_usd / api_usd)


def savings_per_year(local_usd: float, api_usd: float, requests_per_day: float) -> float:
    return (api_usd - local_usd) * requests_per_day * DAYS_PER_YEAR


def break_even(saving: Estimate, seconds_per_request: float, given: Assumptions) -> BreakEven:
    """When hardware bought for the purpose has paid for itself.

    saving: US dollars a request, estimated over prompts. The number of requests is hardware / saving, so the
    ends of its interval are those of the saving, exchanged. Assumed figures have no interval.
    """
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


def sample_joules(samples: Sequence[Sample], watts: float) -> list[float]:
    """Energy of each sample: as measured where the row has it, otherwise watts x its share of the time.

    0 for a failed row, whose time and energy are not known.
    """
    return [
        watts * (sample.share_s or 0.0) if sample.energy_j is None else sample.energy_j for sample in samples
    ]


def cost_summary(samples: Sequence[Sample], report: DeviceReport) -> dict[str, float]:
    """Money and energy per request (attempted) and per piece (finished), under flat names with their unit.

    A request is charged its share of the machine's time. ``energy_measured`` is 1.0 only if every timed row
    carries measured energy; otherwise the watts, and with them every cost, are assumed. ``_low`` and
    ``_high`` are 95% intervals over prompts (bootstrap-t), to which assumed figures add nothing. What cannot
    be computed is absent: no samples, nothing timed, nothing finished, a break-even that never comes.
    """
    prices = load_prices()
    given = prices.assumptions
    watts = given.watts_of(report.device)
    summary = {
        "tariff_usd_per_kwh": given.tariff_usd_per_kwh,
        "hardware_usd": given.hardware_usd,
        "requests_per_day": given.requests_per_day,
        "watts_assumed": watts,
    }
    joules = sample_joules(samples, watts)
    if not any(joules):
        return summary
    energy = _over_prompts(samples, joules, "joules")
    local = electricity_usd(fmean(joules), given.tariff_usd_per_kwh)
    seconds = seconds_per_request(samples)
    finished = sum(sample.error is None for sample in samples)
    summary |= {
        "energy_measured": float(all(s.energy_j is not None for s in samples if s.share_s is not None)),
        "joules_per_request": fmean(joules),
        **_ends("joules_per_request", energy.low, energy.high),
        "usd_per_request": local,
        "seconds_per_request": seconds,
        "utilisation": given.utilisation(seconds),
    }
    if finished:
        summary |= _per_piece(local, seconds, len(samples) / finished, given)
        summary |= _against_api(samples, local, prices)
    even = break_even_of(samples, report, prices)
    if even.requests is not None and even.years is not None and even.utilisation is not None:
        summary |= {
            "break_even_requests": even.requests,
            **_ends("break_even_requests", even.low, even.high),
            "break_even_years": even.years,
            "break_even_utilisation": even.utilisation,
        }
    return summary


def break_even_of(samples: Sequence[Sample], report: DeviceReport, prices: Prices | None = None) -> BreakEven:
    """The break-even of a model's samples against the first API of the list, or the reason there is none."""
    prices = prices or load_prices()
    given = prices.assumptions
    joules = sample_joules(samples, given.watts_of(report.device))
    if not any(joules):
        return BreakEven(reason="no time or energy was measured")
    bought = api_usd(samples, prices.api[0], given.api_characters_per_token)
    local = [electricity_usd(value, given.tariff_usd_per_kwh) for value in joules]
    saved = [api - own for api, own in zip(bought, local, strict=True)]
    return break_even(_over_prompts(samples, saved, "saving"), seconds_per_request(samples), given)


def seconds_per_request(samples: Sequence[Sample]) -> float:
    """The machine's time for one request; a failed row's time is not known and counts as none."""
    return fmean(sample.share_s or 0.0 for sample in samples)


def _over_prompts(samples: Sequence[Sample], values: Sequence[float], name: str) -> Estimate:
    """The mean over prompts, repeats averaged within their prompt first."""
    prompts: dict[str, list[float]] = {}
    for sample, value in zip(samples, values, strict=True):
        prompts.setdefault(sample.prompt_id, []).append(value)
    return estimate([fmean(group) for group in prompts.values()], name, method="bootstrap-t")


def _ends(name: str, low: float | None, high: float | None) -> dict[str, float]:
    return {f"{name}_{end}": value for end, value in (("low", low), ("high", high)) if value is not None}


def _per_piece(
    local: float, seconds: float, requests_per_piece: float, given: Assumptions
) -> dict[str, float]:
    """A finished piece carries the requests that failed, its share of the hardware, and its review."""
    hardware = given.hardware_usd_per_request(seconds)
    machine = (local + hardware) * requests_per_piece
    cost = machine + given.review_usd_per_piece
    return {
        "hardware_usd_per_request": hardware,
        "usd_per_piece_machine": machine,
        "usd_per_piece_review": given.review_usd_per_piece,
        "usd_per_piece": cost,
        "return_usd_per_piece": given.value_usd_per_piece - cost,  # the value is assumed by its owner
    }


def _against_api(samples: Sequence[Sample], local: float, prices: Prices) -> dict[str, float]:
    """The same texts bought from the first API of the list, per request."""
    given = prices.assumptions
    bought = fmean(api_usd(samples, prices.api[0], given.api_characters_per_token))
    if bought == 0:  # nothing asked and nothing written
        return {}
    counted = "counted" in token_counter(prices.api[0], given.api_characters_per_token)[1]
    return {
        "api_usd_per_request": bought,
        "api_tokens_counted": float(counted),
        "savings_percent": savings_percent(local, bought),
        "savings_usd_per_year": savings_per_year(local, bought, given.requests_per_day),
    }


def published_claims() -> list[Claim]:
    """The published cost statement, each figure recomputed from the others it was published with."""
    prices = load_prices()
    said, given, api = prices.published, prices.assumptions, prices.api[0]
    local, bought = said["local_usd_per_request"], said["api_usd_per_request"]
    daily = said["requests_per_day"]
    listed = api.usd(said["prompt_tokens"], said["new_tokens"])
    watts = implied_watts(local, said["seconds_per_request"], given.tariff_usd_per_kwh)
    payback = given.hardware_usd / savings_per_year(local, bought, daily)
    rows = [
        ("saving against the API", said["savings_percent"], savings_percent(local, bought), "%"),
        ("saving a year", said["savings_usd_per_year"], savings_per_year(local, bought, daily), "USD"),
        ("power that the electricity figure implies", None, watts, "W"),
        ("years until assumed hardware is paid back", None, payback, "years"),
        (f"price of the request at {api.name}", bought, listed, "USD"),
        ("saving at that price", said["savings_percent"], savings_percent(local, listed), "%"),
        (
            "saving a year at that price",
            said["savings_usd_per_year"],
            savings_per_year(local, listed, daily),
            "USD",
        ),
    ]
    return [Claim(*row) for row in rows]

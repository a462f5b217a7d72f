"""What a text costs, in US dollars: electricity while generating, and the same text from an API.

Arithmetic on what the samples measured and on data/prices.toml, which says which figures are assumed.
Notebook 08 adds the hardware and the review.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from nbhelpers import store
from nbhelpers.devices.machine import DeviceReport
from nbhelpers.records import Estimate, Record, Sample
from nbhelpers.stats.estimate import estimate, grouped

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
    return joules / JOULES_PER_KWH * tariff_usd_per_kwh


def api_usd(samples: Sequence[Sample], api: ApiPrice, characters_per_token: float) -> list[float]:
    """What an API would ask for the prompt and text of each sample; 0 for a failed one, which is no text.

    By length: the tokens of a poor local tokenizer must not make the API look dear.
    """
    lengths = [(len(s.prompt), len(s.text)) if s.error is None else (0, 0) for s in samples]
    return [api.usd(read / characters_per_token, new / characters_per_token) for read, new in lengths]


def joules(samples: Sequence[Sample], watts: float) -> list[float]:
    """The measured energy of each sample, else watts x its share of the machine's time; 0 for a server's."""
    seconds = [0.0 if s.engine == "server" else s.share_s or 0.0 for s in samples]
    return [watts * t if s.energy_j is None else s.energy_j for s, t in zip(samples, seconds, strict=True)]


def cost_summary(samples: Sequence[Sample], report: DeviceReport) -> dict[str, float]:
    """Money and energy per request attempted, under flat names with their unit.

    ``energy_measured`` is 1.0 only if every timed row carries measured energy. ``_low`` and ``_high`` are the
    95% interval over prompts. What cannot be computed is absent.
    """
    prices = load_prices()
    assumed, tariff = prices.assumptions, prices.assumptions.tariff_usd_per_kwh
    watts = assumed.watts.get(report.device.split(":")[0], assumed.watts["cpu"])
    summary: dict[str, float | None] = {"tariff_usd_per_kwh": tariff, "watts_assumed": watts}
    if any(used := joules(samples, watts)):  # otherwise no time or energy was measured
        local = electricity_usd(fmean(used), tariff)
        bought = fmean(api_usd(samples, prices.api[0], assumed.api_characters_per_token)) or math.nan
        energy = over_prompts(samples, used)
        summary |= {
            "energy_measured": float(all(s.energy_j is not None for s in samples if s.share_s is not None)),
            "joules_per_request": fmean(used),
            "joules_per_request_low": energy.low,
            "joules_per_request_high": energy.high,
            "seconds_per_request": fmean(s.share_s or 0.0 for s in samples),  # a failed row's is not known
            "usd_per_request": local,
            "api_usd_per_request": bought,
            "savings_percent": 100 * (1 - local / bought),
        }
    return {name: value for name, value in summary.items() if value is not None and math.isfinite(value)}


def over_prompts(samples: Sequence[Sample], values: Sequence[float]) -> Estimate:
    """The mean over prompts, repeats averaged within their prompt first; the interval is bootstrap-t."""
    by_prompt = grouped(zip((sample.prompt_id for sample in samples), values, strict=True))
    return estimate([fmean(group) for group in by_prompt.values()], method="bootstrap-t")

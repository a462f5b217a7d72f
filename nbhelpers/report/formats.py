"""Figures as people read them, in the report's tables."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal

from nbhelpers.records import Estimate


def interval(estimate: Estimate | None) -> str:
    """A mean with its interval, or with the reason why there is none."""
    if estimate is None or estimate.mean is None:
        return "–"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:.2f} ({estimate.reason})"
    return f"{estimate.mean:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def three(number: float | None) -> str:
    """Three significant digits, never in scientific notation; a dash for what was not measured."""
    if not number:
        return "–" if number is None else "0"
    return f"{number:,.0f}" if abs(number) >= 100 else f"{Decimal(f'{number:#.3g}'):f}"


def points(score: float | None) -> str:
    return "–" if score is None else f"{score:.2f}"


def dollars(usd: float | None) -> str:
    """US dollars with two significant digits below one dollar."""
    if usd is None:
        return "–"
    return f"${usd:,.2f}" if usd >= 1 else f"${Decimal(f'{usd:.2g}'):f}"


def basis(energy_measured: float | None) -> str:
    """What a figure of energy or its cost rests on: "measured", "assumed", or "" where there is none."""
    return "" if energy_measured is None else "measured" if energy_measured else "assumed"


def moment(iso: str) -> str:
    """A date and time as people write it; what is not a date stays as it is."""
    try:
        return f"{datetime.fromisoformat(iso):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return iso


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"

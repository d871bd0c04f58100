"""Quantities as a person reads them: times, sizes, counts, money, in digits that a plan can answer for."""

import math

from minzero.cards import GiB

# Units of time, the longest first: (name, the least that is said in it, seconds).
TIMES = (
    ("years", 1, 365 * 86400),
    ("days", 1, 86400),
    ("hours", 1, 3600),
    ("minutes", 2, 60),
    ("s", 0.1, 1),
    ("ms", 0.001, 1e-3),
)
LARGE_NUMBERS = ((1e15, " quadrillion"), (1e12, " trillion"), (1e9, " billion"), (1e6, " million"))


def rounded(value, digits):
    """A number of at least 0 to so many significant digits."""
    return round(value, digits - 1 - math.floor(math.log10(value))) if value else 0


def in_digits(value, digits=3):
    """A number of at least 0 in so many significant digits: 56,000, 912, 5.23, 0.0175."""
    value = rounded(value, digits)
    if not value:
        return "0"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(value)))}f}"


def in_time(seconds):
    """Seconds as text, in the unit that fits: 1.2 years, 12 days, 2.3 hours, 2.5 minutes, 46 s, 0.25 s, 33 ms. Two
    digits, and all before the point."""
    for unit, least, length in TIMES:
        value = rounded(seconds / length, 2)
        if value >= least:
            return f"{in_digits(value, 2) if value < 100 else f'{seconds / length:,.0f}'} {unit}"
    return "0"


def in_units(size):
    """Bytes as text: 1,951 GiB, 13.90 GiB, 45.6 MiB, 512 bytes."""
    if size >= 1000 * GiB:
        return f"{size / GiB:,.0f} GiB"
    if size >= GiB:
        return f"{size / GiB:,.2f} GiB"
    if size >= 2**20 / 10:
        return f"{size / 2**20:.1f} MiB"
    return f"{size:,.0f} bytes" if size else "0"


def in_round_units(size):
    """Bytes as text, of sizes that are limits or estimates: 2,048 GiB, 71.2 GiB, 3 GiB."""
    return in_units(size) if size < GiB else f"{rounded(size / GiB, 4 if size >= 1000 * GiB else 3):,g} GiB"


def in_count(number):
    """A whole number as text: 1.76 billion, 836,448."""
    for least, name in LARGE_NUMBERS:
        if rounded(number, 3) >= least:
            return f"{rounded(number, 3) / least:g}{name}"
    return f"{number:,}"


def in_money(dollars):
    """Dollars as text: $2.08 million, $56,000, $912, $5.20, under a cent."""
    if 0 < dollars < 0.01:
        return "under a cent"
    for least, name in LARGE_NUMBERS:
        if rounded(dollars, 3) >= least:
            return f"${in_digits(dollars / least)}{name}"
    return f"${dollars:,.2f}" if dollars < 100 and dollars != round(dollars) else f"${rounded(dollars, 3):,.0f}"


def in_percent(share):
    """A share as text: 18%, or less than 1%."""
    return f"{share:.0%}" if share >= 0.01 else "less than 1%"

"""Keys of a configuration: JSON values are checked against a type, a range and choices, and errors put in words."""

import difflib
import json
import math
import types
import typing
from dataclasses import field

from minzero.errors import UserError


def key(default, meaning, choices=None, minimum=None, maximum=None, off=None):
    """A configuration key: its default, its meaning with the unit, and the values it may take.

    off: for keys of the model section, the value with which the model computes the same as without this key (see
    `switched_on`)."""
    metadata = {"meaning": meaning, "choices": choices, "minimum": minimum, "maximum": maximum, "off": off}
    if isinstance(default, list):  # each Config gets its own copy
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def convert(where, value, expected, meta):
    """Return `value` as the type `expected`. Whole floats count as integers, so that lengths can be written 1e9.

    where: the key's name, for messages. meta: {"meaning", "choices", "minimum", "maximum"}, the last three None where
    there is no such limit. Raises UserError."""
    options = typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)
    option = next((option for option in options if fits(value, option)), None)
    if option is None:
        raise UserError(f"{where}: found {in_short(value)}, expected {type_name(expected)} ({meta['meaning']})")
    if value is None:
        return None
    is_number = option in (int, float, list[float])
    for item in value if isinstance(value, list) else [value]:
        check_item(where, item, is_number, meta)
    if isinstance(value, str | dict | list) and option != list[float]:  # limits are for numbers
        return value
    if meta["minimum"] is not None and value < meta["minimum"]:
        raise UserError(f"{where}: found {in_short(value)}, expected at least {meta['minimum']} ({meta['meaning']})")
    if meta["maximum"] is not None and value > meta["maximum"]:
        raise UserError(f"{where}: found {in_short(value)}, expected at most {meta['maximum']} ({meta['meaning']})")
    try:
        if option in (int, float):
            return option(value)
        return [float(item) for item in value] if option == list[float] else value
    except OverflowError:  # a whole number above what a float holds
        raise UserError(f"{where}: found {in_short(value)}, expected a number that a float holds") from None


def check_item(where, item, is_number, meta):
    """Raises UserError for a number that is not finite, a value that is not among the choices, or unusable text."""
    if is_number and isinstance(item, float) and not math.isfinite(item):  # Python's JSON reader accepts NaN, Infinity
        raise UserError(f"{where}: found {json.dumps(item)}, expected a finite number ({meta['meaning']})")
    if meta["choices"] and item not in meta["choices"]:
        names = ", ".join(str(choice).lower() for choice in meta["choices"])
        raise UserError(f"{where}: found {in_short(item)}, expected one of {names}")
    if isinstance(item, str) and (fault := fault_of_text(item)):
        raise UserError(f"{where}: {fault} ({meta['meaning']})")


def fits(value, option):
    """Whether a JSON value is of this type. A whole float is an int, an int is a float; a boolean is neither."""
    if option is float:
        return type(value) in (int, float)
    if option is int:
        return type(value) is int or (type(value) is float and value.is_integer())
    if typing.get_origin(option) is list:
        return isinstance(value, list) and all(fits(item, typing.get_args(option)[0]) for item in value)
    return isinstance(value, option)


def fault_of_text(text):
    """Why a string cannot be a path or be printed, or None. The limits are those of Linux: 255 bytes a name, 4,096 a
    path."""
    try:
        names = [len(name) for name in text.encode().split(b"/")]
    except UnicodeEncodeError:
        return f"found {in_short(text)}, which is no text (half of a surrogate pair); expected UTF-8"
    if not all(character.isprintable() for character in text):
        return f"found {in_short(text)}, expected no control characters"
    if max(names) > 255 or sum(names) + len(names) > 4096:
        return f"found {in_short(text)}, longer than a path may be; expected at most 255 bytes a name, 4,096 in all"
    return None


# -- words for error messages --------------------------------------------------------------------


def type_name(expected):
    """A key's type in words: int, float, list[str], str or null."""
    options = typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)
    plain = {types.NoneType: "null", bool: "bool", int: "int", float: "float", str: "str", dict: "dict"}
    return " or ".join(plain.get(option, str(option)) for option in options)  # str(list[str]) is "list[str]"


def in_short(value):
    """A JSON value for an error message, cut where it is long."""
    try:
        text = json.dumps(value)
    except TypeError:  # no JSON value, as a library's default
        return type(value).__name__
    except (RecursionError, ValueError):  # nested a thousand times; a number of thousands of digits
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def as_flag(value):
    """A JSON value as a flag takes it: a string without quotes."""
    return value if isinstance(value, str) else in_short(value)


def printable(name):
    """A key of a file for an error message: characters that cannot be printed are escaped."""
    return name if name.isprintable() else json.dumps(name)[1:-1]


def did_you_mean(name, valid, otherwise=None):
    """The remedy for an unknown name: the nearest valid one, or `otherwise`, by default all of them."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else otherwise or f"known keys: {', '.join(sorted(valid))}"


def divisors(number):
    """All divisors of a whole number, in ascending order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def nearest_divisors(number, wanted):
    """The two divisors of `number` nearest to `wanted`, for error messages: "4 or 6"."""
    nearest = sorted(divisors(number), key=lambda d: abs(d - wanted))[:2]
    return " or ".join(str(d) for d in sorted(nearest))

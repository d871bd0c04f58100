"""Command-line flags: a parser whose errors are one line, and types of flags with a range."""

import argparse
import math
from pathlib import Path

from minzero.errors import UserError

SUPPRESS = argparse.SUPPRESS
LARGEST = 2**63 - 1  # the largest int64, for C code


def form(prog):
    """How --help is set: lines of a text stay as they are, and a flag's meaning begins in the same line."""
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=26)


class FlagParser(argparse.ArgumentParser):
    """A command's flags. Raises UserError with one line: the flag, the value found and the values expected.

    about: the command in a few lines, printed above the list of its flags. expected: for commands that also take
    overrides of the config, how the command is called; flags must then be written in full. `about` is then all that
    --help prints, unless there is an end: text for below the list of flags."""

    def __init__(self, about, expected=None, end=None):
        super().__init__(
            usage=expected, description=about, epilog=end, formatter_class=form, allow_abbrev=expected is None
        )
        self.expected = expected
        self.about = about

    def format_help(self):
        return self.about if self.expected and not self.epilog else super().format_help()

    def error(self, message):
        remedy = f"expected: {self.expected}" if self.expected else f"{self.prog} --help lists the flags"
        raise UserError(f"{message.removeprefix('argument ')}; {remedy}")


def shown(text):
    """Text that was found, cut for an error message where it is long."""
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def at_least(least, most=LARGEST, expected=None):
    """The type of a flag that takes a whole number from `least` to `most`. expected: the range in words."""
    expected = expected or (f"{least} or more" if most == LARGEST else f"{least} to {most}")

    def whole_number(text):
        try:
            value = int(text)
        except ValueError:  # not a number, or more digits than Python converts
            raise argparse.ArgumentTypeError(f"found {shown(text)!r}, expected a whole number, {expected}") from None
        if not least <= value <= most:
            limit = f", at most {most}" if value > most == LARGEST else ""
            raise argparse.ArgumentTypeError(f"found {shown(text)}, expected {expected}{limit}")
        return value

    return whole_number


def a_number(least=0.0, most=math.inf, above=False):
    """The type of a flag that takes a finite number from `least` to `most`. above: `least` itself is not accepted."""
    expected = f"above {least:g}" if above else f"{least:g} or more"
    if most < math.inf:
        expected = f"above {least:g}, at most {most:g}" if above else f"{least:g} to {most:g}"

    def finite_number(text):
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"found {shown(text)!r}, expected a number {expected}") from None
        if not (least <= value <= most and math.isfinite(value)) or (above and value == least):
            raise argparse.ArgumentTypeError(f"found {value}, expected {expected}")
        return value

    return finite_number


def a_path(text):
    """The type of a flag that names a file or folder."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"found {shown(text)!r}, expected a path{' without NUL' if text else ''}")
    return Path(text)


def a_model(text):
    """The type of a flag that names a trained model: a path, or an address of fsspec's, as s3://bucket/run."""
    return text if "://" in text else a_path(text)


def a_checkpoint(text):
    """The type of a flag that names a checkpoint: best, latest or a step. Whether it exists is checked later."""
    if len(text) > 60:
        raise argparse.ArgumentTypeError(f"found {shown(text)!r}, expected best, latest or a step")
    return text

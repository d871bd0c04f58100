"""The text of `train.py --help`: every key with its meaning, type, range and default, from the definitions."""

import dataclasses
import json
import textwrap
import typing

from minzero import deepspeed_keys
from minzero.config.auto import AUTO
from minzero.config.sections import SECTIONS
from minzero.config.values import type_name

USAGE = """\
usage: deepspeed [--num_gpus N] train.py [CONFIG.json] [--section.key VALUE ...]

CONFIG.json is configs/1p5b.json if none is given. VALUE is written as in JSON: 1e-4, true, null, [0.9, 0.95]"""
INDENT = " " * 37  # of the text about a key
ABOUT_DEEPSPEED = (
    "DeepSpeed's own keys, merged over ds_config.json; others are refused. "
    f'{", ".join(AUTO)} may be "auto": chosen by the model, the ranks and the memory.'
)


def help_text():
    """The whole text, in lines of at most 120 characters."""
    lines = [USAGE]
    for section, cls in SECTIONS.items():
        lines += ["", f"{section}:"]
        for field in dataclasses.fields(cls):
            default = field.default_factory() if field.default is dataclasses.MISSING else field.default
            lines += describe(f"{section}.{field.name}", field.type, field.metadata, default)
    lines += ["", "deepspeed:"]
    lines += textwrap.wrap(ABOUT_DEEPSPEED, 118, initial_indent="  ", subsequent_indent="  ")
    for name, known in deepspeed_keys.ACCEPTED.items():
        lines += describe(f"deepspeed.{name}", known.kind, known._asdict(), known.default)
    return "\n".join(lines)


def describe(name, kind, meta, default):
    """The lines about one key: its meaning, type, range and default."""
    facts = [type_name(kind)]
    if meta["choices"]:
        list_of = "list of " if typing.get_origin(kind) is list else ""
        facts = [list_of + " | ".join(str(choice).lower() for choice in meta["choices"])]
    if meta["minimum"] is not None:
        facts.append(f"at least {meta['minimum']}")
    if meta["maximum"] is not None:
        facts.append(f"at most {meta['maximum']}")
    text = f"{meta['meaning']} ({', '.join(facts)}; default {json.dumps(default)})"
    lines = textwrap.wrap(text, 118, initial_indent=INDENT, subsequent_indent=INDENT)
    flag = f"  --{name}"
    if len(flag) < len(INDENT):
        return [flag + lines[0][len(flag) :], *lines[1:]]
    return [flag, *lines]

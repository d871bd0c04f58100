"""Config file and command line -> Config.

Any key can be overridden on the command line: `--train.lr 1e-4 --deepspeed.zero_optimization.stage 2`.
"""

import difflib
import json
import os
import re
from pathlib import Path

from minzero import commands, deepspeed_keys
from minzero.config.build import build
from minzero.config.help import help_text
from minzero.config.hints import RENAMED, rename_old_keys, suggest_flag
from minzero.config.nested import merge
from minzero.config.sections import SECTIONS
from minzero.config.values import fault_of_text
from minzero.errors import UserError
from minzero.files import ROOT, read_json
from minzero.hf.families import family_of

KEYS_ARE_WRITTEN = "keys are written --section.key value, as in --train.lr 1e-4"


def load_config(arguments, model_defaults=None, default="configs/1p5b.json"):
    """Command-line arguments -> Config: the config file (or `default`) with the overrides over it. Raises UserError.

    model_defaults: where train.init_from is set, gives the keys of the model section that are left out:
    `init_from.model_defaults`. None: they have their defaults."""
    help_if_asked(arguments)
    overrides, rest = command_line_values(arguments)
    if len(rest) > 1:
        raise UserError(f"{rest[1]}: expected one config file, and {rest[0]} was already given")
    if rest and (fault := fault_of_text(rest[0])):
        raise UserError(f"config file: {fault}")
    path = Path(rest[0]) if rest else ROOT / default
    if not path.exists():
        raise UserError(f"{path}: no such file{nearest_file(path)}")
    # each source is checked by itself first, so that an error names it
    values = {"deepspeed": read_json(ROOT / "ds_config.json")}
    build(values, "ds_config.json")
    content = read_json(path, regular=False)  # a shell's <(...) is a pipe
    if isinstance(content, dict):
        content = merge(values, rename_and_report(content, path))
    # with another model the section's keys do not go together by themselves
    build(content, path, together=False)
    merged = merge(content, overrides)
    config = build(merged, "command line", together=False)
    config.train.out_dir = out_dir = config.train.out_dir or f"out/{path.stem}"
    model = None
    if model_defaults and config.train.init_from:
        model = model_defaults(config, merged.get("model", {}))
    build(content, path, model)
    config = build(merged, "command line", model)
    config.train.out_dir = out_dir
    if config.model.family:
        try:
            family_of(config.model)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return config


def help_if_asked(arguments):
    """Print the keys and exit, if --help is among the arguments. Of several ranks the first prints."""
    if "--help" in arguments or "-h" in arguments:
        if commands.is_first_rank():
            print(help_text())
        raise SystemExit(0)


def rename_and_report(values, source):
    """`rename_old_keys`, with a line on stderr for each key that has another name now."""
    values, old_names = rename_old_keys(values, source)
    if commands.is_first_rank():
        for old in old_names:
            commands.say(f"{source}: {old} is now called {RENAMED[old]}; the old name still works")
    return values


def nearest_file(path):
    """The remedy for a config file that does not exist: the nearest name in its folder and in configs/, or all."""
    ours = ROOT / "configs"
    there = {file.stem: file for folder in (ours, path.parent) for file in sorted(folder.glob("*.json"))}
    close = difflib.get_close_matches(path.stem, there, n=1, cutoff=0.5)
    if not close:
        return f"; configs holds {', '.join(sorted(file.name for file in ours.glob('*.json')))}"
    file = there[close[0]]
    return f"; did you mean {os.path.relpath(file) if file.is_relative_to(Path.cwd()) else file}?"


# -- the command line ----------------------------------------------------------------------------


def command_line_values(arguments):
    """`--train.lr 1e-4 --model.bias=false` -> {"train": {"lr": 1e-4}, "model": {"bias": False}}.

    Values are JSON; text that is not JSON is a string. Returns the values, and the arguments that are not flags.
    Raises UserError."""
    values = {}
    rest = []
    arguments = list(arguments)
    while arguments:
        argument = arguments.pop(0)
        if argument.startswith("--local_rank"):  # set by the launcher; the environment's RANK says the same
            continue
        if not argument.startswith("--"):
            if argument.startswith("-") or re.match(r"(model|data|train|deepspeed)\.\w+=", argument):
                raise UserError(f"{argument}: unknown flag; {KEYS_ARE_WRITTEN}")
            rest.append(argument)
            continue
        name, has_value, text = argument[2:].partition("=")
        path = path_of_key(name)
        if not has_value:
            if not arguments or arguments[0].startswith("--"):
                raise UserError(f"--{name}: no value given; write --{name} VALUE (booleans: true or false)")
            text = arguments.pop(0)
        put(values, path, parse_value(name, path, text))
    return rename_and_report(values, "command line"), rest


def path_of_key(name):
    """ "train.lr" -> ["train", "lr"]. Raises UserError if it does not start with a section."""
    if "." not in name:
        raise UserError(f"--{name}: unknown flag; {suggest_flag(name)}{KEYS_ARE_WRITTEN}")
    path = name.split(".")
    if path[0] not in (*SECTIONS, "deepspeed") or not all(path):
        raise UserError(f"--{name}: unknown section {path[0]!r}; expected model, data, train or deepspeed")
    return path


def parse_value(name, path, text):
    """The value of a flag, as JSON or a string. Keys that take strings get one: a folder may be called 2024. A single
    string is a list of one where a list of strings is taken."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    except (ValueError, RecursionError):  # too many digits or brackets for Python
        raise UserError(f"--{name}: found {text[:20]}... ({len(text)} characters), expected less") from None
    if path[0] == "deepspeed":
        accepted = deepspeed_keys.ACCEPTED.get(".".join(path[1:]))
        kind = accepted.kind if accepted else None
    else:
        field = SECTIONS[path[0]].__dataclass_fields__.get(path[1])
        kind = field.type if field else None
    if kind in (str, str | None, str | dict) and value is not None and not isinstance(value, dict):
        return text.strip('"')
    is_single = value is not None and not isinstance(value, list | dict) and not re.search(r"^\[|,", text)
    if kind == list[str] and is_single:
        return [text.strip('"')]
    return value


def put(values, path, value):
    """values["a"]["b"]["c"] = value, for the path [a, b, c]. Raises UserError where a part already has a value."""
    target = values
    for part in path[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise UserError(
                f"--{'.'.join(path)}: {part} was given the value {json.dumps(target)} before; give only one of them"
            )
    target[path[-1]] = value

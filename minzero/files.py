"""The repository's folder and commit, and reading JSON files. Needs only the standard library."""

import contextlib
import json
import os
import stat
import subprocess
from pathlib import Path

from minzero.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def git_commit():
    """The commit of this copy of the code, with "-dirty" where files were changed, or None."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # a container without git
        return None


def refuse_pipe(path):
    """Raises UserError if the path is a pipe, socket or device: reading one may never end."""
    with contextlib.suppress(OSError, ValueError):  # a missing file or a bad path: the reader says it
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UserError(f"{path}: found a pipe, socket or device, expected a plain file; put the file there")


def read_json(path, regular=True):
    """The content of a JSON file.

    regular: refuse everything but a plain file; with False a pipe can be read as well. Raises UserError that names
    the file, and the line and column of a syntax error."""
    if regular:
        refuse_pipe(path)

    def without_repeats(pairs):
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{path}: the key {json.dumps(twice)} stands twice in one object; remove one of them")
        return content

    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=without_repeats)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a readable JSON file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; expected a JSON file") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; expected JSON of a few levels") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}; expected JSON") from None
    except ValueError:  # a number of more digits than Python converts; a NUL in the path
        raise UserError(f"{path}: holds a number of thousands of digits, or is no path; expected JSON") from None

"""The names of checkpoints in a run's folder. Needs no torch: supervise.py looks at them without it."""

import os
import re
from pathlib import Path

FOLDER = re.compile(r"step_([0-9]{8,15})(|\.tmp|\.old\.tmp|\.deleted\.tmp)")


def name_of(step):
    return f"step_{step:08d}"


def step_and_suffix(path):
    """(step, suffix or "") of the name of a folder that a run made; (None, "") for any other name."""
    match = FOLDER.fullmatch(path.name)
    if match and path.name == name_of(int(match[1])) + match[2]:
        return int(match[1]), match[2]
    return None, ""


def is_name(name):
    """Whether a name is that of a checkpoint, and not a temporary one."""
    step, suffix = step_and_suffix(Path(name))
    return step is not None and not suffix


# -- which are there -------------------------------------------------------------------------------


def folders_of_run(folder):
    """[(path, step, suffix)] of the folders in out/<run>/checkpoints that a run has named, sorted by name. Empty if
    there is no such folder."""
    try:
        paths = sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir())
    except OSError:
        return []
    found = [(path, *step_and_suffix(path)) for path in paths]
    return [entry for entry in found if entry[1] is not None]


def is_complete(path):
    return (path / "state.json").is_file()


def complete_checkpoints(folder):
    """The complete checkpoints in out/<run>/checkpoints, by step."""
    return [path for path, _, suffix in folders_of_run(folder) if not suffix and is_complete(path)]


def newest_save(run):
    """(when it was saved, in nanoseconds, its step) of the complete checkpoint of a run that was saved last; (0, -1) if
    there is none."""
    saved = [(0, -1)]
    for path in complete_checkpoints(Path(run) / "checkpoints"):
        try:
            saved.append((os.stat(path / "state.json").st_mtime_ns, step_and_suffix(path)[0]))
        except OSError:  # the run has just deleted it
            continue
    return max(saved)


def newest_step(run):
    """The step of the complete checkpoint of a run that was saved last; -1 if there is none."""
    return newest_save(run)[1]

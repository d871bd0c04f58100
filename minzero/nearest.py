"""Suggestions for paths that are not there: the nearest path that is."""

import contextlib
import difflib
import itertools
import os
from pathlib import Path

from minzero.errors import UserError

MOST_ENTRIES = 10_000  # of a folder that are looked at


def entries(folder):
    """{name: path} of a folder's entries; empty if it cannot be read."""
    try:
        with os.scandir(folder) as found:
            return {entry.name: Path(folder) / entry.name for entry in itertools.islice(found, MOST_ENTRIES)}
    except (OSError, ValueError):
        return {}


def similar_paths(path):
    """Paths that are there and are spelled like `path`, part by part."""
    candidates = [Path(path.anchor)]
    for part in path.parts[1 if path.anchor else 0 :]:
        following = []
        for folder in candidates:
            if os.path.lexists(folder / part):
                following.append(folder / part)
                continue
            there = entries(folder)
            following += [there[name] for name in difflib.get_close_matches(part, there, n=3, cutoff=0.6)]
        candidates = following
    return candidates


def holds(path, is_right):
    """is_right(path), and False where it raises UserError or OSError, as of a name that is too long."""
    try:
        return is_right(path)
    except (UserError, OSError):
        return False


def nearest_path(path, is_right):
    """The path that is most likely meant by `path`, which is not right: one spelled like it, one inside it or around
    it, or one spelled like it a folder further down; None if there is none. is_right(path): whether a path is one of
    the wanted kind."""
    path = Path(path)
    similar = similar_paths(path)
    inside = [found for folder in (path, *similar) for found in entries(folder).values()]
    around = list(path.parents)[:3]
    below = [] if path.anchor else [found for folder in entries(".") for found in similar_paths(Path(folder) / path)]
    for candidates in (similar, inside, around, below):
        right = [candidate for candidate in candidates if candidate.name and holds(candidate, is_right)]
        if right:
            return max(right, key=lambda found: difflib.SequenceMatcher(None, str(found), str(path)).ratio())
    return None


@contextlib.contextmanager
def suggesting(path, is_right):
    """Adds the nearest right path to a UserError of this block, where `path` itself is not right."""
    try:
        yield
    except UserError as error:
        nearest = None if holds(path, is_right) else nearest_path(path, is_right)
        if nearest is None:
            raise
        raise UserError(f"{error}; did you mean {nearest}?") from None

"""Checks that this machine has what `make` needs, before anything is installed: a line for each thing that is missing.

Must run on any Python 3, so it uses nothing newer than Python 3.5.
"""

import shutil
import sys

GIB = 1024**3


def problems():
    """Yield one line for each thing that is missing: found, needed, remedy."""
    version = "{}.{}".format(*sys.version_info[:2])
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        yield "Python {} found, 3.10 to 3.13 needed: install one and call make PYTHON=python3.12".format(version)
        return
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        yield "Python {0} has no venv: install it (Debian, Ubuntu: apt install python{0}-venv)".format(version)
    if not sys.platform.startswith("linux"):
        yield "{} found, Linux needed: on Windows use WSL 2, elsewhere a container".format(sys.platform)
        return
    try:
        free = shutil.disk_usage(".").free / GIB
    except OSError as error:  # this folder was removed
        yield "this folder cannot be read ({}): change to one that can".format(error)
        return
    if free < 3:
        yield "{:.1f} GiB of disk free here, 3 needed and 10 with CUDA: make room or move the folder".format(free)
    elif free < 10:
        print("minZeRO: {:.1f} GiB of disk free here; torch with CUDA, which pip may choose, needs 10".format(free))
    try:
        with open("/proc/meminfo") as file:
            kib = {line.split(":")[0]: int(line.split()[1]) for line in file}
        available = kib["MemAvailable"] / 1024**2
    except (OSError, KeyError, ValueError, IndexError):  # a sandbox without /proc/meminfo
        return
    if available < 3:
        yield "{:.1f} GiB of memory available, about 3 needed: end other programs".format(available)


def main():
    found = list(problems())
    for line in found:
        sys.stderr.write("minZeRO: " + line + "\n")
    if found:
        return 2
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        print("minZeRO: no C++ compiler found; fine without CPU offload, which needs one on a GPU machine")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

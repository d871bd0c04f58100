"""A command for the supervisor that does what a file says, one line a start, and keeps a run's folder as train.py does.

    fake_run.py FOLDER PLAN

A line of PLAN holds words: `save N` commits a checkpoint of step N, `say TEXT` prints, `sleep S` sleeps,
`trap` reports a SIGTERM and goes on, `state NAME` reports a state, `exit N`, `kill` dies of SIGKILL. They are separated
by " ; ".
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minzero.checkpoint_names import name_of
from minzero.run_folder import RunFolder


def do(action, folder):
    word, _, rest = action.strip().partition(" ")
    if word == "save":
        path = folder.path / "checkpoints" / name_of(int(rest))
        path.mkdir(parents=True)
        (path / "state.json").write_text("{}")
    elif word == "say":
        print(rest, flush=True)
    elif word == "sleep":
        until = time.monotonic() + float(rest)
        while time.monotonic() < until and not (folder.path / "STOP").exists():
            time.sleep(0.05)
    elif word == "state":
        folder.written_at = -10
        folder.report(rest, 1, "a reason")
    elif word == "exit":
        folder.release()
        os._exit(int(rest))
    elif word == "trap":
        signal.signal(signal.SIGTERM, lambda *_: print("heard SIGTERM", flush=True))
    elif word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        raise ValueError(action)


def main(out, plan):
    with open(plan, "r+") as file:
        lines = file.read().splitlines()
        file.seek(0)
        file.truncate()
        file.write("\n".join(lines[1:]))
    folder = RunFolder(out, 0)
    folder.hold()
    for action in lines[0].split(" ; "):
        do(action, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])

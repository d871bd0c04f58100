"""train.py with a rank 1 that works half a second longer at each micro-batch, as on a slower machine."""

import os
import sys
import time

from tests.helpers.processes import ROOT

sys.path.insert(0, str(ROOT))
import train
from minzero.commands import run_command

to_device = train.to_device


def slow(*arguments):
    until = time.thread_time() + 0.5
    while os.environ["RANK"] == "1" and time.thread_time() < until:
        pass
    return to_device(*arguments)


train.to_device = slow
run_command(train.command, may_be_many=True)

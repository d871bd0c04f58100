"""For processes that make many engines: scripts that a test starts under the launcher, and the tests' own."""

import gc
import importlib

from minzero.commands import run_command


def run_ranks(main):
    """`run_command`, with quick collections of garbage."""
    importlib.import_module("torch._dynamo")  # as the first engine does
    collect_garbage()
    run_command(main, may_be_many=True)


def collect_garbage():
    """Collect garbage. What is left is kept for good, as imported modules are, and what DeepSpeed keeps of each engine:
    later collections do not look through it. Each engine of stage 3 and each run makes some, which took longer than all
    else in these small models."""
    gc.collect()
    gc.freeze()

"""How a script that a test starts under the launcher runs its main."""

import gc

import torch._dynamo  # noqa: F401, which the first engine imports, and which is not to be looked through either

from minzero.commands import run_command


def run_ranks(main):
    """`run_command` for scripts that make many engines in one process. Each engine of stage 3, and each run, collects
    garbage: that takes longer than all else in these small models if every collection looks through all that was
    imported."""
    gc.collect()
    gc.freeze()
    run_command(main, may_be_many=True)

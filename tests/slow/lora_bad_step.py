"""Started by test_lora_robust.py under the launcher: train.py with a NaN in the gradient of a block's output, on rank 1
alone, in step 7."""

from minzero.commands import run_command
from tests.launch import bad_steps

if __name__ == "__main__":
    bad_steps.poison_gradient({7}, accumulation=1)
    run_command(bad_steps.train.command, may_be_many=True)

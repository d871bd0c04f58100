"""Tiny Shakespeare in GPT-2's tokens: 1.1 MB of plays, for a first fine-tuning.

python data/shakespeare/prepare.py [--input input.txt]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minzero.data.scripts import PrepareScript, tiny_shakespeare

script = PrepareScript(__file__, __doc__, tiny_shakespeare, side=str, val_fraction=0.1)
main = script.main

if __name__ == "__main__":
    script.run()

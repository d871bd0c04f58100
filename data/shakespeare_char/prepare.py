"""Tiny Shakespeare letter by letter: a vocabulary of its 65 characters and the end of text.

python data/shakespeare_char/prepare.py [--input input.txt]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minzero.data.scripts import PrepareScript, learn_characters, tiny_shakespeare

script = PrepareScript(__file__, __doc__, tiny_shakespeare, learn_characters, side=str, val_fraction=0.1)
main = script.main

if __name__ == "__main__":
    script.run()

"""The source of Python's own standard library as training data: real text on every machine, no download.

python data/stdlib/prepare.py [--out data/stdlib] [--vocab_size 4096] [--val_fraction 0.05]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minzero.data.scripts import PrepareScript, learn_bpe, standard_library

script = PrepareScript(__file__, __doc__, standard_library, learn_bpe, vocab_size=4096)
main = script.main

if __name__ == "__main__":
    script.run()

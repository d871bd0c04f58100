"""The Python sources of this machine as training data: the standard library and the installed packages, no download.

python data/python/prepare.py [--out data/python] [--vocab_size 1024] [--val_fraction 0.05] [--input FOLDER ...]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minzero.data.scripts import PrepareScript, installed_python, learn_bpe

script = PrepareScript(__file__, __doc__, installed_python, learn_bpe, vocab_size=1024)
main = script.main

if __name__ == "__main__":
    script.run()

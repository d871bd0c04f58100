"""OpenWebText, the open copy of GPT-2's training text: 8 million web pages, 9 billion tokens.

python data/openwebtext/prepare.py [--input 'openwebtext/*.parquet'] [--workers 8]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minzero.data.scripts import PrepareScript, hub

script = PrepareScript(__file__, __doc__, hub("Skylion007/openwebtext"), val_fraction=0.0005)
main = script.main

if __name__ == "__main__":
    script.run()

"""FineWeb-Edu, web pages chosen for their educational value: a sample of 10 billion tokens.

python data/fineweb_edu/prepare.py [--input 'fineweb_edu/*.parquet'] [--streaming --limit 100000]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minzero.data.scripts import PrepareScript, hub

script = PrepareScript(__file__, __doc__, hub("HuggingFaceFW/fineweb-edu", "sample-10BT"), val_fraction=0.0005)
main = script.main

if __name__ == "__main__":
    script.run()

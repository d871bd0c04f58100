"""The Wikipedia in simple English, which FastLLM trains on: 240,000 articles, 50 million tokens.

python data/simplewiki/prepare.py [--input 'simplewiki/*.parquet']
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minzero.data.scripts import PrepareScript, hub

script = PrepareScript(__file__, __doc__, hub("wikimedia/wikipedia", "20231101.simple"), val_fraction=0.005)
main = script.main

if __name__ == "__main__":
    script.run()

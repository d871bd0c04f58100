"""OSCAR 2019, English, deduplicated: the web text min-LLM trains on.

python data/oscar/prepare.py --streaming --limit 10000000 [--input 'oscar/*.jsonl.zst' --column content]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minzero.data.scripts import PrepareScript, hub

script = PrepareScript(
    __file__,
    __doc__,
    hub("oscar-corpus/oscar", "unshuffled_deduplicated_en", revision="refs/convert/parquet"),
    val_fraction=0.0005,
)
main = script.main

if __name__ == "__main__":
    script.run()

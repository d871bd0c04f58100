"""Pairs of answers about Python's standard library, made of its docstrings: preference tuning without a download.

python data/stdlib/prepare.py            # the default of --tokenizer, and what its base model learns
python data/stdlib_preferences/prepare.py [--tokenizer models/Qwen2.5-0.5B] [--max_tokens 256]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minzero.data.scripts import PreferenceScript, docstring_pairs

script = PreferenceScript(__file__, __doc__, docstring_pairs, tokenizer="../stdlib/tokenizer", val_fraction=0.05)
main = script.main

if __name__ == "__main__":
    script.run()

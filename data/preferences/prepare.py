"""Pairs of answers, of which one is preferred, for preference tuning: UltraFeedback's, or your own.

python data/preferences/prepare.py --tokenizer tokenizers/simple
python data/preferences/prepare.py --input 'mine/*.jsonl' --out data/mine --tokenizer models/Qwen2.5-0.5B-Instruct

Rows are TRL's: prompt, chosen and rejected, as texts or messages (docs/chat.md). Take the tokenizer that the model was
trained with: answers are written in its chat template, where it has one.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minzero.data.scripts import PreferenceScript, hub

script = PreferenceScript(
    __file__,
    __doc__,
    hub("trl-lib/ultrafeedback_binarized", kind=dict),
    val_fraction=0.02,
)
main = script.main

if __name__ == "__main__":
    script.run()

"""Conversations for supervised fine-tuning, in which only the assistant's words are learned: lilLM's, or your own.

python data/chat/prepare.py --tokenizer tokenizers/simple
python data/chat/prepare.py --input 'mine/*.jsonl' --out data/mine --tokenizer models/Qwen2.5-0.5B

Rows are recognised as messages, ShareGPT, Alpaca or prompt and completion (docs/chat.md). Take the tokenizer that the
model was trained with: conversations are written in its chat template, where it has one.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minzero.data.scripts import ConversationScript, hub

script = ConversationScript(
    __file__,
    __doc__,
    hub("CohleM/lillm-sft-dataset-v1", kind=dict),
    column="conversation",
    val_fraction=0.02,
)
main = script.main

if __name__ == "__main__":
    script.run()

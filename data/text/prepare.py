"""Your own files: .txt, one document each, or .jsonl and .parquet, one a row; a glob of other files, as text.

python data/text/prepare.py --input 'books/**/*.txt' [--out data/books] [--tokenizer gpt2]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minzero.data.scripts import PrepareScript, local_files

script = PrepareScript(__file__, __doc__, local_files)
main = script.main

if __name__ == "__main__":
    script.run()

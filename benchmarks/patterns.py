"""What the pattern of a trained tokenizer costs: bytes per token on held-out documents, a pattern a row.

    python benchmarks/patterns.py [--input '../texts/*.txt'] [--vocab_size 4096 32768]

Code is Python's standard library; --input gives other text. Each tokenizer learns from 19 of 20 documents and is
measured on the 20th. Text files are cut into documents of 20,000 characters.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minzero.commands import run_command
from minzero.data.learn_tokenizer import bytes_per_token, train_tokenizer
from minzero.data.local_files import Files
from minzero.data.sources import StandardLibrary
from minzero.data.tokenizer import TiktokenTokenizer
from minzero.data.tokenizer_files import GPT2_PATTERNS, PATTERN

# The pattern of tokenizers trained here before: a punctuation mark joins the letters after it, and line ends the
# indentation after them.
OLD_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)|[^\s\p{L}\p{N}]?\p{L}+| ?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?|\s*[\r\n]+[ \t]*|\s+(?!\S)|\s+"
)
PATTERNS = {"Llama 3's": PATTERN, "GPT-2's": GPT2_PATTERNS[-1], "our former one": OLD_PATTERN}


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", help="text files, folders, quoted globs")
    parser.add_argument("--vocab_size", nargs="+", type=int, default=[4096, 32768])
    args = parser.parse_args(arguments)
    corpora = {"code": [text for _, text in StandardLibrary()]}
    if args.input:
        texts = [text for _, text in Files(args.input)]
        corpora["text"] = [text[start : start + 20_000] for text in texts for start in range(0, len(text), 20_000)]
    held_out = {name: texts[::20] for name, texts in corpora.items()}
    learned = [text for texts in corpora.values() for number, text in enumerate(texts) if number % 20]
    print(f"| ids | pattern | {' | '.join(f'bytes per token of {name}' for name in corpora)} |")
    print(f"|---|---|{'---|' * len(corpora)}")
    for vocab_size in args.vocab_size:
        for name, pattern in PATTERNS.items():
            ranks, special = train_tokenizer(learned, vocab_size, pattern=pattern)
            tokenizer = TiktokenTokenizer(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
            found = [f"{bytes_per_token(tokenizer, texts):.3f}" for texts in held_out.values()]
            print(f"| {vocab_size:,} | {name} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    run_command(main)

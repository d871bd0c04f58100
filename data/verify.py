"""Check token shards: sizes, headers, checksums, ids below the vocabulary, totals of meta.json.

python data/verify.py data/openwebtext [data/stdlib ...]

Prints one line a folder, or one for each fault, which names the file. Ends with code 0, or with 2 if there is a fault.
Shards without meta.json (nanoGPT's, llm.c's) have no checksums: of them sizes and headers are checked.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minzero.commands import begin

if __name__ == "__main__":
    begin()

from minzero.commands import run_command
from minzero.data.verify import verify_folder
from minzero.errors import UserError
from minzero.flags import FlagParser


def main(arguments):
    parser = FlagParser(__doc__)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folders of token shards")
    args = parser.parse_args(arguments)
    wrong = []
    for folder in args.folders:
        started = time.perf_counter()
        try:
            faults, words = verify_folder(folder)
        except UserError as error:
            faults = [str(error)]
        for fault in faults:
            print(fault, flush=True)
        if faults:
            wrong.append(folder)
        else:
            print(f"{folder}: ok, {words}, {time.perf_counter() - started:.1f} s", flush=True)
    if wrong:
        raise UserError(f"found faults in {', '.join(wrong)}; they are named above")


if __name__ == "__main__":
    run_command(main)

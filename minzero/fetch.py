"""The weights of a copy at an address of train.copy_to, for eval.py, sample.py and export.py: s3://bucket/run.

The model is opened from a temporary folder of this process, which has the form of a run's. Of the files of a rank only
headers and weights are fetched, a third of their bytes: the moments stay holes in files of the same size, and take no
room. All checksums of the weights are compared. TMPDIR says where the folder is made.
"""

import json
import sys
import tempfile
from pathlib import Path

from minzero.checkpoint_folder import Saved, find
from minzero.checkpoint_names import is_name, name_of, step_and_suffix
from minzero.checkpoint_state import read_state
from minzero.commands import is_first_rank
from minzero.errors import UserError
from minzero.store import CHECKPOINTS, SMALL_FILES, STATE, Store
from minzero.tensor_files import MOST_HEADER_BYTES, TensorFile, check_sums, damaged

PART = 1 << 26  # the most bytes of one request
GAP = 1 << 20  # bytes between two weights that are fetched along with them, because one more request takes longer
AT_ONCE = 8  # requests, where the file system has any at the same time

addresses = {}  # {folder of a checkpoint that was fetched: its address}
folders = []  # TemporaryDirectory of each fetch, deleted at the end of the process


def is_address(path):
    """Whether a path, as text, is an address of fsspec's, as s3://bucket/run."""
    return isinstance(path, str) and "://" in path


def in_words(checkpoint):
    """A checkpoint's address if it was fetched from one, else its path."""
    return addresses.get(checkpoint, str(checkpoint))


def fetch_checkpoint(address, which):
    """The folder of a checkpoint with the weights of a whole copy at an address: of a run, or of one of its
    checkpoints. Other ranks than 0 get no weights, for which they do not ask. which: best, latest or a step. A copy
    that is damaged is named, and the next best one taken, unless that step was asked for. Raises UserError."""
    store = Store(address, key="path")
    address, _, name = store.address.rpartition(f"/{CHECKPOINTS}/")
    if address and is_name(name):  # a checkpoint of the run
        return fetch_checkpoint(address, str(step_and_suffix(Path(name))[0]))
    if store.is_local:
        return fetched_from(store, find_copy(store, Path(store.root), which))
    states = {name: state for name, state in store.states().items() if is_name(name)}
    folders.append(tempfile.TemporaryDirectory(prefix="minzero_"))
    run = Path(folders[-1].name) / (store.address.rsplit("/", 1)[-1] or "run")
    for name, state in states.items():
        (run / CHECKPOINTS / name).mkdir(parents=True)
        (run / CHECKPOINTS / name / STATE).write_text(json.dumps(state))
    while True:
        found = find_copy(store, run, which)
        try:
            fetch(store, found)
        except OSError as error:
            remedy = "set TMPDIR to a folder with room for the weights"
            raise UserError(f"path: {store.address}: not fetched into {run} ({error.strerror}); {remedy}") from None
        except UserError as error:
            if which not in ("best", "latest"):
                raise
            print(f"ignored {store.address}/{CHECKPOINTS}/{found.name}: {error}", file=sys.stderr)
            (found / STATE).unlink()
            continue
        return fetched_from(store, found)


def fetched_from(store, checkpoint):
    addresses[checkpoint] = f"{store.address}/{CHECKPOINTS}/{checkpoint.name}"
    return checkpoint


def find_copy(store, run, which):
    """The copy that `which` means, among those of which state.json is in the folder `run`. Raises UserError."""
    if not Saved(run / CHECKPOINTS).entries:
        raise UserError(f"path: {store.address}: found no whole checkpoint there; expected what train.copy_to names")
    try:
        return find(run, which)
    except UserError as error:
        raise UserError(str(error).replace(str(run), f"path: {store.address}", 1)) from None


def fetch(store, checkpoint):
    """Fetch what opening the model needs into the folder of a checkpoint, which has its state.json. Raises UserError
    for a copy that is damaged or not whole, and OSError where it cannot be written."""
    state = read_state(checkpoint, look_at_files=False)
    if checkpoint.name != name_of(state["step"]):
        raise damaged(checkpoint / STATE, f"it is of step {state['step']}")
    for file in SMALL_FILES:  # of which export.py makes a model card
        if (content := store.read(file)) is not None:
            (checkpoint.parents[1] / file).write_bytes(content)
    needs_weights = is_first_rank() or "pieces" not in state  # of older code: all read the headers
    for file, entry in sorted(state["files"].items()):
        if "header_crc32" not in entry:  # of older code, whose checksum is of the whole file
            if missing := store.fetch(checkpoint.name, [file], checkpoint):
                raise UserError(missing)
            check_sums(checkpoint, {file: entry})
            continue
        with open(checkpoint / file, "wb") as out:
            out.truncate(entry["bytes"])
        if needs_weights:
            fetch_weights(store, checkpoint, file, entry)


def fetch_weights(store, checkpoint, file, entry):
    """Fetch the header and the weights of a file that is there as one hole, and compare their checksums."""
    size, path = entry["bytes"], (checkpoint.name, file)
    copy_ranges(store, checkpoint / file, path, [(0, min(8, size))])
    with open(checkpoint / file, "rb") as head:
        length = int.from_bytes(head.read(8), "little")
    copy_ranges(store, checkpoint / file, path, [(8, min(8 + length, size, MOST_HEADER_BYTES))])
    opened = TensorFile(checkpoint / file, entry)
    weights = [name for name in opened.tensors if name.startswith("fp32/")]
    ranges = []
    for dtype, offset, elements, _ in sorted((opened.tensors[name] for name in weights), key=lambda tensor: tensor[1]):
        begin = opened.first_byte + offset
        if ranges and begin - ranges[-1][1] <= GAP:
            begin = ranges.pop()[0]
        ranges.append((begin, opened.first_byte + offset + elements * dtype.itemsize))
    copy_ranges(store, checkpoint / file, path, ranges)
    for name in weights:
        opened.check(name)
    opened.file.close()


def copy_ranges(store, out, path, ranges):
    """Copy these ranges of bytes, [(begin, end)], of a file of a copy into the same places of the file `out`."""
    parts = [(at, min(at + PART, end)) for begin, end in ranges for at in range(begin, end, PART)]
    with open(out, "r+b") as file:
        for first in range(0, len(parts), AT_ONCE):
            some = parts[first : first + AT_ONCE]
            for (begin, _), content in zip(some, store.read_ranges(path, some), strict=True):
                file.seek(begin)
                file.write(content)

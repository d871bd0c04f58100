"""The files of tensors: written and read in parts, verified, and refused if they are damaged or crafted."""

import gc
import json
import os
import random
import resource
import zlib

import pytest
import torch
from safetensors.torch import load_file

from minzero import checkpoint, tensor_files
from minzero.checkpoint_state import read_state
from minzero.errors import UserError
from minzero.tensor_files import SavedPieces, check_sums, index_of, merged
from minzero.zero import KINDS
from tests.helpers.saved_checkpoints import (
    TENSORS,
    WHOLE,
    deep,
    make,
    many_files,
    no_reader_may_hang,  # noqa: F401, a fixture for every test here
    save,
    state_of,
    write_state,
)
from tests.helpers.trained_runs import write_file


def test_what_is_written_is_safetensors(tmp_path):
    entry = write_file(tmp_path / "a.safetensors", TENSORS)
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == TENSORS.keys() and all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)
    assert entry["bytes"] == (tmp_path / "a.safetensors").stat().st_size
    check_sums(tmp_path, {"a.safetensors": entry})


def test_pieces_are_cut_and_joined_wherever_they_begin(tmp_path):
    """Files of two ranks, 6 and 4 elements, read by any number of ranks."""
    folder = make(tmp_path, 5)
    saved = SavedPieces(folder, read_state(folder))
    for start in range(10):
        for end in range(start + 1, 11):
            piece = torch.zeros(end - start)
            saved.copy_overlap(piece, start, "fp32", "a.weight")
            assert piece.tolist() == list(range(start, end))
    saved.index["a.weight"] = [[1, 6, 4, 4]]  # as if the first file held none of it
    with pytest.raises(UserError, match=r"a\.weight: found 4 of 6 elements; the checkpoint is damaged"):
        saved.copy_overlap(torch.zeros(6), 4, "fp32", "a.weight")


@pytest.fixture
def counted(monkeypatch):
    """{"files": names of those opened, one each time; "bytes": read of them} from here on."""
    seen = {"files": [], "bytes": 0}
    opener, read_into = tensor_files.open_plain_file, tensor_files.TensorFile.read_into

    def open_plain_file(path):
        seen["files"].append(path.name)
        return opener(path)

    def count(self, offset, out):
        seen["bytes"] += len(memoryview(out))
        read_into(self, offset, out)

    monkeypatch.setattr(tensor_files, "open_plain_file", open_plain_file)
    monkeypatch.setattr(tensor_files.TensorFile, "read_into", count)
    return seen


@pytest.mark.parametrize("ranks", [64, 48, 32, 128])
def test_a_rank_opens_only_the_files_that_hold_its_pieces(tmp_path, counted, ranks):
    """A checkpoint of 64 ranks resumed on as many, on fewer and on more: the files opened by each."""
    folder = many_files(tmp_path, 64)
    state = read_state(folder)
    for rank in range(ranks):
        counted["files"].clear()
        saved = SavedPieces(folder, state)
        each = -(-640 // ranks)
        own = range(min(640, rank * each), min(640, (rank + 1) * each))
        for name in "abc" if own else "":
            for kind in KINDS:
                part = torch.zeros(len(own))
                saved.copy_overlap(part, own.start, kind, name)
                assert part.tolist() == list(own)
        needed = sorted({f"rank_{element // 10:05d}.safetensors" for element in own})
        assert sorted(counted["files"]) == needed, "each once"
    assert len(state["pieces"]["a"]) == 1, "the index does not grow with the ranks"


def test_files_open_at_a_time_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "MOST_OPEN_FILES", 5)
    saved = SavedPieces(folder := many_files(tmp_path, 64), read_state(folder))
    whole = torch.zeros(640)
    before = len(os.listdir("/proc/self/fd"))
    saved.copy_overlap(whole, 0, "fp32", "b")
    assert whole.tolist() == list(range(640)) and len(os.listdir("/proc/self/fd")) <= before + 5


def test_files_need_not_be_opened_twice_where_the_system_may_allow_more(tmp_path, counted):
    folder = many_files(tmp_path, 64)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        _, _, read = checkpoint.open_weights(folder)
        for name in "abc":
            assert read(name).tolist() == list(range(640))
        del read, _
    finally:
        gc.collect()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(counted["files"]) == 64


def random_pieces(generator, ranks):
    """[(parameter, first element, elements)] of each rank: of "whole" as at stage 3, of "cut" anywhere, of "once" in
    one file, of "padded" with nothing in the last ones."""
    cuts = sorted(generator.sample(range(1, 1000), ranks - 1))
    cut = list(zip([0, *cuts], [*cuts, 1000], strict=True))
    one = generator.randrange(ranks)
    each = generator.randrange(1, 9)
    padded = [(rank * each, min(each, 100 - rank * each)) for rank in range(ranks)]
    return [
        [("whole", rank * 7, 7), ("cut", cut[rank][0], cut[rank][1] - cut[rank][0])]
        + [("once", 0, 50)] * (rank == one)
        + [("padded", *padded[rank])] * (padded[rank][1] > 0)
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("ranks", [2, 3, 8, 13, 64, 100])
def test_an_index_that_is_merged_says_the_same(ranks):
    """As along the tree of `dist.merge_on_rank_0`."""
    generator = random.Random(ranks)
    for _ in range(20):
        pieces = random_pieces(generator, ranks)
        values = [({f"rank_{rank:05d}": rank}, index_of([own])) for rank, own in enumerate(pieces)]
        while len(values) > 1:
            pairs = [values[place : place + 2] for place in range(0, len(values), 2)]
            values = [merged(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
        files, index = values[0]
        assert list(files.values()) == list(range(ranks))
        found = {(name, at, size): file for file, own in enumerate(pieces) for name, at, size in own}
        named = {}
        for name, rows in index.items():
            for file, first, each, total in rows:
                for place, at in enumerate(range(first, first + total, each)):
                    named[name, at, min(each, first + total - at)] = file + place
        assert named == found
        at_once = index_of(pieces)
        assert all(index[name] == at_once[name] for name in ("whole", "once", "padded") if name in index)
        assert len(index["cut"]) <= ranks and index.keys() == at_once.keys()


def test_weights_are_read_and_checked_without_the_moments(tmp_path, counted):
    folder = many_files(tmp_path, 4, elements=100_000)
    _, _, read = checkpoint.open_weights(folder)
    for name in "abc":
        assert read(name).tolist() == list(range(100_000))
    assert sorted(counted["files"]) == sorted(path.name for path in folder.glob("rank_*")), "each once"
    weights = 3 * 100_000 * 4
    assert weights < counted["bytes"] < weights + 4 * 4096, "the weights and the headers"


@pytest.mark.parametrize(("kind", "stops"), [("fp32", True), ("exp_avg", False), ("exp_avg_sq", False)])
def test_a_flipped_bit_is_found_by_whoever_reads_it(tmp_path, kind, stops):
    folder = many_files(tmp_path, 4)
    file = folder / "rank_00002.safetensors"
    header = json.loads(file.read_bytes()[8 : 8 + (size := int.from_bytes(file.read_bytes()[:8], "little"))])
    content = bytearray(file.read_bytes())
    content[8 + size + header[f"{kind}/b/320"]["data_offsets"][0] + 5] ^= 1
    file.write_bytes(content)
    state, _, read = checkpoint.open_weights(folder)
    assert read("a").tolist() == list(range(640))
    if stops:
        with pytest.raises(
            UserError, match=r"rank_00002.safetensors: fp32/b/320: found checksum \w+, expected \w+; the"
        ):
            read("b")
    else:
        assert read("b").tolist() == list(range(640))
    with pytest.raises(UserError, match=f"rank_00002.safetensors: {kind}/b/320: found checksum"):
        check_sums(folder, state["files"])


def header_of(change):
    """A header of two tensors of 10 elements, changed."""
    whole = {
        f"{kind}/a.weight/0": {"dtype": "F32", "shape": [10], "data_offsets": [40 * number, 40 * number + 40]}
        for number, kind in enumerate(("fp32", "exp_avg"))
    }
    whole["__metadata__"] = {"crc32": " ".join([f"{zlib.crc32(bytes(40)):08x}"] * 2)}
    return change(whole)


FIRST = "fp32/a.weight/0"


HEADERS = [
    lambda header: header | {FIRST: header[FIRST] | {"data_offsets": [-40, 0]}},
    lambda header: header | {FIRST: header[FIRST] | {"data_offsets": [0, 2**60], "shape": [2**58]}},
    lambda header: header | {FIRST: header[FIRST] | {"data_offsets": [40, 80]}},
    lambda header: header | {FIRST: header[FIRST] | {"data_offsets": [0, 40.0]}},
    lambda header: header | {FIRST: header[FIRST] | {"data_offsets": 7}},
    lambda header: header | {FIRST: header[FIRST] | {"shape": [2, 5]}},
    lambda header: header | {FIRST: header[FIRST] | {"shape": [-10]}},
    lambda header: header | {FIRST: header[FIRST] | {"shape": [9]}},
    lambda header: header | {FIRST: header[FIRST] | {"dtype": "F64"}},
    lambda header: header | {FIRST: header[FIRST] | {"dtype": "BF16", "shape": [20]}},
    lambda header: header | {FIRST: 5},
    lambda header: {"fp32": header[FIRST]} | {name: header[name] for name in header if name != FIRST},
    lambda header: {"fp32/a/x": header[FIRST]} | {name: header[name] for name in header if name != FIRST},
    lambda header: {"code/a/0": header[FIRST]} | {name: header[name] for name in header if name != FIRST},
    lambda header: {name: header[name] for name in header if name != FIRST},
    lambda header: header | {"__metadata__": 5},
    lambda header: header | {"__metadata__": {"crc32": "00000000"}},
    lambda header: header | {"__metadata__": {}},
    lambda header: [],
    lambda header: deep(400),
]


@pytest.mark.parametrize("change", HEADERS)
@pytest.mark.parametrize("older_code", [False, True])
def test_a_crafted_header_is_refused(tmp_path, change, older_code):
    folder = save(tmp_path, 5)
    file = folder / "rank_00000.safetensors"
    text = json.dumps(header_of(change)).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(80)
    file.write_bytes(content)
    entry = {"header_crc32": f"{zlib.crc32(content[:-80]):08x}"}
    if older_code:
        entry = {"crc32": f"{zlib.crc32(content):08x}"}
        if header_of(change) and header_of(change).get("__metadata__") == {}:
            pytest.skip("right in older code")
    state = state_of(5, {file.name: {"bytes": len(content)} | entry})
    write_state(folder, state)
    with pytest.raises(UserError, match=r"rank_00000.safetensors: its header [^\n]+$"):
        checkpoint.open_weights(folder)


@pytest.mark.parametrize("length", [0, 2**62, 2**64 - 1, 10**9])
def test_a_header_of_an_absurd_size_is_refused(tmp_path, length):
    folder = save(tmp_path, 5)
    file = folder / "rank_00000.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + bytes(100))
    state = state_of(5, {file.name: {"bytes": 108, "header_crc32": "00000000"}})
    write_state(folder, state)
    with pytest.raises(UserError, match=r"rank_00000.safetensors: found (a header|checksum) [^\n]+$"):
        checkpoint.open_weights(folder)


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_number_that_is_not_finite_is_never_written(tmp_path, kind, spoilt):
    name = f"{kind}/a.weight/0"
    tensors = WHOLE | {name: WHOLE[name].clone()}
    tensors[name][7] = spoilt
    with pytest.raises(UserError, match=f"^{kind} of a.weight holds a NaN or an infinity$"):
        write_file(tmp_path / "a.safetensors", tensors)

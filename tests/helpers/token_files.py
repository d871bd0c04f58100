"""Token files as other programs write them, byte by byte, and what their conversion must give."""

import struct

import numpy as np

from minzero.data.pipeline import split_of

END = 256  # of the tokenizer `bytes`
DOCUMENTS = [list(f"The document of number {i}, with {i * i} in it.".encode()) for i in range(300)]
CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}


def index_of(dtype, lengths, indices, version=1, magic=b"MMIDIDX\0\0", code=None, pointers=None):
    """The bytes of an .idx of Megatron's."""
    size = np.dtype(dtype).itemsize
    pointers = [size * sum(lengths[:i]) for i in range(len(lengths))] if pointers is None else pointers
    content = magic + struct.pack("<QBQQ", version, code or CODES[dtype], len(lengths), len(indices))
    content += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(pointers)}q", *pointers)
    return content + struct.pack(f"<{len(indices)}q", *indices)


def write_megatron(prefix, documents, dtype="uint16", **index):
    """A data set of documents, each a list of ids, or of lists: its sequences."""
    documents = [document if document and isinstance(document[0], list) else [document] for document in documents]
    sequences = [sequence for document in documents for sequence in document]
    indices = [0, *np.cumsum([len(document) for document in documents]).tolist()]
    prefix.parent.mkdir(exist_ok=True)
    ids = [token for sequence in sequences for token in sequence]
    (prefix.parent / f"{prefix.name}.bin").write_bytes(np.array(ids, dtype).tobytes())
    content = index_of(dtype, [len(sequence) for sequence in sequences], indices, **index)
    (prefix.parent / f"{prefix.name}.idx").write_bytes(content)
    return prefix


def write_ids(path, ids, dtype="uint16"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(np.array(ids, dtype).tobytes())
    return path


def ids_of(folder, split):
    """All ids of a split, read from its shards: the header of 1,024 bytes is skipped."""
    parts = []
    for path in sorted(folder.glob(f"{split}_*.bin")):
        magic, _, tokens = struct.unpack("<3i", path.read_bytes()[:12])
        parts.append(np.frombuffer(path.read_bytes()[1024:], "<u2" if magic == 20240520 else "<u4"))
        assert len(parts[-1]) == tokens
    return [token for part in parts for token in part.tolist()]


def expected(documents, name, fraction):
    """{split: ids}: each document ends with an end of text, and a hash of its number says where it goes."""
    found = {"train": [], "val": []}
    for number, document in enumerate(documents):
        found[split_of(f"{name} {number}", fraction)] += document
    return found


def ended(document):
    """The document with an end of text, if it has none at either end."""
    return document if not document or END in (document[0], document[-1]) else [*document, END]

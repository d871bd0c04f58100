"""Token files as other programs write them, byte by byte."""

import struct

import numpy as np

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

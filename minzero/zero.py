"""The pieces of the parameters: which of them this rank owns, at any ZeRO stage, and how they lie in a file.

This is the one place that knows how DeepSpeed 0.19.8 lays out weights and optimizer states.
"""

import contextlib
import json
import math
import os
import re
import resource
import zlib
from collections import defaultdict
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

import torch
from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses
from torch import distributed

from minzero.config import UserError
from minzero.data.shards import open_regular

KINDS = ("exp_avg", "exp_avg_sq", "fp32")  # what is saved of each element: two moments of Adam, and the weight
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
ALLOWED = {"random": ("U8",), "fp32": ("F32",)} | dict.fromkeys(KINDS[:2], ("F32", "BF16", "F16"))
MOST_HEADER_BYTES = 100_000_000  # as the safetensors library has it
MOST_OPEN_FILES = 512
CHUNK = 1 << 22  # bytes that are read at a time where only their checksum is wanted


# -- in the engine ---------------------------------------------------------------------------------


def stage_0_masters(engine):
    """Stage 0: {id of a parameter: the tensor that the optimizer updates}, in 16 bits a float32 copy."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_groups"):
        return {id(parameter): parameter for parameter in engine.module.parameters()}
    pairs = zip(chain(*optimizer.fp16_groups), chain(*optimizer.fp32_groups), strict=True)
    return {id(parameter): master for parameter, master in pairs}


def torch_linear():
    """Take DeepSpeed's linear function back out of torch, where an engine of this process has put it."""
    if hasattr(InsertPostInitMethodToModuleSubClasses, "linear_bk"):
        torch.nn.functional.linear = InsertPostInitMethodToModuleSubClasses.linear_bk


def optimizers(engine):
    """The engine's optimizers: in partial offload (offload_optimizer.ratio below 1) the CPU's, and one that DeepSpeed
    makes for the tensors that stay on the GPU, and does not tell of another learning rate."""
    on_gpu = getattr(engine.optimizer, "backup_optimizer", None)
    return [engine.basic_optimizer] + ([on_gpu] if on_gpu else [])


def optimizer_of(engine, group):
    """The one of `optimizers` that updates this group of parameters, by its number (stage 3: sub-group)."""
    on_cpu, *on_gpu = optimizers(engine)
    return on_gpu[0] if on_gpu and engine.optimizer.subgroup_to_device[group] != "cpu" else on_cpu


def adam_state(optimizer, flat):
    """Adam's state of one tensor, made if the first step has not made it yet; `step` is each tensor's own."""
    state = optimizer.state[flat]
    if not state:
        torch_adam = isinstance(optimizer, torch.optim.AdamW)  # DeepSpeed's counts in a plain number
        device = flat.device if optimizer.defaults.get("fused") else "cpu"
        state["step"] = torch.zeros((), device=device) if torch_adam else 0
        state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(flat, requires_grad=False) for _ in range(2))
    return state


class Piece(NamedTuple):
    """Elements [start, start + length) of a parameter, which are [offset, offset + length) of a tensor that this
    rank's optimizer updates, that of the group of this number."""

    parameter: str
    start: int
    length: int
    flat: torch.Tensor
    offset: int
    group: int


def fragments(engine):
    """Stages 1 and 2: {id of a parameter: (group, the tensor that the optimizer updates, first element of the
    parameter in it, where that lies in the tensor, number of elements)}, of the parameters that this rank updates a
    part of. The parameters of a group lie in a row, which is cut into equal parts, one a rank. Read from the row
    itself: a parameter's own `_hp_mapping` is wrong with round_robin_gradients, which orders the row differently."""
    zero, found = engine.optimizer, {}
    groups = zip(zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, zero.partition_size, strict=True)
    for group, (parameters, offsets, length) in enumerate(groups):
        flat, begin = zero.single_partition_of_fp32_groups[group], distributed.get_rank() * length
        for parameter, offset in zip(parameters, offsets, strict=True):
            first, end = max(offset, begin), min(offset + parameter.numel(), begin + length)
            if first < end:
                found[id(parameter)] = group, flat, first - offset, first - begin, end - first
    return found


def own_layout(engine):
    """The Pieces that this rank updates, those of one tensor of the optimizer one after the other. At stage 0
    every rank updates everything."""
    stage, zero, found = engine.zero_optimization_stage(), engine.optimizer, []
    masters = stage_0_masters(engine) if stage == 0 else None
    rows = fragments(engine) if stage in (1, 2) else None
    for name, parameter in engine.module.named_parameters():
        group = 0
        if stage == 0:
            flat, start, offset = masters[id(parameter)], 0, 0
            length = elements = parameter.numel()
        elif stage == 3:  # every parameter is cut into equal parts, the last one padded
            group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
            flat, elements = zero.fp32_partitioned_groups_flat[group], parameter.ds_numel
            start = distributed.get_rank() * length
        elif id(parameter) not in rows:
            continue  # no part of this one is ours
        else:
            group, flat, start, offset, length = rows[id(parameter)]
            elements = parameter.numel()
        length = min(length, elements - start)
        if length > 0:
            found.append(Piece(name, start, length, flat, offset, group))
    return sorted(found, key=lambda piece: piece.group)


def nvme_swapper(engine, flat):
    """DeepSpeed's swapper, if the optimizer keeps this tensor and its moments on NVMe, else None."""
    swapper = getattr(engine.optimizer, "optimizer_swapper", None)
    return swapper if swapper and flat.ds_id in swapper.swap_params_info else None


@contextlib.contextmanager
def in_memory(engine, flat, group, changed):
    """Inside, a tensor of the optimizer, that of a group, and its moments are in memory, wherever they are kept.
    changed: they will have been written to. Gives Adam's state."""
    swapper = nvme_swapper(engine, flat)
    if swapper is None:
        yield adam_state(optimizer_of(engine, group), flat)
        return
    swapper.swap_in_optimizer_state(flat, async_parameter=None)
    new = not engine.basic_optimizer.state[flat]
    yield adam_state(engine.basic_optimizer, flat)
    if changed or new:
        swapper.writeback_optimizer_state_and_gradients(flat, write_opt_state=True, write_gradients=False)
    else:
        swapper.release_swap_buffers(flat)
    flat.grad = None  # which was swapped in as well, and belongs to a step that is done


def pieces_in_memory(engine, layout, changed=False):
    """Yield (Piece, {"fp32", "exp_avg", "exp_avg_sq": flat tensor}, Adam's state) for each piece of a layout. The
    tensors are views, good until the next is asked for: read them to save, copy into them (`changed`) to load."""
    for _, pieces in groupby(layout, key=lambda piece: id(piece.flat)):
        pieces = list(pieces)
        flat = pieces[0].flat
        with in_memory(engine, flat, pieces[0].group, changed) as state:
            whole = {"fp32": flat.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            for piece in pieces:
                part = slice(piece.offset, piece.offset + piece.length)
                yield piece, {kind: tensor.view(-1)[part] for kind, tensor in whole.items()}, state


def optimizer_steps(engine):
    """How many steps the optimizer has made, which each of its tensors counts by itself."""
    states = (optimizer_of(engine, piece.group).state[piece.flat] for piece in own_layout(engine))
    steps = {int(state["step"]) if state else 0 for state in states}
    assert len(steps) == 1, f"the parts of the optimizer disagree on the number of steps: {steps}"
    return steps.pop()


def refresh_weights(engine):
    """Give the weights of the forward pass the values of the float32 ones that the optimizer keeps."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        zero.checkpoint_event_prologue()
        for group, flat in enumerate(zero.fp32_partitioned_groups_flat):
            with in_memory(engine, flat, group, changed=False):
                zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()  # small parameters are kept whole on every rank
    elif stage:
        zero.update_lp_params()
    else:
        masters = stage_0_masters(engine)
        for parameter in engine.module.parameters():
            parameter.data.copy_(masters[id(parameter)].data)


def forget_powers(optimizer):
    """DeepSpeed's CPU Adam multiplies beta^t up from step to step, but computes it again after a checkpoint: one
    rounding apart. Called before every step, this makes it compute it again always: it updates one
    element that nobody needs, as a step that is never the one before the true one."""
    if hasattr(optimizer, "ds_opt_adam"):
        group, far_away = optimizer.param_groups[0], 1 << 30
        nothing = [torch.zeros(1) for _ in range(4)]  # weight, gradient, both moments
        settings = (group["lr"], *group["betas"], group["eps"], group["weight_decay"], group["bias_correction"])
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, far_away, *settings, *nothing)


def all_finite(tensor):
    """Whether a tensor of floats holds neither a NaN nor an infinity, in one pass and without a copy: its smallest and
    largest element are NaN where any is. (torch.isfinite makes tensors of its own, and takes many times as long.)"""
    return not tensor.numel() or all(math.isfinite(value) for value in map(float, torch.aminmax(tensor)))


def first_not_finite(engine, progress=lambda: None):
    """The kind and parameter of a piece of this rank that holds a NaN or an infinity, in words, or None. progress:
    called for each piece."""
    for piece, parts, _ in pieces_in_memory(engine, own_layout(engine)):
        progress()
        for kind, part in parts.items():
            if not all_finite(part):
                return f"{kind} of {piece.parameter}"
    return None


def loss_scaler(engine):
    """The object that holds fp16's loss scale, under the name that the ZeRO stages or stage 0 give it."""
    return getattr(engine.optimizer, "loss_scaler", None) or getattr(engine.optimizer, "loss_scale_config", None)


def own_tensors(engine):
    """What this rank writes, its pieces and the state of its random numbers: {name: (dtype, number of elements)},
    and an iterator of the tensors in this order, each good until the next is asked for."""
    layout = own_layout(engine)
    if engine.zero_optimization_stage() == 0:  # what all hold, one of them writes
        layout = layout[distributed.get_rank() :: distributed.get_world_size()]
    random = {"random/cpu/0": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["random/cuda/0"] = torch.cuda.get_rng_state()
    header = {name: (state.dtype, len(state)) for name, state in random.items()}
    header |= {f"{kind}/{p.parameter}/{p.start}": (torch.float32, p.length) for p in layout for kind in KINDS}
    pieces = (parts[kind] for _, parts, _ in pieces_in_memory(engine, layout) for kind in KINDS)
    return header, chain(random.values(), pieces)


def only_on_nvme(engine):
    """Whether there may be no room in memory for all that `own_tensors` gives."""
    swapper = getattr(engine.optimizer, "optimizer_swapper", None)
    return bool(swapper and swapper.swap_params_info)


# -- in files --------------------------------------------------------------------------------------


def damaged(path, what):
    return UserError(f"{path}: {what}; the checkpoint is damaged, use an older one")


def write_tensors(path, sizes, tensors):
    """Write a safetensors file (8 bytes of length, a JSON header, the bytes of the tensors), one tensor after the
    other: no second copy of them all is ever in memory. sizes: {name: (dtype, number of elements)} of the flat
    tensors, in their order. The header holds the checksum of each tensor, so that a reader can check what it reads
    and nothing else.

    Returns the file's size and the checksum of its header. Raises OSError, and UserError for a tensor that holds a
    NaN or an infinity."""
    header = {"__metadata__": {"crc32": " ".join(["00000000"] * len(sizes))}}
    end, sums = 0, []
    for name, (dtype, elements) in sizes.items():
        begin, end = end, end + elements * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": [elements], "data_offsets": [begin, end]}
    text = header_bytes(header)
    with open(path, "wb") as file:
        file.write(text)
        for name, tensor in zip(sizes, tensors, strict=True):
            tensor = tensor.cpu()
            if tensor.is_floating_point() and not all_finite(tensor):
                kind, parameter, _ = name.split("/")
                raise UserError(f"{kind} of {parameter} holds a NaN or an infinity")
            content = tensor.view(torch.uint8).numpy().data
            sums.append(f"{zlib.crc32(content):08x}")
            file.write(content)
        assert file.tell() == len(text) + end, "a tensor was not as long as its header says"
        header["__metadata__"]["crc32"] = " ".join(sums)  # as long as the zeros that stood there
        text = header_bytes(header)
        file.seek(0)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(text) + end, "header_crc32": f"{zlib.crc32(text):08x}"}


def header_bytes(header):
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def open_plain_file(path):
    """Open a file for reading, unbuffered, if it is a plain file: no link, and nothing that could block or have no
    end, as a pipe or a device. Raises OSError."""
    return os.fdopen(open_regular(path, links=False), "rb", buffering=0)


class TensorFile:
    """A rank's file of a checkpoint, open for reading parts of its flat tensors. Read with pread, not through a memory
    map: a map of a file that is cut short kills the process without a word.

    entry: what state.json says of the file. Trusts nothing in it: raises UserError unless the header is the one that
    was written and describes flat tensors of known kinds that fill the file without gaps."""

    def __init__(self, path, entry):
        self.path = path
        try:
            self.file = open_plain_file(path)
            size = os.fstat(self.file.fileno()).st_size
        except FileNotFoundError:
            raise damaged(path, f"no such file, expected {entry['bytes']} bytes") from None
        except OSError as error:
            raise damaged(path, error.strerror) from None
        if size != entry["bytes"]:
            raise damaged(path, f"{size} bytes, expected {entry['bytes']} bytes")
        length = int.from_bytes(self.read_bytes(0, min(8, size)), "little")
        if size < 8 or length > min(size - 8, MOST_HEADER_BYTES):
            raise damaged(path, f"found a header of {length} bytes in a file of {size}")
        text = self.read_bytes(0, 8 + length)
        expected = entry.get("header_crc32")  # missing where state.json was written by older code
        if expected and f"{zlib.crc32(text):08x}" != expected:
            raise damaged(path, f"found checksum {zlib.crc32(text):08x} of its header, expected {expected}")
        try:
            self.tensors = layout_of(json.loads(text[8:]), size - 8 - length)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise damaged(path, "its header does not describe flat tensors that fill the file") from None
        self.first_byte = 8 + length
        if expected and not all(check for *_, check in self.tensors.values()):
            raise damaged(path, "its header holds no checksums")

    def elements(self):
        """{name: number of elements} of its tensors."""
        return {name: elements for name, (_, _, elements, _) in self.tensors.items()}

    def read_into(self, offset, out):
        """Fill a writable buffer of bytes from this place in the file on."""
        out, done = memoryview(out), 0
        while done < len(out):
            try:
                count = os.preadv(self.file.fileno(), [out[done : done + (1 << 30)]], offset + done)
            except OSError as error:
                raise damaged(self.path, error.strerror) from None
            if not count:
                raise damaged(self.path, "was cut short while it was read")
            done += count

    def read_bytes(self, offset, length):
        out = bytearray(length)
        self.read_into(offset, out)
        return bytes(out)

    def read(self, name, start, stop, elements=None, verify=False):
        """Elements [start, stop) of a tensor, which has this many elements. verify: check its checksum."""
        dtype, begin, length, expected = self.tensors.get(name, (None, 0, -1, None))
        if length != (length if elements is None else elements) or not 0 <= start <= stop <= length:
            found = f"{length} elements" if dtype else "nothing"
            raise damaged(self.path, f"found {found} of {name}, expected {elements or stop} elements")
        out = torch.empty(stop - start, dtype=dtype)
        content = out.view(torch.uint8).numpy().data
        self.read_into(self.first_byte + begin + start * dtype.itemsize, content)
        if verify and expected and (start, stop) == (0, length):
            self.compare(name, zlib.crc32(content), expected)
        elif verify and expected:
            self.check(name)
        return out

    def check(self, name, progress=lambda: None):
        """Read a whole tensor, a little at a time, and compare its checksum. progress: called for each part that is
        read. Raises UserError."""
        dtype, begin, length, expected = self.tensors[name]
        place, left = self.first_byte + begin, length * dtype.itemsize
        found, chunk = 0, bytearray(CHUNK)
        while left:
            progress()
            part = memoryview(chunk)[: min(left, CHUNK)]
            self.read_into(place, part)
            found = zlib.crc32(part, found)
            place, left = place + len(part), left - len(part)
        self.compare(name, found, expected)

    def checksum(self, progress=lambda: None):
        """Of the whole file, as older code recorded it. progress: called for each part that is read."""
        size, found = os.fstat(self.file.fileno()).st_size, 0
        for place in range(0, size, CHUNK):
            progress()
            found = zlib.crc32(self.read_bytes(place, min(CHUNK, size - place)), found)
        return f"{found:08x}"

    def compare(self, name, found, expected):
        if f"{found:08x}" != expected:
            raise damaged(self.path, f"{name}: found checksum {found:08x}, expected {expected}")


def layout_of(header, data_bytes):
    """The header of a safetensors file, read as JSON -> {name: (dtype, first byte of the data, number of elements,
    checksum or None)}. Raises ValueError and the like if it is no header of ours, or its tensors are not flat, of
    other types, overlap or leave gaps."""
    dtypes, found, end = {name: dtype for dtype, name in DTYPES.items()}, {}, 0
    sums = header.pop("__metadata__", {}).get("crc32", "").split()
    sums = sums or [None] * len(header)
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    for (name, entry), check in zip(entries, sums, strict=True):
        kind, _, first = name.split("/")
        (elements,), (begin, stop) = entry["shape"], entry["data_offsets"]
        dtype = dtypes[entry["dtype"]]
        numbers = all(type(number) is int for number in (elements, begin, stop))
        right = numbers and elements >= 0 and begin == end and stop - begin == elements * dtype.itemsize
        if not right or entry["dtype"] not in ALLOWED[kind] or not re.fullmatch("[0-9]{1,18}", first):
            raise ValueError(name)
        found[name], end = (dtype, begin, elements, check), stop
    if end != data_bytes:
        raise ValueError(end)
    return found


def index_of(pieces):
    """Which file holds which elements of which parameter: {parameter: [[file, first element, elements in a file,
    elements in all], ...]}, each entry a row of files from this number on that hold equally many elements, the
    last one perhaps fewer. pieces: for each file, in the order of their names, its [(parameter, first element,
    elements)]. Small however many ranks there are: at stage 3 one entry a parameter."""
    found, index = defaultdict(list), {}
    for number, own in enumerate(pieces):
        for parameter, start, length in own:
            found[parameter].append((start, length, number))
    for parameter, parts in found.items():
        rows = index[parameter] = []
        for start, length, number in sorted(parts):
            if rows:
                file, first, each, total = rows[-1]
                follows = start == first + total and number == file + total // each
                if follows and total % each == 0 and length <= each:
                    rows[-1][3] += length
                    continue
            rows.append([number, start, length, length])
    return index


def fault_of_index(index, elements, files):
    """What is wrong with what `index_of` made, in words, or None. elements: {parameter: how many it has}; files: how
    many there are."""
    for parameter, rows in index.items():
        end, right = 0, parameter in elements and isinstance(rows, list)
        for row in rows if right else []:
            right = isinstance(row, list) and len(row) == 4 and all(type(number) is int for number in row)
            if not right:
                break
            file, first, each, total = row
            right = file >= 0 and first >= end and total > 0 and each > 0 and file - (-total // each) <= files
            end = first + total
            if not right or end > elements[parameter]:
                right = False
                break
        if not right:
            return f"pieces: {str(parameter)[:100]}: found {str(rows)[:100]}, expected parts of it in {files} files"
    return None


class SavedPieces:
    """The pieces of the parameters in a checkpoint's files. Opens only those files that hold what it is asked for, and
    at most MOST_OPEN_FILES at a time. state: of `checkpoint.read_state`. verify: check all that is read."""

    def __init__(self, path, state, verify=False):
        self.path, self.entries, self.verify = Path(path), state["files"], verify
        self.names = sorted(state["files"])
        self.open = {}  # {number of a file: TensorFile}, the last used last
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.most = MOST_OPEN_FILES if soft == resource.RLIM_INFINITY else max(1, min(MOST_OPEN_FILES, soft // 2))
        self.index = state.get("pieces")
        if self.index is None:  # saved by older code
            files = (TensorFile(self.path / name, self.entries[name]) for name in self.names)
            self.index = index_of(pieces_in(file.elements()) for file in files)
            elements = {name: math.prod(shape) for name, shape in state["parameters"].items()}
            if fault := fault_of_index(self.index, elements, len(self.names)):
                raise damaged(self.path, fault)

    def file(self, number):
        if number not in self.open:
            if len(self.open) == self.most:
                self.open.pop(next(iter(self.open))).file.close()
            name = self.names[number]
            self.open[number] = TensorFile(self.path / name, self.entries[name])
        else:
            self.open[number] = self.open.pop(number)  # the last used comes last
        return self.open[number]

    def hold(self):
        """Open as many of the files as may be: what is open can be read even when a run deletes the checkpoint."""
        for number in range(min(len(self.names), self.most)):
            self.file(number)

    def fill(self, tensor, start, kind, parameter):
        """Copy elements [start, start + len(tensor)) of a parameter into a flat tensor, from whatever files hold
        them. Raises UserError if there are too few of them, or they are damaged."""
        end, filled = start + len(tensor), 0
        for number, first, each, total in self.index.get(parameter, ()):
            low, high = max(start, first), min(end, first + total)
            for place in range((low - first) // each, -((first - high) // each)) if low < high else ():
                at = first + place * each
                length = min(each, first + total - at)
                begin, stop = max(low, at), min(high, at + length)
                name = f"{kind}/{parameter}/{at}"
                part = self.file(number + place).read(name, begin - at, stop - at, length, self.verify)
                tensor[begin - start : stop - start].copy_(part)
                filled += stop - begin
        if filled != len(tensor):
            raise damaged(self.path, f"{kind} of {parameter}: found {filled} of {len(tensor)} elements")


def pieces_in(tensors):
    """The (parameter, first element, elements) of which a file holds the weights, of its {name: elements}."""
    names = ((name.split("/"), elements) for name, elements in tensors.items())
    return [(parameter, int(start), elements) for (kind, parameter, start), elements in names if kind == "fp32"]


@torch.no_grad()
def copy_into(model, load):
    """Give every parameter of `model` the value read(name), where read = load(), from rank 0. Parameter by
    parameter, so that under ZeRO-3 no rank ever holds more than one whole; in the other stages `deepspeed.initialize`
    broadcasts rank 0's. Every rank must call this; all raise UserError if rank 0 cannot read."""
    from deepspeed import comm, zero

    from minzero import dist

    is_first = comm.get_rank() == 0
    fault, read = None, None
    for name, parameter in model.named_parameters():
        with zero.GatheredParameters([parameter], modifier_rank=0):
            if not is_first or fault:
                continue  # all ranks gather, whatever rank 0 finds
            try:
                read = read or load()
                parameter.copy_(read(name)[: len(parameter)])  # learned positions past block_size are left out
            except UserError as error:
                fault = error
    with dist.all_or_none():
        if fault:
            raise fault

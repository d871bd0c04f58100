"""One process in the place of each rank of many, one after the other: a process group and a store that keep what a rank
says until the others ask for it, and count it.

Ranks run from the last to the first, because a rank waits for higher ones where values are merged on rank 0. Where one
other than rank 0 waits for rank 0, `NotYet` ends it; what rank 0 broadcasts afterwards counts as received by it.
"""

import os
import sys
import time
from collections import defaultdict, deque
from dataclasses import dataclass, fields

from torch import distributed
from torch._C._distributed_c10d import _create_work_from_future
from torch.futures import Future

NAME = "simulated"


@dataclass
class Counts:
    """What one rank did in a part of a run."""

    opens: int = 0  # of files below the folder that is watched
    stats: int = 0
    fsyncs: int = 0
    read_bytes: int = 0  # of all files, and written
    written_bytes: int = 0
    messages: int = 0  # collectives, and messages received from single ranks
    received_bytes: int = 0  # in them
    requests: int = 0  # to the store, which rank 0 keeps
    request_bytes: int = 0  # to the store and back
    seconds: float = 0.0  # of processor time

    def add(self, other):
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


class NotYet(Exception):
    """A rank waits for what rank 0 has not said yet."""


def done(value):
    future = Future()
    future.set_result(value)
    return _create_work_from_future(future)


class Ranks(distributed.ProcessGroup):
    """The group as the rank `number` of `ranks` sees it. Where all ranks pass the same, as in the checks that find
    nothing, a reduction is what this rank passes."""

    def __init__(self, ranks):
        super().__init__(0, ranks)
        self.ranks = ranks
        self.number = 0
        self.counts = Counts()
        self.sent = defaultdict(deque)  # {(from, to): tensors}
        self.said_by_0 = []  # tensors that rank 0 has broadcast since `begin`
        self.heard = 0  # of them, by this rank

    def begin(self, number, counts):
        """From here on this process is this rank, and what it does is added to `counts`."""
        self.number, self.counts, self.heard = number, counts, 0
        os.environ |= {"RANK": str(number), "WORLD_SIZE": str(self.ranks)}
        if number == 0:
            self.said_by_0 = []

    def receive(self, tensor, times=1):
        self.counts.messages += 1
        self.counts.received_bytes += times * tensor.nbytes

    # -- what torch.distributed calls -----------------------------------------------------------------

    def rank(self):
        return self.number

    def size(self):
        return self.ranks

    def getBackendName(self):
        return NAME

    def allreduce(self, tensors, opts=None):
        self.receive(tensors[0])
        return done(tensors)

    def barrier(self, opts=None):
        self.counts.messages += 1
        return done(None)

    def all_gather_single(self, output, own, opts=None):
        self.receive(own, self.ranks)
        output.view(self.ranks, -1).copy_(own.view(1, -1))
        return done(output)

    _allgather_base = all_gather_single

    def allgather(self, outputs, own, opts=None):
        self.receive(own[0], self.ranks)
        for output in outputs[0]:
            output.copy_(own[0])
        return done(outputs)

    def broadcast(self, tensors, opts=None):
        if self.number == 0:
            self.said_by_0.append(tensors[0].clone())
        elif self.heard == len(self.said_by_0):
            raise NotYet
        else:
            tensors[0].copy_(self.said_by_0[self.heard])
            self.heard += 1
        self.receive(tensors[0])
        return done(tensors)

    def send(self, tensors, to, tag=0):
        self.sent[self.number, to].append(tensors[0].clone())
        return done(tensors)

    def recv(self, tensors, source, tag=0):
        tensors[0].copy_(self.sent[source, self.number].popleft())
        self.receive(tensors[0])
        return done(tensors)


class CountedStore:
    """A store of torch's that counts what rank `group.number` asks of it."""

    def __init__(self, group):
        self.store = distributed.HashStore()
        self.group = group

    def count(self, *parts):
        self.group.counts.requests += 1
        self.group.counts.request_bytes += sum(len(part) for part in parts)

    def set(self, key, value):
        self.count(key, value)
        self.store.set(key, value)

    def get(self, key):
        if not self.store.check([key]):
            raise NotYet
        value = self.store.get(key)
        self.count(key, value)
        return value

    def multi_get(self, keys):
        values = self.store.multi_get(keys)
        self.count(*keys, *values)
        return values

    def add(self, key, number):
        self.count(key, "12345678")
        return self.store.add(key, number)

    def check(self, keys):
        self.count(*keys)
        return self.store.check(keys)

    def wait(self, keys, _=None):
        self.count(*keys)
        if not self.store.check(keys):
            raise NotYet


def join(ranks):
    """The group of this process, as torch's default one -> (Ranks, CountedStore). `leave` ends it."""
    group = Ranks(ranks)
    if NAME not in distributed.Backend.backend_list:
        distributed.Backend.register_backend(NAME, lambda *_: current[0], devices=["cpu"])
    current[:] = [group]
    distributed.init_process_group(NAME, store=distributed.HashStore(), rank=0, world_size=ranks)
    return group, CountedStore(group)


current = []
leave = distributed.destroy_process_group


# -- files -----------------------------------------------------------------------------------------

watched = {"folder": None, "counts": None}


def count_open(event, arguments):
    if event == "open" and watched["counts"] and str(arguments[0]).startswith(watched["folder"]):
        watched["counts"].opens += 1


def counting(name, function):
    def counted(path, *arguments, **more):
        counts = watched["counts"]
        if counts and (name == "fsyncs" or str(path).startswith(watched["folder"])):
            setattr(counts, name, getattr(counts, name) + 1)
        return function(path, *arguments, **more)

    return counted


def bytes_of_process():
    """(bytes read, bytes written) by this process so far."""
    with open("/proc/self/io") as file:
        read, written = (int(file.readline().split()[1]) for _ in range(2))
    return read, written


class Watching:
    """A context: what this process does with files below a folder, and its time, is added to `counts`."""

    is_hooked = False

    def __init__(self, folder, counts):
        self.folder, self.counts = str(folder), counts

    def __enter__(self):
        if not Watching.is_hooked:
            Watching.is_hooked = True
            sys.addaudithook(count_open)  # stays for the life of the process
        self.before = os.stat, os.lstat, os.fsync
        os.stat, os.lstat = counting("stats", os.stat), counting("stats", os.lstat)
        os.fsync = counting("fsyncs", os.fsync)
        watched.update(folder=self.folder, counts=self.counts)
        self.bytes, self.seconds = bytes_of_process(), time.process_time()

    def __exit__(self, kind, error, traceback):
        self.counts.seconds += time.process_time() - self.seconds
        read, written = bytes_of_process()
        self.counts.read_bytes += read - self.bytes[0]
        self.counts.written_bytes += written - self.bytes[1]
        watched.update(folder=None, counts=None)
        os.stat, os.lstat, os.fsync = self.before


def received_later(group, counts):
    """Add to a rank's counts what rank 0 has said after that rank was ended by `NotYet`."""
    for tensor in group.said_by_0[group.heard :]:
        counts.messages += 1
        counts.received_bytes += tensor.nbytes

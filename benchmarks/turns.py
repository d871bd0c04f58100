"""Rows that take one step in turn: the time of each, what memory it allocates, and why it has failed."""

import ctypes
import gc
import threading
import time
import traceback

import torch
from deepspeed import comm

from benchmarks.nanogpt import now
from minzero import dist
from minzero.errors import UserError

WARMUP = 2  # rounds whose times do not count


class MallocInfo(ctypes.Structure):
    """mallinfo2's result: uordblks and hblkhd are the bytes in use, in the heap and in pages of their own."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def bytes_in_use(device):
    """Bytes that this process has allocated and not freed: of its GPU, or of CPU memory by the C library. The CPU's are
    of all threads, and those of tensors are among them: torch keeps none. None where the C library has no mallinfo2."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return None
    mallinfo.restype = MallocInfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


class Meter:
    """Memory allocated on the device between `start` and `stop`. On a CPU a thread looks every half a millisecond,
    too seldom only for small tensors."""

    def __init__(self, device):
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.finished = threading.Event()

    def start(self):
        gc.collect()
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.before = self.most = bytes_in_use(self.device)
        if not self.on_gpu and self.before is not None:
            self.watcher = threading.Thread(target=self.watch, daemon=True)
            self.watcher.start()
        return self

    def watch(self):
        while not self.finished.wait(0.0005):
            self.most = max(self.most, bytes_in_use(self.device))

    def stop(self):
        """(bytes more at the end than at the start, the most that there was above the start), or (0, None)."""
        if self.before is None:
            return 0, None
        if self.on_gpu:
            torch.cuda.synchronize()
            self.most = torch.cuda.max_memory_allocated()
        else:
            self.finished.set()
            self.watcher.join()
        gc.collect()
        return bytes_in_use(self.device) - self.before, self.most - self.before


class Row:
    """One way of training, and what is measured of it on this rank."""

    def __init__(self, name, device, in_trainer=False):
        """in_trainer: a Trainer takes its steps, and calls `end_build`, `begin_step` and `end_step` itself."""
        self.name = name
        self.device = device
        self.in_trainer = in_trainer
        self.failed = None
        self.step = None  # number of the step, from 1 -> its loss
        self.held = self.peak = 0  # bytes
        self.seconds = []  # of the steps that count
        self.losses = []  # of all steps, each the mean of this rank's micro-batches
        self.meter = None

    def build(self, make_step):
        """Make the model and the optimizer. make_step: returns the function `step`."""
        with catching(self):
            self.begin_build()
            self.step = make_step()
            self.end_build()

    def begin_build(self):
        self.meter = Meter(self.device).start()

    def end_build(self):
        self.held += self.meter.stop()[0]

    def begin_step(self, number):
        comm.barrier()
        self.meter = Meter(self.device).start() if number <= WARMUP else None
        self.began = now(self.device)

    def end_step(self, loss):
        ended = now(self.device)
        if self.meter:
            more, most = self.meter.stop()
            self.peak = None if most is None else self.held + most
            self.held += more
        else:
            self.seconds.append(ended - self.began)
        self.losses.append(float(loss))

    def take(self, number):
        """One step, unless the row has failed."""
        if self.failed:
            return
        with catching(self):
            self.begin_step(number)
            self.end_step(self.step(number))


class catching:
    """A context in which an exception is the failure of a row. It must occur on every rank, or the others hang."""

    def __init__(self, row):
        self.row = row

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if not isinstance(error, Exception):
            return False
        if self.row.meter:
            self.row.meter.finished.set()
        self.row.failed = f"{kind.__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        if not isinstance(error, UserError | ImportError) and comm.get_rank() == 0:
            traceback.print_exception(error)
        return True


def take_turns(rows, rounds, deadline):
    """One step of each row a round, until the time is over. A generator: yields the number of the step where it is the
    Trainer's turn, which takes it before it asks for the next."""
    for number in range(1, WARMUP + rounds + 1):
        for row in rows if number % 2 else rows[::-1]:
            if row.in_trainer:
                if not row.failed:
                    yield number
            else:
                row.take(number)
        is_over = dist.gather(time.monotonic() > deadline)[0]
        if is_over and number > WARMUP:
            break

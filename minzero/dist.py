"""The process group: how the ranks meet and end, what they tell each other, and what they must agree on."""

import contextlib
import hashlib
import os
import platform
import socket
import threading
import warnings
from datetime import timedelta
from typing import NamedTuple

import torch
from torch import distributed

from minzero import errors, meeting
from minzero.config.nested import flat
from minzero.errors import SharedError, UserError
from minzero.files import ROOT, git_commit
from minzero.launchers import find_ranks

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # asked for, so that DeepSpeed does not warn about it
import deepspeed
from deepspeed import comm
from deepspeed.runtime.comm import coalesced_collectives
from deepspeed.utils.logging import set_log_level_from_string

VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")  # the GPUs that a process sees
local_place = 0, 1  # this process among those on its machine: (its number, how many)
DIFFERENCES = 5  # most that are listed of two ranks that differ


# -- how the ranks meet ----------------------------------------------------------------------------


class Group(NamedTuple):
    """This process among those of a run."""

    device: torch.device
    rank: int
    world_size: int  # number of ranks


def find_place(may_be_alone=False):
    """Set torch's variables of this rank in its environment, and `local_place`. Raises UserError."""
    global local_place
    if local_place == (0, 1):  # a second call finds the number of the GPU in LOCAL_RANK
        os.environ |= find_ranks(dict(os.environ), may_be_alone)
        local_place = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_SIZE"])


def init_process(verbose=False, may_be_alone=False):
    """Set this process up as one rank of a run: torch's variables in its environment, its GPU, its number of threads,
    DeepSpeed's log level. Returns its Group. Starts no communication yet. Raises UserError."""
    find_place(may_be_alone)
    rank = int(os.environ["RANK"])
    world_size = int(os.environ["WORLD_SIZE"])
    set_log_level_from_string("info" if verbose else "error")
    if not verbose:
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # DeepSpeed calls old names
    if "OMP_NUM_THREADS" not in os.environ:  # else every rank takes all cores, on a GPU machine for CPU Adam
        share = max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_SIZE"]))
        os.environ["OMP_NUM_THREADS"] = str(share)  # for what is compiled with an OpenMP of its own
        torch.set_num_threads(share)
    found = os.environ.get("DS_ACCELERATOR")
    if torch.cuda.is_available() and found not in (None, "cuda"):
        raise UserError(
            f"DS_ACCELERATOR: found {found} on a machine with a GPU, which the model would run on without DeepSpeed; "
            "unset it, or set CUDA_VISIBLE_DEVICES to nothing to run on CPUs"
        )
    if not torch.cuda.is_available():
        # DeepSpeed's shared-memory all-reduce is compiled for a minute at first use and needs a C++ compiler.
        # ZeRO-3 gathers and scatters, which it does not speed up: plain gloo is as fast here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        coalesced_collectives._torch_reduce_scatter_fn = reduce_scatter_by_exchange
        return Group(torch.device("cpu"), rank, world_size)
    device = torch.device("cuda", gpu_of(local_place[0], torch.cuda.device_count()))
    os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes it for the number of the GPU
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:  # and compares it with this
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = os.environ["LOCAL_RANK"]
    torch.cuda.set_device(device)
    return Group(device, rank, world_size)


def reduce_scatter_by_exchange(tensor, output, group=None):
    """Sum a flat tensor over the ranks and write this rank's part into `output`. In place of gloo's reduce-scatter: two
    CPU ranks took 2.4 ms for 1.8 million float32 numbers, and 7.4 ms with that (torch 2.13.0)."""
    received = torch.empty_like(tensor)
    comm.all_to_all_single(received, tensor, group=group)
    torch.sum(received.view(comm.get_world_size(group), -1), dim=0, out=output)


def gpu_of(local_rank, gpus):
    """The number of the GPU of a rank on its machine. Raises UserError if there are fewer GPUs than ranks."""
    if gpus == 1 and any(os.environ.get(name) for name in VISIBLE):
        return 0  # srun --gpus-per-task=1 shows each task its own GPU alone, as number 0
    if local_rank >= gpus:
        raise UserError(f"rank {local_rank} of this machine has no GPU: it has {gpus}; start one process a GPU")
    return local_rank


def start_process_group(
    verbose=False, timeout=timedelta(seconds=1800), may_be_alone=False, meet_within=300, fault=None
):
    """Bring the ranks together. Returns the Group of this one. timeout: how long a rank waits for the others in every
    communication; meet_within: seconds for all to come. fault: why this rank cannot take part, in one line. A second
    call finds the group that is there.

    A run of one process opens no port to the network. Raises UserError if the ranks do not meet, and SharedError on all
    of them if one cannot take part."""
    if distributed.is_initialized():
        return init_process(verbose, may_be_alone)
    find_place(may_be_alone)
    try:
        group = init_process(verbose, may_be_alone)
    except UserError as error:  # of this machine: the others must know
        fault = fault or str(error)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = meeting.open_store(rank, world_size, meet_within)
    meeting.meet(store, rank, world_size, meet_within, fault)
    connect(group, store, timedelta(seconds=meet_within) if world_size > 1 else timeout)
    store.set_timeout(timeout)
    distributed.distributed_c10d._set_pg_timeout(timeout)
    deepspeed.init_distributed(distributed.get_backend(), timeout=timeout, verbose=verbose)
    return group


def connect(group, store, timeout):
    """torch's process group of ranks that have met in a store. Its connections go to ports of their own, which may be
    closed where the store's is open; timeout: for these connections."""
    backend, more = "gloo", {}
    if group.device.type == "cuda":
        backend = "nccl"
        more = {"device_id": group.device}  # as DeepSpeed does; without it every barrier warns
    if group.world_size == 1:
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    distributed.init_process_group(
        backend, store=store, rank=group.rank, world_size=group.world_size, timeout=timeout, **more
    )


def stop_process_group():
    """End the group, if there is one. Every rank must call this."""
    if comm.is_initialized():
        comm.barrier()  # gloo aborts at exit if a peer still talks
        comm.destroy_process_group()


# -- what they tell each other ---------------------------------------------------------------------


def begins_exchange():
    """Called before each exchange with all others; the Watchdog puts its heartbeat in this place."""


def print0(line):
    """Print a line on rank 0, if there is one to print."""
    if line and (os.environ.get("RANK") or "0") == "0":
        with contextlib.suppress(OSError):  # a lost terminal must not cost the run
            print(line, flush=True)


def reduce(number, operation):
    """The sum, the least or the largest of a whole number of each rank. operation: one of torch's ReduceOp. Every rank
    must call this."""
    begins_exchange()
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    numbers = torch.tensor([int(number)], device=device)
    distributed.all_reduce(numbers, operation)
    return int(numbers)


def first(value):
    """(rank, what it passes) of the first rank that passes anything but None; None if all pass None. Every rank must
    call this. What a rank receives does not grow with the number of ranks."""
    ranks = distributed.get_world_size()
    rank = reduce(ranks if value is None else distributed.get_rank(), distributed.ReduceOp.MIN)
    return None if rank == ranks else (rank, from_rank(rank, value))


def gather(value):
    """What every rank passes, as a list by rank. Every rank must call this. Each receives from all: for few ranks."""
    begins_exchange()
    everyone = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, value)
    return everyone


def gather_numbers(*numbers):
    """Some numbers of every rank, as a tensor (ranks, numbers) in float64. Every rank must call this."""
    begins_exchange()
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    own = torch.tensor(numbers, dtype=torch.float64, device=device)
    everyone = own.new_empty(distributed.get_world_size() * len(own))
    distributed.all_gather_into_tensor(everyone, own)
    return everyone.view(-1, len(own))


def merge_on_rank_0(value, merge):
    """The values of all ranks merged into one, on rank 0; None elsewhere. Every rank must call this. merge(left, right)
    gives that of a range of ranks, and of the range after it, as one. Along a binary tree: a rank receives from at most
    log2(ranks) others, while a gather opens a connection to rank 0 for each."""
    begins_exchange()
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    distance = 1
    while distance < ranks:
        if rank % (2 * distance):
            distributed.send_object_list([value], dst=rank - distance)
            return None
        if rank + distance < ranks:
            received = [None]
            distributed.recv_object_list(received, src=rank + distance)
            value = merge(value, received[0])
        distance *= 2
    return value


def from_rank(rank, value):
    """What this rank passes, on all ranks. Every rank must call this."""
    begins_exchange()
    values = [value]
    distributed.broadcast_object_list(values, src=rank)
    return values[0]


def from_rank_0(value):
    """What rank 0 passes, on all ranks. Every rank must call this."""
    return from_rank(0, value)


class StepFacts(NamedTuple):
    """What all ranks know of an optimizer step after `share_step`."""

    loss: float  # mean over the ranks
    stop_requested: bool  # of any rank
    save_due: bool  # by rank 0's clock
    ranks_that_wrote: int  # how many have written their part of the checkpoint that is being saved


def share_step(loss, stop_requested, save_due, checkpoint_is_written):
    """Sum one step's facts over the ranks: a single all-reduce of four numbers, in which the host waits for the GPU
    once a step. loss: this rank's, a tensor (). The others: this rank's, booleans. Returns StepFacts. Every rank must
    call this."""
    flags = loss.new_tensor((stop_requested, save_due, checkpoint_is_written))
    totals = torch.cat((loss.double().view(1), flags))
    begins_exchange()
    distributed.all_reduce(totals)
    loss_sum, stopping, saving, written = totals.tolist()
    return StepFacts(loss_sum / distributed.get_world_size(), stopping > 0, saving > 0, int(written))


# -- how they end ----------------------------------------------------------------------------------


def common_store():
    """The store of all ranks, which rank 0 keeps."""
    return distributed.distributed_c10d._get_default_store()


def ask_store(action, seconds=5):
    """The result of action(store), or None if rank 0, which keeps the ranks' common store, does not answer in time."""
    store = common_store()
    answers = []

    def ask():
        with contextlib.suppress(RuntimeError):  # rank 0 is gone
            answers.append(action(store))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return answers[0] if answers else None


def publish_fault(line):
    """Write into the ranks' common store why this rank ends, as the others would only see that it has gone. Returns the
    SharedError to end by: of the first rank that has published one."""
    mine = f"{os.environ['RANK']} {line}"
    first = ask_store(lambda store: store.compare_set("fault", "", mine))
    return shared_error(first.decode() if first else mine)


def published_fault():
    """The SharedError of the rank that has ended and published why, else None."""
    if not distributed.is_initialized() or not ask_store(lambda store: store.check(["fault"])):
        return None
    fault = ask_store(lambda store: store.get("fault").decode())
    return shared_error(fault) if fault else None


def shared_error(fault):
    """A fault in the store, "<rank> <line>" -> SharedError."""
    rank, _, line = fault.partition(" ")
    return SharedError(line, int(rank))


@contextlib.contextmanager
def ending_together(on_lost_contact=lambda reason: None, on_own_fault=lambda: None):
    """A context for all that a rank does: what a user can cause on one rank ends all of them, with one line.

    on_lost_contact: called with the reason where another rank has gone and published nothing. on_own_fault: called
    before the end on the rank that prints the line."""
    try:
        yield
    except SharedError:
        raise
    except Exception as error:
        if is_lost_contact(error):
            if fault := published_fault():
                raise fault from None
            reason = f"lost contact with another rank ({' '.join(str(error).split())[:400]})"
            on_lost_contact(reason)
            raise UserError(reason) from None
        line = errors.explain(error)
        if line is None or not distributed.is_initialized() or distributed.get_world_size() == 1:
            raise
        fault = publish_fault(line)
        if fault.said_by == distributed.get_rank():
            on_own_fault()
        raise fault from None


def is_lost_contact(error):
    """Whether an exception says that another rank has gone."""
    if isinstance(error, distributed.DistError):
        return True
    words = ("gloo", "Connection closed", "NCCL", "onnection reset")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


# -- what they must agree on -----------------------------------------------------------------------


@contextlib.contextmanager
def all_or_none():
    """A context for a block that every rank runs: what a user can cause on one rank is raised on all, as SharedError,
    so that none waits for a rank that has ended. It names the rank and its machine, unless all found the same."""
    fault = None
    try:
        yield
    except Exception as error:
        fault = errors.explain(error)
        if fault is None or is_lost_contact(error):
            raise
    if found := first(fault and (fault, socket.gethostname())):
        rank, (line, host) = found
        found_by = reduce(fault == line, distributed.ReduceOp.SUM)
        found_by_all = found_by == distributed.get_world_size()
        raise SharedError(meeting.with_place(line, rank, host, found_by_all)) from None


def differences(mine, first):
    """What differs between this rank's facts and rank 0's, as pieces of text."""
    missing = object()
    found = []
    for name in dict.fromkeys([*first, *mine]):
        here, there = mine.get(name, missing), first.get(name, missing)
        if here != there:
            values = ("nothing" if value is missing else repr(value)[:100] for value in (here, there))
            found.append("{} is {} instead of {}".format(name, *values))
    if len(found) > DIFFERENCES:
        found[DIFFERENCES:] = [f"{len(found) - DIFFERENCES} more"]
    return found


def refuse_different_ranks(facts):
    """Raise UserError on every rank if one rank's facts are not those of rank 0: each would train a part of another
    model. facts: nested dictionaries of plain values, such as the config and the versions. Every rank must call
    this."""
    host = socket.gethostname()
    host_of_0, expected = from_rank_0((host, flat(facts)))
    mine = differences(flat(facts), expected)
    if different := first((host, mine) if mine else None):
        rank, (where, found) = different
        others = reduce(bool(mine), distributed.ReduceOp.SUM) - 1
        more = f" (and {others} more ranks)" if others else ""
        raise SharedError(
            f"rank {rank} on {where}{more} differs from rank 0 on {host_of_0}: {'; '.join(found)}; start all "
            "ranks with the same command, config file, data, code and versions"
        )


def versions():
    """{name: value} of the versions and the device that make a run, for its config.json."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    # on a CPU the sums of a step are those of its threads, and another number of them moves the last bits
    threads = {} if torch.cuda.is_available() else {"threads": torch.get_num_threads()}
    return threads | {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "git": git_commit(),
        "device": device,
    }


def code_digests():
    """{source file: digest} of this copy of the code, for `refuse_different_ranks`."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("minzero/**/*.py")]
    return {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in sorted(files)}

"""The process group: which rank a process is, how the ranks meet, and what they must agree on.

A rank is found in the variables of whatever started it: DeepSpeed's launchers and torchrun (RANK ...), srun
(SLURM_PROCID ...), or an MPI (OMPI_COMM_WORLD_RANK, PMI_RANK ...). A process that none of them started is alone.
"""

import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import socket
import warnings
import zlib
from datetime import timedelta
from typing import NamedTuple

import torch
from torch import distributed

from config import ROOT, SharedError, UserError, flat, git_commit

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # asked for, so that DeepSpeed does not warn about it
import deepspeed
from deepspeed import comm
from deepspeed.utils.logging import set_log_level_from_string

TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
DIFFERENCES = 5  # as many are listed of two ranks that differ


# -- which rank this is ----------------------------------------------------------------------------


class Launcher(NamedTuple):
    """The variables by which a launcher tells each of its processes where it stands."""

    name: str
    rank: str
    world_size: str
    local_rank: str
    local_size: str
    job: tuple  # variables that tell one start from another on the same machine


# MPI comes before Slurm: inside a Slurm job, mpirun has its own daemons started by srun, and passes on the variables
# that Slurm gave to them. The last row is an MPI or srun --mpi=pmi2 that does not tell the rank within the machine.
LAUNCHERS = (
    Launcher(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    Launcher(
        "MVAPICH",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
        (),
    ),
    Launcher("MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", ()),
    Launcher(
        "Slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_LOCAL_SIZE", ("SLURM_JOB_ID", "SLURM_STEP_ID")
    ),
    Launcher("MPI", "PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE", ()),
)


def number_of(environ, name):
    """A variable as a whole number from 0 on. Raises UserError."""
    if not re.fullmatch(r"\d{1,9}", environ.get(name, "")):
        raise UserError(f"{name}: found {environ.get(name)!r} in the environment, expected a whole number from 0 on")
    return int(environ[name])


def first_host(nodes):
    """The first host of a Slurm list of nodes: `gpu[07-09,12],login1` -> `gpu07`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes).group()
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def slurm_local_size(environ):
    """How many tasks of a Slurm step run on this node, from `4(x2),3` and the node's number. None if unknown."""
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    counts = []
    for tasks, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node):
        counts += [int(tasks)] * min(int(repeats or 1), 100_000)
    node = environ.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else None


def find_launcher(environ):
    """The first Launcher whose variables are all there, or the first of which some are; None if there is none."""
    started = [launcher for launcher in LAUNCHERS if launcher.rank in environ or launcher.world_size in environ]
    complete = [one for one in started if {one.rank, one.world_size, one.local_rank} <= environ.keys()]
    return next(iter(complete + started), None)


def find_ranks(environ, may_be_alone=False):
    """The variables that torch and DeepSpeed read, as strings, of this process: RANK, WORLD_SIZE, LOCAL_RANK,
    LOCAL_SIZE, MASTER_ADDR and MASTER_PORT.

    may_be_alone: a process in a Slurm job that srun did not start is alone, where it is else refused, because the
    job was given more tasks than the one. Raises UserError where the variables say that there are several tasks and
    not enough to bring them together."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # 0: whichever port is free
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return torch_variables(environ, alone)
    launcher = find_launcher(environ)
    if launcher is None:
        return alone
    if launcher.name == "Slurm":
        environ = slurm_step(environ, may_be_alone)
    world_size = number_of(environ, launcher.world_size) if launcher.world_size in environ else 1
    if world_size <= 1 and launcher.rank not in environ:
        return alone
    rank = number_of(environ, launcher.rank)
    if rank >= max(world_size, 1) or launcher.world_size not in environ:
        size = environ.get(launcher.world_size, "not set")
        raise UserError(
            f"{launcher.rank}: found {rank}, but {launcher.world_size} is {size}; expected both, as {launcher.name} "
            "sets them"
        )
    if world_size == 1:
        return alone
    here = environ.get("MASTER_ADDR") in LOOPBACK
    local_size = number_of(environ, launcher.local_size) if launcher.local_size in environ else None
    if launcher.local_rank in environ:
        local_rank = number_of(environ, launcher.local_rank)
    elif here:
        local_rank, local_size = rank, world_size
    else:
        raise UserError(
            f"{launcher.world_size}: says {world_size} tasks, but {launcher.local_rank}, the number of this one on its "
            "machine, is not set; start with srun, mpirun, torchrun or deepspeed, or set MASTER_ADDR=127.0.0.1 if all "
            "tasks run on this machine"
        )
    found = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": local_rank, "LOCAL_SIZE": local_size or 1}
    start = ".".join(environ.get(name, "") for name in launcher.job)
    found["MASTER_PORT"] = environ.get("MASTER_PORT") or 10_000 + zlib.crc32(start.encode()) % 20_000
    found["MASTER_ADDR"] = environ.get("MASTER_ADDR") or meeting_point(environ, launcher, local_size == world_size)
    return {name: str(value) for name, value in found.items()}


def torch_variables(environ, alone):
    """The variables that torchrun and DeepSpeed's launchers set, checked. Raises UserError."""
    missing = [name for name in TORCH_VARIABLES if not environ.get(name)]
    if environ.get("WORLD_SIZE", "1") == "1" and environ.get("RANK", "0") == "0":
        return alone | {name: environ[name] for name in TORCH_VARIABLES if environ.get(name)}
    if missing:
        raise UserError(
            f"RANK is {environ.get('RANK')!r} and WORLD_SIZE {environ.get('WORLD_SIZE')!r}, but {', '.join(missing)} "
            "not set; start with deepspeed or torchrun, or unset them for one process"
        )
    found = {name: environ[name] for name in TORCH_VARIABLES}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        number_of(environ, name)
    if int(found["RANK"]) >= int(found["WORLD_SIZE"]):
        raise UserError(f"RANK: found {found['RANK']}, expected less than WORLD_SIZE {found['WORLD_SIZE']}")
    return found | {"LOCAL_SIZE": environ.get("LOCAL_SIZE") or environ.get("LOCAL_WORLD_SIZE") or "1"}


def slurm_step(environ, may_be_alone):
    """Slurm's variables with those of the step, which srun started, in place of the job's. Raises UserError."""
    in_step = any(name in environ for name in ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS"))
    tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS", "1")
    if "SLURM_JOB_ID" in environ and not in_step:
        if tasks != "1" and not may_be_alone:
            raise UserError(
                f"SLURM_NTASKS: says {tasks} tasks, but srun did not start this process; write srun before python, or "
                "deepspeed --num_gpus 1 for one process"
            )
        tasks = "1"
    step = environ | {"SLURM_NTASKS": tasks}
    local_size = slurm_local_size(environ)
    return step | ({"SLURM_LOCAL_SIZE": str(local_size)} if local_size else {})


def meeting_point(environ, launcher, one_machine):
    """The address of rank 0's machine, where the launcher does not say it in MASTER_ADDR. Raises UserError."""
    if one_machine:
        return LOOPBACK[0]
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    if launcher.name == "Slurm" and nodes:
        return first_host(nodes)
    if launcher.name != "Slurm" and importlib.util.find_spec("mpi4py"):
        from mpi4py import MPI

        return MPI.COMM_WORLD.bcast(socket.gethostbyname(socket.gethostname()), root=0)
    raise UserError(
        f"MASTER_ADDR: not set, and {launcher.name} does not say on which machine rank 0 runs; set it to that "
        "machine's address (mpirun -x MASTER_ADDR=...), or pip install mpi4py"
    )


def find_place(verbose=False, may_be_alone=False):
    """(device, rank, number of ranks) of this process; its environment then says the same in torch's variables.
    Starts no communication yet. Raises UserError."""
    os.environ |= find_ranks(dict(os.environ), may_be_alone)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    set_log_level_from_string("info" if verbose else "error")
    if not verbose:
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # DeepSpeed calls old names
    if "OMP_NUM_THREADS" not in os.environ:  # else every rank takes all cores, on a GPU machine for CPU Adam
        share = max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_SIZE"]))
        os.environ["OMP_NUM_THREADS"] = str(share)  # for what is compiled with an OpenMP of its own
        torch.set_num_threads(share)
    if not torch.cuda.is_available():
        # DeepSpeed's shared-memory all-reduce is compiled for a minute at first use and needs a C++ compiler.
        # ZeRO-3 gathers and scatters, which it does not speed up: plain gloo is as fast here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        return torch.device("cpu"), rank, world_size
    device = torch.device("cuda", gpu_of(int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()))
    os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes it for the number of the GPU
    torch.cuda.set_device(device)
    return device, rank, world_size


def gpu_of(local_rank, gpus):
    """The number of the GPU of a rank on its machine. Raises UserError if there are fewer GPUs than ranks."""
    if gpus == 1:
        return 0  # srun --gpus-per-task=1 shows each task its own GPU alone, as number 0
    if local_rank >= gpus:
        raise UserError(f"rank {local_rank} of this machine has no GPU: it has {gpus}; start one process a GPU")
    return local_rank


# -- how the ranks meet ----------------------------------------------------------------------------


def start_process_group(verbose=False, patience=timedelta(seconds=1800), may_be_alone=False):
    """Bring the ranks together. Returns (device, rank, number of ranks) of this one. patience: how long a rank waits
    for the others, at the start and in every communication. A second call finds the group that is there.

    A run of one process opens no port to the network. Raises UserError if the ranks do not meet."""
    device, rank, world_size = find_place(verbose, may_be_alone)
    backend, more = "gloo", {}
    if device.type == "cuda":
        backend = "nccl"
        more = {"device_id": device} if world_size > 1 else {}  # as DeepSpeed does
    if not distributed.is_initialized():
        try:
            if world_size == 1:
                for library in ("GLOO", "NCCL"):
                    os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
                more["store"] = distributed.HashStore()
            distributed.init_process_group(backend, rank=rank, world_size=world_size, timeout=patience, **more)
        except (distributed.DistNetworkError, distributed.DistStoreError) as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            reason = str(error).splitlines()[0]
            remedy = "if another run uses that port, choose one with deepspeed --master_port or MASTER_PORT"
            raise UserError(f"ranks could not meet at {address} ({reason}); {remedy}") from None
    deepspeed.init_distributed(backend, timeout=patience, verbose=verbose)
    return device, rank, world_size


def stop_process_group():
    """End the group, if there is one. Every rank must call this."""
    if comm.is_initialized():
        comm.barrier()  # gloo aborts at exit if a peer still talks
        comm.destroy_process_group()


def gather(value):
    """What every rank passes, as a list by rank. Every rank must call this."""
    everyone = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, value)
    return everyone


# -- what they must agree on -----------------------------------------------------------------------


@contextlib.contextmanager
def all_or_none():
    """For a block that every rank runs: a UserError of one rank is raised on all (as SharedError), so that none waits
    for a rank that has ended. It names the rank and its machine, unless all ranks found the same."""
    fault = None
    try:
        yield
    except UserError as error:
        fault = str(error)
    faults = gather((fault, socket.gethostname()) if fault else None)
    first = next((rank for rank, found in enumerate(faults) if found), None)
    if first is None:
        return
    fault, host = faults[first]
    same = all(found and found[0] == fault for found in faults)
    raise SharedError(fault if same else f"rank {first} on {host}: {fault}") from None


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
    first = [flat(facts)]
    distributed.broadcast_object_list(first)
    host = socket.gethostname()
    everyone = gather((host, differences(flat(facts), first[0])))
    different = [rank for rank, (_, found) in enumerate(everyone) if found]
    if different:
        rank = different[0]
        more = f" (and {len(different) - 1} more ranks)" if len(different) > 1 else ""
        where, found = everyone[rank]
        raise SharedError(
            f"rank {rank} on {where}{more} differs from rank 0 on {everyone[0][0]}: {'; '.join(found)}; start all "
            "ranks with the same command, config file, data, code and versions"
        )


def versions():
    """{name: value} of the versions and the device that make a run, for its config.json."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    return {
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

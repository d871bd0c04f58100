"""The rank of a process, from the environment variables of the launcher that started it. Needs no torch.

DeepSpeed's launchers and torchrun set RANK and others, srun SLURM_PROCID, an MPI OMPI_COMM_WORLD_RANK or PMI_RANK. A
process that none of them started is alone.
"""

import importlib.util
import re
import socket
import zlib
from typing import NamedTuple

from minzero.errors import UserError

TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Launcher(NamedTuple):
    """The variables in which a launcher gives each process its rank."""

    name: str
    rank: str
    world_size: str
    local_rank: str
    local_size: str
    job: tuple  # variables that tell one start from another on the same machine


# MPI comes before Slurm: inside a Slurm job, mpirun starts its daemons with srun, and its processes inherit Slurm's
# variables. The last row is an MPI, or srun --mpi=pmi2, that does not set the rank within the machine.
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
    """The number of tasks of a Slurm step on this node, from text such as `4(x2),3` and the node's number. None if
    that is unknown."""
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    counts = []
    for tasks, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node):
        counts += [int(tasks)] * min(int(repeats or 1), 100_000)
    node = environ.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else None


def find_launcher(environ):
    """The first Launcher whose variables are all set; else the first of which some are set; else None."""
    started = [launcher for launcher in LAUNCHERS if launcher.rank in environ or launcher.world_size in environ]
    complete = [one for one in started if {one.rank, one.world_size, one.local_rank} <= environ.keys()]
    candidates = complete + started
    return candidates[0] if candidates else None


def find_ranks(environ, may_be_alone=False):
    """The variables that torch and DeepSpeed read for this process, as strings: RANK, WORLD_SIZE, LOCAL_RANK,
    LOCAL_SIZE, MASTER_ADDR and MASTER_PORT.

    may_be_alone: take a process that srun did not start, in a Slurm job of several tasks, for a single one; by default
    it is refused. Raises UserError where the variables name several tasks and not enough to connect them."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # 0: whichever port is free
    if environ.get("RANK") or environ.get("WORLD_SIZE"):
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
    found = {name: environ[name] for name in TORCH_VARIABLES if environ.get(name)}
    for name in found.keys() - {"MASTER_ADDR"}:
        number_of(environ, name)
    if int(found.get("MASTER_PORT", 0)) > 65535:
        raise UserError(f"MASTER_PORT: found {found['MASTER_PORT']}, expected at most 65535")
    rank, world_size = int(found.get("RANK", 0)), int(found.get("WORLD_SIZE", 1))
    if rank >= world_size:
        raise UserError(f"RANK: found {rank}, expected less than WORLD_SIZE {world_size}")
    local_size = environ.get("LOCAL_SIZE") or environ.get("LOCAL_WORLD_SIZE") or "1"
    found["LOCAL_SIZE"] = str(number_of({"LOCAL_SIZE": local_size}, "LOCAL_SIZE"))
    if world_size == 1:
        return alone | found
    missing = [name for name in TORCH_VARIABLES if name not in found]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {world_size}, but {', '.join(missing)} not set; start with deepspeed or torchrun, or unset "
            "it for one process"
        )
    return found


def slurm_step(environ, may_be_alone):
    """Slurm's variables, with those of the step (one call of srun) in place of the job's. Raises UserError."""
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
    """The address of rank 0's machine, where the launcher did not set MASTER_ADDR. Raises UserError."""
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
        "machine's address (mpirun -x MASTER_ADDR=..., deepspeed --launcher_args '-x MASTER_ADDR=...'), or pip install "
        "mpi4py"
    )

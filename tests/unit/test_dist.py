"""Which rank a process is, by the variables of whatever started it, and what ranks must agree on."""

import os

import pytest

from minzero import dist, launchers
from minzero.errors import UserError

SLURM = {"SLURM_JOB_ID": "71", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "6", "SLURM_STEP_NUM_TASKS": "6"}
SLURM |= {"SLURM_STEP_NODELIST": "gpu[07-08],login1", "SLURM_STEP_TASKS_PER_NODE": "3,1,2"}
THIRD = {"SLURM_PROCID": "3", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "PMIX_NAMESPACE": "prterun-7"}
OPEN_MPI |= {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2", "MASTER_ADDR": "n1"}
TORCH = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
BATCH = {"SLURM_JOB_ID": "71", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}

PLACES = [  # environment; RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR
    ({}, "0 1 0 1 127.0.0.1"),
    (SLURM | THIRD, "3 6 0 1 gpu07"),
    (SLURM | {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2"}, "5 6 1 2 gpu07"),
    (SLURM | THIRD | {"MASTER_ADDR": "10.0.0.9"}, "3 6 0 1 10.0.0.9"),
    (
        SLURM | THIRD | {"SLURM_STEP_TASKS_PER_NODE": "6", "SLURM_NODEID": "0", "SLURM_LOCALID": "3"},
        "3 6 3 6 127.0.0.1",
    ),
    (SLURM | THIRD | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, "0 1 0 1 127.0.0.1"),
    (BATCH, "0 1 0 1 127.0.0.1"),
    (BATCH | {"SLURM_NTASKS": "1"}, "0 1 0 1 127.0.0.1"),
    (OPEN_MPI, "1 2 1 2 127.0.0.1"),
    (OPEN_MPI | SLURM | THIRD, "1 2 1 2 127.0.0.1"),  # mpirun in a Slurm job: its daemon's variables say nothing
    (HYDRA, "2 4 0 2 n1"),
    (HYDRA | {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "0"}, "2 4 0 2 n1"),
    ({"PMI_RANK": "1", "PMI_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "1 2 1 2 127.0.0.1"),
    ({"PMI_RANK": "1", "PMI_SIZE": "2"} | SLURM | THIRD, "3 6 0 1 gpu07"),  # srun --mpi=pmi2
    ({"PMI_RANK": "0", "PMI_SIZE": "1"}, "0 1 0 1 127.0.0.1"),
    (TORCH, "1 2 0 1 n1"),
    (TORCH | SLURM | THIRD, "1 2 0 1 n1"),  # torchrun or deepspeed started by srun
    (TORCH | {"LOCAL_WORLD_SIZE": "4"}, "1 2 0 4 n1"),
    ({"RANK": "0", "WORLD_SIZE": "1"}, "0 1 0 1 127.0.0.1"),
    ({"RANK": "", "WORLD_SIZE": ""}, "0 1 0 1 127.0.0.1"),
]


@pytest.mark.parametrize(("environ", "expected"), PLACES)
def test_the_rank_is_that_of_what_started_the_process(environ, expected):
    found = launchers.find_ranks(environ)
    assert " ".join(found[name] for name in "RANK WORLD_SIZE LOCAL_RANK LOCAL_SIZE MASTER_ADDR".split()) == expected
    assert found["MASTER_PORT"].isdigit()


REFUSED = [
    (BATCH | {"SLURM_NTASKS": "8"}, "SLURM_NTASKS: says 8 tasks, but srun did not start this process"),
    (SLURM, "SLURM_PROCID: found None in the environment"),
    (SLURM | THIRD | {"SLURM_PROCID": "6"}, "SLURM_PROCID: found 6, but SLURM_NTASKS is 6"),
    (SLURM | THIRD | {"SLURM_PROCID": "x"}, "SLURM_PROCID: found 'x'"),
    ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "PMI_SIZE: says 2 tasks, but MPI_LOCALRANKID"),
    ({"PMI_RANK": "1"}, "PMI_RANK: found 1, but PMI_SIZE is not set"),
    (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4"}, "MASTER_ADDR: not set, and Open MPI does not say"),
    ({"RANK": "abc"}, "RANK: found 'abc'"),
    ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "x"}, "LOCAL_RANK: found 'x'"),
    (TORCH | {"MASTER_PORT": "99999"}, "MASTER_PORT: found 99999, expected at most 65535"),
    ({"RANK": "1", "WORLD_SIZE": "2"}, "but LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"),
    ({"WORLD_SIZE": "2"}, "but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"),
    (TORCH | {"RANK": "2"}, "RANK: found 2, expected less than WORLD_SIZE 2"),
    (TORCH | {"MASTER_PORT": "http"}, "MASTER_PORT: found 'http'"),
]


@pytest.mark.parametrize(("environ", "expected"), REFUSED)
def test_several_tasks_that_cannot_be_brought_together_are_refused(environ, expected, monkeypatch):
    monkeypatch.setattr(launchers.importlib.util, "find_spec", lambda name: None)  # no mpi4py
    with pytest.raises(UserError) as error:
        launchers.find_ranks(environ)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_an_evaluation_in_a_batch_script_is_one_process():
    assert launchers.find_ranks(BATCH | {"SLURM_NTASKS": "8"}, may_be_alone=True)["WORLD_SIZE"] == "1"


def test_two_starts_on_one_machine_meet_at_ports_of_their_own():
    ports = {launchers.find_ranks(SLURM | THIRD | {"SLURM_STEP_ID": str(step)})["MASTER_PORT"] for step in range(20)}
    assert len(ports) == 20 and all(10_000 <= int(port) < 30_000 for port in ports)
    assert launchers.find_ranks(SLURM | THIRD | {"MASTER_PORT": "1234"})["MASTER_PORT"] == "1234"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[007-010,012]", "gpu007"),
        ("gpu[3,5-9],login[1-2]", "gpu3"),
        ("rack[1-2]node[03-04],x", "rack1node03"),
    ],
)
def test_the_first_host_of_a_list_of_nodes(nodes, first):
    assert launchers.first_host(nodes) == first


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [dist.gpu_of(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    with pytest.raises(UserError, match="rank 1 of this machine has no GPU: it has 1"):
        dist.gpu_of(1, 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert dist.gpu_of(3, 1) == 0, "srun --gpus-per-task=1 shows one to each"
    with pytest.raises(UserError, match="rank 4 of this machine has no GPU: it has 4"):
        dist.gpu_of(4, 4)


def test_what_differs_between_ranks_is_listed():
    first = {"train.lr": 1, "train.seed": 2, "code.train.py": "ab"}
    assert dist.differences(dict(first), first) == []
    assert dist.differences(first | {"train.lr": 3}, first) == ["train.lr is 3 instead of 1"]
    assert dist.differences(first | {"new": "x"}, first) == ["new is 'x' instead of nothing"]
    assert dist.differences({"train.lr": 1, "train.seed": 2}, first) == ["code.train.py is nothing instead of 'ab'"]
    many = {f"key{number}": number for number in range(9)}
    assert dist.differences({}, many)[-1] == "4 more"


def test_a_rank_keeps_its_place_on_its_machine_when_deepspeed_is_told_its_gpu(monkeypatch):
    """srun --gpus-per-task=1: each rank has a GPU number 0, and its share of what a machine's ranks do together."""
    environ = SLURM | THIRD | {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2"}
    environ |= {"CUDA_VISIBLE_DEVICES": "1", "OMP_NUM_THREADS": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    monkeypatch.setattr(dist.os, "environ", environ)
    monkeypatch.setattr(dist, "local_place", (0, 1))
    monkeypatch.setattr(dist.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(dist.torch.cuda, "set_device", lambda device: None)
    for _ in range(2):  # a second call finds what the first has written
        device, rank, world_size = dist.init_process()
        assert (device.index, rank, world_size, dist.local_place) == (0, 5, 6, (1, 2))
    assert environ["LOCAL_RANK"] == environ["OMPI_COMM_WORLD_LOCAL_RANK"] == "0"


def test_an_accelerator_that_is_not_the_models_is_refused(monkeypatch):
    """DS_ACCELERATOR=cpu, left over on a machine with a GPU, on which the model would then run."""
    monkeypatch.setattr(dist.os, "environ", dict(os.environ, DS_ACCELERATOR="cpu"))
    monkeypatch.setattr(dist, "local_place", (0, 1))
    monkeypatch.setattr(dist.torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"^DS_ACCELERATOR: found cpu on a machine with a GPU.*unset it"):
        dist.init_process(may_be_alone=True)

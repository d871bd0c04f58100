"""A real Slurm on the nodes of tests/helpers/nodes.py: munged and slurmd on each, slurmctld on node1."""

import os
import re

from tests.helpers.nodes import wait_for

CONFIG = """ClusterName=nodes
SlurmctldHost=node1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=/run/munge/munge.socket.2,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%h.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=30
JobRequeue=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
NodeName=node[1-{count}] CPUs=2 RealMemory=2000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=node[1-{count}] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes=node[1-{count}] MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""
GRACE = 60  # seconds from the notice that a job of the partition `urgent` takes the nodes, to the end of their job
# Begins on a node: $1 its number, $2 the folder. A second call, after a node was started again, does the same.
BEGIN = """
mkdir -p /run/munge /run/slurmd /etc/slurm && chmod 755 /run/munge
install -m 400 $2/munge.key /run/munge.key && mount --bind $2 /etc/slurm
munged --force --key-file=/run/munge.key --socket=/run/munge/munge.socket.2 --pid-file=/run/munge/munged.pid \
    --log-file=/run/munge/munged.log --seed-file=/run/munge/seed || exit
[ $1 != 1 ] || slurmctld -c || exit
slurmd -N node$1
"""
COMMANDS = ("slurmctld", "slurmd", "srun", "munged")  # for skip_without


class Slurm:
    """Slurm on `nodes`. It ends with them."""

    def __init__(self, nodes):
        self.nodes, self.folder = nodes, nodes.folder / "slurm"
        (self.folder / "state").mkdir(parents=True)
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "slurm.conf").write_text(CONFIG.format(folder=self.folder, count=nodes.count, grace=GRACE))
        for number in range(1, nodes.count + 1):
            self.begin(number)
        wait_for(lambda: self.call("sinfo", "-h", "-o", "%D %T") == f"{nodes.count} idle", 60, "an idle Slurm")

    def begin(self, number):
        """Start a node's daemons, again after it was started again."""
        self.nodes.run(number, ["bash", "-c", BEGIN, "begin", number, self.folder], check=True, timeout=60)

    def call(self, *words):
        """The output of one of Slurm's commands, called on node1."""
        return self.nodes.run(1, words, timeout=60).stdout.strip()

    def submit(self, *words, cwd, **variables):
        """The number of a job that `sbatch WORDS...` submits in the folder `cwd`."""
        done = self.nodes.run(1, ["sbatch", "--parsable", *words], cwd=cwd, check=True, **variables)
        return int(done.stdout)

    def job(self, number):
        """{name: value} of a job, as scontrol says it."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", number)))

    def wait(self, number, states=("COMPLETED",), seconds=180):
        """The facts of a job that has come into one of these states."""
        wait_for(lambda: self.job(number).get("JobState") in states, seconds, f"{states} of job {number}")
        return self.job(number)

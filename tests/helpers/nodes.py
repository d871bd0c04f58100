"""Several machines on one: each node has its own network, hostname, processes, /dev/shm, /run, mounts and sshd.

Nodes are Linux namespaces, so this needs root. They reach each other as node1 (10.77.0.1), node2 ... over a bridge in a
namespace of its own: sets of nodes do not see each other, nor the machine's network. All files are shared, but for what
`Nodes(own=...)` and `bind` make a node's own. Everything ends with the process that made it.
"""

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.processes import BIN, ROOT, environment

PACKAGES = {  # command: Debian's package
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "srun": "slurm-client",
    "munged": "munge",
    "mpirun": "openmpi-bin",
}
SSH_CONFIG = """Host *
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
SSHD_CONFIG = """HostKey {folder}/hostkey
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
MaxStartups 100
"""
# The first process of a node, inside its namespaces: $1 its number, $2 the folder, $3 the folder that is its own.
INIT = """
mount --make-rprivate / && hostname node$1 && mount -t proc proc /proc
mount --bind $2/hosts /etc/hosts
mkdir -p /root/.ssh && mount --bind $2/ssh /root/.ssh
mount -t tmpfs shm /dev/shm && mount -t tmpfs run /run && mkdir /run/sshd
[ -z "$3" ] || mount --bind $2/disk$1 "$3"
/usr/sbin/sshd -f $2/sshd_config -E $2/sshd$1.log
trap : TERM INT HUP
touch $2/up$1
while :; do sleep 3600 & wait $!; done
"""


def skip_without(*commands):
    """Skip the test where namespaces are not allowed or a command is missing, with the reason."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = sorted({PACKAGES[name] for name in ("ip", "sshd", "ssh", *commands) if not shutil.which(name, path=path)})
    if missing:
        pytest.skip(f"not installed: {' '.join(missing)}")
    probe = subprocess.run(["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip(f"no namespaces: {probe.stderr.decode().strip()}")


def in_namespaces(*words):
    """A process that ends with this one; what it forks by unshare --kill-child ends too."""
    return subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *map(str, words)], stdin=subprocess.DEVNULL)


def wait_for(condition, seconds=20, what="it"):
    """The first true result of condition(). Fails after that many seconds."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{what} did not come within {seconds} s"
        time.sleep(0.05)
    return found


class Nodes:
    """A context: nodes node1 ... node<count>. folder: where keys and logs are written.

    own: a folder, of which each node gets its own copy in the same place."""

    def __init__(self, folder, count=2, own=None):
        self.folder, self.count, self.own = Path(folder).resolve(), count, own and Path(own).resolve()
        self.networks = []  # processes that hold the bridge's network and the nodes' networks
        self.machines = [None] * (count + 1)  # (the process that unshares, the node's first process)

    def __enter__(self):
        folder = self.folder
        (folder / "ssh").mkdir(mode=0o700, parents=True)
        for key in ("ssh/id_ed25519", "hostkey"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
        shutil.copy(folder / "ssh/id_ed25519.pub", folder / "ssh/authorized_keys")
        (folder / "ssh/config").write_text(SSH_CONFIG)
        (folder / "ssh/config").chmod(0o600)
        (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
        names = [f"10.77.0.{number} node{number}" for number in range(1, self.count + 1)]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            for number in range(self.count + 1):
                self.add_network(number)
            for number in range(1, self.count + 1):
                if self.own:
                    shutil.copytree(self.own, folder / f"disk{number}", symlinks=True)
                self.boot(number)
            stack.pop_all()
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """End all nodes."""
        for number in range(1, self.count + 1):
            self.crash(number)
        for process in self.networks:
            process.kill()
            process.wait()

    def add_network(self, number):
        """The network of a node, joined to the bridge; 0: the network with the bridge."""
        holder = in_namespaces("unshare", "--net", "sleep", "infinity")
        self.networks.append(holder)
        own = os.stat("/proc/self/ns/net").st_ino
        wait_for(lambda: os.stat(f"/proc/{holder.pid}/ns/net").st_ino != own, what="a network namespace")
        if number == 0:
            self.ip(0, "link add br0 type bridge")
            self.ip(0, "link set br0 up")
            return
        self.ip(0, f"link add port{number} type veth peer name eth0 netns {holder.pid}")
        self.ip(0, f"link set port{number} master br0 up")
        self.ip(number, f"addr add 10.77.0.{number}/24 dev eth0")
        self.ip(number, "link set lo up")
        self.ip(number, "link set eth0 up")

    def ip(self, number, words):
        network = f"--net=/proc/{self.networks[number].pid}/ns/net"
        subprocess.run(["nsenter", network, "ip", *words.split()], check=True, timeout=20)

    # -- one node

    def boot(self, number):
        """Start a node, again after `crash`."""
        up = self.folder / f"up{number}"
        up.unlink(missing_ok=True)
        network = f"--net=/proc/{self.networks[number].pid}/ns/net"
        unshare = ["unshare", "--uts", "--mount", "--ipc", "--pid", "--fork", "--kill-child=KILL"]
        words = ["bash", "-c", INIT, "init", number, self.folder, self.own or ""]
        outer = in_namespaces("nsenter", network, *unshare, *words)
        self.machines[number] = outer, None
        wait_for(up.exists, what=f"node{number}")
        self.machines[number] = outer, psutil.Process(outer.pid).children()[0].pid

    def crash(self, number):
        """kill -9 all processes of a node. Its kernel lives on and closes their connections; `cut` it first to have a
        power cut."""
        if self.machines[number]:
            outer, first = self.machines[number]
            with contextlib.suppress(ProcessLookupError):
                os.kill(first or outer.pid, 9)
            outer.kill()
            outer.wait()
            self.machines[number] = None

    def cut(self, number):
        """Pull a node's network cable."""
        self.ip(0, f"link set port{number} down")

    def heal(self, number):
        self.ip(0, f"link set port{number} up")

    def bind(self, number, source, target):
        """Let one node alone see the folder or file `source` at `target`."""
        self.run(number, ["mount", "--bind", source, target], check=True)

    # -- commands on a node

    def command(self, number, words, cwd=ROOT):
        """The words of a command that runs on a node; the virtual environment's commands come first on its path."""
        _, first = self.machines[number]
        enter = ["nsenter", "-t", first, "--mount", "--uts", "--ipc", "--net", "--pid"]
        path = f"PATH={BIN}:/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
        return [str(word) for word in (*enter, "env", "-C", cwd, path, *words)]

    def run(self, number, words, timeout=300, check=False, cwd=ROOT, **variables):
        """Run a command on a node to its end. Returns a CompletedProcess with its output in one text."""
        done = subprocess.run(
            self.command(number, words, cwd),
            env=environment(**variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, done.stdout
        return done

    def start(self, number, words, output, cwd=ROOT, **variables):
        """Start a command on a node; its output is added to the file `output`. Returns a Popen: a process that waits
        for the command, with its exit code; `signal` reaches the command itself."""
        with open(output, "a") as file:
            return subprocess.Popen(
                self.command(number, words, cwd),
                env=environment(**variables),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @staticmethod
    def signal(process, number):
        """Send a signal to the command of a process that `start` returned, and to nothing else."""
        for child in psutil.Process(process.pid).children():
            child.send_signal(number)

    def processes(self, number):
        """psutil's processes of a node, with the machine's ids: os.kill reaches them."""
        outer, _ = self.machines[number]
        inside = os.stat(f"/proc/{self.machines[number][1]}/ns/pid").st_ino
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError):
                if process.pid != outer.pid and os.stat(f"/proc/{process.pid}/ns/pid").st_ino == inside:
                    found.append(process)
        return found

    def find(self, number, *words):
        """The processes of a node whose command line has all these words."""
        found = []
        for process in self.processes(number):
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if all(word in line for word in words):
                    found.append(process)
        return found

    def hostfile(self, slots=1):
        """A hostfile of all nodes, in its path."""
        path = self.folder / f"hosts_{slots}"
        path.write_text("".join(f"node{number} slots={slots}\n" for number in range(1, self.count + 1)))
        return path

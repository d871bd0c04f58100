"""Requests to stop a run, and ranks that die or hang: one thread a rank that watches over it."""

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import psutil
from torch import distributed

from minzero import checkpoint_folder, dist
from minzero.errors import UserError
from minzero.meeting import in_words

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed.run", "slurmstepd", "orted", "prted", "hydra_pmi_proxy")
SIGNS_OF_LIFE = 10.0  # seconds from one of a rank to the next, and between two looks at those of the others
DURING = {"start": "at the start", "step": "in a step", "evaluation": "in an evaluation", "save": "in a save"}
LOST = 120.0  # seconds without one, after which a rank is lost: its machine has crashed, or the network is cut


def end_process(reason, code, out_dir, folder=None):
    """Print in one line why this rank ends, write it into the status of the run's folder, and call os._exit: a normal
    exit would wait for ranks that are gone."""
    remedy = "no checkpoint was saved yet"
    with contextlib.suppress(OSError, UserError):
        if found := checkpoint_folder.find(out_dir):
            remedy = f"resume from {found}"
    if folder:
        with contextlib.suppress(OSError, UserError):
            folder.report("stopped" if code == 130 else "failed", reason=reason)
    with contextlib.suppress(OSError):  # the terminal may be gone too
        print(f"train.py: rank {os.environ.get('RANK', '0')} {reason}; {remedy}", file=sys.stderr, flush=True)
    os._exit(code)


def is_gone(process):
    """Whether a psutil.Process has ended."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:  # another user's process, so it is there
        return False


def launchers():
    """The processes above this one that belong to the launcher that started it. When somebody ends the `deepspeed`
    command, or a node's part of it, the ranks are not told: they are left as orphans."""
    found = []
    for process in psutil.Process().parents()[:3]:
        with contextlib.suppress(psutil.Error):
            words = [os.path.basename(word) for word in process.cmdline()[:4]]
            if any(name in word for word in words for name in LAUNCHERS):
                found.append(process)
    return found


def is_orphan():
    """Whether the launcher of this process has ended already, while this one was importing libraries. Both launchers
    start ranks as children of their own."""
    if not {"CROSS_RANK", "TORCHELASTIC_RUN_ID"} & os.environ.keys():  # set by DeepSpeed's and torchrun's
        return False
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process().parent()
        return parent is not None and (parent.pid == 1 or parent.name() == "systemd") and not launchers()
    return False


def machine():
    """What the processes have in common that see each other by their ids: the machine, by its name, which may repeat,
    and its boot, and the PID namespace, which a container has of its own."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    is_own_proc = os.readlink("/proc/self") == str(os.getpid())  # else it shows another namespace's processes
    return socket.gethostname(), boot, os.readlink("/proc/self/ns/pid"), None if is_own_proc else os.getpid()


def tell_peers(store, ranks):
    """Write into the store, for each machine, rank 0's host and the ranks on that machine with their process ids.
    Returns the hosts by rank. For rank 0 alone."""
    places = [json.loads(text) for text in store.multi_get([f"place/{rank}" for rank in range(ranks)])]
    hosts = [json.loads(place)[0] for place, _ in places]
    on_machine = defaultdict(list)
    for rank, (place, pid) in enumerate(places):
        on_machine[place].append((rank, pid))
    for place, pids in on_machine.items():
        store.set(f"peers/{place}", json.dumps([hosts[0], pids]))
    return hosts


def limits(train):
    """Seconds without progress after which a run ends, by what it does. train: the train section."""
    return {
        "start": train.start_timeout_seconds,
        "step": train.timeout_seconds,
        "evaluation": train.eval_timeout_seconds or train.timeout_seconds,
        "save": train.save_timeout_seconds or train.timeout_seconds,
    }


class Watchdog:
    """Notices, in a thread of its own, what asks this run to stop: Ctrl-C, SIGTERM, SIGUSR1, SIGHUP, a file STOP in the
    run's folder, or that the launcher has gone. `reason` then says what, and the loop saves and ends when all ranks
    know. A second Ctrl-C, and any signal before the loop has begun, ends the run at once.

    A thread, woken by a pipe, because a rank that waits in NCCL or gloo for another never comes back to
    Python's signal handlers. So it also ends this rank where the loop no longer can: the launcher sends
    SIGTERM as well when a rank has died, and a rank that hangs is named after `timeout` seconds without progress of
    any rank. What counts as progress calls `heartbeat`, as a tensor that is saved or loaded, or `turn`, which all ranks
    call equally often: a micro-batch, a batch of an evaluation, the begin of an exchange with the other ranks. The rank
    that hangs has had fewer turns than those that wait for it. The thread itself gives a sign of life every ten
    seconds, whatever its rank does: where there is no progress, a rank without these is lost, long before
    `timeout`."""

    def __init__(self, train):
        self.out_dir = Path(train.out_dir)
        self.limits = limits(train)
        self.doing = "start"  # a key of `limits`
        self.reason = None  # why the run is asked to stop
        self.rank = int(os.environ.get("RANK") or 0)
        self.folder = None  # the RunFolder, once there is one
        self.is_stopped = False
        # ---- signals
        self.loop_has_begun = False
        self.first_ctrl_c = None  # when it came
        # ---- progress, of this rank and of all
        self.peers = None  # {rank: process} of this machine, once the ranks have met
        self.heartbeats = self.turns = 0
        self.published = 0  # of them, in the store
        self.last_heartbeat = time.monotonic()
        self.heartbeats_of_all = None  # their sum
        self.last_look = 0.0  # at the heartbeats of all
        self.last_asked = 0.0  # whether another rank has ended
        self.signs = 0  # of life, of this rank
        self.last_sign = 0.0  # when it gave one
        self.ranks = 1  # how many
        self.hosts = []  # by rank, on rank 0
        self.host_of_0 = None
        self.last_roll_call = 0.0
        self.signs_of_all = {}  # {rank: (its signs, when rank 0 saw them)}
        self.store_answered = 0.0  # when

    # -- called by the main thread -------------------------------------------------------------------

    def start(self):
        """Catch the signals and start the thread. Returns self."""
        self.launchers = launchers()
        if is_orphan():
            self.reason = "the end of its launcher"
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        signal.set_wakeup_fd(self.writer)
        for number in (signal.SIGINT, *STOP_SIGNALS):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks of SIGHUP
                signal.signal(number, lambda *_: None)
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        return self

    def register_peers(self):
        """From here on a rank that makes no progress is noticed. Every rank must call this."""
        self.rank, self.ranks = distributed.get_rank(), distributed.get_world_size()
        store, own = dist.common_store(), json.dumps(machine())
        store.set(f"place/{self.rank}", json.dumps([own, os.getpid()]))
        self.publish_heartbeats()
        distributed.barrier()
        if self.rank == 0:  # it alone reads the places of all
            self.hosts = tell_peers(store, self.ranks)
        self.host_of_0, pids = json.loads(store.get(f"peers/{own}"))
        self.last_heartbeat = self.store_answered = time.monotonic()
        peers = {}
        for rank, pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):  # it will be missed soon enough
                peers[rank] = psutil.Process(pid)
        self.peers = peers
        dist.begins_exchange = self.turn

    def begin_loop(self):
        """From here on stop requests wait for the end of a step."""
        self.heartbeat()
        self.loop_has_begun = True

    def end_start(self):
        """The first step is done: what is compiled at first use is compiled."""
        if self.doing == "start":
            self.heartbeat()
            self.doing = "step"

    @contextlib.contextmanager
    def during(self, doing):
        """A context for an evaluation or a save, which have a limit of their own."""
        before = self.doing
        self.heartbeat()
        self.doing = doing
        try:
            yield
        finally:
            self.heartbeat()
            self.doing = before

    def heartbeat(self):
        """This rank makes progress."""
        self.heartbeats += 1
        self.last_heartbeat = time.monotonic()

    def turn(self):
        """This rank makes progress, with something that each rank does equally often."""
        self.turns += 1
        self.heartbeat()

    def stop(self):
        """No more watching. The thread must be gone before the interpreter is: one that the interpreter's end
        finds inside torch's store takes the process down with `terminate called`."""
        self.is_stopped = True
        os.write(self.writer, b"\0")
        self.thread.join()

    def end_alone(self, reason):
        """End this rank, which has lost contact with another."""
        end_process(reason, 1, self.out_dir, self.folder)

    def wait_until_others_know(self):
        """Call on a rank that ends by a fault of its own, which it prints itself. Rank 0 keeps the ranks' common store
        until the others have read the reason there: until those on this machine are gone, or for ten seconds."""
        self.is_stopped = True
        began = time.monotonic()
        others = [process for rank, process in (self.peers or {}).items() if rank != self.rank]
        while self.rank == 0 and time.monotonic() - began < 10 and self.peers and distributed.get_world_size() > 1:
            if len(others) + 1 == distributed.get_world_size() and all(map(is_gone, others)):
                break
            time.sleep(0.2)

    # -- the thread ----------------------------------------------------------------------------------

    def run(self):
        published_at = 0.0
        while not self.is_stopped:
            # ---- what asks this run to stop
            ready, _, _ = select.select([self.reader], [], [], 0.5)
            for number in filter(None, os.read(self.reader, 64) if ready else b""):
                self.receive(number)
            self.look_for_stop_file()
            if any(is_gone(process) for process in self.launchers):
                self.reason = self.reason or "the end of its launcher"
            if self.peers is None or self.is_stopped:
                continue
            # ---- where the loop can no longer stop: another rank is gone, has a fault, or hangs
            dead = [rank for rank, process in self.peers.items() if is_gone(process)]
            if self.reason and dead and not self.is_stopped:
                end_process(f"stopped by {self.reason}: rank {dead[0]} is gone", 1, self.out_dir, self.folder)
            pause = min(self.ranks / 100, self.timeout / 20)  # so rank 0 hears of 100 ranks in a second, not of all
            if self.heartbeats > self.published and time.monotonic() - published_at > pause:
                published_at = time.monotonic()
                self.publish_heartbeats()
            self.end_with_other_rank()
            self.give_sign_of_life()
            self.end_without_lost_rank()
            timeout = self.timeout
            if self.seconds_without_progress() > timeout / 2:
                self.count_progress_of_others()
            if self.seconds_without_progress() > timeout:
                reason = f"waited {timeout:g} s {DURING[self.doing]}: {self.who_hangs()}"
                end_process(reason, 1, self.out_dir, self.folder)

    def receive(self, number):
        """A signal: a request to stop, or where the loop cannot answer it, the end of this rank."""
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if not self.loop_has_begun:
            end_process(f"stopped by {name}", 130, self.out_dir, self.folder)
        if number == signal.SIGINT:
            # a terminal and a launcher may both pass on the same Ctrl-C
            if self.first_ctrl_c and time.monotonic() - self.first_ctrl_c > 1:
                end_process("stopped by a second Ctrl-C", 130, self.out_dir, self.folder)
            if self.first_ctrl_c is None:
                dist.print0("Ctrl-C: saving and ending after this step; once more ends at once")
            self.first_ctrl_c = self.first_ctrl_c or time.monotonic()
        self.reason = self.reason or name

    def look_for_stop_file(self):
        """A file STOP in the run's folder is a request to stop, and is deleted."""
        file = self.out_dir / "STOP"
        with contextlib.suppress(OSError):  # a network file system may answer the next time
            if self.rank == 0 and file.exists():
                self.reason = self.reason or str(file)
                file.unlink()

    @property
    def timeout(self):
        return self.limits[self.doing]

    def seconds_without_progress(self):
        return time.monotonic() - self.last_heartbeat

    def give_sign_of_life(self):
        now = time.monotonic()
        if now - self.last_sign > SIGNS_OF_LIFE and self.ranks > 1:
            self.last_sign = now
            self.signs += 1
            if dist.ask_store(lambda store: store.set(f"sign/{self.rank}", str(self.signs)) or True):
                self.store_answered = now

    def end_without_lost_rank(self):
        """End this rank where another is lost. Rank 0 looks at all signs of life and tells the others, which look
        whether rank 0's machine still answers."""
        if self.seconds_without_progress() < 2 * SIGNS_OF_LIFE or self.ranks < 2:
            self.signs_of_all = {}
            return
        now = time.monotonic()
        if self.rank:
            if now - self.store_answered > LOST and not self.is_stopped:
                self.end_lost([0], [self.host_of_0])
            return
        if now - self.last_roll_call < SIGNS_OF_LIFE:
            return
        self.last_roll_call = now
        keys = [f"sign/{rank}" for rank in range(self.ranks)]
        signs = dist.ask_store(lambda store: store.multi_get(keys)) or []
        for rank, sign in enumerate(signs):
            if rank not in self.signs_of_all or self.signs_of_all[rank][0] != sign:
                self.signs_of_all[rank] = sign, now
        lost = [rank for rank, (_, seen) in self.signs_of_all.items() if now - seen > LOST]
        if lost and not self.is_stopped:
            dist.ask_store(lambda store: store.set("lost", "1"))
            time.sleep(max(3, self.ranks / 50))  # until the others have read it in the store, which ends with this
            self.end_lost(lost, [self.hosts[rank] for rank in lost])

    def end_lost(self, ranks, hosts):
        """End this rank without others, which are lost. hosts: theirs. Of each machine one rank says so."""
        hosts = ", ".join(sorted(set(hosts))[:8])
        if dist.local_place[0]:
            os._exit(1)
        words = f"lost contact with {in_words(ranks)} on {hosts}: no sign of life for {LOST:g} s"
        end_process(f"{words}; look at that machine and its network", 1, self.out_dir, self.folder)

    def end_with_other_rank(self):
        """End this rank, without a word, where another has ended by a fault, which that one prints."""
        now = time.monotonic()
        if self.seconds_without_progress() > 2 and now - self.last_asked > max(1, self.ranks / 100):
            self.last_asked = now
            if (fault := dist.published_fault()) and fault.said_by != self.rank and not self.is_stopped:
                os._exit(2)
            if self.rank and dist.ask_store(lambda store: store.check(["lost"])) and not self.is_stopped:
                os._exit(1)

    def publish_heartbeats(self):
        """Tell the store this rank's turns, and add its new heartbeats to those of all."""
        turns, new = self.turns, self.heartbeats - self.published
        self.published += new
        dist.ask_store(lambda store: (store.set(f"turns/{self.rank}", str(turns)), store.add("beats", new)))

    def read_turns(self):
        """The number of turns of each rank, or None if rank 0 does not answer."""
        keys = [f"turns/{rank}" for rank in range(distributed.get_world_size())]
        return dist.ask_store(lambda store: [int(value) for value in store.multi_get(keys)])

    def count_progress_of_others(self):
        """Progress of another rank, which this one may be waiting for, counts as its own."""
        if time.monotonic() - self.last_look < min(self.timeout / 10, 60):
            return
        self.last_look = time.monotonic()
        heartbeats = dist.ask_store(lambda store: store.add("beats", 0))
        if self.heartbeats_of_all is not None and heartbeats is not None and heartbeats != self.heartbeats_of_all:
            self.last_heartbeat = time.monotonic()
        self.heartbeats_of_all = heartbeats

    def who_hangs(self):
        """The ranks that hang, in words. The first rank that counts them writes the words into the store: not all of
        many ranks that end at once read the turns of all."""
        known = dist.ask_store(lambda store: store.check(["hangs"]) and store.get("hangs").decode())
        if known:
            return known
        turns = self.read_turns()
        if turns is None:
            return "rank 0 does not answer"
        words = "no rank makes progress"
        last = [rank for rank, count in enumerate(turns) if count == min(turns)]
        if len(last) < len(turns):
            hosts = sorted(self.hosts_of(last))
            verb = "hangs" if len(last) == 1 else "hang"
            words = f"{in_words(last)} {verb}{' on ' if hosts else ''}{', '.join(hosts[:8])}"
        dist.ask_store(lambda store: store.set("hangs", words))
        return words

    def hosts_of(self, ranks):
        """The machines of some ranks, as far as rank 0 answers."""
        places = dist.ask_store(lambda store: store.multi_get([f"place/{rank}" for rank in ranks]))
        return {json.loads(json.loads(text)[0])[0] for text in places or []}

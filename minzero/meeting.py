"""The ranks meet in a store that all reach: each says that it has come, on which machine, and why it cannot take part
if it cannot. Before the process group, so that a rank without a GPU, or one that never comes, is named in minutes.
"""

import contextlib
import json
import os
import socket
import time
from datetime import timedelta

from torch import distributed

from minzero.errors import SharedError, UserError

SILENT = 30.0  # seconds that rank 0 waits for the others before it says so
GRACE = 30.0  # seconds by which the other ranks wait longer than rank 0, which knows who is missing
UNREACHABLE = "is rank 0's machine up, and does it let this one reach that port? docs/clusters.md"


def open_store(rank, world_size, seconds):
    """The store of all ranks, on rank 0's machine; torchrun's agent keeps it where there is one. A run of one process
    opens no port. Raises UserError if rank 0's machine does not answer for some seconds."""
    if world_size == 1:
        return distributed.HashStore()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    keeps = rank == 0 and not of_agent
    if not keeps:
        wait_for_port(address, port, seconds + GRACE)
    try:
        store = distributed.TCPStore(
            address, port, world_size, keeps, timedelta(seconds=seconds), wait_for_workers=False, multi_tenant=True
        )
    except distributed.DistError as error:
        reason = str(error).splitlines()[0]
        remedy = "if another run uses that port, choose one with deepspeed --master_port or MASTER_PORT"
        remedy = remedy if keeps else UNREACHABLE
        raise UserError(f"ranks could not meet at {address}:{port} ({reason}); {remedy}") from None
    return distributed.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def wait_for_port(address, port, seconds):
    """Wait until rank 0's store listens. torch's client would, when its time is over, wait for another such time, and
    print where in its code. Raises UserError after some seconds."""
    end, pause = time.monotonic() + seconds, 0.1
    while True:
        left = end - time.monotonic()
        try:
            return socket.create_connection((address, port), timeout=max(1.0, min(10.0, left))).close()
        except OSError as error:  # also a name that is not known yet
            if left < 0:
                reason = f"{error.strerror or error} for {seconds:g} s"
                raise UserError(f"ranks could not meet at {address}:{port} ({reason}); {UNREACHABLE}") from None
        time.sleep(pause)
        pause = min(1.5 * pause, 1.0)


def meet(store, rank, world_size, seconds, fault=None):
    """Wait until all ranks have come. fault: why this rank cannot take part, in one line.

    Raises SharedError on all ranks, with one line, if one of them cannot take part, or has not come within some
    seconds. Rank 0 alone reads what all have said, so the work of every other rank does not grow with their number."""
    if world_size == 1:
        if fault:
            raise UserError(fault)
        return
    try:
        store.set(f"rank {rank}", json.dumps([socket.gethostname(), fault]))
        store.add("come", 1)
        if rank == 0:
            verdict = wait_for_all(store, world_size, seconds) or fault_of_all(store, world_size)
            store.set("verdict", verdict or "none")
        else:
            store.wait(["verdict"], timedelta(seconds=seconds + GRACE))
            verdict = store.get("verdict").decode().removeprefix("none")
    except distributed.DistError as error:
        raise UserError(f"lost contact with rank 0 before the start ({str(error).splitlines()[0]})") from None
    if verdict:
        leave(store, rank)
        raise SharedError(verdict)


def wait_for_all(store, world_size, seconds):
    """Rank 0 waits for all ranks. Returns the line about those that have not come within some seconds, or None."""
    began = time.monotonic()
    said = False
    while (come := store.add("come", 0)) < world_size:
        waited = time.monotonic() - began
        if waited > SILENT and not said:
            said = True
            with contextlib.suppress(OSError):
                print(f"waiting for {in_words(missing_ranks(store, world_size))} of {world_size} to start", flush=True)
        if waited > seconds:
            missing = missing_ranks(store, world_size)
            hosts = ", ".join(sorted({host for host, _ in said_by(store, set(range(world_size)) - set(missing))})[:8])
            return (
                f"{in_words(missing)} of {world_size} did not start within {seconds:g} s; {come} did, on {hosts}; look "
                "for an error of the others, or raise train.meet_timeout_seconds"
            )
        time.sleep(0.1)
    return None


def missing_ranks(store, world_size):
    return [rank for rank in range(world_size) if not store.check([f"rank {rank}"])]


def said_by(store, ranks):
    """(host, fault or None) of each of these ranks."""
    return [json.loads(text) for text in store.multi_get([f"rank {rank}" for rank in sorted(ranks)])]


def fault_of_all(store, world_size):
    """The first rank's fault, or None."""
    said = said_by(store, range(world_size))
    first = next((rank for rank, (_, fault) in enumerate(said) if fault), None)
    if first is None:
        return None
    host, line = said[first]
    return with_place(line, first, host, all(fault == line for _, fault in said))


def with_place(fault, rank, host, found_by_all):
    """A fault's line. It names the rank and its machine, unless all ranks found the same."""
    return fault if found_by_all else f"rank {rank} on {host}: {fault}"


def leave(store, rank):
    """Rank 0, which may keep the store, ends last: when the others have read the verdict, or after five seconds."""
    with contextlib.suppress(distributed.DistError):
        left = store.add("left", 1)
        began = time.monotonic()
        while rank == 0 and left < store.add("come", 0) and time.monotonic() - began < 5:
            time.sleep(0.1)
            left = store.add("left", 0)


def in_words(ranks):
    """[1, 2, 3, 7] -> `ranks 1 to 3, 7`."""
    runs = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    pieces = [str(first) if first == last else f"{first} to {last}" for first, last in runs]
    if len(pieces) > 8:
        pieces[8:] = [f"and {len(pieces) - 8} more groups"]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(pieces)}"

"""The nodes of a supervised run: a hostfile with spares, which of them answer, and which one a failure came from.

A hostfile is DeepSpeed's: a line a node, `node1 slots=8`, with empty lines and lines that begin with #.
"""

import re
import shutil
import subprocess
import time
from pathlib import Path

from minzero.errors import UserError

FAILURES = 2  # after so many a node is left out, or a spare taken in its place
SSH_SECONDS = 15  # that a node may take to answer
LINE = re.compile(r"(\S+)\s+slots=([1-9][0-9]{0,5})\s*(#.*)?")
# What the launcher's log says about a node. DeepSpeed's launcher prints a rank's exit code, negative for a signal that
# killed it; a rank that only lost the others ends with 1. pdsh prints ssh's exit code: 255 is ssh's own failure.
NAMES_NODE = (
    re.compile(r"^pdsh@\S+: (?P<node>\S+): ssh exited with exit code 255"),
    re.compile(r"^(?P<node>\S+): .*exits with return code = -\d+"),
    re.compile(r"train\.py: error: rank \d+ on (?P<node>[\w.-]+)[: ]"),
)
NAMES_NODES = (
    re.compile(r"train\.py: rank \d+ lost contact with ranks? .* on (?P<nodes>[\w., -]+): no sign of life"),
    re.compile(r"\branks? [\d, to]+ hangs? on (?P<nodes>[\w.-]+(?:, [\w.-]+)*)"),
)
NAMES_RANK = re.compile(r"\brank (?P<rank>\d+) (?:hangs|is gone)")


def read_hostfile(path):
    """{node: its slots} of a hostfile, in its order. Raises UserError."""
    nodes = {}
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"--hostfile: {path}: {reason}; expected lines such as `node1 slots=8`") from None
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = LINE.fullmatch(text)
        if not match:
            found = f"--hostfile: {path}: line {number}: found {text[:60]!r}"
            raise UserError(f"{found}, expected a node and its slots, as `node1 slots=8`")
        if match[1] in nodes:
            raise UserError(f"--hostfile: {path}: line {number}: {match[1]} stands twice; remove one of them")
        nodes[match[1]] = int(match[2])
    if not nodes:
        raise UserError(f"--hostfile: {path}: names no node; expected lines such as `node1 slots=8`")
    return nodes


def hostfile_text(nodes):
    """The text of a hostfile. nodes: {node: its slots}."""
    return "".join(f"{node} slots={slots}\n" for node, slots in nodes.items())


def that_answer(nodes, port=None):
    """Those of some nodes on which ssh can run a command within SSH_SECONDS, as a set; all where there is no ssh.
    port: ssh's, if it is not the usual one."""
    if not shutil.which("ssh"):
        return set(nodes)
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_SECONDS - 5}"]
    options += ["-p", str(port)] if port else []
    nowhere = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    asked = {node: subprocess.Popen(["ssh", *options, node, "true"], **nowhere) for node in nodes}
    deadline = time.monotonic() + SSH_SECONDS
    answered = set()
    for node, process in asked.items():
        try:
            if process.wait(max(0.0, deadline - time.monotonic())) == 0:
                answered.add(node)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return answered


def choose(nodes, wanted, failures, answering, divides, ever=None):
    """The nodes of the next start: ({node: its slots}, a line about it or None). Empty if none can be started.

    nodes: of the hostfile, {node: slots}; wanted: how many; failures: {node: how often it failed since the run last got
    further}; answering: the nodes that answer now; divides: whether the batch divides by a number of ranks; ever:
    {node: how often it failed since the run began}.

    A node with FAILURES failures since the run got further is left out, also without a spare: the run does not get
    further with it. Of the others those with fewer failures ever, counted in units of FAILURES, are taken, and of equal
    ones the first in the hostfile's order; without a spare, fewer, if the batch divides by their ranks."""
    ever = ever or {}
    left_out = {node: f"{node} failed {failures[node]} times" for node in nodes if failures.get(node, 0) >= FAILURES}
    left_out |= {node: f"{node} does not answer" for node in nodes if node not in answering}
    usable = sorted((node for node in nodes if node not in left_out), key=lambda node: ever.get(node, 0) // FAILURES)
    reasons = f" ({', '.join(left_out.values())})" if left_out else ""
    for count in range(min(wanted, len(usable)), 0, -1):
        chosen = {node: slots for node, slots in nodes.items() if node in usable[:count]}
        if not divides(sum(chosen.values())):
            continue
        fewer = f" instead of {wanted}" if count < wanted else ""
        often = {node: f"{node} failed {ever[node]} times" for node in usable[count:] if ever.get(node, 0) >= FAILURES}
        reasons = f" ({', '.join((left_out | often).values())})" if left_out | often else ""
        return chosen, f"{count} nodes{fewer}: {', '.join(chosen)}{reasons}"
    if not usable:
        return {}, f"no node can be used{reasons}; repair one, or add a spare to the hostfile"
    ranks = " or ".join(str(sum(nodes[node] for node in usable[:count])) for count in range(1, len(usable) + 1))
    return {}, (
        f"{len(usable)} of {wanted} nodes can be used{reasons}, and train.global_batch_tokens does not divide by "
        f"{ranks} ranks; repair a node, add a spare to the hostfile, or change the batch"
    )


def nodes_that_failed(lines, nodes):
    """The nodes that the log of a start names as the place of its failure, as a set; empty where it names none.
    lines: of the log; nodes: those of the start, {node: its slots}."""
    of_rank = [node for node, slots in nodes.items() for _ in range(slots)]
    found = set()
    for line in lines:
        found |= {match["node"] for pattern in NAMES_NODE if (match := pattern.search(line))}
        for pattern in NAMES_NODES:
            if match := pattern.search(line):
                found |= {*match["nodes"].split(", ")}
        if match := NAMES_RANK.search(line):
            rank = int(match["rank"])
            found |= {of_rank[rank]} if rank < len(of_rank) else set()
    return found & nodes.keys()

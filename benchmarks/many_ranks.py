"""Start, resume and save at many ranks, on one machine: what rank 0 does, and what another rank does.

    python benchmarks/many_ranks.py [64 512 4096] [--config configs/70b.json]

For each number of ranks every rank saves a checkpoint with the code of a run, one after the other in this process, then
rank 0 and one other start, resume, log and save again. A checkpoint has the parameters of the config, with one element
of each in every rank's file: so bytes and seconds are those of names, sums and messages, and not of weights. The
process group and the store are simulated (simulated_ranks.py), the engine holds tensors alone. The other rank is the
one in the middle, which passes on the most when values are merged. Prints Markdown tables.
"""

import math
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.simulated_ranks import Counts, NotYet, Watching, join, leave, received_later
from minzero import checkpoint, dist, goodput, meeting, resume, watchdog
from minzero.checkpoint_folder import find, name_of
from minzero.commands import run_command
from minzero.config.load import load_config
from minzero.flags import FlagParser, at_least
from minzero.planner.gpus import Hardware
from minzero.zero import KINDS, Fragment
from model import GPT

VERDICTS = 10  # blocks of train.py from its start to its loop that all ranks pass or none
STEP = 10  # of the checkpoint
SIGNS = 60  # seconds for which signs of life are counted


def names_of(config):
    """The names of a model's parameters."""
    with torch.device("meta"):
        return [name for name, _ in GPT(config.model).named_parameters()]


class Engine:
    """In place of DeepSpeed's: this rank's part of each parameter, of which every rank has one element."""

    zero_optimization_stage = staticmethod(lambda: 3)
    fp16_enabled = staticmethod(lambda: False)
    train_batch_size = staticmethod(lambda: 1)

    def __init__(self, names, ranks):
        self.ranks = ranks
        shape = SimpleNamespace(shape=[ranks], requires_grad=True)
        self.parameters = dict.fromkeys(names, shape)
        self.module = SimpleNamespace(named_parameters=lambda **_: self.parameters.items())
        self.tensor = torch.zeros(1)

    def fragments(self):
        rank = dist.distributed.get_rank()
        return [Fragment(name, rank, 1, self.tensor, 0, 0) for name in self.parameters]

    def in_memory(self, fragments):
        for fragment in fragments:
            yield fragment, dict.fromkeys(KINDS, self.tensor), {"step": 0}


def use(engine, patch):
    """Let the code of checkpoints see the Engine. patch(object, name, value)."""
    fields = {"optimizer_steps": STEP, "loss_scaler": {}, "tied": {}}
    fields["parameters"] = {name: [engine.ranks] for name in engine.parameters}
    patch(checkpoint, "description", lambda _: fields)
    patch(checkpoint, "local_fragments", lambda _: engine.fragments())
    patch(checkpoint, "fragments_in_memory", lambda _, fragments, changed=False: engine.in_memory(fragments))
    patch(checkpoint, "nvme_swapper", lambda _: None)
    patch(checkpoint, "refresh_weights", lambda _: None)


class Run:
    """A run of many ranks in a folder. Each part is done by the rank that the group is at."""

    def __init__(self, folder, config, names, ranks, patch=setattr):
        self.folder = Path(folder)
        self.config = config
        config.train.out_dir, config.train.allow_changed = str(folder), ["data.path"]
        self.ranks = ranks
        self.group, self.store = join(ranks)
        self.engine = Engine(names, ranks)
        use(self.engine, patch)
        patch(watchdog, "machine", lambda: (f"node{self.group.number // 8}", "boot", "namespace", None))
        patch(dist, "common_store", lambda: self.store)
        patch(dist, "ask_store", lambda action, seconds=5: action(self.store))

    # -- the parts ------------------------------------------------------------------------------------

    def meet(self):
        meeting.meet(self.store, self.group.number, self.ranks, 300)

    def find_peers(self):
        """The ranks of a machine learn of each other; eight are on each."""
        watchdog.Watchdog(self.config.train).register_peers()

    def agree(self):
        """All ranks compare what they must have in common."""
        dist.from_rank_0(Hardware(self.ranks, 1, 1, None))
        dist.reduce(1, dist.distributed.ReduceOp.MIN)
        for _ in range(VERDICTS):
            with dist.all_or_none():
                pass
        dist.refuse_different_ranks(self.config.to_dict())
        dist.refuse_different_ranks(self.config.to_dict() | {"code": dist.code_digests()})

    def resume(self):
        """The checkpoint is chosen, verified by all and loaded."""
        found, state = resume.where_to_start(self.config, SimpleNamespace(fingerprint=dict))
        fault = checkpoint.fault_of(found, state)
        assert fault is None, fault
        checkpoint.load(self.engine, found, state, seed=0)

    def log(self):
        """A line of the log."""
        everyone = dist.gather_numbers(0.1, 1.0)
        if self.group.number == 0:
            goodput.slowest([(*own, "node1") for own in everyone.tolist()], 1.0)

    def save(self, step=STEP):
        state = {"step": step, "tokens": step, "best_val_loss": None, "val_loss": None, "config": self.config.to_dict()}
        state |= {"data": {}, "world_size": self.ranks, "stage": 3, "precision": "bf16"}
        checkpoint.save(self.engine, self.folder / "checkpoints", state, False, 2)

    def watch(self):
        """The signs of life in a minute in which no rank gets further, as while a rank is waited for."""
        watch = watchdog.Watchdog(self.config.train)
        watch.ranks, watch.rank = self.ranks, self.group.number
        for _ in range(int(SIGNS / watchdog.SIGNS_OF_LIFE)):
            watch.last_sign = watch.last_roll_call = -math.inf
            watch.last_heartbeat = -math.inf
            watch.give_sign_of_life()
            watch.end_without_lost_rank()
        for _ in range(int(SIGNS / max(1, self.ranks / 100))):
            watch.last_asked = -math.inf
            watch.end_with_other_rank()
        watch.last_look = -math.inf
        watch.count_progress_of_others()

    # -- all ranks ------------------------------------------------------------------------------------

    def do(self, part, rank, counts):
        """Let one rank do a part, as far as it gets without rank 0. Returns whether it got to the end."""
        self.group.begin(rank, counts)
        with Watching(self.folder, counts):
            try:
                part()
            except NotYet:
                return False
        return True

    def measure(self, part):
        """(Counts of rank 0, Counts of the other rank) in a part that can be repeated."""
        self.group.said_by_0 = []
        for rank in reversed(range(1, self.ranks)):
            self.do(part, rank, Counts())
        zero, other = Counts(), Counts()
        self.do(part, 0, zero)
        assert self.do(part, self.ranks // 2, other), "it waits for what rank 0 does not say"
        return zero, other

    def measure_save(self):
        """As `measure`. Every rank saves, and leaves a whole checkpoint."""
        zero, other = Counts(), Counts()
        self.group.said_by_0 = []
        with Watching(self.folder, zero):
            checkpoint.make_room(self.folder / "checkpoints", name_of(STEP))
        make_room = checkpoint.make_room
        checkpoint.make_room = lambda *_: None  # the others have written already when rank 0 comes to it
        try:
            for rank in reversed(range(self.ranks)):
                self.do(self.save, rank, {0: zero, self.ranks // 2: other}.get(rank, Counts()))
        finally:
            checkpoint.make_room = make_room
        self.group.heard = 0
        received_later(self.group, other)
        return zero, other

    def measure_weights(self):
        """Counts of one process that reads and checks all weights, as eval.py, sample.py and export.py do."""
        counts = Counts()
        with Watching(self.folder, counts):
            _, _, read = checkpoint.open_weights(find(self.folder))
            for name in self.engine.parameters:
                read(name)
        return counts


PARTS = {
    "meeting": lambda run: run.measure(run.meet),
    "peers": lambda run: run.measure(run.find_peers),
    "checks of the start": lambda run: run.measure(run.agree),
    "a save": Run.measure_save,
    "a resume": lambda run: run.measure(run.resume),
    "a line of the log": lambda run: run.measure(run.log),
    "a minute of waiting": lambda run: run.measure(run.watch),
}


def measured(ranks, config, names, folder, patch=setattr):
    """{part: (Counts of rank 0, of the other rank)} and "all weights": (Counts of one process,). patch: as setattr."""
    run = Run(folder, config, names, ranks, patch)
    try:
        found = {part: measure(run) for part, measure in PARTS.items()}
        return found | {"all weights": (run.measure_weights(),)}
    finally:
        leave()


def table(by_ranks):
    """A Markdown table. by_ranks: {number of ranks: `measured`}."""
    heads = ["part", "rank", "ranks", *HEADS]
    lines = [" | ".join(heads), "|".join(["---"] * 3 + ["--:"] * len(HEADS))]
    for part in (*PARTS, "all weights"):
        for place, who in enumerate(("0", "another")[: len(next(iter(by_ranks.values()))[part])]):
            for ranks, found in by_ranks.items():
                cells = (column(found[part][place]) for column in HEADS.values())
                lines.append(" | ".join([part, who if part in PARTS else "alone", f"{ranks:,}", *cells]))
    return [f"| {line} |" for line in lines]


HEADS = {
    "opens": lambda counts: f"{counts.opens:,}",
    "stats": lambda counts: f"{counts.stats:,}",
    "MB read": lambda counts: f"{counts.read_bytes / 1e6:,.2f}",
    "messages": lambda counts: f"{counts.messages:,}",
    "kB received": lambda counts: f"{counts.received_bytes / 1e3:,.1f}",
    "store requests": lambda counts: f"{counts.requests:,}",
    "kB of them": lambda counts: f"{counts.request_bytes / 1e3:,.1f}",
    "CPU seconds": lambda counts: f"{counts.seconds:.3f}",
}


def main(arguments):
    parser = FlagParser(__doc__)
    parser.add_argument("ranks", type=at_least(2), nargs="*", default=[64, 512, 4096])
    parser.add_argument("--config", default="configs/70b.json")
    args = parser.parse_args(arguments)
    config = load_config([args.config])
    names = names_of(config)
    by_ranks = {}
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            by_ranks[ranks] = measured(ranks, config, names, folder)
        print(f"{ranks} ranks, {len(names)} parameters: measured", file=sys.stderr)
    print("\n".join(table(by_ranks)))


if __name__ == "__main__":
    run_command(main)

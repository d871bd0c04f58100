"""zero_hpz_partition_size on two nodes of two CPU ranks: less is sent between the nodes, and nothing else changes."""

import pytest

from minzero.config.load import load_config
from minzero.files import write_json
from minzero.metrics import read_metrics
from minzero.sizes import count_parameters
from tests.helpers.nodes import Nodes, skip_without
from tests.helpers.processes import ROOT, write_small_data

pytestmark = pytest.mark.slow

STEP = 64 * 32  # tokens: two micro-batches of each rank
HALF = 4  # steps


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    skip_without("pdsh")
    folder = tmp_path_factory.mktemp("slow_networks")
    (folder / "data").mkdir()
    write_small_data(folder / "data")
    model = {"n_layer": 6, "n_head": 4, "n_embd": 128, "block_size": 32, "vocab_size": 64}
    train = {"micro_batch_size": 8, "global_batch_tokens": STEP, "warmup_tokens": 0, "lr": 1e-3, "log_every": 1}
    train |= {"min_lr_ratio": 1, "eval_every": 1000, "eval_tokens": 512, "save_every": HALF}
    # no weight stays on a rank after its use
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    config = {"model": model, "data": {"path": str(folder / "data")}, "train": train}
    write_json(folder / "config.json", config | {"deepspeed": {"zero_optimization": zero}})
    (folder / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nTORCH_CPP_LOG_LEVEL=ERROR\n")
    with Nodes(folder / "nodes") as nodes:
        yield nodes


def sent(nodes):
    """Bytes that the nodes have sent to each other."""
    total = 0
    for number in (1, 2):
        lines = nodes.run(number, ["cat", "/proc/net/dev"], check=True).stdout.splitlines()
        total += int(next(line for line in lines if "eth0:" in line).split()[9])
    return total


def train(nodes, name, size, steps):
    """Train up to this step, with groups of `size` ranks. Returns the bytes that the nodes sent to each other."""
    folder, before = nodes.folder.parent, sent(nodes)
    words = ["deepspeed", "-q", "--hostfile", nodes.hostfile(slots=2), "--launcher_args=-N", "--", "--quiet"]
    words += [ROOT / "train.py", folder / "config.json", "--train.out_dir", folder / name]
    words += ["--train.max_tokens", steps * STEP, "--deepspeed.zero_optimization.zero_hpz_partition_size", size]
    done = nodes.run(1, words, cwd=folder, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stdout
    return sent(nodes) - before


def test_less_is_sent_and_nothing_else_changes(nodes):
    folder = nodes.folder.parent
    saved = train(nodes, "plain_first", 1, HALF) - train(nodes, "hpz_first", 2, HALF)
    # Of four passes over the weights in a step, three gather within the node; the backward passes still have the last
    # block. In a ring of four ranks three quarters of the weights cross the network, at two places.
    weights = 4 * count_parameters(load_config([str(folder / "config.json")]).model)[0]
    assert saved / HALF == pytest.approx((3 - 2 / 6) * 2 * 0.75 * weights, rel=0.1)

    train(nodes, "plain_first", 2, 2 * HALF)
    train(nodes, "hpz_first", 1, 2 * HALF)
    runs = [folder / "plain_first", folder / "hpz_first"]
    losses = [[line["loss"] for line in read_metrics(run) if "loss" in line] for run in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 2 * HALF
    for step in (HALF, 2 * HALF):
        ours, theirs = (sorted((run / f"checkpoints/step_{step:08d}").glob("rank_*")) for run in runs)
        assert len(ours) == len(theirs) == 4
        assert [file.read_bytes() for file in ours] == [file.read_bytes() for file in theirs]

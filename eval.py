"""How good is a trained model? Loss, perplexity and bits per byte over the whole validation split.

    python eval.py out/tiny [--checkpoint best|latest|STEP] [--data FOLDER] [--gzip] [--json]
    python eval.py hf/llama --data data/books            # a folder in transformers' format, ours or published
    deepspeed --num_gpus 8 eval.py out/70b               # a model too large for one GPU: sharded by ZeRO-3
    python eval.py out/tiny --tasks hellaswag,arc_easy   # and benchmarks, by EleutherAI's lm-eval

Bits per byte is the loss of all tokens over the bytes of the text they stand for: unlike the loss, it
can be compared between tokenizers, and with a compressor (--gzip).
"""

from minzero.commands import begin

if __name__ == "__main__":
    begin()

import gzip
import importlib.util
import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import distributed
from torch.nn import functional as F

import export
from minzero import checkpoint, checkpoint_folder
from minzero.commands import run_command
from minzero.config.sections import ModelConfig, data_weights
from minzero.config.values import did_you_mean
from minzero.data.mixture import content_digest
from minzero.data.pipeline import tokenizer_of
from minzero.data.shards import TokenStream, read_meta
from minzero.data.tokenizer import byte_level_names, open_huggingface
from minzero.errors import UserError
from minzero.flags import SUPPRESS, FlagParser, a_checkpoint, a_path, at_least
from minzero.launchers import find_ranks
from minzero.sizes import IGNORE_INDEX
from model import GPT

# -- what is evaluated ---------------------------------------------------------------------------


@dataclass
class Trained:
    """A trained model on the disk, looked at but not read: of a run or a checkpoint of ours, or in transformers'
    format."""

    path: Path
    words: str  # what it is
    model: ModelConfig
    load: Callable  # load() gives read(name of a parameter of ours)
    state: dict | None = None  # of a checkpoint
    data: list = field(default_factory=list)  # the folders that it learned from, as far as is known

    def check_tokenizer(self, folder):
        """Raises UserError if the data in `folder` was made with another tokenizer than the model's."""
        meta = read_meta(folder)
        if meta and self.state:
            check_tokenizer(self.state, folder, meta["tokenizer"]["fingerprint"])
        elif meta and (self.path / "tokenizer.json").exists():
            theirs = open_huggingface(self.path / "tokenizer.json").get_vocab()
            ranks = tokenizer_of(folder)._mergeable_ranks
            wrong = sum(theirs.get(name) != ranks[token] for token, name in byte_level_names(ranks).items())
            if wrong:
                raise UserError(
                    f"{folder}: found a tokenizer of which {wrong} of {len(ranks)} tokens differ from "
                    f"{self.path}/tokenizer.json, expected the same; prepare that data with the model's tokenizer"
                )


def open_trained(path, which="best"):
    """A run's folder, a checkpoint, or a folder in transformers' format -> Trained. Raises UserError."""
    path = Path(path)
    if export.is_published(path):
        words, model, load = export.open_published(path)
        return Trained(path, words, model, load)

    def look(found):
        return found, export.saved_model(found), *checkpoint.open_weights(found)

    found, model, state, _, read = checkpoint_folder.reading(path, which, look)
    folders = sorted(data_weights(state["config"]["data"]["path"]))
    return Trained(found, str(found), model, lambda: read, state, folders)


def check_tokenizer(state, folder, tokenizer):
    """Refuse data or text of another tokenizer than the model learned from: equal ids would mean other text."""
    learned = {entry["tokenizer"] for entry in state["data"].values()}
    if tokenizer is not None and None not in learned and tokenizer not in learned:
        raise UserError(
            f"{folder}: found tokenizer {tokenizer}, expected {' or '.join(learned)} as the model was trained with; "
            "prepare that data with the model's tokenizer"
        )


@torch.no_grad()
def load_model(trained: Trained, device=None):
    """The model in float32, on the fastest device here unless another is given."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        model = GPT(trained.model)
    read = trained.load()
    for name, parameter in model.named_parameters():
        parameter.copy_(read(name))
    return model.eval()


def load_sharded(trained: Trained, device):
    """The model in float32, each rank with a part of it: ZeRO-3 gathers a layer when it is its turn. Every rank of
    the process group must call this; rank 0 reads the weights, one at a time."""
    import deepspeed

    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=settings), device:
        model = GPT(trained.model)
    export.copy_into(model, trained.load)
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    engine.eval()
    return engine


# -- the validation split ------------------------------------------------------------------------


@torch.no_grad()
def window_losses(model, stream, batch_size=16, rank=0, ranks=1):
    """The summed cross-entropy in nats of each window of a split, (windows,) float64 on the CPU, and the number of
    targets that count. The windows are consecutive and the last one is cut, so that every token but the
    first is predicted once.

    A window's sum is its own, in float64: neither the batch nor the number of ranks that share the windows
    changes more than the rounding of the model's float32. Every rank must call this, and all get all."""
    device, block = torch.device("cuda" if torch.cuda.is_available() else "cpu"), stream.block_size
    starts, kept = list(range(0, stream.tokens - 1, block)), []
    losses = torch.zeros(len(starts) + 1, dtype=torch.float64, device=device)  # the last is the number of targets

    def keep(logits, targets, picked, vocab_size, _):
        logits = logits[:, :vocab_size].float()
        kept.append(F.cross_entropy(logits, targets[:, 0], ignore_index=IGNORE_INDEX, reduction="none"))
        return kept[-1].sum()

    getattr(model, "module", model).head.cross_entropy = keep  # sees the logits of some tokens at a time
    for first in range(0, len(starts), batch_size * ranks):
        mine = starts[first + rank * batch_size :][:batch_size]
        # a rank without windows goes along all the same: under ZeRO-3 the others need its part of the model
        inputs = torch.zeros(max(1, len(mine)), block, dtype=torch.long)
        targets = torch.full_like(inputs, IGNORE_INDEX)
        for number, start in enumerate(mine):
            example = stream.example(start, min(block, stream.tokens - 1 - start))
            for row, part in zip((inputs[number], targets[number]), example, strict=True):
                row[: len(part)] = torch.from_numpy(part)
        kept.clear()
        model(inputs.to(device), targets.to(device))
        losses[-1] += (targets != IGNORE_INDEX).sum()
        sums = torch.cat(kept).double().view(targets.shape).sum(dim=1)
        losses[first + rank * batch_size :][: len(mine)] = sums[: len(mine)]
    if ranks > 1:
        distributed.all_reduce(losses)
    return losses[:-1].cpu(), int(losses[-1])


def gzip_bits_per_byte(stream, tokenizer):
    """What `gzip -9` makes of the same documents: joined into one file, and one by one."""
    text = tokenizer.decode_bytes(stream.read(0, stream.tokens).tolist())
    documents = [part for part in text.split(b"<|endoftext|>") if part]
    size = sum(map(len, documents))
    one_by_one = sum(len(gzip.compress(part, 9)) for part in documents)
    return len(gzip.compress(b"".join(documents), 9)) * 8 / size, one_by_one * 8 / size


def open_streams(trained: Trained, folders):
    """The validation splits of these folders. Raises UserError for what this model cannot be evaluated on."""
    streams = [TokenStream(folder, "val", trained.model.block_size) for folder in folders]
    for stream in streams:
        stream.check_vocabulary(trained.model.vocab_size)
        trained.check_tokenizer(stream.folder)
    return streams


def evaluate(model, streams, batch_size=16, rank=0, ranks=1):
    """{"val_loss": nats per token, "perplexity", "bits_per_byte": None where the bytes are not known, "tokens"}
    over all of these validation splits."""
    # fsum rounds once, so that no order of the windows matters
    measured = [window_losses(model, stream, batch_size, rank, ranks) for stream in streams]
    nats = math.fsum(loss for losses, _ in measured for loss in losses)
    tokens = sum(targets for _, targets in measured)
    # only meta.json tells the bytes of the tokens' text
    sizes = [stream.meta["splits"]["val"].get("bytes") if stream.meta else None for stream in streams]
    size = sum(sizes) if all(sizes) else None
    return {
        "val_loss": nats / tokens,
        "perplexity": math.exp(min(nats / tokens, 700)),
        "bits_per_byte": nats / math.log(2) / size if size else None,
        "tokens": tokens,
    }


# -- benchmarks ----------------------------------------------------------------------------------


def open_tasks(names, task_path):
    """lm-eval's TaskManager, after a look whether it knows these tasks: names, or paths of yaml files. task_path: a
    folder of more task files. Raises UserError."""
    missing = [name for name in ("lm_eval", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'--tasks: {" and ".join(missing)} not installed, expected lm-eval; pip install "lm-eval[hf]"')
    from lm_eval.tasks import TaskManager

    if task_path and not Path(task_path).is_dir():
        raise UserError(f"--task_path: {task_path}: no such folder; expected one that holds lm-eval's task files")
    # its own ten thousand tasks are gone through in a dozen seconds, which files of tasks need not wait for
    for manager in (TaskManager(include_path=task_path, include_defaults=own) for own in (False, True)):
        known = set(manager.all_tasks) | {
            name for name in names if Path(name).suffix == ".yaml" and Path(name).is_file()
        }
        if known.issuperset(names):
            return manager
    unknown = next(name for name in names if name not in known)
    raise UserError(
        f"--tasks: {unknown!r} is neither one of lm-eval's nor a yaml file; {did_you_mean(unknown, manager.all_tasks)}"
    )


def run_tasks(trained: Trained, names, manager, limit):
    """lm-eval's results, {task: {metric: value}}, of its harness on the model as transformers'. Raises UserError."""
    import lm_eval

    with tempfile.TemporaryDirectory() as temporary:
        folder = trained.path
        if trained.state:
            folder = Path(temporary) / "model"
            export.export(trained.path, folder)
        if not (folder / "tokenizer.json").exists():
            raise UserError(f"--tasks: {trained.path} has no tokenizer that is known, and tasks are made of text")
        # several GPUs in the machine share the model
        model = {"pretrained": str(folder), "parallelize": torch.cuda.device_count() > 1}
        settings = {"device": "cuda" if torch.cuda.is_available() else "cpu", "limit": limit, "log_samples": False}
        try:
            found = lm_eval.simple_evaluate("hf", model, names, task_manager=manager, **settings)
        except Exception as error:  # of many classes: no network, a broken task file, a task that this model cannot
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"--tasks: lm-eval ended with {type(error).__name__}: {reason}") from None
    return found["results"]


# -- the command ---------------------------------------------------------------------------------


def open_all(args):
    """(the Trained, the validation splits) that the command's flags name. Raises UserError."""
    trained = open_trained(args.path, args.checkpoint)
    folders = [args.data] if args.data else trained.data
    if not folders and args.tasks is None:
        raise UserError(f"--data: {args.path} does not say on what it was trained; give the folder of shards")
    streams = open_streams(trained, folders)
    if args.gzip and streams and streams[-1].loss_mask:
        raise UserError(
            f"--gzip: {streams[-1].folder} holds conversations, of which a part counts; expected plain text"
        )
    return trained, streams


def evaluate_on_ranks(args):
    """(rank, the Trained, the validation splits, what `evaluate` gives) on each rank of a launcher's. Raises UserError
    on all of them if one cannot take part."""
    from minzero import dist  # it alone needs DeepSpeed

    device, rank, ranks = dist.start_process_group(may_be_alone=True)
    with dist.all_or_none():
        trained, streams = open_all(args)
    facts = {"model": vars(trained.model), "code": dist.code_digests()}
    facts["tokens"] = {str(stream.folder): content_digest(stream) for stream in streams}
    dist.refuse_different_ranks(facts)
    return rank, trained, streams, evaluate(load_sharded(trained, device), streams, args.batch_size, rank, ranks)


def main(arguments):
    parser = FlagParser(__doc__)
    parser.add_argument("path", type=a_path, help="a run's folder, a checkpoint in it, or one in transformers' format")
    parser.add_argument("--checkpoint", type=a_checkpoint, default="best", help="best, latest or a step")
    parser.add_argument("--data", type=a_path, help="folder of shards; default: the run's own")
    parser.add_argument("--batch_size", type=at_least(1), default=16, help="sequences at a time on each rank")
    parser.add_argument(
        "--gzip", action="store_true", help="compare with gzip -9 on the same text (of the last folder)"
    )
    parser.add_argument("--tasks", help="also these of lm-eval's tasks, or yaml files of tasks: one,two")
    parser.add_argument("--task_path", type=a_path, help="folder of further task files for --tasks")
    parser.add_argument("--limit", type=at_least(1), help="at most that many examples of each task")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--local_rank", help=SUPPRESS)  # the launcher's
    args = parser.parse_args(arguments)
    names = [] if args.tasks is None else args.tasks.split(",")
    if "" in names:
        raise UserError(f"--tasks: found {args.tasks!r}, expected names of tasks: one,two")
    ranks = int(find_ranks(dict(os.environ), may_be_alone=True)["WORLD_SIZE"])
    if names and ranks > 1:
        raise UserError(f"--tasks: found {ranks} ranks, expected one process: python eval.py {args.path} --tasks ...")
    result = dict.fromkeys(("val_loss", "perplexity", "bits_per_byte", "tokens"))
    if ranks > 1:
        rank, trained, streams, measured = evaluate_on_ranks(args)
        if rank:
            return
        result |= measured
    else:
        trained, streams = open_all(args)
        manager = open_tasks(names, args.task_path) if names else None
        if streams:
            model = load_model(trained)
            result |= evaluate(model, streams, args.batch_size)
            del model  # makes room for the tasks
    report(trained, streams, result)
    if args.gzip and streams:
        joined, one_by_one = gzip_bits_per_byte(streams[-1], tokenizer_of(streams[-1].folder))
        result |= {"gzip_bits_per_byte": joined, "gzip_one_by_one_bits_per_byte": one_by_one}
        print(f"gzip -9 on the same text: {joined:.4f} bits per byte joined, {one_by_one:.4f} file by file")
    if names:
        result["tasks"] = run_tasks(trained, names, manager, args.limit)
        for task, metrics in result["tasks"].items():
            numbers = [
                f"{name.removesuffix(',none')} {value:.4f}"
                for name, value in metrics.items()
                if isinstance(value, float) and "stderr" not in name
            ]
            print(f"{task}: {', '.join(numbers)}")
    if args.json:  # which knows neither NaN nor infinity
        print(json.dumps({key: None if is_not_finite(value) else value for key, value in result.items()}))


def is_not_finite(value):
    return isinstance(value, float) and not math.isfinite(value)


def report(trained: Trained, streams, result):
    for stream in streams:
        answers = ", of which the assistant's words count" if stream.loss_mask else ""
        print(f"{trained.words}: {stream.tokens - 1:,} tokens of {stream.folder}{answers}")
    if streams:
        print(f"validation loss {result['val_loss']:.4f} nats per token, perplexity {result['perplexity']:.2f}")
        if result["bits_per_byte"] is None:
            print("bits per byte unknown: the shards have no meta.json")
        else:
            print(f"bits per byte {result['bits_per_byte']:.4f}")


def command(arguments):
    if find_ranks(dict(os.environ), may_be_alone=True)["WORLD_SIZE"] == "1":
        main(arguments)
        return
    from minzero import dist  # it alone needs DeepSpeed

    with dist.ending_together():
        main(arguments)
    dist.stop_process_group()


if __name__ == "__main__":
    run_command(command, may_be_many=True)

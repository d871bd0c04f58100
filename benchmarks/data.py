"""Speed of the data: preparation compared with nanoGPT's way and bare tiktoken, reading compared with get_batch.

    MINZERO_SHARED=../shared TIKTOKEN_CACHE_DIR=../shared/tiktoken python benchmarks/data.py [--megabytes 100]

The documents are pieces of the texts in MINZERO_SHARED/text, if that is set, of the standard library's files and of
the installed packages' (.py, .md, .rst, .txt). They have OpenWebText's mean length. None is repeated unless there are
too few, which is said: what has been met before is faster. Each measurement runs in its own process; the
peak memory is the private memory (USS) of that process and its children, sampled.

nanoGPT's way is rewritten here: datasets.map, one document at a time, into lists of integers, and then 1,024 pieces
copied into a memory map; get_batch likewise. "datasets.map, tokenizers" is the same with batches of 1,000 documents and
the `tokenizers` library in place of tiktoken. All rows have the same documents; those of ours must give the same
shards. The times include starting processes, but not imports, writing the input,
and loading the tokenizer into the first process. On a machine that does other work as well, compare tokens per CPU
second (of all processes together).
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import re
import shutil
import statistics
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

BATCH = 12  # windows
BLOCK = 1024  # tokens
OURS = "ours"
OURS_WITHOUT = "ours, --encoder reference"
NANOGPT = "nanoGPT's way"
OTHERS = (NANOGPT, "datasets.map, tokenizers")
MEAN_LENGTH = 5000  # characters: OpenWebText has 40 GB in 8.01 million documents


def corpus(megabytes):
    """Documents of about this many megabytes in all, cut at blank lines to OpenWebText's mean length."""
    library = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    paths = [path for path in library if "site-packages" not in path.parts]
    if os.environ.get("MINZERO_SHARED"):
        paths = sorted(Path(os.environ["MINZERO_SHARED"], "text").glob("*.txt")) + paths
    packages = Path(sysconfig.get_path("purelib"))
    paths += sorted(path for end in ("md", "rst", "txt", "py") for path in packages.rglob(f"*.{end}"))
    texts = []
    left = megabytes * 1e6
    for path in paths:
        if left <= 0 or not path.is_file():
            continue
        left -= path.stat().st_size
        piece = ""
        for paragraph in re.split(r"(?<=\n)(?=\s*\n)", path.read_text(encoding="utf-8", errors="replace")):
            piece += paragraph
            if len(piece) >= MEAN_LENGTH:
                texts.append(piece)
                piece = ""
        texts += [piece] if piece.strip() else []
    texts = list(dict.fromkeys(texts))  # licences and empty packages are alike
    repeated = max(1, round(megabytes * 1e6 / sum(map(len, texts))))
    if repeated > 1:
        print(f"too little text: each document {repeated} times")
    return texts * repeated


# -- measurements, each in its own process -------------------------------------------------------


def bare(folder, workers, texts):
    """tiktoken's encode_ordinary and nothing else, in one thread. As the others: (tokens, seconds)."""
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    started = time.perf_counter()
    tokens = sum(len(encoding.encode_ordinary(text)) + 1 for text in texts)
    return tokens, time.perf_counter() - started


def bare_gigatoken(folder, workers, texts):
    """gigatoken's ids of each document and nothing else, in one thread, its cache empty at first."""
    from minzero.data.fast_encoding import BulkEncoder
    from minzero.data.tokenizer import load_tokenizer

    encoder = BulkEncoder(load_tokenizer("gpt2"))
    started = time.perf_counter()
    tokens = sum(len(encoder.encode(text.encode())) + 1 for text in texts)
    return tokens, time.perf_counter() - started


def ours(folder, workers, texts, name="corpus.jsonl", encoder="fast"):
    """This project's preparation of a file."""
    from minzero.data import pipeline
    from minzero.data.local_files import Files
    from minzero.data.tokenizer import load_tokenizer

    shutil.rmtree(folder / "ours", ignore_errors=True)
    arguments = ["--out", f"{folder}/ours", "--workers", str(workers), "--val_fraction", "0.0005"]
    arguments += ["--encoder", encoder]
    args = pipeline.options("", folder).parse_args(arguments)
    load_tokenizer("gpt2")  # before the time starts, as in the other two
    started = time.perf_counter()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        pipeline.prepare(Files(folder / name), "gpt2", args)
    seconds = time.perf_counter() - started
    meta = json.loads((args.out / "meta.json").read_text())
    with open(folder / "checksums", "a") as file:
        sums = [(shard["file"], shard["sha256"]) for part in meta["splits"].values() for shard in part["shards"]]
        print(name, sorted(sums), file=file)
    return sum(split["tokens"] for split in meta["splits"].values()), seconds


def nanogpt(folder, workers, texts):
    """nanoGPT's: one document at a time through datasets.map into lists, which are then joined into train.bin."""
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")

    def tokenize(row):
        ids = [*encoding.encode_ordinary(row["text"]), encoding.eot_token]
        return {"ids": ids, "len": len(ids)}

    return by_map(folder, workers, tokenize)


def with_tokenizers(folder, workers, texts):
    """As nanoGPT's, but in batches by the `tokenizers` library."""
    from tokenizers import Tokenizer

    from minzero.data.tokenizer import load_tokenizer
    from minzero.data.tokenizer_files import huggingface_json

    gpt2 = load_tokenizer("gpt2")
    library = Tokenizer.from_str(huggingface_json(gpt2._mergeable_ranks, gpt2._special_tokens, gpt2._pat_str))

    def tokenize(rows):
        library.encode_special_tokens = True  # a copy of it does not keep this
        ids = [[*found.ids, gpt2.end_of_text] for found in library.encode_batch(rows["text"], add_special_tokens=False)]
        return {"ids": ids, "len": list(map(len, ids))}

    return by_map(folder, workers, tokenize, batched=True)


def by_map(folder, workers, tokenize, **how):
    import datasets

    datasets.disable_progress_bars()
    data = datasets.load_from_disk(str(folder / "corpus"))
    started = time.perf_counter()
    parts = data.train_test_split(test_size=0.0005, seed=1, shuffle=True)
    parts = parts.map(tokenize, remove_columns=["text"], num_proc=workers, load_from_cache_file=False, **how)
    total = 0
    for name, part in parts.items():
        length = int(np.sum(part["len"], dtype=np.uint64))
        out = np.memmap(folder / f"{name}.bin", dtype=np.uint16, mode="w+", shape=(length,))
        position, pieces = 0, min(1024, len(part))
        for piece in range(pieces):
            shard = part.shard(num_shards=pieces, index=piece, contiguous=True).with_format("numpy")
            ids = np.concatenate(shard["ids"])
            out[position : position + len(ids)] = ids
            position += len(ids)
        out.flush()
        total += length
    return total, time.perf_counter() - started


def measured(function, folder, workers, texts):
    """Run in a child process. Returns (tokens, seconds, seconds of all its processors, peak private bytes)."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work():
        before = sum(os.times()[:4])
        result = function(folder, workers, texts)
        sender.send((*result, sum(os.times()[:4]) - before))

    child = context.Process(target=work)
    child.start()
    sender.close()  # so that recv below ends if the child fails
    peak = [0]  # bytes
    finished = threading.Event()

    def watch():
        process = psutil.Process(child.pid)
        while not finished.wait(0.25):
            total = 0
            for each in [process, *process.children(recursive=True)]:
                try:
                    total += each.memory_full_info().uss
                except psutil.Error:
                    continue
            peak[0] = max(peak[0], total)

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = receiver.recv()
    finished.set()
    watcher.join()
    child.join()
    return *result, peak[0]


# -- the reader ----------------------------------------------------------------------------------


def reader(folder):
    """Seconds of one batch: (nanoGPT's get_batch, ours), each the median of 5 rounds, taken in turns."""
    import torch

    from minzero.data import order
    from minzero.data.mixture import Mixture

    torch.set_num_threads(1)
    data = Mixture(str(folder / "ours"), "train", BLOCK, 50257, seed=1)
    numbers = iter(range(10**9))

    def our_batch():
        samples = order.sample_numbers(next(numbers) * BATCH, 0, 0, 1, BATCH)
        return [torch.from_numpy(array) for array in data.batch(data.windows_of(samples))]

    def get_batch():
        tokens = np.memmap(folder / "train.bin", dtype=np.uint16, mode="r")
        starts = torch.randint(len(tokens) - BLOCK, (BATCH,))
        rows = [[tokens[s + shift : s + shift + BLOCK].astype(np.int64) for s in starts] for shift in (0, 1)]
        return [torch.stack([torch.from_numpy(row) for row in part]) for part in rows]

    assert [list(t.shape) for t in our_batch()] == [list(t.shape) for t in get_batch()] == [[BATCH, BLOCK]] * 2
    seconds = {get_batch: [], our_batch: []}
    for _ in range(6):
        for function, times in seconds.items():
            started = time.perf_counter()
            for _ in range(500):
                function()
            times.append((time.perf_counter() - started) / 500)
    return [statistics.median(times[1:]) for times in seconds.values()]  # the first round warms up


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=1, help="repeat each measurement; the fastest counts")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    folder = Path(tempfile.mkdtemp(prefix="benchmark_data_"))
    try:
        texts = corpus(args.megabytes)
        with open(folder / "corpus.jsonl", "w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        write_parquet(texts, folder / "corpus.parquet")
        write = multiprocessing.get_context("fork").Process(target=save_arrow, args=(texts, folder / "corpus"))
        write.start()
        write.join()
        print(f"{len(texts):,} documents, {sum(map(len, texts)) / 1e6:.0f} MB, {os.cpu_count()} cores, gpt2 tokenizer")
        from_parquet = functools.partial(ours, name="corpus.parquet")
        without = functools.partial(ours, encoder="reference")
        rows = [("tiktoken alone", bare, 1), ("gigatoken alone", bare_gigatoken, 1), (OURS_WITHOUT, without, 1)]
        for workers in (1, 2):
            rows += [(NANOGPT, nanogpt, workers), ("datasets.map, tokenizers", with_tokenizers, workers)]
            rows += [(OURS, ours, workers), ("ours, from parquet", from_parquet, workers)]
        results = {}
        head = f"{'':28s}{'processes':>10s}{'tokens':>13s}{'M tokens/s':>12s}{'a process':>11s}"
        print(f"{head}{'a CPU second':>14s}{'peak MB':>9s}")
        for name, function, workers in rows:
            given = texts if function in (bare, bare_gigatoken) else None  # the others read files, as a user would
            runs = [measured(function, folder, workers, given) for _ in range(args.rounds)]
            tokens, seconds, cpu_seconds, peak = min(runs, key=lambda run: run[1])
            rate = results[name, workers] = tokens / seconds / 1e6
            print(
                f"{name:28s}{workers:10d}{tokens:13,d}{rate:12.2f}{rate / workers:11.2f}"
                f"{tokens / cpu_seconds / 1e6:14.2f}{peak / 1e6:9.0f}",
                flush=True,
            )
        for workers in (1, 2):
            ratios = (f"{results[OURS, workers] / results[name, workers]:.1f} times {name}" for name in OTHERS)
            print(f"{workers} process(es): ours has {', '.join(ratios)}")
        sums = (folder / "checksums").read_text().splitlines()
        # the name of a row's file is a part of the key that decides its split, so jsonl and parquet differ in that
        same = len(set(sums)) == 2
        print(
            f"shards of ours: {'the same bytes' if same else 'DIFFERENT BYTES'} in {len(sums)} preparations of 2 files"
        )
        nano, our = reader(folder)
        # the fastest step this might feed: 124M parameters on one H100 at half of its 989 TFLOPS
        flops = BATCH * BLOCK * (6 * 124e6 + 12 * 12 * 768 * BLOCK)
        step = flops / (0.5 * 989e12)
        print(
            f"batches of {BATCH} x {BLOCK}: get_batch {1 / nano:,.0f}/s, ours {1 / our:,.0f}/s, {nano / our:.1f} times"
        )
        print(f"ours takes {our * 1e6:.0f} us, {our / step:.2%} of the {step * 1e3:.1f} ms of a 124M GPT on an H100")
    finally:
        shutil.rmtree(folder)


def write_parquet(texts, path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=1000)


def save_arrow(texts, path):
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(path))


if __name__ == "__main__":
    main()

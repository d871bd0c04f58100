"""How good is a trained model? Loss, perplexity and bits per byte over the whole validation split.

    python eval.py out/tiny [--checkpoint best|latest|STEP] [--data FOLDER] [--gzip] [--json]

Bits per byte is the loss of all tokens over the bytes of the text they stand for: unlike the loss, it
can be compared between tokenizers, and with a compressor (--gzip).
"""

import argparse
import gzip
import json
import math

import torch

import checkpoint
from config import UserError, run_command
from data.pipeline import tokenizer_of
from data.shards import TokenStream
from model import GPT, IGNORE


def load_model(path, which):
    """A run's folder or a checkpoint -> (GPT in float32 on the fastest device here, Config, the checkpoint's
    path, its state). Raises UserError if there is none."""
    found = checkpoint.must_find(path, which)
    state, config, weights = checkpoint.load_weights(found)
    model = GPT(config.model)
    model.load_state_dict(weights)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), config, found, state


def check_tokenizer(state, folder, tokenizer):
    """Refuse data or text of another tokenizer than the model learned from: equal ids would mean other text."""
    learned = {entry["tokenizer"] for entry in state["data"].values()}
    if tokenizer is not None and None not in learned and tokenizer not in learned:
        raise UserError(
            f"{folder}: found tokenizer {tokenizer}, expected {' or '.join(learned)} as the model was trained with; "
            "prepare that data with the model's tokenizer"
        )


@torch.no_grad()
def evaluate_split(model, stream, batch_size=16):
    """Sum of the cross-entropy in nats over every token of a split but the first, each predicted once:
    windows one behind the other, the last one cut. Returns (sum, number of tokens)."""
    device, block = next(model.parameters()).device, stream.block_size
    total, starts = 0.0, list(range(0, stream.tokens - 1, block))
    for first in range(0, len(starts), batch_size):
        rows = torch.full((len(starts[first : first + batch_size]), block + 1), IGNORE)
        for row, start in zip(rows, starts[first : first + batch_size], strict=True):
            tokens = stream.read(start, min(block + 1, stream.tokens - start))
            row[: len(tokens)] = torch.from_numpy(tokens)
        inputs, targets = rows[:, :-1].clamp(min=0).to(device), rows[:, 1:].to(device)
        total += model(inputs, targets).double().item() * (targets != IGNORE).sum().item()
    return total, stream.tokens - 1


def gzip_bits_per_byte(stream, tokenizer):
    """What `gzip -9` makes of the same documents: joined into one file, and one by one."""
    text = tokenizer.decode_bytes(stream.read(0, stream.tokens).tolist())
    documents = [part for part in text.split(b"<|endoftext|>") if part]
    size = sum(map(len, documents))
    one_by_one = sum(len(gzip.compress(part, 9)) for part in documents)
    return len(gzip.compress(b"".join(documents), 9)) * 8 / size, one_by_one * 8 / size


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="a run's folder, as out/tiny, or a checkpoint in it")
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step")
    parser.add_argument("--data", help="folder of shards; default: the run's own")
    parser.add_argument(
        "--gzip", action="store_true", help="compare with gzip -9 on the same text (of the last folder)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args(arguments)
    model, config, found, state = load_model(args.path, args.checkpoint)
    nats = tokens = size = 0
    for folder in [args.data] if args.data else sorted(config.data.weights):
        stream = TokenStream(folder, "val", config.model.block_size)
        stream.check_vocabulary(config.model.vocab_size)
        check_tokenizer(state, folder, stream.fingerprint()["tokenizer"])
        part, count = evaluate_split(model, stream)
        nats, tokens = nats + part, tokens + count
        # without meta.json the bytes behind the tokens are not known
        size += stream.meta["splits"]["val"]["bytes"] if stream.meta else math.nan
        print(f"{found}: {count:,} tokens of {folder}")
    loss = nats / tokens
    result = {"val_loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": None, "tokens": tokens}
    print(f"validation loss {loss:.4f} nats per token, perplexity {result['perplexity']:.2f}")
    if math.isnan(size):
        print("bits per byte unknown: the shards have no meta.json")
    else:
        result["bits_per_byte"] = nats / math.log(2) / size
        print(f"bits per byte {result['bits_per_byte']:.4f}")
    if args.gzip:
        joined, one_by_one = gzip_bits_per_byte(stream, tokenizer_of(folder))
        result |= {"gzip_bits_per_byte": joined, "gzip_one_by_one_bits_per_byte": one_by_one}
        print(f"gzip -9 on the same text: {joined:.4f} bits per byte joined, {one_by_one:.4f} file by file")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)

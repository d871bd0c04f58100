"""Let a trained model write.

python sample.py out/tiny --prompt "def main():" [--tokens 200] [--temperature 0.8] [--top_k 50]
"""

import argparse
import itertools
import sys

import torch

from config import UserError, run_command
from data.pipeline import tokenizer_of
from data.tokenizer import END_OF_TEXT, fingerprint
from eval import check_tokenizer, load_model


@torch.no_grad()
def generate(model, tokens, vocab_size, temperature, top_k, generator):
    """Yield one token id below vocab_size after the other, sampled from the model's distribution;
    temperature 0 takes the most likely. tokens: list of ids to start from, at least one."""
    device = next(model.parameters()).device
    tokens = torch.tensor([tokens], device=device)
    while True:
        logits = model(tokens[:, -model.config.block_size :])[0, -1, :vocab_size].float()
        if temperature == 0:
            next_token = logits.argmax().view(1)
        else:
            logits = logits / temperature
            if top_k:
                logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -torch.inf
            next_token = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator).to(device)
        yield next_token.item()
        tokens = torch.cat((tokens, next_token[None]), dim=1)


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="a run's folder, as out/tiny, or a checkpoint in it")
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step")
    parser.add_argument("--prompt", default="", help="text to go on from; empty: the start of a document")
    parser.add_argument("--tokens", type=int, default=200, help="how many to write at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most likely token")
    parser.add_argument("--top_k", type=int, default=50, help="choose among the k most likely; 0: among all")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1337)
    args = parser.parse_args(arguments)
    if args.temperature < 0 or args.top_k < 0:
        raise UserError("--temperature and --top_k: expected 0 or more")
    model, config, _, state = load_model(args.path, args.checkpoint)
    folder = sorted(config.data.weights)[0]
    tokenizer = tokenizer_of(folder)
    check_tokenizer(state, folder, fingerprint(tokenizer))
    end_of_text = tokenizer._special_tokens[END_OF_TEXT]
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(args.samples):
        prompt = [end_of_text, *tokenizer.encode_ordinary(args.prompt)]
        sys.stdout.write(args.prompt)
        written = b""  # a character may span tokens: print what is complete, and what is left at the end
        tokens = generate(model, prompt, tokenizer.n_vocab, args.temperature, args.top_k, generator)
        for token in itertools.islice(tokens, args.tokens):
            if token == end_of_text:
                break
            written += tokenizer.decode_single_token_bytes(token)
            try:
                sys.stdout.write(written.decode())
                written = b""
            except UnicodeDecodeError:
                continue
            sys.stdout.flush()
        print(written.decode(errors="replace"))


if __name__ == "__main__":
    run_command(main)

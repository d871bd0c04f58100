"""Let a trained model write, to the terminal, token by token.

    python sample.py out/tiny --prompt "def main():" [--tokens 200] [--temperature 0.8] [--top_k 50] [--top_p 0.95]
    python sample.py out/tiny --file prompts.txt      # a prompt a line; a whole file: --prompt "$(cat file)"
    python sample.py out/tiny                         # asks for prompts, or reads them from a pipe, a line each
    python sample.py hf/llama --prompt "Once"         # a folder in transformers' format, ours or published
    python sample.py out/chat --chat                  # after fine-tuning on conversations: questions and answers

With --chat the prompts are one conversation; a prompt "/new" begins another. Where the context is full, its oldest
questions and answers are forgotten.

The model continues the prompt; an empty prompt is the start of a document. Where the context is full, it continues
from the last half of it. A folder in transformers' format is read by transformers' own tokenizer, and its
generation_config.json and chat template count; temperature, top_k and top_p are the flags' alone.
"""

from minzero.commands import begin

if __name__ == "__main__":
    begin()

import sys
from pathlib import Path

from minzero.commands import run_command
from minzero.errors import UserError
from minzero.flags import FlagParser, a_checkpoint, a_model, a_number, a_path, at_least

NEW_CONVERSATION = "/new"  # the prompt that begins another
LEAST_TEMPERATURE = 1e-6  # logits over less overflow


def read_prompts(args):
    """Yields the prompts, one after the other, as the command line says. Raises UserError."""
    if args.prompt is not None:
        yield args.prompt
    elif args.file:
        try:
            lines = Path(args.file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise UserError(f"--file: {args.file}: {reason}; expected a file with a prompt a line") from None
        if not any(line.strip() for line in lines):
            raise UserError(f"--file: {args.file}: found no prompt, expected one a line; for none: --prompt ''")
        yield from (line for line in lines if line.strip())
    elif sys.stdin.isatty():
        new = f" {NEW_CONVERSATION} begins another conversation;" if args.chat else ""
        print(f"A prompt a line;{new} Ctrl-D ends.", file=sys.stderr)
        while True:
            try:
                yield input("> ")
            except EOFError:
                return
    else:
        line = None
        for line in sys.stdin:
            yield line.rstrip("\n")
        if line is None:
            raise UserError("stdin: found nothing, expected a prompt a line; or give --prompt or --file")


def parse(arguments):
    parser = FlagParser(__doc__)
    top_k = at_least(0, expected="0 (all) or more")
    top_p = a_number(0, 1, above=True)
    what = "a run's folder, a checkpoint in it, an address of train.copy_to, or a folder in transformers' format"
    parser.add_argument("path", type=a_model, help=what)
    parser.add_argument("--checkpoint", type=a_checkpoint, default="best", help="best, latest or a step")
    parser.add_argument("--data", type=a_path, help="data made with the model's tokenizer; default: the run's own")
    parser.add_argument("--prompt", help="text to continue; empty: the start of a document")
    parser.add_argument("--file", type=a_path, help="a file of prompts, one a line")
    parser.add_argument("--chat", action="store_true", help="each prompt is a user's; the assistant answers")
    parser.add_argument("--tokens", type=at_least(1), default=200, help="how many to write at most")
    parser.add_argument("--temperature", type=a_number(0), default=0.8, help="0: always the most likely token")
    parser.add_argument("--top_k", type=top_k, default=50, help="choose among the k likeliest; 0: among all")
    parser.add_argument("--top_p", type=top_p, default=1.0, help="among the likeliest that together have this much")
    parser.add_argument("--samples", type=at_least(1), default=1, help="of each prompt")
    parser.add_argument("--seed", type=at_least(0), default=1337)
    args = parser.parse_args(arguments)
    if args.prompt is not None and args.file:
        raise UserError("--prompt and --file: found both, expected one of them")
    if 0 < args.temperature < LEAST_TEMPERATURE:
        raise UserError(f"--temperature: found {args.temperature}, expected 0 or at least {LEAST_TEMPERATURE}")
    return args


def main(arguments):
    args = parse(arguments)
    # after the flags, so that --help and a wrong flag are answered at once: these take seconds to import
    from minzero.generate import Writer
    from minzero.trained import open_trained

    source = open_trained(args.path, args.checkpoint)
    writer = Writer(source, args.data, args.chat, args.temperature, args.top_k, args.top_p)
    for prompt in read_prompts(args):
        if args.chat and prompt.strip() == NEW_CONVERSATION:
            writer.history.clear()
            continue
        writer.write(prompt, args.tokens, args.samples, args.seed)


if __name__ == "__main__":
    run_command(main)

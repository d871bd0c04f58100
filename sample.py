"""Let a trained model write, to the terminal, token by token.

    python sample.py out/tiny --prompt "def main():" [--tokens 200] [--temperature 0.8] [--top_k 50] [--top_p 0.95]
    python sample.py out/tiny --file prompts.txt      # a prompt a line; a whole file: --prompt "$(cat file)"
    python sample.py out/tiny                         # asks for prompts, or reads them from a pipe, a line each
    python sample.py hf/llama --prompt "Once"         # a folder in transformers' format, ours or published
    python sample.py out/chat --chat                  # after fine-tuning on conversations: questions and answers

The model continues the prompt; an empty prompt is the start of a document. Where the context is full, it continues
from the last half of it. A folder in transformers' format is read by transformers' own tokenizer, and its
generation_config.json and chat template count; temperature, top_k and top_p are the flags' alone.
"""

from minzero.commands import begin

if __name__ == "__main__":
    begin()

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutput

import export
from eval import Trained, load_model, open_trained
from minzero.commands import run_command
from minzero.data.conversations import CHAT_TEMPLATE
from minzero.data.pipeline import tokenizer_of
from minzero.data.tokenizer import END_OF_TEXT, huggingface_json, missing_characters
from minzero.errors import UserError
from minzero.files import read_json
from minzero.flags import FlagParser, a_checkpoint, a_number, a_path, at_least

LEAST_TEMPERATURE = 1e-6  # logits over less overflow

# of a folder in transformers' format, any of which says that it has a tokenizer of its own
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class WithoutCache(PreTrainedModel, GenerationMixin):
    """A model of ours that is none of transformers' families, as far as generating needs it to be one: it goes
    through the whole context for every token."""

    config_class = PreTrainedConfig

    def __init__(self, model):
        super().__init__(PreTrainedConfig())
        self.model, self.generation_config = model, GenerationConfig(use_cache=False)

    def forward(self, input_ids, attention_mask=None, return_dict=True):
        return CausalLMOutput(logits=self.model(input_ids))

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return {"input_ids": input_ids}  # all of them: nothing was kept of the last token's


def load_writer(trained: Trained):
    """The model in float32 as one that transformers' `generate` takes, on the fastest device here: with a cache if it
    is one of transformers' families in every setting and parameter, else as it is."""
    try:
        export.check_expressible(trained.model)
    except UserError:
        return WithoutCache(load_model(trained)).eval()
    model = export.build_transformers(trained.model, trained.load())
    if trained.state is None:  # a folder in transformers' format says how it wants to be continued
        model.generation_config = open_generation(trained.path)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


class Terminal(BaseStreamer):
    """Prints tokens as they come, in whole characters: one may span several tokens. echo: the prompt as well."""

    def __init__(self, tokenizer, prompt, echo=False):
        self.tokenizer, self.tokens, self.prompt_follows = tokenizer, list(prompt), True
        # the clean-up of English text, as " ." to ".", may change the last characters once the next have come
        self.held_back = 8 if getattr(tokenizer, "clean_up_tokenization_spaces", False) else 0
        self.printed = 0 if echo else len(self.text())
        self.write(self.text())

    def text(self):
        return self.tokenizer.decode(self.tokens, skip_special_tokens=True)

    def put(self, value):
        if self.prompt_follows:  # what `generate` hands over first
            self.prompt_follows = False
            return
        self.tokens += value.tolist()
        text = self.text()  # all of it: what a token stands for depends on those before it
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self.write(text)

    def end(self):
        self.prompt_follows = True

    def finish(self):
        """Print what never became a character, and a line end."""
        self.held_back = 0
        self.write(self.text() + "\n")

    def write(self, text):
        until = max(self.printed, len(text) - self.held_back)
        sys.stdout.write(text[self.printed : until])
        sys.stdout.flush()
        self.printed = until


def write(model, tokens, most, block_size, streamer, **settings):
    """Generate up to `most` tokens after `tokens`, a list of ids, at least one. Returns them, with the end of text
    if that came first. The context never grows past block_size: where it is full, its last half stays.
    settings: of transformers' `generate`, over those that the model comes with."""
    own = model.generation_config
    end = settings.get("eos_token_id", own.eos_token_id)  # one id, several or None
    written = []
    ends = {end} if isinstance(end, int) else set(end or ())
    beams = (own.num_beams or 1) > 1  # which cannot be streamed
    settings |= {} if beams else {"streamer": streamer}
    while len(written) < most and not ends.intersection(written[-1:]):
        context = (tokens + written)[-block_size:]
        if written and len(context) == block_size:
            context = context[-max(1, block_size // 2) :]
        # the last token of a context at block_size is predicted, not read
        room = min(most - len(written), block_size - len(context) + 1)
        inputs = torch.tensor([context], device=model.device)
        output = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=room, **settings)
        written += output[0, len(context) :].tolist()
    if beams:
        streamer.put(inputs)
        streamer.put(torch.tensor(written))
    return written


# -- the command ---------------------------------------------------------------------------------


def own_tokenizer(folder):
    """(the tokenizer of a folder of data as transformers', a function from a text to the characters in it that no
    token stands for)."""
    encoding = tokenizer_of(folder)
    parts = encoding._mergeable_ranks, encoding._special_tokens, encoding._pat_str
    special = dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT) if END_OF_TEXT in encoding._special_tokens else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(huggingface_json(*parts)),
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        **special,
    )
    return tokenizer, lambda text: missing_characters(encoding, text)


def open_tokenizer(trained: Trained, data=None):
    """(the model's tokenizer as transformers', a function from a text to the characters in it that no token stands
    for, whether it is that of a folder of data). data: a folder made with that tokenizer. Raises UserError if it is
    not known or not the model's."""
    folders = [data] if data else trained.data
    for folder in folders[:1]:
        trained.check_tokenizer(folder)
    of_data = bool(folders) and not any((trained.path / name).exists() for name in TOKENIZER_FILES)
    if of_data:
        where = folders[0]
        tokenizer, missing = own_tokenizer(where)
    else:
        where = trained.path / "tokenizer.json"

        def missing(text):
            return []

        try:
            tokenizer = AutoTokenizer.from_pretrained(trained.path, trust_remote_code=False)
        except Exception as error:  # of many classes, some of them libraries' own
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{where}: {reason}; expected a tokenizer; or name data made with it: --data") from None
    largest = max(tokenizer.get_vocab().values())
    if largest >= trained.model.vocab_size:
        raise UserError(
            f"{where}: found token ids up to {largest}, expected ids below the model's vocab_size "
            f"{trained.model.vocab_size}; give its own tokenizer"
        )
    return tokenizer, missing, of_data


def open_generation(folder):
    """What a folder in transformers' format says of generating, as `from_pretrained` reads it. Raises UserError."""
    path = folder / "generation_config.json"
    path = path if path.exists() else folder / "config.json"
    read_json(path)
    try:
        return GenerationConfig.from_pretrained(folder, path.name, _from_model_config=path.name == "config.json")
    except Exception as error:  # of many classes, some of them libraries' own
        raise UserError(f"{path}: {' '.join(str(error).split())[:300]}; expected settings of `generate`") from None


def tokens_of(prompt, tokenizer, start, chat):
    """The ids that a text or, with chat, a user's message begins with, as transformers' own code gives them. start:
    the id of the start of a document, or None. Raises UserError where that is needed and there is none."""
    if chat:
        if tokenizer.chat_template is None:
            print("the tokenizer has no chat template; the questions take this project's form", file=sys.stderr)
            tokenizer.chat_template = CHAT_TEMPLATE
        if tokenizer.chat_template == CHAT_TEMPLATE and tokenizer.bos_token is None:
            raise UserError("prompt: --chat needs a token for the start of a document, which this tokenizer has not")
        asked = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    tokens = tokenizer(prompt, verbose=False)["input_ids"]
    if not tokens and start is None:
        raise UserError(
            "prompt: an empty prompt needs a token for the start of a document, which this tokenizer has not"
        )
    return tokens or [start]


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
        print("A prompt a line; Ctrl-D ends.", file=sys.stderr)
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


def main(arguments):
    parser = FlagParser(__doc__)
    top_k = at_least(0, expected="0 (all) or more")
    parser.add_argument("path", type=a_path, help="a run's folder, a checkpoint in it, or one in transformers' format")
    parser.add_argument("--checkpoint", type=a_checkpoint, default="best", help="best, latest or a step")
    parser.add_argument("--data", type=a_path, help="data made with the model's tokenizer; default: the run's own")
    parser.add_argument("--prompt", help="text to continue; empty: the start of a document")
    parser.add_argument("--file", type=a_path, help="a file of prompts, one a line")
    parser.add_argument("--chat", action="store_true", help="each prompt is what a user says; the assistant answers")
    parser.add_argument("--tokens", type=at_least(1), default=200, help="how many to write at most")
    parser.add_argument("--temperature", type=a_number(0), default=0.8, help="0: always the most likely token")
    parser.add_argument("--top_k", type=top_k, default=50, help="choose among the k likeliest; 0: among all")
    parser.add_argument(
        "--top_p", type=a_number(0, 1, above=True), default=1.0, help="among the likeliest that together have this much"
    )
    parser.add_argument("--samples", type=at_least(1), default=1, help="of each prompt")
    parser.add_argument("--seed", type=at_least(0), default=1337)
    args = parser.parse_args(arguments)
    if args.prompt is not None and args.file:
        raise UserError("--prompt and --file: found both, expected one of them")
    if 0 < args.temperature < LEAST_TEMPERATURE:
        raise UserError(f"--temperature: found {args.temperature}, expected 0 or at least {LEAST_TEMPERATURE}")
    trained = open_trained(args.path, args.checkpoint)
    model = load_writer(trained)
    tokenizer, missing, of_data = open_tokenizer(trained, args.data)
    block_size = trained.model.block_size
    settings = {"do_sample": args.temperature > 0}
    if of_data:
        settings |= dict.fromkeys(("eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
        # embeddings are often made wider than the vocabulary: nobody could read those tokens
        unknown = sorted(set(range(trained.model.vocab_size)) - set(tokenizer.get_vocab().values()))
        settings |= {"suppress_tokens": unknown} if unknown else {}
    start = model.generation_config.bos_token_id
    start = tokenizer.bos_token_id if start is None else start
    if args.temperature > 0:
        settings |= {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    for prompt in read_prompts(args):
        if odd := [char for char in prompt if "\ud800" <= char <= "\udfff"]:  # what a byte that is not UTF-8 becomes
            raise UserError(f"prompt: found {odd[0]!r} in it, expected UTF-8 text")
        if unwritable := missing(prompt):
            raise UserError(f"prompt: found {unwritable[0]!r}, expected characters that the model's tokenizer has")
        tokens = tokens_of(prompt, tokenizer, start, args.chat)
        if len(tokens) > block_size:
            print(f"the model sees the last {block_size} of the prompt's {len(tokens)} tokens", file=sys.stderr)
        for number in range(args.samples):
            if number:
                print("-" * 40)
            torch.manual_seed(args.seed + number)
            terminal = Terminal(tokenizer, tokens, echo=not args.chat)
            try:
                write(model, tokens, args.tokens, block_size, terminal, **settings)
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                raise UserError(f"{trained.path}: the model's predictions are not finite; are its weights?") from None
            terminal.finish()


if __name__ == "__main__":
    run_command(main)

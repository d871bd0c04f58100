"""Text from the model that is being trained, at any ZeRO stage. sample.py writes from a finished model, and faster."""

import contextlib

import torch
from torch import distributed

from minzero.data.pipeline import tokenizer_of
from minzero.errors import UserError

LENGTH = 64  # tokens
TEMPERATURE = 0.8


def open_tokenizer(config):
    """The tokenizer of the run's data, or None if no text is to be written. Raises UserError if it is not known."""
    if not config.train.sample_every:
        return None
    folder = next(iter(config.data.weights))
    try:
        return tokenizer_of(folder)
    except UserError as error:
        raise UserError(f"train.sample_every: {error}; or set it to 0") from None


@contextlib.contextmanager
def last_logits(model):
    """In this block the model makes the logits of the last position alone, (B, 1, V)."""
    hook = model.module.head.register_forward_pre_hook(lambda head, arguments: (arguments[0][:, -1:],))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def write_tokens(model, first, length, device, seed, progress=lambda: None):
    """The ids of a text of so many tokens that the model writes after the token `first`. All ranks run every forward
    pass (ZeRO-3's gathers are collective), and rank 0 chooses. Every rank must call this.

    model: the engine of a GPT. seed: of the choices, which use no other random numbers of the run. progress: called
    before each forward pass. Leaves the model in training mode."""
    generator = torch.Generator().manual_seed(seed)
    block_size = model.module.config.block_size
    written = [first]
    model.eval()
    # not compiled: another batch size would make the compiler take that of training and evaluation for a variable
    with last_logits(model), torch.compiler.set_stance("force_eager"):
        for _ in range(length):
            progress()
            context = torch.tensor([written[-block_size:]], device=device)
            logits = model(context)[0, 0]
            written.append(choose(logits, generator))
    model.train()
    return written[1:]


def choose(logits, generator):
    """A token by these logits, (V,), on rank 0; on every rank, which must all call this, that choice."""
    likely = torch.softmax(logits.float().cpu() / TEMPERATURE, dim=0)
    if likely.isfinite().all():
        choice = torch.multinomial(likely, 1, generator=generator)
    else:  # of weights that diverge, or in fp16; the loss will say it
        choice = torch.zeros(1, dtype=torch.long)
    choice = choice.to(logits.device)
    if distributed.is_initialized():
        distributed.broadcast(choice, src=0)
    return int(choice)


def write_text(model, tokenizer, device, seed, progress=lambda: None):
    """A text of LENGTH tokens from the start of a document, up to the end of that document. See `write_tokens`."""
    tokens = write_tokens(model, tokenizer.start_of_document, LENGTH, device, seed, progress)
    if tokenizer.end_of_text in tokens:
        tokens = tokens[: tokens.index(tokenizer.end_of_text)]
    known = tokenizer.known_ids()  # a model may have more ids than the tokenizer
    return tokenizer.decode([token for token in tokens if token in known])

"""How good is a trained model? Its loss over validation splits, and gzip on the same text."""

import contextlib
import gc
import gzip
import math
import os

import numpy as np
from tqdm import tqdm

from minzero import reference
from minzero.config.sections import TrainConfig
from minzero.data.mixture import content_digest
from minzero.data.packing import open_stream
from minzero.data.pipeline import tokenizer_of
from minzero.errors import UserError
from minzero.evaluate_loss import count_passes, window_losses
from minzero.evaluate_pairs import evaluate_pairs
from minzero.evaluate_roles import Roles, evaluate_roles
from minzero.hf.weights import own_shapes
from minzero.preference import LOSSES, Preference
from minzero.trained import ModelSource, load_model, load_sharded, open_trained

SHOW_AFTER = 1.0  # seconds that work must take before its progress is shown


@contextlib.contextmanager
def progress_bar(description, steps):
    """Gives a function to call for each of these steps. They are shown on stderr, by rank 0 alone and only where that
    is a terminal."""
    is_other_rank = os.environ.get("RANK", "0") != "0"
    hidden = True if is_other_rank else None  # None: tqdm looks whether it is a terminal
    with tqdm(total=steps, desc=description, delay=SHOW_AFTER, leave=False, disable=hidden) as bar:
        yield bar.update


# -- the loss ------------------------------------------------------------------------------------


def evaluate(model, streams, batch_size=16, device=None, rank=0, world_size=1, progress=lambda: None, preference=None):
    """{"val_loss": nats per token, "perplexity", "bits_per_byte": None where the bytes are not known, "tokens"}
    over all of these validation splits. Of pairs of answers: what `evaluate_pairs` finds, its loss as val_loss. Every
    rank must call this. Raises UserError if no token counts."""
    if streams[0].has_pairs:
        parts = [(stream, list(range(stream.windows))) for stream in streams]
        found = evaluate_pairs(model, parts, preference, batch_size, device, rank, world_size, progress)
        return {"val_loss": found.pop("loss")} | found
    results = [window_losses(model, stream, None, batch_size, device, rank, world_size, progress) for stream in streams]
    # fsum rounds once, so that no order of the windows matters
    nats = math.fsum(loss for losses, _ in results for loss in losses)
    tokens = sum(targets for _, targets in results)
    if not tokens:
        folders = ", ".join(str(stream.folder) for stream in streams)
        raise UserError(f"{folders}: no token of the validation split counts, so there is no loss; give other data")
    # only meta.json tells the bytes of the tokens' text, and of all of it
    knows = [stream.meta and stream.is_whole for stream in streams]
    sizes = [stream.meta["splits"]["val"].get("bytes") for stream in streams] if all(knows) else [None]
    size = sum(sizes) if all(sizes) else None
    return {
        "val_loss": nats / tokens,
        "perplexity": math.exp(min(nats / tokens, 700)),
        "bits_per_byte": nats / math.log(2) / size if size else None,
        "tokens": tokens,
    }


def open_streams(source: ModelSource, folders):
    """The validation splits of these folders. Raises UserError if this model cannot be evaluated on one."""
    document_mask = source.config.data.document_mask if source.config else "auto"
    streams = [open_stream(folder, "val", source.model.block_size, document_mask) for folder in folders]
    for stream in streams:
        stream.check_vocabulary(source.model.vocab_size)
        source.check_tokenizer(stream.folder)
    return streams


def preference_of(source: ModelSource):
    """The Preference by which pairs of answers are compared: as the model was trained, else dpo with its defaults."""
    train = source.config.train if source.config else TrainConfig()
    return Preference(train.loss if train.loss in LOSSES else "dpo", train.dpo_beta)


def open_reference(source: ModelSource, streams, path):
    """The ModelSource of the model --reference, whose log-probabilities are to be computed; None where none are
    needed, or the model's run has kept them, which are then set in the streams. Raises UserError."""
    if not streams or not streams[0].has_pairs:
        if path:
            found = f"{streams[0].folder} holds no pairs" if streams else "there are no data"
            raise UserError(f"--reference: found {path}, but {found}; leave it out")
        return None
    if path:
        found = open_trained(path)
        for stream in streams:
            stream.check_vocabulary(found.model.vocab_size)
            found.check_tokenizer(stream.folder)
        return found
    digest = source.state and source.state.get("reference")
    if not digest:
        raise UserError(
            f"--reference: none given, and {source.path} is of no preference tuning; give the model with which its "
            f"answers to {streams[0].folder} are compared"
        )
    remedy = "give the model as --reference"
    reference.attach(reference.read([source.path.resolve().parents[1]], digest, remedy), streams, remedy)
    return None


def open_all(path, which="best", data=None, needs_data=True, needs_text=False, reference_path=None, by_role=False):
    """(ModelSource, the validation splits, `open_reference`) of a trained model, see `trained.open_trained`. data: a
    folder of shards in place of the model's own. Raises UserError, where there are no splits with needs_data, and where
    the last one is not plain text with needs_text, or does not tell roles with by_role."""
    source = open_trained(path, which)
    folders = [data] if data else source.data
    if not folders and needs_data:
        raise UserError(f"--data: {path} does not say on what it was trained; give the folder of shards")
    streams = open_streams(source, folders)
    if needs_text and streams and streams[-1].loss_mask:
        raise UserError(
            f"--gzip: {streams[-1].folder} holds conversations, of which a part counts; expected plain text"
        )
    if by_role:
        for stream in streams:
            Roles(stream)
    return source, streams, open_reference(source, streams, reference_path)


def evaluate_parts(model, streams, by_role, *how, preference):
    """The result of `evaluate`, and with by_role that of `evaluate_roles` as "by_role". how: their other arguments."""
    result = evaluate(model, streams, *how, preference)
    return result | {"by_role": evaluate_roles(model, streams, *how)} if by_role else result


def evaluate_alone(source: ModelSource, streams, batch_size, reference_source=None, by_role=False):
    """The result of `evaluate_parts` in one process. Keeps no memory of the model. reference_source: of
    `open_reference`."""
    passes = sum(count_passes(stream, batch_size) for stream in streams)

    def load(source):
        with progress_bar("loading", len(own_shapes(source.model))) as progress:
            return load_model(source, progress=progress)

    if reference_source:
        model = load(reference_source)
        with progress_bar("reference", passes) as progress:
            reference.compute(model, streams, batch_size, progress=progress)
        del model  # before the next one is there
    model = load(source)
    with progress_bar("evaluating", passes * (1 + by_role)) as progress:
        how = batch_size, None, 0, 1, progress
        return evaluate_parts(model, streams, by_role, *how, preference=preference_of(source))


def evaluate_on_ranks(open_model, batch_size, by_role=False):
    """(rank, ModelSource, the validation splits, the result of `evaluate_parts`) on each rank of a launcher's.
    open_model() -> (ModelSource, streams, reference), as `open_all`. Raises UserError on all of them if one cannot take
    part."""
    from minzero import dist  # it alone needs DeepSpeed

    device, rank, world_size = dist.start_process_group(may_be_alone=True)
    with dist.all_or_none():
        source, streams, reference_source = open_model()
    facts = {"model": vars(source.model), "code": dist.code_digests()}
    facts["tokens"] = {str(stream.folder): content_digest(stream) for stream in streams}
    dist.refuse_different_ranks(facts)
    passes = sum(count_passes(stream, batch_size, world_size) for stream in streams)
    ranks = device, rank, world_size
    if reference_source:
        with progress_bar("reference", passes) as progress:
            model = load_sharded(reference_source, device)
            reference.compute(model, streams, batch_size, *ranks, progress)
        model.destroy()  # before the next one is there
        del model
        gc.collect()
    model = load_sharded(source, device)
    with progress_bar("evaluating", passes * (1 + by_role)) as progress:
        how = batch_size, *ranks, progress
        result = evaluate_parts(model, streams, by_role, *how, preference=preference_of(source))
    return rank, source, streams, result


# -- a compressor --------------------------------------------------------------------------------


def documents_of(tokenizer, ids):
    """Yield the text of each document in ids, (n,), as UTF-8. Empty ones are left out."""
    marks = np.isin(ids, [*tokenizer.begin, *tokenizer.end])
    for part, is_mark in zip(*(np.split(array, np.flatnonzero(marks)) for array in (ids, marks)), strict=True):
        if text := tokenizer.decode(part[~is_mark].tolist()):
            yield text.encode()


def compress(stream):
    """The sizes that `gzip -9` compresses the same documents to, in bits per byte: {"gzip_bits_per_byte": joined into
    one file, "gzip_one_by_one_bits_per_byte": one by one}."""
    tokenizer = tokenizer_of(stream.folder)
    documents = list(documents_of(tokenizer, stream.read(0, stream.tokens)))
    size = sum(map(len, documents))
    one_by_one = 0
    with progress_bar("compressing", len(documents)) as progress:
        for document in documents:
            one_by_one += len(gzip.compress(document, 9))
            progress()
    joined = len(gzip.compress(b"".join(documents), 9))
    return {"gzip_bits_per_byte": joined * 8 / size, "gzip_one_by_one_bits_per_byte": one_by_one * 8 / size}


# -- in words ------------------------------------------------------------------------------------


def report(source: ModelSource, streams, result):
    """Lines about the result of `evaluate`."""
    for stream in streams:
        learns_all = stream.meta and stream.meta.get("learn") == "all"
        answers = ", of which the assistant's words count" if stream.loss_mask and not learns_all else ""
        yield f"{source.description}: {stream.tokens - 1:,} tokens of {stream.folder}{answers}"
    if streams and streams[0].has_pairs:
        preference = preference_of(source)
        yield (
            f"validation loss {result['val_loss']:.4f} ({preference.kind}, beta {preference.beta:g}), accuracy "
            f"{result['accuracy']:.1%}, margin {result['margin']:.4f} over {result['pairs']:,} pairs"
        )
    elif streams:
        yield f"validation loss {result['val_loss']:.4f} nats per token, perplexity {result['perplexity']:.2f}"
        if result["bits_per_byte"] is None:
            reason = "the shards have no meta.json" if all(stream.is_whole for stream in streams) else "some is cut"
            yield f"bits per byte unknown: {reason}"
        else:
            yield f"bits per byte {result['bits_per_byte']:.4f}"


def report_compression(result):
    joined, one_by_one = result["gzip_bits_per_byte"], result["gzip_one_by_one_bits_per_byte"]
    return f"gzip -9 on the same text: {joined:.4f} bits per byte joined, {one_by_one:.4f} file by file"


def finite_or_none(value):
    """JSON knows neither NaN nor infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value

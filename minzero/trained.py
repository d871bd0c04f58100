"""Open a trained model: a run's folder, a checkpoint in it, or a folder in transformers' format.

    from minzero import load

    model, tokenizer = load("out/tiny")
    tokens = tokenizer("Once upon", return_tensors="pt")["input_ids"].to(model.head.weight.device)
    logits = model(tokens)  # (1, T, vocab_size)

`open_trained` checks everything without reading the weights; `load_model` and `load_sharded` read them.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from minzero import adapters, checkpoint, checkpoint_folder, checkpoint_state, fetch, four_bit, lora
from minzero.commands import is_first_rank
from minzero.config.build import build
from minzero.config.sections import Config, ModelConfig, data_weights
from minzero.data.conversations import chat_template, learned_template
from minzero.data.meta import read_meta
from minzero.data.pipeline import tokenizer_of
from minzero.data.shards import holds_data
from minzero.data.tokenizer import HuggingFaceTokenizer, from_folder
from minzero.data.tokenizer_files import open_huggingface
from minzero.errors import UserError, describe
from minzero.hf.read import (
    is_published,
    local_folder,
    open_published,
    read_model_config,
    refuse_differences,
    refuse_other_model,
)
from minzero.hf.weights import own_shapes
from minzero.nearest import suggesting
from minzero.zero import copy_into
from model import GPT

# of a folder in transformers' format, any of which says that it has a tokenizer of its own
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")

SAMPLES, SAMPLE_BYTES = 64, 1 << 16  # of a large file, for a digest of it


@dataclass
class ModelSource:
    """A trained model on disk, checked but not read: a checkpoint of ours, or a folder in transformers' format."""

    path: Path
    description: str
    model: ModelConfig
    load: Callable  # load() gives read(name of a parameter of ours)
    state: dict | None = None  # of a checkpoint
    config: Config | None = None  # of a checkpoint, as `checkpoint.open_weights` gives it
    data: list = field(default_factory=list)  # the folders that it learned from, as far as is known
    load_adapters: Callable | None = None  # of a checkpoint with adapters: gives read(name of an adapter's parameter)

    def check_tokenizer(self, folder):
        """Raises UserError if the data in `folder` was made with another tokenizer than the model's: equal ids would
        mean other text."""
        if fault := self.tokenizer_fault(folder):
            raise UserError(f"{folder}: {fault}; prepare that data with the model's tokenizer")

    def tokenizer_fault(self, folder):
        """In which way the data in `folder` was made with another tokenizer than the model's; None if it was not, or
        that is not known. Raises UserError if a tokenizer cannot be read."""
        meta = read_meta(folder)
        found = meta["tokenizer"].get("fingerprint") if meta else None
        if found is None:
            return None
        if self.state:
            learned = {entry["tokenizer"] for entry in self.state["data"].values()}
            if None in learned or found in learned:
                return None
            return f"found tokenizer {found}, expected {' or '.join(learned)} as the model was trained with"
        path = self.path / "tokenizer.json"
        if not path.exists():
            return None
        theirs = open_huggingface(path).get_vocab()
        with contextlib.suppress(UserError):  # it may have no end of text
            if HuggingFaceTokenizer(self.path).fingerprint() == found:
                return None
        ours = tokenizer_of(folder).vocabulary()
        wrong = sum(theirs.get(token) != number for token, number in ours.items())
        if not wrong:
            return None
        return f"found a tokenizer of which {wrong} of {len(ours)} tokens differ from {path}, expected the same"


# -- opening -------------------------------------------------------------------------------------


def holds_model(path):
    """Whether a path is one that `open_trained` takes. Looks at names alone."""
    path = Path(path)
    has_checkpoints = checkpoint_folder.is_complete(path) or bool(
        checkpoint_folder.complete_checkpoints(path / "checkpoints")
    )
    return has_checkpoints or is_published(path)


def model_of(found):
    """(the ModelConfig of a checkpoint, its state), without its weights. Raises UserError if it holds parameters of
    another."""
    state = checkpoint.read_state(found, look_at_files=is_first_rank())
    model = build({"model": state["config"]["model"]}, found / "state.json").model
    parameters = state["parameters"]
    if model.n_layer > len(parameters):  # which would take long to build
        raise UserError(f"{found}/state.json: {model.n_layer} layers, but {len(parameters)} parameters; use another")
    lora_config = checkpoint_state.lora_of(state)
    try:
        expected = adapters.adapter_shapes(model, lora_config) if lora_config.rank else own_shapes(model)
    except RuntimeError as error:  # torch's, of sizes that no number holds
        raise UserError(f"{found}/state.json: config.model: {describe(error)}") from None
    checkpoint.refuse_other_parameters(found, state, expected)
    return model, state


def open_checkpoint(found, known=None):
    """A checkpoint's folder -> ModelSource. known: its `model_of`, if it was read already. Raises UserError."""
    model, state = known or model_of(found)  # before the weights are looked at
    state, config, read = checkpoint.open_weights(found, state)
    folders = sorted(data_weights(state["config"]["data"]["path"]))
    if not config.lora.rank:
        return ModelSource(found, fetch.in_words(found), model, lambda: read, state, config, folders)
    base = find_base(config.train.init_from, state["base"], found)
    _, load_base = open_weights(base["path"], model)
    shapes = own_shapes(model)

    def load():
        whole = load_base()

        def read_base(name):  # learned positions past block_size are left out, as in training
            return whole(name)[: shapes[name][0]]

        if config.lora.base_bits:
            return lora.merged(model, config.lora, four_bit.as_quantized(model, read_base, state["precision"]), read)
        return lora.merged(model, config.lora, read_base, read)

    return ModelSource(found, fetch.in_words(found), model, load, state, config, folders, lambda: read)


def with_checkpoint(path, which, use):
    """The result of use(checkpoint) for the one that `path` and `which` mean (see `checkpoint_folder.find`). If its run
    deletes or replaces it meanwhile, the next one is used. An address is fetched from (see `fetch.fetch_checkpoint`).
    Raises UserError, which names the nearest run or step where there is none."""
    if fetch.is_address(path):
        return use(fetch.fetch_checkpoint(path, which))
    with suggesting(path, holds_model):
        try:
            checkpoint_folder.must_find(path, which)
        except UserError as error:
            raise UserError(f"{error}{nearest_step(path, which)}") from None
    return checkpoint_folder.reading(path, which, use)


def nearest_step(path, which):
    """A suggestion for a step of which a run has no checkpoint; empty where there is none to make."""
    complete = checkpoint_folder.complete_checkpoints(Path(path) / "checkpoints")
    steps = [checkpoint_folder.step_and_suffix(found)[0] for found in complete]
    if not steps or not which.isdecimal() or len(which) > 15:
        return ""
    return f"; the nearest is --checkpoint {min(steps, key=lambda step: abs(step - int(which)))}"


def open_trained(path, which="best"):
    """A run's folder, a checkpoint, an address of copies, or a folder in transformers' format -> ModelSource. which:
    best, latest or a step of the run. Reads no weights, but fetches those at an address. Raises UserError."""
    if not fetch.is_address(path) and is_published(Path(path)):
        return ModelSource(Path(path), *open_published(Path(path)))
    return with_checkpoint(path, which, open_checkpoint)


def folder_to_start_from(source, weights=True):
    """The folder that train.init_from names, which holds a model: see `local_folder`. Raises UserError."""
    with suggesting(source, holds_model):
        folder = local_folder(source, weights)
        if not is_published(folder) and (folder / adapters.CONFIG).is_file():
            raise UserError(
                f"train.init_from: {source} holds an adapter, expected a model; give the model that the adapter was "
                "trained beside, and the adapter as lora.init_from"
            )
        if not is_published(folder) and checkpoint_folder.find(folder, "best") is None:
            raise UserError(
                f"train.init_from: {source}: found neither a config.json of transformers' nor a checkpoint; expected "
                "one"
            )
    return folder


def model_to_start_from(source, like):
    """The ModelConfig of the model that train.init_from names. Reads no weights. like(ModelConfig): the one that is to
    have its weights. Raises UserError if there is no such model, or that one differs from it."""
    folder = folder_to_start_from(source, weights=False)
    if is_published(folder):
        published = read_model_config(folder)
        refuse_other_model(folder, like(published), published)
        return published
    found, saved = checkpoint_folder.reading(folder, "best", lambda found: (found, model_of(found)[0]))
    refuse_differences(found, like(saved), saved)
    return saved


def open_weights(source, model: ModelConfig):
    """The weights that `train.init_from` names, for a model of these settings -> (a description, a function load()
    that gives read(name of a parameter)). Reads none yet, but has checked everything that could be wrong: raises
    UserError."""
    folder = folder_to_start_from(source)
    if is_published(folder):
        description, _, load = open_published(folder, model)
        return description.replace(str(folder), source, 1), load
    found, known = checkpoint_folder.reading(folder, "best", lambda found: (found, model_of(found)))
    refuse_differences(found, model, known[0])
    return str(found), open_checkpoint(found, known).load


def identity_of(source):
    """{"path", "digest"} of the model that train.init_from names: a run with adapters needs the same one again when it
    is resumed, evaluated or exported. Of a folder in transformers' format the digest is of the files' names and sizes
    and of some of their bytes. Raises UserError."""
    folder = folder_to_start_from(source)
    if not is_published(folder):
        found = checkpoint_folder.must_find(folder, "best")
        files = checkpoint.read_state(found)["files"]  # of its weights, with their checksums
        digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode())
        return {"path": str(found.resolve()), "digest": digest.hexdigest()[:16]}
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for place in range(SAMPLES):
                file.seek(place * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return {"path": str(folder.resolve()), "digest": digest.hexdigest()[:16]}


def base_of(config, path, recorded):
    """`identity_of` of the model beside which a run trains adapters; None if it trains none. path: the checkpoint from
    which it continues, or None, and the base that is recorded there. Raises UserError."""
    if not config.lora.rank:
        return None
    source = config.train.init_from
    if not source:
        raise UserError(
            f"lora.rank: found {config.lora.rank} without train.init_from, which names the model that gets adapters; "
            "set it, or lora.rank to null"
        )
    return find_base(source, recorded, path or config.train.out_dir) if recorded else identity_of(source)


def find_base(source, base, where):
    """Where the model is whose adapters are in the checkpoint `where`, as `identity_of` gives it: that of
    train.init_from, if it is still the same, else where it was. base: as it was recorded. Raises UserError if it is not
    there any more, or is another."""
    if source:
        with contextlib.suppress(UserError):
            now = identity_of(source)
            if now["digest"] == base["digest"]:
                return now
    try:
        now = identity_of(base["path"])
    except UserError as error:
        raise UserError(
            f"{where}: its adapters belong to the weights in {base['path']}: {error}; put them back, or a link to them"
        ) from None
    if now["digest"] != base["digest"]:
        raise UserError(
            f"{where}: its adapters belong to the weights that were in {base['path']}, and there are others now (found "
            f"{now['digest']}, expected {base['digest']}); put them back"
        )
    return now


def doubts_about_data(source, folders):
    """Yields a line for each data folder that was made with another tokenizer than the model that train.init_from
    names: such a run may be meant, to give a model another tokenizer."""
    model = None
    for folder in folders:
        try:
            model = model or open_trained(local_folder(source))
            fault = model.tokenizer_fault(folder)
        except UserError as error:  # the run itself needs no tokenizer
            yield f"warning: whether {folder} was made with the tokenizer of train.init_from is not known: {error}"
            continue
        if fault:
            yield (
                f"warning: {folder}: {fault}; the weights of train.init_from know its ids as other text: prepare it "
                "with that model's tokenizer unless the model is to learn another"
            )


# -- reading -------------------------------------------------------------------------------------


def best_device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def load_model(source: ModelSource, device=None, progress=lambda: None):
    """The GPT in float32 and eval mode, on the fastest device here unless another is given. progress: called after
    each parameter."""
    with torch.device(device or best_device()):
        model = GPT(source.model)
    read = source.load()
    for name, parameter in model.named_parameters():
        parameter.copy_(read(name))
        progress()
    return model.eval()


def load_sharded(source: ModelSource, device):
    """The model in float32 and eval mode, each rank with a part of it: ZeRO-3 gathers a layer when it is needed. Every
    rank of the process group must call this; rank 0 reads the weights, one at a time."""
    import deepspeed  # which a model in one process does not need

    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=settings), device:
        model = GPT(source.model)
    copy_into(model, source.load)
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    engine.eval()
    return engine


# -- the tokenizer -------------------------------------------------------------------------------


def has_own_tokenizer(source: ModelSource):
    return any((source.path / name).exists() for name in TOKENIZER_FILES)


def open_tokenizer(source: ModelSource, data=None):
    """(the model's tokenizer as transformers', that of the data it was taken from, or None where it
    is that of a folder in transformers' format). data: a folder made with that tokenizer. Raises UserError if it is
    not known or not the model's."""
    folders = [data] if data else source.data
    of_data = None
    for folder in folders[:1]:
        with suggesting(folder, holds_data):
            source.check_tokenizer(folder)
    if folders and not has_own_tokenizer(source):
        where = folders[0]
        with suggesting(where, holds_data):
            of_data = tokenizer_of(where)
        # a model that learned conversations learned them in the data's form, whatever the tokenizer came with
        template = learned_template(of_data, folders)
        tokenizer = of_data.as_transformers(template or chat_template(of_data), replace=template is not None)
    else:
        where = source.path / "tokenizer.json"
        try:
            tokenizer = from_folder(source.path)
        except Exception as error:  # of many classes, some of them libraries' own
            reason = describe(error)
            raise UserError(f"{where}: {reason}; expected a tokenizer; or name data made with it: --data") from None
    largest = max(tokenizer.get_vocab().values())
    if largest >= source.model.vocab_size:
        raise UserError(
            f"{where}: found token ids up to {largest}, expected ids below the model's vocab_size "
            f"{source.model.vocab_size}; give its own tokenizer"
        )
    return tokenizer, of_data


def load(path, checkpoint="best", device=None, data=None):
    """A trained model and its tokenizer, from a run's folder, a checkpoint, or a folder in transformers' format.

    checkpoint: best, latest or a step of the run. device: the fastest one here by default. data: a folder of shards
    made with the model's tokenizer, if the run's own data has moved.

    Returns (model, tokenizer): the GPT of model.py in float32 and eval mode, tokens (B, T) -> logits (B, T, V), and
    the tokenizer as one of transformers', or None where the data has no meta.json that names it. Raises UserError,
    whose text says what was found and what to do."""
    source = open_trained(path, str(checkpoint))
    folder = data or (source.data[0] if source.data else None)
    is_unknown = folder and not has_own_tokenizer(source) and holds_data(folder) and not read_meta(folder)
    tokenizer = None if is_unknown else open_tokenizer(source, data)[0]
    return load_model(source, device), tokenizer

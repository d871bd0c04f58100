"""Export: a checkpoint as a folder that transformers 4 and 5, vLLM, llama.cpp's converter and lm-eval load."""

import contextlib
import os
import shutil
from pathlib import Path

import torch

from minzero.config.sections import ModelConfig
from minzero.data.conversations import learned_template
from minzero.data.meta import holds_conversations, read_meta, stops_of
from minzero.data.pipeline import tokenizer_of
from minzero.data.tokenizer import FINGERPRINTED, SAMPLE
from minzero.data.tokenizer_files import END_OF_TEXT
from minzero.errors import UserError, describe
from minzero.files import write_json
from minzero.hf.comparison import check_expressible
from minzero.hf.families import FAMILIES, HEAD, family_of, transformers_config
from minzero.hf.weights import to_transformers, weightless

MAX_SHARD = "5GB"  # of one file of weights


def config_json(theirs):
    """transformers' configuration as config.json holds it: every setting of the architecture, those at their defaults
    too, under the names of transformers 5 and of 4, which other programs read as well (llama.cpp's converter,
    CTranslate2)."""
    from transformers import PreTrainedConfig

    of_any_model = PreTrainedConfig().to_dict()
    found = {name: value for name, value in theirs.to_dict().items() if value != of_any_model.get(name, ...)}
    found |= {"torch_dtype": found["dtype"], "tie_word_embeddings": theirs.tie_word_embeddings}
    found["transformers_version"] = of_any_model["transformers_version"]
    found |= {name: getattr(theirs, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return found | FAMILIES[theirs.model_type].old_settings(theirs)


def generation_config_json(tokenizer, data):
    """generation_config.json, in words that transformers 4 and 5 share. tokenizer: of data.tokenizer, or None. data:
    the folders that the model learned from."""
    if tokenizer is None or tokenizer.end_of_text is None:
        return {}
    stops = stops_of(tokenizer, data)
    return {
        "bos_token_id": tokenizer.start_of_document,
        "eos_token_id": stops[0] if len(stops) == 1 else stops,
        "pad_token_id": tokenizer.pad,
        "do_sample": False,
    }


@contextlib.contextmanager
def written_whole(folder, temporary):
    """Write into `temporary`, then rename it to `folder`; on an error, leave nothing. Raises UserError."""
    from safetensors import SafetensorError

    try:
        temporary.mkdir(parents=True)
        yield
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: could not be written ({error}); fix that and export again") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_weights(folder, model: ModelConfig, read, dtype):
    """Write model.safetensors, or its parts and their index, of what read(our name) gives. Of the weights no more than
    one part in `dtype` and one tensor are in memory. Raises UserError if `dtype` cannot hold a number."""
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.torch import save_file

    names_in_files = {HEAD: FAMILIES[family_of(model)].head_in_files}
    weights = weightless(model).state_dict()
    shapes = {names_in_files.get(name, name): tensor for name, tensor in to_transformers(model, weights.__getitem__)}
    split = split_state_dict_into_shards_factory(
        shapes,
        get_storage_size=lambda tensor: tensor.numel() * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_SHARD,
    )
    parts = {}  # {file: its tensors}, of the files that are not complete
    missing = {file: set(names) for file, names in split.filename_to_tensors.items()}
    for name, tensor in to_transformers(model, read):
        stored = names_in_files.get(name, name)
        file = split.tensor_to_filename[stored]
        if file not in parts:  # allocated at once, so that what is read in between leaves no holes in memory
            parts[file] = {name: torch.empty(shapes[name].shape, dtype=dtype) for name in missing[file]}
        parts[file][stored].copy_(tensor)
        if parts[file][stored].isinf().any() and not tensor.isinf().any():
            raise UserError(f"--dtype: {name} holds numbers too large for {dtype}; choose bfloat16 or float32")
        missing[file].remove(stored)
        if not missing[file]:
            save_file(parts.pop(file), folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)  # else nobody but the owner may read it
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def check_new_folder(folder, temporary):
    """Raises UserError if an export would overwrite something."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: already there, expected a new or an empty folder; choose another")
    if temporary.exists():
        raise UserError(f"{temporary}: left by an export that was killed, or one is under way; remove it")


def texts_to_try(tokenizer):
    """Texts in which classes of tokenizers differ, of characters that this one has."""
    texts = [
        SAMPLE,
        *FINGERPRINTED.split(END_OF_TEXT),
        "don't",
        "WE'LL ",
        "cafe\u0301",
        "12345",
        "a\n\n  b",
        "x\r\n\t y",
    ]
    missing = {character for text in texts for character in tokenizer.missing_characters(text)}
    return ["".join(character for character in text if character not in missing) for text in texts]


def fault_of_auto_tokenizer(folder, tokenizer):
    """A line on AutoTokenizer where it gives other ids than the tokenizer that was written into `folder`, else None.
    transformers 5 has a class of its own for some families, which it takes whatever tokenizer_config.json says."""
    from transformers import AutoTokenizer

    remedy = "load it by PreTrainedTokenizerFast.from_pretrained, as README.md there does"
    try:
        theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        for text in texts_to_try(tokenizer):
            found = theirs(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
            if found != list(tokenizer.encode_ordinary(text)):
                name = type(theirs).__name__
                return f"warning: AutoTokenizer takes {name}, which gives other ids for {text[:40]!r}; {remedy}"
    except Exception as error:  # of many classes, some of them libraries' own
        return f"warning: AutoTokenizer does not load the tokenizer ({describe(error)}); {remedy}"
    return None


def write_settings(folder, model: ModelConfig, data, tokenizer=None, dtype="float32"):
    """Write all of an exported folder but the weights and the card: config.json, generation_config.json and, of a
    tokenizer of data.tokenizer, its files. data: the folders that the model learned from. Returns (transformers'
    config, a line as of `fault_of_auto_tokenizer`). Raises UserError where transformers has no such model."""
    check_expressible(model)
    ids = (tokenizer.end_of_text, tokenizer.start_of_document, tokenizer.pad) if tokenizer else ()
    theirs = transformers_config(model, dtype, *ids)
    write_json(folder / "config.json", config_json(theirs))
    write_json(folder / "generation_config.json", generation_config_json(tokenizer, data))
    if tokenizer is None:
        return theirs, None
    settings = {"model_max_length": model.block_size}
    if holds_conversations(data):  # in place of a template that the tokenizer came with: the model learned this form
        settings["chat_template"] = learned_template(tokenizer, data)
    tokenizer.save(folder, **settings)
    return theirs, fault_of_auto_tokenizer(folder, tokenizer)


def write_model(source, folder, dtype="float32"):
    """Write a checkpoint as a folder in transformers' format, which must not be there yet, or be empty. source: of
    `trained.open_checkpoint`. Returns a description. Raises UserError."""
    from minzero.hf.card import write_model_card

    folder = Path(folder).resolve()
    temporary = folder.with_name(folder.name + ".tmp")
    check_new_folder(folder, temporary)
    check_expressible(source.model)
    data = source.data[0]
    tokenizer = None
    if read_meta(data):
        source.check_tokenizer(data)
        tokenizer = tokenizer_of(data)
    is_chat = holds_conversations(source.data)
    with written_whole(folder, temporary):
        theirs, fault = write_settings(temporary, source.model, source.data, tokenizer, dtype)
        write_weights(temporary, source.model, source.load(), getattr(torch, dtype))
        write_model_card(temporary, source, dtype, is_chat, "PreTrainedTokenizerFast" if fault else "AutoTokenizer")
    description = f"{theirs.architectures[0]}, {dtype}"
    if tokenizer is None:
        description += f"\nwithout tokenizer files: {data} has no meta.json, so the tokenizer is not known"
    return f"{description}\n{fault}" if fault else description

"""An exported folder as a GGUF file, by llama.cpp's own converter, convert_hf_to_gguf.py.

The converter knows a tokenizer by the hash of some ids, so it refuses every tokenizer that is not published: here it
is told which of llama.cpp's pre-tokenizers gives the tokenizer's ids, and what else it would leave out, see
`complete_converter`.
"""

import importlib.util
import json
import logging
import os
import sys
import tempfile
from pathlib import Path

from minzero.config.sections import ModelConfig
from minzero.config.values import in_short
from minzero.data.tokenizer_files import GPT2_PATTERNS, PATTERN, open_huggingface
from minzero.errors import UserError, describe
from minzero.files import check_can_write, read_json
from minzero.hf.families import FAMILIES, family_of
from minzero.hf.read import is_published, open_published
from minzero.nearest import suggesting

# {pattern: (llama.cpp's name (`tokenizer.ggml.pre`), whether it takes a piece that is a token without merging)}
PRE_TOKENIZERS = {PATTERN: ("llama-bpe", True)} | dict.fromkeys(GPT2_PATTERNS, ("gpt-2", False))
TIED_TWICE = {("gpt_neox", "gpt_neox.embed_in.weight")}
TIED_TWICE |= {(family, "model.embed_tokens.weight") for family in ("olmo2", "olmoe")}
NORMALIZES = {"qwen3_moe": True, "olmoe": False}  # model.normalize_experts as llama.cpp has it
OUTTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}  # these change no weight


# -- the tokenizer -------------------------------------------------------------------------------


def pattern_of(tokenizer):
    """The pattern by which a tokenizer.json of byte-level BPE cuts text; None if it does something else."""
    cut = tokenizer["pre_tokenizer"] or {}
    steps = [cut]
    if cut.get("type") == "Sequence":
        steps = cut["pretokenizers"] or [{}]
    *before, last = steps
    if tokenizer["normalizer"] or last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last["use_regex"]:
        return None if before else GPT2_PATTERNS[-1]
    if len(before) != 1 or before[0].get("type") != "Split" or before[0]["behavior"] != "Isolated":
        return None
    if before[0]["invert"]:
        return None
    return before[0]["pattern"].get("Regex")


def pre_tokenizer_name(folder):
    """llama.cpp's name of the pre-tokenizer that gives the ids of the tokenizer in `folder`. Raises UserError if it
    has none."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; export a run whose data has a meta.json, which names the tokenizer")
    tokenizer = open_huggingface(path)
    content = json.loads(tokenizer.to_str())
    pattern = pattern_of(content)
    if content["model"]["type"] != "BPE" or pattern not in PRE_TOKENIZERS:
        raise UserError(
            f"{path}: cuts text by {pattern or 'something else than a pattern'!r}, expected Llama 3's pattern or "
            "GPT-2's: llama.cpp has no other that gives the same ids. Train a tokenizer (data/train_tokenizer.py) and "
            "a model with it, or use gpt2's"
        )
    if tokenizer.encode("").ids:
        raise UserError(
            f"{path}: adds tokens to every text; that is not a tokenizer of ours: call the converter itself"
        )
    name, whole = PRE_TOKENIZERS[pattern]
    if wrong := pieces_that_differ(content, whole):
        raise UserError(
            f"{path}: llama.cpp's {name} gives other ids for {len(wrong)} pieces of text, {wrong[0]!r} among them; "
            "train a tokenizer with data/train_tokenizer.py"
        )
    return name


def pieces_that_differ(content, whole):
    """The texts of tokens that get other ids where a piece that is a token is taken as it is (whole), or is merged
    from its bytes like any other, than the tokenizer.json with this content gives them."""
    from tokenizers import Tokenizer

    if content["model"]["ignore_merges"] == whole:
        return []
    before = Tokenizer.from_str(json.dumps(content))
    content = content | {"model": content["model"] | {"ignore_merges": whole}}
    after = Tokenizer.from_str(json.dumps(content))
    texts = [before.decode([number]) for number in before.get_vocab().values()]
    texts = [text for text in texts if text and "\ufffd" not in text]  # a piece is whole characters
    pairs = zip(texts, before.encode_batch(texts), after.encode_batch(texts), strict=True)
    return [text for text, one, two in pairs if one.ids != two.ids]


# -- the model -----------------------------------------------------------------------------------


def refuse_what_llama_cpp_computes_otherwise(folder, model: ModelConfig):
    """Raises UserError for settings that the converter passes over, or that llama.cpp has fixed for a family."""
    family, scaling = family_of(model), model.rotary_scaling or {}
    path, kind = folder / "config.json", scaling.get("rope_type")
    if model.sliding_window and model.sliding_window < model.block_size:
        raise UserError(
            f"{path}: model.sliding_window: found {model.sliding_window}, expected null or at least model.block_size "
            f"{model.block_size}: llama.cpp attends to all tokens in this family"
        )
    if family == "smollm3" and model.no_rotary_layers not in (None, 4):
        raise UserError(
            f"{path}: model.no_rotary_layers: found {model.no_rotary_layers}, expected 4: llama.cpp leaves rotary "
            "positions out of every fourth layer of this family"
        )
    normalizes = NORMALIZES.get(family, model.normalize_experts)
    if model.normalize_experts != normalizes:
        raise UserError(
            f"{path}: model.normalize_experts: found {in_short(model.normalize_experts)}, expected "
            f"{in_short(normalizes)}: llama.cpp knows no other in this family"
        )
    if family == "olmoe" and model.kv_heads != model.n_head:
        raise UserError(
            f"{path}: model.n_kv_head: found {model.kv_heads}, expected {model.n_head}: llama.cpp has no grouped "
            "queries in this family"
        )
    of_llama = ("llama", "mistral", "smollm3", "mixtral")
    is_known = kind in (None, "linear", "yarn") or (kind == "llama3" and family in of_llama)
    if family == "gpt_neox":
        is_known = kind is None
    if not is_known or {"truncate", "mscale", "mscale_all_dim"} & scaling.keys():
        raise UserError(
            f"{path}: model.rotary_scaling: found {in_short(scaling)}, which llama.cpp's converter does not pass on "
            "in this family; use the folder with transformers or vLLM"
        )


# -- the converter -------------------------------------------------------------------------------


def load_converter(folder):
    """The module convert_hf_to_gguf of a copy of llama.cpp. Raises UserError if there is none, or not whole."""
    script = Path(folder).resolve() / "convert_hf_to_gguf.py"
    if not script.is_file():
        raise UserError(
            f"--llama_cpp: {script}: no such file; the converter comes with llama.cpp's source, which is in the source "
            "package of llama-cpp-python (pip download --no-deps --no-binary :all: llama-cpp-python; unpack it; "
            "--llama_cpp llama_cpp_python-*/vendor/llama.cpp)"
        )
    sys.path.append(str(script.parent))  # for its package `conversion`; it finds its own gguf-py
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise UserError(f"{script}: needs {error.name} ({error}); pip install it, or copy llama.cpp whole") from None
    return module


def complete_converter(model_class, model: ModelConfig, pre_tokenizer):
    """Add to the converter's class for a family what it cannot know or leaves out:

    - the name of the pre-tokenizer; that neither a BOS nor an EOS is added to a text, where llama.cpp adds a BOS by
      default for Llama 3's; and no vocabulary but tokenizer.json's is looked for;
    - GPT-2's and GPT-NeoX's settings under the names that old versions of transformers wrote;
    - a width of GPT-2's MLP other than 4 times the model's;
    - GPT-NeoX's rotary base, without which llama.cpp takes 10,000;
    - OLMoE's epsilon, for which it writes 1e-5;
    - a tied output layer of GPT-NeoX, OLMo 2 and OLMoE, which llama.cpp wants to find as a tensor of its own."""
    family = family_of(model)
    set_parameters, modify = model_class.set_gguf_parameters, model_class.modify_tensors

    def set_vocab(self):
        self._set_vocab_gpt2()
        self.gguf_writer.add_add_bos_token(False)
        self.gguf_writer.add_add_eos_token(False)

    def set_gguf_parameters(self):
        old_names = {"n_ctx": model.block_size} if family == "gpt2" else {"rope_theta": model.rotary_theta}
        old_names |= {"rotary_pct": model.rotary_fraction} if family == "gpt_neox" else {}
        self.hparams = old_names | self.hparams
        set_parameters(self)
        if family == "gpt2" and model.mlp_width != 4 * model.n_embd:
            self.gguf_writer.add_feed_forward_length(model.mlp_width)
        if family == "gpt_neox":
            self.gguf_writer.add_rope_freq_base(model.rotary_theta)
        if family == "olmoe":
            self.gguf_writer.add_layer_norm_rms_eps(model.norm_eps)

    def modify_tensors(self, tensor, name, layer):
        yield from modify(self, tensor, name, layer)
        if model.tie_embeddings and (family, name) in TIED_TWICE:
            yield from modify(self, tensor, FAMILIES[family].head_in_files, layer)

    model_class.get_vocab_base_pre = lambda *_: pre_tokenizer
    model_class.set_vocab = set_vocab
    model_class.set_gguf_parameters = set_gguf_parameters
    model_class.modify_tensors = modify_tensors


def convert(folder, out, llama_cpp, outtype=None):
    """A folder of export.py's -> the GGUF file `out`, which must not be there yet. outtype: the converter's, by default
    the type that the folder's weights have. Returns a description. Raises UserError.

    To be called once in a process: it changes the converter's classes."""
    folder, out = Path(folder), Path(out)
    if os.path.lexists(out):
        raise UserError(f"{out}: already there; choose another name, or remove it")
    check_can_write("out", out)  # before the model and the converter are loaded
    with suggesting(folder, is_published):
        if not is_published(folder):
            raise UserError(
                f"{folder}: found no config.json of transformers' in it; expected a folder that export.py wrote"
            )
    _, model, _ = open_published(folder)
    refuse_what_llama_cpp_computes_otherwise(folder, model)
    architecture = FAMILIES[family_of(model)].architecture
    config = read_json(folder / "config.json")
    outtype = outtype or OUTTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), "f32")
    pre_tokenizer = pre_tokenizer_name(folder)
    converter = load_converter(llama_cpp)
    own_arguments = sys.argv
    try:
        with tempfile.TemporaryDirectory(prefix=".to_gguf_", dir=out.parent) as temporary:
            written = Path(temporary) / "model.gguf"
            find = getattr(converter, "get_model_class", None) or converter.ModelBase.from_model_architecture
            complete_converter(find(architecture), model, pre_tokenizer)
            logging.basicConfig(level=logging.WARNING)  # else it says hundreds of lines
            sys.argv = [converter.__file__, str(folder), "--outfile", str(written), "--outtype", outtype]
            converter.main()
            os.replace(written, out)
    except OSError as error:
        raise UserError(f"{out}: could not be written ({error}); make room or choose another place") from None
    except (Exception, SystemExit) as error:  # of a program that is not ours
        reason = describe(error)
        raise UserError(f"{converter.__file__}: ended with {reason}; try another version of llama.cpp") from None
    finally:
        sys.argv = own_arguments
    description = f"{architecture}, {outtype}, pre-tokenizer {pre_tokenizer}"
    if model.mlp == "gelu_exact":
        description += "\nwarning: llama.cpp computes the tanh form of GELU, this model was made with the exact one"
    return description

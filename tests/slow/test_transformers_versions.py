"""Exports as other programs read them: transformers 4.46, 4.57 and the one installed, and CTranslate2. Versions that
are not installed are put into a folder of the user's cache, once."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import export
from minzero.data import pipeline
from minzero.data.conversations import LEARNED, with_marks
from minzero.data.learn_tokenizer import train_tokenizer
from minzero.data.tokenizer import load_tokenizer
from minzero.data.tokenizer_files import save_for_transformers, save_tokenizer
from minzero.hf.families import transformers_config
from minzero.hf.write import config_json
from minzero.trained import load_model, open_trained
from tests.helpers.processes import beside, environment
from tests.helpers.trained_runs import FAMILIES, GPT2, LLAMA, NEOX, one_number_changed, write_data, write_run
from tests.unit.test_export import LLAMA3_SCALING, NASTY, YARN_SCALING, of_pattern

pytestmark = pytest.mark.slow
VERSIONS = {  # transformers: the packages whose versions it pins
    "4.46.3": ["tokenizers==0.20.3", "huggingface_hub==0.36.0"],  # has some of the families
    "4.57.6": ["tokenizers==0.22.1", "huggingface_hub==0.36.0"],
    "installed": [],
}
UNTIED = {"tie_embeddings": False}  # a random model whose output layer is its embedding mostly repeats a token
YARN = YARN_SCALING | {"original_max_position_embeddings": 256}
OTHER = {"mlp_hidden": 37, "norm_eps": 1e-2}
MODELS = {
    "gpt2": dataclasses.replace(GPT2, **UNTIED),
    "gpt2_other": dataclasses.replace(GPT2, **OTHER, bias=False),
    "llama": dataclasses.replace(LLAMA, **UNTIED, rotary_theta=500000.0),
    "llama_other": dataclasses.replace(LLAMA, **OTHER, bias=True, n_kv_head=None, rotary_theta=123.5),
    "gpt_neox": dataclasses.replace(NEOX, rotary_theta=500000.0),
    "gpt_neox_other": dataclasses.replace(NEOX, **OTHER, bias=False, tie_embeddings=True, rotary_theta=123.5),
    "pythia": dataclasses.replace(NEOX, parallel_residual=True, rotary_fraction=0.25, mlp="gelu_exact"),
    "llama31": dataclasses.replace(LLAMA, **UNTIED, head_dim=16, rotary_scaling=LLAMA3_SCALING),
    "llama_linear": dataclasses.replace(LLAMA, **UNTIED, rotary_scaling={"rope_type": "linear", "factor": 4.0}),
    # a context shorter than YaRN's original one, from which some versions take the ramp
    "llama_yarn": dataclasses.replace(LLAMA, **UNTIED, rotary_scaling=YARN),
    "mistral": dataclasses.replace(FAMILIES["mistral"], **UNTIED),
    "mistral_full": dataclasses.replace(FAMILIES["mistral"], **UNTIED, sliding_window=None, family="mistral"),
    "qwen2": dataclasses.replace(FAMILIES["qwen2"], **UNTIED),
    "qwen2_windows": dataclasses.replace(FAMILIES["qwen2"], n_layer=3, sliding_window=5, full_attention_layers=[0]),
    "qwen2_yarn": dataclasses.replace(FAMILIES["qwen2"], **UNTIED, rotary_scaling=YARN),
    "qwen3": dataclasses.replace(FAMILIES["qwen3"], **UNTIED),
    "qwen3_windows": dataclasses.replace(FAMILIES["qwen3"], n_layer=3, sliding_window=5, full_attention_layers=[0]),
    "olmo2": dataclasses.replace(FAMILIES["olmo2"], **UNTIED),
    "smollm3": dataclasses.replace(FAMILIES["smollm3"], **UNTIED),
    "mixtral": dataclasses.replace(FAMILIES["mixtral"], **UNTIED),
    "mixtral_windows": dataclasses.replace(FAMILIES["mixtral"], **UNTIED, sliding_window=5),
    "qwen3_moe": dataclasses.replace(FAMILIES["qwen3_moe"], **UNTIED),
    "olmoe": dataclasses.replace(FAMILIES["olmoe"], **UNTIED),
    # of a width that the grouped product of transformers 5 takes
    "olmoe_other": dataclasses.replace(FAMILIES["olmoe"], **OTHER | {"mlp_hidden": 36}, normalize_experts=True),
}
NOT_IN = {  # in transformers 4.46.3: families that came later, and what its code computes in another way
    "4.46.3": {name for name in MODELS if name.startswith(("qwen3", "olmo2", "smollm3"))}
    | {"qwen3_bfloat16", "qwen3_moe_bfloat16", "olmo2_bfloat16", "smollm3_bfloat16"}
    | {"llama_yarn", "qwen2_yarn", "qwen2_windows"},
}
EXPORTS = [*MODELS, *(f"{family}_bfloat16" for family in FAMILIES)]
TALKS = [
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2."},
        {"role": "user", "content": "And \u00e4?\n\nSay it."},
        {"role": "assistant", "content": " \u00fc, \x1ereally.  "},
    ],
    [{"role": "assistant", "content": ""}, {"role": "user", "content": "{{ bos_token }}{% raw %}"}],
]
NO_TALKS = [
    [{"role": "tool", "content": "x"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    [{"content": "x"}],
]


def run_with(folders, *command):
    paths = [str(folder) for folder in folders]
    more = {"PYTHONPATH": os.pathsep.join([*paths, environment()["PYTHONPATH"]]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *map(str, command)], env=environment(**more), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def exports(tmp_path_factory, shared):
    """A folder with EXPORTS, tokenizers, and asked.json, the instructions for other_transformers.py."""
    folder = tmp_path_factory.mktemp("exports")
    data = write_data(folder / "data")
    for name, config in MODELS.items():
        write_run(folder / "runs" / name, config, data)
        export.main([str(folder / "runs" / name), str(folder / name)])
    for family in FAMILIES:
        flags = ["--dtype", "bfloat16"]
        export.main([str(folder / "runs" / family), str(folder / f"{family}_bfloat16"), *flags])
    documents = ((str(number), with_marks("", TALKS[0])) for number in range(40))
    flags = ["--out", str(folder / "talks"), "--workers", "1", "--val_fraction", "0.3"]
    pipeline.prepare(documents, "bytes", pipeline.options("", ".").parse_args(flags), loss_mask=True)
    write_run(folder / "runs" / "chat", dataclasses.replace(LLAMA, block_size=256), str(folder / "talks"))
    export.main([str(folder / "runs" / "chat"), str(folder / "chat")])
    generator = random.Random(0)
    pieces = [*"  \n\r\t'stLlvRe0123456789½²\u017fKabß.,/-é東\u0301\u00a0\u2028\u3000😀ǅ", "\n\n", "'LL", "'re"]
    texts = NASTY + ["".join(generator.choices(pieces, k=generator.randrange(14))) for _ in range(500)]
    asked = {"exports": EXPORTS, "prompts": ["abc xyz", "z"], "texts": texts, "tokens": [list(range(3, 19))] * 2}
    asked["tokenizers"] = list(write_tokenizers(folder))
    asked |= {"chat": "chat", "conversations": TALKS, "no_conversations": NO_TALKS}
    (folder / "asked.json").write_text(json.dumps(asked))
    return folder


def write_tokenizers(folder):
    """{name: tiktoken's encoding} of the tokenizers written into folders of these names, each beside a config.json."""
    encodings = {"bytes": load_tokenizer("bytes"), "gpt2_tokenizer": load_tokenizer("gpt2")}
    with pytest.MonkeyPatch.context() as patch:
        encodings |= {name: of_pattern(name, patch) for name in ("cl100k_base", "o200k_base")}
    save_tokenizer(folder / "trained", *train_tokenizer([" ".join(NASTY) * 20], 300))
    encodings["trained"] = load_tokenizer(folder / "trained")
    for name, encoding in encodings.items():
        (folder / name).mkdir(exist_ok=True)
        save_for_transformers(folder / name, encoding._mergeable_ranks, encoding._special_tokens, encoding._pat_str)
        config = dataclasses.replace(LLAMA, vocab_size=encoding.n_vocab)
        theirs = transformers_config(config, end_of_text=encoding._special_tokens["<|endoftext|>"])
        (folder / name / "config.json").write_text(json.dumps(config_json(theirs)))
    return encodings


@pytest.fixture(scope="module", params=VERSIONS)
def read_by(request, exports):
    """The results of one version of transformers."""
    version, out = request.param, exports / f"{request.param}.pt"
    folders = (
        []
        if version == "installed"
        else [beside(f"transformers-{version}", f"transformers=={version}", *VERSIONS[version])]
    )
    left_out = json.dumps(sorted(NOT_IN.get(version, ())))
    run_with(folders, Path(__file__).with_name("other_transformers.py"), exports, out, left_out)
    found = torch.load(out)
    assert version in ("installed", found["version"])
    return found


def of_version(read_by, name):
    if name in NOT_IN.get(read_by["version"], ()):
        pytest.skip(f"transformers {read_by['version']} computes no such model")
    return read_by[name]


def greedy(model, prompt, count):
    """The most likely next ids, one after the other, until the end of text, which then repeats as padding."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ended = tokens[len(prompt) :][-1:] == [256]
            tokens.append(256 if ended else model(torch.tensor([tokens]))[0, -1].argmax().item())
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", EXPORTS)
def test_every_version_computes_what_our_model_does(exports, read_by, name):
    found, tokens = of_version(read_by, name), torch.tensor([list(range(3, 19))] * 2)
    rounded = name.endswith("bfloat16")
    model = load_model(open_trained(exports / name if rounded else exports / "runs" / name))

    @torch.no_grad()
    def difference():
        return (model(tokens) - found["logits"]).abs().max().item()

    worst, allowed = difference(), 1e-5 * max(1, found["logits"].abs().max().item())
    print(f"{name} in transformers {read_by['version']}: {worst:.1e}")
    assert worst < allowed
    for weight in one_number_changed(model, by=0.1):
        assert difference() > 2 * allowed, f"one number of {weight} would not be noticed"
    assert found["dtype"] == ("torch.bfloat16" if rounded else "torch.float32")
    # a padded batch is continued as each text is by itself
    expected = [greedy(model, prompt.encode(), 6) for prompt in ("abc xyz", "z")]
    longest = max(next((n + 1 for n, token in enumerate(row) if token == 256), 6) for row in expected)
    assert found["written"] == [row[:longest] for row in expected]


@pytest.mark.parametrize("name", EXPORTS)
def test_every_version_reads_the_special_tokens_and_runs_the_code_of_the_model_card(exports, read_by, name):
    found = of_version(read_by, name)
    assert set(found["ends"]) == set(found["special"]) == {256} and found["longest"] == 16
    assert found["inputs"] == ["attention_mask", "input_ids"]
    assert found["card"].startswith("Once")


def test_every_version_gives_tiktokens_ids(exports, read_by, tmp_path):
    texts = json.loads((exports / "asked.json").read_text())["texts"]
    for name, encoding in write_tokenizers(tmp_path).items():
        assert read_by[name] == [encoding.encode_ordinary(text) for text in texts], name


def test_every_version_masks_what_is_learned(read_by):
    encoding = load_tokenizer("bytes")
    for talk, (ids, mask) in zip(TALKS, read_by["chat"], strict=True):
        expected_ids, expected_mask = [256], [0]
        for number, part in enumerate(with_marks("", talk).split(LEARNED)):
            tokens = encoding.encode_ordinary(part) + [256] * (number % 2)
            expected_ids += tokens
            expected_mask += [number % 2] * len(tokens)
        assert (ids, mask) == (expected_ids, expected_mask)


CONVERT = """
import sys, json, ctranslate2, numpy
from pathlib import Path
from ctranslate2.converters import TransformersConverter
folder, found = Path(sys.argv[1]), {}
for name in json.loads(sys.argv[2]):
    TransformersConverter(str(folder / name)).convert(str(folder / name / "converted"))
    generator = ctranslate2.Generator(str(folder / name / "converted"), device="cpu", compute_type="float32")
    words = json.loads((folder / name / "words.json").read_text())
    written = generator.generate_batch([words], max_length=6, include_prompt_in_result=False)[0].sequences_ids[0]
    with open(folder / name / "found.json", "w") as file:
        json.dump([numpy.array(generator.forward_batch([words])).tolist(), list(written)], file)
"""


def test_ctranslate2_computes_what_our_model_does(exports, tmp_path):
    """With settings that it supports: the ids of the tokenizer alone, the usual epsilon, GPT-NeoX's rotary base."""
    names = {"gpt2": MODELS["gpt2"], "llama": MODELS["llama"], "gpt_neox": NEOX}
    for name, config in names.items():
        write_run(tmp_path / "runs" / name, dataclasses.replace(config, vocab_size=257), str(exports / "data"))
        export.main([str(tmp_path / "runs" / name), str(tmp_path / name)])
        vocabulary = json.loads((tmp_path / name / "tokenizer.json").read_text())["model"]["vocab"]
        words = {index: word for word, index in vocabulary.items()}
        (tmp_path / name / "words.json").write_text(json.dumps([words[index] for index in b"abc xyz"]))
    other = beside("transformers-4.57.6", "transformers==4.57.6", *VERSIONS["4.57.6"])
    run_with([other, beside("ctranslate2-4.8.5", "ctranslate2==4.8.5")], "-c", CONVERT, tmp_path, json.dumps([*names]))
    for name in names:
        logits, written = json.loads((tmp_path / name / "found.json").read_text())
        model = load_model(open_trained(tmp_path / "runs" / name))
        with torch.no_grad():
            worst = (model(torch.tensor([list(b"abc xyz")])) - torch.tensor(logits)).abs().max().item()
        print(f"{name} in CTranslate2: {worst:.1e}")
        expected = greedy(model, b"abc xyz", 6)
        assert worst < 2e-5 and written == expected[: expected.index(256) if 256 in expected else 6]

"""Models whose tokenizer came from tokenizer.json: sampled, evaluated, exported, checked against data, chatted with."""

import json
import shutil

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import eval
import export
import sample
import to_gguf
from minzero import evaluate, load
from minzero.config.sections import ModelConfig
from minzero.data.conversations import Conversations, chat_template
from minzero.data.local_files import Files
from minzero.data.pipeline import tokenizer_of
from minzero.data.shards import NO_LOSS, STARTS, TokenStream
from minzero.data.tokenizer import load_tokenizer
from minzero.errors import UserError
from minzero.hf import read as hf_read
from minzero.trained import doubts_about_data, open_trained
from tests.helpers.data_sets import prepare
from tests.helpers.foreign_tokenizers import KINDS, odd_strings, texts, write_all
from tests.helpers.trained_runs import GPT2, LLAMA, answers_of_both, write_run

MODEL = ModelConfig(**vars(LLAMA) | {"vocab_size": 1536, "block_size": 64})  # wider than any of the tokenizers
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
LOSSLESS = ["gpt2", "llama3", "llama2"]
TALKS = [
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"What is {number} in naïve 東京?"},
        {"role": "assistant", "content": f"It is {number + 1}."},
        {"role": "user", "content": "don't\n\nWE'LL"},
        {"role": "assistant", "content": "x = 1\n    y = 2"},
    ]
    for number in range(40)
]


def prepare_text(tokenizer, out):
    documents = [(str(number), text[:20_000]) for number, text in enumerate(texts())]
    prepare(documents, out, tokenizer=str(tokenizer))
    return str(out)


def prepare_talks(tokenizer, folder):
    """Conversations in folder/talks. Returns that folder."""
    rows = "".join(json.dumps({"messages": talk}) + "\n" for talk in TALKS)
    (folder / "talks.jsonl").write_text(rows)
    documents = Conversations(Files([str(folder / "talks.jsonl")], "messages", list))
    prepare(documents, folder / "talks", tokenizer=str(tokenizer), loss_mask=True)
    return str(folder / "talks")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """tokenizers/<kind>, qwen's with a chat template; data/<kind>; run/<kind>; hf/<kind>."""
    folder = tmp_path_factory.mktemp("foreign_models")
    write_all(folder / "tokenizers")
    (folder / "tokenizers" / "qwen" / "chat_template.jinja").write_text(TEMPLATE)
    for kind in KINDS:
        data = prepare_text(folder / "tokenizers" / kind, folder / "data" / kind)
        write_run(folder / "run" / kind, MODEL, data)
        export.main([str(folder / "run" / kind), str(folder / "hf" / kind)])
    return folder


# -- export --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_export_has_the_tokenizer_of_the_model_it_was_continued_from(place, kind):
    original, exported = place / "tokenizers" / kind, place / "hf" / kind
    assert (exported / "tokenizer.json").read_bytes() == (original / "tokenizer.json").read_bytes()
    before, after = (AutoTokenizer.from_pretrained(path) for path in (original, exported))
    for text in odd_strings(500, seed=2):
        ids = after(text, verbose=False)["input_ids"]
        assert ids == before(text, verbose=False)["input_ids"]
        if kind in LOSSLESS:
            plain = after.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
            assert after.decode(plain) == (text.replace("\u2581", " ") if kind == "llama2" else text)
    assert after.special_tokens_map == before.special_tokens_map and after.chat_template == before.chat_template
    assert (after.chat_template is not None) == (kind == "qwen")
    _, _, begin, (end,) = KINDS[kind]
    end, eos = (after.convert_tokens_to_ids(token) for token in (end, before.eos_token))
    start = after.convert_tokens_to_ids(begin[0]) if begin else end
    config = json.loads((exported / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (start, end, None)
    generation = GenerationConfig.from_pretrained(exported)
    assert generation.eos_token_id == (end if end == eos else [end, eos])
    assert generation.bos_token_id == start and generation.pad_token_id == end
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert model.generate(**after("def f", return_tensors="pt"), max_new_tokens=5).shape[1] > 2


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("settings", [None, {}, {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}])
def test_auto_tokenizer_takes_the_same_class_beside_another_models_config(place, tmp_path, settings, config):
    """Without a class in tokenizer_config.json AutoTokenizer takes that of the model in config.json, which cuts text by
    a pattern of its own."""
    shutil.copytree(place / "tokenizers" / "qwen", tmp_path / "t")
    path = tmp_path / "t" / "tokenizer_config.json"
    path.unlink() if settings is None else path.write_text(json.dumps(settings))
    model = ModelConfig(**vars(config) | {"vocab_size": 1536})
    data = prepare_text(tmp_path / "t", tmp_path / "data")
    write_run(tmp_path / "run", model, data)
    export.main([str(tmp_path / "run"), str(tmp_path / "hf")])
    tokenizer, ours = AutoTokenizer.from_pretrained(tmp_path / "hf", split_special_tokens=True), tokenizer_of(data)
    for text in odd_strings(300, seed=3):
        assert tokenizer.encode(text, add_special_tokens=False, verbose=False) == ours.encode_ordinary(text)
    assert tokenizer.eos_token == ("<|im_end|>" if settings else "<|endoftext|>")  # as it came, or the end of text
    found = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert found == ("Qwen2Tokenizer" if settings else "PreTrainedTokenizerFast")  # known to transformers 4 as well


def test_padding_is_the_tokenizers_own(place, tmp_path):
    shutil.copytree(place / "tokenizers" / "llama3", tmp_path / "t")
    path = tmp_path / "t" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<|eot_id|>"}))
    write_run(
        tmp_path / "run", ModelConfig(**vars(GPT2) | {"vocab_size": 1536}), prepare_text(tmp_path / "t", tmp_path)
    )
    export.main([str(tmp_path / "run"), str(tmp_path / "hf")])
    pad = AutoTokenizer.from_pretrained(tmp_path / "hf").pad_token_id
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["pad_token_id"] == pad
    assert GenerationConfig.from_pretrained(tmp_path / "hf").pad_token_id == pad


def test_the_model_card_says_where_the_chat_template_comes_from(place):
    said = {kind: (place / "hf" / kind / "README.md").read_text() for kind in ("gpt2", "qwen")}
    assert "the chat template came with the tokenizer" in said["qwen"]
    assert "It continues text" in said["gpt2"] and "trained on conversations" not in said["gpt2"] + said["qwen"]


# -- sample.py, eval.py, load --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_and_its_export_are_sampled_and_evaluated_alike(place, kind, tmp_path, capsys):
    data = str(place / "data" / kind)
    written, numbers = [], []
    exported = shutil.copytree(place / "hf" / kind, tmp_path / "hf")
    path = exported / "generation_config.json"  # of a run, no id is written that stands for no token
    beyond = list(range(load_tokenizer(exported).n_vocab, 1536))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"suppress_tokens": beyond}))
    for source in (place / "run" / kind, exported):
        written.append([])
        for prompt in ("def main", ""):
            sample.main([str(source), "--prompt", prompt, "--tokens", "8", "--temperature", "0"])
            written[-1].append(capsys.readouterr().out)
        eval.main([str(source), "--data", data, "--gzip", "--json"])
        numbers.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
        model, tokenizer = load(source, device="cpu", data=data)
        assert model.config.vocab_size == 1536 and len(tokenizer) <= 1504
    assert written[0][0].startswith("def main") and numbers[0] == pytest.approx(numbers[1], rel=1e-5)
    assert written[0] == written[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_not_ended_before_it_is_continued(place, kind):
    from minzero.generate import Writer

    for source in (place / "run" / kind, place / "hf" / kind):
        writer = Writer(open_trained(source))
        tokenizer = load_tokenizer(place / "tokenizers" / kind)
        assert writer.encode("def main") == [*tokenizer.begin, *tokenizer.encode_ordinary("def main")]
        assert writer.encode("") == [tokenizer.start_of_document]


def test_a_model_that_writes_stops_at_the_end_of_a_turn_as_well(place):
    from minzero.generate import Writer

    tokenizer = load_tokenizer(place / "tokenizers" / "llama3")
    names = [
        tokenizer.text_of([number])
        for number in Writer(open_trained(place / "run" / "llama3")).settings["eos_token_id"]
    ]
    assert names == ["<|end_of_text|>", "<|eot_id|>"]


@pytest.mark.parametrize("kind", LOSSLESS)
def test_the_text_comes_back_from_the_shards(place, kind):
    stream = TokenStream(place / "data" / kind, "val", 8)
    found = list(evaluate.documents_of(tokenizer_of(stream.folder), stream.read(0, stream.tokens)))
    sources = {text[:20_000].encode() for text in texts()}
    assert found and all(document in sources for document in found)


@pytest.mark.parametrize("kind", KINDS)
def test_to_gguf_takes_it_or_says_why_not_in_one_line(place, kind, tmp_path):
    with pytest.raises(UserError, match=r"^[^\n]+$") as caught:
        to_gguf.main([str(place / "hf" / kind), str(tmp_path / "x.gguf"), "--llama_cpp", str(tmp_path / "none")])
    # of the tokenizer, or for the two whose pattern llama.cpp has, of the converter that is not there
    words = {"gpt2": "no such file; the converter", "llama3": "adds tokens to every text"}
    assert words.get(kind, "tokenizer.json: cuts text by") in str(caught.value)


# -- data of another tokenizer -------------------------------------------------------------------


def test_a_start_with_data_of_another_tokenizer_is_warned_of(place, tmp_path):
    def doubts(source, *kinds):
        return list(doubts_about_data(str(source), [str(place / "data" / kind) for kind in kinds]))

    for source in (place / "hf" / "qwen", place / "run" / "qwen"):
        assert doubts(source, "qwen") == []
        (line,) = doubts(source, "qwen", "llama2")
        assert line.startswith(f"warning: {place}/data/llama2: found ") and "\n" not in line
    assert "of 1500 tokens differ from" in doubts(place / "hf" / "qwen", "llama2")[0]
    # with the same file the tokenizer itself is not needed, else what cannot be compared is said
    for kind in ("qwen", "llama2"):
        shutil.copytree(place / "data" / kind, tmp_path / kind)
    assert not list(doubts_about_data(str(place / "hf" / "qwen"), [str(tmp_path / "qwen")]))
    (line,) = doubts_about_data(str(place / "hf" / "qwen"), [str(tmp_path / "llama2")])
    assert line.startswith(f"warning: whether {tmp_path}/llama2 was made with the tokenizer of train.init_from is not")
    with pytest.raises(
        UserError, match=r"data/llama2: found a tokenizer of which .* prepare that data with the model's"
    ):
        eval.main([str(place / "hf" / "qwen"), "--data", str(place / "data" / "llama2")])


def test_tokens_that_transformers_adds_are_no_other_tokenizer(place, tmp_path):
    """Those in tokenizer_config.json that tokenizer.json lacks."""
    shutil.copytree(place / "tokenizers" / "gpt2", tmp_path / "t")
    path = tmp_path / "t" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<|pad|>"}))
    write_run(tmp_path / "run", MODEL, prepare_text(tmp_path / "t", tmp_path / "data"))
    export.main([str(tmp_path / "run"), str(tmp_path / "hf")])
    assert tokenizer_of(tmp_path / "data").n_vocab == 1502
    open_trained(tmp_path / "hf").check_tokenizer(tmp_path / "data")


def test_a_model_of_the_hub_comes_with_its_tokenizer(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, allow_patterns: asked.extend(allow_patterns) or tmp_path
    )
    assert hf_read.local_folder("owner/name") == tmp_path and "tokenizer.json" in asked


def test_data_with_more_ids_than_a_trained_model_is_no_matter_of_its_vocab_size(place, tmp_path):
    write_run(tmp_path / "run", ModelConfig(**vars(LLAMA) | {"vocab_size": 1500}), str(place / "data" / "llama2"))
    with pytest.raises(
        UserError, match=r"ids up to 1503; set it to at least 1504; a trained model keeps its own number"
    ):
        eval.main([str(tmp_path / "run"), "--data", str(place / "data" / "qwen")])


# -- the tokenizer's files -----------------------------------------------------------------------


@pytest.fixture
def tree(place, tmp_path):
    """A copy of the qwen tokenizer and its data, made with the path of tokenizer.json itself."""
    shutil.copytree(place / "tokenizers" / "qwen", tmp_path / "a" / "tokenizer")
    prepare_text(tmp_path / "a" / "tokenizer" / "tokenizer.json", tmp_path / "a" / "data")
    return tmp_path / "a"


def test_a_tree_that_is_moved_as_a_whole_is_complete(tree, tmp_path, monkeypatch):
    before = tokenizer_of(tree / "data").fingerprint()
    tree.rename(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    assert tokenizer_of(tmp_path / "b" / "data").fingerprint() == tokenizer_of("b/data").fingerprint() == before


def test_a_tokenizer_that_changed_or_went_away_is_one_line(tree, monkeypatch):
    def refused(folder=tree / "data"):
        with pytest.raises(UserError, match=r"^[^\n]+$") as caught:
            tokenizer_of(folder)
        return str(caught.value)

    settings = tree / "tokenizer" / "tokenizer_config.json"
    kept = settings.read_text()
    settings.write_text(json.dumps({"eos_token": "<|im_start|>"}))
    assert (
        "made with the end of text 1500, but that of ../tokenizer is now 1501; restore its tokenizer_con" in refused()
    )
    settings.write_text(kept)
    path = tree / "tokenizer" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": None}))
    assert "data/meta.json: made with tokenizer " in refused() and "prepare the data again" in refused()
    (tree / "tokenizer").rename(tree / "elsewhere")
    assert f"data/meta.json: tokenizer: found no folder {tree}/tokenizer, expected the tokenizer that" in refused()
    # a folder beside the shards, which could be taken for a name on the hub
    meta = json.loads((tree / "data" / "meta.json").read_text())
    (tree / "data" / "meta.json").write_text(json.dumps(meta | {"tokenizer": meta["tokenizer"] | {"name": "mine"}}))
    monkeypatch.chdir(tree)
    assert "tokenizer: found no folder data/mine, expected" in refused("data")


# -- conversations -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_conversations_are_stored_and_asked_for_in_the_exported_template(place, kind, tmp_path, capsys):
    """Token by token, mask and all, also where the tokenizer came with a template of its own, or puts a space before
    each text."""
    data = prepare_talks(place / "tokenizers" / kind, tmp_path)
    write_run(tmp_path / "run", MODEL, data)
    export.main([str(tmp_path / "run"), str(tmp_path / "hf")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.chat_template == chat_template(load_tokenizer(place / "tokenizers" / kind))
    assert "trained on conversations" in (tmp_path / "hf" / "README.md").read_text()
    _, ours = load(tmp_path / "run", device="cpu")
    assert ours.chat_template == tokenizer.chat_template
    stored = []
    for split in ("train", "val"):
        stream = TokenStream(data, split, 8)
        tokens = np.empty(stream.tokens, dtype=stream.dtype)
        stream.fill(0, tokens)
        stored += tokens.tolist()
    place_in = 0
    expected = {}
    for talk in TALKS:
        found = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
        pairs = zip(found["input_ids"], found["assistant_masks"], strict=True)
        first, *others = (number if learned else number | int(NO_LOSS) for number, learned in pairs)
        whole = (first | int(STARTS), *others)
        expected[whole] = expected.get(whole, 0) + 1
    while place_in < len(stored):
        whole = next(talk for talk in expected if tuple(stored[place_in : place_in + len(talk)]) == talk)
        place_in += len(whole)
        expected[whole] -= 1
    assert not any(expected.values())
    answers = answers_of_both(tmp_path, capsys)
    assert answers[0] == answers[1] and not answers[0].err

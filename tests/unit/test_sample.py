"""Sampling: transformers' own text, whole characters, prompts from everywhere, any length, any model."""

import dataclasses
import io
import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import export
import sample
from minzero.data.conversations import CHAT_TEMPLATE
from minzero.data.tokenizer import load_tokenizer
from minzero.data.tokenizer_files import huggingface_json
from minzero.errors import UserError
from minzero.generate import Terminal, generate, load_generator
from minzero.hf.families import family_of
from minzero.trained import load_model, open_trained
from tests.helpers.trained_runs import FAMILIES, OF_NO_FAMILY, write_data, write_run, write_runs

# a random model whose output layer is its embedding mostly repeats the last token
UNTIED = {name: dataclasses.replace(config, tie_embeddings=False) for name, config in FAMILIES.items()}
MODELS = UNTIED | {"none": dataclasses.replace(OF_NO_FAMILY, tie_embeddings=False)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return write_runs(tmp_path_factory.mktemp("trained"), MODELS)


@pytest.fixture(scope="module")
def bytes_tokenizer():
    encoding = load_tokenizer("bytes")
    return Tokenizer.from_str(huggingface_json(encoding._mergeable_ranks, encoding._special_tokens, encoding._pat_str))


def sampled(capsys, *arguments):
    capsys.readouterr()
    sample.main([*map(str, arguments)])
    return capsys.readouterr().out


class Recorder:
    """A streamer that keeps the tokens."""

    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        pass


# -- the same text as transformers' --------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_token_by_token_what_transformers_generates(trained, family, capsys):
    theirs = AutoModelForCausalLM.from_pretrained(trained / f"hf_{family}")
    tokenizer = AutoTokenizer.from_pretrained(trained / f"hf_{family}")
    inputs = tokenizer("abc", return_tensors="pt")
    expected = theirs.generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist()
    ours = load_generator(open_trained(trained / family))
    settings = {"do_sample": False, "eos_token_id": 256, "pad_token_id": 256}
    written = generate(ours, expected[:3], 12, 16, Recorder(), **settings)
    assert written == expected[3:] and len(set(written)) > 2
    # the command says the same, of the run as of the exported folder
    readable = [token for token in expected if token < 256]
    for source in (trained / family, trained / f"hf_{family}"):
        text = sampled(capsys, source, "--prompt", "abc", "--tokens", 12, "--temperature", 0)
        if len(readable) == len(expected):
            assert text == tokenizer.decode(expected) + "\n"
        assert text == sampled(capsys, source, "--prompt", "abc", "--tokens", 12, "--temperature", 0)


def test_a_model_of_no_family_writes_what_is_most_likely(trained):
    trained = open_trained(trained / "none")
    with pytest.raises(UserError):
        family_of(trained.model)
    ours, tokens = load_model(trained), [1, 2, 3]
    with torch.no_grad():
        while len(tokens) < 16:
            tokens.append(ours(torch.tensor([tokens]))[0, -1].argmax().item())
    written = generate(load_generator(trained), [1, 2, 3], 13, 16, Recorder(), do_sample=False)
    assert written == tokens[3:]


@pytest.mark.parametrize("name", MODELS)
def test_text_is_longer_than_the_context(trained, name):
    """After the end of the context it continues as from its last half."""
    model, recorder = load_generator(open_trained(trained / name)), Recorder()
    written = generate(model, [1, 2, 3], 40, 16, recorder, do_sample=False)
    assert len(written) == 40
    context = [1, 2, 3, *written][: 16 + 1]  # the 17th was still predicted from 16
    again = generate(model, context[-16:][-8:], 3, 16, Recorder(), do_sample=False)
    assert written[14:17] == again
    assert len(generate(model, list(range(30)), 5, 16, Recorder(), do_sample=False)) == 5


def test_the_end_of_text_ends_it(trained):
    model = load_generator(open_trained(trained / "llama"))
    written = generate(model, [1, 2, 3], 12, 16, Recorder(), do_sample=False)
    cut = written.index(written[5]) + 1
    assert generate(model, [1, 2, 3], 12, 16, Recorder(), do_sample=False, eos_token_id=written[5]) == written[:cut]


# -- published models: their own tokenizer, generation settings and chat template ------------------

CORPUS = ["the cat sat on the mat . it 's a cat , isn 't it ?", "abc xyz hello world the the the cat's"] * 20
BEGIN = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
CHAT = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_level(folder, prefix=False, post_processor=BEGIN, **settings):
    """As GPT-2's and Llama 3's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if post_processor:
        tokenizer.post_processor = post_processor
    settings = {"bos_token": "<s>", "eos_token": "</s>"} | settings
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder)


def words(folder):
    """In lower case, and cleaned up when it is decoded."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=["<s>", "</s>", "<unk>"]))
    tokenizer.post_processor = BEGIN
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": True}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder)


def sentence_piece(folder):
    """As Llama 2's: a space before the text, bytes where there is no token, and a class that adds the BOS."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = ["<s>", "</s>", "<unk>", *(f"<0x{value:02X}>" for value in range(256))]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=special))
    tokenizer.post_processor = BEGIN
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings |= {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def publish(folder, write_tokenizer, generation):
    """A random Llama as transformers saves it. generation: of generation_config.json; None: there is no such file."""
    folder.mkdir()
    write_tokenizer(folder)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": 320, "initializer_range": 0.4}
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=0, eos_token_id=1))
    model.generation_config = GenerationConfig(**{"bos_token_id": 0, "eos_token_id": 1} | (generation or {}))
    model.save_pretrained(folder)
    if generation is None:
        (folder / "generation_config.json").unlink()
    return folder


PUBLISHED = {
    "a BOS by the template": (byte_level, {}),
    "a BOS by the template, no generation_config.json": (byte_level, None),
    "a BOS by the flag": (lambda folder: byte_level(folder, post_processor=None, add_bos_token=True), {}),
    "no BOS": (lambda folder: byte_level(folder, post_processor=None), {}),
    "a space before the text": (lambda folder: byte_level(folder, prefix=True), {"eos_token_id": [1, 7]}),
    "lower case and clean-up": (words, {"repetition_penalty": 1.5}),
    "Llama 2": (sentence_piece, {"no_repeat_ngram_size": 2}),
    "several ends": (byte_level, {"eos_token_id": [1, *range(40, 200)]}),
    "suppressed": (byte_level, {"suppress_tokens": [*range(50, 150)], "begin_suppress_tokens": [*range(150, 320)]}),
    "forced": (byte_level, {"forced_eos_token_id": 1, "min_new_tokens": 20}),
    "beams": (byte_level, {"num_beams": 3, "bad_words_ids": [[33]]}),
    "sampled by default": (byte_level, {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 3}),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_published_model_is_continued_as_transformers_continues_it(kind, tmp_path, capsys):
    folder = publish(tmp_path / "hf", *PUBLISHED[kind])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for prompt in ("The cat sat", "isn 't it .", ""):
        ids = tokenizer(prompt)["input_ids"] or [0]
        assert (ids[0] == 0) == (kind != "no BOS" or not prompt)
        inputs = torch.tensor([ids])
        mask = torch.ones_like(inputs)
        written = model.generate(inputs, attention_mask=mask, max_new_tokens=20, do_sample=False)[0]
        expected = tokenizer.decode(written, skip_special_tokens=True)
        assert sampled(capsys, folder, "--prompt", prompt, "--tokens", 20, "--temperature", 0) == expected + "\n"


@pytest.mark.parametrize("template", [CHAT, None])
def test_a_published_chat_template_is_used(template, tmp_path, capsys):
    folder = publish(tmp_path / "hf", lambda folder: byte_level(folder, chat_template=template), {})
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template or CHAT_TEMPLATE
    settings = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    inputs = tokenizer.apply_chat_template([{"role": "user", "content": "the cat ?"}], **settings)
    written = model.generate(**inputs, max_new_tokens=20 if template else 5, do_sample=False)[0]
    answer = tokenizer.decode(written[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    flags = ["--chat", "--prompt", "the cat ?", "--tokens", 20 if template else 5, "--temperature", 0]
    assert sampled(capsys, folder, *flags) == answer + "\n"
    sample.main([str(folder), *map(str, flags)])
    assert ("no chat template" in capsys.readouterr().err) == (template is None)


def test_broken_generation_settings_are_one_line(tmp_path):
    folder = publish(tmp_path / "hf", byte_level, {})
    for content in ("{", "[]", '{"max_new_tokens": -1}'):
        (folder / "generation_config.json").write_text(content)
        with pytest.raises(UserError, match=r"^[^\n]*generation_config.json: [^\n]+$"):
            sample.main([str(folder), "--prompt", "a"])


def test_a_start_without_a_token_for_it_is_one_line(tmp_path):
    folder = publish(
        tmp_path / "hf", lambda folder: byte_level(folder, post_processor=None, bos_token=None), {"bos_token_id": None}
    )
    for flags, expected in ((["--prompt", ""], "an empty prompt needs"), (["--prompt", "a", "--chat"], "--chat needs")):
        with pytest.raises(UserError, match=rf"^prompt: {expected} a token for the start"):
            sample.main([str(folder), *flags])


# -- chance --------------------------------------------------------------------------------------


def test_the_seed_decides_and_no_token_is_written_that_nobody_can_read(trained, capsys, bytes_tokenizer):
    flags = [trained / "gpt2", "--prompt", "ab", "--tokens", 200, "--temperature", 5, "--top_k", 0]
    text = sampled(capsys, *flags)
    assert text == sampled(capsys, *flags) != sampled(capsys, *flags, "--seed", 7)
    both = sampled(capsys, *flags, "--samples", 2)
    second = sampled(capsys, *flags, "--seed", 1338)
    assert both == text + "-" * 40 + "\n" + second, "each sample has a seed of its own"
    model, recorder = load_generator(open_trained(trained / "gpt2")), Recorder()
    unknown = [token for token in range(270) if bytes_tokenizer.id_to_token(token) is None]
    assert unknown == list(range(257, 270))
    torch.manual_seed(0)
    settings = {"do_sample": True, "temperature": 5.0, "top_k": 0}
    assert max(generate(model, [1], 300, 16, recorder, **settings)) > 256, "else this shows nothing"
    assert max(generate(model, [1], 300, 16, recorder, **settings, suppress_tokens=unknown)) <= 256


@pytest.mark.parametrize("flag", [("--top_k", 1), ("--top_p", 1e-6)])
def test_a_choice_of_one_is_greedy(trained, capsys, flag):
    flags = [trained / "llama", "--prompt", "ab", "--tokens", 30]
    assert sampled(capsys, *flags, *flag) == sampled(capsys, *flags, "--temperature", 0)


# -- the terminal --------------------------------------------------------------------------------


def test_characters_are_printed_whole_and_as_soon_as_they_are(bytes_tokenizer, capsys):
    text = "a東京 é😀\n"
    terminal = Terminal(bytes_tokenizer, [ord(">")])
    terminal.put(torch.tensor([[ord(">")]]))  # the prompt comes first, and is not printed
    printed = []
    for byte in text.encode():
        terminal.put(torch.tensor([byte]))
        printed.append(capsys.readouterr().out)
    assert [part for part in printed if part] == list(text)
    for byte in "é".encode()[:1] + b"x":  # a part of a character that never comes does not hold up the rest
        terminal.put(torch.tensor([byte]))
    terminal.put(torch.tensor(["東".encode()[0]]))
    terminal.end()
    assert capsys.readouterr().out == "\N{REPLACEMENT CHARACTER}x"
    terminal.finish()
    assert capsys.readouterr().out == "\N{REPLACEMENT CHARACTER}\n"


def test_prompts_come_from_a_file_a_pipe_or_the_flag(trained, tmp_path, capsys, monkeypatch):
    flags = [trained / "llama", "--tokens", 5, "--temperature", 0]
    expected = "".join(sampled(capsys, *flags, "--prompt", prompt) for prompt in ("abc", "x y"))
    (tmp_path / "prompts.txt").write_text("abc\n\nx y\n")
    assert sampled(capsys, *flags, "--file", tmp_path / "prompts.txt") == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\nx y"))
    assert sampled(capsys, *flags) == expected
    from_the_start = sampled(capsys, *flags, "--prompt", "")
    model = AutoModelForCausalLM.from_pretrained(trained / "hf_llama")
    first = model.generate(torch.tensor([[256]]), max_new_tokens=1, do_sample=False)[0, 1].item()
    assert from_the_start.encode()[:1] == bytes([first]) if first < 128 else from_the_start


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["llama", "--top_p", "0"], "--top_p: found 0.0, expected above 0, at most 1"),
        (["llama", "--top_p", "1.01"], "--top_p: found 1.01, expected above 0, at most 1"),
        (["llama", "--top_p", "nan"], "--top_p: found nan"),
        (["llama", "--temperature", "-0.1"], "--temperature: found -0.1, expected 0 or more"),
        (["llama", "--temperature", "nan"], "--temperature: found nan"),
        (["llama", "--top_k", "-1"], "--top_k: found -1, expected 0 (all) or more"),
        (["llama", "--tokens", "0"], "--tokens: found 0, expected 1 or more"),
        (["llama", "--samples", "0"], "--samples: found 0, expected 1 or more"),
        (["llama", "--checkpoint", "7"], "no checkpoint '7'; expected latest, best or one of the steps: 5"),
        (["llama", "--prompt", "a", "--file", "b"], "--prompt and --file: found both"),
        (["llama", "--file", "gone"], "No such file or directory; expected a file with a prompt a line"),
        (["llama", "--file", "empty"], "found no prompt, expected one a line"),
        (["llama", "--data", "gone"], "no meta.json, so the tokenizer of its shards is not known"),
        (["llama", "--data", "other"], "other: found tokenizer"),
        (["hf_llama", "--data", "other"], "tokens differ from"),
        (["larger"], "tokenizer.json: found token ids up to 999, expected ids below the model's vocab_size 270"),
        (["broken"], "tokenizer.json: "),
        (["broken", "--data", "data"], "tokenizer.json: broken tokenizer ("),
        (["gone"], "no complete checkpoint"),
    ],
)
def test_bad_input_is_one_line(trained, arguments, expected):
    names = [part for part in ("gone", "empty", "other", "larger", "broken") if part in arguments]
    for name in names:
        prepare_fault(trained, name)
    folders = (*MODELS, "hf_llama", "data", *names)
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        sample.main([str(trained / part) if part in folders else part for part in arguments])
    assert expected in str(error.value)


def prepare_fault(trained, name):
    if name == "empty":
        (trained / "empty").write_text("\n \n")
    elif name == "other" and not (trained / "other").exists():
        write_data(trained / "other", "gpt2")
    elif name in ("larger", "broken") and not (trained / name).exists():
        export.main([str(trained / "llama"), str(trained / name)])
        file = trained / name / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        tokenizer["model"]["vocab"]["larger"] = 999
        file.write_text(json.dumps(tokenizer) if name == "larger" else "{}")


def test_a_prompt_that_no_token_stands_for_is_one_line(tmp_path):
    """A tokenizer of characters knows only those of its text."""
    from minzero.data.learn_tokenizer import characters
    from minzero.data.tokenizer_files import save_tokenizer

    save_tokenizer(tmp_path / "tokenizer", *characters("abc xyz\n"))
    write_run(tmp_path / "run", MODELS["llama"], write_data(tmp_path / "data", tmp_path / "tokenizer"))
    with pytest.raises(UserError, match=r"^prompt: found 'é', expected characters that the model's tokenizer has$"):
        sample.main([str(tmp_path / "run"), "--prompt", "abé"])
    sample.main([str(tmp_path / "run"), "--prompt", "ab", "--tokens", "3"])


def test_an_empty_pipe_is_one_line(trained, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(UserError, match=r"^stdin: found nothing, expected a prompt a line"):
        sample.main([str(trained / "llama")])

"""Sampling: transformers' own text, whole characters, prompts from everywhere, any length, any model."""

import dataclasses
import io
import json

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import export
import sample
from config import UserError
from data.tokenizer import huggingface_json, load_tokenizer
from eval import load_model, open_trained
from tests.trained_runs import FAMILIES, OF_NO_FAMILY, write_data, write_run, write_runs

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
    ours = sample.load_writer(open_trained(trained / family))
    settings = {"do_sample": False, "eos_token_id": 256, "pad_token_id": 256}
    written = sample.write(ours, expected[:3], 12, 16, Recorder(), **settings)
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
        export.family_of(trained.model)
    ours, tokens = load_model(trained), [1, 2, 3]
    with torch.no_grad():
        while len(tokens) < 16:
            tokens.append(ours(torch.tensor([tokens]))[0, -1].argmax().item())
    written = sample.write(sample.load_writer(trained), [1, 2, 3], 13, 16, Recorder(), do_sample=False)
    assert written == tokens[3:]


@pytest.mark.parametrize("name", MODELS)
def test_text_is_longer_than_the_context(trained, name):
    """Behind the end of the context it goes on as from its last half."""
    model, recorder = sample.load_writer(open_trained(trained / name)), Recorder()
    written = sample.write(model, [1, 2, 3], 40, 16, recorder, do_sample=False)
    assert len(written) == 40
    context = [1, 2, 3, *written][: 16 + 1]  # the 17th was still predicted from 16
    again = sample.write(model, context[-16:][-8:], 3, 16, Recorder(), do_sample=False)
    assert written[14:17] == again
    assert len(sample.write(model, list(range(30)), 5, 16, Recorder(), do_sample=False)) == 5


def test_the_end_of_text_ends_it(trained):
    model = sample.load_writer(open_trained(trained / "llama"))
    written = sample.write(model, [1, 2, 3], 12, 16, Recorder(), do_sample=False)
    cut = written.index(written[5]) + 1
    assert sample.write(model, [1, 2, 3], 12, 16, Recorder(), do_sample=False, eos_token_id=written[5]) == written[:cut]


# -- chance --------------------------------------------------------------------------------------


def test_the_seed_decides_and_no_token_is_written_that_nobody_can_read(trained, capsys, bytes_tokenizer):
    flags = [trained / "gpt2", "--prompt", "ab", "--tokens", 200, "--temperature", 5, "--top_k", 0]
    text = sampled(capsys, *flags)
    assert text == sampled(capsys, *flags) != sampled(capsys, *flags, "--seed", 7)
    both = sampled(capsys, *flags, "--samples", 2)
    second = sampled(capsys, *flags, "--seed", 1338)
    assert both == text + "-" * 40 + "\n" + second, "each sample has a seed of its own"
    model, recorder = sample.load_writer(open_trained(trained / "gpt2")), Recorder()
    unknown = [token for token in range(270) if bytes_tokenizer.id_to_token(token) is None]
    assert unknown == list(range(257, 270))
    torch.manual_seed(0)
    settings = {"do_sample": True, "temperature": 5.0, "top_k": 0}
    assert max(sample.write(model, [1], 300, 16, recorder, **settings)) > 256, "else this shows nothing"
    assert max(sample.write(model, [1], 300, 16, recorder, **settings, suppress_tokens=unknown)) <= 256


@pytest.mark.parametrize("flag", [("--top_k", 1), ("--top_p", 1e-6)])
def test_a_choice_of_one_is_greedy(trained, capsys, flag):
    flags = [trained / "llama", "--prompt", "ab", "--tokens", 30]
    assert sampled(capsys, *flags, *flag) == sampled(capsys, *flags, "--temperature", 0)


# -- the terminal --------------------------------------------------------------------------------


def test_characters_are_printed_whole_and_as_soon_as_they_are(bytes_tokenizer, capsys):
    text = "a東京 é😀\n"
    terminal = sample.Terminal(bytes_tokenizer, [ord(">")])
    terminal.put(torch.tensor([[ord(">")]]))  # the prompt comes first, and is not printed
    printed = []
    for byte in text.encode():
        terminal.put(torch.tensor([byte]))
        printed.append(capsys.readouterr().out)
    assert [part for part in printed if part] == list(text)
    for byte in "é".encode()[:1] + b"x":  # what never becomes a character does not hold up the rest
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


# -- what is refused -----------------------------------------------------------------------------


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
        (["gone"], "no complete checkpoint"),
    ],
)
def test_bad_input_is_one_line(trained, arguments, expected):
    names = [part for part in ("gone", "empty", "other", "larger", "broken") if part in arguments]
    for name in names:
        prepare_fault(trained, name)
    folders = (*MODELS, "hf_llama", *names)
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        sample.main([str(trained / part) if part in folders else part for part in arguments])
    assert expected in str(error.value)


def prepare_fault(trained, name):
    if name == "empty":
        (trained / "empty").write_text("\n \n")
    elif name == "other" and not (trained / "other").exists():
        write_data(trained / "other", "gpt2")
    elif name in ("larger", "broken"):
        export.main([str(trained / "llama"), str(trained / name)])
        file = trained / name / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        tokenizer["model"]["vocab"]["larger"] = 999
        file.write_text(json.dumps(tokenizer) if name == "larger" else "{}")


def test_a_prompt_that_no_token_stands_for_is_one_line(tmp_path):
    """A tokenizer of characters knows only those of its text."""
    from data.tokenizer import characters, save_tokenizer

    save_tokenizer(tmp_path / "tokenizer", *characters("abc xyz\n"))
    write_run(tmp_path / "run", MODELS["llama"], write_data(tmp_path / "data", tmp_path / "tokenizer"))
    with pytest.raises(UserError, match=r"^prompt: found 'é', expected characters that the model's tokenizer has$"):
        sample.main([str(tmp_path / "run"), "--prompt", "abé"])
    sample.main([str(tmp_path / "run"), "--prompt", "ab", "--tokens", "3"])


def test_an_empty_pipe_is_one_line(trained, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(UserError, match=r"^stdin: found nothing, expected a prompt a line"):
        sample.main([str(trained / "llama")])

"""Opening trained models: from Python in one line, and paths that are not there get the nearest that are."""

import io
import sys
from pathlib import Path

import pytest
import torch

import eval
import export
import sample
import to_gguf
from minzero import evaluate, evaluate_loss, load
from minzero.data.mixture import Mixture
from minzero.data.tokenizer import load_tokenizer
from minzero.errors import UserError
from minzero.nearest import nearest_path
from minzero.trained import folder_to_start_from, load_model, open_trained
from tests.helpers.processes import run
from tests.helpers.trained_runs import FAMILIES, write_runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with data/, llama/ and hf_llama/."""
    return write_runs(tmp_path_factory.mktemp("runs"), {"llama": FAMILIES["llama"]})


# -- from minzero import load --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "hf_llama"])
def test_load_gives_the_model_and_its_tokenizer(runs, name):
    model, tokenizer = load(runs / name)
    ids = tokenizer("abc xyz")["input_ids"]
    assert ids == load_tokenizer("bytes").encode_ordinary("abc xyz")
    assert not model.training
    assert model.head.weight.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    tokens = torch.tensor([ids], device=model.head.weight.device)
    with torch.no_grad():
        assert torch.equal(model(tokens), load_model(open_trained(runs / "llama"))(tokens))


def test_load_takes_a_step_and_refuses_one_that_is_not_there(runs):
    assert load(runs / "llama", checkpoint=5, device="cpu")[0].head.weight.device.type == "cpu"
    with pytest.raises(UserError, match="no checkpoint '6'"):
        load(runs / "llama", checkpoint=6)


def test_load_gives_no_tokenizer_where_the_data_does_not_name_it(runs):
    meta = runs / "data" / "meta.json"
    meta.rename(runs / "data" / "away")
    try:
        model, tokenizer = load(runs / "llama")
    finally:
        (runs / "data" / "away").rename(meta)
    assert tokenizer is None and model.config == FAMILIES["llama"]


def test_load_in_a_process_of_its_own(runs):
    """Importing minzero loads neither torch nor deepspeed; load works in a checkout without more."""
    code = """if True:
        import sys
        import minzero
        assert not {"torch", "deepspeed", "transformers", "numpy"} & set(sys.modules), "importing minzero is not light"
        from minzero import load
        model, tokenizer = load(sys.argv[1])
        print(tokenizer.decode(tokenizer("abc")["input_ids"]), sum(p.numel() for p in model.parameters()))
        try:
            minzero.nothing
        except AttributeError as error:
            print(error)
    """
    done = run([sys.executable, "-c", code, runs / "llama"])
    assert done.returncode == 0, done.stderr[-2000:]
    parameters = sum(p.numel() for p in load_model(open_trained(runs / "llama")).parameters())
    assert done.stdout.splitlines()[-2:] == [f"abc {parameters}", "module 'minzero' has no attribute 'nothing'"]


# -- paths that are not there --------------------------------------------------------------------


def make(folder, *paths):
    for path in paths:
        (folder / path).mkdir(parents=True)
        (folder / path / "here").touch()


def is_here(path):
    return (Path(path) / "here").exists()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("out/tinny", "out/tiny"),  # misspelled
        ("ot/tiny", "out/tiny"),  # in a folder that is
        ("ott/tinny", "out/tiny"),
        ("out", "out/tiny"),  # around it
        ("tiny", "out/tiny"),  # inside a folder that was left out
        ("out/tiny/checkpoints", "out/tiny"),  # inside it
        ("out/Medium", "out/medium"),
        ("out/of/this/world", None),
        ("nothing_like_it", None),
        ("broken", None),
        ("x" * 5000, None),
    ],
)
def test_the_nearest_path(tmp_path, monkeypatch, path, expected):
    make(tmp_path, "out/tiny", "out/medium")
    (tmp_path / "out" / "tiny" / "checkpoints").mkdir()
    (tmp_path / "broken_link").symlink_to("gone")
    monkeypatch.chdir(tmp_path)
    found = nearest_path(path, is_here)
    assert found == (expected and Path(expected))
    found = nearest_path(tmp_path / path, is_here)
    if path != "tiny":  # without a folder only relative paths are looked for
        assert found == (expected and tmp_path / expected)


OF_COMMANDS = [
    (eval.main, ["lama"], "lama: no such folder, so no complete checkpoint", "did you mean {}/llama?"),
    (sample.main, ["lama", "--prompt", "a"], "lama: no such folder", "did you mean {}/llama?"),
    (export.main, ["lama", "new"], "lama: no such folder", "did you mean {}/llama?"),
    (to_gguf.main, ["hf_lama", "new.gguf"], "found no config.json of transformers'", "did you mean {}/hf_llama?"),
    (eval.main, ["llama", "--checkpoint", "9"], "one of the steps: 5", "the nearest is --checkpoint 5"),
    (sample.main, ["llama", "--checkpoint", "9"], "one of the steps: 5", "the nearest is --checkpoint 5"),
    (export.main, ["llama", "new", "--checkpoint", "9"], "one of the steps: 5", "the nearest is --checkpoint 5"),
    (eval.main, ["llama", "--data", "dta"], "no folder {}/dta;", "did you mean {}/data?"),
    (sample.main, ["llama", "--data", "dta", "--prompt", "a"], "dta: no meta.json", "did you mean {}/data?"),
]


@pytest.mark.parametrize(("main", "arguments", "start", "end"), OF_COMMANDS)
def test_a_path_that_is_not_there_gets_the_nearest(runs, main, arguments, start, end):
    paths = ("lama", "llama", "hf_lama", "dta", "new", "new.gguf")
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        main([str(runs / part) if part in paths else part for part in arguments])
    assert start.format(runs) in str(error.value) and str(error.value).endswith(end.format(runs)), error.value


def test_a_start_from_a_path_that_is_not_there_gets_the_nearest_and_no_words_of_the_hub(runs):
    """A path of several folders is no name on the hub, which is not asked for it."""
    expected = "no such folder here; expected a folder, or a name on the Hugging Face hub (owner/name)"
    with pytest.raises(UserError) as error:
        folder_to_start_from(str(runs / "lama"))
    assert str(error.value) == f"train.init_from: {runs}/lama: {expected}; did you mean {runs}/llama?"


def test_what_is_there_but_broken_gets_no_suggestion(runs, tmp_path):
    """The fault is in the folder that was named, so another one is no help."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: line 1") as error:
        eval.main([str(tmp_path / "hf")])
    assert "did you mean" not in str(error.value)


# -- progress ------------------------------------------------------------------------------------


class FakeTerminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "rank", "shown"),
    [(FakeTerminal, "0", True), (FakeTerminal, "1", False), (io.StringIO, "0", False)],
)
def test_progress_is_shown_on_a_terminal_by_rank_0_alone(runs, monkeypatch, capsys, stream, rank, shown):
    monkeypatch.setattr(evaluate, "SHOW_AFTER", 0)
    monkeypatch.setenv("RANK", rank)
    stderr = stream()
    monkeypatch.setattr(sys, "stderr", stderr)
    source = open_trained(runs / "llama")
    evaluate.evaluate_alone(source, evaluate.open_streams(source, source.data), 4)
    assert ("evaluating" in stderr.getvalue()) == shown
    assert ("loading" in stderr.getvalue()) == shown
    assert capsys.readouterr().out == ""


def test_the_loss_during_training_is_that_of_the_same_windows(runs):
    """The same at every call and batch size, also of a Mixture; the model computes its own loss again afterwards."""
    source = open_trained(runs / "llama")
    (stream,) = evaluate.open_streams(source, source.data)
    mixture = Mixture(source.data[0], "val", 16, 270, 1337)
    model = load_model(source, "cpu")
    own, passes = model.head.cross_entropy, []
    inputs, targets = stream.batch(stream.validation_windows(10))
    expected = model(torch.from_numpy(inputs), torch.from_numpy(targets)).item()
    for data in (stream, mixture):
        for batch_size in (3, 4, 100):
            found = evaluate_loss.validation_loss(
                model, data, 160, batch_size, "cpu", progress=lambda: passes.append(1)
            )
            assert found == pytest.approx(expected, rel=1e-6) and model.training
            assert len(passes) == evaluate_loss.count_passes(data, batch_size, wanted_tokens=160)
            passes.clear()
    assert model.head.cross_entropy is own

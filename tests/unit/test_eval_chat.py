"""eval.py of conversations: the loss by role, length and answer, each token in its group, whatever the template; and
lm-eval's tasks in the chat template."""

import json
import runpy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import eval
from minzero.config.sections import ModelConfig
from minzero.data.chat_templates import ChatTemplate
from minzero.data.packing import PackedStream
from minzero.data.shards import NO_LOSS
from minzero.data.tokenizer import load_tokenizer
from minzero.errors import UserError
from minzero.evaluate_roles import ROLES, Roles, system_marks
from tests.helpers.foreign_tokenizers import save
from tests.helpers.processes import ROOT, deepspeed_command, run
from tests.helpers.trained_runs import LLAMA, write_data, write_run
from tests.unit.test_chat_templates import STYLES, marked
from tests.unit.test_eval import QUESTIONS, TASK, most_likely

SYSTEM, BLOCK = "Be brief, Łódź.", 160


def talks():
    found = []
    for number in range(60):
        messages = [{"role": "system", "content": f"{SYSTEM} {number}"}] if number % 3 == 0 else []
        for turn in range(1 + number % 5 if number < 30 else 1):
            messages.append({"role": "user", "content": f"q {number}?"})
            messages.append({"role": "assistant", "content": f"{number} {turn}!"})
        found.append(messages)
    return found


def prepared(folder, tokenizer, *more):
    folder.mkdir(exist_ok=True)
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks()))
    flags = ["--input", folder / "talks.jsonl", "--tokenizer", tokenizer, "--out", folder / "data"]
    main = runpy.run_path(str(ROOT / "data/chat/prepare.py"))["main"]
    main([str(flag) for flag in (*flags, "--workers", 1, "--val_fraction", 0.5, *more)])
    return folder / "data"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("roles"), "bytes")


def evaluated(capsys, *arguments):
    """(the JSON object that eval.py prints last, the lines before)."""
    capsys.readouterr()
    eval.main([*map(str, arguments), "--json"])
    *lines, last = capsys.readouterr().out.splitlines()
    return json.loads(last), lines


def documents_in(stream):
    for document in stream.order:
        stored = np.empty(stream.lengths[document], stream.dtype)
        stream.fill(int(stream.document_starts[document]), stored)
        yield stream.ids(stored, int).astype(np.int64), stored < NO_LOSS


@torch.no_grad()
def expected_of(model, stream):
    """{group: [losses]} of each conversation alone, in this project's form with bytes as tokens."""
    found = {}
    for ids, learned in documents_in(stream):
        losses = F.cross_entropy(
            model(torch.from_numpy(ids[None, :-1]))[0], torch.from_numpy(ids[1:]), reduction="none"
        )
        text = bytes(ids[1:][ids[1:] < 256].tolist())
        # the token before the text begins the conversation, and has no target
        system = text.index(b"\n\n### User:") if text.startswith(b"### System:") else 0
        answer = 0
        for place, loss in enumerate(losses.tolist()):
            is_learned = learned[place + 1]
            role = "assistant" if is_learned else "system" if place < system else "user"
            found.setdefault(role, []).append(loss)
            answer += is_learned and not learned[place]
            if is_learned:
                found.setdefault(min(answer, 4), []).append(loss)
                length = next(most for most in (64, 128, 256) if len(ids) <= most)
                found.setdefault(f"up to {length}", []).append(loss)
    return found


def test_every_token_is_in_its_groups_with_its_loss(data, tmp_path, capsys):
    config = ModelConfig(**vars(LLAMA) | {"block_size": BLOCK})
    model = write_run(tmp_path / "run", config, str(data))
    found, lines = evaluated(capsys, tmp_path / "run", "--by_role", "--batch_size", 2)
    expected = expected_of(model, PackedStream(data, "val", BLOCK))
    parts = found["by_role"]
    names = {"1": 1, "2": 2, "3": 3, "4 and more": 4}
    entries = parts["roles"] | {names[name]: entry for name, entry in parts["answers"].items()}
    entries |= {f"up to {length}": entry for length, entry in parts["lengths"].items()}
    assert entries.keys() == expected.keys() and set(ROLES) < entries.keys() and "up to 256" in entries
    for name, losses in expected.items():
        assert entries[name]["tokens"] == len(losses), name
        assert entries[name]["loss"] == pytest.approx(np.mean(losses), rel=1e-5), name
    assert parts["roles"]["assistant"]["loss"] == pytest.approx(found["val_loss"], rel=1e-6)
    assert parts["roles"]["assistant"]["tokens"] == found["tokens"]
    stream = PackedStream(data, "val", BLOCK)
    assert sum(entry["conversations"] for entry in parts["lengths"].values()) == len(stream.lengths)
    assert [line.split()[0] for line in lines if "'s words  " in line] == [f"{role}'s" for role in ROLES]
    # on two ranks, at ZeRO-3
    done = run(deepspeed_command("eval.py", tmp_path / "run", "--by_role", "--json", "--batch_size", 3))
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout.splitlines()[-1])["by_role"]
    assert again["answers"].keys() == parts["answers"].keys()
    for kind, of_kind in parts.items():
        for name, entry in of_kind.items():
            assert again[kind][name] == pytest.approx(entry, rel=1e-5)


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("chatml", ("<|im_start|>system", "<|im_end|><|im_start|>user")),
        (
            "llama3",
            (
                "<|begin_of_text|><|start_header_id|>system<|end_header_id|>",
                "<|eot_id|><|start_header_id|>user<|end_header_id|>",
            ),
        ),
        ("zephyr", ("<|system|>", "</s><|user|>")),
        ("phi3", ("<|system|>", "<|end|><|user|>")),
        ("mistral", None),  # it has no word for a system
        ("gemma", None),
    ],
)
def test_a_system_message_is_found_in_each_template(style, expected, tmp_path):
    template, make, settings, _ = STYLES[style]
    save(make(), tmp_path / "tokenizer", **settings, chat_template=marked(template))
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert system_marks(ChatTemplate(tokenizer.as_transformers(None), marked(template), style)) == expected
    if style == "gemma":
        return
    stream = PackedStream(prepared(tmp_path / "of", tmp_path / "tokenizer"), "train", 400)
    roles = Roles(stream)
    said = set()
    for ids, learned in documents_in(stream):
        of_token = roles.of(ids, learned)
        text = [tokenizer.decode(ids[of_token == number].tolist()) for number in range(3)]
        said.add(bool(text[0]))
        if expected:
            assert (SYSTEM in text[0]) or "q " not in text[0]
            assert SYSTEM not in text[1] + text[2] and "q " not in text[0] + text[2]
        assert "!" in text[2] and "!" not in text[0] + text[1]
    # this ChatML begins every conversation with words of the system
    assert said == ({False} if not expected else {True} if style == "chatml" else {True, False})


def test_without_roles_it_is_one_line(data, tmp_path):
    config = ModelConfig(**vars(LLAMA) | {"block_size": BLOCK})
    write_run(tmp_path / "run", config, str(data))
    everything = prepared(tmp_path / "all", "bytes", "--learn", "all")
    for folder, words in (
        (everything, "prepared with --learn all, which does not keep the roles"),
        (write_data(tmp_path / "text"), "found no conversations; expected conversations"),
    ):
        with pytest.raises(UserError, match=rf"^--by_role: [^\n]*{words}[^\n]*$"):
            eval.main([str(tmp_path / "run"), "--data", str(folder), "--by_role"])
    with pytest.raises(UserError, match="--chat: given without --tasks"):
        eval.main([str(tmp_path / "run"), "--chat"])


def test_with_all_learned_every_token_but_the_first_counts(data, tmp_path, capsys):
    everything = prepared(tmp_path / "all", "bytes", "--learn", "all")
    meta, of_answers = (json.loads((folder / "meta.json").read_text()) for folder in (everything, data))
    streams = [PackedStream(folder, "val", 400) for folder in (everything, data)]  # none is cut
    for (ids, learned), (same, answers) in zip(*map(documents_in, streams), strict=True):
        assert (ids == same).all() and learned[1:].all() and not learned[0] and not answers.all()
    texts = sum(int((ids < 256).sum()) for ids, _ in documents_in(streams[0]))
    assert meta["learn"] == "all" and meta["splits"]["val"]["bytes"] == texts
    assert "learn" not in of_answers and "learn" not in of_answers["settings"]
    config = ModelConfig(**vars(LLAMA) | {"block_size": 400})
    write_run(tmp_path / "run", config, str(everything))
    found, lines = evaluated(capsys, tmp_path / "run")
    assert found["tokens"] == streams[0].lengths.sum() - len(streams[0].lengths)
    assert not any("the assistant's words count" in line for line in lines)


EXAMPLE = {"question": "ab", "choices": ["zz", "c"], "label": 1}
FEWSHOT = """\
fewshot_split: train
num_fewshot: 1
fewshot_config: {sampler: first_n}
"""


@torch.no_grad()
def most_likely_in_chat(model, question, choices):
    """Which of the choices the model finds most likely as the answer to a user's question, after the example's."""
    end = load_tokenizer("bytes").end_of_text
    first, second = (f"### User:\n{asked}\n\n### Assistant:\n" for asked in (EXAMPLE["question"], question))
    prompt = [end, *f"{first}c".encode(), end, *second.encode()]
    scores = []
    for choice in choices:
        tokens = torch.tensor([prompt + list(choice.encode())])
        log_probabilities = model(tokens[:, :-1])[0].log_softmax(-1).gather(1, tokens[0, 1:, None])
        scores.append(log_probabilities[len(prompt) - 1 :].sum().item())
    return scores.index(max(scores))


def test_tasks_ask_in_the_chat_template(data, tmp_path, capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    config = ModelConfig(**vars(LLAMA) | {"block_size": BLOCK})
    model = write_run(tmp_path / "run", config, str(data))
    questions = [*QUESTIONS, *[(f"{letter} {letter}", ["x", "a", "b "]) for letter in "abcxyz"]]
    best = [most_likely_in_chat(model, *question) for question in questions]
    plain = [most_likely(model, *question) for question in questions]
    assert best != plain, "the test would not see a template"
    rows = [
        json.dumps({"question": question, "choices": choices, "label": label})
        for (question, choices), label in zip(questions, best, strict=True)
    ]
    (tmp_path / "letters.jsonl").write_text("\n".join(rows))
    (tmp_path / "example.jsonl").write_text(json.dumps(EXAMPLE))
    task = TASK.format(file=f"{tmp_path}/letters.jsonl, train: {tmp_path}/example.jsonl")
    (tmp_path / "letters.yaml").write_text(task + FEWSHOT)
    found, _ = evaluated(capsys, tmp_path / "run", "--tasks", tmp_path / "letters.yaml", "--chat")
    assert found["tasks"]["letters"]["acc,none"] == 1
    found, _ = evaluated(capsys, tmp_path / "run", "--tasks", tmp_path / "letters.yaml")
    assert found["tasks"]["letters"]["acc,none"] < 1


def test_a_model_without_a_template_is_one_line(tmp_path):
    pytest.importorskip("lm_eval")
    write_run(tmp_path / "run", LLAMA, write_data(tmp_path / "data"))
    (tmp_path / "letters.yaml").write_text(TASK.format(file=tmp_path / "letters.jsonl"))
    with pytest.raises(UserError, match=r"^--chat: the tokenizer of [^\n]* has no chat template[^\n]*$"):
        eval.main([str(tmp_path / "run"), "--tasks", str(tmp_path / "letters.yaml"), "--chat"])

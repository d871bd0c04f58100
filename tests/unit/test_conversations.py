"""Supervised fine-tuning: of a conversation all is read, and the assistant's words alone are learned."""

import json
import math
import shutil
import subprocess
import sys

import datasets
import jinja2
import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from torch.nn import functional as F
from transformers import AutoTokenizer

import eval
import export
import sample
from minzero.data import pipeline
from minzero.data.conversations import HEADINGS, LEARNED, Conversations, with_marks
from minzero.data.local_files import Files
from minzero.data.mixture import Mixture
from minzero.data.shards import NO_LOSS, TokenStream, write_shard
from minzero.data.sources import Hub
from minzero.data.tokenizer import load_tokenizer
from minzero.errors import UserError
from minzero.evaluate_loss import validation_loss
from minzero.files import ROOT
from minzero.generate import generate, load_generator
from minzero.loss import equal_weights
from minzero.sizes import IGNORE_INDEX
from minzero.trained import open_trained
from model import GPT
from tests.helpers.trained_runs import GPT2, LLAMA, write_data, write_run

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2."},
    {"role": "user", "content": "And \u00e4?"},
    {"role": "assistant", "content": "\u00fc, \x1ereally."},
]
END = "<|endoftext|>"


def prepared(folder, talks, *flags):
    """Shards of these conversations by the command itself."""
    rows = "".join(json.dumps({"messages": talk}) + "\n" for talk in talks)
    (folder / "talks.jsonl").write_text(rows)
    command = [sys.executable, "data/chat/prepare.py", "--input", folder / "talks.jsonl", "--column", "messages"]
    command += ["--tokenizer", "bytes", "--out", folder / "data", "--val_fraction", "0.3", *flags]
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "data"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    talks = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!" * 3}] for n in range(90)]
    return prepared(tmp_path_factory.mktemp("talks"), [TALK, *talks])


def test_the_answers_alone_are_learned():
    text = with_marks("row 1", TALK)
    read, learned = text.split(LEARNED)[::2], text.split(LEARNED)[1::2]
    assert learned == ["2.", "\u00fc, really."]
    assert read == [
        "### System:\nBe brief.\n\n### User:\n1 + 1?\n\n### Assistant:\n",
        "### User:\nAnd \u00e4?\n\n### Assistant:\n",
        "",
    ]


def test_shards_hold_every_token_and_which_are_learned(data):
    encoding, seen = load_tokenizer("bytes"), ""
    meta = json.loads((data / "meta.json").read_text())
    assert meta["loss_mask"] is True
    for split in ("train", "val"):
        stream = TokenStream(data, split, 16)
        assert stream.dtype == np.uint32
        inputs, targets = stream.example(0, stream.tokens - 1)
        tokens = stream.read(0, stream.tokens)
        assert (inputs == tokens[:-1]).all() and ((targets == tokens[1:]) | (targets == IGNORE_INDEX)).all()
        text = encoding.decode(tokens.tolist())
        seen += text
        learned = encoding.decode([token for token in targets.tolist() if token != IGNORE_INDEX])
        answers = [part.split("### Assistant:\n")[1] for part in text.split(END) if "### Assistant:\n" in part]
        assert learned == "".join(answer + END for answer in answers)
        assert meta["splits"][split]["bytes"] == sum(len(answer.encode()) for answer in answers)
    whole = END + with_marks("", TALK).replace("2." + LEARNED, f"2.{END}").replace("really." + LEARNED, f"really.{END}")
    assert whole.replace(LEARNED, "") in seen


def test_the_number_of_workers_changes_nothing(data, tmp_path):
    again = tmp_path / "again"
    documents = Conversations(Files([str(data.parent / "talks.jsonl")], "messages", list))
    flags = ["--out", str(again), "--val_fraction", "0.3", "--workers", "1", "--column", "messages"]
    pipeline.prepare(documents, "bytes", pipeline.options("", ".").parse_args(flags), loss_mask=True)
    for name in ("train_000000.bin", "val_000000.bin"):
        assert (again / name).read_bytes() == (data / name).read_bytes()


def test_parquet_and_the_hub_give_the_same_conversations(tmp_path):
    rows = [{"messages": TALK}, {"messages": TALK[1:3]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "talks.parquet")
    expected = [with_marks("", row["messages"]) for row in rows]
    for source in (
        Files([str(tmp_path / "talks.parquet")], "messages", list),
        Hub(datasets.Dataset.from_list(rows), "messages", "hub", list),
        Hub(datasets.Dataset.from_list(rows).to_iterable_dataset(), "messages", "hub", list),
    ):
        assert [text for _, text in Conversations(source)] == expected


def test_a_mixture_of_text_and_conversations(data, tmp_path):
    text = write_data(tmp_path / "text")
    mixture = Mixture({str(data): 1, text: 1}, "train", 16, 270, 1, document_mask=False)
    assert mixture.is_uneven and not Mixture(text, "train", 16, 270, 1).is_uneven
    inputs, targets = mixture.batch(np.arange(mixture.windows))
    masked = (targets == IGNORE_INDEX).any(axis=1)
    assert 0 < masked.sum() <= TokenStream(data, "train", 16).windows < len(inputs) and inputs.max() < 270


def one_batch_at_a_time(data, micro_batch_size, ranks):
    """Gradient and loss of a global batch of 12 windows, summed as train.py does."""
    mixture, model = Mixture(str(data), "train", 16, 270, 1, document_mask=False), GPT(GPT2)
    accumulation, total = 12 // micro_batch_size // ranks, 0
    everyone = [list(mixture.batches(0, rank, ranks, micro_batch_size, accumulation)) for rank in range(ranks)]
    counts = [sum((targets != IGNORE_INDEX).sum() for _, targets, *_ in batches) for batches in everyone]
    for batches in everyone:
        with pytest.MonkeyPatch.context() as patch:  # the other ranks' part of the sum
            patch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.fill_(float(sum(counts))))
            weights = equal_weights(batches, ranks, torch.device("cpu"))
        for batch, weight in zip(batches, weights, strict=True):
            loss = model(*map(torch.from_numpy, batch)) * weight / accumulation / ranks
            loss.backward()
            total += loss.item()
    return total, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("micro_batch_size, ranks", [(1, 1), (2, 3), (6, 2), (12, 1)])
def test_every_answered_token_counts_the_same_in_any_split_of_the_batch(data, micro_batch_size, ranks):
    mixture, model = Mixture(str(data), "train", 16, 270, 1, document_mask=False), GPT(GPT2)
    (batch,) = mixture.batches(0, 0, 1, 12, 1)
    inputs, targets = map(torch.from_numpy, batch)
    expected = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
    expected.backward()
    loss, gradients = one_batch_at_a_time(data, micro_batch_size, ranks)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for found, parameter in zip(gradients, model.parameters(), strict=True):
        assert torch.allclose(found, parameter.grad, atol=1e-7)


def test_evaluation_counts_the_answers_alone(data, tmp_path, capsys):
    model = write_run(tmp_path / "run", GPT2, str(data), document_mask=False)
    eval.main([str(tmp_path / "run"), "--json", "--batch_size", "3"])
    output = capsys.readouterr().out
    found = json.loads(output.splitlines()[-1])
    stream = TokenStream(data, "val", 16)
    losses, counts = [], []
    for start in range(0, stream.tokens - 1, 16):
        inputs, targets = map(torch.from_numpy, stream.example(start, min(16, stream.tokens - 1 - start)))
        with torch.no_grad():
            losses.append(
                F.cross_entropy(model(inputs[None])[0], targets, ignore_index=IGNORE_INDEX, reduction="sum").item()
            )
        counts.append(int((targets != IGNORE_INDEX).sum()))
    assert found["tokens"] == sum(counts) < stream.tokens / 2 and "the assistant's words count" in output
    assert found["val_loss"] == pytest.approx(sum(losses) / sum(counts), rel=1e-6)
    whole = slice(0, stream.windows)  # what train.py takes
    during = validation_loss(
        model, Mixture(str(data), "val", 16, 270, 1, document_mask=False), 10**6, 3, torch.device("cpu")
    )
    with pytest.raises(UserError, match="--gzip"):
        eval.main([str(tmp_path / "run"), "--gzip"])
    assert during == pytest.approx(sum(losses[whole]) / sum(counts[whole]), rel=1e-6)


def test_a_validation_split_in_which_nothing_counts(data, tmp_path):
    """During training the loss is a NaN, as of any other run that has none; eval.py says it in one line."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    meta = json.loads((folder / "meta.json").read_text())
    stream = TokenStream(folder, "val", 16)
    entry = write_shard(folder / "val_000000.bin", stream.read(0, stream.tokens).astype(np.uint32) | NO_LOSS)
    meta["splits"]["val"]["shards"] = [entry]
    (folder / "meta.json").write_text(json.dumps(meta))
    model = GPT(GPT2)
    during = validation_loss(
        model, Mixture(str(folder), "val", 16, 270, 1, document_mask=False), 10**6, 3, torch.device("cpu")
    )
    assert math.isnan(during) and model.training
    write_run(tmp_path / "run", GPT2, str(folder), document_mask=False)
    with pytest.raises(UserError, match=r"no token of the validation split counts, so there is no loss; give other"):
        eval.main([str(tmp_path / "run")])


def test_sampling_and_the_exported_template_begin_as_the_data_does(data, tmp_path, capsys):
    write_run(tmp_path / "run", LLAMA, str(data), document_mask=False)
    export.main([str(tmp_path / "run"), str(tmp_path / "hf")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    stream = TokenStream(data, "train", 16)
    stored = stream.read(0, stream.tokens).tolist()
    question = f"{HEADINGS['user']}7?\n\n{HEADINGS['assistant']}"
    start = load_tokenizer("bytes").encode(END + question, allowed_special="all")
    assert any(stored[place : place + len(start)] == start for place in range(len(stored)))
    asked = [{"role": "user", "content": "7?"}]
    assert tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"] == start
    whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": "7!"}], tokenize=False)
    assert whole == f"{END}{question}7!{END}"
    capsys.readouterr()
    sample.main([str(tmp_path / "run"), "--chat", "--prompt", "7?", "--tokens", "6", "--temperature", "0"])
    answer = capsys.readouterr().out
    writer = load_generator(open_trained(tmp_path / "run"))
    written = generate(writer, start, 6, 16, None, do_sample=False, eos_token_id=256, pad_token_id=256)
    assert answer == tokenizer.decode(start + written, skip_special_tokens=True)[len(question) :] + "\n"


def test_the_template_masks_what_is_learned_and_refuses_what_is_no_conversation(data, tmp_path):
    """Token by token what is stored for training; in other versions: tests/slow/test_transformers_versions.py."""
    write_run(tmp_path / "run", LLAMA, str(data), document_mask=False)
    export.main([str(tmp_path / "run"), str(tmp_path / "hf")])
    tokenizer, encoding = AutoTokenizer.from_pretrained(tmp_path / "hf"), load_tokenizer("bytes")
    odd = [{"role": "assistant", "content": ""}, {"role": "user", "content": "{{ bos_token }} \n"}, TALK[2]]
    for talk in (TALK, odd):
        found = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = [256], [0]
        for number, part in enumerate(with_marks("", talk).split(LEARNED)):
            tokens = encoding.encode_ordinary(part) + [256] * (number % 2)
            ids += tokens
            mask += [number % 2] * len(tokens)
        assert found["input_ids"] == ids and found["assistant_masks"] == mask
    for message in (
        {"role": "tool", "content": "x"},
        {"content": "x"},
        {"role": "user"},
        {"role": "user", "content": []},
    ):
        with pytest.raises(UserError):
            with_marks("", [message])
        with pytest.raises(jinja2.TemplateError, match=r"a role other than|whose content is no text"):
            tokenizer.apply_chat_template([message], tokenize=False)


@pytest.mark.parametrize(
    "row, found",
    [
        ({"messages": "Hi"}, "row 1: no conversation: found str, expected a list of messages under 'messages'"),
        ({"messages": [{"role": "human", "content": "Hi"}]}, "message 1: found {'role': 'human'"),
        ({"messages": [{"role": "user", "content": None}]}, "expected a role (system, user, assistant) and a text"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "found no message of the assistant"),
        ({"messages": ["Hi"]}, "message 1: found Hi"),
    ],
)
def test_what_is_no_conversation_is_one_line(tmp_path, row, found):
    (tmp_path / "talks.jsonl").write_text(json.dumps(row) + "\n")
    documents = Conversations(Files([str(tmp_path / "talks.jsonl")], "messages", list))
    with pytest.raises(UserError) as error:
        list(documents)
    assert found in str(error.value) and "talks.jsonl row 1" in str(error.value)

"""Supervised fine-tuning against the installed TRL: its SFTTrainer on the same model, conversations and batches, and
train.py on two ranks at ZeRO-3 with packed conversations. The loss of every step is the same."""

import dataclasses
import json
import random
import shutil

import numpy as np
import pytest
import torch

from minzero.data.mixture import Mixture
from minzero.files import write_json
from minzero.metrics import read_metrics
from minzero.sizes import IGNORE_INDEX
from tests.helpers.data_sets import run as prepare_command
from tests.helpers.foreign_tokenizers import KINDS, save
from tests.helpers.processes import deepspeed_command, run
from tests.helpers.trained_runs import FAMILIES, make_folder

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install --no-deps trl==1.16.0")
STEPS, WINDOWS, BLOCK = 20, 4, 96  # windows of a step: two of each rank
MODEL = dataclasses.replace(FAMILIES["qwen2"], block_size=BLOCK, vocab_size=1536)
END_OF_TURN = 1502  # the id of <|im_end|>
NOT_LEARNED = -100  # transformers' label
LR, DECAY, BETAS, CLIP = 2e-3, 0.05, (0.9, 0.99), 0.5
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def conversations():
    """Messages of one to three turns, some with a system's, all different."""
    choose = random.Random(7)
    words = ["list", "of", "the", "file", "opens", "naïve", "returns", "an", "error", "東京", "self.", "\nimport os"]
    found = []
    for number in range(150):
        messages = [{"role": "system", "content": f"Be number {number}."}] if choose.random() < 0.4 else []
        for _ in range(choose.choice([1, 1, 2, 3])):
            question = " ".join(choose.choices(words, k=choose.randrange(1, 5)))
            answer = " ".join(choose.choices(words, k=choose.randrange(1, 7)))
            messages.append({"role": "user", "content": f"{question} {number}?"})
            messages.append({"role": "assistant", "content": answer})
        found.append(messages)
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with hf/, a random model with a tokenizer that has a chat template, and talks.jsonl."""
    folder = tmp_path_factory.mktemp("sft")
    make_folder(folder / "hf", MODEL)
    make, settings, *_ = KINDS["qwen"]
    save(make(), folder / "tokenizer", chat_template=TEMPLATE, **settings)
    for path in (folder / "tokenizer").iterdir():
        shutil.copy(path, folder / "hf")
    rows = [json.dumps({"messages": messages}) for messages in conversations()]
    (folder / "talks.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module", params=["assistant", "all"])
def ours(request, base):
    """(what is learned, the Mixture, the loss of each step of a run)."""
    learn = request.param
    data, out = base / f"data_{learn}", base / f"run_{learn}"
    flags = ["--input", base / "talks.jsonl", "--tokenizer", base / "hf", "--out", data, "--learn", learn]
    done = prepare_command("chat", *flags, "--workers", "1", "--val_fraction", "0.1")
    assert done.returncode == 0, done.stderr
    train = {
        "init_from": str(base / "hf"),
        "out_dir": str(out),
        "precision": "fp32",
        "micro_batch_size": WINDOWS // 2,
        "global_batch_tokens": WINDOWS * BLOCK,
        "max_tokens": STEPS * WINDOWS * BLOCK,
        "schedule": "constant",
        "lr": LR,
        "betas": list(BETAS),
        "weight_decay": DECAY,
        "grad_clip": CLIP,
        "log_every": 1,
        "eval_every": 0,
        "eval_tokens": BLOCK,
        "save_every": 0,
        "seed": 3,
    }
    zero = {"zero_optimization": {"stage": 3}}
    config = {"model": {"block_size": BLOCK}, "data": {"path": str(data)}, "train": train, "deepspeed": zero}
    write_json(base / f"{learn}.json", config)
    done = run(deepspeed_command("train.py", base / f"{learn}.json"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "conversations packed in" in done.stdout
    mixture = Mixture(str(data), "train", BLOCK, MODEL.vocab_size, seed=3)
    return learn, mixture, [line["loss"] for line in read_metrics(out) if "loss" in line]


def batches(mixture):
    """Of each step, its conversations: the ids of each, and which of them are learned, two lists."""
    (stream,) = mixture.streams
    for step in range(STEPS):
        batch = []
        for window in mixture.windows_of(np.arange(step * WINDOWS, (step + 1) * WINDOWS)):
            for document in stream.order[stream.first[window] : stream.first[window + 1]]:
                start, length = int(stream.document_starts[document]), int(stream.lengths[document])
                inputs, targets, _ = stream.example(start, length - 1)
                ids = [int(inputs[0]), *stream.read(start + 1, length - 1).tolist()]
                batch.append((ids, [False, *(targets != IGNORE_INDEX).tolist()]))
        yield batch


def trainer_of(base, learn, steps, out):
    """TRL's SFTTrainer, whose batches are those of `steps`: lists of numbers of rows, one a step."""
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    class Trainer(trl.SFTTrainer):
        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, batch_sampler=self.batches, collate_fn=self.data_collator)

    config = trl.SFTConfig(
        str(out),
        assistant_only_loss=learn == "assistant",
        max_length=BLOCK + 1,  # cut as ours are: of a conversation, so many tokens have a target or are one
        max_steps=steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    rows = Dataset.from_list([{"messages": messages} for messages in conversations()])
    return Trainer(
        AutoModelForCausalLM.from_pretrained(base / "hf", dtype=torch.float32),
        config,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(base / "hf"),
    )


def losses_of_trl(base, learn, wanted, out, change=None):
    """The loss of each step of TRL's trainer on these batches, as of `batches`, found by their ids. change: of the
    trainer's first row of labels in the last batch."""
    trainer = trainer_of(base, learn, len(wanted), out)
    rows = {tuple(row["input_ids"]): number for number, row in enumerate(trainer.train_dataset)}
    assert len(rows) == len(trainer.train_dataset)
    trainer.batches = [[rows[tuple(ids)] for ids, _ in batch] for batch in wanted]
    for numbers, batch in zip(trainer.batches, wanted, strict=True):
        for number, (ids, learned) in zip(numbers, batch, strict=True):
            labels = trainer.train_dataset[number]["labels"]
            assert labels[1:] == [i if yes else NOT_LEARNED for i, yes in zip(ids, learned, strict=True)][1:]
    if change:
        changed = trainer.batches[-1][0]
        trainer.train_dataset = trainer.train_dataset.map(
            lambda row, number: {"labels": change(row)} if number == changed else {}, with_indices=True
        )
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_the_loss_of_every_step_is_that_of_trl(base, ours, tmp_path):
    learn, mixture, losses = ours
    expected = losses_of_trl(base, learn, list(batches(mixture)), tmp_path)
    assert len(losses) == len(expected) == STEPS
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < 0.95 * losses[0], "it has learned"


def without_an_end(row):
    """Labels without the end of the first answer, a token that is soon more likely than others."""
    place = row["labels"].index(END_OF_TURN)
    return [*row["labels"][:place], NOT_LEARNED, *row["labels"][place + 1 :]]


def test_one_token_of_the_mask_is_seen(base, ours, tmp_path):
    learn, mixture, losses = ours
    wanted = [batch for batch, _ in zip(batches(mixture), range(3), strict=False)]
    found = losses_of_trl(base, learn, wanted, tmp_path, without_an_end)
    assert found[:2] == pytest.approx(losses[:2], rel=1e-5)
    assert found[2] != pytest.approx(losses[2], rel=3e-5)


def test_what_is_learned_differs(base, ours):
    learn, mixture, _ = ours
    learned = [yes for batch in batches(mixture) for _, flags in batch for yes in flags[1:]]
    assert all(learned) if learn == "all" else 0.2 < np.mean(learned) < 0.8

"""--dedup and --decontaminate against a plain reference; kills, collisions of hashes, and wrong evaluation files."""

import gzip
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minzero.data import clean
from minzero.data.conversations import Conversations
from minzero.data.documents import BadDocument, Dropped
from minzero.data.local_files import Files
from minzero.data.pipeline import split_of
from minzero.errors import UserError
from minzero.files import write_json
from tests.helpers.data_sets import (
    command,
    contents,
    ended_by,
    in_a_child,
    jsonl,
    killed_before_each_operation,
    meta_of,
    one_error,
    prepare,
    run,
    text_of,
    write_parquet,
)
from tests.helpers.processes import ROOT, environment

VOCABULARY = ["data", "Shard", "naïve", "東京", "x=1", "don't", "ΟΔΟΣ", "İst", "--", "42", "😀", "\ud83d", "¼"]


# -- the reference -------------------------------------------------------------------------------


def words_of(text):
    parts = ("".join(c for c in part if c.isalnum()) for part in text.lower().split())
    return [part.replace("\u03c2", "\u03c3") for part in parts if part]


def ngrams_of(text):
    words = words_of(text)
    return [" ".join(words[i : i + 13]) for i in range(len(words) - 12)]


def reference(documents, evaluation):
    """(documents that stay, lines of skipped.jsonl). evaluation: [(name of the file, text)]."""
    known, first, stay, lines = {}, {}, [], []
    for name, text in evaluation:
        for ngram in ngrams_of(text):
            known.setdefault(ngram, name)
    for number, (key, text) in enumerate(documents, 1):
        shared = [ngram for ngram in ngrams_of(text) if ngram in known]
        if text in first:
            lines.append({"key": key, "reason": f"has the text of document {first[text]} of the source"})
        elif shared:
            lines.append({"key": key, "reason": f"shares 13 words with {known[shared[0]]}: {shared[0]}"})
        else:
            stay.append((key, text))
        first.setdefault(text, number)
    return stay, lines


def random_text(generator, words):
    return "".join(generator.choice(VOCABULARY) + generator.choice([" ", "\n", "\t ", "\x1e"]) for _ in range(words))


def disguised(generator, text):
    """The same words in other letters, with other marks and blanks."""
    parts = (generator.choice([str.upper, str.title, str])(part) for part in text.split())
    return " ".join(generator.choice(["({})", "{}, -", "_{}_", "{}"]).format(part) for part in parts)


def planted(seed, documents=150):
    """(documents, evaluation texts): some documents have an earlier one's text, 12, 13 or 14 words of an evaluation
    text, or the two halves of one at the end of a document and the beginning of the next."""
    generator = random.Random(seed)
    evaluation = [random_text(generator, generator.randint(30, 50)) for _ in range(6)]
    texts = [random_text(generator, generator.randint(0, 60)) for _ in range(documents)]
    for place in range(5, documents, 5):
        shown = [part for part in generator.choice(evaluation).split() if words_of(part)]
        start = generator.randint(0, 5)
        if place % 3 == 0:
            texts[place] = texts[generator.randrange(place)]
        elif place % 3 == 1:
            parts = " ".join(shown[start : start + generator.randint(12, 14)])
            texts[place] += " " + disguised(generator, parts) + " " + texts[place - 1]
        else:
            texts[place - 1] += " ".join(shown[start : start + 7])
            texts[place] = " ".join(shown[start + 7 : start + 14]) + " " + texts[place]
    return [(f"row {number}", text) for number, text in enumerate(texts, 1)], evaluation


def write_evaluation(folder, texts):
    """The texts as two files, in the order in which they are read: [(path, text)]."""
    parts = [texts[:3], texts[3:]]
    paths = [folder / "a.jsonl", folder / "b.jsonl"]
    for path, part in zip(paths, parts, strict=True):
        path.write_text("".join(json.dumps({"id": 1, "deep": [{"q": text}]}) + "\n" for text in part))
    order = list(clean.evaluation_files(paths).values())
    return [(str(path), text) for path in order for text in parts[paths.index(path)]]


def flags_for(evaluation):
    return ["--dedup", "exact", "--decontaminate", *dict.fromkeys(name for name, _ in evaluation)]


def assert_result(folder, documents, evaluation):
    stay, lines = reference(documents, evaluation)
    for split in ("train", "val"):
        texts = [text for key, text in stay if split_of(key, 0.2) == split]
        assert text_of(folder, split).split("<|endoftext|>")[1:] == [text.replace("\ud83d", "�") for text in texts]
    assert [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()] == lines
    meta = meta_of(folder)
    contaminated = sum(line["reason"].startswith("shares") for line in lines)
    assert 0 < contaminated < len(lines)
    assert (meta["skipped"], meta["duplicates"], meta["contaminated"]) == (0, len(lines) - contaminated, contaminated)
    assert not list(folder.glob("*.tmp")) and not (folder / "progress.json").exists()


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    documents, texts = planted(1)
    return documents, write_evaluation(tmp_path_factory.mktemp("evaluation"), texts)


# -- what is left out ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_against_the_reference(tmp_path, seed, capsys):
    documents, texts = planted(seed)
    evaluation = write_evaluation(tmp_path, texts)
    prepare(documents, tmp_path / "out", *flags_for(evaluation))
    assert_result(tmp_path / "out", documents, evaluation)
    meta, said = meta_of(tmp_path / "out"), capsys.readouterr().out
    assert f"skipped {meta['duplicates']} documents whose text an earlier one has, named in" in said
    assert f"skipped {meta['contaminated']} documents sharing 13 words in a row" in said
    assert "evaluation: 2 files, " in said and " runs of 13 words" in said


def test_same_bytes_with_any_number_of_workers_and_order_of_files(tmp_path, case):
    documents, evaluation = case
    flags = flags_for(evaluation)
    prepare(documents, tmp_path / "1", *flags)
    prepare(documents, tmp_path / "2", *flags[:3], *reversed(flags[3:]), *flags[3:], "--workers", "2")
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert_result(tmp_path / "2", documents, evaluation)


def test_without_the_flags_nothing_is_left_out(tmp_path, case):
    documents, _ = case
    prepare(documents, tmp_path)
    meta = meta_of(tmp_path)
    assert sum(split["documents"] for split in meta["splits"].values()) == len(documents)
    assert (meta["duplicates"], meta["contaminated"]) == (0, 0) and not (tmp_path / "skipped.jsonl").exists()
    assert meta["settings"]["dedup"] is None and meta["settings"]["decontaminate"] is None


def test_limit_counts_documents_of_the_source_and_bad_ones_are_counted_apart(tmp_path, case):
    documents, evaluation = case
    bad = BadDocument("row 3", "found nothing, expected a string")
    documents = [*documents[:2], ("row 3", bad), *documents[3:]]
    flags = [*flags_for(evaluation), "--limit", "100"]
    with pytest.raises(UserError, match="row 3: found nothing"):
        prepare(documents, tmp_path, *flags)
    assert not (tmp_path / "digests.tmp").exists()
    prepare(documents, tmp_path, *flags, "--on_bad_document", "skip")
    good = [pair for pair in documents[:100] if pair[1] is not bad]
    meta = meta_of(tmp_path)
    dropped = meta["duplicates"] + meta["contaminated"]
    assert meta["skipped"] == 1 and dropped == len(reference(good, evaluation)[1]) > 5
    assert dropped + 1 + sum(split["documents"] for split in meta["splits"].values()) == 100
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == dropped + 1


def test_conversations(tmp_path):
    """Dedup compares whole conversations; the separators and headings part words."""
    shown = [f"word{number}" for number in range(20)]
    (tmp_path / "a.txt").write_text(" ".join(shown[:6]) + " ### Assistant: " + " ".join(shown[6:12]) + " ### User: z")

    def talk(question, answer, *more):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}, *more]

    last = {"role": "user", "content": "z"}
    question, answer = " ".join(shown[:6]), " ".join(shown[6:12])
    talks = [
        talk("q", "a"),
        talk("q", "b"),
        talk("q", "a"),
        talk(question, answer),  # 13 words with the heading between them
        talk("other", answer, last),
        talk("assistant " + question, "other"),
    ]
    rows = "".join(json.dumps({"messages": messages}) + "\n" for messages in talks)
    (tmp_path / "talks.jsonl").write_text(rows)
    flags = ["--dedup", "exact", "--decontaminate", str(tmp_path / "a.txt")]
    how = {"side": lambda key: "train", "loss_mask": True}
    prepare(Conversations(Files(str(tmp_path / "talks.jsonl"), "messages", list)), tmp_path / "out", *flags, **how)
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["talks.jsonl row 3", "talks.jsonl row 4"]
    assert lines[0]["reason"] == "has the text of document 1 of the source"
    assert lines[1]["reason"].endswith(f"a.txt: {question} assistant {answer}")


def test_every_kind_of_evaluation_file_gives_the_same_texts(tmp_path):
    _, texts = planted(3)
    texts = [text.replace("\ud83d", "?") for text in texts]
    content = jsonl(texts)
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content))
    write_parquet(tmp_path / "c.parquet", texts, id=list(range(len(texts))), raw=[b"\xff"] * len(texts))
    times = pyarrow.array([2**50] * len(texts), pyarrow.timestamp("ms", tz="nowhere"))  # which Python does not know
    write_parquet(tmp_path / "t.parquet", texts, when=times)
    write_parquet(tmp_path / "d.parquet", [{"a": {"b": ["short", text]}} for text in texts])
    expected = sorted({ngram for text in texts for ngram in ngrams_of(text)})
    for path in sorted(tmp_path.iterdir()):
        found = clean.Evaluation([path])
        assert sorted(set(ngrams_in(found))) == expected
    (tmp_path / "e.txt").write_text("\n".join(texts))  # a line end is a blank like others
    assert set(ngrams_in(clean.Evaluation([tmp_path / "e.txt"]))) == set(ngrams_of("\n".join(texts)))


def ngrams_in(evaluation):
    pairs = zip(evaluation.numbers.tolist(), evaluation.text_places.tolist(), strict=True)
    return [clean.ngram_at(evaluation.texts[number], place) for number, place in pairs]


# -- words and hashes ----------------------------------------------------------------------------

ANY_TEXT = st.text(st.one_of(st.sampled_from("aB -_\n\x1e\u2028Σ\u03c2\u03c3İéÉ½"), st.characters()), max_size=60)


@settings(max_examples=300)
@given(ANY_TEXT, st.integers(1, 12))
def test_words_and_their_hashes(text, size):
    with pytest.MonkeyPatch.context() as patch:
        clean.hash_tables()  # of the usual size
        patch.setattr(clean, "SLICE", size)
        hashes, places = clean.hash_words(text)
    words = words_of(text)
    assert list(clean.words_from(text)) == words
    assert [next(clean.words_from(text, place)) for place in places] == words
    assert hashes.tolist() == [int(clean.hash_words(word)[0][0]) for word in words]
    assert len(set(hashes.tolist())) == len(set(words))


def test_every_character_has_one_code():
    codes = clean.hash_tables()[0]
    for code in range(0x110000):
        word = "".join(clean.words_from(chr(code)))
        found = int(codes[min(code, len(codes) - 1)])
        assert found == (ord(word) if word else int(chr(code).isspace())), hex(code)


def test_a_text_without_blanks_takes_little_memory():
    text = "x" * 2**23 + " " + "-" * 2**23
    clean.hash_tables()
    tracemalloc.start()
    hashes, places = clean.hash_words(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(hashes), places.tolist()) == (1, [0]) and peak < 8e6


def test_equal_hashes_of_other_words_leave_nothing_out(tmp_path, monkeypatch):
    """With hashes of 3 bits every document meets equal ones, and each is compared word by word."""
    whole = clean.hash_ngrams
    monkeypatch.setattr(clean, "hash_ngrams", lambda words: whole(words) & np.uint64(7))
    compared = []
    compare = clean.Evaluation.compare
    monkeypatch.setattr(clean.Evaluation, "compare", lambda *given: compared.append(compare(*given)) or compared[-1])
    documents, texts = planted(2)
    evaluation = write_evaluation(tmp_path, texts)
    prepare(documents, tmp_path / "out", *flags_for(evaluation))
    assert_result(tmp_path / "out", documents, evaluation)
    assert compared.count(None) > 1000


# -- digests -------------------------------------------------------------------------------------


def marked(duplicates, texts):
    """For each text the number of the earlier document that it is said to repeat, or None."""
    pairs = duplicates.mark((str(number), text) for number, text in enumerate(texts))
    reasons = [text.reason if isinstance(text, Dropped) else None for _, text in pairs]
    return [reason and int(reason.split()[5]) for reason in reasons]


def repeats(texts):
    first = {}
    return [
        None if first.setdefault(text, number) == number or not isinstance(text, str) else first[text]
        for number, text in enumerate(texts, 1)
    ]


BLAKE2B = hashlib.blake2b


class Colliding:
    """BLAKE2b of which only the bytes that say neither the slot nor the tag are left."""

    def __init__(self, content, digest_size):
        self.whole = BLAKE2B(content, digest_size=digest_size).digest()

    def digest(self):
        return b"\1" * 8 + self.whole[8:12] + b"\1" * 4


@pytest.mark.parametrize("colliding", [False, True])
@pytest.mark.parametrize("buffer", [16, 1 << 20])
def test_the_table_against_a_dictionary(tmp_path, monkeypatch, colliding, buffer):
    """Growing from 8 slots, and cut back to any number of documents; what it holds is always what a dictionary does."""
    monkeypatch.setattr(clean, "LEAST_SLOTS", 8)
    monkeypatch.setattr(clean, "BUFFER", buffer)
    monkeypatch.setattr(clean, "CHUNK", 7)
    if colliding:
        monkeypatch.setattr(clean.hashlib, "blake2b", Colliding)
    generator = random.Random(5)
    count = 300 if colliding else 3000
    texts = [generator.choice([f"text {generator.randrange(count)}", "\ud83d", "", None]) for _ in range(count)]
    duplicates = clean.Duplicates(tmp_path)
    duplicates.recover(0)
    assert marked(duplicates, texts) == repeats(texts)
    duplicates.flush()
    assert (tmp_path / "digests.tmp").stat().st_size == 16 * count
    for cut in (count, count // 2, 1, 0):
        again = clean.Duplicates(tmp_path)
        again.recover(cut)
        assert marked(again, texts[cut:]) == repeats(texts)[cut:]
        again.flush()
    again.remove()
    assert not list(tmp_path.iterdir())


MEMORY = """
import sys
from pathlib import Path
from minzero.data import clean

def private():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e3

duplicates = clean.Duplicates(Path(sys.argv[1]))
duplicates.recover(0)
before = private()
for number, (_, text) in enumerate(duplicates.mark((str(i), f"document {i}") for i in range(10**6))):
    assert isinstance(text, str)
    if number % 50_000 == 0:
        before, most = (private(), 0) if number == 0 else (before, max(most, private()))
again = clean.Duplicates(Path(sys.argv[1]))
duplicates.flush()
again.recover(10**6)
print(most - before, private() - before, again.used)
"""


def test_a_million_documents_take_no_private_memory(tmp_path):
    """A set of their digests would take more than 60 MB."""
    code = [sys.executable, "-c", MEMORY, str(tmp_path)]
    result = subprocess.run(code, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    growth, with_another, used = map(float, result.stdout.split())
    assert used == 10**6 and growth < 10 and with_another < 20


# -- kills and later calls -----------------------------------------------------------------------


def rerun_gives(folder, case, expected):
    documents, evaluation = case
    assert ended_by(in_a_child(lambda: prepare(documents, folder, *flags_for(evaluation)))) == 0
    assert contents(folder) == expected


def test_kill_before_each_file_operation(quick, case):
    documents, evaluation = case
    prepare(documents, quick / "whole", *flags_for(evaluation))
    expected, kills = contents(quick / "whole"), 0

    def work(folder):
        prepare(documents, folder, *flags_for(evaluation))

    for folder in killed_before_each_operation(quick, work):
        kills += 1
        if folder.exists():
            rerun_gives(folder, case, expected)
            shutil.rmtree(folder)
    assert kills > 40


def test_kill_at_random_moments_with_workers(tmp_path):
    """The real command with two workers, which reads far ahead of what progress.json records, killed again and again
    in the same folder."""
    documents, texts = planted(4, 20_000)
    evaluation = write_evaluation(tmp_path, texts)
    (tmp_path / "source.jsonl").write_bytes(jsonl(text for _, text in documents))
    flags = ["--input", tmp_path / "source.jsonl", "--tokenizer", "bytes", "--shard_tokens", 300_000]
    flags += ["--val_fraction", 0.2, *flags_for(evaluation)]
    assert run("text", *flags, "--out", tmp_path / "whole", "--workers", 1).returncode == 0
    keyed = [(f"source.jsonl row {number}", text) for number, (_, text) in enumerate(documents, 1)]
    assert_result(tmp_path / "whole", keyed, evaluation)
    generator, folder, ended, seen = random.Random(6), tmp_path / "killed", [], set()
    for _ in range(20):
        before = len(list(folder.glob("train_*.bin")))
        process = subprocess.Popen(
            command("text", *flags, "--out", folder, "--workers", 2), env=environment(), stderr=subprocess.DEVNULL
        )
        while process.poll() is None and len(list(folder.glob("train_*.bin"))) <= before:
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.05))
        process.kill()
        ended.append(process.wait())
        seen.add(before)
        if ended[-1] == 0:
            break
        assert ended[-1] == -signal.SIGKILL
    assert contents(folder) == contents(tmp_path / "whole")
    assert ended[-1] == 0 and len(ended) > 3 and len(seen) == len(ended)


def test_a_kill_between_the_last_steps(tmp_path, case, capsys):
    documents, evaluation = case
    prepare(documents, tmp_path, *flags_for(evaluation))
    expected = contents(tmp_path)
    write_json(tmp_path / "progress.json", {})
    (tmp_path / "digests.tmp").write_bytes(b"")
    prepare(documents, tmp_path, *flags_for(evaluation))
    assert "already prepared" in capsys.readouterr().out and contents(tmp_path) == expected


def test_a_log_of_digests_that_does_not_fit_and_one_of_somebody_else(tmp_path, case):
    documents, evaluation = case

    def cut_short():
        yield from documents[:100]
        raise RuntimeError

    (tmp_path / "digests.tmp").symlink_to("elsewhere")
    assert ended_by(in_a_child(lambda: prepare(cut_short(), tmp_path, *flags_for(evaluation)))) == 1
    assert not (tmp_path / "elsewhere").exists() and (tmp_path / "digests.tmp.moved1").is_symlink()
    os.truncate(tmp_path / "digests.tmp", 17)
    with pytest.raises(UserError, match=r"digests.tmp: missing or cut, expected at least .* remove progress.json"):
        prepare(documents, tmp_path, *flags_for(evaluation))
    (tmp_path / "progress.json").unlink()
    prepare(documents, tmp_path, *flags_for(evaluation))
    assert_result(tmp_path, documents, evaluation)


def test_a_call_with_the_flag_that_finished_nothing_leaves_nothing_to_one_without(tmp_path, case):
    documents, _ = case

    def failing():
        yield from documents[:2]
        raise RuntimeError

    assert ended_by(in_a_child(lambda: prepare(failing(), tmp_path, "--dedup", "exact"))) == 1
    assert (tmp_path / "digests.tmp").exists()
    prepare(documents, tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


def test_the_flags_belong_to_the_settings(tmp_path, case):
    documents, evaluation = case
    flags = flags_for(evaluation)
    prepare(documents, tmp_path / "out", *flags)
    before = contents(tmp_path / "out")
    (tmp_path / "renamed.jsonl").write_bytes(Path(flags[-1]).read_bytes())
    (tmp_path / "other.jsonl").write_text(json.dumps("another text " * 13))
    prepare(documents, tmp_path / "out", *flags[:-1], str(tmp_path / "renamed.jsonl"))
    for other, words in (
        ([], "another dedup, decontaminate;"),
        (flags[:2], "another decontaminate;"),
        (flags[2:], "another dedup;"),
        (flags[:-1], "another decontaminate;"),
        ([*flags, str(tmp_path / "other.jsonl")], "another decontaminate;"),
    ):
        with pytest.raises(UserError, match=words):
            prepare(documents, tmp_path / "out", *other)
    assert contents(tmp_path / "out") == before


def test_data_of_earlier_versions_is_continued(tmp_path, case, capsys):
    """Their settings have no such keys: they are as of a call without the flags."""
    documents, evaluation = case
    prepare(documents, tmp_path / "whole")
    expected = contents(tmp_path / "whole")

    def without_keys(path):
        content = json.loads(path.read_text())
        for key in ("dedup", "decontaminate"):
            del content["settings"][key]
        for key in ("duplicates", "contaminated"):
            content.pop(key, None)
            isinstance(content["skipped"], dict) and content["skipped"].pop(key)
        write_json(path, content)

    def cut_short():
        yield from documents[:100]
        raise RuntimeError

    assert ended_by(in_a_child(lambda: prepare(cut_short(), tmp_path / "begun"))) == 1
    without_keys(tmp_path / "begun" / "progress.json")
    without_keys(tmp_path / "whole" / "meta.json")
    for folder in ("begun", "whole"):
        with pytest.raises(UserError, match="another dedup, decontaminate;"):
            prepare(documents, tmp_path / folder, *flags_for(evaluation))
    capsys.readouterr()
    prepare(documents, tmp_path / "begun")
    assert contents(tmp_path / "begun") == expected and "resuming after document" in capsys.readouterr().out
    prepare(documents, tmp_path / "whole")
    assert "already prepared" in capsys.readouterr().out


# -- what is wrong is one line -------------------------------------------------------------------

TEXT = " ".join(map(str, range(20)))
WRONG = [  # name of the file, content, words of the error
    ("none.txt", None, "none.txt: no such file; name files of evaluation texts: .jsonl,"),
    ("folder.txt", "folder", "folder.txt: not a regular file"),
    ("pipe.jsonl", "pipe", "pipe.jsonl: not a regular file"),
    ("a.json", TEXT.encode(), "a.json: found suffix '.json', expected one of .jsonl"),
    ("a.txt", b"", "a.txt: found no text, expected a text of 13 words or more"),
    ("a.jsonl", b"\n\n", "a.jsonl: found no text, expected a text of 13 words or more"),
    ("a.jsonl", jsonl(["one two"] + [" ".join(map(str, range(12)))] * 2), "found 2 texts of fewer words"),
    ("a.txt", b"\xff" + TEXT.encode(), "a.txt: could not be read (UnicodeDecodeError"),
    ("a.jsonl", jsonl([TEXT]) + b'\n{"text": "\xff"}\n', "a.jsonl row 3: could not be read (UnicodeDecodeError"),
    ("a.jsonl", jsonl([TEXT]) + b"{\n", "a.jsonl row 2: could not be read (JSONDecodeError"),
    ("a.jsonl", b"[" * 10**6, "a.jsonl row 1: could not be read (RecursionError"),
    ("a.jsonl.gz", b"no gzip", "a.jsonl.gz row 1: could not be read ("),
    ("a.txt.gz", gzip.compress(TEXT.encode() * 99)[:50], "a.txt.gz: could not be read ("),
    ("a.parquet", b"PAR1 damaged PAR1", "a.parquet row 1: could not be read ("),
    ("a.parquet", "cut", "a.parquet row 1: could not be read ("),
    ("", None, "--decontaminate: found ''"),
    ("a\0b.txt", None, "without NUL"),
]


@pytest.mark.parametrize("name, content, words", WRONG, ids=[f"{number} {w[0]!a}" for number, w in enumerate(WRONG)])
def test_a_wrong_evaluation_file(tmp_path, monkeypatch, name, content, words):
    monkeypatch.chdir(tmp_path)
    if content == "folder":
        os.mkdir(name)
    elif content == "pipe":
        os.mkfifo(name)
    elif content == "cut":
        write_parquet(name, [TEXT] * 1000)
        os.truncate(name, 1000)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    (tmp_path / "good.txt").write_text(TEXT)
    with pytest.raises(UserError) as caught:
        prepare([("a", "text")], tmp_path / "out", "--decontaminate", "good.txt", name)
    message = str(caught.value)
    assert words in message and "--decontaminate" in message and "\n" not in message, message
    assert not (tmp_path / "out").exists()


def test_wrong_flags_of_the_command(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    flags = ["--input", tmp_path / "a.txt", "--out", tmp_path / "out", "--tokenizer", "bytes", "--workers", 1]
    error = one_error(run("text", *flags, "--dedup", "near"))
    assert "--dedup: invalid choice: 'near'" in error and "exact" in error
    assert "--decontaminate: expected at least one argument" in one_error(run("text", *flags, "--decontaminate"))
    assert "matches" not in one_error(run("text", *flags, "--decontaminate", "none.txt"))
    error = one_error(run("text", *flags, "--val_fraction", 1, "--decontaminate", tmp_path / "a.txt"))
    assert "found no text, expected at least one document with text; skipped 1 document: see" in error
    assert not (tmp_path / "out" / "meta.json").exists()


def test_a_disk_without_room(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(f"text {number}" for number in range(100)))
    flags = ["--input", tmp_path / "a.jsonl", "--tokenizer", "bytes", "--workers", 1, "--dedup", "exact"]
    result = run("text", *flags, "--out", tmp_path / "out", preexec_fn=lambda: no_larger_files(100_000))
    assert "digests_table.tmp: could not be written (File too large)" in one_error(result)
    assert run("text", *flags, "--out", tmp_path / "out").returncode == 0


def no_larger_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

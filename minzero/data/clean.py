"""Clean data: documents left out because an earlier one has the same text (--dedup exact), or because they share 13
words in a row with the evaluation texts (--decontaminate).

Duplicates are found in the parent, in the order of the source. Digests of the texts lie in files, not in memory.
Shared words are found in the workers: all runs of 13 words of a batch are hashed at once and looked up among those of
the evaluation texts, and each that is found is compared word by word.

Words are those of GPT-3 (Brown et al. 2020, appendix C): delimited by blanks, in lower case, without punctuation. As
GPT-3 did at first, a document is left out as a whole at a single match of 13 words, before all cutting of documents.
Evaluation texts of fewer than 13 words are not looked for: GPT-3's shorter runs, of 8 words or more, served to sort
its test examples, not to filter its training data.
"""

import functools
import hashlib
import itertools
import mmap
import os
import re

import numpy as np

from minzero.data.documents import Dropped, plural, printable
from minzero.data.local_files import READERS, kind_of, opened, parse_json
from minzero.data.output import cut_short
from minzero.errors import UserError, describe
from minzero.files import cannot_write, checksum, is_regular, make_way
from minzero.flags import a_path

WORDS = 13  # in a row, as GPT-3's filter of its training data

# -- the same text as an earlier document --------------------------------------------------------

DIGEST_BYTES = 16  # of BLAKE2b: two of 10^9 different texts have the same one with a probability of 10^-21
NO_DIGEST = bytes(DIGEST_BYTES)  # in the log, for a document that is no text, or no new one
LEAST_SLOTS = 1 << 16  # of the table
INDEX_BITS = 40  # of a slot, for a document's number; the other 24 are of its digest
BUFFER = 1 << 20  # bytes of the log that wait to be written
CHUNK = 1 << 16  # digests of the log that are put into a new table at a time


class Duplicates:
    """Leaves out texts that an earlier document has, byte for byte. Its memory does not grow with the documents.

    digests.tmp, the log, has the digest of each document, in order: 16 GB for 10^9 documents. A later call cuts it to
    the documents that progress.json records. A hash table maps digests to places in the log. It is a file mapped into
    memory, whose name is removed at once: 16 to 32 bytes a document. It is made from the log at the start, and made
    again twice as large whenever it is half full."""

    def __init__(self, folder):
        self.path = folder / "digests.tmp"
        self.log = None  # the descriptor of the file, from `recover` on
        self.waiting = bytearray()  # the end of the log, not yet written
        self.written = 0  # bytes of the log

    def recover(self, documents):
        """Restore the log to its first `documents` digests, and make the table. Raises UserError."""
        size = documents * DIGEST_BYTES
        if not size:
            make_way(self.path, unless_plain=True)  # a pipe would block
        elif not is_regular(self.path) or self.path.stat().st_size < size:
            raise cut_short(self.path, size)
        try:
            self.log = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            os.truncate(self.log, size)
        except OSError as error:
            raise cannot_write(self.path, error) from None
        self.written = size
        self.make_table(max(LEAST_SLOTS, 2 << documents.bit_length()))

    def mark(self, documents):
        """Yield (key, text), or (key, Dropped) for a text that an earlier document has."""
        for key, text in documents:
            if not isinstance(text, str):  # a BadDocument
                self.append(NO_DIGEST)
            else:
                digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()
                first = self.look_up(digest)
                self.append(digest if first is None else NO_DIGEST)
                if first is not None:
                    text = Dropped("duplicates", f"has the text of document {first + 1} of the source")
            found = [text]
            text = None  # so that a large text is freed by whoever takes it
            yield key, found.pop()

    def look_up(self, digest):
        """The index of the document with this digest. If there is none, the next document is entered as the one, and
        the result is None."""
        slot = int.from_bytes(digest[:8], "little") & self.mask
        tag = int.from_bytes(digest[8:], "little") >> INDEX_BITS << INDEX_BITS
        while entry := self.slots[slot]:
            index = (entry ^ tag) - 1
            if index >> INDEX_BITS == 0 and self.digest_of(index) == digest:
                return index
            slot = (slot + 1) & self.mask
        self.slots[slot] = tag | (self.documents() + 1)
        self.used += 1
        return None

    def documents(self):
        """Documents in the log."""
        return (self.written + len(self.waiting)) // DIGEST_BYTES

    def digest_of(self, index):
        """The digest of a document in the log."""
        place = index * DIGEST_BYTES
        if place >= self.written:
            place -= self.written
            return bytes(self.waiting[place : place + DIGEST_BYTES])
        return os.pread(self.log, DIGEST_BYTES, place)

    def append(self, digest):
        """Append a document's digest to the log."""
        self.waiting += digest
        if len(self.waiting) >= BUFFER:
            self.write()
        if 2 * self.used > self.mask:
            self.write()
            self.make_table(2 * (self.mask + 1))

    def write(self):
        """Write the end of the log."""
        try:
            while self.waiting:
                count = os.write(self.log, self.waiting)
                del self.waiting[:count]
                self.written += count
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def flush(self):
        """Flush the log to the disk, before progress.json records its documents."""
        self.write()
        try:
            os.fsync(self.log)
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def make_table(self, slots):
        """Make the table of what is in the log, with `slots` slots, a power of two."""
        path = self.path.with_name("digests_table.tmp")
        make_way(path, unless_plain=True)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                os.unlink(path)
                os.posix_fallocate(file, 0, 8 * slots)  # a full disk is an error now, not the signal SIGBUS later
                table = mmap.mmap(file, 8 * slots)
            finally:
                os.close(file)
        except OSError as error:
            raise cannot_write(path, error) from None
        self.mask = slots - 1
        self.slots = memoryview(table).cast("Q")
        array = np.frombuffer(table, np.uint64)
        self.used = 0
        for start in range(0, self.written, CHUNK * DIGEST_BYTES):
            content = os.pread(self.log, min(CHUNK * DIGEST_BYTES, self.written - start), start)
            digests = np.frombuffer(content, "<u8").reshape(-1, 2)
            index = np.flatnonzero(digests.any(axis=1))
            low, high = digests[index].T
            tags = high >> np.uint64(INDEX_BITS) << np.uint64(INDEX_BITS)
            insert(array, low, tags | (index + start // DIGEST_BYTES + 1).astype(np.uint64))
            self.used += len(index)

    def remove(self):
        """Remove the log, and with the last reference the table."""
        if self.log is not None:
            os.close(self.log)
        self.path.unlink(missing_ok=True)


def insert(table, keys, entries):
    """Put entries (n,), all different, into a table of 2^k slots, by linear probing from slot key mod 2^k."""
    mask = np.uint64(len(table) - 1)
    slots = keys & mask
    while len(entries):
        empty = table[slots] == 0
        table[slots[empty]] = entries[empty]  # of several for one slot, one stays
        left = table[slots] != entries
        slots = (slots[left] + np.uint64(1)) & mask
        entries = entries[left]


# -- words and their hashes ----------------------------------------------------------------------

BLANK = 1  # the code of all blanks; 0: a character that is left out
CODES = 0x40000  # there are no letters, digits or blanks from here on
SLICE = 1 << 16  # characters hashed at a time: what is computed from them stays in the processor's cache
RANGE = 1 << 64
BASE = 0x9E3779B97F4A7C15  # any odd numbers: of the hash of a word's letters,
WORD_BASE = np.uint64(0xD6E8FEB86659FD93)  # and of the hash of words in a row
RUN = re.compile(r"\S+")
SIGMAS = "\u03c2\u03c3"  # two forms of one letter; which of them `lower` gives depends on the letter's neighbours


def words_from(text, place=0):
    """Yield the words of a text from a place on: delimited by blanks, in lower case, only letters and digits."""
    for run in RUN.finditer(text, place):
        if word := "".join(filter(str.isalnum, run[0].lower())).replace(*SIGMAS):
            yield word


def ngram_at(text, place):
    """The WORDS words of a text from a place on, as one string."""
    return " ".join(itertools.islice(words_from(text, place), WORDS))


@functools.cache
def hash_tables():
    """The code of each character as it stands in `words_from`, and the powers of BASE and of its inverse mod 2^64."""
    codes = np.zeros(CODES, np.uint64)
    for code, character in enumerate(map(chr, range(CODES))):
        if character.isalnum():
            codes[code] = ord(character.lower()[0])
        elif character.isspace():
            codes[code] = BLANK
    codes[ord(SIGMAS[0])] = ord(SIGMAS[1])
    powers = [np.full(SLICE, base, np.uint64) for base in (BASE, pow(BASE, -1, RANGE))]
    for array in powers:
        array[0] = 1
        np.multiply.accumulate(array, out=array)
    return codes, *powers


def hash_words(text):
    """(hash (n,) uint64 of each word of a text, place (n,) of its first letter or digit).

    A word's hash is the sum of code(letter i) * BASE^i mod 2^64: a difference of two sums over the whole slice, times
    a power of the inverse. Words cut by the end of a slice are put together again."""
    table, powers, inverses = hash_tables()
    hashes = [np.zeros(0, np.uint64)]
    places = [np.zeros(0, np.int64)]
    letters = 0  # of the word that the last slice ended in, 0 if it ended between words
    for begin in range(0, len(text), SLICE):
        characters = np.frombuffer(text[begin : begin + SLICE].encode("utf-32-le", "surrogatepass"), "<u4")
        codes = table.take(characters, mode="clip")
        kept = np.flatnonzero(codes)
        if not len(kept):
            continue
        codes = codes[kept]
        blank = np.ones(len(codes) + 2, bool)
        blank[1:-1] = codes == BLANK
        edges = np.flatnonzero(blank[1:] != blank[:-1])
        first, end = edges[::2], edges[1::2]
        sums = np.zeros(len(codes) + 1, np.uint64)
        np.cumsum(codes * powers[: len(codes)], out=sums[1:])
        found = (sums[end] - sums[first]) * inverses[first]
        where = kept[first] + begin
        if letters and not blank[1]:
            whole = int(hashes[-1][-1]) + pow(BASE, letters, RANGE) * int(found[0])
            hashes[-1][-1] = whole % RANGE
            found, where = found[1:], where[1:]
        else:
            letters = 0
        if len(found):
            hashes.append(found)
            places.append(where)
            letters = 0
        letters = 0 if blank[-2] else letters + int(end[-1] - first[-1])
    return np.concatenate(hashes), np.concatenate(places)


def hash_ngrams(words):
    """The hash of each WORDS words in a row, (n - WORDS + 1,), from the hashes (n,) of the words."""
    count = max(0, len(words) - WORDS + 1)
    hashes = np.zeros(count, np.uint64)
    for start in range(WORDS):
        hashes *= WORD_BASE
        hashes += words[start : start + count]
    return hashes


class Ngrams:
    """All WORDS words in a row of some texts; also those that begin in one text and end in another, until `locate`."""

    def __init__(self, texts):
        words, self.places = hash_words("\n".join(texts))
        self.hashes = hash_ngrams(words)
        self.bounds = np.cumsum([0, *(len(text) + 1 for text in texts)])

    def locate(self, which):
        """Of the n-grams `which`, those within one text: (their indices, the index of their text, the place in it)."""
        number = np.searchsorted(self.bounds, self.places[which], "right") - 1
        inside = self.places[which + WORDS - 1] < self.bounds[number + 1]
        which, number = which[inside], number[inside]
        return which, number, self.places[which] - self.bounds[number]


# -- words in a row of the evaluation texts ------------------------------------------------------


class Evaluation:
    """The n-grams of the texts in evaluation files, for a worker to look up those of documents. It takes about 30 bytes
    a word beside the texts themselves.

    paths: .txt (the whole file is one text), .jsonl or .parquet (each string in a row is one). Raises UserError."""

    def __init__(self, paths):
        self.names = [printable(path) for path in paths]
        self.texts = []
        self.ends = []  # for each file, the number of texts in it and the files before
        parts = []
        self.short = 0
        for path, name in zip(paths, self.names, strict=True):
            texts = list(dict.fromkeys(filter(str.strip, read_evaluation(path))))
            ngrams = Ngrams(texts)
            which, number, place = ngrams.locate(np.arange(len(ngrams.hashes)))
            if not len(which):
                found = f"{plural(len(texts), 'text')} of fewer words" if texts else "no text"
                raise UserError(
                    f"--decontaminate: {name}: found {found}, expected a text of {WORDS} words or more; name files of "
                    "whole questions or passages"
                )
            parts.append((ngrams.hashes[which], number + len(self.texts), place))
            self.short += len(texts) - count_different(number)
            self.texts += texts
            self.ends.append(len(self.texts))
        hashes, numbers, places = map(np.concatenate, zip(*parts, strict=True))
        order = np.argsort(hashes, kind="stable")  # of equal ones, the first in the files stays first
        self.hashes = hashes[order]
        self.numbers = numbers[order]
        self.text_places = places[order]
        # of 32 bits per n-gram or more, one is set for each: passes 1 in 32 of all others, in a tenth of the time
        self.shift = np.uint64(64 - max(16, (32 * len(order) - 1).bit_length()))
        bits = np.zeros(RANGE >> int(self.shift), bool)
        bits[self.hashes >> self.shift] = True
        self.filter = np.packbits(bits, bitorder="little")

    def summary(self):
        """A line on what is looked for."""
        short = f"; {plural(self.short, 'shorter text')} not looked for" if self.short else ""
        return (
            f"evaluation: {plural(len(self.names), 'file')}, {plural(count_different(self.hashes), 'run')} of {WORDS} "
            f"words{short}"
        )

    def mark(self, batch):
        """A batch of `encode.make_batches`, a Dropped in place of each text that shares WORDS words in a row with the
        evaluation texts."""
        # the separators of conversations are blanks to `hash_words` and `words_from`
        found = self.find([text.decode() if isinstance(text, bytes) else "" for _, _, text in batch])
        return [(split, key, found.get(number, text)) for number, (split, key, text) in enumerate(batch)]

    def find(self, texts):
        """{index: Dropped} of the texts that share WORDS words in a row with the evaluation texts."""
        ngrams = Ngrams(texts)
        bit = ngrams.hashes >> self.shift
        passed = self.filter[bit >> np.uint64(3)] >> (bit & np.uint64(7)).astype(np.uint8) & 1
        which = np.flatnonzero(passed)
        first = np.searchsorted(self.hashes, ngrams.hashes[which])
        known = self.hashes[np.minimum(first, len(self.hashes) - 1)] == ngrams.hashes[which]
        found = {}
        for index, number, place in zip(*map(np.ndarray.tolist, ngrams.locate(which[known])), strict=True):
            if number not in found and (dropped := self.compare(ngrams.hashes[index], texts[number], place)):
                found[number] = dropped
        return found

    def compare(self, value, text, place):
        """Dropped if the words of a text from a place on, whose hash is `value`, are those of an evaluation text."""
        words = ngram_at(text, place)
        for index in range(*(int(np.searchsorted(self.hashes, value, side)) for side in ("left", "right"))):
            number = int(self.numbers[index])
            if ngram_at(self.texts[number], int(self.text_places[index])) == words:
                name = next(name for name, end in zip(self.names, self.ends, strict=True) if number < end)
                shown = words if len(words) <= 500 else f"{words[:500]}..."
                return Dropped("contaminated", f"shares {WORDS} words with {name}: {shown}")
        return None


def count_different(values):
    """How many different values an array in ascending order has, (n,) with n of 1 or more."""
    return 1 + np.count_nonzero(values[1:] != values[:-1])


def an_evaluation_file(text):
    """The type of --decontaminate: a file of evaluation texts. What is in it is read later."""
    path = a_path(text)
    name = f"--decontaminate: {printable(path)}"
    if not os.path.lexists(path):
        raise UserError(f"{name}: no such file; name files of evaluation texts: {', '.join(READERS)}")
    if not is_regular(path):
        raise UserError(f"{name}: not a regular file; name files of evaluation texts: {', '.join(READERS)}")
    if kind_of(path) is None:
        raise UserError(f"{name}: found suffix {path.suffix!r}, expected one of {', '.join(READERS)}; convert it")
    return path


def evaluation_files(paths):
    """{SHA-256: path} of files, without those whose content is that of another, in the order of the checksums: the
    result does not depend on the order in which they are given."""
    return dict(sorted({checksum(path): path for path in reversed(paths)}.items()))


def read_evaluation(path):
    """Yield the texts of an evaluation file. Raises UserError if it cannot be read."""
    row = 0
    kind = kind_of(path).split(".")[1]
    try:
        if kind == "txt":
            with opened(path) as (content, _):
                yield content.read().decode("utf-8-sig")
            return
        for value in READ_ROWS[kind](path):
            row += 1
            yield from strings(value)
    except Exception as error:  # of many classes: a time zone that is not known, a date out of Python's range
        where = f" row {row + 1}" if kind != "txt" else ""
        raise UserError(
            f"--decontaminate: {printable(path)}{where}: could not be read ({describe(error)}); fix or remove it"
        ) from None


def json_rows(path):
    """Yield what is on each line of a .jsonl file."""
    with opened(path) as (lines, _):
        for line in lines:
            yield parse_json(line) if line.strip() else None


def parquet_rows(path):
    """Yield the rows of a .parquet file, of the columns that may hold strings."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        names = [field.name for field in file.schema_arrow if "string" in str(field.type)]  # or lists of them, ...
        for batch in file.iter_batches(batch_size=256, columns=names):
            for row in range(batch.num_rows):  # one by one: an error is of a row
                yield [column[row].as_py() for column in batch.columns]


READ_ROWS = {"jsonl": json_rows, "parquet": parquet_rows}


def strings(value):
    """Yield every string in a value of JSON or parquet, but not the names of fields."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list | tuple):
            waiting += value.values() if isinstance(value, dict) else value

"""Text before it is tokenized: made valid, and cut where a tokenizer could not take the whole."""

import re

LONGEST_RUN = 100_000  # characters, all blank or all not, that the tokenizer is given at once
PIECE = 1 << 22  # bytes of a longer text that the tokenizer is given at once: memory stays bounded
SMALL_PIECE = 10_000  # characters given to a tokenizer that fails on longer texts
BLANK = re.compile(r"\s")


def without_surrogates(text):
    """The text with U+FFFD in place of half a surrogate pair, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def to_utf8(text):
    """The text in UTF-8, see `without_surrogates`."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return without_surrogates(text).encode()


def cut_for_tokenizer(content):
    """Yield `content`, a text in UTF-8, in parts that a tokenizer can handle in bounded memory; joined, they are it.

    Mostly there is one part. More than PIECE bytes are cut after a letter that ends a line, where the patterns of all
    tokenizers of byte-level BPE end a piece as well, so ids stay the same. Long runs: see `cut_long_runs`."""
    if len(content) <= LONGEST_RUN:
        yield content
        return
    start = 0
    while start < len(content):
        text = content[start : start + PIECE].decode(errors="ignore")  # without a character that is cut in two
        if start + PIECE < len(content):
            text = text[: end_of_word_and_line(text) or len(text)]
        for part in cut_long_runs(text):
            part = part.encode()
            start += len(part)
            yield part


def end_of_word_and_line(text):
    """The place of the last line end after a letter, 0 if there is none."""
    place = text.rfind("\n")
    while place > 0 and not text[place - 1].isalpha():
        place = text.rfind("\n", 0, place)
    return max(0, place)


def cut_small(content):
    """Yield a text in UTF-8 in parts of SMALL_PIECE characters."""
    text = content.decode()
    for start in range(0, len(text), SMALL_PIECE):
        yield text[start : start + SMALL_PIECE].encode()


def cut_long_runs(text, longest=LONGEST_RUN):
    """Yield `text` in parts that tiktoken's regular expressions can handle; joined, they are the text.

    Mostly there is one part. A run of more than `longest` blanks, or of more than `longest` other characters, is cut
    after every `longest` characters. Each part is tokenized by itself, so ids can differ from those of the whole only
    at these cuts."""
    half = longest // 2
    start = 0
    # a run of `longest` contains a whole block of half its length; a mixed block mostly shows in its first characters
    blocks = (text[place : place + half] for place in range(0, len(text) - half, half))
    if len(text) > longest and any(block.isspace() or not BLANK.search(block) for block in blocks):
        for run in re.finditer(r"\s+|\S+", text):
            for end in range(run.start() + longest, run.end(), longest):
                yield text[start:end]
                start = end
    yield text[start:]

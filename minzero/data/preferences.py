"""Pairs of answers to the same prompt, of which the first is preferred: rows of TRL's preference data sets, as texts.

    {"prompt": ..., "chosen": ..., "rejected": ...}    each a text, or a list of messages
    {"chosen": [...], "rejected": [...]}               whole conversations; what both begin with is the prompt
    {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": ...}   the same as texts, as hh-rlhf

A pair becomes one text: two conversations with PAIR between them. Learned are the answers after the prompt alone.
"""

import re

from minzero.data.chat_formats import from_sharegpt, kind_of_list, read_prompt_completion
from minzero.data.conversations import PAIR, Conversations
from minzero.data.documents import BadDocument

SPEAKERS = {"Human": "user", "Assistant": "assistant"}
TURN = re.compile(r"\n\n(Human|Assistant): ?")
ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}  # of a column that is a text


class Preferences(Conversations):
    """A source of pairs as a source of texts for preference tuning. Arguments as of Conversations."""

    def __init__(self, source, template=None, max_tokens=None):
        super().__init__(source, template, max_tokens=max_tokens)
        self.description = f"pairs of answers: {source.description}"
        self.chat = self.chat._replace(pairs=True)
        self.settings |= {"pairs": True}
        self.meta |= {"pairs": True}

    def texts(self, key, row):
        """A row as one text. Raises BadDocument."""
        halves = []
        for conversation in read_pair(key, row):
            texts = super().texts(key, conversation)
            if len(texts) > 1:
                raise BadDocument(
                    key,
                    "the chat template changes earlier answers once a conversation goes on, and one of this pair has "
                    f"{len(texts)} answers",
                    "choose another --chat_template, as own",
                )
            halves += texts
        return [PAIR.join(halves)]

    def read(self, key, conversation):
        return conversation


def read_pair(key, row):
    """A row as two chat_formats.Conversations, the preferred one first. Raises BadDocument."""
    row = without_separators(row)
    prompt = messages_under(key, row, "prompt") if row.get("prompt") not in (None, []) else None
    chosen, rejected = (messages_under(key, row, name) for name in ("chosen", "rejected"))
    if not prompt or not isinstance(row["prompt"], list):  # beside a single one the answers may hold it too
        count = 0  # of messages with which both begin
        while count < min(len(chosen), len(rejected)) and chosen[count] == rejected[count]:
            count += 1
        if count:
            prompt, chosen, rejected = chosen[:count], chosen[count:], rejected[count:]
    if not prompt:
        raise BadDocument(key, "found no prompt and no message with which both answers begin, expected one of these")
    if chosen == rejected:
        raise BadDocument(key, "found the same answer as chosen and as rejected, expected two")
    if is_answer(prompt[-1]) and any(map(is_answer, (*chosen[:1], *rejected[:1]))):
        raise BadDocument(key, "found a prompt that ends with words of the assistant, expected a question")
    shared = {"prompt": prompt, "tools": row.get("tools"), "system": row.get("system")}
    rows = (shared | {"completion": answer} for answer in (chosen, rejected))
    return [read_prompt_completion(key, found) for found in rows]


def is_answer(message):
    return isinstance(message, dict) and message.get("role") == "assistant"


def messages_under(key, row, column):
    """A column of a row as a list of messages. Raises BadDocument."""
    value = row.get(column)
    if isinstance(value, str):
        parts = TURN.split(value)
        if len(parts) > 1 and not parts[0].strip():
            turns = zip(parts[1::2], parts[2::2], strict=True)
            messages = [{"role": SPEAKERS[name], "content": text.strip()} for name, text in turns]
            if column == "prompt" and messages[-1] == {"role": "assistant", "content": ""}:
                messages.pop()  # "Assistant:", after which the answers begin
            return messages
        return [{"role": ROLES[column], "content": value}]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        names = ", ".join(map(str, list(row)[:20]))[:300]
        raise BadDocument(
            key,
            f"no {column}: found {type(value).__name__}, expected a text or a list of messages (the row has {names})",
            "fix it, or give a data set with the columns prompt, chosen and rejected",
        )
    if kind_of_list(value) == "sharegpt":
        return [from_sharegpt(key, number, message) for number, message in enumerate(value, 1)]
    return value


def without_separators(value):
    if isinstance(value, str):
        return value.replace(PAIR, "")
    if isinstance(value, dict):
        return {name: without_separators(item) for name, item in value.items()}
    return [without_separators(item) for item in value] if isinstance(value, list) else value

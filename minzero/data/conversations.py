"""Conversations as text for supervised fine-tuning: the model reads all of it and learns only the assistant's words.

### User:
What is the capital of Nepal?

### Assistant:
Kathmandu.<|endoftext|>

That is this project's form, for tokenizers without a chat template; with one: chat_templates.py.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from minzero.config.values import in_short
from minzero.data.chat_formats import (
    FORMATS,
    LISTS,
    REASONING,
    column_of,
    read_messages,
    read_row,
    recognise,
    tools_as_text,
)
from minzero.data.chat_templates import LEARNED, ChatTemplate
from minzero.data.documents import BadDocument, checked_value, printable
from minzero.data.meta import chat_template_of, holds_conversations
from minzero.data.tokenizer import HuggingFaceTokenizer
from minzero.data.tokenizer_files import END_OF_TEXT
from minzero.errors import UserError
from minzero.flags import at_least

HEADINGS = {"system": "### System:\n", "user": "### User:\n", "assistant": "### Assistant:\n"}
# The assistant's text is wrapped in a pair of LEARNED (ASCII's record separator), or of these where it is only read.
# The tokenizer never sees them.
NOT_LEARNED = "\x1d"
PAIR = "\x1c"  # between the two conversations of a pair, see preferences.py


def learned_template(tokenizer, folders):
    """The chat template, in Jinja, of the conversations in these data folders: this project's, or the one that
    meta.json has. None if they hold no conversations. tokenizer: of data.tokenizer. Raises UserError."""
    if not holds_conversations(folders):
        return None
    entry = chat_template_of(folders)
    return entry["text"] if entry else chat_template(tokenizer)


class ChatEncoding(NamedTuple):
    """How the texts of Conversations become tokens. by_template: whether they are those of a ChatTemplate.
    max_tokens: of a conversation, or None. pairs: whether a text is two conversations with PAIR between them.
    learn_all: whether the other roles' words are learned too."""

    by_template: bool = False
    max_tokens: int | None = None
    pairs: bool = False
    learn_all: bool = False


def template(begin, end):
    """The same format for transformers' tokenizers, in Jinja. begin, end: text of the tokens before a conversation and
    after each answer. `generation` encloses the learned text, for transformers' `return_assistant_tokens_mask` and
    TRL's `assistant_only_loss`."""
    return (
        f"{{% set headings = {HEADINGS!r} %}}{begin}{{% for message in messages %}}"
        "{% if message['role'] not in headings %}"
        "{{ raise_exception('a role other than " + ", ".join(HEADINGS) + "') }}{% endif %}"
        "{% if message['content'] is not string %}"
        "{{ raise_exception('a message whose content is no text') }}{% endif %}"
        f"{{{{ headings[message['role']] }}}}{{% set content = message['content']"
        f".replace('{LEARNED}', '').replace('{NOT_LEARNED}', '') %}}"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ content }}" + end + "{% endgeneration %}"
        "{% else %}{{ content + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ headings['assistant'] }}{% endif %}"
    )


CHAT_TEMPLATE = template("{{ bos_token }}", END_OF_TEXT)


def chat_template(tokenizer):
    """The template of this format for a tokenizer of data.tokenizer."""
    if not tokenizer.end:  # tiktoken's
        return CHAT_TEMPLATE
    return template(tokenizer.text_of(tokenizer.begin), tokenizer.text_of([tokenizer.end_of_text]))


def add_flags(parser, formats=FORMATS):
    """Add the flags of a prepare script for conversations to a FlagParser. formats: of rows, or None for just one."""
    if formats:
        parser.add_argument("--format", choices=formats, help="of the rows; default: the one that the first row has")
        learn = "the assistant's words alone are learned, or all tokens but the first of a conversation"
        parser.add_argument("--learn", choices=["assistant", "all"], default="assistant", help=learn)
    parser.add_argument(
        "--chat_template",
        default="auto",
        metavar="own|base|NAME|FILE",
        help="this project's form, the tokenizer's template, its template of this name where it has several, or one in "
        "Jinja; default: base where it has one, else own",
    )
    fits = "cut a longer conversation after the last whole answer, or leave it out"
    parser.add_argument("--max_tokens", type=at_least(2), help=fits)


def open_template(name, tokenizer):
    """The ChatTemplate that --chat_template names, or None for this project's form. tokenizer: of data.tokenizer.
    Raises UserError."""
    if name == "own":
        return None
    theirs = tokenizer.as_transformers() if isinstance(tokenizer, HuggingFaceTokenizer) else None
    named = theirs.chat_template if theirs is not None and isinstance(theirs.chat_template, dict) else {}
    if isinstance(named.get(name), str):
        return ChatTemplate(theirs, named[name], f"{name} of tokenizer {tokenizer.name}")
    if name not in ("auto", "base"):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            names = ", ".join(("own", "base", *named))
            raise UserError(f"--chat_template: {name}: {reason}; expected {names} or a file in Jinja") from None
        return ChatTemplate(tokenizer.as_transformers(None), text, name)
    if theirs is not None:
        text = base_template(theirs, f"tokenizer {tokenizer.name}")
        if text:
            return ChatTemplate(theirs, text, f"that of tokenizer {tokenizer.name}")
    if name == "base":
        raise UserError(f"--chat_template: base: {tokenizer.name} comes with no chat template; choose own, or a file")
    return None


def base_template(theirs, name):
    """The chat template of a tokenizer of transformers', or None: of several the default. name: for messages. Raises
    UserError."""
    text = theirs.chat_template
    if isinstance(text, dict):
        if "default" not in text:
            raise UserError(
                f"{name}: chat_template: found several ({', '.join(map(repr, text))}) and no 'default'; give one "
                "of them that name, or prepare data with --chat_template NAME or own"
            )
        text = text["default"]
    if text and not isinstance(text, str):
        raise UserError(f"{name}: chat_template: found {in_short(text)}, expected text in Jinja; fix it")
    return text or None


def with_marks(key, messages, learned=None):
    """A conversation as one text, with the separator LEARNED before and after each answer of the assistant.

    messages: [{"role": "system", "user" or "assistant", "content": text}]. learned: of each, whether it is learned if
    it is an answer (default: all are); other answers are between NOT_LEARNED. key: names the conversation in errors.
    Raises BadDocument if a message is not of this form, or no answer is learned."""
    text = ""
    for number, message in enumerate(messages, 1):
        fields = message if isinstance(message, dict) else {}
        role = fields.get("role")
        content = fields.get("content")
        if not isinstance(role, str) or role not in HEADINGS or not isinstance(content, str):
            found = " ".join(str(message).split())[:80]
            raise BadDocument(
                key,
                f"message {number}: found {found}, expected a role ({', '.join(HEADINGS)}) and a text as content",
            )
        content = content.replace(LEARNED, "").replace(NOT_LEARNED, "")
        text += HEADINGS[role]
        if role == "assistant":
            mark = LEARNED if learned is None or learned[number - 1] else NOT_LEARNED
            text += f"{mark}{content}{mark}"
        else:
            text += f"{content}\n\n"
    if LEARNED not in text:
        raise BadDocument(key, "found no message of the assistant, expected at least one")
    return text


class Conversations:
    """A source of conversations as a source of texts for supervised fine-tuning.

    source: of rows, each a dict, or a list of messages. template: a ChatTemplate, or None for this project's form
    (`with_marks`). format_name: of chat_formats.FORMATS; None: that of the first row that has one, which is said.
    columns: names that the one with a list of messages may have. learn_all: as of ChatEncoding."""

    def __init__(self, source, template=None, format_name=None, columns=LISTS, max_tokens=None, learn_all=False):
        self.source = source
        self.template = template
        self.format_name = format_name
        self.columns = columns
        self.recognised = None  # (format, column) of this source's rows
        self.split_for_each_answer = False  # whether that has been said
        self.leaves_out = False  # whether that has been said
        self.description = f"conversations: {source.description}"
        lines = (getattr(source, "summary", None), template and template.summary())
        self.summary = "\n".join(filter(None, lines)) or None
        self.chat = ChatEncoding(template is not None, max_tokens, learn_all=learn_all)
        digest = template and hashlib.sha256(template.text.encode()).hexdigest()[:16]
        self.settings = {"format": format_name, "max_tokens": max_tokens, "chat_template": digest}
        self.meta = {"chat_template": template.entry()} if template else {}
        if learn_all:  # data of earlier versions does not name what is learned
            self.settings["learn"] = self.meta["learn"] = "all"

    @property
    def fraction(self):
        return self.source.fraction

    @property
    def yield_bad(self):
        return self.source.yield_bad

    @yield_bad.setter
    def yield_bad(self, value):
        self.source.yield_bad = value

    def __iter__(self):
        for key, row in self.source:
            try:
                texts = [row] if isinstance(row, BadDocument) else self.texts(key, row)
            except BadDocument as bad:
                texts = [self.source.raise_or_yield(bad)]
            except RecursionError:
                texts = [self.source.raise_or_yield(BadDocument(key, "could not be read (nested too deeply)"))]
            for text in texts:
                yield key, text

    def texts(self, key, row):
        """A row as texts with separators: one, or one for each answer (see ChatTemplate.texts). Raises BadDocument."""
        conversation = self.read(key, row)
        self.say_what_is_left_out(key, conversation)
        if self.template is None:
            conversation = tools_as_text(conversation)
            return [with_marks(key, conversation.messages, conversation.learned)]
        texts = self.template.texts(key, conversation, self.chat.learn_all)
        if len(texts) > 1 and not self.split_for_each_answer:
            self.split_for_each_answer = True
            tqdm.write(
                f"{printable(key)}: the chat template changes earlier answers once a conversation goes on; such "
                "conversations are stored once for each answer, as the model will see them"
            )
        return texts

    def say_what_is_left_out(self, key, conversation):
        """Say it of the first Conversation whose reasoning the chat template, or this project's form, has no place
        for."""
        known = self.template.text if self.template else ""
        fields = [
            name for name in REASONING if name not in known and any(one.get(name) for one in conversation.messages)
        ]
        if fields and not self.leaves_out:
            self.leaves_out = True
            form = "the chat template" if self.template else "this project's form"
            tqdm.write(f"{printable(key)}: {', '.join(fields)}: {form} has no place for it, so it is left out")

    def read(self, key, row):
        """A row as a chat_formats.Conversation. Raises BadDocument."""
        if not isinstance(row, dict):
            return read_messages(key, row)
        if self.recognised is None:
            self.recognised = self.recognise(key, row)
        return read_row(key, row, *self.recognised)

    def recognise(self, key, row):
        """(format, column) of a row, which are said. Raises BadDocument if it has none."""
        if self.format_name:
            return self.format_name, column_of(row, self.columns)
        found = recognise(row, self.columns)
        if found is None and {"chosen", "rejected"} <= row.keys():
            fault = "found a pair of answers (chosen, rejected), expected one conversation"
            raise BadDocument(key, fault, "prepare pairs with data/preferences/prepare.py")
        if found is None:
            name = column_of(row, self.columns)
            raise checked_value(key, row.get(name), name, list, row)
        name, column = found
        tqdm.write(f"format: {name}{f', in column {column}' if column else ''}; another: --format")
        return found

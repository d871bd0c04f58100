"""A tokenizer's own chat template: conversations as the text, and the ids, that transformers makes of them.

The template is rendered by transformers' Jinja, and the whole rendering is tokenized at once, as apply_chat_template
does. Two things are added:

- The assistant's part is found exactly: by the template's {% generation %} marks, else by differences. Of answer i,
  the rendering of the messages before it, with the prompt for an answer, must begin that of the messages up to it, and
  this one must begin the whole. What is learned is the difference: the answer and the token that ends its turn.
- Names of special tokens in a message stay text, so that nobody can end a turn from within one. Before rendering,
  NEUTRAL is put into each such name; the names found in the rendering are then the template's, and are put between
  BEFORE and AFTER. A copy of the tokenizer knows its special tokens under these names alone.
"""

import copy
import itertools
import json
import re
from typing import NamedTuple

import numpy as np

from minzero.data.chat_formats import tools_as_text
from minzero.data.documents import BadDocument
from minzero.errors import UserError, describe

LEARNED = "\x1e"  # before and after what is learned
BEFORE, AFTER = "\x1f", "\x1d"  # around the name of a special token
NEUTRAL = "\ufdd0"  # a code point that is no character; in the middle of a word, so that no template removes it
SEPARATORS = str.maketrans("", "", LEARNED + BEFORE + AFTER + NEUTRAL)
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PROBES = (PROBE, [{"role": "system", "content": "c"}, *PROBE])  # some templates demand a system message


class ChatTemplate:
    """A chat template for a tokenizer of transformers'.

    theirs: the tokenizer, of its fast kind. text: the Jinja. name: of the template, for messages. Raises UserError if
    the text is no template."""

    def __init__(self, theirs, text, name):
        self.theirs = theirs
        self.text = text
        self.name = name
        self.marked = bool(GENERATION.search(text))
        self.knows_tools = "tool" in text
        added = theirs.backend_tokenizer.get_added_tokens_decoder().values()
        names = sorted({token.content for token in added if is_guarded(token.content, token.special)}, key=len)
        self.special = re.compile("|".join(map(re.escape, reversed(names))) or r"(?!)")
        self.check()

    def check(self):
        """Raise UserError if the text is no template. Sets `end_of_turn`, the name of the special token that ends an
        answer, or None."""
        import jinja2

        self.end_of_turn = None
        for probe in PROBES:
            try:
                text, spans = self.render(probe)
                if not self.marked:
                    spans = [(len(self.render(probe[:-1], add_generation_prompt=True)[0]), len(text))]
            except jinja2.TemplateSyntaxError as error:
                raise UserError(
                    f"--chat_template: {self.name}: line {error.lineno}: {error.message}; expected Jinja"
                ) from None
            except Exception:  # it may want other conversations than this one
                continue
            for start, _ in spans[-1:]:
                end = self.end_of_answer(text, start)
                names = [match[0] for match in self.special.finditer(text, start) if match.end() == end]
                self.end_of_turn = names[0] if names else None
            return

    def summary(self):
        """A line on how the assistant's part is found."""
        how = "by its {% generation %} marks" if self.marked else "by differences"
        end = f", and {self.end_of_turn} ends a turn" if self.end_of_turn else ", and no token of its own ends a turn"
        return f"chat template: {self.name}; what the assistant says is found {how}{end}"

    def entry(self):
        """The entry of meta.json, see meta.chat_template_of. end_of_turn: the id, or None."""
        end = self.theirs.convert_tokens_to_ids(self.end_of_turn) if self.end_of_turn else None
        return {"name": self.name, "text": self.text, "end_of_turn": end}

    def render(self, messages, tools=None, add_generation_prompt=False):
        """(the text of `guarded` messages, in which no special token's name is but the template's; the [start, end) of
        what is marked in it). Raises whatever a template raises."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, spans = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=self.text,
            return_assistant_tokens_mask=self.marked,
            add_generation_prompt=add_generation_prompt,
            **self.theirs.special_tokens_map,
        )
        return rendered[0], spans[0] if self.marked else []

    def guarded(self, value):
        """Messages in which the names of special tokens are changed, and without the characters used here."""
        if isinstance(value, str):
            value = value.translate(SEPARATORS)
            while self.special.search(value):  # names may overlap
                value = self.special.sub(lambda found: found[0][0] + NEUTRAL + found[0][1:], value)
            return value
        if isinstance(value, dict):
            return {self.guarded(key): self.guarded(item) for key, item in value.items()}
        return [self.guarded(item) for item in value] if isinstance(value, list) else value

    def with_names(self, text, spans=()):
        """A rendering with LEARNED around what is learned, and each special token's name between BEFORE and AFTER."""
        places = [0, *(place for span in spans for place in span), len(text)]
        parts = [text[start:end] for start, end in itertools.pairwise(places)]
        return self.special.sub(rf"{BEFORE}\g<0>{AFTER}", LEARNED.join(parts)).replace(NEUTRAL, "")

    def prompt(self, messages):
        """The text, for a TemplateEncoder, after which the assistant answers. Raises UserError."""
        try:
            return self.with_names(self.render(self.guarded(messages), add_generation_prompt=True)[0])
        except Exception as error:  # a template may raise anything
            raise UserError(f"prompt: the chat template does not take it ({describe(error)})") from None

    def texts(self, key, conversation, learn_all=False):
        """A Conversation as texts for a TemplateEncoder: one, or where the template changes earlier answers once a
        conversation goes on, one for each answer. learn_all: one, in which those answers are marked that the template
        does not change, or all of it where there are none. Raises BadDocument."""
        if not self.shows_tools(conversation):
            conversation = tools_as_text(conversation)
        messages, tools = self.guarded(conversation.messages), self.guarded(conversation.tools)
        conversation = conversation._replace(messages=messages, tools=tools)
        try:
            whole, spans = self.render(messages, tools)
            self.check_complete(key, conversation, whole)
            if self.marked:
                found = [(whole, self.marked_answers(key, conversation, spans))]
            else:
                found = self.by_differences(key, conversation, whole)
        except BadDocument:
            raise
        except Exception as error:  # a template may raise anything
            raise BadDocument(key, f"the chat template does not take it ({describe(error)})") from None
        if learn_all:
            spans = [span for text, of_text in found for span in of_text if whole.startswith(text[: span[1]])]
            found = [(whole, spans or [(0, len(whole))])]
        return [self.with_names(text, spans) for text, spans in found]

    def check_complete(self, key, conversation, text):
        """Raise BadDocument if the template leaves a message out, as some do with roles that they do not know."""
        messages, tools = conversation.messages, conversation.tools
        missing = [
            number
            for number, message in enumerate(messages)
            if message["role"] in ("system", "user") and message["content"].strip() not in text
        ]
        if not missing:
            return
        marked = copy.deepcopy(messages)  # it may also have changed them, as SmolLM3's takes /no_think out
        for number in missing:
            marked[number]["content"] = f"{marker(number)} {marked[number]['content']}"
        text = self.render(marked, tools)[0]
        for number in missing:
            if marker(number) not in text:
                role = messages[number]["role"]
                raise BadDocument(
                    key,
                    f"message {number + 1}: the chat template leaves out this message of the {role}",
                    "choose another --chat_template, as own",
                )

    def shows_tools(self, conversation):
        """Whether the template writes all of a Conversation's tools, their calls and their results. Arguments are not
        looked at. So it is where the template raises: it may have a reason, which is then said."""
        if not self.knows_tools:
            return False
        messages, tools = copy.deepcopy((conversation.messages, conversation.tools))
        functions = [tool.get("function", tool) for tool in tools or ()]
        functions += [call["function"] for message in messages for call in message.get("tool_calls", ())]
        count = 0  # of markers
        for function in functions:
            if isinstance(function, dict) and isinstance(function.get("name"), str):
                function["name"] = marker(count)
                count += 1
        for message in messages:
            if message["role"] == "tool":
                message["content"] = f"{marker(count)} {message['content']}"
                count += 1
        if not count:
            return True
        try:
            text = self.render(messages, tools)[0]
        except Exception:  # whether it takes the conversation itself is seen after this
            return True
        return all(marker(number) in text for number in range(count))

    def marked_answers(self, key, conversation, spans):
        """Those of the marked parts that are learned. Raises BadDocument."""
        roles = [message["role"] for message in conversation.messages]
        answers = [learned for role, learned in zip(roles, conversation.learned, strict=True) if role == "assistant"]
        if len(spans) != len(answers) and not (spans and all(answers)):
            raise BadDocument(
                key, f"the chat template marks {len(spans)} parts with generation, expected one for each answer"
            )
        return spans if all(answers) else [span for span, learned in zip(spans, answers, strict=True) if learned]

    def by_differences(self, key, conversation, whole):
        """[(text, [(start, end) of an answer])]. Raises BadDocument."""
        messages, tools = conversation.messages, conversation.tools
        found = []
        for place in (place for place, learned in enumerate(conversation.learned) if learned):
            before, _ = self.render(messages[:place], tools, add_generation_prompt=True)
            is_last = place == len(messages) - 1
            until = whole if is_last else self.render(messages[: place + 1], tools)[0]
            if not until.startswith(before):
                raise BadDocument(
                    key,
                    f"message {place + 1}: the chat template's rendering of this answer does not begin with that of "
                    "the messages before it, so what the assistant says cannot be found in it",
                    "choose another --chat_template, as own",
                )
            found.append((until, (len(before), self.end_of_answer(until, len(before)))))
        if all(whole.startswith(until[:end]) for until, (_, end) in found):
            return [(whole, [span for _, span in found])]
        return [(until, [span]) for until, span in found]

    def end_of_answer(self, text, start):
        """The end of an answer that begins at `start` of a text, the last one in it: after the first special token
        that no words follow, else the end of the text."""
        for match in self.special.finditer(text, start):
            if not self.special.sub("", text[match.end() :]).strip():
                return match.end()
        return len(text)


def marker(number):
    """A word that is in no conversation, to be looked for in a rendering."""
    return f"Zq{number}qZ"


def is_guarded(name, special):
    """Whether an added token is one whose name in a message stays text. One of a single character cannot be told from
    text."""
    return special and len(name) > 1


# -- ids -----------------------------------------------------------------------------------------


NAMES = re.compile(f"{BEFORE}[^{AFTER}]*{AFTER}")


class Encoded(NamedTuple):
    """ids: (n,) uint32. learned: (n,) bool. ends: of each learned part, the number of ids up to its end. sizes: of
    each, its bytes of text without special tokens."""

    ids: np.ndarray
    learned: np.ndarray
    ends: list
    sizes: list


def rename_pieces(model, names):
    """Rename pieces of a tokenizer's model in place, its vocabulary in tokenizer.json, but for those that it makes by
    merges. Else it would find special tokens in text by itself, as Unigram does. names: {old: new}."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    elif isinstance(vocabulary, dict):
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", ()))
        merged = {piece for pair in pairs for piece in (*pair, "".join(pair))} & names.keys()
        model["vocab"] = {
            piece if piece in merged else names.get(piece, piece): number for piece, number in vocabulary.items()
        }
    unknown = names.get(model.get("unk_token"))
    if isinstance(vocabulary, dict) and unknown in model["vocab"]:
        model["unk_token"] = unknown


def without_marks(text):
    """The words of a text of ChatTemplate: without separators and special tokens."""
    return NAMES.sub("", text).translate(SEPARATORS)


class TemplateEncoder:
    """Encodes texts of ChatTemplate, whole, by a copy of a tokenizer that knows its special tokens as BEFORE + name +
    AFTER alone. content: its tokenizer.json, as text."""

    def __init__(self, content):
        from tokenizers import Tokenizer

        content = json.loads(content)
        content |= {"post_processor": None, "truncation": None, "padding": None}  # no BOS; offsets as they are
        ids = {}
        for token in content["added_tokens"]:
            if is_guarded(token["content"], token["special"]):
                token["content"] = BEFORE + token["content"] + AFTER
                token |= {"normalized": False, "single_word": False}
            ids[token["content"]] = token["id"]
        rename_pieces(content["model"], {name[1:-1]: name for name in ids if name.startswith(BEFORE)})
        self.backend = Tokenizer.from_str(json.dumps(content))
        vocabulary = self.backend.get_vocab()
        self.table = np.arange(1 + max(vocabulary.values()), dtype=np.uint32)  # the copy's ids -> the tokenizer's
        for name, number in ids.items():
            self.table[vocabulary[name]] = number

    def encode(self, text):
        """A text with marks -> Encoded. A token that is partly learned is learned, as by apply_chat_template; not so a
        special token before an answer that takes the blanks after it (Phi-3's)."""
        parts = text.split(LEARNED)
        found = self.backend.encode("".join(parts), add_special_tokens=False)
        offsets = np.array(found.offsets, dtype=np.int64).reshape(-1, 2)
        learned = np.zeros(len(offsets), dtype=bool)
        is_special = np.array([token.startswith(BEFORE) for token in found.tokens], dtype=bool)
        ends = []
        sizes = []
        place = 0
        for number, part in enumerate(parts):
            if number % 2:
                inside = (offsets[:, 0] < place + len(part)) & (offsets[:, 1] > place)
                learned |= inside & ~(is_special & (offsets[:, 0] < place))
                ends.append(int((offsets[:, 0] < place + len(part)).sum()))
                sizes.append(len(without_marks(part).encode()))
            place += len(part)
        return Encoded(self.table[found.ids], learned, ends, sizes)

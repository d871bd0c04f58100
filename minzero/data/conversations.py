"""Conversations as text for supervised fine-tuning: the model reads all of it and learns only the assistant's words.

### User:
What is the capital of Nepal?

### Assistant:
Kathmandu.<|endoftext|>
"""

from minzero.data.documents import BadDocument
from minzero.data.tokenizer_files import END_OF_TEXT

HEADINGS = {"system": "### System:\n", "user": "### User:\n", "assistant": "### Assistant:\n"}
# The assistant's text is wrapped in a pair of these (ASCII's record separator). The tokenizer never sees them.
LEARNED = "\x1e"
PAIR = "\x1c"  # between the two conversations of a pair, see preferences.py


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
        f"{{{{ headings[message['role']] }}}}{{% set content = message['content'].replace('{LEARNED}', '') %}}"
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


def with_marks(key, messages):
    """A conversation as one text, with the separator LEARNED before and after each answer of the assistant.

    messages: [{"role": "system", "user" or "assistant", "content": text}]. key: names the conversation in errors.
    Raises BadDocument if a message is not of this form, or none is the assistant's."""
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
        content = content.replace(LEARNED, "")
        text += HEADINGS[role]
        if role == "assistant":
            text += f"{LEARNED}{content}{LEARNED}"
        else:
            text += f"{content}\n\n"
    if LEARNED not in text:
        raise BadDocument(key, "found no message of the assistant, expected at least one")
    return text


class Conversations:
    """A source of lists of messages as a source of texts with separators (see `with_marks`)."""

    def __init__(self, source):
        self.source = source
        self.description = f"conversations: {source.description}"
        self.summary = getattr(source, "summary", None)

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
        for key, messages in self.source:
            if not isinstance(messages, BadDocument):
                try:
                    messages = with_marks(key, messages)
                except BadDocument as bad:
                    messages = self.source.raise_or_yield(bad)
            yield key, messages

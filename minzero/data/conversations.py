"""Conversations as text, for supervised fine-tuning: the model reads all of it and learns the assistant's words alone.

### User:
What is the capital of Nepal?

### Assistant:
Kathmandu.<|endoftext|>
"""

from minzero.data.documents import BadDocument
from minzero.data.tokenizer import END_OF_TEXT

HEADINGS = {"system": "### System:\n", "user": "### User:\n", "assistant": "### Assistant:\n"}
# ASCII's record separator: what stands between the first and the second, the third and the fourth ... is learned
LEARNED = "\x1e"
# The same for transformers' tokenizers, in Jinja. `generation` encloses what is learned, for transformers'
# `return_assistant_tokens_mask` and TRL's `assistant_only_loss`.
CHAT_TEMPLATE = (
    f"{{% set headings = {HEADINGS!r} %}}{{{{ bos_token }}}}{{% for message in messages %}}"
    "{% if message['role'] not in headings %}"
    "{{ raise_exception('a role other than " + ", ".join(HEADINGS) + "') }}{% endif %}"
    "{% if message['content'] is not string %}{{ raise_exception('a message whose content is no text') }}{% endif %}"
    f"{{{{ headings[message['role']] }}}}{{% set content = message['content'].replace('{LEARNED}', '') %}}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ content }}" + END_OF_TEXT + "{% endgeneration %}"
    "{% else %}{{ content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ headings['assistant'] }}{% endif %}"
)


def with_marks(key, messages):
    """A list of {"role": system, user or assistant, "content": text} as one text, with LEARNED around each answer of
    the assistant. Raises BadDocument, which names the conversation by its key."""
    text = ""
    for number, message in enumerate(messages, 1):
        role, content = (message.get(name) if isinstance(message, dict) else None for name in ("role", "content"))
        if not isinstance(role, str) or role not in HEADINGS or not isinstance(content, str):
            found = " ".join(str(message).split())[:80]
            raise BadDocument(
                key,
                f"message {number}: found {found}, expected a role ({', '.join(HEADINGS)}) and a text as content",
            )
        content = content.replace(LEARNED, "")
        text += HEADINGS[role] + (f"{LEARNED}{content}{LEARNED}" if role == "assistant" else f"{content}\n\n")
    if LEARNED not in text:
        raise BadDocument(key, "found no message of the assistant, expected at least one")
    return text


class Conversations:
    """A source of conversations as a source of texts with marks."""

    def __init__(self, source):
        self.source, self.description = source, f"conversations: {source.description}"
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

"""Rows of conversations, in the formats that data sets of others have, as messages.

    messages            {"messages": [{"role": "user", "content": "..."}, ...]}, as OpenAI's and TRL's
    sharegpt            {"conversations": [{"from": "human", "value": "..."}, ...]}
    alpaca              {"instruction": "...", "input": "...", "output": "...", "system": "...", "history": [[q, a]]}
    prompt_completion   {"prompt": "...", "completion": "..."}, each a text or a list of messages, as TRL's

Lists of messages may also be under `conversation`, `conversations` or `messages`, or the column that --column names. A
content may come in parts, [{"type": "text", "text": "..."}]. An answer is not learned where its message has a `weight`
of 0 (OpenAI), or `train` or `training` is false (Axolotl). A text under `system` is the first message where no message
is the system's.
"""

import json
from typing import NamedTuple

from minzero.data.documents import BadDocument, checked_value
from minzero.errors import describe

FORMATS = ("messages", "sharegpt", "alpaca", "prompt_completion")
LISTS = ("messages", "conversation", "conversations")  # usual names of the column that holds a list of messages
ROLES = {name: name for name in ("system", "user", "assistant", "tool")}
ROLES |= {"developer": "system", "function": "tool", "ipython": "tool"}
SHAREGPT = ROLES | {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
SHAREGPT |= {"model": "assistant", "observation": "tool", "function_response": "tool", "function_call": "function_call"}
REASONING = ("reasoning_content", "thinking")
KEPT = ("tool_calls", "tool_call_id", "name", *REASONING)  # what chat templates know besides
LEARNED_IF = ("weight", "train", "training")  # fields that say whether an answer is learned


class Conversation(NamedTuple):
    """messages: [{"role": "system", "user", "assistant" or "tool", "content": text, ...}]. learned: of each message,
    whether it is an answer that is learned. tools: descriptions of functions that the assistant may call."""

    messages: list
    learned: list
    tools: list | None = None


def recognise(row, columns=LISTS):
    """(format, the column of its messages or None) of a row, a dict, or None if it has none of the formats. columns:
    those that may hold messages; if it is a single one, nothing else is a conversation."""
    for name in columns:
        if isinstance(row.get(name), list):
            return kind_of_list(row[name]), name
    if len(columns) == 1:
        return None
    if "instruction" in row and "output" in row:
        return "alpaca", None
    if "prompt" in row and "completion" in row:
        return "prompt_completion", None
    return None


def kind_of_list(messages):
    first = messages[0] if messages else None
    return "sharegpt" if isinstance(first, dict) and "from" in first and "role" not in first else "messages"


def column_of(row, columns):
    """The one of these columns that a row has, else the first."""
    return next((name for name in columns if name in row), columns[0])


def read_row(key, row, format_name, column=None):
    """A row of one of FORMATS as a Conversation. key: names it in errors. Raises BadDocument."""
    if format_name == "alpaca":
        return read_alpaca(key, row)
    if format_name == "prompt_completion":
        return read_prompt_completion(key, row)
    messages = checked_value(key, row.get(column), column, list, row)
    if isinstance(messages, BadDocument):
        raise messages
    if format_name == "sharegpt":
        messages = [from_sharegpt(key, number, message) for number, message in enumerate(messages, 1)]
    return read_messages(key, with_system(key, row, messages), read_tools(key, row.get("tools")))


def with_system(key, row, messages):
    """A row's messages after the text in its column `system`, if it has one and no message is the system's. Raises
    BadDocument."""
    names = [message.get("role") for message in messages if isinstance(message, dict)]
    has_one = any(isinstance(name, str) and ROLES.get(name) == "system" for name in names)
    if has_one or not row.get("system"):
        return messages
    text = text_of_parts(key, 0, row["system"])
    if not isinstance(text, str):
        raise BadDocument(key, f"system: found {shown(text)}, expected a text")
    return [{"role": "system", "content": text}, *messages]


# -- each format ---------------------------------------------------------------------------------


def read_messages(key, messages, tools=None):
    """A list of messages, as OpenAI's, as a Conversation. Raises BadDocument."""
    found = []
    learned = []
    for number, message in enumerate(messages, 1):
        fields = {}
        if isinstance(message, dict):  # tables have every field in every row, mostly empty
            fields = {name: value for name, value in message.items() if value is not None}
        role = fields.get("role")
        role = ROLES.get(role) if isinstance(role, str) else None
        content = text_of_parts(key, number, fields.get("content"))
        if content is None and role == "assistant" and fields.get("tool_calls"):
            content = ""
        if role is None or not isinstance(content, str):
            raise BadDocument(
                key,
                f"message {number}: found {shown(message)}, expected a role (system, user, assistant) and a text as "
                "content, or a tool's result",
            )
        kept = {name: fields[name] for name in KEPT if name in fields}
        if "tool_calls" in kept:
            kept["tool_calls"] = read_calls(key, number, kept["tool_calls"])
        found.append({"role": role, "content": content} | kept)
        learned.append(role == "assistant" and is_learned(key, number, fields))
    if not any(message["role"] == "assistant" for message in found):
        raise BadDocument(key, "found no message of the assistant, expected at least one")
    if not any(learned):
        raise BadDocument(key, f"found no answer that is learned ({', '.join(LEARNED_IF)}), expected at least one")
    return Conversation(found, learned, tools)


def text_of_parts(key, number, content):
    """The text of a content in parts; another content as it is."""
    if not isinstance(content, list) or not all(isinstance(part, dict) and "type" in part for part in content):
        return content
    for part in content:
        if part["type"] != "text" or not isinstance(part.get("text"), str):
            raise BadDocument(key, f"message {number}: found a part of type {part['type']!r}, expected text alone")
    return "".join(part["text"] for part in content)


def is_learned(key, number, fields):
    """Whether an answer is learned, by the fields of its message. Raises BadDocument."""
    for name in LEARNED_IF:
        value = fields.get(name, 1)
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BadDocument(key, f"message {number}: {name}: found {value!r}, expected 0 or 1")
        if not value:
            return False
    return True


def from_sharegpt(key, number, message):
    """ShareGPT's {"from": ..., "value": ...} as a message of OpenAI's. Raises BadDocument."""
    fields = message if isinstance(message, dict) else {}
    speaker = fields.get("from")
    role = SHAREGPT.get(speaker) if isinstance(speaker, str) else None
    if role is None or "value" not in fields:
        raise BadDocument(
            key,
            f"message {number}: found {shown(message)}, expected from ({', '.join(SHAREGPT)}) and value, as ShareGPT's",
        )
    others = {name: value for name, value in fields.items() if name not in ("from", "value")}
    if role != "function_call":
        return others | {"role": role, "content": fields["value"]}
    return others | {"role": "assistant", "content": None, "tool_calls": [{"function": fields["value"]}]}


def read_alpaca(key, row):
    """Raises BadDocument."""
    texts = {name: text_under(key, row, name) for name in ("instruction", "output")}
    texts |= {name: text_under(key, row, name) for name in ("input",) if row.get(name) is not None}
    messages = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise BadDocument(key, f"history: found {shown(history)}, expected a list of questions and their answers")
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadDocument(key, f"history: found {shown(pair)}, expected pairs of a question and its answer")
        messages += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    question = "\n\n".join(filter(None, (texts["instruction"], texts.get("input"))))
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": texts["output"]}]
    return read_messages(key, with_system(key, row, messages))


def read_prompt_completion(key, row):
    """Of a prompt in messages no answer is learned, as by TRL. Raises BadDocument."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, list):
            raise BadDocument(key, f"{name}: found {type(value).__name__}, expected a text or a list of messages")
    read = [message | {"weight": 0} if isinstance(message, dict) else message for message in prompt]
    messages = with_system(key, row, [*read, *completion])
    return read_messages(key, messages, read_tools(key, row.get("tools")))


def text_under(key, row, column):
    text = checked_value(key, row.get(column), column, str, row)
    if isinstance(text, BadDocument):
        raise text
    return text


# -- tools ---------------------------------------------------------------------------------------


def read_tools(key, tools):
    """A row's list of tools, or its JSON, or None. Raises BadDocument."""
    if isinstance(tools, str):
        tools = parsed(tools) if tools.strip() else None
    if tools in (None, []):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadDocument(key, f"tools: found {shown(tools)}, expected a list of objects, or its JSON")
    check_json(key, "tools", tools)
    return tools


def read_calls(key, number, calls):
    """An answer's tool calls, [{"type": "function", "function": {"name", "arguments"}}], each with its `id` if it has
    one. OpenAI's arguments are JSON in a string, and templates expect objects. Raises BadDocument."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else call
        function = parsed(function) if isinstance(function, str) else function
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadDocument(
                key, f"message {number}: found a tool call {shown(call)}, expected a function's name and arguments"
            )
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = parsed(arguments)
        check_json(key, f"message {number}: the arguments of {function['name']}", arguments)
        read = {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
        if isinstance(call, dict) and call.get("id") is not None:
            read["id"] = call["id"]
        found.append(read)
    return found


def check_json(key, where, value):
    """Raise BadDocument for a value that JSON has no form for, as a date in a table."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadDocument(key, f"{where}: found what JSON cannot hold ({describe(error)})") from None


def parsed(text):
    """The content of JSON, or the text itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def tools_as_text(conversation):
    """The same Conversation of system, user and assistant alone, for a template that knows no tools: in the tags that
    Hermes and Qwen use."""
    messages = []
    learned = []
    for message, counts in zip(conversation.messages, conversation.learned, strict=True):
        role, content = message["role"], message["content"]
        for call in message.get("tool_calls", ()):
            called = json.dumps(call["function"], ensure_ascii=False)
            content += f"{chr(10) if content else ''}<tool_call>\n{called}\n</tool_call>"
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
            if messages and messages[-1]["role"] == "user":  # several results are one message
                messages[-1]["content"] += f"\n{content}"
                continue
        messages.append({"role": role, "content": content})
        learned.append(counts)
    if conversation.tools:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in conversation.tools)
        text = f"You may call these functions:\n<tools>\n{listed}\n</tools>"
        if messages[0]["role"] == "system":
            messages[0]["content"] += f"\n\n{text}"
        else:
            messages.insert(0, {"role": "system", "content": text})
            learned.insert(0, False)
    return Conversation(messages, learned)


def shown(value):
    """A value for a message of one line."""
    return " ".join(str(value).split())[:80]

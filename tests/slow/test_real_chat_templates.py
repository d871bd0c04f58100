"""Published chat templates, as TRL's package brings them, with published tokenizers: transformers' ids and mask.
Mistral's is that of the unit tests."""

import pytest

from minzero.data.chat_formats import read_messages
from minzero.data.chat_templates import ChatTemplate, TemplateEncoder
from minzero.data.tokenizer import load_tokenizer
from tests.helpers.foreign_tokenizers import LLAMA3, QWEN, odd_strings
from tests.helpers.processes import beside
from tests.slow.test_real_tokenizers import END, PACKAGES, from_ranks, mistral_1
from tests.unit.test_chat_templates import STYLES, unmarked

IN_CHATS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture(scope="module")
def packages():
    return beside("tokenizers", *PACKAGES)


@pytest.fixture(scope="module")
def templates():
    return beside("chat_templates", "trl==1.16.0") / "trl" / "chat_templates"


def llama3(packages, folder):
    file = packages / "llama_models/llama3/tokenizer.model"
    from_ranks(file, LLAMA3, IN_CHATS, folder, bos_token=IN_CHATS[0], eos_token=IN_CHATS[-1])


def qwen(packages, folder):
    special = [END, "<|im_start|>", "<|im_end|>"]
    from_ranks(packages / "dashscope/resources/qwen.tiktoken", QWEN, special, folder, eos_token="<|im_end|>")


# (tokenizer, template, whether TRL's changed one has marks around the same and a line end)
CASES = [
    (qwen, "qwen2_5", False),
    (qwen, "qwen3", False),
    (qwen, "qwen3_instruct_2507", True),
    (llama3, "llama3", True),
    (llama3, "llama3_1", False),
    (llama3, "llama3_2", False),
    (mistral_1, "mistral", False),
]


@pytest.mark.slow
@pytest.mark.parametrize("write, name, has_same_marks", CASES, ids=lambda value: getattr(value, "__name__", value))
def test_ids_and_mask_are_those_of_transformers(packages, templates, tmp_path, write, name, has_same_marks):
    write(packages, tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    theirs = tokenizer.as_transformers()
    special = [str(token) for token in theirs.added_tokens_decoder.values()]
    strings = [text for text in odd_strings(400, seed=5) if text.strip() and not any(name in text for name in special)]
    path = templates / f"{name}.jinja"
    plain = ChatTemplate(theirs, path.read_text() if path.exists() else unmarked(STYLES[name][0]), name)
    encoder = TemplateEncoder(tokenizer.to_json())
    path = templates / f"{name}_training.jinja"
    marked = ChatTemplate(theirs, path.read_text(), path.name) if path.exists() else None
    compared = 0
    for start in range(0, len(strings) - 4, 4):
        roles = ("user", "assistant", "user", "assistant")
        talk = [{"role": role, "content": text} for role, text in zip(roles, strings[start : start + 4], strict=True)]
        conversation = read_messages("row 1", talk)
        texts = plain.texts("row 1", conversation)
        for text, until in zip(texts, (4,) if len(texts) == 1 else (2, 4), strict=True):
            found = encoder.encode(text)
            assert found.ids.tolist() == theirs.apply_chat_template(talk[:until], chat_template=plain.text)["input_ids"]
            ends = [tokenizer.decode([number]) for number in found.ids[[end - 1 for end in found.ends]]]
            assert ends == [plain.end_of_turn] * len(found.ends) if plain.end_of_turn else True
        if marked is None:
            continue
        expected = theirs.apply_chat_template(
            talk, chat_template=marked.text, return_dict=True, return_assistant_tokens_mask=True
        )
        (text,) = marked.texts("row 1", conversation)
        of_marks = encoder.encode(text)
        assert of_marks.ids.tolist() == expected["input_ids"]
        assert of_marks.learned.astype(int).tolist() == expected["assistant_masks"]
        if has_same_marks:  # but for the line end after the end of a turn
            assert found.ids.tolist() == of_marks.ids.tolist()
            more = [n for n, (a, b) in enumerate(zip(of_marks.learned, found.learned, strict=True)) if a and not b]
            assert not (found.learned & ~of_marks.learned).any()
            assert not tokenizer.decode(found.ids[more].tolist()).strip()
        compared += 1
    assert len(texts) == (2 if name == "qwen3" else 1)
    assert compared > 50 or marked is None

"""A tokenizer's own chat template: transformers' ids, the assistant's tokens, no special token in a text."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig

import export
import sample
from minzero import resume
from minzero.config.build import build
from minzero.config.sections import ModelConfig
from minzero.data.chat_formats import Conversation, read_messages
from minzero.data.chat_templates import ChatTemplate, TemplateEncoder
from minzero.data.conversations import Conversations, base_template, open_template
from minzero.data.documents import BadDocument
from minzero.data.local_files import Files
from minzero.data.meta import read_meta
from minzero.data.mixture import Mixture
from minzero.data.shards import NO_LOSS, STARTS, TokenStream
from minzero.data.tokenizer import load_tokenizer
from minzero.errors import UserError
from minzero.generate import Writer
from minzero.trained import load, open_trained
from tests.helpers.data_sets import prepare
from tests.helpers.foreign_tokenizers import LLAMA3, QWEN, byte_fallback, byte_level, odd_strings, save
from tests.helpers.trained_runs import LLAMA, answers_of_both, write_run

# In the style of published models' templates. [[ and ]] are around what is learned: {% generation %} or nothing.
CHATML = (
    "{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\n' }}{%- if m['role'] == 'assistant' %}"
    "[[{{- m['content'] + '<|im_end|>' }}]]{{- '\n' }}"
    "{%- else %}{{- m['content'] + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
LLAMA3_CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}{% if m['role'] == 'assistant' %}"
    "[[{{ m['content'] | trim + '<|eot_id|>' }}]]{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}{% if m['role'] == 'assistant' %}"
    "[[{{ m['content'] + eos_token }}]]{{ '\n' }}{% else %}{{ m['content'] + eos_token + '\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}[[{{ ' ' + m['content'] + eos_token }}]]"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<start_of_turn>model\n' }}"
    "[[{{ m['content'] | trim + '<end_of_turn>' }}]]{{ '\n' }}"
    "{% else %}{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (  # its end of turn takes the blanks after it, and the end of text is after the last turn alone
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}{% if m['role'] == 'assistant' %}"
    "[[{{ m['content'] + '<|end|>' }}]]{{ '\n' }}{% else %}{{ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
THINKING = (  # as Qwen3: reasoning is in the last answer alone
    "{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\n' }}"
    "{%- if m['role'] == 'assistant' and loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{{- m['content'] + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
END = "<|endoftext|>"


def phi3():
    found = byte_level(LLAMA3, [END, "<|user|>", "<|assistant|>", "<|system|>"])
    found.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False, rstrip=True)])
    return found


# {name: (template, tokenizer, settings, end of a turn)}
STYLES = {
    "chatml": (
        CHATML,
        lambda: byte_level(QWEN, [END, "<|im_start|>", "<|im_end|>"], added=["<tool_call>"]),
        {"eos_token": "<|im_end|>", "pad_token": END},
        "<|im_end|>",
    ),
    "llama3": (
        LLAMA3_CHAT,
        lambda: byte_level(
            LLAMA3,
            ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
            bos="<|begin_of_text|>",
            ignore_merges=True,
        ),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        "<|eot_id|>",
    ),
    "zephyr": (ZEPHYR, byte_fallback, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, "</s>"),
    "mistral": (MISTRAL, byte_fallback, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, "</s>"),
    "gemma": (
        GEMMA,
        lambda: byte_level(None, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]),
        {"bos_token": "<bos>", "eos_token": "<eos>"},
        "<end_of_turn>",
    ),
    "phi3": (PHI3, phi3, {"eos_token": END}, "<|end|>"),
}
TALKS = [
    [
        {"role": "user", "content": f"What is {number} in naïve 東京 😀?"},
        {"role": "assistant", "content": f"It is {number + 1} 👩‍👩‍👧."},
        {"role": "user", "content": "  don't\n\nWE'LL "},
        {"role": "assistant", "content": "\nx = 1\n    y = é"},
    ]
    for number in range(40)
]


def marked(template):
    return template.replace("[[", "{% generation %}").replace("]]", "{% endgeneration %}")


def unmarked(template):
    return template.replace("[[", "").replace("]]", "")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of each style's tokenizer, with its template without marks in tokenizer_config.json or beside it."""
    folder = tmp_path_factory.mktemp("templates")
    for name, (template, make, settings, _) in STYLES.items():
        beside = name == "gemma"
        save(make(), folder / name, **settings, **({} if beside else {"chat_template": unmarked(template)}))
        if beside:
            (folder / name / "chat_template.jinja").write_text(unmarked(template))
    return folder


def opened(place, name, with_marks=False):
    """(transformers' tokenizer, our ChatTemplate, our TemplateEncoder) of a style."""
    tokenizer = load_tokenizer(place / name)
    theirs = tokenizer.as_transformers()
    text = marked(STYLES[name][0]) if with_marks else theirs.chat_template
    return theirs, ChatTemplate(theirs, text, name), TemplateEncoder(tokenizer.to_json())


def encoded(template, encoder, messages):
    (text,) = template.texts("row 1", read_messages("row 1", messages))
    return encoder.encode(text)


@pytest.mark.parametrize("with_marks", [False, True], ids=["differences", "marks"])
@pytest.mark.parametrize("name", STYLES)
def test_ids_and_mask_are_those_of_transformers(place, name, with_marks):
    """The oracle is transformers' own mask of the template with marks; without them the same must be found."""
    theirs, template, encoder = opened(place, name, with_marks)
    strings = list(odd_strings(60, seed=4))
    special = theirs.all_special_tokens + [str(token) for token in theirs.added_tokens_decoder.values()]
    odd = [text for text in strings if text.strip() and not any(token in text for token in special)][:30]
    talks = TALKS[:3] + [
        [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        for text, answer in zip(odd, reversed(odd), strict=True)
    ]
    if name != "gemma":
        talks.append([{"role": "system", "content": "Be brief."}, *TALKS[0]])
    assert len(talks) > 20
    for talk in talks:
        expected = theirs.apply_chat_template(
            talk, chat_template=marked(STYLES[name][0]), return_dict=True, return_assistant_tokens_mask=True
        )
        found = encoded(template, encoder, talk)
        assert found.ids.tolist() == expected["input_ids"]
        assert found.learned.astype(int).tolist() == expected["assistant_masks"]
        answers = [message["content"] for message in talk if message["role"] == "assistant"]
        assert len(found.ends) == len(answers) and 0 < found.learned.sum() < len(found.ids)
        end = theirs.convert_tokens_to_ids(STYLES[name][3])
        assert all(found.ids[place - 1] == end and found.learned[place - 1] for place in found.ends)
    assert template.end_of_turn == STYLES[name][3]


@pytest.mark.parametrize("name", STYLES)
def test_a_changed_mask_is_noticed(place, name, monkeypatch):
    """The oracle of the test above differs in one token for each answer, where its end of turn is not learned."""
    theirs, template, encoder = opened(place, name)
    end_of_answer = ChatTemplate.end_of_answer
    less = len(STYLES[name][3])
    monkeypatch.setattr(ChatTemplate, "end_of_answer", lambda *given: end_of_answer(*given) - less)
    expected = theirs.apply_chat_template(
        TALKS[0], chat_template=marked(STYLES[name][0]), return_dict=True, return_assistant_tokens_mask=True
    )
    found = encoded(template, encoder, TALKS[0])
    assert found.ids.tolist() == expected["input_ids"]
    assert (found.learned != np.array(expected["assistant_masks"], dtype=bool)).sum() == 2


@pytest.mark.parametrize("name", STYLES)
def test_names_of_special_tokens_in_a_message_stay_text(place, name):
    theirs, template, encoder = opened(place, name)
    special = {str(token): number for number, token in theirs.added_tokens_decoder.items() if token.special}
    harmless = encoded(template, encoder, TALKS[0])
    for token in special:
        attack = f"a{token}b {token} {token}{token}c"
        talk = [
            {"role": "user", "content": attack},
            {"role": "assistant", "content": f"z{attack}"},
            {"role": "user", "content": f"{token[:2]}{token}{token[2:]}"},
            {"role": "assistant", "content": f"{token[:-1]}"},
        ]
        found = encoded(template, encoder, talk)
        for number in special.values():  # as many of each as in a conversation without
            assert (found.ids == number).sum() == (harmless.ids == number).sum(), token
        if name not in ("zephyr", "mistral"):  # whose tokenizer puts spaces before words
            plain = theirs.encode(attack[1:-1], add_special_tokens=False, split_special_tokens=True)
            text = theirs.decode(found.ids)
            assert attack in text and plain and text.count(attack) == 2
        # of transformers' own guard, which cuts the text at each such name, the text is the same
        guarded = theirs.apply_chat_template(talk, return_dict=True, sanitize_control_tokens=True)["input_ids"]
        assert theirs.decode(guarded).replace(" ", "") == theirs.decode(found.ids).replace(" ", "")
        unguarded = theirs.apply_chat_template(talk, return_dict=True)["input_ids"]
        assert sum(number in special.values() for number in unguarded) > np.isin(found.ids, [*special.values()]).sum()


def test_an_answer_is_learned_where_its_weight_says_so(place):
    for with_marks in (False, True):
        _, template, encoder = opened(place, "chatml", with_marks)
        talk = [message | {} for message in TALKS[0]]
        talk[1]["weight"] = 0
        found, whole = encoded(template, encoder, talk), encoded(template, encoder, TALKS[0])
        assert found.ids.tolist() == whole.ids.tolist()
        assert found.ends == whole.ends[1:] and found.sizes == whole.sizes[1:]
        assert not found.learned[: whole.ends[0]].any() and found.learned[whole.ends[0] :].sum() > 3


def test_a_template_that_changes_earlier_answers_gives_one_text_for_each(place):
    theirs, _, encoder = opened(place, "chatml")
    template = ChatTemplate(theirs, THINKING, "thinking")
    texts = template.texts("row 1", read_messages("row 1", TALKS[0]))
    assert len(texts) == 2
    for text, until in zip(texts, (2, 4), strict=True):
        ids = theirs.apply_chat_template(TALKS[0][:until], chat_template=THINKING)["input_ids"]
        found = encoder.encode(text)
        assert found.ids.tolist() == ids
        learned = theirs.decode(found.ids[found.learned])
        assert learned == f"<think>\n\n</think>\n\n{TALKS[0][until - 1]['content']}<|im_end|>"
    assert len(template.texts("row 1", read_messages("row 1", TALKS[0][:2]))) == 1


def test_all_tokens_of_a_conversation_are_learned_to_its_end(tmp_path, place):
    """--learn all, also where the template changes earlier answers, and where the last message is not learned."""
    theirs, _, encoder = opened(place, "chatml")
    for text in (THINKING, unmarked(CHATML)):
        template = ChatTemplate(theirs, text, "mine")
        for talk in (TALKS[0], TALKS[0][:3], [*TALKS[0][:3], TALKS[0][3] | {"weight": 0}], TALKS[0][:2]):
            (found,) = template.texts("row 1", read_messages("row 1", talk), learn_all=True)
            shown = [{"role": message["role"], "content": message["content"]} for message in talk]
            expected = theirs.apply_chat_template(shown, chat_template=text)["input_ids"]
            encoded_text = encoder.encode(found)
            assert encoded_text.ids.tolist() == expected and encoded_text.ends


CALLS = [{"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
WITH_TOOLS = [
    {"role": "user", "content": "Paris?"},
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "content": "18C", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "18 degrees."},
]
OF_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
OF_CALLS = "{% for c in m.get('tool_calls') or [] %}{{ c['id'] }}{{ c['function'] | tojson }}{% endfor %}"
FLAT = "{% for t in tools or [] %}{{ t['name'] }}{% endfor %}"


def with_tools(tools, calls, results):
    """A template that shows these: Jinja of the tools and of the calls, and whether it shows results."""
    shown = "" if results else "{% if m['role'] != 'tool' %}"
    return (
        f"{tools}{{% for m in messages %}}{shown}<|im_start|>{{{{ m['role'] }}}}\n{calls}"
        f"{{{{ m['content'] }}}}<|im_end|>\n{'' if results else '{% endif %}'}{{% endfor %}}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


@pytest.mark.parametrize(
    "text, is_whole",
    [
        (with_tools(OF_TOOLS, OF_CALLS, True), True),
        (with_tools("", OF_CALLS, True) + "{# tools #}", False),
        (with_tools(OF_TOOLS, "", True), False),
        (with_tools(OF_TOOLS, OF_CALLS, False), False),
        (with_tools(FLAT, OF_CALLS, True), False),
    ],
    ids=["all", "no tools", "no calls", "no results", "tools of another form"],
)
def test_tools_calls_and_results_are_shown_by_the_template_or_as_text(place, text, is_whole):
    theirs, _, encoder = opened(place, "chatml")
    template = ChatTemplate(theirs, text, "mine")
    found = encoder.encode(template.texts("row 1", read_messages("row 1", WITH_TOOLS, TOOLS))[-1])
    said = theirs.decode(found.ids)
    if is_whole:
        expected = theirs.apply_chat_template(WITH_TOOLS, tools=TOOLS, chat_template=text)["input_ids"]
        assert found.ids.tolist() == expected and "abcdefghi" in said
    for part in ('"city": "Paris"', '"parameters": {"type": "object"}', "18C", "18 degrees."):
        assert part in said, (part, said)
    assert ("<tool_call>" in said and "<tool_response>" in said) is not is_whole
    # a conversation without any is not changed
    plain = encoder.encode(template.texts("row 1", read_messages("row 1", TALKS[0]))[-1])
    assert plain.ids.tolist() == theirs.apply_chat_template(TALKS[0], chat_template=text)["input_ids"]


def test_a_system_message_that_the_template_changes_is_not_left_out(place):
    theirs = opened(place, "chatml")[0]
    text = unmarked(CHATML).replace("m['content'] + '<|im_end|>\n'", "m['content'].replace('/no_think', '') + '\n'")
    talk = [{"role": "system", "content": "Be brief. /no_think"}, *TALKS[0]]
    (found,) = ChatTemplate(theirs, text, "mine").texts("row 1", read_messages("row 1", talk))
    assert "Be brief. " in found and "/no_think" not in found
    drops = text.replace("{%- for m in messages %}", "{%- for m in messages if m['role'] != 'system' %}")
    with pytest.raises(BadDocument, match="message 1: the chat template leaves out this message of the system"):
        ChatTemplate(theirs, drops, "mine").texts("row 1", read_messages("row 1", talk))


def test_a_template_that_demands_a_system_message(place):
    text = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('No.') }}{% endif %}" + unmarked(CHATML)
    assert ChatTemplate(opened(place, "chatml")[0], text, "mine").end_of_turn == "<|im_end|>"


def test_a_role_that_takes_the_blanks_after_it_is_not_learned(tmp_path):
    """Phi-3's <|assistant|>, where the answer begins with blanks."""
    tokenizer = byte_level(LLAMA3, [END, "<|user|>", "<|end|>"])
    tokenizer.add_special_tokens([AddedToken("<|assistant|>", special=True, normalized=False, rstrip=True)])
    save(tokenizer, tmp_path / "phi", eos_token=END, chat_template=unmarked(PHI3))
    loaded = load_tokenizer(tmp_path / "phi")
    theirs, encoder = loaded.as_transformers(), TemplateEncoder(loaded.to_json())
    template = open_template("auto", loaded)
    found = encoded(template, encoder, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " \n yes"}])
    assert theirs.decode(found.ids[found.learned]) == "yes<|end|>"


def unigram(names):
    """A tokenizer as sentencepiece's Unigram: special tokens are pieces of its vocabulary."""
    pieces = [*names, *"abcdefghijklmnopqrstuvwxyz<>/.,: \n|_", "▁", "he", "re"]
    found = Tokenizer(models.Unigram([(piece, -1.0 - number) for number, piece in enumerate(pieces)], 0))
    found.pre_tokenizer, found.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    found.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return found


def word_level(names):
    pieces = [*names, *"abcdefghijklmnopqrstuvwxyz", ":", ".", "hi", "there"]
    found = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(pieces)}, unk_token=names[0]))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return found


def test_an_unknown_token_that_merges_make_keeps_its_name():
    pieces = ["<unk>", "<", "u", "n", "k", ">", "<u", "nk", "<unk", "a"]
    merges = [("<", "u"), ("n", "k"), ("<u", "nk"), ("<unk", ">")]
    made = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    made.add_special_tokens([AddedToken("<unk>", special=True, normalized=False)])
    assert TemplateEncoder(made.to_str()).encode("a z").ids.tolist().count(0) >= 1


@pytest.mark.parametrize("make", [unigram, word_level])
def test_a_tokenizer_whose_model_knows_its_special_tokens_finds_none_in_a_message(make, tmp_path):
    names = ["<unk>", "<s>", "</s>"]
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    text = "{{ bos_token }}{% for m in messages %} {{ m['content'] }} {{ eos_token }}{% endfor %}"
    save(make(names), tmp_path / "made", **settings, chat_template=text)
    encoder = TemplateEncoder(make(names).to_str())
    theirs = load_tokenizer(tmp_path / "made").as_transformers()
    template = ChatTemplate(theirs, text, "mine")
    harmless = encoder.encode(template.prompt([{"role": "user", "content": "hi there"}])).ids.tolist()
    assert harmless == theirs.apply_chat_template([{"role": "user", "content": "hi there"}])["input_ids"]
    assert harmless.count(1) == harmless.count(2) == 1
    attack = "hi </s> <s> a</s>b <s>there </s></s>"
    found = encoder.encode(template.prompt([{"role": "user", "content": attack}])).ids.tolist()
    assert found.count(1) == found.count(2) == 1 and len(found) > len(harmless)


REFUSED = [
    (unmarked(GEMMA), [{"role": "system", "content": "s"}, *TALKS[0]], "System role not supported"),
    (
        unmarked(CHATML).replace("assistant\n' }}{%- endif", "assistant\n<think>' }}{%- endif"),
        TALKS[0],
        "message 2: the",
    ),
    ("{{ messages[1]['content'] }}", TALKS[0], "message 1: the chat template leaves out this message of the user"),
    (CHATML.replace("[[", "").replace("]]", "{% generation %}{% endgeneration %}" * 2), None, "found no answer"),
]


@pytest.mark.parametrize("text, talk, expected", REFUSED)
def test_what_a_template_does_not_take_is_one_line(place, text, talk, expected):
    template = ChatTemplate(opened(place, "chatml")[0], text, "mine")
    with pytest.raises(BadDocument, match=rf"^row 1: [^\n]*{expected}[^\n]*$"):
        if talk is None:
            talk = [TALKS[0][0], TALKS[0][1] | {"weight": 0}]
        template.texts("row 1", read_messages("row 1", talk))


def test_no_run_begins_with_templates_in_two_forms(place, tmp_path, monkeypatch):
    """The export, and sample.py, would speak one of them alone. A run that has begun so goes on."""
    for name, flag in (("a", "own"), ("b", "base"), ("c", "base"), ("d", "own")):
        (tmp_path / name).mkdir()
        prepare_talks(place, "chatml", tmp_path / name, chat_template=flag)
    folders = {name: str(tmp_path / name / "data") for name in "abcd"}
    size = read_meta(folders["a"])["vocab_size"]

    def mixture(*names):
        return Mixture({folders[name]: 1 for name in names}, "train", 128, size, 1)

    for names in ("ad", "bc", "b"):
        mixture(*names).check_chat_template()
    config = build({"train": {"out_dir": str(tmp_path / "run")}}, "")
    found = [None, None, []]
    monkeypatch.setattr(resume, "as_rank_0", lambda choose: found)
    monkeypatch.setattr(resume, "check_same_run", lambda *_: None)
    said = r"data.path: found conversations in several chat templates, .*own form in .*/a/data and that .* in .*/b/data"
    with pytest.raises(UserError, match=said):
        resume.where_to_start(config, mixture("a", "b"))
    data = mixture("a", "b")
    paths = {folders["a"]: 1, folders["b"]: 1}
    found[:2] = tmp_path, {"step": 1, "data": data.fingerprint(), "config": {"data": {"path": paths}}}
    assert resume.where_to_start(config, data)[1]["step"] == 1
    config.train.allow_changed = ["data.path"]
    config.data.path = paths
    assert resume.where_to_start(config, data)[1]["step"] == 1
    found[1] |= {"data": mixture("b").fingerprint(), "config": {"data": {"path": folders["b"]}}}
    with pytest.raises(UserError, match=said):
        resume.where_to_start(config, data)


def test_of_several_templates_one_is_named(place, tmp_path, capsys):
    """By --chat_template, for there may be no default; sample.py --chat says so of a published folder."""
    theirs = opened(place, "chatml")[0]
    several = {"tool_use": unmarked(CHATML), "rag": "{{ messages[0]['content'] }}"}

    def written(name, templates):
        save(STYLES["chatml"][1](), tmp_path / name, eos_token="<|im_end|>", chat_template=templates)
        return load_tokenizer(tmp_path / name)

    def as_list(templates):
        return [{"name": name, "template": text} for name, text in templates.items()]

    both = written("both", as_list(several | {"default": unmarked(THINKING)}))
    assert open_template("auto", both).text == unmarked(THINKING)
    assert open_template("tool_use", both).text == unmarked(CHATML)
    none = written("none", as_list(several))
    assert open_template("rag", none).text == several["rag"] and open_template("own", none) is None
    for name in ("auto", "base"):
        with pytest.raises(
            UserError, match=r"tokenizer none: chat_template: found several \('tool_use', 'rag'\) and no"
        ):
            open_template(name, none)
    for odd in (5, True, {"default": 5}):
        theirs.chat_template = odd
        with pytest.raises(UserError, match=r"mine: chat_template: found (5|true), expected text in Jinja"):
            base_template(theirs, "mine")


def test_marks_that_do_not_fit_the_answers_are_refused_where_one_is_not_learned(place):
    template = ChatTemplate(opened(place, "chatml")[0], marked(CHATML.replace("[[", "[[]][[")), "mine")
    template.texts("row 1", read_messages("row 1", TALKS[0]))
    with pytest.raises(BadDocument, match="marks 4 parts with generation, expected one for each answer"):
        template.texts("row 1", Conversation(TALKS[0], [False, False, False, True]))


def test_a_template_is_chosen_by_the_flag(place, tmp_path):
    chatml, ours = load_tokenizer(place / "chatml"), load_tokenizer("bytes")
    assert open_template("own", chatml) is None and open_template("auto", ours) is None
    assert open_template("auto", chatml).text == open_template("base", chatml).text == unmarked(CHATML)
    (tmp_path / "mine.jinja").write_text("{{ messages[0]['content'] }}")
    assert open_template(str(tmp_path / "mine.jinja"), ours).text == "{{ messages[0]['content'] }}"
    (tmp_path / "broken.jinja").write_text("\n{% if %}")
    for name, tokenizer, expected in (
        ("base", ours, "bytes comes with no chat template; choose own, or a file"),
        (str(tmp_path / "none"), ours, "No such file or directory; expected own, base or a file in Jinja"),
        (str(tmp_path / "broken.jinja"), ours, "broken.jinja: line 2: "),
    ):
        with pytest.raises(UserError, match=rf"^--chat_template: [^\n]*{expected}"):
            open_template(name, tokenizer)


# -- from shards to answers ----------------------------------------------------------------------


def prepare_talks(place, name, folder, *flags, max_tokens=None, talks=TALKS, chat_template="auto"):
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    template = open_template(chat_template, load_tokenizer(place / name))
    documents = Conversations(Files([str(folder / "talks.jsonl")], "messages", dict), template, max_tokens=max_tokens)
    prepare(documents, folder / "data", *flags, tokenizer=str(place / name), loss_mask=True)
    return folder / "data"


def in_shards(found):
    """The tokens of an Encoded as shards have them: which are learned, and where a conversation starts."""
    tokens = np.where(found.learned, found.ids, found.ids | NO_LOSS)
    tokens[0] |= STARTS
    return tokens.tolist()


def stored_in(data, split):
    stream = TokenStream(data, split, 8)
    tokens = np.empty(stream.tokens, dtype=stream.dtype)
    stream.fill(0, tokens)
    return tokens


@pytest.mark.parametrize("name", ["chatml", "gemma", "mistral"])
def test_shards_sampling_and_the_export_are_in_the_same_template(place, name, tmp_path, capsys):
    """Token by token, mask and all; generation stops at the end of a turn."""
    data = prepare_talks(place, name, tmp_path)
    write_run(tmp_path / "run", ModelConfig(**vars(LLAMA) | {"vocab_size": 1536, "block_size": 64}), str(data))
    export.main([str(tmp_path / "run"), str(tmp_path / "hf")])
    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert exported.chat_template == read_meta(data)["chat_template"]["text"] == unmarked(STYLES[name][0])
    stored = np.concatenate([stored_in(data, split) for split in ("train", "val")]).tolist()
    whole = []
    _, template, encoder = opened(place, name)
    for talk in TALKS:
        found = encoded(template, encoder, talk)
        whole.append(in_shards(found))
    place_in = 0
    while place_in < len(stored):
        talk = next(talk for talk in whole if stored[place_in : place_in + len(talk)] == talk)
        place_in += len(talk)
        whole.remove(talk)
    assert not whole
    _, ours = load(tmp_path / "run", device="cpu")
    assert ours.chat_template == exported.chat_template
    end = exported.convert_tokens_to_ids(STYLES[name][3])
    writer = Writer(open_trained(tmp_path / "run"), chat=True)
    assert end in writer.settings["eos_token_id"]
    assert end in np.atleast_1d(GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id)
    asked = [{"role": "user", "content": "Why?"}]
    expected = exported.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert writer.encode("Why?") == expected
    path = tmp_path / "hf" / "generation_config.json"  # of a run, no id is written that stands for no token
    beyond = list(range(load_tokenizer(tmp_path / "hf").n_vocab, 1536))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"suppress_tokens": beyond}))
    answers = answers_of_both(tmp_path, capsys)
    assert answers[0] == answers[1] and not answers[0].err


@pytest.mark.parametrize("workers", ["1", "2"])
def test_long_conversations_are_cut_after_an_answer_or_left_out(place, tmp_path, capsys, workers):
    _, template, encoder = opened(place, "chatml")
    talks = [
        [{"role": "user", "content": "a" * number}, {"role": "assistant", "content": "yes"}] * 3
        for number in range(1, 300, 7)
    ]
    limit = 160
    data = prepare_talks(place, "chatml", tmp_path, "--workers", workers, max_tokens=limit, talks=talks)
    expected, cut, dropped = {}, 0, 0
    for number, talk in enumerate(talks, 1):
        found = encoded(template, encoder, talk)
        until = len(found.ids)
        if until > limit:
            until = max((end for end in found.ends if end <= limit), default=0)
            cut, dropped = cut + (until > 0), dropped + (until == 0)
        if until:
            expected[number] = in_shards(found)[:until]
    assert cut > 2 and dropped > 2 and len(expected) > cut
    stored = np.concatenate([stored_in(data, split) for split in ("train", "val")]).tolist()
    assert sorted(stored) == sorted(token for talk in expected.values() for token in talk)
    meta = read_meta(data)
    assert meta["too_long"] == dropped and sum(split["cut"] for split in meta["splits"].values()) == cut
    assert sum(split["documents"] for split in meta["splits"].values()) == len(expected)
    said = capsys.readouterr().out
    assert f"cut {cut} conversations after the last whole answer within --max_tokens" in said
    assert f"skipped {dropped} documents with no whole answer within --max_tokens" in said
    with pytest.raises(UserError, match="already holds data made with another max_tokens"):
        prepare_talks(place, "chatml", tmp_path, talks=talks)


# -- the conversation of sample.py ---------------------------------------------------------------


def test_a_conversation_goes_on_until_another_begins(place, tmp_path, monkeypatch, capsys):
    data = prepare_talks(place, "chatml", tmp_path)
    model = ModelConfig(**vars(LLAMA) | {"vocab_size": 1536, "block_size": 128})
    write_run(tmp_path / "run", model, str(data))
    seen = []
    encode = Writer.encode_message

    def recorded(writer, prompt, *more):
        tokens = encode(writer, prompt, *more)
        seen.append((list(writer.history), writer.tokenizer.decode(tokens)))
        return tokens

    monkeypatch.setattr(Writer, "encode_message", recorded)
    (tmp_path / "prompts").write_text("one?\ntwo?\n/new\nthree?\n")
    flags = [str(tmp_path / "run"), "--chat", "--tokens", "5", "--temperature", "0"]
    capsys.readouterr()
    sample.main([*flags, "--file", str(tmp_path / "prompts")])
    answers = capsys.readouterr().out
    (first, _), (second, text), (third, _) = seen
    assert first == third == [] and second[0]["content"] == "one?"
    assert answers.startswith(second[1]["content"]) and second[1]["content"]
    assert text.index("one?") < text.index(second[1]["content"]) < text.index("two?")
    seen.clear()
    (tmp_path / "prompts").write_text("".join(f"{number} and more words?\n" for number in range(12)))
    sample.main([*flags, "--file", str(tmp_path / "prompts")])
    lengths = [len(history) for history, _ in seen]
    assert lengths[:3] == [0, 2, 4] and max(lengths) == lengths[-1] < 22, "the oldest were forgotten"
    assert seen[-1][0][-2]["content"] == "10 and more words?"

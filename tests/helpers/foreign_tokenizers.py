"""Small tokenizers as others make them, in transformers' format, learned from the same text: with the patterns of
GPT-2, Llama 3 and Qwen, and as Llama 2's (BPE with byte fallback) and T5's (Unigram)."""

import json
import random
import sysconfig
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
IDS = 1500


def texts():
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:25]
    found = [path.read_text(encoding="utf-8", errors="ignore") for path in paths]
    return [*found, "naïve café 東京都 привет мир 😀👩‍👩‍👧 שלום नमस्ते don't WE'LL 12345 ½\r\n\t" * 50]


def byte_level(pattern, special, normalizer=None, bos=None, added=(), ignore_merges=False):
    """A byte-level BPE. pattern: None for GPT-2's. special, added: names of tokens, special ones and others."""
    found = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer:
        found.normalizer = normalizer
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [pre_tokenizers.Split(Regex(pattern), behavior="isolated")] if pattern else []
    found.pre_tokenizer = pre_tokenizers.Sequence([*split, whole]) if split else whole
    found.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=IDS, initial_alphabet=alphabet, show_progress=False)
    found.train_from_iterator(texts(), trainer)
    found.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    found.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    if bos:
        found.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, found.token_to_id(bos))]),
            ]
        )
    return found


def byte_fallback():
    """As Llama 2's: spaces are U+2581, a character without a token is its bytes, BOS before each text."""
    spaces = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    found = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    found.normalizer = normalizers.Sequence(spaces)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    lines = [line for text in texts() for line in text.splitlines()]
    found.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=IDS, special_tokens=special, show_progress=False))
    content = json.loads(found.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # the bytes are ordinary tokens
    found = Tokenizer.from_str(json.dumps(content))
    words = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    found.decoder = decoders.Sequence(words)
    found.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return found


def unigram():
    """As T5's: compatibility characters are replaced, and "</s>" is put after each text."""
    found = Tokenizer(models.Unigram())
    found.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    found.decoder = decoders.Metaspace()
    lines = [line for text in texts()[:8] for line in text.splitlines()]
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=IDS, special_tokens=special, unk_token="<unk>", show_progress=False, n_sub_iterations=1
    )
    found.train_from_iterator(lines, trainer)
    found.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return found


def save(tokenizer, folder, **config):
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | config))


END = "<|endoftext|>"
# {name: (how it is made, settings of tokenizer_config.json, tokens before a document, tokens after it)}
KINDS = {
    "gpt2": (lambda: byte_level(None, [END]), {"eos_token": END, "bos_token": END}, [], [END]),
    "llama3": (
        lambda: byte_level(
            LLAMA3, ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], bos="<|begin_of_text|>", ignore_merges=True
        ),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},  # as the model for conversations has it
        ["<|begin_of_text|>"],
        ["<|end_of_text|>"],
    ),
    "qwen": (
        lambda: byte_level(QWEN, [END, "<|im_start|>", "<|im_end|>"], normalizers.NFC(), added=["<tool_call>"]),
        {"eos_token": "<|im_end|>", "pad_token": END},
        [],
        [END],
    ),
    "llama2": (byte_fallback, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, ["<s>"], ["</s>"]),
    "unigram": (unigram, {"eos_token": "</s>", "unk_token": "<unk>"}, [], ["</s>"]),
}


def write_all(folder):
    """A folder of each kind in `folder`."""
    for name, (make, config, _, _) in KINDS.items():
        save(make(), folder / name, **config)


def odd_strings(count, seed):
    """Random strings of all sorts of characters and of names of special tokens."""
    choose = random.Random(seed)
    words = ["<|endoftext|>", "<tool_call>", "</s>", "<s>", "<|im_end|>", "don't", "WE'LL", " the", "\r\n", "1234567"]
    words += ["e\u0301", "\u212b", "\ufb01", "\u1aeb", "\uac01", "\u1100\u1161", "\U0001f469\u200d\U0001f467", "   "]

    def character():
        low, high = choose.choice([(32, 127), (32, 127), (9, 14), (0xA0, 0x3000), (0x4E00, 0x9FFF), (0xE000, 0x110000)])
        return chr(choose.randrange(low, high))

    for _ in range(count):
        pieces = [choose.choice(words) if choose.random() < 0.2 else character() for _ in range(choose.randrange(50))]
        yield "".join(pieces)

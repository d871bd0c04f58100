"""llama.cpp's library, as the wheel xllamacpp holds it: the ids that it gives texts, the losses that it gives windows.

A process of its own, as the library ends one that it cannot go on with:

    llama_cpp.py MODEL.gguf < {"texts": [str], "windows": [[id]]} > {"ids": [[id]], "losses": [nats]}
"""

import ctypes
import json
import sys

import numpy as np
import torch
import xllamacpp.xllamacpp

library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)


class ModelParams(ctypes.Structure):
    _fields_ = [("everything", ctypes.c_char * 1024)]  # more than there is: only the defaults are needed


class ContextParams(ctypes.Structure):
    """include/llama.h, as far as the last field that is set here."""

    _fields_ = [
        *[(name, ctypes.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max")],
        *[(name, ctypes.c_uint32) for name in ("n_rs_seq", "n_outputs_max", "n_outputs_max_per_seq")],
        *[(name, ctypes.c_int32) for name in ("n_threads", "n_threads_batch")],
        *[(name, ctypes.c_int32) for name in ("ctx_type", "rope_scaling_type", "pooling_type", "attention_type")],
        ("flash_attn_type", ctypes.c_int32),
        *[(name, ctypes.c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor")],
        *[(name, ctypes.c_float) for name in ("yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow")],
        ("yarn_orig_ctx", ctypes.c_uint32),
        ("defrag_thold", ctypes.c_float),
        *[(name, ctypes.c_void_p) for name in ("cb_eval", "cb_eval_user_data")],
        *[(name, ctypes.c_int32) for name in ("type_k", "type_v")],
        ("rest", ctypes.c_char * 512),
    ]


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


POINTER, NUMBER, TRUTH = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool
IDS = ctypes.POINTER(ctypes.c_int32)
for name, result, arguments in (
    ("llama_model_default_params", ModelParams, []),
    ("llama_context_default_params", ContextParams, []),
    ("llama_model_load_from_file", POINTER, [ctypes.c_char_p, ModelParams]),
    ("llama_init_from_model", POINTER, [POINTER, ContextParams]),
    ("llama_model_get_vocab", POINTER, [POINTER]),
    ("llama_vocab_n_tokens", NUMBER, [POINTER]),
    ("llama_tokenize", NUMBER, [POINTER, ctypes.c_char_p, NUMBER, IDS, NUMBER, TRUTH, TRUTH]),
    ("llama_get_memory", POINTER, [POINTER]),
    ("llama_memory_clear", None, [POINTER, TRUTH]),
    ("llama_batch_init", Batch, [NUMBER, NUMBER, NUMBER]),
    ("llama_decode", NUMBER, [POINTER, Batch]),
    ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [POINTER, NUMBER]),
):
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments


def tokenize(vocabulary, text):
    """With whatever llama.cpp adds of itself at the ends; special tokens in the text are text."""
    text = text.encode()
    ids = (ctypes.c_int32 * (len(text) + 8))()
    count = library.llama_tokenize(vocabulary, text, len(text), ids, len(ids), True, False)
    assert count >= 0
    return list(ids[:count])


def loss(context, vocab_size, window):
    """The summed cross-entropy in nats of the window's ids but the first, in float64 from float32 logits."""
    size = len(window) - 1
    library.llama_memory_clear(library.llama_get_memory(context), True)
    batch = library.llama_batch_init(size, 0, 1)
    batch.n_tokens = size
    for place in range(size):
        batch.token[place] = window[place]
        batch.pos[place] = place
        batch.n_seq_id[place] = 1
        batch.seq_id[place][0] = 0
        batch.logits[place] = 1
    assert library.llama_decode(context, batch) == 0, "llama.cpp could not decode"
    rows = [library.llama_get_logits_ith(context, place) for place in range(size)]
    logits = torch.from_numpy(np.stack([np.ctypeslib.as_array(row, (vocab_size,)) for row in rows]).astype(np.float64))
    return torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:]), reduction="sum").item()


def main(path):
    asked = json.load(sys.stdin)
    library.llama_backend_init()
    model = library.llama_model_load_from_file(path.encode(), library.llama_model_default_params())
    assert model, f"llama.cpp cannot load {path}"
    vocabulary = library.llama_model_get_vocab(model)
    answer = {"ids": [tokenize(vocabulary, text) for text in asked["texts"]], "losses": []}
    if asked["windows"]:
        longest = max(map(len, asked["windows"]))
        params = library.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = longest
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type, params.type_k, params.type_v = 0, 0, 0  # off, F32, F32
        context = library.llama_init_from_model(model, params)
        vocab_size = library.llama_vocab_n_tokens(vocabulary)
        answer["losses"] = [loss(context, vocab_size, window) for window in asked["windows"]]
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1])

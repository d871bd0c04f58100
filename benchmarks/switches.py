"""Choices that are no key of a configuration: each function of SWITCHES changes this process's train.py, engine or
model, before it trains."""

import gc
import types

import torch
from torch._inductor import config as inductor_config

import model
import train
from minzero import engine, loss, run, sizes


def deepspeed_adam():
    """DeepSpeed's own Adam in place of torch's."""
    complete = train.deepspeed_config

    def changed(*arguments, **more):
        ds_config = complete(*arguments, **more)
        for key in ("torch_adam", "fused"):
            ds_config["optimizer"]["params"].pop(key, None)
        return ds_config

    train.deepspeed_config = changed


def torch_attention():
    """torch's own order of attention's backends in place of ours."""
    model.attention_backends = lambda device: None


def whole_loss():
    """The loss from all logits at once, compiled, as nanoGPT's."""

    @torch.compile
    def summed(logits, targets):
        return torch.nn.functional.cross_entropy(
            logits.float(), targets, ignore_index=sizes.IGNORE_INDEX, reduction="sum"
        )

    def forward(head, x, targets=None):
        logits = torch.nn.Linear.forward(head, x)
        return logits if targets is None else summed(logits.flatten(0, 1), targets.flatten())

    model.Head.forward = forward


def large_chunks():
    """The loss in chunks of 16,384 tokens."""
    model.loss_chunk_tokens = lambda vocab_size, on_gpu: 2**14


def small_chunks():
    """The loss in chunks of 1,024 tokens."""
    model.loss_chunk_tokens = lambda vocab_size, on_gpu: 2**10


def unpadded():
    """Logits of the vocabulary as it is, not of the next multiple of 64."""
    loss.padded_vocab_size = lambda vocab_size, on_gpu: vocab_size


def whole_model():
    """One graph for everything, the chunks of the loss one after the other; for stages 0 to 2.

    Only the model that is trained: the check before a run (minzero/compiled.py) compiles a small one as always."""
    build_engine = train.build_engine

    def compile_all(gpt):
        gpt.forward = torch.compile(gpt.forward)

    def build_compiled(*arguments, **more):
        compile_blocks = model.GPT.compile
        model.GPT.compile = compile_all
        try:
            return build_engine(*arguments, **more)
        finally:
            model.GPT.compile = compile_blocks

    train.build_engine = build_compiled


def collection_at_any_time():
    """Python collects its garbage whenever it wants to, also in the middle of a step."""
    run.gc = types.SimpleNamespace(collect=gc.collect, disable=lambda: None, enable=lambda: None)


def blocks_in_parts():
    """Under ZeRO-3 the weights of an eager block are gathered matrix by matrix."""
    engine.deepspeed.utils.set_z3_leaf_modules = lambda *_, **__: None


def tuned():
    """inductor's coordinate descent tuning."""
    inductor_config.coordinate_descent_tuning = True


SWITCHES = {
    function.__name__: function
    for function in (
        deepspeed_adam,
        torch_attention,
        whole_loss,
        large_chunks,
        small_chunks,
        unpadded,
        whole_model,
        collection_at_any_time,
        blocks_in_parts,
        tuned,
    )
}


def train_with_switch(arguments):
    """train.py with one of SWITCHES. arguments: train.py's, with --switch NAME somewhere among them (a launcher may put
    one of its own first)."""
    place = arguments.index("--switch")
    SWITCHES[arguments[place + 1]]()
    train.command(arguments[:place] + arguments[place + 2 :])

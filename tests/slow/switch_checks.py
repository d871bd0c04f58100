"""Started by test_gpu_benchmark.py: each switch of benchmarks/switches.py changes what it says it changes.

A switch changes modules of its process, so each check runs in a fork of a process that has loaded torch."""

import gc
import os
import sys
import types

import deepspeed
import torch
from torch._inductor import config as inductor_config

import model
import train
from benchmarks.gpu_parts import VOCABULARY, Bench
from benchmarks.switches import SWITCHES
from minzero import loss
from minzero.config.sections import ModelConfig
from minzero.run import Run


def whole_loss():
    gpt = model.GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=9))
    targets = torch.arange(8)[None]
    targets[0, 3] = loss.IGNORE_INDEX
    tokens = targets.clamp(min=0)
    before = gpt(tokens, targets)
    SWITCHES["whole_loss"]()
    after = gpt(tokens, targets)
    assert model.Head.forward.__name__ == "forward"
    assert "whole_loss" in model.Head.forward.__qualname__
    assert torch.allclose(before, after) and before != 0


def torch_attention():
    model.torch.cuda.get_device_capability = lambda device: (9, 0)
    device = torch.device("cuda")
    assert model.attention_backends(device)
    SWITCHES["torch_attention"]()
    assert model.attention_backends(device) is None


def deepspeed_adam():
    SWITCHES["deepspeed_adam"]()
    config = Bench(1, 1, 1).config("gpt2-124m", 1)
    params = train.deepspeed_config(config, 1, "bf16", on_gpu=True)["optimizer"]["params"]
    assert params["lr"] == config.train.lr and not {"torch_adam", "fused"} & params.keys()


def large_chunks():
    assert model.loss_chunk_tokens(VOCABULARY, True) == 4096
    SWITCHES["large_chunks"]()
    assert model.loss_chunk_tokens(VOCABULARY, True) == 16384


def small_chunks():
    SWITCHES["small_chunks"]()
    assert model.loss_chunk_tokens(VOCABULARY, True) == 1024


def unpadded():
    assert loss.padded_vocab_size(50257, True) == VOCABULARY
    SWITCHES["unpadded"]()
    assert loss.padded_vocab_size(50257, True) == 50257


def whole_model():
    """The model that is trained is one graph; the one that is checked before a run is compiled block by block."""
    shape = ModelConfig(n_layer=1, n_head=1, n_embd=8)
    trained, checked = model.GPT(shape), model.GPT(shape)
    train.build_engine = lambda *arguments: trained.compile()
    SWITCHES["whole_model"]()
    train.build_engine()
    assert "forward" in vars(trained)
    assert "forward" not in vars(trained.blocks[0]) and "cross_entropy" not in vars(trained.head)
    checked.compile()
    assert "forward" not in vars(checked) and "forward" in vars(checked.blocks[0])


def tuned():
    assert not inductor_config.coordinate_descent_tuning
    SWITCHES["tuned"]()
    assert inductor_config.coordinate_descent_tuning


def blocks_in_parts():
    made = model.GPT(ModelConfig(n_layer=2, n_head=1, n_embd=8, block_size=8, vocab_size=9))
    SWITCHES["blocks_in_parts"]()
    deepspeed.utils.set_z3_leaf_modules(made, [model.Block])  # as build_engine does
    assert not [block for block in made.blocks if getattr(block, "_z3_leaf", False)]


def collection_at_any_time():
    SWITCHES["collection_at_any_time"]()
    passive = types.SimpleNamespace(begin_loop=lambda: None, start_step=lambda *_: None, mark=lambda *_: None)
    of_run = dict.fromkeys(("watchdog", "clock", "profiler", "time_use", "own_time"), passive)
    of_run |= {"steps_done": 0, "total_steps": 2}
    steps = Run.steps(types.SimpleNamespace(**of_run))
    assert [gc.isenabled() for _ in steps] == [True, True]


CHECKS = {
    check.__name__: check
    for check in (
        whole_loss,
        torch_attention,
        deepspeed_adam,
        large_chunks,
        small_chunks,
        unpadded,
        whole_model,
        tuned,
        blocks_in_parts,
        collection_at_any_time,
    )
}


def main(names):
    failed = []
    for name in names:
        child = os.fork()
        if not child:
            try:
                CHECKS[name]()
                os._exit(0)
            except BaseException as error:
                print(name, repr(error), flush=True)
                os._exit(1)
        if os.waitpid(child, 0)[1]:
            failed.append(name)
    assert not failed, failed


if __name__ == "__main__":
    main(sys.argv[1:])

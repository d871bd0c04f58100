"""A frozen base in 4 bits: as bitsandbytes, transformers and PEFT have it."""

import dataclasses
import json

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import eval
import export
from minzero import adapters, four_bit, load
from minzero.checkpoint_state import is_lora
from minzero.config.build import build
from minzero.engine import count_real_parameters, least_memory
from minzero.errors import UserError
from minzero.planner.memory import simulate
from minzero.planner.settings import settings_of
from minzero.sizes import count_parameters
from minzero.trained import open_weights
from model import GPT
from tests.helpers.trained_runs import GPT2, LLAMA, make_folder, write_data, write_run
from tests.unit.test_lora import SOME, adapted, with_random_adapters, write_lora_run

QUANTIZED = dataclasses.replace(SOME, base_bits=4)
SHAPES = {  # of at least a block's width, or bitsandbytes' own layer fails on some CPUs
    name: dataclasses.replace(config, n_embd=64) for name, config in {"gpt2": GPT2, "llama": LLAMA}.items()
}


pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.usefixtures("one_rank")


def quantized(config, read, precision="fp32", seed=7):
    """A GPT of the weights that read(name) gives, in 4 bits, with random adapters of which B is not zero."""
    model = GPT(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(read(name))
    four_bit.quantize_blocks(model, precision, torch.device("cpu"))
    return adapted_again(model, seed).to(four_bit.DTYPES[precision])


def adapted_again(model, seed):
    return with_random_adapters(model, QUANTIZED, seed)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_it_computes_as_transformers_and_peft_with_bitsandbytes(name, precision, tmp_path):
    """Logits and 20 steps of AdamW, beside the installed libraries' 4-bit model and adapters."""
    from transformers import BitsAndBytesConfig

    config, dtype = SHAPES[name], four_bit.DTYPES[precision]
    make_folder(tmp_path / "hf", config)
    read = open_weights(str(tmp_path / "hf"), config)[1]()
    ours = quantized(config, read, precision)
    data = write_data(tmp_path / "data")
    run = write_lora_run(tmp_path / "run", ours, tmp_path / "hf", data, base_bits=4)
    export.main([str(run), str(tmp_path / "adapter")])

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", quantization_config=settings, dtype=dtype)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True, autocast_adapter_dtype=False)
    theirs.train()  # else bitsandbytes' layer has another form for CPUs
    tokens = torch.randint(config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(3))
    expected = theirs(tokens).logits.float()
    unquantised = adapted_again(plain(config, read), 7)(tokens)
    off, off_without = ((found.float() - expected).norm() / expected.norm() for found in (ours(tokens), unquantised))
    assert off_without > 0.05, "a comparison that 4 bits do not change shows nothing"
    assert off < (1e-5 if precision == "fp32" else 0.2 * off_without)

    trained = [[parameter for parameter in model.parameters() if parameter.requires_grad] for model in (ours, theirs)]
    assert sum(map(torch.numel, trained[0])) == sum(map(torch.numel, trained[1]))
    optimizers = [torch.optim.AdamW(found, lr=1e-3) for found in trained]
    for step in range(20):
        tokens = torch.randint(config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(step))
        targets = tokens.roll(-1, dims=1)
        logits = theirs(tokens).logits.float()
        losses = [ours(tokens, targets), F.cross_entropy(logits.flatten(0, 1), targets.flatten())]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5 if precision == "fp32" else 0.02), step
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def plain(config, read):
    """The GPT with the weights as they are."""
    model = GPT(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(read(name))
    return model


def test_a_run_is_read_with_the_base_as_it_was_trained_with(tmp_path):
    """eval.py, load and export.py --merge: the quantised base, made float32 again, and the adapters added."""
    data = write_data(tmp_path / "data")
    base = write_run(tmp_path / "base", LLAMA, data)
    weights = dict(base.named_parameters())
    ours = quantized(LLAMA, weights.__getitem__)
    run = write_lora_run(tmp_path / "run", ours, tmp_path / "base", data, base_bits=4)
    path = next((run / "checkpoints").glob("step_*")) / "state.json"
    assert '"base_bits": 4' in path.read_text()
    tokens = torch.randint(270, (2, 16))
    expected = ours(tokens)
    size = expected.abs().max().item()
    eval.main([str(run)])
    export.main([str(run), str(tmp_path / "merged"), "--merge"])
    assert torch.allclose(load(run)[0](tokens), expected, atol=1e-5 * size)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(merged(tokens).logits, expected, atol=1e-5 * size)
    without = adapted(LLAMA, base)(tokens)
    assert (without - expected).abs().max() > 0.01 * size


def test_sizes():
    for config in SHAPES.values():
        model = adapted(config)
        parameters = count_real_parameters(model)
        read = dict(GPT(config).named_parameters())
        packed = quantized(config, read.__getitem__)
        assert count_real_parameters(packed) == parameters == count_parameters(config)[0]
        assert four_bit.count_quantized(packed) == adapters.count_of(config)
        held = 0
        for module in packed.modules():
            if isinstance(module, four_bit.FourBitLinear):
                for numbers, scales in module.packed:
                    tensors = numbers, scales.absmax, scales.state2.absmax
                    held += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert held == pytest.approx(adapters.BYTES * adapters.count_of(config), rel=0.01)


def test_memory_that_is_counted():
    sections = {"train": {"init_from": "x", "precision": "bf16"}, "model": {"n_embd": 1024, "n_head": 8}}
    found = []
    for bits in (None, 4):
        config = build(sections | {"lora": {"rank": 4, "base_bits": bits}}, "test.json", together=False)
        ds_config = {"bf16": {"enabled": True}, "fp16": {"enabled": False}, "zero_optimization": {"stage": 0}}
        least = next(iter(least_memory(config, ds_config, True, 1).values()))
        memory, _ = simulate(settings_of(config, 1, 2**36))
        found.append((least, memory.held["parameters"]))
    saved = (2 - adapters.BYTES) * adapters.count_of(config.model)
    for before, after in zip(*found, strict=True):
        assert before - after == pytest.approx(saved, rel=1e-6)


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"lora": {"base_bits": 4}}, "lora.base_bits: found 4, but lora.rank is null"),
        ({"lora": {"rank": 4, "base_bits": 8}}, "lora.base_bits: found 8, expected one of 4"),
        (
            {"lora": {"rank": 4, "base_bits": 4, "matrices": ["qkv"]}, "model": {"n_expert": 4}},
            "lora.base_bits: found 4 with model.n_expert 4",
        ),
    ],
)
def test_settings_that_are_refused(sections, message):
    with pytest.raises(UserError, match=message):
        build({"train": {"init_from": "x"}} | sections, "test.json")


def test_without_the_package_it_says_so(monkeypatch):
    monkeypatch.setattr(four_bit.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lora.base_bits: found 4, which needs the package bitsandbytes.*pip install"):
        four_bit.require()
    monkeypatch.undo()
    import bitsandbytes

    monkeypatch.delattr(bitsandbytes.functional, "quantize_4bit")
    with pytest.raises(UserError, match=r"found 4, but bitsandbytes fails \(version [0-9.]+ has no quantize_4bit\)"):
        four_bit.require()


def test_a_checkpoint_with_other_bits_is_damaged():
    section = json.loads(json.dumps(dataclasses.asdict(QUANTIZED)))
    assert is_lora(section) and not is_lora(section | {"base_bits": 3})

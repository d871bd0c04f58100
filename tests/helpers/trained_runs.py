"""Runs of random models, written as a run of two ranks leaves them but without training: for the tests of commands
that read a trained model."""

import json
import random

import torch

import export
import sample
from minzero import checkpoint, checkpoint_folder
from minzero.config.sections import Config, DataConfig, ModelConfig
from minzero.data import pipeline
from minzero.data.mixture import Mixture
from minzero.files import write_json
from minzero.hf import families
from minzero.tensor_files import write_tensors
from model import GPT

GPT2 = ModelConfig(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=270, init_std=0.1)
NEOX = ModelConfig(**vars(GPT2) | {"position": "rotary", "tie_embeddings": False})
LLAMA = ModelConfig(
    **vars(GPT2) | {"norm": "rmsnorm", "position": "rotary", "mlp": "swiglu", "bias": False, "n_kv_head": 2}
)
OLMO2 = ModelConfig(**vars(LLAMA) | {"qk_norm": "all", "norm_position": "after"})
FAMILIES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "gpt_neox": NEOX,
    "mistral": ModelConfig(**vars(LLAMA) | {"sliding_window": 5}),
    "qwen2": ModelConfig(**vars(LLAMA) | {"qkv_bias": True}),
    "qwen3": ModelConfig(**vars(LLAMA) | {"qk_norm": "head", "head_dim": 16}),
    "olmo2": OLMO2,
    "smollm3": ModelConfig(**vars(LLAMA) | {"no_rotary_layers": 2}),
    "mixtral": ModelConfig(**vars(LLAMA) | {"n_expert": 4, "mlp_hidden": 40}),
    "qwen3_moe": ModelConfig(
        **vars(LLAMA) | {"n_expert": 5, "mlp_hidden": 40, "qk_norm": "head", "head_dim": 16, "n_expert_per_token": 3}
    ),
    "olmoe": ModelConfig(
        **vars(LLAMA) | {"n_expert": 6, "mlp_hidden": 24, "qk_norm": "all", "normalize_experts": False}
    ),
}
PYTHIA = ModelConfig(**vars(NEOX) | {"mlp": "gelu_exact", "parallel_residual": True, "rotary_fraction": 0.25})
OF_NO_FAMILY = ModelConfig(**vars(LLAMA) | {"position": "learned", "mlp": "gelu"})


def write_data(folder, tokenizer="bytes"):
    """Random text of a few letters in the form of a data set. Returns the folder as a string."""
    generator = random.Random(3)
    texts = ["".join(generator.choices("abc xyz\n", k=300)) for _ in range(60)]
    flags = ["--out", str(folder), "--workers", "1", "--val_fraction", "0.2"]
    documents = ((str(number), text) for number, text in enumerate(texts))
    pipeline.prepare(documents, str(tokenizer), pipeline.options("", ".").parse_args(flags))
    return str(folder)


@torch.no_grad()
def random_model(config, seed=1):
    """A GPT whose norms and biases are not all ones and zeros, and whose predictions are far from uniform."""
    model = GPT(ModelConfig(**vars(config) | {"init_std": 0.2}), seed).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def one_number_changed(model, by):
    """Yields the name of one weight of model.py's first block after the other, attention's and of a mixture also the
    router's and an expert's, while one number of it is changed: a comparison that does not notice it shows nothing."""
    names = ["attention.qkv"]
    if model.config.n_expert is not None:
        names += ["mlp.router", "mlp.up", "mlp.down"]
    for name in names:
        weight = model.blocks[0].get_submodule(name).weight.data
        row = weight[-1] if weight.dim() == 2 else weight[-1, -1]
        kept = row[0].item()
        row[0] += by
        yield name
        row[0] = kept


def write_file(path, tensors):
    """A checkpoint's file of flat tensors, {name: tensor}. Returns its entry in state.json."""
    sizes = {name: (tensor.dtype, len(tensor)) for name, tensor in tensors.items()}
    return write_tensors(path, sizes, tensors.values())


def write_run(run, config, data, step=5, read=None, document_mask="auto"):
    """Write a run's folder with one checkpoint, each parameter cut in two: of `random_model`, or of the weights that
    read(name) gives. Returns the model."""
    model = random_model(config)
    if read:
        for name, parameter in model.named_parameters():
            parameter.data.copy_(read(name)[: len(parameter)])
    parameters = dict(model.named_parameters())
    folder, name = run / "checkpoints", checkpoint_folder.name_of(step)
    (folder / f"{name}.tmp").mkdir(parents=True)
    files = {}
    for rank in (0, 1):
        tensors = {}
        for key, parameter in parameters.items():
            cut, flat = parameter.numel() // 3, parameter.detach().flatten()
            tensors[f"fp32/{key}/{rank * cut}"] = (flat[cut:] if rank else flat[:cut]).contiguous()
        file = f"rank_{rank:05d}.safetensors"
        files[file] = write_file(folder / f"{name}.tmp" / file, tensors)
    everything = {"model": config, "data": DataConfig(data, document_mask=document_mask)}
    state = {"step": step, "tokens": step * 1024, "optimizer_steps": step, "files": files, "loss_scaler": {}}
    state |= {"config": Config(**everything).to_dict(), "world_size": 2, "stage": 3, "precision": "fp32"}
    state |= {"parameters": {key: list(parameter.shape) for key, parameter in parameters.items()}}
    state |= {"tied": {"head.weight": "token_embedding.weight"} if config.tie_embeddings else {}}
    mixture = Mixture(data, "train", config.block_size, config.vocab_size, 1, document_mask=document_mask)
    state |= {"data": mixture.fingerprint()}
    state |= {"versions": {"torch": torch.__version__, "git": "abc1234", "device": "cpu"}, "best_val_loss": 5.0}
    checkpoint.commit(folder, name, state, best=True)
    line = {"step": step, "tokens": step * 1024}
    write_lines = [line | {"loss": 5.5}, line | {"val_loss": 5.0}]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in write_lines))
    write_json(run / "config.json", state["config"])
    return model


def write_runs(folder, configs):
    """data/, a run <name>/ of each of these {name: config}, and hf_<name>/ of those that transformers has as well."""
    data = write_data(folder / "data")
    for name, config in configs.items():
        write_run(folder / name, config, data)
        if name in FAMILIES:
            export.main([str(folder / name), str(folder / f"hf_{name}")])
    return folder


def answers_of_both(folder, capsys):
    """What the run and its export in `folder`, run and hf, print when they are asked the same question in a chat."""
    capsys.readouterr()
    answers = []
    for source in (folder / "run", folder / "hf"):
        sample.main([str(source), "--chat", "--prompt", "Why?", "--tokens", "6", "--temperature", "0"])
        answers.append(capsys.readouterr())
    return answers


# -- models of transformers ----------------------------------------------------------------------


@torch.no_grad()
def randomised(model, seed=0):
    """The model with norms and biases that are not all ones and zeros, which would hide a confusion of them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def zero_biases(config):
    """Whether transformers' model has biases that ours does not have."""
    return not config.bias and families.FAMILIES[families.family_of(config)].always_biased


def their_model(config):
    """transformers' model of the same settings, with random weights."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(families.transformers_config(config)).eval()


def make_folder(folder, config, shards="5GB"):
    """A random model of transformers' as it saves it; returns it."""
    torch.manual_seed(1)
    model = randomised(their_model(config))
    if zero_biases(config):
        for name, parameter in model.named_parameters():
            parameter.data.mul_(not name.endswith("bias"))
    model.save_pretrained(folder, max_shard_size=shards)
    return model

"""The README.md of an exported model: its size, its training, its loss, and the code that loads it."""

import dataclasses
import json
import math
from pathlib import Path

from minzero import report
from minzero.config.sections import Config, ModelConfig, switched_on
from minzero.data.meta import read_meta
from minzero.data.order import validation_windows
from minzero.files import ROOT, is_hub_name, read_json
from minzero.metrics import formula_fault, read_metrics
from minzero.sizes import flops_per_token

OF_EXPERTS = {
    *("n_expert", "n_expert_per_token", "n_shared_expert", "normalize_experts"),
    *("balance_loss", "balance_over", "router_z_loss"),
}  # keys that count in a mixture of experts, whatever their values


def run_of(checkpoint):
    """The folder of the run that a checkpoint belongs to, or None if it was moved out of one."""
    folder = Path(checkpoint).resolve().parent
    return folder.parent if folder.name == "checkpoints" else None


def validation_loss(run, step):
    """The validation loss that the run measured at this step, or None if it did not."""
    lines = read_metrics(run) if run else []
    return next((line["val_loss"] for line in reversed(lines) if line["step"] == step and line.get("val_loss")), None)


def draw_loss(run, picture):
    """Draw the run's loss curve from its metrics: its own picture may be damaged. Returns whether there is one."""
    if run and read_metrics(run):
        from minzero import plot  # matplotlib takes a second to import

        plot.plot_loss([run], picture)
    return picture.exists()


def shown(value, form):
    """A number in this form (as Python's format has it), and whatever else a config may hold as JSON."""
    return format(value, form) if type(value) in (int, float) else json.dumps(value)


def evaluated_tokens(config: Config):
    """The tokens of one evaluation in words, as `validation_windows` of the data chooses them. Raises UserError for a
    damaged meta.json."""
    wanted, size = config.train.eval_tokens, config.model.block_size
    metas = [read_meta(folder) for folder in config.data.weights]
    splits = [meta["splits"].get("val") if meta else None for meta in metas]
    if type(wanted) is not int or len(splits) > 1 or not splits[0]:  # a mixture, or shards that were moved away
        return f"at most {shown(wanted, ',')}"
    return f"{len(validation_windows((splits[0]['tokens'] - 1) // size, wanted // size)) * size:,}"


def base_model(source):
    """(the model that train.init_from names in words, its name on the Hugging Face hub or None)."""
    if is_hub_name(source) and not any((folder / source).exists() for folder in (Path(), ROOT)):
        return f"[{source}](https://huggingface.co/{source})", source
    run = run_of(source)
    return (run or Path(source).resolve()).name, None  # without the folders of this machine


def model_settings(model: ModelConfig):
    """Rows of (key, value) of the settings that count: keys that are switched off are left out."""
    keys = {name for name, _, _ in switched_on(model, ())}
    if model.n_expert is not None:
        keys |= OF_EXPERTS
    return [(key, json.dumps(value)) for key, value in dataclasses.asdict(model).items() if key in keys]


def training_facts(state, config: Config, loss):
    """Rows of (name, value) about the run up to the checkpoint. config: of `checkpoint.open_weights`, whose train
    section may hold values that this code does not accept."""
    versions = state.get("versions", {})
    train = config.train
    batch = f"{train.global_batch_tokens:,} tokens, {train.global_batch_tokens / config.model.block_size:,g} sequences"
    rate = f"{train.schedule} from {train.lr:g} to {train.lr * train.min_lr_ratio:g}"
    if train.warmup_tokens:
        rate += f", {train.warmup_tokens:,} tokens of warm-up"
    if train.schedule == "wsd":
        whole = "a fifth of the run" if train.decay_tokens is None else f"{shown(train.decay_tokens, ',')} tokens"
        rate += f", the decay ({train.decay_shape}) over the last {whole}"
    if train.mup_base_width:
        rate += f"; muP from width {shown(train.mup_base_width, ',')}"
    if train.first_batch_tokens:
        jumps = f"in {train.batch_ramp_jumps} jump{'s' * (train.batch_ramp_jumps != 1)}"
        jumps = jumps if train.batch_ramp_jumps else "linearly"
        batch += f"; from {shown(train.first_batch_tokens, ',')} tokens on it grew {jumps} over the first "
        batch += f"{shown(train.batch_ramp_tokens, ',')} tokens of the run"
    decay = shown(train.weight_decay, "g")
    muon = ""
    if train.optimizer == "muon":
        muon = f"Muon for matrices, rate {shown(train.muon_lr, 'g')}, momentum {shown(train.muon_momentum, 'g')}; "
    clipping = shown(train.grad_clip, "g")
    measured = "not measured at this step"
    if loss is not None:
        unit = "nats per token" if train.loss == "next_token" else f"(train.loss {train.loss})"
        measured = f"{loss:.4f} {unit}, over {evaluated_tokens(config)} tokens"
    software = [f"{name} {versions[name]}" for name in ("python", "torch", "deepspeed") if name in versions]
    return [
        ("data", ", ".join(Path(folder).name for folder in sorted(config.data.weights))),
        ("tokens seen", f"{state['tokens']:,} in {state['step']:,} steps"),
        ("validation loss", measured),
        ("batch", batch),
        ("learning rate", rate),
        ("optimizer", f"{muon}AdamW, betas {train.betas}, weight decay {decay}, clipping {clipping}"),
        ("precision", state["precision"]),
        (
            "hardware",
            f"{state['world_size']} x {versions.get('device', 'unknown device')}, ZeRO stage {state['stage']}",
        ),
        ("software", ", ".join(software)),
        ("git commit", versions.get("git") or "unknown"),
    ]


def loading_code(folder, block_size, tokenizer_class):
    """Python that loads the model, and writes a text where the exported `folder` has a tokenizer, which this class of
    transformers loads."""
    lines = [
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH")',
    ]
    if (folder / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        prompt = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("Once").ids
        room = max(1, min(50, block_size - len(prompt)))
        lines[0] += f", {tokenizer_class}"
        lines += [
            f'tokenizer = {tokenizer_class}.from_pretrained("PATH")',
            'inputs = tokenizer("Once", return_tensors="pt")',
            f"print(tokenizer.decode(model.generate(**inputs, max_new_tokens={room}, do_sample=True)[0]))",
        ]
    return "\n".join(lines)


def has_chat_template(folder):
    """Whether the tokenizer in an exported folder has one."""
    path = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").exists() or (path.exists() and "chat_template" in read_json(path))


def write_model_card(folder, source, dtype, is_chat, tokenizer_class="AutoTokenizer"):
    """Write README.md, with the front matter that the Hugging Face hub reads, and loss.png into `folder`. source: of
    `trained.open_checkpoint`. is_chat: whether it was trained on conversations. tokenizer_class: transformers', which
    loads the tokenizer. The tokenizer's files are expected to be in `folder` already, if there are any."""
    from huggingface_hub import ModelCardData

    state, config = source.state, source.config
    run = run_of(source.path)
    parameters = sum(math.prod(shape) for shape in state["parameters"].values())
    cost = ""
    if not formula_fault(config.model, parameters):  # else its FLOPs are not known
        cost = f" ({flops_per_token(config.model):,} FLOPs per training token)"
    start, base = base_model(config.train.init_from) if config.train.init_from else ("scratch", None)
    tags = ["minzero", "deepspeed"]
    front = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags, base_model=base)
    purpose = "It continues text; it was not taught to answer or to refuse."
    if is_chat:
        purpose = "It was trained on conversations: ask it in the form of the tokenizer's chat template."
    elif has_chat_template(folder):
        purpose = "It was trained on plain text; the chat template came with the tokenizer."
    loss = validation_loss(run, state["step"])
    parts = [
        f"---\n{front.to_yaml()}\n---",
        f"# {run.name if run else source.path.name}",
        f"A language model of {parameters:,} parameters{cost}, trained from {start} with minZeRO and exported in "
        f"{dtype} from the checkpoint of step {state['step']:,}. {purpose}",
        "![training and validation loss](loss.png)" if draw_loss(run, folder / "loss.png") else "",
        "## How to load it",
        "With PATH the folder of this file or its name on the hub:",
        f"```python\n{loading_code(folder, config.model.block_size, tokenizer_class)}\n```",
        f"Its context is {config.model.block_size:,} tokens.",
        "## Training",
        report.table(("", ""), training_facts(state, config, loss)),
        "## Model settings",
        report.table(("key", "value"), model_settings(config.model)),
    ]
    (folder / "README.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")

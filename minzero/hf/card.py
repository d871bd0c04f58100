"""The README.md of an exported model: its size, its training, its loss, and the code that loads it."""

import json
import math
from pathlib import Path

from minzero import report
from minzero.config.sections import Config
from minzero.files import read_json
from minzero.metrics import formula_fault, read_metrics
from minzero.sizes import flops_per_token


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


def training_facts(state, config: Config, loss):
    """Rows of (name, value) about the run up to the checkpoint. config: of `checkpoint.open_weights`, whose train
    section may hold values that this code does not accept."""
    versions = state.get("versions", {})
    train = config.train
    batch = f"{train.global_batch_tokens:,} tokens, {train.global_batch_tokens / config.model.block_size:,g} sequences"
    rate = f"{train.schedule} from {train.lr:g} to {train.lr * train.min_lr_ratio:g}"
    if train.warmup_tokens:
        rate += f", {train.warmup_tokens:,} tokens of warm-up"
    decay = shown(train.weight_decay, "g")
    clipping = shown(train.grad_clip, "g")
    eval_tokens = shown(train.eval_tokens, ",")
    loss = "not measured at this step" if loss is None else f"{loss:.4f} nats per token, over {eval_tokens} tokens"
    software = [f"{name} {versions[name]}" for name in ("python", "torch", "deepspeed") if name in versions]
    return [
        ("data", ", ".join(Path(folder).name for folder in sorted(config.data.weights))),
        ("tokens seen", f"{state['tokens']:,} in {state['step']:,} steps"),
        ("validation loss", loss),
        ("batch", batch),
        ("learning rate", rate),
        ("optimizer", f"AdamW, betas {train.betas}, weight decay {decay}, clipping {clipping}"),
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
    start = "other weights" if config.train.init_from else "scratch"
    front = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["minzero", "deepspeed"])
    purpose = "It continues text; it was not taught to answer or to refuse."
    if is_chat:
        purpose = "It was trained on conversations: ask it in the form of the tokenizer's chat template."
    elif has_chat_template(folder):
        purpose = "It was trained on plain text; the chat template came with the tokenizer."
    loss = validation_loss(run, state["step"])
    settings = [(key, json.dumps(value)) for key, value in config.to_dict()["model"].items()]
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
        report.table(("key", "value"), settings),
    ]
    (folder / "README.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")

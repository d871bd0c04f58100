"""The README.md of an exported model: what it is, how it was trained, how good it is, how to load it."""

import json
import math
from pathlib import Path

from minzero.config import Config, read_json
from minzero.metrics import formula_fault, read_metrics
from minzero.sizes import flops_per_token


def table(heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def run_of(found):
    """The folder of the run that a checkpoint belongs to, or None if it was moved out of one."""
    folder = Path(found).resolve().parent
    return folder.parent if folder.name == "checkpoints" else None


def validation_loss(run, step):
    """What the run measured at the step of the checkpoint, or None if it did not."""
    lines = read_metrics(run) if run else []
    return next((line["val_loss"] for line in reversed(lines) if line["step"] == step and line.get("val_loss")), None)


def draw_loss(run, picture):
    """The run's loss curve, drawn from its metrics: its own picture may be damaged. Returns whether there is one."""
    if run and read_metrics(run):
        from minzero import plot  # matplotlib takes a second to import

        plot.plot_loss([run], picture)
    return picture.exists()


def shown(value, form):
    """A number in this form (as Python's format has it), and whatever else a config may hold as JSON."""
    return format(value, form) if type(value) in (int, float) else json.dumps(value)


def training_facts(state, config: Config, loss):
    """Rows of (what, value) about the run up to the checkpoint. config: of `checkpoint.open_weights`, whose train
    section may hold what this code does not take."""
    versions, train = state.get("versions", {}), config.train
    data = ", ".join(Path(folder).name for folder in sorted(config.data.weights))
    batch = f"{train.global_batch_tokens:,} tokens, {train.global_batch_tokens / config.model.block_size:,g} sequences"
    decay, clipping = shown(train.weight_decay, "g"), shown(train.grad_clip, "g")
    rate = f"{train.schedule} from {train.lr:g} to {train.lr * train.min_lr_ratio:g}" + (
        f", {train.warmup_tokens:,} tokens of warm-up" if train.warmup_tokens else ""
    )
    eval_tokens = shown(train.eval_tokens, ",")
    loss = "not measured at this step" if loss is None else f"{loss:.4f} nats per token, over {eval_tokens} tokens"
    hardware = f"{state['world_size']} x {versions.get('device', 'unknown device')}, ZeRO stage {state['stage']}"
    software = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "deepspeed") if name in versions)
    return [
        ("data", data),
        ("tokens seen", f"{state['tokens']:,} in {state['step']:,} steps"),
        ("validation loss", loss),
        ("batch", batch),
        ("learning rate", rate),
        ("optimizer", f"AdamW, betas {train.betas}, weight decay {decay}, clipping {clipping}"),
        ("precision", state["precision"]),
        ("hardware", hardware),
        ("software", software),
        ("git commit", versions.get("git") or "unknown"),
    ]


def write_model_card(folder, found, state, config: Config, dtype):
    """Write README.md, with the front matter that the Hugging Face hub reads, and loss.png into `folder`. The
    tokenizer's files are expected to be there already, if there are any."""
    from huggingface_hub import ModelCardData

    run = run_of(found)
    name = run.name if run else Path(found).name
    parameters = sum(math.prod(shape) for shape in state["parameters"].values())
    fault = formula_fault(config.model, parameters)  # then its FLOPs are not known
    cost = "" if fault else f" ({flops_per_token(config.model):,} FLOPs per training token)"
    loss, start = validation_loss(run, state["step"]), "other weights" if config.train.init_from else "scratch"
    front = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["minzero", "deepspeed"])
    settings = [(key, json.dumps(value)) for key, value in config.to_dict()["model"].items()]
    tokenizer = (folder / "tokenizer.json").exists()
    if tokenizer and "chat_template" in read_json(folder / "tokenizer_config.json"):
        purpose = "It was trained on conversations: ask it in the form of the tokenizer's chat template."
    else:
        purpose = "It continues text; it was not taught to answer or to refuse."
    loading = ['model = AutoModelForCausalLM.from_pretrained("PATH")']
    if tokenizer:
        from tokenizers import Tokenizer

        prompt = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("Once").ids
        room = max(1, min(50, config.model.block_size - len(prompt)))
        loading += [
            'tokenizer = AutoTokenizer.from_pretrained("PATH")',
            'inputs = tokenizer("Once", return_tensors="pt")',
            f"print(tokenizer.decode(model.generate(**inputs, max_new_tokens={room}, do_sample=True)[0]))",
        ]
    parts = [
        f"---\n{front.to_yaml()}\n---",
        f"# {name}",
        f"A language model of {parameters:,} parameters{cost}, trained from {start} with minZeRO and exported in "
        f"{dtype} from the checkpoint of step {state['step']:,}. {purpose}",
        "![training and validation loss](loss.png)" if draw_loss(run, folder / "loss.png") else "",
        "## How to load it",
        "With PATH the folder of this file or its name on the hub:",
        "```python\nfrom transformers import AutoModelForCausalLM"
        + (", AutoTokenizer" if tokenizer else "")
        + "\n\n"
        + "\n".join(loading)
        + "\n```",
        f"Its context is {config.model.block_size:,} tokens.",
        "## Training",
        table(("", ""), training_facts(state, config, loss)),
        "## Model settings",
        table(("key", "value"), settings),
    ]
    (folder / "README.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")

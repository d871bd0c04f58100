"""The lines that sum up a run at its start."""

import json
from pathlib import Path

from minzero import metrics, resume, schedule
from minzero.adapters import count_adapters
from minzero.checkpoint_folder import is_complete
from minzero.config.deepspeed import with_auto_values
from minzero.schedule import Steps, learning_rate, real_jumps
from minzero.sizes import count_parameters, wide_heads

SHAPES_THE_RATE = [f"train.{name}" for name in schedule.SHAPES_THE_RATE]


def start_lines(run, data, not_compiled=None):
    """Sum up a run, as a list of lines. run: a Run that has begun. data: its training Mixture. not_compiled: why the
    model is not compiled, or None if it is."""
    config = run.config
    setup = run.setup
    model = config.model
    train = config.train
    lines = []
    if train.verbose:
        lines += [f"{section}: {json.dumps(content)}" for section, content in config.to_dict().items()]
        chosen = ", ".join(f"{key} {json.dumps(value)}" for key, value in setup.auto.items())
        lines.append(f'"auto" of deepspeed: {chosen or "nothing"}')
    active = f" ({count_parameters(model)[1]:,} active per token)" if model.n_expert else ""
    if adapters := count_adapters(model, config.lora):
        matrices = ", ".join(config.lora.matrices)
        frozen = f"frozen in {config.lora.base_bits} bits" if config.lora.base_bits else "frozen"
        active += f", {frozen}, and {adapters:,} in adapters of rank {config.lora.rank} beside {matrices}"
    lines.append(
        f"{run.parameters:,} parameters{active}, {model.n_layer} layers of width {model.n_embd}, {model.n_head} heads, "
        f"vocabulary {model.vocab_size:,}, context {model.block_size:,} tokens"
    )
    compiled = f"no ({not_compiled})" if not_compiled else "yes"
    lines.append(
        f"{setup.precision}, ZeRO-{setup.stage} on {run.group.world_size} x {setup.versions['device']}; "
        f"kernels: {setup.kernels} ({setup.why_kernels}); compiled: {compiled}"
    )
    lines.append(
        f"{train.global_batch_tokens:,} tokens a step = {run.group.world_size} (ranks) x "
        f"{setup.gradient_accumulation_steps} (micro-batches) x {train.micro_batch_size} (sequences) x "
        f"{model.block_size} (tokens)"
    )
    if train.optimizer == "muon":
        lines.append(
            f"Muon for the matrices of the blocks, peak rate {train.muon_lr:g}; AdamW for the rest, {train.lr:g}"
        )
    if train.mup_base_width:
        lines.append(f"muP: rates and initial weights are those of width {train.mup_base_width}, carried over")
    if train.first_batch_tokens and run.tokens_at(run.steps_done) < train.batch_ramp_tokens:
        grows = f"{real_jumps(train)} times" if train.batch_ramp_jumps else "linearly"
        lines.append(
            f"fewer tokens a step before that: from {train.first_batch_tokens:,} on they grow {grows} over the first "
            f"{train.batch_ramp_tokens:,} tokens of the run"
        )
    tokens = run.tokens_at(run.total_steps)
    done = f", {run.steps_done:,} of them done" if run.steps_done else ""
    lines.append(f"{run.total_steps:,} steps{done}; {tokens:,} tokens: {epochs(tokens, data)}")
    lines += [line for stream in data.streams if (line := stream.summary())]
    lines.append(f"run in {run.folder.path}: all settings and versions in its config.json, numbers in metrics.jsonl")
    lines.append("to stop: Ctrl-C or SIGTERM saves and ends after the step; the same command continues")
    if train.warmup_tokens > train.max_tokens:
        lines.append(
            f"warning: train.warmup_tokens {train.warmup_tokens:,} exceeds train.max_tokens {train.max_tokens:,}: the "
            f"learning rate rises to the end, and never reaches train.lr {train.lr:g}"
        )
    if too_wide := wide_heads(model):
        lines.append(f"warning: {too_wide}")
    if not_counted := metrics.formula_fault(model, run.parameters):
        lines.append(f"FLOP/s and MFU are null: {not_counted}")
    return lines


def epochs(tokens, data):
    """How often each folder of a training Mixture is read in so many tokens of a run, in words."""
    parts = []
    for folder, stream, count in zip(data.folders, data.streams, data.schedule.counts, strict=True):
        number = tokens * count / data.schedule.period / stream.epoch_tokens
        text = f"{number:,.2f}" if number >= 0.1 else f"{number:.2g}"
        parts.append(f"{text} epochs of {folder} ({stream.tokens:,} tokens)")
    return ", ".join(parts)


def adapters_line(lora, base):
    """Where adapters begin, and what they need from now on, or None without any. base: as of Start."""
    if not lora.rank:
        return None
    began = f"adapters from {lora.init_from}" if lora.init_from else "new adapters"
    of_run = f"; keep {base['path']}, which they need: its run deletes it when it continues"
    return began + (of_run if is_complete(Path(base["path"])) else "")


def resume_line(start, group, setup):
    """Where a run continues, and what it ran on before if that was something else. start: its checkpoint."""
    state = start.state
    was = resume.setting(state["world_size"], state["stage"], state["precision"])
    now = resume.setting(group.world_size, setup.stage, setup.precision)
    moved = f"; saved on {was}, now {now}" if was != now else ""
    return f"continuing from {start.path}: step {state['step']}, {state['tokens']:,} tokens{moved}"


def changed_settings(state, config, auto):
    """The settings in which a resumed run differs from its checkpoint, in one line, or None. state: the checkpoint's.
    auto: see Setup. Raises UserError for a schedule that this code does not know."""
    saved, now = dict(state["config"]), config.to_dict()
    saved["deepspeed"] = with_auto_values(saved.get("deepspeed", {}), state.get("deepspeed_auto", {}))
    now["deepspeed"] = with_auto_values(now["deepspeed"], auto)
    changed = resume.changed_settings(saved, now)
    if not changed:
        return None
    text = "; ".join(f"{name} {json.dumps(was)} -> {json.dumps(now)}" for name, (was, now) in changed.items())
    line = f"changed since the checkpoint: {text}"
    if any(name in changed for name in SHAPES_THE_RATE):
        train = config.train
        step = state["step"]
        before = learning_rate(resume.saved_train_config(state), state["tokens"])
        after = learning_rate(train, Steps(train, step, state["tokens"]).tokens_at(step + 1))
        last = learning_rate(train, train.max_tokens)
        line += f"; the learning rate goes from {before:.2e} at step {step} to {after:.2e} at step {step + 1}"
        line += f" and to {last:.2e} at the end"
    return line

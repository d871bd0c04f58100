"""The row of zero.py that is Hugging Face's Trainer with DeepSpeed ZeRO-3."""

import torch
from torch.nn import functional as F

from benchmarks.turns import WARMUP, catching
from minzero.data.order import sample_numbers
from minzero.zero import copy_into, torch_linear


def trainer_config(precision):
    """DeepSpeed's configuration as the Trainer's documentation writes it, its optimizer left to the Trainer."""
    automatic = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    of_run = ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu")
    stage_3 = {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
    }
    return {
        "zero_optimization": stage_3 | dict.fromkeys(automatic, "auto"),
        "bf16": {"enabled": "auto"},
        **dict.fromkeys(of_run, "auto"),
    }


def trainer_arguments(setting, steps):
    from transformers import TrainingArguments

    keys = setting.config.train
    return TrainingArguments(
        output_dir=str(setting.folder / "trainer"),
        deepspeed=trainer_config(setting.precision),
        per_device_train_batch_size=keys.micro_batch_size,
        gradient_accumulation_steps=setting.args.accumulation,
        max_steps=steps,
        learning_rate=keys.lr,
        lr_scheduler_type="constant",
        weight_decay=keys.weight_decay,
        adam_beta1=keys.betas[0],
        adam_beta2=keys.betas[1],
        adam_epsilon=keys.eps,
        max_grad_norm=keys.grad_clip,
        bf16=setting.precision == "bf16",
        activation_checkpointing=setting.args.recompute,
        use_cpu=setting.device.type == "cpu",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


class Sequences(torch.utils.data.Dataset):
    """The sequences in the order in which a Trainer deals them out: one batch to each rank in turn. The targets are
    given as they are, because transformers would shift the inputs, and leave out the last target."""

    def __init__(self, setting, steps):
        self.setting = setting
        self.per_step = setting.args.accumulation * setting.group.world_size
        self.length = steps * self.per_step * setting.args.micro_batch_size

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        setting = self.setting
        batch, place = divmod(index, setting.args.micro_batch_size)
        step, turn = divmod(batch, self.per_step)
        micro_step, rank = divmod(turn, setting.group.world_size)
        size, first_sample = setting.args.micro_batch_size, step * self.per_step * setting.args.micro_batch_size
        sample = sample_numbers(first_sample, micro_step, rank, setting.group.world_size, size)[place : place + 1]
        inputs, targets = (torch.from_numpy(part[0]) for part in setting.data.batch(setting.data.windows_of(sample)))
        return {"input_ids": inputs, "labels": targets, "shift_labels": targets}


def make_trainer(setting, row, steps, turns):
    """A Trainer that measures `row` and lets the other rows take their turns between its own steps."""
    import transformers
    from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback

    from minzero.hf.families import transformers_config
    from minzero.hf.weights import to_transformers

    transformers.utils.logging.set_verbosity_error()
    shape = setting.config.model
    torch_linear()  # a row of ZeRO-3 has replaced it
    arguments = trainer_arguments(setting, steps)  # first: from here on transformers shards what it makes
    their_model = AutoModelForCausalLM.from_config(transformers_config(shape))
    linear = F.linear  # DeepSpeed's, as in any run of the Trainer
    copy_into(their_model, lambda: dict(to_transformers(shape, setting.gpt().state_dict().__getitem__)).__getitem__)

    class Recording(Trainer):
        loss = 0.0  # of the step so far

        def training_step(self, *arguments, **more):
            loss = super().training_step(*arguments, **more)
            self.loss = self.loss + loss
            return loss

    class Turns(TrainerCallback):
        def on_train_begin(self, args, state, control, **more):
            row.end_build()
            self.let_others(control)

        def on_step_end(self, args, state, control, **more):
            row.end_step(trainer.loss)
            self.let_others(control)

        def let_others(self, control):
            trainer.loss = 0.0
            number = next(turns, None)
            F.linear = linear
            if number is None:
                control.should_training_stop = True
            else:
                row.begin_step(number)

    trainer = Recording(their_model, arguments, train_dataset=Sequences(setting, steps), callbacks=[Turns()])
    trainer.remove_callback(PrinterCallback)
    return trainer


def run(setting, row, turns):
    """All of the Trainer's steps, and the other rows' in between."""
    with catching(row):
        row.begin_build()
        make_trainer(setting, row, WARMUP + setting.args.rounds, turns).train()

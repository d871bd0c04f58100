"""Sends a run's metrics where they are wanted: metrics.jsonl always, TensorBoard and Weights & Biases if asked."""

import contextlib
import re
import secrets
import shutil
from pathlib import Path

from minzero.files import write_atomically
from minzero.metrics import MetricsFile, finite_numbers

# Seconds. W&B's client waits this long for its server at the start and at the end of a run, where it would otherwise
# wait for the network for ever. In between it never waits.
WANDB_TIMEOUTS = {"init_timeout": 20, "finish_timeout": 60}


class MetricsLog:
    """Writes metrics.jsonl and sends the same numbers to the loggers of the config.

    A run that resumes continues in the same TensorBoard folder and W&B run. No logger can stop the run: one that fails
    is named once and left out from then on.

    run: its folder; resumed_at: the step of the checkpoint it resumes from, or 0; loggers: keys of LOGGERS;
    config: a dictionary for loggers that show it."""

    def __init__(self, run, resumed_at, loggers=(), config=None):
        self.file = MetricsFile(run, resumed_at)
        self.loggers = {}
        for name in loggers:
            logger = self.attempt(name, LOGGERS[name], Path(run), resumed_at, self.file.kept, config)
            if logger is not None:
                self.loggers[name] = logger

    def attempt(self, name, action, *arguments):
        """Call the action and return its result. If it fails, name the logger, leave it out and return None."""
        try:
            return action(*arguments)
        except Exception as error:
            self.loggers.pop(name, None)
            reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
            with contextlib.suppress(OSError):  # of a lost terminal
                print(f"{name}: {reason}; the run continues without it", flush=True)
            return None

    def write(self, line):
        self.file.write(line)
        for name, logger in list(self.loggers.items()):
            self.attempt(name, logger.send, finite_numbers(line), line["step"])

    def close(self):
        for name, logger in list(self.loggers.items()):
            self.attempt(name, logger.close)


class TensorBoardLogger:
    def __init__(self, run, resumed_at, kept, config):
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard drops what an earlier start of the run wrote from purge_step on
        self.writer = SummaryWriter(run / "tensorboard", purge_step=resumed_at + 1)

    def send(self, numbers, step):
        for key, number in numbers.items():
            self.writer.add_scalar(key, number, step)
        self.writer.flush()  # a run that is killed must not lose steps that its checkpoint covers

    def close(self):
        self.writer.close()


class WandbLogger:
    """A run that resumes sends its whole history again, out of metrics.jsonl.

    Online, W&B's client skips the steps that the server has, so only those lost with a killed run arrive. Offline,
    each start makes a folder, and of several folders with the same id `wandb sync` keeps only the steps of the last
    (wandb/wandb#3841). The last one holds the whole history here, so the earlier ones are removed."""

    def __init__(self, run, resumed_at, kept, config):
        import wandb

        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise ConnectionError("no API key; call `wandb login` first, or set WANDB_MODE=offline")
        last_id = read_wandb_id(run)
        run_id = last_id
        if not (resumed_at and last_id):
            run_id = secrets.token_hex(4)
        write_atomically(run / "wandb_id", run_id.encode())
        superseded = []
        if last_id:
            superseded = list((run / "wandb").glob(f"offline-run-*-{last_id}"))
        self.session = wandb.init(
            project="minzero",
            name=run.name,
            id=run_id,
            resume="allow",
            dir=run,
            config=config,
            settings=wandb.Settings(**WANDB_TIMEOUTS),
        )
        for line in sorted(kept, key=lambda line: line["step"]):
            self.send(finite_numbers(line), line["step"])
        for folder in superseded:
            shutil.rmtree(folder)

    def send(self, numbers, step):
        # W&B takes steps in order only, and the line of a save in the background may come after later ones
        if step >= self.session.step:
            self.session.log(numbers, step=step)

    def close(self):
        self.session.finish()


def read_wandb_id(run):
    """The W&B id that an earlier start of the run left, or None if there is none or it is damaged."""
    path = run / "wandb_id"
    try:
        if not path.is_file():  # a pipe may never end
            return None
        text = path.read_text()
    except (OSError, ValueError):
        return None
    return text if re.fullmatch("[0-9a-f]{8}", text) else None


LOGGERS = {"tensorboard": TensorBoardLogger, "wandb": WandbLogger}

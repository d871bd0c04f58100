"""A profile of some steps of a run with torch's profiler."""

from pathlib import Path

import torch

NAME_WIDTH = 60  # characters of an operator's name in the table


class Profiler:
    """Records what this process does in some steps. The folder `profile` of the run then holds a trace, to be opened
    in ui.perfetto.dev or chrome://tracing, and a table of the ten operators that took the longest.

    steps: first and last, or None for no profile. A run that resumes between them records the rest, one that resumes
    after them nothing."""

    def __init__(self, run, steps):
        self.folder = Path(run) / "profile"
        self.recording = None
        self.first, self.last = steps or (0, -1)

    def start_step(self, step):
        if self.recording is None and self.first <= step <= self.last:
            self.first = step
            self.recording = torch.profiler.profile()  # of the CPU, and of a GPU if there is one
            self.recording.start()

    def end_step(self, step, ending=False):
        """After the last of the steps, or where the run ends before it, writes the profile. Returns the table and
        where it is as text, or None if there is nothing to write."""
        if self.recording is None or (step < self.last and not ending):
            return None
        self.recording.stop()
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"steps_{self.first}_to_{step}"
        self.recording.export_chrome_trace(f"{path}.json.gz")
        table = slowest_operators(self.recording.key_averages(), step + 1 - self.first)
        path.with_suffix(".txt").write_text(table + "\n")
        self.recording = None
        return f"profile of steps {self.first} to {step} of rank 0 in {path}.json.gz\n{table}"


def slowest_operators(operators, steps, rows=10):
    """A table of the operators that took the longest by themselves, without the operators they call: on the GPU if
    anything ran there, else on the CPU. operators: torch.profiler's key_averages; steps: how many were recorded."""
    device = "CPU"
    key = "self_cpu_time_total"  # microseconds
    if any(operator.self_device_time_total for operator in operators):
        device = "GPU"
        key = "self_device_time_total"

    def own_time(operator):
        return getattr(operator, key)

    # kernels have entries of their own, whose time also counts for the operator that started them
    operators = [operator for operator in operators if operator.device_type == torch.autograd.DeviceType.CPU]
    operators.sort(key=own_time, reverse=True)
    total = sum(own_time(operator) for operator in operators) or 1
    lines = [f"{'operator':{NAME_WIDTH}} {'calls/step':>10} {device:>4} ms/step {'share':>6}"]
    for operator in operators[:rows]:
        name = operator.key
        if len(name) > NAME_WIDTH:
            name = name[: NAME_WIDTH - 3] + "..."
        calls = operator.count / steps
        milliseconds = own_time(operator) / 1000 / steps
        share = own_time(operator) / total
        lines.append(f"{name:{NAME_WIDTH}} {calls:>10.1f} {milliseconds:>12.3f} {share:>6.1%}")
    return "\n".join(lines)

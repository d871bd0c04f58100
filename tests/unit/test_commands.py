"""How every command ends, whatever a user does: no traceback but for a fault in the program. The commands are found by
looking for `run_command`, so a new one is tested as well."""

import ast
import errno
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import plan
import plot
from data import train_tokenizer
from minzero import commands, files, flags, metrics
from minzero.commands import run_command
from minzero.config.load import load_config
from minzero.curves import read_run
from minzero.errors import UserError, explain
from minzero.plot import X_LABELS
from tests.helpers.processes import ROOT, environment
from tests.unit.test_plot import make_run

FILES = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("data/*/prepare.py")]
RUNS = ("    run_command(", "    script.run()")
COMMANDS = sorted(file.relative_to(ROOT).as_posix() for file in FILES if any(run in file.read_text() for run in RUNS))


def ended(capsys, function, arguments=()):
    """(exit code, standard error) of a command's end in one of the ways that are not a traceback."""
    with pytest.raises(SystemExit) as end:
        run_command(function, list(arguments))
    return end.value.code, capsys.readouterr().err


def raising(error):
    def function(_):
        raise error

    return function


def test_all_commands_are_found():
    assert {"train.py", "eval.py", "sample.py", "export.py", "plan.py", "plot.py", "benchmark.py"} < set(COMMANDS)
    assert {"data/train_tokenizer.py", "data/text/prepare.py"} < set(COMMANDS) and len(COMMANDS) >= 17


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_nothing_that_takes_seconds(command):
    """--help, and a wrong flag, are answered before torch, transformers or matplotlib are imported."""
    code = f"import runpy, sys; sys.argv = [{command!r}, '--help']; sys.path.insert(0, {str(ROOT)!r})\n"
    code += f"try: runpy.run_path({command!r}, run_name='__main__')\n"
    code += "finally: assert not {'torch', 'deepspeed', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment())
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_begins_before_the_imports_that_take_seconds(command):
    lines = ast.parse((ROOT / command).read_text()).body
    begins = next(place for place, line in enumerate(lines) if ast.unparse(line).endswith(("begin()", "script.run()")))
    before = {name.name for line in lines[:begins] if isinstance(line, ast.Import) for name in line.names}
    before |= {line.module for line in lines[:begins] if isinstance(line, ast.ImportFrom)}
    before = {name.partition(".")[0] for name in before}
    assert before <= {*sys.stdlib_module_names, "minzero"}


def test_begin_loads_the_standard_library_alone():
    code = "import sys; before = {*sys.modules}; from minzero.commands import begin; print(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert done.returncode == 0 and "minzero" in loaded and loaded <= {*sys.stdlib_module_names, "minzero"}


def test_what_does_not_compile_loads_no_compiler():
    code = "import sys, train; from minzero.config.sections import ModelConfig; from minzero.hf import weights\n"
    code += "assert weights.weightless(ModelConfig()).head.weight.is_meta\n"
    code += "assert not {'torch._dynamo', 'sympy', 'transformers', 'matplotlib'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_garbage_is_collected_after_the_imports_alone():
    code = "import gc; from minzero.commands import begin, run_command; begin(); print(gc.isenabled())\n"
    code += "run_command(lambda _: print(gc.isenabled()), is_last=False)\n"
    code += "run_command(lambda _: print(gc.isenabled(), gc.get_freeze_count() > 1000))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False", "True", "True"], done.stderr[-2000:]


# -- what a user can cause -----------------------------------------------------------------------

N, ERRNO = "n" * 300, errno
FAULTS = [  # exception, what the line says
    (UserError("x.json: found 1, expected 2"), "error: x.json: found 1, expected 2"),
    (UserError("a\nb\x1b[31m"), "error: a\\nb\\x1b[31m"),
    *(
        (OSError(number, os.strerror(number), "out/run"), f"error: out/run: {os.strerror(number)}; ")
        for number in (ERRNO.ENOSPC, ERRNO.EDQUOT, ERRNO.EROFS, ERRNO.EACCES, ERRNO.ENOENT, ERRNO.ENAMETOOLONG)
    ),
    *(
        (OSError(number, os.strerror(number), "out/run"), f"error: out/run: {os.strerror(number)}; ")
        for number in (ERRNO.EISDIR, ERRNO.ENOTDIR, ERRNO.ELOOP, ERRNO.EMFILE, ERRNO.EIO, ERRNO.ESTALE)
    ),
    (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
    (ConnectionError("no route to the hub"), "ConnectionError: no route to the hub"),
    (MemoryError(), "out of memory; lower train.micro_batch_size"),
    (
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"),
        "out of memory: tried to allocate 20.00",
    ),
    (OverflowError("int too large to convert to float"), "too large"),
    (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
    (UnicodeDecodeError("utf-8", b"ab\xff", 2, 3, "invalid start byte"), r"b'ab\xff': found bytes that are not utf-8"),
    (ModuleNotFoundError("No module named 'nothing'", name="nothing"), "nothing: no such package"),
    (ModuleNotFoundError("Could not import module 'Some'"), "Could not import module 'Some' in "),
]


@pytest.mark.parametrize("error, expected", FAULTS, ids=lambda value: str(value)[:40])
def test_what_a_user_can_cause_is_one_line_and_code_2(capsys, error, expected):
    code, text = ended(capsys, raising(error))
    assert code == 2 and text.count("\n") == 1 and expected in text and "Traceback" not in text


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (lambda: torch.empty(10**15), "out of memory: tried to allocate 4000000000000000"),
        (lambda: torch.empty(2**62, 2**62), "too large"),
        (lambda: torch.empty(10**30), "too large"),
        (lambda: bytearray(10**17), "out of memory"),
        (lambda: Path("a\0b").read_text(), "NUL character"),
        (lambda: Path(N).write_text("x"), f"{N}: File name too long; choose a shorter name"),
        (lambda: Path("\ud800").read_text(), "found a character that utf-8 cannot write"),
        (lambda: "\udcff".encode(), "found a character that utf-8 cannot write"),
        (lambda: int("9" * 5000), "too large"),
        (lambda: 10**400 / 3, "too large"),
        (lambda: json.loads("[" * 100_000), "nested too deeply"),
        (lambda: Path("/").read_text(), "/: Is a directory; expected a file"),
    ],
)
def test_the_real_exceptions_are_understood(capsys, action, expected):
    code, text = ended(capsys, lambda _: action())
    assert code == 2 and text.count("\n") == 1 and expected in text


def test_a_full_disk_names_the_file_though_the_error_does_not(capsys):
    def write(_):
        with open("/dev/full", "w") as file:
            file.write("x" * 10**6)

    code, text = ended(capsys, write)
    assert code == 2 and "error: /dev/full: No space left on device; make room" in text


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), ValueError("x"), RuntimeError("x"), AssertionError()])
def test_a_fault_in_the_program_keeps_its_traceback(error):
    assert explain(error) is None
    with pytest.raises(type(error)):
        run_command(raising(error), [])


def test_a_line_of_any_length_is_cut_in_the_middle(capsys):
    code, text = ended(capsys, raising(UserError("start " + "9" * 10**6 + " end")))
    assert code == 2 and len(text) < 3000 and "error: start 9" in text and text.endswith("9 end\n")


# -- streams -------------------------------------------------------------------------------------


def call(code, tail="", **more):
    """A program of one `run_command`, in bash, which begins as every command does."""
    code = f"run_command(lambda _: {code})"
    code = f"from minzero.commands import begin, run_command; begin(); {code}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -c '{code}' {tail}"],
        cwd=ROOT,
        env=environment(**more),
        capture_output=True,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_reader_that_has_gone_ends_a_command_in_silence():
    for buffered in ("", "1"):
        code, out, error = call('[print("x" * 100) for _ in range(10**6)]', "| head -1", PYTHONUNBUFFERED=buffered)
        assert (code, out, error) == (141, b"x" * 100 + b"\n", b"")
    code, out, error = call('print("x")', "| true")
    assert code in (0, 141) and error == b""


def test_a_closed_or_full_standard_output_is_no_traceback():
    assert call('print("x")', ">&-") == (0, b"", b"")
    code, _, error = call('print("x")', ">&- 2>&-")
    assert code == 0 and error == b""
    code, _, error = call('print("x")', "> /dev/full", PYTHONUNBUFFERED="")
    assert code == 2 and error.count(b"\n") == 1 and b"standard output: No space left on device" in error


def test_any_text_can_be_printed_on_an_ascii_terminal():
    text = r'print("\N{GRINNING FACE} \udcff \u00e9")'
    code, out, error = call(text, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert (code, out, error) == (0, b"\\U0001f600 \\udcff \\xe9\n", b"")


LOAD_TORCH = ("sample.py", "export.py", "to_gguf.py")  # before --help, as eval.py does, which the fast tests call


@pytest.mark.parametrize(
    "command",
    [pytest.param(name, marks=pytest.mark.slow) if name in LOAD_TORCH else name for name in COMMANDS],
)
def test_help_into_head(command):
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} {command} --help | head -1"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 141) and len(done.stdout.splitlines()) == 1 and done.stderr == ""


# -- Ctrl-C --------------------------------------------------------------------------------------


def test_ctrl_c_lets_a_command_clean_up_and_is_one_line(capsys):
    cleaned = []

    def function(_):
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            cleaned.append(True)

    code, text = ended(capsys, function)
    assert code == 130 and text.endswith(": stopped by Ctrl-C\n") and text.count("\n") == 1 and cleaned
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "as it was before"


def test_ctrl_c_that_a_library_makes_another_error_of_is_ctrl_c(capsys):
    def function(_):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("numpy failed to import") from None

    assert ended(capsys, function)[0] == 130


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_in_the_first_seconds(command, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("words and more words\n" * 1000)
    arguments = [tmp_path / "none", "--input", text, "--out", tmp_path / "out"]
    if command == "plan.py":
        arguments = ["configs/1p5b.json", "--gpus", "8", "--gpu_memory", "80", "--max"]
    wait = random.Random(command).uniform(0, 1.5)
    process = subprocess.Popen(
        [sys.executable, command, *arguments],
        cwd=ROOT,
        env=environment(DS_ACCELERATOR="cpu"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        # it is Python's own start until the handler is there, which no program can guard
        mask, deadline = 1 << (signal.SIGINT - 1), time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            status = Path(f"/proc/{process.pid}/status").read_text()
            watched = len(os.listdir(f"/proc/{process.pid}/task")) > 1  # the thread that `begin` starts
            if watched and int(status.split("SigCgt:")[1].split()[0], 16) & mask:
                break
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
    finally:
        process.kill()
    assert "Traceback" not in error and "Exception ignored" not in error
    assert process.returncode in (130, -signal.SIGINT, 0, 2), "stopped, or had finished"
    if process.returncode == 130:
        assert "stopped by Ctrl-C" in error


# -- flags ---------------------------------------------------------------------------------------

ODD_NUMBERS = ["9" * 5000, "nan", "inf", "-1", "1e400", "", "x", "\udcff", str(2**70)]


@pytest.mark.parametrize("text", ODD_NUMBERS, ids=lambda text: ascii(text)[:20])
def test_a_flag_says_what_it_found_and_expected(text):
    parser = flags.FlagParser("about")
    parser.add_argument("--tokens", type=flags.at_least(1))
    parser.add_argument("--share", type=flags.a_number(0, 1))
    for flag in ("--tokens", "--share"):
        with pytest.raises(UserError, match=rf"^{flag}: found .*, expected ") as error:
            parser.parse_args([f"{flag}={text}"])
        assert len(str(error.value)) < 300


def test_a_flag_takes_what_is_in_its_range():
    assert flags.at_least(1)("7") == 7 and flags.at_least(0, 5)("5") == 5 and flags.a_number(0, 1, above=True)("1") == 1
    for kind, text in ((flags.at_least(0, 5), "6"), (flags.a_number(0, above=True), "0"), (flags.a_path, "")):
        with pytest.raises(flags.argparse.ArgumentTypeError):
            kind(text)


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    files.check_can_write("--out", tmp_path / "new.png")
    files.check_can_write("--out", tmp_path / "\udcff.png")
    files.check_can_write("--out", tmp_path / "new" / "folder", folder=True)
    for path, folder, reason in (
        (tmp_path, False, "Is a directory"),
        (tmp_path / "file", True, "Not a directory"),
        (tmp_path / "file" / "below", True, "Not a directory"),
        (tmp_path / "file" / "x.png", False, "Not a directory"),
        (tmp_path / "link", True, "Not a directory"),
        (tmp_path / "\udcff", True, "found a name that is not UTF-8"),
        (tmp_path / "a\0b", True, "found a NUL byte in the name"),
        (tmp_path / "a\0b", False, "found a NUL byte in the name"),
        (tmp_path / "none" / "x.png", False, "No such file or directory"),
        (tmp_path / N, False, "File name too long"),
        (tmp_path / N, True, "File name too long"),
    ):
        with pytest.raises(UserError, match=rf"could not be written \({reason}\); choose another --out$"):
            files.check_can_write("--out", path, folder)
    if os.geteuid():  # root may write everywhere
        (tmp_path / "shut").mkdir(mode=0o500)
        with pytest.raises(UserError, match=rf"could not be written \(Permission denied: {tmp_path / 'shut'}\)"):
            files.check_can_write("--out", tmp_path / "shut" / "new" / "folder", folder=True)


def test_numbers_of_any_length_in_a_config_name_the_file_or_key(tmp_path):
    file = tmp_path / "config.json"
    for content in (f'{{"train": {{"lr": {"9" * 5000}}}}}', '{"data": {"path": "a\\u0000b"}}'):
        file.write_text(content)
        with pytest.raises(UserError, match=f"^{file}: "):
            load_config([str(file)])
    with pytest.raises(UserError, match=r"^--train.lr: found 99999999999999999999\.\.\. \(5000 characters\)"):
        load_config(["--train.lr", "9" * 5000])


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--vocab_size", "1000000000000", "--vocab_size: found 1000000000000, expected 1 to 10000000"),
        ("--limit", "-1", "--limit: found -1, expected 1 or more"),
        ("--special_tokens", "\udcff", "--special_tokens: found '\\udcff', expected names"),
        ("--out", "file", "--out: file: could not be written (Not a directory); choose another --out"),
    ],
)
def test_a_tokenizer_is_not_learned_for_nothing(tmp_path, monkeypatch, capsys, flag, value, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("words " * 1000)
    monkeypatch.setattr(train_tokenizer, "train_tokenizer", lambda *_: pytest.fail("learned"))
    arguments = ["--input", "file", "--vocab_size", "300", "--out", "new", flag, value]
    code, text = ended(capsys, train_tokenizer.main, arguments)
    assert code == 2 and expected in text and not (tmp_path / "new").exists()


# -- plan.py and plot.py -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        "--gpus 1000000000 --gpu_memory 80",
        "--gpus 8 --gpu_memory 1e308",
        "--gpus 8 --gpu_memory 80 --price 1e308",
        "--gpus 8 --gpu_memory 80 --utilisation 1e300",
        "--gpus 8 --gpu_memory 80 --model.n_layer 1e18",
        "--gpus 8 --gpu_memory 80 --model.n_embd 1" + 200 * "0",
        "--gpus 8 --gpu_memory 80 --max --model.n_embd 1e18",
        "--gpus 8 --gpu h100 --gpu_memory 1e-300 --fit --train.global_batch_tokens 1e18 --train.max_tokens 1e18",
    ],
)
def test_absurd_plans_are_refused_soon(capsys, arguments):
    began = time.monotonic()
    code, text = ended(capsys, plan.main, ["configs/gpt2-124m.json", *arguments.split()])
    assert code == 2 and text.count("\n") == 1 and time.monotonic() - began < 60


NAN = float("nan")
ODD_LINES = ["null", "[]", '"x"', "3", "[" * 100_000, "\x00\x01", '{"step": ' + "9" * 5000 + "}", '{"loss": 3}']
ODD_LINES += [json.dumps({"step": step, "tokens": 5, "loss": 1.0}) for step in ("x", -5, 1.5, True, None, 10**30)]
ODD_LINES += [json.dumps({"step": 7, "tokens": 5, "loss": loss}) for loss in ("3", [1], {}, 10**400, True)]
ODD_VALUES = [dict.fromkeys(metrics.NUMBERS, value) for value in (None, NAN, float("inf"), -1e308, 1e308, -5)]


def test_odd_lines_are_passed_over_and_counted(tmp_path, capsys):
    run = make_run(tmp_path / "run", 30)
    good = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("\n".join([*ODD_LINES, good, *ODD_LINES]))
    assert metrics.good_lines(run) == ([json.loads(line) for line in good.splitlines()], 2 * len(ODD_LINES))
    run_command(plot.main, [str(run), "--html", str(run / "page.html")])
    assert f"passed over {2 * len(ODD_LINES)} lines" in capsys.readouterr().out
    (run / "metrics.jsonl").write_text("\n".join(ODD_LINES))
    code, text = ended(capsys, plot.main, [str(run)])
    assert code == 2 and f"none of the {len(ODD_LINES)} lines" in text


@pytest.mark.parametrize("x", X_LABELS)
def test_odd_values_are_drawn_as_gaps(tmp_path, capsys, x):
    run = make_run(tmp_path / "run", 30)
    lines = [{"step": 7 + number, "tokens": 7, **values} for number, values in enumerate(ODD_VALUES)]
    good = (run / "metrics.jsonl").read_text()
    for content in (good, ""):
        (run / "metrics.jsonl").write_text(content + "".join(json.dumps(line) + "\n" for line in lines))
        run_command(plot.main, [str(run), "--x", x, "--html", str(run / "page.html")])
        assert (run / "metrics.png").stat().st_size > 5000 and "passed over" not in capsys.readouterr().out


def test_steps_that_stand_twice_or_go_back_are_one_curve(tmp_path):
    run = make_run(tmp_path / "run", 10)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    whole = read_run(run, "time").curves["loss"]
    (run / "metrics.jsonl").write_text("\n".join([*lines, *lines[:4]]))
    place, loss = read_run(run).curves["loss"]
    assert place.tolist() == [1000 * point for point in range(1, 11)] and loss.tolist() == whole[1].tolist()
    (run / "metrics.jsonl").write_text("\n".join(reversed(lines)))
    assert read_run(run).curves["loss"][0].tolist() == place.tolist()


@pytest.mark.parametrize("name", ['<b>"&', "a\nb\tc", "\udcff", "\N{GRINNING FACE}", "$x$", "n" * 250])
def test_a_run_folder_of_any_name_is_drawn_and_escaped(tmp_path, capsys, name):
    run = make_run(tmp_path / name, 5)
    made = json.loads((run / "config.json").read_text()) | {"versions": [1], "precision": "<script>"}
    (run / "config.json").write_text(json.dumps(made))
    run_command(plot.main, [str(run), "--html", str(run / "page.html")])
    page = (run / "page.html").read_text()
    assert "<script>" not in page and "<b>" not in page


def test_any_name_is_printed_whatever_the_terminal(tmp_path, monkeypatch):
    run = make_run(tmp_path / "\N{GRINNING FACE}\udcff", 5)
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    run_command(plot.main, [str(run)])
    assert rb"\U0001f600\udcff/metrics.png" in terminal.buffer.getvalue()


def test_of_several_ranks_the_first_speaks_of_ctrl_c(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(commands.time, "sleep", lambda _: pytest.fail("waited"))
    before = signal.getsignal(signal.SIGTERM)
    assert ended(capsys, lambda _: signal.raise_signal(signal.SIGINT)) == (130, "")
    signal.signal(signal.SIGTERM, before)


def test_a_command_that_shares_no_work_is_one_process(monkeypatch, capsys):
    """`srun -n 2 python export.py ...` would write the same folder twice."""
    slurm = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    slurm |= {"SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "2"}
    monkeypatch.setattr(os, "environ", os.environ.copy() | slurm)
    called = []
    code, text = ended(capsys, called.append, [])
    assert code == 2 and not called and "found 2 tasks, expected one process" in text
    run_command(called.append, [], may_be_many=True)
    assert called == [[]]
    monkeypatch.setattr(os, "environ", os.environ.copy() | {"SLURM_STEP_NUM_TASKS": "1", "RANK": ""})
    run_command(called.append, [])
    assert len(called) == 2

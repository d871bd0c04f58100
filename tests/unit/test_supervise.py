"""supervise.py with a command that fails as it is told to. With train.py itself: tests/slow/test_supervised.py."""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from minzero import supervise as supervise_module
from minzero.checkpoint_names import name_of
from minzero.errors import UserError
from minzero.failures import telling_line
from minzero.nodes import choose, nodes_that_failed, read_hostfile
from minzero.run_folder import RunFolder, holder_of
from minzero.supervise import Orders, Supervisor
from tests.helpers import processes
from tests.helpers.processes import ROOT, environment

FAKE = ROOT / "tests" / "helpers" / "fake_run.py"
COMPLETE = "state complete ; exit 0"


@pytest.fixture
def supervise(tmp_path, start):
    """Start supervise.py with the fake run that does as the lines say."""
    (tmp_path / "run").mkdir()

    def begin(lines, *flags, after=()):
        if lines is not None:
            (tmp_path / "plan").write_text("\n".join(lines))
        flags = [*flags, "--folder", tmp_path / "run"]
        flags += [] if "--pause" in flags else ["--pause", 0]
        command = [sys.executable, "supervise.py", *flags, *after, sys.executable, FAKE, tmp_path / "run"]
        return start([str(word) for word in [*command, tmp_path / "plan"]])

    return begin


ended = functools.partial(processes.ended, seconds=60)


def record(tmp_path):
    return json.loads((tmp_path / "run" / "supervise.json").read_text())


def printed(tmp_path):
    log = tmp_path / "run" / "supervise.log"
    return log.read_text() if log.exists() else ""


@contextlib.contextmanager
def signals_as_before():
    """A context after which this process handles signals as before: a supervisor handles them in its own way."""
    before = {number: signal.getsignal(number) for number in supervise_module.SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_until(condition, seconds=30):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.05)


# -- again, or no more -----------------------------------------------------------------------------


def test_a_run_that_gets_further_is_started_again_until_it_is_complete(supervise, tmp_path):
    lines = [f"state running ; save {step} ; say train.py: rank 0 lost contact ; exit 1" for step in range(1, 6)]
    code, text = ended(supervise([*lines, COMPLETE], "--tries", 2))
    assert code == 0 and text.count("supervise.py: start ") == 6 and "6 starts, 5 failures:" in text, text
    assert "start 2, " in text and "saved step 2, code 1: train.py: rank 0 lost contact" in text
    assert record(tmp_path)["attempts"] == 6 and record(tmp_path)["without_progress"] == 0


@pytest.mark.parametrize("before", [None, 40])
def test_where_the_command_says_how_it_resumes_later_starts_continue(tmp_path, monkeypatch, before):
    """train.resume never would refuse each of them, and a checkpoint of the run's own would begin there again, below
    the newest step of a continuation that is given up."""
    run = tmp_path / "run"
    if before:
        path = run / "checkpoints" / name_of(before)
        path.mkdir(parents=True)
        (path / "state.json").write_text("{}")
        os.utime(path / "state.json", (1, 1))
    else:
        run.mkdir()
    (tmp_path / "plan").write_text("\n".join(["exit 1", "save 10 ; exit 1", "save 20 ; exit 1", COMPLETE]))
    command = [sys.executable, str(FAKE), str(run), str(tmp_path / "plan")]
    begun = []
    popen = subprocess.Popen

    def begin(words, *more, **settings):
        begun.append(words[len(command) :])
        return popen(words[: len(command)], *more, **settings)

    monkeypatch.setattr(supervise_module.subprocess, "Popen", begin)
    with signals_as_before():
        # by a scheduler that starts the supervisor again each time, then by the supervisor itself
        for _ in range(2):
            assert Supervisor(Orders(command, run, 2, 0.0, 5.0, once=True, resumes=True)).run() == 1
        assert Supervisor(Orders(command, run, 2, 0.0, 5.0, resumes=True)).run() == 0
    again = ["--train.resume", "auto"]
    assert begun == [[], [], again, again]


def test_it_gives_up_with_what_failed_when_and_where(supervise, tmp_path):
    lines = ["save 7 ; say first ; exit 1", "say second ; kill", "say third ; exit 0", "say never ; exit 0"]
    code, text = ended(supervise(lines, "--tries", 2))
    assert code == 3 and "never" not in text
    assert "gives up: 2 failures, and no checkpoint after step 7" in text
    summary = text[text.index("gives up") :]
    assert "saved step 7, code 1: first" in summary and "saved step 7 as before, code -9: second" in summary
    assert "code 0: third" in summary, "a launcher's 0 alone does not make a run complete"
    code, text = ended(supervise(None, "--tries", 2))
    assert code == 3 and "start 4" not in text, "nor does another supervisor try it again"
    code, text = ended(supervise([COMPLETE], "--tries", 2, "--again"))
    assert code == 0 and "start 4" in text and "0 failures" in text


def test_the_pauses_grow(supervise, tmp_path):
    assert ended(supervise(["exit 1"] * 3, "--tries", 3, "--pause", 1.5))[0] == 3
    starts = [failure["began"] for failure in record(tmp_path)["failures"]]
    assert 1.4 < starts[1] - starts[0] < 4 and 2.9 < starts[2] - starts[1] < 6


@pytest.mark.parametrize(
    ("line", "again"),
    [
        ("train.py: error: x.json: found 1, expected 2", False),
        ("train.py: rank 3: error: data/x: no such file", False),
        ("train.py: error: out/x: could not be written (No space left on device); fix that", True),
        ("train.py: error: train.out_dir: out/x is held by another run; wait for its end", True),
        ("train.py: error: train.out_dir: out/x: 0.00 GiB are free, and a checkpoint takes 0.01 GiB; make room", True),
    ],
)
def test_what_train_refuses_is_not_tried_again_unless_it_may_pass(supervise, line, again):
    code, text = ended(supervise([f"say {line} ; exit 2", COMPLETE]))
    assert code == (0 if again else 2) and ("start 2" in text) == again, text


def test_a_launcher_that_hides_the_code_does_not_hide_the_refusal(supervise):
    code, text = ended(supervise(["say node1: train.py: error: x.json: found 1 ; exit 1", COMPLETE]))
    assert code == 2 and "start 2" not in text


def test_a_code_2_without_a_line_is_a_refusal_only_of_a_run_that_had_not_begun(supervise):
    """A full disk has no room for the line, which says so."""
    code, text = ended(supervise(["state running ; say step 1 ; exit 2", COMPLETE]))
    assert code == 0 and "start 2" in text, text
    assert ended(supervise(["say no module train ; exit 2", COMPLETE]))[0] == 2


def test_once_leaves_the_next_start_to_a_scheduler_that_counts_through_the_file(supervise):
    assert ended(supervise(["exit 1", "exit 1", "exit 1"], "--once", "--tries", 2))[0] == 1
    assert ended(supervise(None, "--once", "--tries", 2))[0] == 3
    assert ended(supervise(None, "--once", "--tries", 2))[0] == 3


def test_a_command_that_is_complete_already_ends_it(supervise, tmp_path):
    assert ended(supervise([COMPLETE]))[0] == 0
    code, text = ended(supervise(["say out/run is complete: 5 of 5 steps ; exit 0"]))
    assert code == 0 and "start 2" in text


# -- stopped on purpose ----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_asks_the_run_in_its_loop_to_save(supervise, tmp_path, number):
    process = supervise(["state running ; say in the loop ; sleep 30 ; save 3 ; state stopped ; exit 0", COMPLETE])
    wait_until(lambda: "in the loop" in printed(tmp_path))
    process.send_signal(number)
    code, text = ended(process)
    assert code == 128 + number and "asks the run to save and end" in text and "start 2" not in text
    assert not (tmp_path / "run" / "STOP").exists() and record(tmp_path)["step"] == 3
    assert record(tmp_path)["failures"] == []
    assert ended(supervise(None))[0] == 0, "the same command continues"


def test_a_signal_before_the_loop_goes_to_the_command(supervise, tmp_path):
    process = supervise(["trap ; say begins ; sleep 2 ; exit 1", COMPLETE])
    wait_until(lambda: "begins" in printed(tmp_path))
    process.terminate()
    code, text = ended(process)
    assert code == 143 and "heard SIGTERM" in text and "start 2" not in text


def test_a_signal_or_a_stop_file_in_the_pause_ends_it(supervise, tmp_path):
    for asked, expected in (("signal", 143), ("file", 0)):
        process = supervise(["exit 1", COMPLETE], "--pause", 300, "--again")
        wait_until(lambda: (tmp_path / "run" / "supervise.json").exists() and record(tmp_path)["failures"])
        time.sleep(0.5)
        process.terminate() if asked == "signal" else (tmp_path / "run" / "STOP").touch()
        assert ended(process, seconds=10)[0] == expected
        assert not (tmp_path / "run" / "STOP").exists()


# -- replaced --------------------------------------------------------------------------------------


def test_a_supervisor_killed_with_9_is_replaced_and_starts_no_second_run(supervise, tmp_path):
    first = supervise(["save 1 ; exit 1", "state running ; say second start ; sleep 4 ; save 2 ; exit 1", COMPLETE])
    wait_until(lambda: "second start" in printed(tmp_path))
    first.kill()
    first.wait()
    assert holder_of(tmp_path / "run") is not None, "the run lives on"
    code, text = ended(supervise(None))
    assert code == 0 and "found start 2 of this run" in text and text.count("supervise.py: start ") == 1, text
    assert "start 2, " in text and "saved step 2: second start" in text, "the failure that it saw is counted"
    assert record(tmp_path)["attempts"] == 3 and len(record(tmp_path)["failures"]) == 2


def test_a_stop_reaches_a_run_that_another_supervisor_began(supervise, tmp_path):
    first = supervise(["trap ; say begins ; sleep 3 ; exit 1"])
    wait_until(lambda: "begins" in printed(tmp_path))
    first.kill()
    second = supervise(None)
    wait_until(lambda: second.stdout.readline().startswith("supervise.py: found start 1"))
    second.terminate()
    code, text = ended(second)
    assert code == 143 and "heard SIGTERM" in text


def test_there_is_one_supervisor(supervise, tmp_path):
    first = supervise(["say begins ; sleep 30 ; exit 1"])
    wait_until(lambda: (tmp_path / "run" / "supervise.log").exists())
    code, text = ended(supervise(None))
    assert code == 2 and f"found a supervisor (process {first.pid} on " in text


def test_it_waits_for_a_run_that_somebody_else_has_started(supervise, tmp_path):
    folder = RunFolder(tmp_path / "run", 0)
    folder.hold()
    process = supervise([COMPLETE])
    wait_until(lambda: f"is held by a run (process {os.getpid()} on" in process.stdout.readline())
    time.sleep(1)
    assert not (tmp_path / "run" / "supervise.log").exists()
    folder.release()
    assert ended(process)[0] == 0


def test_ranks_without_a_launcher_are_waited_for(supervise, tmp_path):
    code = "import os, sys, time; os.fork() and os._exit(1); time.sleep(3); print('a rank ends', flush=True)"
    (tmp_path / "run").mkdir(exist_ok=True)
    command = [sys.executable, "supervise.py", "--tries", "1", "--folder", tmp_path / "run", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 3 and done.stdout.index("a rank ends") < done.stdout.index("failed: "), done.stdout


def test_ranks_that_hang_without_a_launcher_are_killed(tmp_path):
    code = "import os, time; os.fork() and os._exit(1); time.sleep(300)"
    began = time.monotonic()
    supervisor = Supervisor(Orders([sys.executable, "-c", code], tmp_path, 1, 0.0, 2.0))
    with signals_as_before():
        assert supervisor.run() == 3 and time.monotonic() - began < 30


def test_a_machine_that_was_started_again_has_none_of_the_commands_processes(tmp_path):
    """The numbers of processes begin again, so another session may have the number of the command's."""
    supervisor = Supervisor(Orders(["true"], tmp_path, 1, 0.0, 2.0))
    here = {"host": socket.gethostname(), "process": os.getsid(0), "log_from": 0}
    booted = psutil.Process(1).create_time()
    leader = psutil.Process(os.getsid(0)).create_time() if os.getsid(0) else booted
    supervisor.record["running"] = here | {"began": leader}
    assert psutil.Process() in supervisor.processes()
    supervisor.record["running"] = here | {"began": booted - 30}
    assert supervisor.processes() == []


@pytest.mark.parametrize("content", ["", "{}", "[]", "[" * 100_000, '{"attempts": "x"}'])
def test_a_damaged_record_is_a_new_one(supervise, tmp_path, content):
    (tmp_path / "run" / "supervise.json").write_text(content)
    assert ended(supervise([COMPLETE]))[0] == 0 and record(tmp_path)["attempts"] == 1


# -- nodes -----------------------------------------------------------------------------------------

HOSTS = {"node1": 2, "node2": 2, "node3": 2, "node4": 2}


@pytest.mark.parametrize(
    ("failures", "silent", "expected", "words"),
    [
        ({}, set(), ["node1", "node2", "node3"], "3 nodes: node1"),
        ({"node1": 1}, set(), ["node1", "node2", "node3"], "3 nodes"),
        ({"node1": 2}, set(), ["node2", "node3", "node4"], "(node1 failed 2 times)"),
        ({}, {"node2"}, ["node1", "node3", "node4"], "(node2 does not answer)"),
        (
            {"node1": 2},
            {"node2"},
            ["node3", "node4"],
            "2 nodes instead of 3: node3, node4 (node1 failed 2 times, node2",
        ),
        ({"node1": 2, "node3": 4}, {"node2"}, ["node4"], "1 nodes instead of 3"),
        ({}, {*HOSTS}, [], "no node can be used (node1 does not answer"),
    ],
)
def test_a_node_that_failed_twice_is_left_out_for_a_spare(failures, silent, expected, words):
    chosen, line = choose(HOSTS, 3, failures, {*HOSTS} - silent, lambda ranks: 12 % ranks == 0)
    assert list(chosen) == expected and words in line


def test_fewer_nodes_only_where_the_batch_divides():
    chosen, _ = choose(HOSTS, 4, {"node4": 2}, {*HOSTS}, lambda ranks: 8 % ranks == 0)
    assert list(chosen) == ["node1", "node2"], "6 ranks do not divide, 4 do"
    chosen, line = choose(HOSTS, 4, {"node4": 2}, {*HOSTS}, lambda ranks: ranks == 8)
    assert not chosen and "3 of 4 nodes can be used (node4 failed 2 times)" in line
    assert "does not divide by 2 or 4 or 6 ranks" in line


@pytest.mark.parametrize(
    ("ever", "failures", "wanted", "expected", "words"),
    [
        ({"node2": 2}, {}, 3, ["node1", "node3", "node4"], "3 nodes: node1, node3, node4 (node2 failed 2 times)"),
        ({"node2": 3, "node1": 1}, {}, 3, ["node1", "node3", "node4"], "3 nodes"),
        ({"node2": 2, "node3": 5}, {}, 3, ["node1", "node2", "node4"], "(node3 failed 5 times)"),
        ({"node2": 9}, {}, 4, [*HOSTS], "4 nodes: node1, node2, node3, node4"),
        ({"node2": 9}, {"node2": 2}, 4, ["node1", "node3", "node4"], "3 nodes instead of 4"),
    ],
)
def test_a_node_that_failed_before_is_kept_without_a_spare_as_long_as_the_run_gets_further(
    ever, failures, wanted, expected, words
):
    chosen, line = choose(HOSTS, wanted, failures, {*HOSTS}, lambda ranks: True, ever)
    assert list(chosen) == expected and words in line


NODES = {"node1": 2, "node2": 2}
# as pdsh, DeepSpeed's launcher and train.py print them
LOGS = [
    ("pdsh@node1: node2: ssh exited with exit code 255", {"node2"}),
    ("pdsh@node1: node2: ssh exited with exit code 1", set()),
    (
        "node2: [2026-11-26 14:00:00,000] [ERROR] [launch.py:325:sigkill_handler] [x] exits with return code = -9",
        {"node2"},
    ),
    ("node2: [2026-11-26 14:00:00,000] [ERROR] [launch.py:325:sigkill_handler] [x] exits with return code = 1", set()),
    ("node1: train.py: rank 0 waited 5.0 s: rank 3 hangs; resume from x", {"node2"}),
    ("node1: train.py: rank 0 waited 5 s in a step: ranks 2 to 3 hang on node2; resume from x", {"node2"}),
    ("node1: train.py: rank 0 waited 5 s in a save: ranks 1, 3 hang on node1, node2; x", {"node1", "node2"}),
    ("node1: train.py: error: rank 2 on node2: data/x: no such file", {"node2"}),
    ("node1: train.py: error: rank 2 on elsewhere: data/x: no such file", set()),
    ("node1: train.py: rank 0 waited 5.0 s: rank 99 hangs; resume from x", set()),
    ("node1: train.py: rank 0 lost contact with rank 2 on node2: no sign of life for 120 s; look", {"node2"}),
    ("node1: train.py: rank 0 lost contact with ranks 0 to 1, 3 on node1, node2: no sign of life for 9 s", {*NODES}),
    ("node1: train.py: rank 0 lost contact with another rank (Connection closed on node2)", set()),
    ("node1: step 3/10 | loss 3.0 | ETA 0:11 | rank 0 on node1 is 36% slower than the median", set()),
]


@pytest.mark.parametrize(("line", "expected"), LOGS)
def test_the_launchers_log_names_the_node_that_failed(line, expected):
    assert nodes_that_failed(["something", line], NODES) == expected


@pytest.mark.parametrize("hears", ["SIGTERM", "nothing"])
def test_a_start_that_one_node_has_left_is_ended(tmp_path, monkeypatch, capfd, hears):
    """The ranks of the other nodes wait for its ranks, for minutes."""
    monkeypatch.setattr(supervise_module, "LAUNCHER_SECONDS", 1)
    code = "import signal, sys, time; print('pdsh@node1: node2: ssh exited with exit code 255', flush=True)"
    code += "; signal.signal(signal.SIGTERM, signal.SIG_IGN)" if hears == "nothing" else ""
    began = time.monotonic()
    supervisor = Supervisor(Orders([sys.executable, "-c", f"{code}; time.sleep(60)"], tmp_path, 1, 0.0, 300.0))
    with signals_as_before():
        assert supervisor.run() == 3 and time.monotonic() - began < 30
    assert supervisor.record["failures"][0]["code"] == (-9 if hears == "nothing" else -15)
    assert "ends this start: a node's ranks ended" in capfd.readouterr().out


@pytest.mark.parametrize("own", [None, "-o ConnectTimeout=3"])
def test_ssh_is_asked_to_notice_a_cut_cable_unless_it_was_told_what_to_do(tmp_path, own):
    (tmp_path / "deepspeed").write_text('#!/bin/sh\necho "found $PDSH_SSH_ARGS_APPEND"\nexit 1\n')
    (tmp_path / "deepspeed").chmod(0o755)
    (tmp_path / "hosts").write_text("node1 slots=1\n")
    flags = ["--hostfile", tmp_path / "hosts", "--tries", "1"]
    words = [*flags, tmp_path / "deepspeed", "train.py", "configs/tiny.json", "--train.out_dir", tmp_path / "run"]
    more = {"PATH": str(tmp_path)}  # there is no ssh, so all nodes are taken
    more |= {"PDSH_SSH_ARGS_APPEND": own} if own else {}
    done = subprocess.run(
        [sys.executable, "supervise.py", *words], cwd=ROOT, env=environment(**more), capture_output=True, text=True
    )
    assert done.returncode == 3 and f"found {own or '-o ServerAliveInterval=15'}" in done.stdout, done.stdout


def test_a_hostfile_that_cannot_be_written_is_a_failure_of_this_start(tmp_path):
    supervisor = Supervisor(Orders(["true"], tmp_path, 1, 0.0, 2.0))
    assert supervisor.write_hostfile({"node1": 2}) is None
    assert read_hostfile(supervisor.hostfile) == {"node1": 2}
    supervisor.hostfile.unlink()
    supervisor.hostfile.mkdir()
    assert "supervise.hosts" in supervisor.write_hostfile({"node1": 2})


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "names no node"),
        ("node1", r"line 1: found 'node1', expected a node and its slots"),
        ("node1 slots=0", "line 1: found"),
        ("# two\n\nnode1 slots=1\nnode1 slots=2", "line 4: node1 stands twice"),
    ],
)
def test_a_hostfile_says_what_is_wrong(tmp_path, text, fault):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match=fault):
        read_hostfile(tmp_path / "hosts")


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ([], "COMMAND: found nothing"),
        (["bash", "job.sh"], "bash: found no train.py"),
        (["--nodes", "2", "deepspeed", "train.py"], "--nodes: found without --hostfile"),
        (["--hostfile", "{hosts}", "python", "train.py"], "--hostfile: found with the command python"),
        (["--hostfile", "{hosts}", "deepspeed", "--include=x", "train.py"], "--include=x: found with --hostfile"),
        (
            ["--hostfile", "{hosts}", "--nodes", "5", "deepspeed", "train.py"],
            "--nodes: found 5, expected at most the 2",
        ),
        (["--hostfile", "{hosts}", "deepspeed", "train.py", "configs/tiny.json"], "train.global_batch_tokens: "),
        (["deepspeed", "train.py", "configs/tiny.json", "--train.lr", "x"], "--train.lr|train.lr"),
        (["--tries", "0", "deepspeed", "train.py"], "--tries: found 0, expected 1 or more"),
        (["python", "train.py", "{pipe}"], "pipe: found a pipe or a folder, expected a config file"),
        (
            ["--folder", "out/x", "python", "train.py", "configs/tiny.json", "--train.out_dir", "out/y"],
            "--folder: found out/x, but train.out_dir of the command is out/y; leave it out",
        ),
    ],
)
def test_a_call_that_cannot_work_is_refused_before_anything_is_written(tmp_path, arguments, fault):
    import supervise as command

    (tmp_path / "hosts").write_text("a slots=3\nb slots=4\n")
    os.mkfifo(tmp_path / "pipe")
    arguments = [word.format(hosts=tmp_path / "hosts", pipe=tmp_path / "pipe") for word in arguments]
    with pytest.raises(UserError, match=fault):
        command.main(arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"hosts", "pipe"}


def test_the_telling_line():
    lines = [
        "step 1",
        "node1: train.py: rank 0 lost contact",
        "[ERROR] [launch.py:1] [x] exits with return code = -9",
        "",
    ]
    assert telling_line(["stopped by SIGTERM after step 3", "goodput 5%"]) == "stopped by SIGTERM after step 3"
    assert telling_line(lines) == "node1: train.py: rank 0 lost contact"
    assert telling_line(lines[:1] + lines[2:]) == lines[2] and telling_line([" "]) is None

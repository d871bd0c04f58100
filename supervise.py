"""Bring a run back after every failure, for as long as it gets further.

COMMAND is what starts train.py: deepspeed, srun, mpirun or torchrun, with the config and its overrides. It is started
again, after growing pauses, until the run is complete. Ctrl-C, SIGTERM, SIGUSR1 and a file STOP in the run's folder
save and end it. More: docs/clusters.md
"""

from minzero.commands import begin

if __name__ == "__main__":
    begin()

import argparse
import os
from pathlib import Path

from minzero.commands import run_command
from minzero.config.deepspeed import gradient_accumulation
from minzero.config.load import command_line_values, load_config
from minzero.errors import UserError
from minzero.files import make_folder
from minzero.flags import FlagParser, a_number, a_path, at_least
from minzero.init_from import model_defaults
from minzero.nodes import read_hostfile
from minzero.supervise import Orders, Supervisor

USAGE = "supervise.py [flags] COMMAND..."
END = """exit codes:
  0         complete, or stopped by a file STOP
  1         a failure, with --once
  2         train.py refuses the run: bad config, data or machine
  3         given up
  128 + N   stopped by signal N

examples:
  python supervise.py deepspeed --num_gpus 8 train.py configs/1p5b.json --train.lr 1e-4
  python supervise.py --hostfile hosts --nodes 4 deepspeed train.py configs/70b.json
"""
OF_THE_LAUNCHER = ("--hostfile", "-H", "--include", "-i", "--exclude", "-e", "--num_nodes", "--master_addr")


def config_of(command):
    """The Config of a command that starts train.py, or None if it does not name train.py. Raises UserError."""
    names = [os.path.basename(word) for word in command]
    if "train.py" not in names:
        return None
    arguments = command[names.index("train.py") + 1 :]
    for path in command_line_values(arguments)[1][:1]:
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path}: found a pipe or a folder, expected a config file, which every start reads again")
    return load_config(arguments, model_defaults)


def nodes_of(args, command, config):
    """The fields of Orders that --hostfile and --nodes set. Raises UserError."""
    if not args.hostfile:
        if args.nodes:
            raise UserError("--nodes: found without --hostfile; expected both")
        return {}
    nodes = read_hostfile(args.hostfile)
    names = [os.path.basename(word) for word in command]
    if config is None or "deepspeed" not in names:
        raise UserError(f"--hostfile: found with the command {command[0]}; expected deepspeed ... train.py CONFIG")
    options = command[names.index("deepspeed") + 1 : names.index("train.py")]
    for option in options:
        if option.partition("=")[0] in OF_THE_LAUNCHER:
            raise UserError(f"{option}: found with --hostfile, which chooses the nodes; leave it out")
    wanted = args.nodes or len(nodes)
    if wanted > len(nodes):
        raise UserError(f"--nodes: found {wanted}, expected at most the {len(nodes)} of {args.hostfile}")
    port = options[options.index("--ssh_port") + 1 :][:1] if "--ssh_port" in options else []

    def divides(ranks):
        try:
            gradient_accumulation(config, ranks)
        except UserError:
            return False
        return True

    gradient_accumulation(config, sum(list(nodes.values())[:wanted]))
    return {"nodes": nodes, "wanted": wanted, "divides": divides, "ssh_port": port[0] if port else None}


def main(arguments):
    parser = FlagParser(__doc__, USAGE, END)
    add = parser.add_argument
    add(
        "--tries",
        metavar="N",
        type=at_least(1),
        default=5,
        help="failures in a row without a new checkpoint after which it gives up; default 5",
    )
    add(
        "--pause",
        metavar="SECONDS",
        type=a_number(0),
        default=10.0,
        help="after a failure, doubled after each without progress; default 10",
    )
    add(
        "--hostfile",
        metavar="FILE",
        type=a_path,
        help="nodes, as `node1 slots=8`, for deepspeed; more than --nodes are spares",
    )
    add("--nodes", metavar="N", type=at_least(1), help="how many of them run it; default: all")
    add(
        "--folder",
        metavar="FOLDER",
        type=a_path,
        help="the run's folder, where COMMAND does not name train.py and its config",
    )
    add("--once", action="store_true", help="start it once, for a scheduler that starts it again")
    add("--again", action="store_true", help="forget the failures so far")
    add("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="what starts train.py, with all its flags")
    args = parser.parse_args(arguments)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise UserError("COMMAND: found nothing, expected what starts train.py, as deepspeed train.py CONFIG")
    config = config_of(command)
    if config is None and not args.folder:
        raise UserError(f"{command[0]}: found no train.py in the command; name it, or give the run's --folder")
    if config and args.folder and Path(args.folder).resolve() != Path(config.train.out_dir).resolve():
        raise UserError(
            f"--folder: found {args.folder}, but train.out_dir of the command is {config.train.out_dir}; leave it out"
        )
    folder = Path(args.folder or config.train.out_dir)
    nodes = nodes_of(args, command, config)
    make_folder("train.out_dir", folder)
    patience = 2 * config.train.timeout_seconds if config else 3000.0
    resumes = bool(config and config.train.resume != "auto")
    orders = Orders(command, folder, args.tries, args.pause, patience, args.once, args.again, resumes, **nodes)
    raise SystemExit(Supervisor(orders).run())


if __name__ == "__main__":
    run_command(main)

"""Pictures of runs, from what they wrote: python plot.py out/a [out/b ...]

python plot.py out/a out/b --x flops --out both.png --html both.html
"""

from minzero.commands import begin

if __name__ == "__main__":
    begin()

from pathlib import Path

from minzero.commands import run_command
from minzero.curves import read_runs
from minzero.errors import UserError
from minzero.files import check_can_write
from minzero.flags import FlagParser, a_path
from minzero.plot import X_LABELS, check_format, draw_panels, save
from minzero.report import write_page


def main(arguments):
    parser = FlagParser(__doc__)
    parser.add_argument("runs", type=a_path, nargs="+", help="run folders, as out/tiny")
    parser.add_argument("--x", choices=X_LABELS, default="tokens", help="what the curves are drawn against")
    parser.add_argument("--out", type=a_path, help="the picture; default: metrics.png in the first run's folder")
    parser.add_argument("--html", type=a_path, help="also a page with pictures and a table of the runs' facts")
    args = parser.parse_args(arguments)

    runs = read_runs(args.runs, args.x)
    for run in runs:
        if run.skipped:
            print(f"{run.folder}/metrics.jsonl: passed over {run.skipped} lines that train.py does not write")

    picture = args.out or Path(args.runs[0]) / "metrics.png"
    check_format("--out", picture)
    if args.html == picture:
        raise UserError(f"--html: {picture}: found the picture's name; choose another")
    check_can_write("--out", picture)
    if args.html:
        check_can_write("--html", args.html)
        write_page(runs, args.x, args.html)
    save(draw_panels(runs, args.x), picture)
    print(picture)
    if args.html:
        print(args.html)


if __name__ == "__main__":
    run_command(main)

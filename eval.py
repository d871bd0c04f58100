"""How good is a trained model? Loss, perplexity and bits per byte over the whole validation split.

    python eval.py out/tiny [--checkpoint best|latest|STEP] [--data FOLDER] [--gzip] [--json]
    python eval.py hf/llama --data data/books            # a folder in transformers' format, ours or published
    deepspeed --num_gpus 8 eval.py out/70b               # a model too large for one GPU: sharded by ZeRO-3
    python eval.py out/tiny --tasks hellaswag,arc_easy   # and benchmarks, by EleutherAI's lm-eval
    python eval.py out/dpo                               # of pairs of answers: how often the better one wins
    python eval.py out/talks --by_role                   # of conversations: each role's loss, by length, by answer

Bits per byte is the loss of all tokens over the bytes of the text they stand for: unlike the loss, it
can be compared between tokenizers, and with a compressor (--gzip).
"""

from minzero.commands import begin

if __name__ == "__main__":
    begin()

import functools
import json
import os

from minzero.commands import run_command
from minzero.errors import UserError
from minzero.flags import SUPPRESS, FlagParser, a_checkpoint, a_model, a_path, at_least
from minzero.launchers import find_ranks


def parse(arguments):
    parser = FlagParser(__doc__)
    what = "a run's folder, a checkpoint in it, an address of train.copy_to, or a folder in transformers' format"
    parser.add_argument("path", type=a_model, help=what)
    parser.add_argument("--checkpoint", type=a_checkpoint, default="best", help="best, latest or a step")
    parser.add_argument("--data", type=a_path, help="folder of shards; default: the run's own")
    reference = "of pairs: the model that answers are compared with; default: the one the run started from"
    parser.add_argument("--reference", type=a_path, metavar="MODEL", help=reference)
    parser.add_argument("--batch_size", type=at_least(1), default=16, help="sequences at a time on each rank")
    parser.add_argument("--gzip", action="store_true", help="compare with gzip -9 on the text (of the last folder)")
    parser.add_argument("--tasks", help="also these of lm-eval's tasks, or yaml files of tasks: one,two")
    parser.add_argument("--task_path", type=a_path, help="folder of further task files for --tasks")
    parser.add_argument("--limit", type=at_least(1), help="at most that many examples of each task")
    chat = "with --tasks, ask as a user does, in the model's chat template"
    parser.add_argument("--chat", action="store_true", help=chat)
    by_role = "of conversations: the loss of each role's words, and by length and number of the answer"
    parser.add_argument("--by_role", action="store_true", help=by_role)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--local_rank", help=SUPPRESS)  # the launcher's
    args = parser.parse_args(arguments)
    args.names = [] if args.tasks is None else args.tasks.split(",")
    if "" in args.names:
        raise UserError(f"--tasks: found {args.tasks!r}, expected names of tasks: one,two")
    if args.chat and not args.names:
        raise UserError("--chat: given without --tasks, expected both; --by_role is the loss of conversations")
    return args


def count_ranks():
    return int(find_ranks(dict(os.environ), may_be_alone=True)["WORLD_SIZE"])


def main(arguments):
    args = parse(arguments)
    # after the flags, so that --help and a wrong flag are answered at once: these take seconds to import
    from minzero import evaluate, evaluate_tasks
    from minzero.evaluate_roles import report_roles

    ranks = count_ranks()
    if args.names and ranks > 1:
        raise UserError(f"--tasks: found {ranks} ranks, expected one process: python eval.py {args.path} --tasks ...")
    open_model = functools.partial(
        evaluate.open_all,
        args.path,
        args.checkpoint,
        args.data,
        not args.names or args.by_role,
        args.gzip,
        args.reference,
        args.by_role,
    )
    result = dict.fromkeys(("val_loss", "perplexity", "bits_per_byte", "tokens"))
    if ranks > 1:
        rank, source, streams, found = evaluate.evaluate_on_ranks(open_model, args.batch_size, args.by_role)
        if rank:
            return
        result |= found
    else:
        source, streams, reference = open_model()
        manager = evaluate_tasks.open_tasks(args.names, args.task_path) if args.names else None
        if streams:
            result |= evaluate.evaluate_alone(source, streams, args.batch_size, reference, args.by_role)
    for line in evaluate.report(source, streams, result):
        print(line)
    if args.by_role:
        print(report_roles(result["by_role"]))
    if args.gzip and streams:
        result |= evaluate.compress(streams[-1])
        print(evaluate.report_compression(result))
    if args.names:
        result["tasks"] = evaluate_tasks.run_tasks(source, args.names, manager, args.limit, args.chat)
        print(evaluate_tasks.report_tasks(result["tasks"]))
    if args.json:
        print(json.dumps({key: evaluate.finite_or_none(value) for key, value in result.items()}))


def command(arguments):
    if count_ranks() == 1:
        main(arguments)
        return
    from minzero import dist  # it alone needs DeepSpeed

    with dist.ending_together():
        main(arguments)
    dist.stop_process_group()


if __name__ == "__main__":
    run_command(command, may_be_many=True)

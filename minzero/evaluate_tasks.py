"""Benchmarks of EleutherAI's lm-eval: of a finished model (eval.py --tasks), and of one that is being trained
(train.eval_tasks) at any ZeRO stage and on any number of ranks.

lm-eval itself loads the tasks, builds their requests, encodes them and makes scores of the answers. In training rank 0
does that, so that only its machine needs lm-eval and the tasks' data; what all ranks do is to find the log-probability
of each answer. Requests are built once: the first run of lm-eval, before anything is written, only notes them.
"""

import collections
import contextlib
import importlib.util
import itertools
import logging
import random
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import distributed

from minzero import dist
from minzero.checkpoint import as_rank_0
from minzero.config.values import did_you_mean
from minzero.data.pipeline import tokenizer_of
from minzero.errors import UserError, describe
from minzero.evaluate_loss import loss_of_each_token
from minzero.hf.write import write_model, write_settings
from minzero.sizes import IGNORE_INDEX
from minzero.task_faults import build_requests, fault_of_yaml, faults_named, remedy_of_task
from minzero.trained import ModelSource, best_device

KEY = "train.eval_tasks"
TYPES = ("multiple_choice", "loglikelihood")  # of tasks whose requests ask for the log-probability of a given answer

# -- tasks ---------------------------------------------------------------------------------------


def open_tasks(names, task_path, flag="--tasks", path_flag="--task_path", types=None):
    """lm-eval's TaskManager, checked to know these tasks: names, or paths of yaml files. What it has loaded is its
    `loaded`. task_path: a folder of more task files. types: the output types that are possible, by default all. Raises
    UserError, also later where a task has another type."""
    missing = [name for name in ("lm_eval", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'{flag}: {" and ".join(missing)} not installed, expected lm-eval; pip install "lm-eval[hf]"')
    from lm_eval.tasks import TaskManager

    class Manager(TaskManager):
        def _load_spec(self, spec):
            with faults_named(flag, spec):
                return super()._load_spec(spec)

        def load(self, tasks):
            self.loaded = super().load(tasks)
            if len(self.loaded["tasks"]) < len(tasks):
                raise UserError(
                    f"{flag}: found {len(self.loaded['tasks'])} tasks by {len(tasks)} names ({', '.join(tasks)[:99]}): "
                    "two of them are the same task, or give it the same name"
                )
            for name, task in self.loaded["tasks"].items():
                if types and task.OUTPUT_TYPE not in types:
                    raise UserError(
                        f"{flag}: {name}: found output_type {task.OUTPUT_TYPE}, expected {' or '.join(types)}; leave "
                        "it out, and evaluate it by eval.py --tasks"
                    )
                task.build_all_requests = partial(build_requests, flag, name, task, task.build_all_requests, types)
            return self.loaded

    if task_path and not Path(task_path).is_dir():
        raise UserError(f"{path_flag}: {task_path}: no such folder; expected one that holds lm-eval's task files")
    files = {name for name in names if Path(name).suffix == ".yaml" and Path(name).is_file()}
    for file in sorted(files):
        if fault := fault_of_yaml(file, one_task=True):
            raise UserError(f"{flag}: {file}: {fault}; correct it, or leave it out of {flag}")
    # indexing its own ten thousand tasks takes a dozen seconds, for which files of tasks need not wait
    for include_defaults in (False, True):
        manager = Manager(include_path=task_path, include_defaults=include_defaults)
        known = set(manager.all_tasks) | files
        if known.issuperset(names):
            return manager
    unknown = next(name for name in names if name not in known)
    further = Path(task_path).glob("**/*.yaml") if task_path else ()
    for file in sorted(further, key=lambda file: (file.stem != unknown, file)):
        if fault := fault_of_yaml(file):
            found = f"no task {unknown!r}, and a file that may hold it cannot be read: {file}: {fault}"
            raise UserError(
                f"{path_flag}: found {found}; correct or remove that file, or leave {unknown} out of {flag}"
            )
    remedy = did_you_mean(unknown, manager.all_tasks, "lm-eval ls tasks lists them")  # ten thousand
    raise UserError(f"{flag}: {unknown!r} is neither one of lm-eval's nor a yaml file; {remedy}")


# -- scores --------------------------------------------------------------------------------------


def with_bits_per_byte(results, loaded):
    """lm-eval's results, {task or group: {"metric,filter": value}}, with `bits_per_byte` added. loaded: of its
    TaskManager, with all requests answered."""
    for name, metrics in results.items():
        group = (loaded.get("groups") or {}).get(name)
        tasks = group.get_all_tasks() if group else [loaded["tasks"][name]]
        bits = bits_per_byte(tasks)
        if bits is not None and has_scores(metrics):
            metrics.setdefault("bits_per_byte,none", bits)
    return results


def scores_of(results, loaded):
    """{task or group: {metric: number}} of lm-eval's results, without standard errors. A group that has scores of its
    own stands for its tasks."""
    groups = [group for name, group in (loaded.get("groups") or {}).items() if has_scores(results.get(name))]
    inner = {task.task_name for group in groups for task in group.get_all_tasks()}
    inner |= {part.name for group in groups for part in group.get_all_groups()}
    return {
        name: {name_of(metric): float(value) for metric, value in metrics.items() if is_score(metric, value)}
        for name, metrics in results.items()
        if name not in inner and has_scores(metrics)
    }


def is_score(metric, value):
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return is_number and "," in metric and "_stderr" not in metric


def has_scores(metrics):
    return any(itertools.starmap(is_score, (metrics or {}).items()))


def name_of(metric):
    """lm-eval's "metric,filter" as a part of a key."""
    return metric.removesuffix(",none").replace(",", "_")


def bits_per_byte(tasks):
    """The bits that the model needs for the right answers of all examples over the bytes of these answers: -sum(log p)
    / ln 2 / sum(bytes), as lm-eval's metric of the same name has it of whole documents. It changes smoothly with the
    model where an accuracy stays at chance, so that a loss of this kind can be predicted from smaller models (Bhagia et
    al. 2024, arXiv 2412.04403). An answer is what the model is asked for, with the delimiter before it; of several
    right ones it is the likeliest. None where a task does not say which is right."""
    from lm_eval.api.metrics import bits_per_byte as aggregate

    answers = [answer for task in tasks for answer in right_answers(task)]
    return float(aggregate(answers)) if sum(size for _, size in answers) else None


def right_answers(task):
    """(log-probability in nats, bytes) of the right answer of each example of a task of lm-eval's whose requests are
    answered."""
    examples = collections.defaultdict(list)
    for request in task.instances:
        examples[request.doc_id].append(request)
    for requests in examples.values():
        requests.sort(key=lambda request: request.idx)
        right = [requests[place] for place in right_places(task, requests)]
        if right:
            best = max(right, key=lambda request: request.resps[0][0])
            yield best.resps[0][0], len(best.args[1].encode())


def right_places(task, requests):
    """Which of the requests of an example ask for a right answer, as a list of numbers; none where it is not known."""
    if task.OUTPUT_TYPE == "loglikelihood":
        return [0] if len(requests) == 1 else []
    if task.OUTPUT_TYPE != "multiple_choice":
        return []
    doc = requests[0].doc
    try:
        right = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        choices = task.doc_to_choice(doc)
    except Exception:  # a task with scores of its own need not say it
        return []
    right = right if isinstance(right, list) else [right]
    places = [choices.index(one) if isinstance(one, str) and one in choices else one for one in right]
    return [place for place in places if isinstance(place, int) and 0 <= place < len(choices)]


def report_tasks(results):
    """Text of a line a task about lm-eval's results."""
    lines = []
    for task, metrics in results.items():
        numbers = [f"{name_of(metric)} {value:.4f}" for metric, value in metrics.items() if is_score(metric, value)]
        lines.append(f"{task}: {', '.join(numbers)}")
    return "\n".join(lines)


# -- of a finished model -------------------------------------------------------------------------


def run_tasks(source: ModelSource, names, manager, limit, chat=False):
    """lm-eval's results of its harness on the model as transformers', `with_bits_per_byte`. chat: a question is a
    user's message in the chat template, and each example before it a turn. Raises UserError."""
    import lm_eval

    with tempfile.TemporaryDirectory() as temporary:
        folder = source.path
        if source.state:  # a checkpoint of ours
            folder = Path(temporary) / "model"
            write_model(source, folder)
        if not (folder / "tokenizer.json").exists():
            raise UserError(f"--tasks: {source.path} has no tokenizer that is known, and tasks are made of text")
        if chat:
            check_chat_template(source, folder)
        # several GPUs in the machine share the model
        model = {"pretrained": str(folder), "parallelize": torch.cuda.device_count() > 1}
        settings = {"device": best_device().type, "limit": limit, "log_samples": False}
        settings |= {"apply_chat_template": chat, "fewshot_as_multiturn": chat}
        with faults_named("--tasks"):
            found = lm_eval.simple_evaluate("hf", model, names, task_manager=manager, **settings)
            return with_bits_per_byte(found["results"], manager.loaded)


def check_chat_template(source: ModelSource, folder):
    """Raise UserError if the tokenizer of a folder in transformers' format has no chat template."""
    from transformers import AutoTokenizer

    if AutoTokenizer.from_pretrained(folder).chat_template is None:
        raise UserError(
            f"--chat: the tokenizer of {source.path} has no chat template, and its data holds no conversations; leave "
            "--chat out, or fine-tune it on conversations"
        )


# -- of a model in training: what rank 0 does ----------------------------------------------------


class Requests(NamedTuple):
    """What lm-eval asks for: each request is a row of tokens, of which the last ones are the answer."""

    tokens: np.ndarray  # of all rows, one after the other, (N,) int32
    lengths: np.ndarray  # of the rows, (R,) int64: at most block_size + 1
    answers: np.ndarray  # how many tokens of each row are the answer, (R,) int64: at least 1

    @classmethod
    def of(cls, pairs, block_size):
        """Of pairs of lists of tokens, (context, answer). A row that is too long loses its first tokens, as in
        lm-eval's HFLM."""
        rows = [(context + answer)[-(block_size + 1) :] for context, answer in pairs]
        tokens = np.fromiter(itertools.chain.from_iterable(rows), np.int32)
        return cls(tokens, np.array([len(row) for row in rows]), np.array([len(answer) for _, answer in pairs]))


def make_model(folder, block_size):
    """lm-eval's own model for transformers', HFLM, over a model without weights: it encodes requests, and notes those
    of its first call in `pairs`, [(tokens of the context, of the answer)]. Once there are `answers`, [(log-probability,
    whether it is the likeliest text)], it gives these. folder: as of `write_settings`."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    class Noting(HFLM):
        answers = None

        def loglikelihood(self, requests, disable_tqdm=True):
            self.names = [request.task_name for request in requests]
            return super().loglikelihood(requests, True) if self.answers is None else self.answers

        def _loglikelihood_tokens(self, requests, **_):
            self.pairs = [(context, answer) for _, context, answer in requests]
            for name, ((_, text), _, answer) in zip(self.names, requests, strict=True):
                if not 0 < len(answer) <= block_size:
                    found = f"found an answer of {len(answer)} tokens, {text[:40]!r}"
                    expected = f"expected 1 to {block_size} (model.block_size)"
                    raise UserError(f"{KEY}: {name}: {found}, {expected}; {remedy_of_task(KEY)}")
            return [(-1.0, False)] * len(requests)

        def get_model_info(self):
            return {}

    with torch.device("meta"):
        weightless = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    logging.disable(logging.WARNING)  # it warns that this is no model's name
    try:
        return Noting(pretrained=weightless, tokenizer=AutoTokenizer.from_pretrained(folder))
    finally:
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def own_random_numbers():
    """Whatever random numbers this block draws or seeds, those of the run stay as they are."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


class Harness:
    """lm-eval's side of train.eval_tasks: its tasks with their requests, encoded. On rank 0. Raises UserError."""

    def __init__(self, config):
        train = config.train
        self.limit = train.eval_tasks_limit or None
        self.manager = open_tasks(train.eval_tasks, train.eval_tasks_path, KEY, f"{KEY}_path", TYPES)
        import lm_eval

        data = list(config.data.weights)
        try:
            with tempfile.TemporaryDirectory() as folder:
                write_settings(Path(folder), config.model, data, tokenizer_of(data[0]))
                self.model = make_model(folder, config.model.block_size)
        except UserError as error:
            raise UserError(f"{KEY}: {error}; or set it to []") from None
        with faults_named(KEY), own_random_numbers():
            settings = {"limit": self.limit, "bootstrap_iters": 0, "log_samples": False}
            lm_eval.simple_evaluate(self.model, None, train.eval_tasks, task_manager=self.manager, **settings)
        self.requests = Requests.of(self.model.pairs, config.model.block_size)
        for task in self.manager.loaded["tasks"].values():
            task.build_all_requests = lambda **_: None  # they are there

    def scores(self, answers):
        """`scores_of` these answers, [(log-probability in nats, whether it is the likeliest text)] of all requests."""
        import lm_eval

        loaded = self.manager.loaded
        self.model.answers = answers
        for task in loaded["tasks"].values():
            for request in task.instances:
                request.resps = []
        with own_random_numbers():
            settings = {"limit": self.limit, "bootstrap_iters": 0, "log_samples": False}
            found = lm_eval.evaluate(self.model, loaded, **settings)
        return scores_of(with_bits_per_byte(found["results"], loaded), loaded)

    def description(self):
        tasks = self.manager.loaded["tasks"].items()
        examples = {name: len({request.doc_id for request in task.instances}) for name, task in tasks}
        shown = [f"{name} ({count:,} examples)" for name, count in examples.items()]
        more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
        return f"tasks in training: {', '.join(shown[:8])}{more}; {len(self.requests.lengths):,} requests"


# -- what all ranks do ---------------------------------------------------------------------------


@contextlib.contextmanager
def head_of_answers(model):
    """In this block the output layer computes logits only where a target counts."""

    def choose(head, arguments):
        counts = arguments[1] != IGNORE_INDEX
        return tuple(part[counts][None] for part in arguments[:2])

    hook = getattr(model, "module", model).head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        hook.remove()


def read_rows(requests, chosen):
    """Inputs and targets of these requests, each (rows, T) int64 with T that of the longest; targets that are no part
    of an answer are IGNORE_INDEX. Of no requests a row whose target is of no use."""
    if not len(chosen):
        return torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long)
    ends = requests.lengths.cumsum()
    inputs = torch.zeros(len(chosen), int(requests.lengths[chosen].max()) - 1, dtype=torch.long)
    targets = torch.full_like(inputs, IGNORE_INDEX)
    for row, number in enumerate(chosen):
        length, answer = requests.lengths[number], requests.answers[number]
        tokens = torch.from_numpy(requests.tokens[ends[number] - length : ends[number]].astype(np.int64))
        inputs[row, : length - 1] = tokens[:-1]
        targets[row, length - 1 - answer : length - 1] = tokens[-answer:]
    return inputs, targets


@torch.no_grad()
def answer(model, requests: Requests, rows, device, rank=0, world_size=1, progress=lambda: None):
    """[(log-probability of the answer in nats, whether each of its tokens is the likeliest)] of all requests. The ranks
    share them: so many rows at a time, the longest first. Every rank must call this, and all get all; each does as many
    forward passes (ZeRO-3's gathers are collective). progress: called before each. Leaves the model in training
    mode."""
    order = np.argsort(-requests.lengths, kind="stable")
    found = torch.zeros(len(order), 2, dtype=torch.float64, device=device)
    likeliest = []
    model.eval()
    # not compiled: each batch is as long as its longest request, which saves most of the work
    with (
        loss_of_each_token(model, likeliest) as losses,
        head_of_answers(model),
        torch.compiler.set_stance("force_eager"),
    ):
        for first in range(0, len(order), rows * world_size):
            start = first + rank * rows
            chosen = order[start : start + rows]
            inputs, targets = read_rows(requests, chosen)
            progress()
            losses.clear()
            likeliest.clear()
            model(inputs.to(device), targets.to(device))
            if not len(chosen):
                continue
            numbers = torch.from_numpy(chosen)[(targets != IGNORE_INDEX).nonzero()[:, 0]].to(device)
            found[:, 0].index_add_(0, numbers, -torch.cat(losses).double())
            found[:, 1].index_add_(0, numbers, torch.cat(likeliest).double())
    model.train()
    if world_size > 1:
        distributed.all_reduce(found)
    log_probabilities, hits = found.cpu().unbind(dim=1)
    return list(zip(log_probabilities.tolist(), (hits.numpy() == requests.answers).tolist(), strict=True))


class Tasks:
    """The tasks of train.eval_tasks, on every rank. harness: on rank 0."""

    def __init__(self, requests, harness):
        self.requests = requests
        self.harness = harness

    def scores(self, engine, rows, group, progress):
        """`scores_of` the model on rank 0, {} elsewhere and where lm-eval fails on its answers. Arguments as of
        `answer`. Every rank must call this."""
        answers = answer(engine, self.requests, rows, *group, progress)
        try:
            return self.harness.scores(answers) if self.harness else {}
        except Exception as error:  # of a task's own code; it must not cost the run
            dist.print0(f"{KEY}: no scores: lm-eval ended with {describe(error)}")
            return {}


def open_for_run(config):
    """The Tasks of a run, None without train.eval_tasks. Every rank must call this. Raises SharedError on all where
    rank 0 cannot have one: nothing is written by then."""
    if not config.train.eval_tasks:
        return None
    made = []  # on rank 0

    def make():
        made.append(Harness(config))
        return made[0].requests, made[0].description()

    requests, description = as_rank_0(make)
    dist.print0(description)
    return Tasks(requests, *made or [None])


def score_tasks(run, engine, tasks, step):
    """Score the model on train.eval_tasks, log it, draw the run's picture. run: a Run. Every rank must call this."""
    began = time.perf_counter()
    with run.watchdog.during("evaluation"):
        scores = tasks.scores(engine, run.config.train.micro_batch_size, run.group, run.watchdog.turn)
        run.record_tasks(step, scores, time.perf_counter() - began)
        run.draw_loss()

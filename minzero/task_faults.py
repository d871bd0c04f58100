"""Faults of lm-eval's tasks and their yaml files, each as one line that names the task."""

import contextlib
from pathlib import Path

from minzero.errors import UserError, describe


def fault_of_yaml(path, one_task=False):
    """What keeps a yaml file from holding a task or a group of tasks, in words, or None. one_task: a group is not
    taken."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)  # lm-eval's own
    try:
        content = yaml.load(Path(path).read_bytes(), Loader)
    except (yaml.YAMLError, OSError, ValueError) as error:
        return describe(error)
    if one_task and isinstance(content, dict) and isinstance(content.get("task"), list):
        return "found a group of tasks, expected one task; give its name, and its folder as that of further tasks"
    found = {type(None): "nothing", list: "a list"}.get(type(content), "a single value")
    return None if isinstance(content, dict) else f"found {found}, expected keys and values of a task"


@contextlib.contextmanager
def faults_named(flag, name=None):
    """Exceptions of this block, which are of many classes (no network, a broken task file, a task that this model
    cannot do), as a UserError. name: of the task, where it is known."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        line = f"lm-eval ended with {describe(error)}"
        raise UserError(f"{flag}: {name}: {line}; {remedy_of_task(flag)}" if name else f"{flag}: {line}") from None


def remedy_of_task(flag):
    return f"leave it out of {flag}, or correct its file or data"


def build_requests(flag, name, task, build, types, **settings):
    """Let lm-eval build the requests of a task. Raises UserError for what it does not say in words, and with `types`
    for examples that it only scores as wrong."""
    shots, shown = task.config.num_fewshot or 0, None
    try:
        with faults_named(flag, name):
            build(**settings)
    except UserError:
        with contextlib.suppress(Exception):  # the examples may be the fault
            shown = len(list(task.fewshot_docs()))
        if shown is None or shots < shown:
            raise
        fault = f"found num_fewshot {shots} with {shown} examples to show, expected fewer than these"
        raise UserError(f"{flag}: {name}: {fault}; {remedy_of_task(flag)}") from None
    if types and task.OUTPUT_TYPE == "multiple_choice":
        for number, doc in {request.doc_id: request.doc for request in task.instances}.items():
            with faults_named(flag, name):
                fault = fault_of_example(task, doc)
            if fault:
                raise UserError(f"{flag}: {name}: example {number}: {fault}; {remedy_of_task(flag)}")


def fault_of_example(task, doc):
    """What is wrong with the answers of an example with several, in words, or None. A task with scores of its own need
    not say which is right."""
    choices = task.doc_to_choice(doc)
    if not task.multiple_input and "" in choices:
        return f"found an empty answer, choice {choices.index('')}, expected a text"
    if callable(task.config.process_results):
        return None
    right = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    for place in right if isinstance(right, list) else [right]:
        if isinstance(place, str) and place not in choices and place.lstrip("-").isdigit():
            place = int(place)
        if isinstance(place, int) and not 0 <= place < len(choices):
            return f"found label {place} with {len(choices)} choices, expected 0 to {len(choices) - 1}"
    return None

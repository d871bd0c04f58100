"""A checkpoint as a folder that transformers 4 and 5, vLLM, llama.cpp's converter and lm-eval load.

    python export.py out/tiny hf/tiny [--checkpoint best|latest|STEP] [--dtype float32|bfloat16|float16]

GPT-2's settings become its GPT2LMHeadModel, Llama's its LlamaForCausalLM, and GPT-2's with rotary positions, as
min-LLM's, its GPTNeoXForCausalLM. AutoModelForCausalLM and AutoTokenizer load the folder. The way back is
`--train.init_from`, which starts a run from such a folder, ours or published.

Of a run that trained adapters (lora.rank) these alone are written, as PEFT loads them; with --merge the whole model,
with the adapters added to its weights.
"""

from minzero.commands import begin

if __name__ == "__main__":
    begin()

from minzero.commands import run_command
from minzero.errors import UserError
from minzero.files import check_can_write
from minzero.flags import FlagParser, a_checkpoint, a_model, a_path


def main(arguments):
    parser = FlagParser(__doc__)
    what = "a run's folder, as out/tiny, a checkpoint in it, or an address of train.copy_to"
    parser.add_argument("path", type=a_model, help=what)
    parser.add_argument("folder", type=a_path, help="where to write; must not be there yet, or be empty")
    parser.add_argument("--checkpoint", type=a_checkpoint, default="best", help="best, latest or a step")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--merge", action="store_true", help="add a run's adapters to the weights of its model")
    args = parser.parse_args(arguments)
    check_can_write("folder", args.folder, folder=True)
    # after the flags, so that --help and a wrong flag are answered at once: these take seconds to import
    from minzero.hf.peft import write_adapter
    from minzero.hf.write import write_model
    from minzero.trained import open_checkpoint, with_checkpoint

    def write(checkpoint):
        source = open_checkpoint(checkpoint)
        has_adapters = bool(source.config.lora.rank)
        if args.merge and not has_adapters:
            raise UserError(f"--merge: {source.description} has no adapters (lora.rank); leave it out")
        as_adapter = has_adapters and not args.merge
        made = (write_adapter if as_adapter else write_model)(source, args.folder, args.dtype)
        return f"{source.description} -> {args.folder}: {made}"

    print(with_checkpoint(args.path, args.checkpoint, write))


if __name__ == "__main__":
    run_command(main)

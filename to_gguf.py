"""An exported folder as a GGUF file, which llama.cpp and all that is built on it read.

    python export.py out/tiny hf/tiny
    pip download --no-deps --no-binary :all: llama-cpp-python && tar xzf llama_cpp_python-*.tar.gz
    python to_gguf.py hf/tiny tiny.gguf --llama_cpp llama_cpp_python-*/vendor/llama.cpp [--outtype q8_0]

llama.cpp's own converter, convert_hf_to_gguf.py, does the work; minzero/hf/gguf.py tells it what it cannot know.
"""

from minzero.commands import begin

if __name__ == "__main__":
    begin()

from minzero.commands import run_command
from minzero.flags import FlagParser, a_path


def main(arguments):
    parser = FlagParser(__doc__)
    parser.add_argument("folder", type=a_path, help="of export.py's")
    parser.add_argument("out", type=a_path, help="file to write, as tiny.gguf; must not be there yet")
    parser.add_argument("--llama_cpp", type=a_path, default="llama.cpp", help="folder with convert_hf_to_gguf.py")
    parser.add_argument("--outtype", choices=["f32", "bf16", "f16", "q8_0"], help="default: as the folder's weights")
    args = parser.parse_args(arguments)
    # after the flags, so that --help and a wrong flag are answered at once: these take seconds to import
    from minzero.hf.gguf import convert

    print(f"{args.folder} -> {args.out}: {convert(args.folder, args.out, args.llama_cpp, args.outtype)}")


if __name__ == "__main__":
    run_command(main)

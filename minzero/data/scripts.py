"""The command of every data/<name>/prepare.py: a source, and the defaults of its flags.

    script = PrepareScript(__file__, __doc__, hub("wikimedia/wikipedia", "20231101.simple"), val_fraction=0.005)

Imports next to nothing before it is run, so that a script calls `begin` before the imports that take seconds. The
functions here that return a source take the flags (see pipeline.options).
"""

import os

from minzero.commands import begin
from minzero.errors import UserError


class PrepareScript:
    """A prepare script.

    file: the script's __file__; its folder is the default of --out. about: its docstring, printed by --help.
    documents: args -> an iterable of (key, text). learn_tokenizer: (documents, args) -> a tokenizer as
    `save_tokenizer` takes it, used without --tokenizer; None: the default is gpt2. side, loss_mask: see
    `pipeline.prepare`. column: the default of --column. defaults: of val_fraction, and of further flags."""

    def __init__(
        self, file, about, documents, learn_tokenizer=None, side=None, loss_mask=False, column="text", **defaults
    ):
        self.folder = os.path.dirname(file)
        self.about = about
        self.documents = documents
        self.learn_tokenizer = learn_tokenizer
        self.side = side
        self.loss_mask = loss_mask
        self.column = column
        self.defaults = defaults

    def run(self):
        """Run the script as a command."""
        begin()
        from minzero.commands import run_command

        run_command(self.main)

    def main(self, arguments):
        from minzero.data import pipeline

        default = "gpt2" if self.learn_tokenizer is None else None
        parser = pipeline.options(self.about, self.folder, tokenizer=default, **self.defaults)
        parser.set_defaults(column=self.column)
        self.add_flags(parser)
        args = parser.parse_args(arguments)
        documents = self.documents(args)
        tokenizer = args.tokenizer
        if not tokenizer and self.learn_tokenizer is not None:
            tokenizer = self.own_tokenizer(documents, args)
        pipeline.prepare(documents, tokenizer, args, self.side, self.loss_mask)

    def add_flags(self, parser):
        """Further flags, of a kind of script."""

    def own_tokenizer(self, documents, args):
        """The tokenizer of this data set alone, beside the shards; learned unless it is there."""
        from minzero.data.learn_tokenizer import own_tokenizer

        vocab_size = getattr(args, "vocab_size", None)
        return own_tokenizer(args.out / "tokenizer", lambda: self.learn_tokenizer(documents, args), vocab_size)


class ConversationScript(PrepareScript):
    """A prepare script for conversations. documents: args -> a source of rows (each a dict) or of lists of messages.
    tokenizer: the default of --tokenizer, a path relative to the script's folder; None: gpt2."""

    def __init__(self, file, about, documents, tokenizer=None, column="messages", **defaults):
        super().__init__(file, about, self.conversations, loss_mask=True, column=column, **defaults)
        self.rows = documents
        self.tokenizer = tokenizer

    def add_flags(self, parser, **more):
        from minzero.data.conversations import add_flags

        add_flags(parser, **more)
        if self.tokenizer:
            parser.set_defaults(tokenizer=os.path.relpath(os.path.join(self.folder, self.tokenizer)))

    def conversations(self, args):
        from minzero.data.chat_formats import LISTS
        from minzero.data.conversations import Conversations

        template = self.template(args)
        named = args.column != self.column
        columns = (args.column,) if named else (args.column, *LISTS)
        return Conversations(self.rows(args), template, args.format, columns, args.max_tokens, args.learn == "all")

    def template(self, args):
        """The ChatTemplate that --chat_template names, or None."""
        from minzero.data.conversations import open_template
        from minzero.data.tokenizer import load_tokenizer

        # `main` takes it from here: a tokenizer is not loaded twice
        args.tokenizer = load_tokenizer(args.tokenizer)
        return open_template(args.chat_template, args.tokenizer)


class PreferenceScript(ConversationScript):
    """A prepare script for pairs of answers. documents: args -> a source of rows, each a dict."""

    def add_flags(self, parser):
        super().add_flags(parser, formats=None)

    def conversations(self, args):
        from minzero.data.preferences import Preferences

        return Preferences(self.rows(args), self.template(args), args.max_tokens)


# -- sources -------------------------------------------------------------------------------------


def hub(name, config=None, **more):
    """A data set of the Hugging Face hub, or its local copy: --input. more: as `sources.open_source` takes it."""

    def documents(args):
        from minzero.data.sources import open_source

        return open_source(args, name, config, **more)

    return documents


def text_in_two(address):
    """The text file at a URL, or --input, as two documents: its beginning for training, its end for validation."""

    def documents(args):
        from minzero.data.sources import text_in_two

        return text_in_two(args, address)

    return documents


tiny_shakespeare = text_in_two(
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)


def local_files(args):
    """The files of --input."""
    from minzero.data.local_files import Files

    if not args.input:
        raise UserError("--input: none given; name your files, folders or globs: --input 'books/**/*.txt'")
    return Files(args.input, args.column)


def standard_library(args):
    """The source files of Python's standard library, of this Python or in the folders of --input."""
    from minzero.data.sources import StandardLibrary

    return StandardLibrary(args.input)


def installed_python(args):
    """The source files of this Python's standard library and installed packages, or of the folders of --input."""
    import sysconfig

    from minzero.data.sources import StandardLibrary

    return StandardLibrary(args.input or [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")])


def docstrings(args):
    """Questions and answers about Python's standard library, of this Python or in the folders of --input."""
    from minzero.data.docstrings import Docstrings

    return Docstrings(args.input)


def docstring_pairs(args):
    """Questions about Python's standard library, each with an answer of one sentence, and one that goes on."""
    from minzero.data.docstrings import DocstringPairs

    return DocstringPairs(args.input)


# -- tokenizers of a data set's own --------------------------------------------------------------


def learn_bpe(documents, args):
    """A byte-level BPE of --vocab_size ids."""
    from minzero.data.learn_tokenizer import train_tokenizer

    return train_tokenizer((text for _, text in documents), args.vocab_size)


def learn_characters(documents, args):
    """An id for each character."""
    from minzero.data.learn_tokenizer import characters

    return characters("".join(text for _, text in documents))

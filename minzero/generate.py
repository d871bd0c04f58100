"""Text from a trained model, token by token, by transformers' `generate`."""

import functools
import sys

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutput

from minzero.data.chat_templates import ChatTemplate, TemplateEncoder
from minzero.data.conversations import CHAT_TEMPLATE, base_template
from minzero.data.meta import stops_of
from minzero.data.tokenizer import tokens_around
from minzero.errors import UserError, describe
from minzero.files import read_json
from minzero.hf.comparison import build_transformers, check_expressible
from minzero.trained import ModelSource, best_device, load_model, open_tokenizer

# -- the model -----------------------------------------------------------------------------------


class NoCacheWrapper(PreTrainedModel, GenerationMixin):
    """A model of ours that is none of transformers' families, as far as generating needs it to be one: it goes
    through the whole context for every token."""

    config_class = PreTrainedConfig

    def __init__(self, model):
        super().__init__(PreTrainedConfig())
        self.model = model
        self.generation_config = GenerationConfig(use_cache=False)

    def forward(self, input_ids, attention_mask=None, return_dict=True):
        return CausalLMOutput(logits=self.model(input_ids))

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return {"input_ids": input_ids}  # all of them: nothing is cached


def load_generator(source: ModelSource):
    """The model in float32 as one that transformers' `generate` takes, on the fastest device here: with a cache if it
    is one of transformers' families in every setting and parameter, else as it is."""
    try:
        check_expressible(source.model)
    except UserError:
        return NoCacheWrapper(load_model(source)).eval()
    model = build_transformers(source.model, source.load())
    if source.state is None:  # a folder in transformers' format says how it wants to be continued
        model.generation_config = read_generation_config(source.path)
    return model.to(best_device()).eval()


def read_generation_config(folder):
    """The generation settings of a folder in transformers' format, as `from_pretrained` reads them. Raises
    UserError."""
    path = folder / "generation_config.json"
    path = path if path.exists() else folder / "config.json"
    read_json(path)
    try:
        return GenerationConfig.from_pretrained(folder, path.name, _from_model_config=path.name == "config.json")
    except Exception as error:  # of many classes, some of them libraries' own
        raise UserError(f"{path}: {describe(error)}; expected settings of `generate`") from None


# -- the terminal --------------------------------------------------------------------------------


class Terminal(BaseStreamer):
    """Prints tokens as they come, in whole characters: one may span several tokens. echo: the prompt as well."""

    def __init__(self, tokenizer, prompt, echo=False):
        self.tokenizer = tokenizer
        self.tokens = list(prompt)
        self.prompt_follows = True
        # the clean-up of English text, as " ." to ".", may change the last characters once the next have come
        self.held_back = 8 if getattr(tokenizer, "clean_up_tokenization_spaces", False) else 0
        self.prompt_length = len(self.text())
        self.printed = 0 if echo else self.prompt_length
        self.write(self.text())

    def text(self):
        return self.tokenizer.decode(self.tokens, skip_special_tokens=True)

    def answer(self):
        """The text of what was written after the prompt."""
        return self.text()[self.prompt_length :]

    def put(self, value):
        if self.prompt_follows:  # `generate` hands it over first
            self.prompt_follows = False
            return
        self.tokens += value.tolist()
        text = self.text()  # all of it: what a token stands for depends on those before it
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self.write(text)

    def end(self):
        self.prompt_follows = True

    def finish(self):
        """Print bytes that never became a character, and a line end."""
        self.held_back = 0
        self.write(self.text() + "\n")

    def write(self, text):
        until = max(self.printed, len(text) - self.held_back)
        sys.stdout.write(text[self.printed : until])
        sys.stdout.flush()
        self.printed = until


# -- generating ----------------------------------------------------------------------------------


def generate(model, tokens, max_new_tokens, block_size, streamer, **settings):
    """Generate up to max_new_tokens after `tokens`, a list of ids, at least one. Returns them, with the end of text
    if that came first. The context never grows past block_size: where it is full, its last half stays.
    settings: of transformers' `generate`, over those that the model comes with."""
    own = model.generation_config
    end = settings.get("eos_token_id", own.eos_token_id)  # one id, several or None
    ends = {end} if isinstance(end, int) else set(end or ())
    beams = (own.num_beams or 1) > 1  # which cannot be streamed
    if not beams:
        settings["streamer"] = streamer
    written = []
    while len(written) < max_new_tokens and not ends.intersection(written[-1:]):
        context = (tokens + written)[-block_size:]
        if written and len(context) == block_size:
            context = context[-max(1, block_size // 2) :]
        # the last token of a context at block_size is predicted, not read
        room = min(max_new_tokens - len(written), block_size - len(context) + 1)
        inputs = torch.tensor([context], device=model.device)
        output = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=room, **settings)
        written += output[0, len(context) :].tolist()
    if beams:
        streamer.put(inputs)
        streamer.put(torch.tensor(written))
    return written


class Writer:
    """A trained model that writes to the terminal. data: a folder made with the model's tokenizer, in place of the
    run's own; chat: prompts are messages of a user, in one conversation; temperature: 0 for the most likely token.
    Raises UserError."""

    def __init__(self, source: ModelSource, data=None, chat=False, temperature=0.8, top_k=50, top_p=1.0):
        self.source, self.chat = source, chat
        self.history = []  # the messages of the conversation so far
        self.model = load_generator(source)
        self.tokenizer, self.tokenizer_of_data = open_tokenizer(source, data)
        self.settings = {"do_sample": temperature > 0}
        if temperature > 0:
            self.settings |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        if self.tokenizer_of_data:
            self.settings |= {
                "eos_token_id": stops_of(self.tokenizer_of_data, [data] if data else source.data) or None,
                "pad_token_id": self.tokenizer_of_data.pad,
            }
            # embeddings are often made wider than the vocabulary: nobody could read those tokens
            unknown = sorted(set(range(source.model.vocab_size)) - set(self.tokenizer.get_vocab().values()))
            self.settings |= {"suppress_tokens": unknown} if unknown else {}
            self.start = self.tokenizer_of_data.start_of_document
        else:
            start = self.model.generation_config.bos_token_id
            self.start = self.tokenizer.bos_token_id if start is None else start  # of a document
        self.end = tokens_around(self.tokenizer)[1]  # put after each text, as T5's does

    def encode(self, prompt, max_new_tokens=1):
        """The ids of a text or, in a chat, of the conversation with a user's next message, as transformers' own code
        gives them. max_new_tokens: see `encode_message`. Raises UserError for text that the tokenizer cannot encode."""
        if odd := [
            char for char in prompt if "\ud800" <= char <= "\udfff"
        ]:  # Python's stand-in for a byte that is not UTF-8
            raise UserError(f"prompt: found {odd[0]!r} in it, expected UTF-8 text")
        if self.tokenizer_of_data and (missing := self.tokenizer_of_data.missing_characters(prompt)):
            raise UserError(f"prompt: found {missing[0]!r}, expected characters that the model's tokenizer has")
        if self.chat:
            return self.encode_message(prompt, max_new_tokens)
        tokens = self.tokenizer(prompt, verbose=False)["input_ids"]
        tokens = tokens[: len(tokens) - len(self.end)]  # a text that is to be continued has no end
        if not tokens and self.start is None:
            raise UserError(
                "prompt: an empty prompt needs a token for the start of a document, which this tokenizer does not have"
            )
        return tokens or [self.start]

    @functools.cached_property
    def template(self):
        """(ChatTemplate, TemplateEncoder) of the model's tokenizer."""
        tokenizer = self.tokenizer
        if not tokenizer.chat_template:
            print("the tokenizer has no chat template; the questions take this project's form", file=sys.stderr)
            tokenizer.chat_template = CHAT_TEMPLATE
        text = base_template(tokenizer, str(self.source.path))
        if text == CHAT_TEMPLATE and tokenizer.bos_token is None:
            raise UserError(
                "prompt: --chat needs a token for the start of a document, which this tokenizer does not have"
            )
        if not tokenizer.is_fast:
            raise UserError("prompt: --chat needs a tokenizer with a tokenizer.json, which this model does not have")
        return ChatTemplate(tokenizer, text, "its own"), TemplateEncoder(tokenizer.backend_tokenizer.to_str())

    def encode_message(self, prompt, max_new_tokens):
        """The conversation so far, as long as it leaves room in the context for max_new_tokens, at most half of it:
        else the oldest turns are forgotten."""
        template, encoder = self.template
        room = self.source.model.block_size - min(max_new_tokens, self.source.model.block_size // 2)
        while True:
            asked = [*self.history, {"role": "user", "content": prompt}]
            tokens = encoder.encode(template.prompt(asked)).ids.tolist()
            if len(tokens) <= room or not self.history:
                return tokens
            del self.history[:2]  # a question and its answer

    def write(self, prompt, max_new_tokens=200, samples=1, seed=1337):
        """Print a continuation of a prompt, or several with `samples`, each with a seed of its own. A conversation goes
        on from the last of them."""
        tokens = self.encode(prompt, max_new_tokens)
        block_size = self.source.model.block_size
        if len(tokens) > block_size:
            print(f"the model sees the last {block_size} of the prompt's {len(tokens)} tokens", file=sys.stderr)
        for number in range(samples):
            if number:
                print("-" * 40)
            torch.manual_seed(seed + number)
            terminal = Terminal(self.tokenizer, tokens, echo=not self.chat)
            try:
                generate(self.model, tokens, max_new_tokens, block_size, terminal, **self.settings)
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                path = self.source.path
                raise UserError(f"{path}: the model's predictions are not finite; are its weights?") from None
            terminal.finish()
        if self.chat:
            answer = {"role": "assistant", "content": terminal.answer()}
            self.history += [{"role": "user", "content": prompt}, answer]

"""The model as the modules that DeepSpeed's hooks see, with the bytes each allocates in forward and backward pass.

It follows model.py call by call; the engine's replay (replay.py, stage3.py) walks through it. Sizes of tensors are in
bytes, sizes of weights in elements.
"""

from dataclasses import dataclass, field

from minzero.sizes import loss_chunk_tokens, padded_vocab_size


@dataclass(eq=False)
class Weight:
    """A parameter, by its number of elements."""

    size: int
    decayed: bool = True  # its group of the optimizer: with weight decay or without
    uses: int = 1  # how many modules share it


@dataclass(eq=False)
class Module:
    """Memory of one call, in bytes. A call without hooks is a function, not a module."""

    name: str
    weights: list = field(default_factory=list)
    inside: list = field(default_factory=list)  # the calls it makes, in order
    kept: int = 0  # allocated here and saved for the backward pass
    forward: int = 0  # temporary, in the forward pass
    backward: int = 0  # temporary, in the backward pass
    part: str = "activations"
    hooked: bool = True
    own: bool = False  # whether its own backward pass reads what it kept too, not only that of the next call
    leaf: bool = False  # for the hooks, one module with all that is inside it
    recomputed: bool = False
    cached: int = 0  # of the bytes kept, those that are kept even if the block is recomputed
    output: int = 0  # of a recomputed block: the bytes of its output, which is the next one's input


def calls_of(module):
    """A module and all inside it, in the order of the forward pass."""
    calls = [module]
    for child in module.inside:
        calls += calls_of(child)
    return calls


def weights_of(module):
    """The weights of a module and all inside it, each once, in the order in which they are made."""
    return list(dict.fromkeys(weight for call in calls_of(module) for weight in call.weights))


def trace(settings):
    """The model of these Settings as a tree of Modules, in the order of the forward pass."""
    return Trace(settings).model()


class Trace:
    """Builds the tree of Modules; one method for each kind of them."""

    def __init__(self, settings):
        self.settings = settings
        self.width = settings.model.n_embd
        # a (tokens, n_embd) tensor: of the residual stream, and as matrix products read and write it
        self.stream = settings.tokens * self.width * settings.bytes
        self.narrow = settings.tokens * self.width * settings.product_bytes

    def model(self):
        s, model = self.settings, self.settings.model
        embedding = Weight(model.vocab_size * self.width, uses=2 if model.tie_embeddings else 1)
        head_weight = embedding if model.tie_embeddings else Weight(model.vocab_size * self.width)
        modules = [Module("token_embedding", [embedding], forward=self.stream)]
        if model.position == "learned":
            positions = Weight(model.block_size * self.width)
            modules.append(Module("position_embedding", [positions], forward=s.length * self.width * s.bytes))
        modules.append(Module("sum", kept=self.stream + self.dropout_mask(), hooked=False))
        modules += [self.block(number) for number in range(model.n_layer)]
        modules += self.norm_and_loss(head_weight)
        return Module("model", inside=modules)

    def norm_and_loss(self, weight):
        """The modules after the last block. The head keeps gradients and not its input, so the norm's output is
        temporary."""
        norm = self.norm("final_norm")
        norm.kept -= self.stream
        norm.forward = self.stream
        return [norm, self.chunked_head(weight)]

    def dropout_mask(self):
        """Bytes of a dropout's mask over the stream: one for each element."""
        return self.settings.tokens * self.width if self.settings.model.dropout else 0

    def own_gradient(self):
        """Bytes of the gradient of what is added to the stream: none beside the stream's own without dropout."""
        return self.narrow if self.settings.model.dropout else 0

    def linear(self, name, fan_in, fan_out, **sizes):
        weights = [Weight(fan_in * fan_out)]
        if self.settings.model.bias:
            weights.append(Weight(fan_out, decayed=False))
        return Module(name, weights, **sizes)

    def norm(self, name):
        # a layernorm keeps mean and 1 / deviation of each token in float32, an rmsnorm one number
        layernorm = self.settings.model.norm == "layernorm"
        weights = [Weight(self.width, decayed=False)]
        if layernorm and self.settings.model.bias:
            weights.append(Weight(self.width, decayed=False))
        statistics = self.settings.tokens * 4 * (2 if layernorm else 1)
        return Module(name, weights, kept=self.stream + statistics, backward=2 * self.stream)

    def block(self, number):
        s, inside = self.settings, []
        for part in (self.attention(), self.mlp()):
            inside += [self.norm("norm"), part, Module("sum", kept=self.stream, hooked=False)]
        block = Module(f"block {number}", inside=inside, output=self.stream)
        every, selective, budget = s.recomputation
        by_budget = budget < 1 and s.compiled  # only the compiler obeys it
        block.recomputed = by_budget or (every > 0 and number % every == 0)
        block.leaf = s.stage == 3 and self.whole_blocks()
        calls = calls_of(block)[1:]
        if block.leaf:
            for call in calls:
                call.hooked = False
        if block.recomputed and not selective:
            for call in calls[:-1]:  # the last one's is the block's output
                call.cached = int(budget * call.kept) if by_budget else 0
        return block

    def whole_blocks(self):
        """Whether a block is one module for ZeRO-3's hooks, as engine.py makes it."""
        return True

    def attention(self):
        s = self.settings
        kv_width = s.model.kv_heads * (self.width // s.model.n_head)  # of all keys, and of all values
        inside = self.projections(kv_width)
        if s.model.position == "rotary":
            rotated = s.tokens * (self.width + kv_width) * s.product_bytes
            float_queries = 2 * s.tokens * self.width * 4  # in float32, before and after the rotation
            inside.append(Module("rotate", kept=rotated, forward=float_queries, backward=rotated, hooked=False))
        inside += self.scores(kv_width)
        sizes = {"kept": self.dropout_mask(), "forward": self.narrow, "backward": self.narrow + self.own_gradient()}
        inside.append(self.linear("proj", self.width, self.width, **sizes))
        return Module("attention", inside=inside)

    def projections(self, kv_width):
        """Queries, keys and values by one product."""
        fan_out = self.width + 2 * kv_width
        qkv = self.settings.tokens * fan_out * self.settings.product_bytes
        return [self.linear("qkv", self.width, fan_out, kept=qkv, cached=qkv, backward=qkv + self.narrow)]

    def scores(self, kv_width):
        """Flash attention: no (T, T) matrix is kept."""
        s = self.settings
        inputs = s.tokens * (self.width + 2 * kv_width) * s.product_bytes
        log_sums = s.tokens * s.model.n_head * 4
        # its output has the layout of its input; after rotary positions that is not proj's, and is copied once more
        outputs = 2 if s.model.position == "rotary" else 1
        sizes = {"kept": self.narrow * outputs + log_sums, "cached": self.narrow + log_sums}
        return [Module("attend", **sizes, backward=self.narrow + inputs, own=True, hooked=False)]

    def mlp(self):
        s, narrow = self.settings, self.narrow
        # kept: up's output, which the activation reads, the activation's, which down reads, and silu(gate) of swiglu,
        # which the compiler computes again
        inner = s.model.mlp_width
        gated = s.model.mlp == "swiglu"
        fan_out = inner * (2 if gated else 1)
        up = s.tokens * fan_out * s.product_bytes
        hidden = s.tokens * inner * s.product_bytes
        activation = {"kept": up, "backward": hidden + up}
        if gated and s.compiled:
            activation["kept"] = hidden
        elif gated:
            activation["backward"] = 2 * up  # of gate and value, and both once more in one tensor
        down = {"forward": narrow, "kept": self.dropout_mask(), "backward": hidden + self.own_gradient()}
        inside = [
            self.linear("up", self.width, fan_out, kept=up, cached=up, backward=up + narrow),
            Module("activate", **activation, hooked=False),
            self.linear("down", inner, self.width, **down),
        ]
        return Module("mlp", inside=inside)

    def chunked_head(self, weight, on_gpu=True):
        """model.py's Head and loss: the logits of a chunk at a time, and gradients in the forward pass."""
        s = self.settings
        chunk = min(loss_chunk_tokens(s.model.vocab_size, on_gpu), s.tokens)
        columns = padded_vocab_size(s.model.vocab_size, on_gpu)
        logits = chunk * columns * s.bytes
        product = columns * self.width * s.bytes  # a chunk's part of the weight's gradient
        probabilities = 0
        if not s.compiled:
            # log_softmax copies 16-bit logits into float32, but not those in fp16 on a GPU
            copied = s.bytes < 4 and (s.precision == "bf16" or not on_gpu)
            probabilities = chunk * columns * (8 if copied else 4)
        if s.tokens > chunk:  # products are summed in float32
            sums = product * (2 if s.bytes < 4 else 1)
            kept = sums
            most = logits + max(probabilities, sums)
        else:  # the probabilities are freed before the only product is made, which is kept
            kept = product
            most = logits + max(probabilities - product, 0)
        padded = product if columns > s.model.vocab_size else 0
        sizes = {"kept": self.narrow + kept, "forward": self.stream + padded + most}
        return Module("head", [weight], **sizes, part="logits", own=True)

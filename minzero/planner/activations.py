"""The model as the modules that DeepSpeed's hooks see, with the bytes each allocates in forward and backward pass.

It follows model.py call by call; the engine's replay (replay.py, stage3.py) walks through it. Sizes of tensors are in
bytes, sizes of weights in elements.
"""

import itertools
from dataclasses import dataclass, field

from minzero.adapters import inputs_of, rows_of_parts
from minzero.sizes import loss_chunk_tokens, padded_vocab_size


@dataclass(eq=False)
class Weight:
    """A parameter, by its number of elements."""

    size: int
    decayed: bool = True  # its group of the optimizer: with weight decay or without
    uses: int = 1  # how many modules share it
    trained: bool = True  # or frozen: it has no gradient and no optimizer
    number: int = field(default_factory=itertools.count().__next__)  # in the order in which the weights are made


@dataclass(eq=False)
class Module:
    """Memory of one call, in bytes. A call without hooks is a function, not a module."""

    name: str
    weights: list = field(default_factory=list)
    inside: list = field(default_factory=list)  # the calls it makes, in order
    kept: int = 0  # allocated here and saved for the backward pass
    forward: int = 0  # temporary, in the forward pass
    backward: int = 0  # temporary, in the backward pass
    leaving: int = 0  # of these, what is there until its weights' gradients are reduced, if its input stays as well
    part: str = "activations"
    hooked: bool = True
    own: bool = False  # whether its own backward pass reads what it kept too, not only that of the next call
    leaf: bool = False  # for the hooks, one module with all that is inside it
    recomputed: bool = False
    cached: int = 0  # of the bytes kept, those that are kept even if the block is recomputed
    named: int = 0  # bytes of its output that have a name in the code around it, and so stay until that ends
    packed: int = 0  # elements of a weight in 4 bits, which no hook sees
    output: int = 0  # of a recomputed block: the bytes of its output, which is the next one's input


def calls_of(module):
    """A module and all inside it, in the order of the forward pass."""
    calls = [module]
    for child in module.inside:
        calls += calls_of(child)
    return calls


def weights_of(module):
    """The weights of a module and all inside it, each once, in the order in which they are made."""
    weights = {weight for call in calls_of(module) for weight in call.weights}
    return sorted(weights, key=lambda weight: weight.number)


def without_output(module, size):
    """A call whose output, of this many bytes, nothing reads in the backward pass: it is temporary."""
    module.kept -= size
    module.forward += size
    return module


def trace(settings):
    """The model of these Settings as a tree of Modules, in the order of the forward pass."""
    return Trace(settings).model()


class Trace:
    """Builds the tree of Modules; one method for each kind of them."""

    def __init__(self, settings):
        self.settings = settings
        model = settings.model
        self.width = model.n_embd
        # channels of all queries, and of all keys, which are as many as those of all values
        self.query_width = model.n_head * model.head_size
        self.kv_width = model.kv_heads * model.head_size
        # a (tokens, n_embd) tensor: of the residual stream, and as matrix products read and write it
        self.stream = settings.tokens * self.width * settings.bytes
        self.narrow = settings.tokens * self.width * settings.product_bytes

    def model(self):
        s, model = self.settings, self.settings.model
        embedding = Weight(model.vocab_size * self.width, uses=2 if model.tie_embeddings else 1)
        modules = [Module("token_embedding", [embedding], forward=self.stream)]
        if model.position == "learned":
            positions = Weight(model.block_size * self.width)
            modules.append(Module("position_embedding", [positions], forward=s.length * self.width * s.bytes))
        modules.append(Module("sum", kept=self.stream + self.dropout_mask(), hooked=False))
        modules += [self.block(number) for number in range(model.n_layer)]
        norm = self.norm("final_norm")  # made before the head's weight
        head_weight = embedding if model.tie_embeddings else Weight(model.vocab_size * self.width)
        modules += self.norm_and_loss(norm, head_weight)
        model = Module("model", inside=modules)
        if s.adapters:
            for call in calls_of(model):
                if call.name != "adapter":
                    for weight in call.weights:
                        weight.trained = False
        return model

    def norm_and_loss(self, norm, weight):
        """The modules after the last block. The head keeps gradients and not its input, so the norm's output is
        temporary."""
        return [without_output(norm, self.stream), self.chunked_head(weight)]

    def dropout_mask(self):
        """Bytes of a dropout's mask over the stream: one for each element."""
        return self.settings.tokens * self.width if self.settings.model.dropout else 0

    def own_gradient(self):
        """Bytes of the gradient of what is added to the stream: none beside the stream's own without dropout."""
        return self.narrow if self.settings.model.dropout else 0

    def linear(self, name, fan_in, fan_out, biased=None, matrices=1, **sizes):
        """biased: whether it has a bias; None: as model.bias says. matrices: how many lie in one weight."""
        size = fan_in * fan_out * matrices
        weights = [] if self.settings.packed else [Weight(size)]
        if self.settings.model.bias if biased is None else biased:
            weights.append(Weight(fan_out, decayed=False))
        module = Module(name, weights, **sizes)
        if self.settings.packed:  # unpacked for the moment of each product
            module.packed = size
            module.forward += size * self.settings.product_bytes
            module.backward += size * self.settings.product_bytes
        return module

    def norm(self, name, width=None, rows=None):
        """A norm over `width` channels, n_embd if it is not given, of as many rows, one a token if not given. It reads
        what another call kept, and keeps its output, which the next call reads."""
        width, rows = width or self.width, rows or self.settings.tokens
        # a layernorm keeps mean and 1 / deviation of each row in float32, an rmsnorm one number
        layernorm = self.settings.model.norm == "layernorm"
        weights = [Weight(width, decayed=False)]
        if layernorm and self.settings.model.bias:
            weights.append(Weight(width, decayed=False))
        statistics = rows * 4 * (2 if layernorm else 1)
        output = rows * width * self.settings.bytes
        return Module(name, weights, kept=output + statistics, backward=2 * output)

    def block(self, number):
        s = self.settings
        parts = [[self.norm("norm"), self.attention(number)], [self.norm("norm"), self.mlp()]]
        parts[1][0].named = self.stream
        for (norm, _), matrix in zip(parts, ("qkv", "up"), strict=True):
            if not self.keeps_input(matrix):
                without_output(norm, self.stream)
        if s.model.norm_position == "after":
            parts = [self.norm_after(*part) for part in parts]
        sums = [Module("sum", kept=self.stream, hooked=False) for _ in parts]
        if s.model.parallel_residual:  # the MLP does not read the stream that attention was added to
            sums[0] = without_output(sums[0], self.stream)
        sums[0].named = self.stream
        inside = [call for part, added in zip(parts, sums, strict=True) for call in (*part, added)]
        block = Module(f"block {number}", inside=inside, output=self.stream)
        every, selective, budget = s.recomputation
        by_budget = budget < 1 and s.compiled  # only the compiler obeys it
        block.recomputed = by_budget or (every > 0 and number % every == 0)
        block.leaf = s.stage == 3 and self.whole_blocks()
        calls = calls_of(block)[1:]
        for call in calls:
            call.hooked = call.hooked and not block.leaf
            if s.compiled and call is not sums[0]:  # the compiler frees what nothing reads any more
                call.named = 0
        if block.recomputed and not selective:
            for call in calls[:-1]:  # the last one's is the block's output
                call.cached = int(budget * call.kept) if by_budget else 0
        return block

    def norm_after(self, norm, part):
        """A sub-layer and the norm of its output, in the order in which they are called. The norm reads what the
        sub-layer's last product gives, and its own output is added to the stream."""
        part.inside[-1].kept += self.narrow
        norm.named = 0
        return part, without_output(norm, self.stream)

    def whole_blocks(self):
        """Whether a block is one module for ZeRO-3's hooks, as engine.py makes it."""
        return True

    def attention(self, number):
        s = self.settings
        wide = s.tokens * self.query_width * s.product_bytes
        turns = s.model.has_rotary(number)
        inside = self.projections() + self.query_key_norms(turns)
        if turns:
            inside.append(self.rotation())
        inside.append(self.scores(number))
        sizes = {"kept": self.dropout_mask(), "forward": self.narrow, "backward": wide + self.own_gradient()}
        sizes["leaving"] = 0 if turns else wide  # its input is attention's output, which that saved too
        inside.append(self.linear("proj", self.query_width, self.width, **sizes))
        inside += self.adapter("proj", s.tokens)
        return Module("attention", inside=inside, named=self.narrow)

    def projections(self):
        """Queries, keys and values by one product."""
        fan_out = self.query_width + 2 * self.kv_width
        qkv = self.settings.tokens * fan_out * self.settings.product_bytes
        sizes = {"kept": qkv, "named": qkv, "cached": qkv, "backward": qkv + self.narrow}
        qkv = self.linear("qkv", self.width, fan_out, self.settings.model.biased_qkv, **sizes)
        return [qkv, *self.adapter("qkv", self.settings.tokens)]

    def keeps_input(self, matrix):
        """Whether the input of a matrix is kept: for the gradients of the matrix or of its adapter. DeepSpeed's linear
        function, which stage 3 takes unless it is compiled, keeps it anyway."""
        s = self.settings
        return not s.adapters or matrix in s.lora.matrices or (s.stage == 3 and not s.compiled and not s.packed)

    def adapter(self, matrix, rows):
        """lora.py's products beside a matrix, if it has some: A's outputs are kept, and a dropped input; B's are added
        to the matrix's output, which is a new tensor."""
        s = self.settings
        if not s.adapters or matrix not in s.lora.matrices:
            return []
        parts, inputs = rows_of_parts(s.model, matrix), inputs_of(s.model, matrix)
        weights = [Weight(s.lora.rank * inputs) for _ in parts] + [Weight(count * s.lora.rank) for count in parts]
        kept = rows * len(parts) * s.lora.rank * s.product_bytes
        if s.lora.dropout:
            kept += rows * inputs * (s.product_bytes + 1)
        output = rows * sum(parts) * s.product_bytes
        return [Module("adapter", weights, kept=kept, forward=2 * output, backward=rows * inputs * s.product_bytes)]

    def query_key_norms(self, turns):
        """The norms of queries and keys, if any. turns: whether their outputs are temporary, for a rotation reads
        them, which keeps its own."""
        s = self.settings
        norms = []
        if s.model.qk_norm == "none":
            return norms
        for name, width in (("q_norm", self.query_width), ("k_norm", self.kv_width)):
            normed = s.model.head_size if s.model.qk_norm == "head" else width
            norm = self.norm(name, normed, s.tokens * width // normed)
            output = s.tokens * width * s.bytes
            norm.named = 0 if turns else output
            norms.append(without_output(norm, output) if turns else norm)
        return norms

    def rotation(self):
        """Rotary positions of queries and keys."""
        s = self.settings
        rotated = s.tokens * (self.query_width + self.kv_width) * s.product_bytes
        turned = s.tokens * s.model.n_head * s.model.rotary_channels  # of the queries
        temporary = 2 * turned * 4  # in float32, before and after the rotation
        if s.model.rotary_channels < s.model.head_size:  # before the other channels are put beside them
            temporary = max(temporary, turned * (4 + s.product_bytes))
        return Module("rotate", kept=rotated, named=rotated, forward=temporary, backward=rotated, hooked=False)

    def scores(self, number):
        """Flash attention: no (T, T) matrix of a head is kept. In a layer with a sliding window one matrix is, for all
        heads: torch makes of the mask what is added to the scores."""
        s = self.settings
        output = s.tokens * self.query_width * s.product_bytes
        inputs = s.tokens * (self.query_width + 2 * self.kv_width) * s.product_bytes
        log_sums = s.tokens * s.model.n_head * 4
        # its output has the layout of its input; after rotary positions that is not proj's, and is copied once more
        outputs = 2 if s.model.has_rotary(number) else 1
        kept = output * outputs + log_sums
        if s.has_mask(number):
            kept += s.length**2 * s.product_bytes
        sizes = {"kept": kept, "named": output, "cached": output + log_sums}
        return Module("attend", **sizes, backward=output + inputs, own=True, hooked=False)

    def mlp(self):
        """One for all tokens, or experts."""
        model = self.settings.model
        return self.experts() if model.n_expert else self.dense_mlp(model.mlp_width)

    def dense_mlp(self, inner):
        inside = self.products(inner, self.settings.tokens)
        inside[-1].kept += self.dropout_mask()
        inside[-1].backward += self.own_gradient()
        return Module("mlp", inside=inside)

    def products(self, inner, rows, biased=None, matrices=1):
        """Up, the activation and down, of so many rows, with a hidden width `inner`. matrices: of as many experts."""
        s = self.settings
        # kept: up's output, which the activation reads, the activation's, which down reads, and silu(gate) of swiglu,
        # which the compiler computes again
        gated = s.model.gated
        fan_out = inner * (2 if gated else 1)
        narrow = rows * self.width * s.product_bytes
        up = rows * fan_out * s.product_bytes
        hidden = rows * inner * s.product_bytes
        activation = {"kept": up, "backward": hidden + up}
        if gated and s.compiled:
            activation["kept"] = hidden
        elif gated:
            activation["backward"] = 2 * up  # of gate and value, and both once more in one tensor
        if not self.keeps_input("down"):
            activation["kept"] -= hidden
            activation["forward"] = hidden
        of_up = {"kept": up, "cached": up, "backward": up + narrow}
        return [
            self.linear("up", self.width, fan_out, biased, matrices, **of_up),
            *self.adapter("up", rows),
            Module("activate", **activation, hooked=False),
            self.linear("down", inner, self.width, biased, matrices, forward=narrow, backward=hidden),
            *self.adapter("down", rows),
        ]

    def experts(self):
        """minzero/experts.py: a row for each pair of a token and one of its experts, n_expert_per_token times as many
        as tokens however they are sent."""
        s, model = self.settings, self.settings.model
        rows = s.tokens * model.n_expert_per_token
        routed = rows * self.width * s.product_bytes
        logits = s.tokens * model.n_expert  # their number
        # in float32 whatever the weights are
        sizes = {"kept": 4 * logits, "forward": s.product_bytes * logits, "backward": 8 * logits + self.narrow}
        inside = [
            self.linear(
                "router", self.width, model.n_expert, False, **sizes, named=4 * logits, cached=s.product_bytes * logits
            )
        ]
        # probabilities, their log-sum-exp, which experts a token goes to, in int64, and their weights
        choice = 4 * logits + 4 * s.tokens + (8 + s.product_bytes) * rows
        if model.normalize_experts:
            choice += 4 * rows + 4 * s.tokens
        inside.append(Module("choose", kept=choice, named=choice, forward=4 * 8 * rows, hooked=False))
        # the rows by expert, and the tokens that they come from
        inside.append(Module("send", kept=routed + 8 * rows, backward=routed + self.narrow, hooked=False))
        up, activate, down = self.products(model.mlp_width, rows, False, model.n_expert)
        activate.named = rows * model.mlp_width * s.product_bytes
        inside += [up, activate, down]
        # the outputs in the tokens' order, which the gradients of their weights read
        together = {"kept": routed + 8 * rows + self.dropout_mask(), "forward": routed + self.narrow}
        inside.append(Module("sum up", **together, backward=2 * routed, own=True, hooked=False))
        if model.n_shared_expert:  # is called first, although its weights come last
            inside.insert(0, self.dense_mlp(model.n_shared_expert * model.mlp_width))
            inside[0].named = self.narrow
        return Module("mlp", inside=inside)

    def chunked_head(self, weight, on_gpu=True):
        """model.py's Head and loss: the logits of a chunk at a time, and gradients in the forward pass."""
        s = self.settings
        chunk = min(loss_chunk_tokens(s.model.vocab_size, on_gpu), s.tokens)
        columns = padded_vocab_size(s.model.vocab_size, on_gpu)
        logits = chunk * columns * s.bytes
        # a chunk's part of the weight's gradient
        product = 0 if s.adapters else columns * self.width * s.bytes
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
        padded = columns * self.width * s.bytes if columns > s.model.vocab_size else 0
        sizes = {"kept": self.narrow + kept, "forward": self.stream + padded + most}
        return Module("head", [weight], **sizes, part="logits", own=True)

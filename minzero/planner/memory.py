"""How much memory a step of training takes at most, and for what: a replay of the engine's allocations.

Nothing here is fitted, and there is no closed formula: the peak is the largest of five moments (forward, loss,
backward, reduction, step), and which one wins changes with the setting. So the model is written down as the
modules that DeepSpeed's hooks see (`trace`), and an engine (`Replicated`, `Sharded`, `Gathered`: stage 0, 1 and 2,
3) goes through one step of it and allocates and frees, in the order of the real one, what the real one does.
The engines follow DeepSpeed 0.19.8: runtime/zero/stage_1_and_2.py, stage3.py, partition_parameters.py and
partitioned_param_coordinator.py. Sizes are in bytes, `size` and bucket sizes in elements.
"""

import bisect
import itertools
import math
from collections import Counter, deque
from dataclasses import dataclass, field

from minzero.config.sections import ModelConfig
from minzero.sizes import check_counted, loss_chunk_tokens, padded_vocab_size

PARTS = ("parameters", "gradients", "optimizer", "gathered", "buckets", "activations", "logits", "overhead")
PHASES = ("forward", "loss", "backward", "reduction", "step")


@dataclass
class Settings:
    """One training setting. Defaults of the engine are DeepSpeed 0.19.8's; those of the model are ours."""

    model: ModelConfig
    world_size: int = 1
    stage: int = 3
    micro_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    precision: str = "bf16"  # bf16, fp16, fp32; or amp: fp32 weights, fp16 products (torch.autocast)
    recompute_every: int = 0  # k: blocks 0, k, 2k, ... are recomputed in the backward pass; 0: none
    inputs_on_cpu: bool = False  # the inputs of recomputed blocks wait in CPU memory
    offload_optimizer: bool = False
    offload_ratio: float = 1.0  # stage 3: which part of the optimizer goes to CPU memory, counted in sub-groups
    offload_param: bool = False
    overlap_comm: bool = False
    reduce_bucket_size: int = 500_000_000
    prefetch_bucket_size: int = 50_000_000
    persistence_threshold: int = 100_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    sub_group_size: int = 1_000_000_000
    accumulation_bytes: int | None = None  # of a gradient in accumulation; None: as wide as the weights
    compiled: bool = False  # the loss keeps no probabilities; stage 3: blocks are gathered and reduced whole
    master_bytes: int = 4
    moment_bytes: int = 8  # both of Adam's
    # Only for measurements of other models:
    sequence: int | None = None  # tokens; None: the model's block_size
    attention: str = "flash"  # no (T, T) matrix is kept; plain: the softmax of every head is; plain32: in float32
    loss: str = "chunked"  # model.py's; plain: all logits, in float32; half: all, in the model's type; fused
    separate_qkv: bool = False  # three matrices in place of one, as in minGPT
    masks: bool = False  # a (T, T) mask of one byte an entry in each block, as in minGPT
    score_bytes: int | None = None  # kept for each entry of plain attention, if not what the rest implies
    relu: bool = False  # the MLP keeps only its activation, not also that one's input
    # Only for measurements of other versions and backends:
    on_cpu: bool = False  # gloo's reduce_scatter copies its input, and log_softmax fp16 logits into float32
    rank: int | None = None  # whose memory; None: the rank that holds most
    one_group: bool = False  # all parameters in one group of the optimizer; ours are decayed or spared
    bucket_factor: float = 1.0  # 2021: ZeRO-2's buckets had room for 4.5 times their size
    stale_bucket: bool = False  # 2021, ZeRO-2: a bucket of the step before lived until the first reduction; this was
    # concluded from the measurements, as was that stage 3 gathered one tensor at a time; the rest was read in 0.3.15
    coalesced: bool = True  # 2021: each parameter was gathered and reduced on its own
    prefetches: bool = True  # 2021: an invalid trace switched prefetching and reuse off
    keeps_weights: bool = False  # 2021: autograd held views of gathered weights from forward to backward

    @property
    def length(self):
        """Tokens of a sequence."""
        return self.sequence or self.model.block_size

    @property
    def tokens(self):
        """Tokens of a micro-batch."""
        return self.micro_batch_size * self.length

    @property
    def bytes(self):
        """Width of the weights and of the residual stream."""
        return {"bf16": 2, "fp16": 2, "fp32": 4, "amp": 4}[self.precision]

    @property
    def half(self):
        """Width of what matrix products take and give."""
        return 2 if self.precision == "amp" else self.bytes


class Memory:
    """What is allocated on one device, by part, and the most there was of it in each phase."""

    def __init__(self):
        self.held, self.total, self.phase, self.peaks = Counter(), 0, "forward", {}

    def allocate(self, part, size):
        self.held[part] += size
        self.total += size
        if self.total > self.peaks.get(self.phase, (-1,))[0]:
            self.peaks[self.phase] = (self.total, dict(self.held))
        return part, size

    def free(self, tensor):
        part, size = tensor
        self.held[part] -= size
        self.total -= size

    def touch(self, part, size):
        """Something that comes and goes at once."""
        self.free(self.allocate(part, size))


@dataclass(eq=False)
class Weight:
    """A parameter. `uses`: modules that share it."""

    size: int
    decayed: bool = True
    uses: int = 1


@dataclass(eq=False)
class Module:
    """One call as the hooks see it, in bytes: `kept` is made here and waits for the backward pass, `forward` and
    `backward` exist besides only while this is computed. A call without hooks is a function, not a module."""

    name: str
    weights: list = field(default_factory=list)
    inside: list = field(default_factory=list)
    kept: int = 0
    forward: int = 0
    backward: int = 0
    part: str = "activations"
    hooked: bool = True
    own: bool = False  # whether its own backward pass also reads what it kept, not only that of the next call
    leaf: bool = False  # for the hooks one module with all that is inside
    recomputed: bool = False
    output: int = 0  # of a recomputed block: what outlives its forward pass


def trace(settings):
    """The model's modules in the order of the forward pass, with what each allocates."""
    return Trace(settings).model()


class Trace:
    """Writes the model down as modules; one method for each kind of them."""

    def __init__(self, settings):
        self.settings, self.width = settings, settings.model.n_embd
        self.amp = settings.precision == "amp"  # norms and sums in float32, products in fp16
        self.stream = settings.tokens * self.width * settings.bytes  # bytes of the residual stream
        self.narrow = settings.tokens * self.width * settings.half  # bytes of as much, as products take and give it

    def model(self):
        s, model = self.settings, self.settings.model
        embedding = Weight(model.vocab_size * self.width, uses=2 if model.tie_embeddings else 1)
        head = embedding if model.tie_embeddings else Weight(model.vocab_size * self.width)
        modules = [Module("token_embedding", [embedding], forward=self.stream)]
        if model.position == "learned":
            positions, rows = Weight(model.block_size * self.width), s.length * self.width * s.bytes
            modules.append(Module("position_embedding", [positions], forward=rows))
        modules.append(Module("sum", kept=self.stream + self.dropped(), hooked=False))
        modules += [self.block(number) for number in range(model.n_layer)]
        norm = self.norm("final_norm")
        if s.loss == "chunked":
            norm.kept, norm.forward = norm.kept - self.stream, self.stream  # the head keeps gradients, not what it read
            return Module("model", inside=[*modules, norm, self.chunked_head(head)])
        return Module("model", inside=[*modules, norm, *self.head_and_loss(head)])

    def dropped(self):
        """Bytes of a dropout's mask over the stream, one an element."""
        return self.settings.tokens * self.width if self.settings.model.dropout else 0

    def own_gradient(self):
        """Bytes of the gradient of what is added to the stream: the stream's own, unless something lies between."""
        return self.narrow if self.amp or self.settings.model.dropout else 0

    def linear(self, name, fan_in, fan_out, **sizes):
        weights = [Weight(fan_in * fan_out)] + ([Weight(fan_out, False)] if self.settings.model.bias else [])
        return Module(name, weights, **sizes)

    def norm(self, name):
        # layernorm keeps mean and 1 / deviation of each token in float32; what it reads is the stream's
        model, layernorm = self.settings.model, self.settings.model.norm == "layernorm"
        weights = [Weight(self.width, False) for _ in range(2 if layernorm and model.bias else 1)]
        statistics = self.settings.tokens * 4 * (2 if layernorm else 1)
        forward = self.narrow if self.amp else 0
        return Module(name, weights, kept=self.stream + statistics, forward=forward, backward=2 * self.stream)

    def block(self, number):
        s, inside = self.settings, []
        leaf = s.compiled and s.stage == 3  # engine.py: one module for DeepSpeed
        for part in (self.attention(), self.mlp()):
            inside += [self.norm("norm"), part, Module("sum", kept=self.stream, hooked=False)]
        recomputed = bool(s.recompute_every) and number % s.recompute_every == 0
        block = Module(f"block {number}", inside=inside, recomputed=recomputed, output=self.stream, leaf=leaf)
        if leaf:
            for call in calls_of(block)[1:]:
                call.hooked = False
        return block

    def attention(self):
        s, width, narrow = self.settings, self.width, self.narrow
        kv = s.model.kv_heads * (width // s.model.n_head)  # width of all keys
        if s.separate_qkv:
            kept = narrow * (2 if self.amp else 1)  # under autocast each makes a fp16 copy of the norm's fp32 output
            inside = [self.linear(n, width, width, kept=kept, backward=2 * narrow) for n in ("key", "query", "value")]
        else:
            qkv = s.tokens * (width + 2 * kv) * s.half
            inside = [self.linear("qkv", width, width + 2 * kv, kept=qkv, backward=qkv + narrow)]
        if s.model.position == "rotary":
            turned = s.tokens * (width + kv) * s.half
            wide = 2 * s.tokens * width * 4  # of the queries, in float32, before and after
            inside.append(Module("rotate", kept=turned, forward=wide, backward=turned, hooked=False))
        inside += [self.flash(kv)] if s.attention == "flash" else self.plain_scores()
        sizes = {"forward": narrow, "kept": self.dropped(), "backward": narrow + self.own_gradient()}
        inside.append(self.linear("proj", width, width, **sizes))
        return Module("attention", inside=inside)

    def flash(self, kv):
        s = self.settings
        inputs = s.tokens * (self.width + 2 * kv) * s.half
        # its output is laid out as its input: turned ones are not as proj reads them, and copied once more
        kept = self.narrow * (2 if s.model.position == "rotary" else 1) + s.tokens * s.model.n_head * 4
        return Module("attend", kept=kept, backward=self.narrow + inputs, own=True, hooked=False)

    def plain_scores(self):
        """Attention that keeps a (T, T) matrix for each head."""
        s, narrow = self.settings, self.narrow
        entries = s.tokens * s.length * s.model.n_head
        soft = 4 if self.amp or s.attention == "plain32" else s.half  # autocast's softmax is float32
        scores, casts = entries * soft, entries * s.half if soft > s.half else 0
        masked = entries * (1 + soft) if s.model.dropout else 0
        kept = scores + masked + casts if s.score_bytes is None else entries * s.score_bytes
        sizes = {"kept": kept, "forward": scores + 2 * narrow, "backward": 2 * scores}
        return [
            Module("scores", **sizes, own=True, hooked=False),
            Module("gather", kept=narrow, forward=narrow, backward=2 * narrow, hooked=False),
        ]

    def mlp(self):
        # gelu's input, up's output, is kept, and what it gives, which down reads; of swiglu also silu(gate)
        s, width, narrow = self.settings, self.width, self.narrow
        inner, dropped = s.model.mlp_width, self.dropped()
        fan_out = inner * (2 if s.model.mlp == "swiglu" else 1)
        up, hidden = s.tokens * fan_out * s.half, s.tokens * inner * s.half
        kept = 0 if s.relu else up
        inside = [
            self.linear("up", width, fan_out, kept=kept, forward=up - kept, backward=up + narrow),
            Module("activate", kept=up, backward=hidden + up, hooked=False),
            self.linear("down", inner, width, forward=narrow, kept=dropped, backward=hidden + self.own_gradient()),
        ]
        return Module("mlp", inside=inside)

    def chunked_head(self, weight):
        """model.py's Head: a chunk of logits at a time, and gradients at once."""
        s = self.settings
        chunk = min(loss_chunk_tokens(s.model.vocab_size, not s.on_cpu), s.tokens)
        width = padded_vocab_size(s.model.vocab_size, not s.on_cpu)
        logits, product = chunk * width * s.half, width * self.width * s.half  # a part of the weight's gradient
        copied = s.half < 4 and (s.on_cpu or s.precision == "bf16")  # by log_softmax, into float32; not fp16 on a GPU
        probabilities = 0 if s.compiled else chunk * width * (8 if copied else 4)
        if s.tokens > chunk:  # products are added up in float32
            sums = 2 if s.half < 4 else 1
            kept, most = sums * product, logits + max(probabilities, sums * product)
        else:  # the probabilities are gone when the only product is made, which is kept
            kept, most = product, logits + max(probabilities - product, 0)
        padded = product if width > s.model.vocab_size else 0
        return Module(
            "head", [weight], kept=self.narrow + kept, forward=self.stream + padded + most, part="logits", own=True
        )

    def head_and_loss(self, weight):
        """All logits at once, and a loss of its own."""
        s = self.settings
        logits = s.tokens * s.model.vocab_size
        output = logits * s.half
        kept, forward, backward = {
            "half": (output, output, 2 * output),
            "plain": (logits * 4, logits * 4, logits * 8),
            "fused": (output, 0, 0),
        }[s.loss]
        sizes = {"kept": kept, "forward": forward, "backward": backward}
        return [
            Module("head", [weight], forward=output, backward=output + self.narrow, part="logits"),
            Module("loss", **sizes, part="logits", own=True, hooked=False),
        ]


def calls_of(module):
    """A module and all inside it, in the order of the forward pass."""
    return [module] + [call for child in module.inside for call in calls_of(child)]


def weights_of(module):
    """The weights of a module and all inside it, each once, in the order of their making."""
    return list(dict.fromkeys(weight for call in calls_of(module) for weight in call.weights))


class Engine:
    """One rank's step: the walk through the model, which the stages fill with what they do about weights."""

    def __init__(self, settings):
        self.settings, self.memory = settings, Memory()
        self.model = trace(settings)
        self.weights = weights_of(self.model)
        self.size = sum(weight.size for weight in self.weights)
        self.kept, self.passing, self.pending, self.uses = {}, [], {}, Counter()
        groups = [self.weights]
        if not settings.one_group:
            groups = [[w for w in self.weights if w.decayed == decayed] for decayed in (True, False)]
        self.groups = [group for group in groups if group]

    def run(self):
        """One optimizer step in its steady state; the memory with its peaks."""
        s, memory = self.settings, self.memory
        memory.allocate("overhead", 2 * s.tokens * 8)  # inputs and targets, int64
        if s.masks:
            memory.allocate("overhead", s.model.n_layer * s.length**2)
        self.resident()
        for self.micro_step in range(2 if s.gradient_accumulation_steps > 1 else 1):
            self.last = self.micro_step or s.gradient_accumulation_steps == 1
            memory.phase = "forward"
            self.forward(self.model)
            if s.precision == "amp" and s.recompute_every:  # nothing saved refers to autocast's fp16 weights
                memory.free(self.autocast)
            memory.phase = "backward"
            stream = memory.allocate("activations", s.tokens * s.model.n_embd * s.bytes)  # the stream's gradient
            self.backward(self.model)
            memory.free(stream)
            memory.phase = "reduction"
            self.end_backward()
        memory.phase = "step"
        self.step()
        return memory

    def forward(self, module, keeps=True):
        """keeps: whether what the backward pass needs is kept; else only the last call's stays, for the next one."""
        memory = self.memory
        if module.hooked:
            self.fetch(module, forward=True)
        if module.name == "head":
            memory.phase = "loss"
        for child in module.inside:
            self.forward(child, keeps and not module.recomputed)
        if module.recomputed and keeps:
            for call in self.passing:
                memory.free(call)
            self.passing = []
            on_cpu = self.settings.inputs_on_cpu
            self.kept[module] = memory.allocate("activations", 0 if on_cpu else module.output)
        if module.kept and keeps:
            self.kept[module] = memory.allocate(module.part, module.kept)
        elif module.kept:
            self.passing.append(memory.allocate(module.part, module.kept))
            if len(self.passing) > 2:
                memory.free(self.passing.pop(0))
        if module.forward:
            memory.touch(module.part, module.forward)
        if module.hooked:
            self.release(module, forward=True)

    def backward(self, module):
        memory = self.memory
        if module.hooked:
            self.fetch(module, forward=False)
        if module.recomputed:
            memory.free(self.kept.pop(module))
            module.recomputed = False
            last = module.inside.pop()  # the sum at the end: nothing in the backward pass needs it
            self.forward(module)
            module.inside.append(last)
            module.recomputed = True
        for child in reversed(module.inside):
            self.backward(child)
        if module in self.kept and not module.own:
            memory.free(self.kept.pop(module))
        flowing = memory.allocate(module.part, module.backward)
        for weight in module.weights:
            self.make_gradient(weight)
        memory.free(flowing)
        if module in self.kept:
            memory.free(self.kept.pop(module))
        if module.hooked:
            self.release(module, forward=False)

    def make_gradient(self, weight):
        """A shared weight's gradients are summed before the engine sees them: the first waits for the last."""
        gradient = self.memory.allocate("gradients", weight.size * self.settings.bytes)
        self.uses[weight] += 1
        if self.uses[weight] < weight.uses:
            self.pending[weight] = gradient
            return
        self.uses[weight] = 0
        if weight in self.pending:
            self.memory.free(self.pending.pop(weight))
        self.reduce_later(weight, gradient)

    def put_into_bucket(self, weight, gradient):
        """A gradient that fits is copied; a larger one than the whole bucket stays until it is reduced."""
        if self.elements + weight.size <= self.settings.reduce_bucket_size:
            self.memory.free(gradient)
            gradient = None
        self.bucket.append((weight, gradient))
        self.elements += weight.size

    def fetch(self, module, forward):
        pass

    def release(self, module, forward):
        pass

    def shard(self, weight):
        return -(-weight.size // self.settings.world_size)


class Replicated(Engine):
    """Stage 0: every rank holds everything. 16-bit weights have a float32 copy of each and of its gradient."""

    def resident(self):
        s = self.settings
        self.memory.allocate("parameters", self.size * s.bytes)
        self.memory.allocate("optimizer", self.size * (s.moment_bytes + (s.master_bytes if s.bytes < 4 else 0)))
        if s.precision == "amp":  # DDP: gradients stay, and so do the buckets; autocast caches fp16 weights
            self.memory.allocate("gradients", self.size * 4)
            self.memory.allocate("buckets", self.size * 4)
            self.autocast = self.memory.allocate("gathered", self.size * 2)

    def reduce_later(self, weight, gradient):
        if self.settings.precision == "amp" or self.micro_step:
            self.memory.free(gradient)

    def end_backward(self):
        if self.last and self.settings.precision != "amp":
            self.memory.touch("buckets", min(self.size, 500_000_000) * self.settings.bytes)

    def step(self):
        if self.settings.bytes < 4:
            self.memory.touch("gradients", self.size * 4)


class Sharded(Engine):
    """Stages 1 and 2: whole weights, a slice of the optimizer, and of the gradients those that the slice touches."""

    def resident(self):
        s = self.settings
        self.memory.allocate("parameters", self.size * s.bytes)
        if not s.offload_optimizer:
            self.memory.allocate("optimizer", -(-self.size // s.world_size) * (s.master_bytes + s.moment_bytes))
        self.bucket, self.elements, self.buffers = [], 0, []
        self.partition = self.accumulated = None
        self.stale = []
        if s.stale_bucket:
            self.stale = [self.memory.allocate("buckets", int(s.reduce_bucket_size * s.bucket_factor) * s.bytes)]
        self.waiting = {}
        # {weight: elements of it in the slice} of the rank whose slices touch the most: whole tensors are kept of
        # those that a slice begins or ends in
        touched = self.slices()
        most = max(touched, key=lambda mine: sum(weight.size for weight in mine))
        self.touched = most if s.rank is None else touched[s.rank]

    def slices(self):
        """For each rank: {weight: elements of it in the rank's slice}, each group being cut into equal slices."""
        ranks = self.settings.world_size
        found = [{} for _ in range(ranks)]
        for group in self.groups:
            total, end = sum(weight.size for weight in group), 0
            for weight in group:
                begin, end = end, end + weight.size
                for rank in range(begin * ranks // total, -(-end * ranks // total)):
                    low, high = rank * total / ranks, (rank + 1) * total / ranks
                    found[rank][weight] = min(end, high) - max(begin, low)
        return found

    def reduce_later(self, weight, gradient):
        s = self.settings
        if not self.buffers:  # the first gradient makes room for all
            size = int(s.reduce_bucket_size * s.bucket_factor) * s.bytes
            self.buffers = [self.memory.allocate("buckets", size) for _ in range(2 if s.overlap_comm else 1)]
        if s.stage == 1:  # summed up over the micro-batches, and reduced with the last one
            if weight in self.waiting:
                self.memory.free(gradient)
            gradient = self.waiting.setdefault(weight, gradient)
        if s.stage == 2 or (s.overlap_comm and self.last):  # else behind the backward pass, all at once
            self.waiting.pop(weight, None)
            self.put(weight, gradient)

    def put(self, weight, gradient):
        """Into the bucket, which is reduced first if it would overflow."""
        if self.elements + weight.size > self.settings.reduce_bucket_size:
            self.reduce()
        self.put_into_bucket(weight, gradient)

    def reduce(self):
        s, memory = self.settings, self.memory
        before, memory.phase = memory.phase, "reduction"
        if len(self.bucket) > 1 and s.coalesced:  # the slices for all ranks are flattened into one tensor
            memory.touch("buckets", self.elements * s.bytes)
        for bucket in self.stale:
            memory.free(bucket)
        self.stale = []
        for weight, gradient in self.bucket:
            if weight in self.touched:
                if s.offload_optimizer:
                    memory.touch("overhead", 8 * math.ceil(self.touched[weight]))  # the norm, in float64
                elif not self.partition:
                    size = sum(w.size for w in self.touched) * s.bytes
                    self.partition = memory.allocate("gradients", size)
            if gradient:
                memory.free(gradient)
        self.bucket, self.elements, memory.phase = [], 0, before

    def end_backward(self):
        if self.settings.stage == 1 and not self.last:
            return  # the buckets stay as well
        if self.waiting:
            order = {weight: number for number, weight in enumerate(itertools.chain(*self.groups))}
            for weight in sorted(self.waiting, key=order.get):
                self.put(weight, self.waiting.pop(weight))
        self.reduce()
        for buffer in self.buffers:
            self.memory.free(buffer)
        self.buffers = []
        if self.partition and self.accumulated:  # the new gradients are added to those so far
            self.memory.free(self.partition)
        elif self.partition:
            self.accumulated = self.partition
        self.partition = None

    def step(self):
        s = self.settings
        if s.offload_optimizer:
            return
        self.memory.touch("overhead", 8 * math.ceil(max(self.touched.values())))
        for group in self.groups:
            size = -(-sum(weight.size for weight in group) // s.world_size)
            flat = self.memory.allocate("gradients", size * s.bytes)
            if s.bytes < 4:
                self.memory.touch("gradients", size * 4)
            self.memory.free(flat)


class Gathered(Engine):
    """Stage 3: everything in slices; weights are gathered for the modules that need them, some ahead of time."""

    def resident(self):
        s, memory = self.settings, self.memory
        shards = sum(self.shard(weight) for weight in self.weights)
        self.persistent = {w for w in self.weights if w.size <= s.persistence_threshold}
        if not s.offload_param:
            memory.allocate("parameters", shards * s.bytes)
        if s.world_size > 1 or s.offload_param:
            memory.allocate("gathered", sum(w.size for w in self.persistent) * s.bytes)
        if not s.offload_optimizer:
            # float32 weights have a master copy too: stage3.py compares a torch.device with a string to see that it
            # needs none, and these are never equal
            memory.allocate("optimizer", shards * (s.moment_bytes + s.master_bytes))
            memory.allocate("gradients", shards * (s.accumulation_bytes or s.bytes))
        elif on_gpu := sum(self.sub_groups_on_gpu()):
            memory.allocate("optimizer", on_gpu * (s.moment_bytes + s.master_bytes))
            memory.allocate("gradients", on_gpu * 4)
        elif not s.coalesced:  # 2021: two buffers for a gradient on its way to the CPU
            memory.allocate("buckets", 2 * max(self.shard(weight) for weight in self.weights) * s.bytes)
        for _ in range(1 if s.coalesced or not s.overlap_comm else 2):
            memory.allocate("buckets", s.reduce_bucket_size * s.bytes)
        self.bucket, self.elements = [], 0
        self.free_gather = s.world_size == 1 and not s.offload_param
        self.gathered = dict.fromkeys(self.persistent)  # weight -> its tensor
        self.flight = {}  # weight -> (the weights of the same call, its tensor, whether that is the weight itself)
        # what the coordinator's trace of a first step holds: the modules, and all their parameters in order
        self.needs = {m: weights_of(m) if m.leaf else m.weights for m in calls_of(self.model)}
        self.order, self.leaf, self.at_once = [], None, []
        self.record(self.model)
        self.order_sums = [0, *itertools.accumulate(sum(w.size for w in self.needs[m]) for m in self.order)]
        self.next_uses = {}
        for step, module in enumerate(self.order):
            for weight in self.needs[module]:
                self.next_uses.setdefault(weight, []).append(step)
        self.restart()

    def record(self, module):
        def forward(module):
            if module.hooked:
                self.order.append(module)
            for child in module.inside:
                forward(child)

        def backward(module):
            if module.hooked:
                self.order.append(module)
            if module.recomputed:
                forward(module)
            for child in reversed(module.inside):
                backward(child)

        forward(module)
        backward(module)

    def restart(self):
        """The coordinator at the beginning of a forward pass."""
        self.at, self.live = 0, 0
        self.queue = deque((weight, step) for step, module in enumerate(self.order) for weight in self.needs[module])
        self.fetched_for = {}  # weight -> the last step of the trace that a fetch was meant for

    def gather(self, weights):
        """Several weights in one call arrive in a flat tensor, and are copied out of it when waited for."""
        s = self.settings
        weights = [weight for weight in weights if weight not in self.gathered and weight not in self.flight]
        if not weights:
            return
        self.live += sum(weight.size for weight in weights)
        sizes = [0 if self.free_gather else self.shard(weight) * s.world_size * s.bytes for weight in weights]
        if len(weights) == 1 or s.world_size == 1 or not s.coalesced:
            for weight, size in zip(weights, sizes, strict=True):
                self.flight[weight] = ({weight}, self.memory.allocate("gathered", size), True)
        else:
            call = (set(weights), self.memory.allocate("gathered", sum(sizes)), False)
            self.flight |= dict.fromkeys(weights, call)

    def wait(self, weight):
        if weight not in self.flight:
            return
        waiting, flat, alone = self.flight.pop(weight)
        if alone:
            self.gathered[weight] = flat
            return
        if weight not in self.gathered:  # the first of the call copies all of it
            for other in waiting:
                self.gathered[other] = self.memory.allocate("gathered", other.size * self.settings.bytes)
        waiting.discard(weight)
        if not any(other in self.flight for other in waiting):
            self.memory.free(flat)

    def fetch(self, module, forward):
        if module.leaf and not forward:
            self.leaf = module
        self.gather(self.needs[module])
        missing = any(weight not in self.gathered for weight in self.needs[module])
        together = not self.settings.coalesced and missing  # 2021: who waits for one waits for all under way
        for weight in list(self.flight) if together else self.needs[module]:
            self.wait(weight)
        if self.settings.prefetches:
            self.prefetch(module)
        self.at += 1

    def prefetch(self, module):
        s = self.settings
        if not s.coalesced:  # 2021: a bucket of what comes next and is not here, if nothing is under way
            ahead, size = {}, 0
            for weight in itertools.chain.from_iterable(self.needs[m] for m in self.order[self.at :]):
                if self.flight or self.live >= s.max_live_parameters or size >= s.prefetch_bucket_size:
                    break
                if weight not in self.gathered and weight not in ahead:
                    ahead[weight] = True
                    size += weight.size
            self.gather(ahead)
            return
        missing = {w for w in self.needs[module] if self.fetched_for.get(w, -1) < self.at}
        discarded = set()
        while self.queue and len(discarded) < len(missing):
            weight, step = self.queue.popleft()
            self.fetched_for[weight] = step
            discarded.add(weight)
        room = min(s.max_live_parameters - self.live, s.prefetch_bucket_size)
        ahead, size = [], 0
        while self.queue and size < room:
            weight, step = self.queue.popleft()
            self.fetched_for[weight] = max(self.fetched_for.get(weight, -1), step)
            if weight not in self.gathered and weight not in self.flight and weight not in ahead:
                ahead.append(weight)
                size += weight.size
        self.gather(ahead)

    def release(self, module, forward):
        s = self.settings
        if module is self.leaf and not forward:
            self.leaf, given, self.at_once = None, self.at_once, []
            for weight, gradient in given:
                self.reduce_later(weight, gradient)
        if s.keeps_weights and forward:
            return
        for weight in self.needs[module]:
            if weight in self.persistent or self.gathered.get(weight) is None:
                continue
            if s.prefetches:
                if self.fetched_for.get(weight, -1) > self.at:
                    continue
                uses = self.next_uses[weight]
                following = bisect.bisect_left(uses, self.at)
                if following < len(uses):
                    distance = self.order_sums[uses[following]] - self.order_sums[self.at]
                    if distance < s.max_reuse_distance:
                        continue
            self.let_go(weight)

    def let_go(self, weight):
        if self.gathered.get(weight) is not None:
            self.memory.free(self.gathered.pop(weight))
            self.live -= weight.size

    def reduce_later(self, weight, gradient):
        s = self.settings
        if self.leaf:
            self.at_once.append((weight, gradient))
            return
        if self.elements and self.elements + weight.size > s.reduce_bucket_size:
            self.reduce()
        self.put_into_bucket(weight, gradient)

    def reduce(self):
        s, memory = self.settings, self.memory
        before, memory.phase = memory.phase, "reduction"
        temporary = []
        several = len(self.bucket) > 1 or any(weight.size % s.world_size for weight, _ in self.bucket)
        if several and s.coalesced:
            flat = sum(self.shard(weight) for weight, _ in self.bucket) * s.world_size * s.bytes
            temporary.append(memory.allocate("buckets", flat))
        if s.on_cpu:
            memory.touch("buckets", sum(weight.size for weight, _ in self.bucket) * s.bytes)
        shards = [self.shard(weight) for weight, _ in self.bucket]
        if s.accumulation_bytes and s.accumulation_bytes != s.bytes:
            temporary.append(memory.allocate("gradients", sum(shards) * s.accumulation_bytes))
        if s.offload_optimizer and shards:
            if self.micro_step:
                memory.touch("gradients", max(shards) * s.bytes)
            memory.touch("overhead", min(max(shards), 250_000_000) * 8)  # the norm, in float64
        for _, gradient in self.bucket:
            if gradient:
                memory.free(gradient)
        for tensor in temporary:
            memory.free(tensor)
        self.bucket, self.elements, memory.phase = [], 0, before

    def end_backward(self):
        self.reduce()
        for weight in list(self.flight):
            self.wait(weight)
            self.let_go(weight)
        self.restart()
        if self.last:
            for weight in list(self.gathered):
                self.let_go(weight)

    def step(self):
        s, memory = self.settings, self.memory
        if s.offload_optimizer:
            # torch's AdamW, which updates what stays on the GPU, holds a root of one moment
            memory.touch("optimizer", max(self.sub_groups_on_gpu(), default=0) * 4)
            return
        memory.touch("overhead", 8 * max(self.shard(weight) for weight in self.weights))
        if s.world_size > 1 or s.offload_param:  # persistent weights too go back to slices
            memory.free(("gathered", sum(w.size for w in self.persistent) * s.bytes))
        for size in self.sub_groups():
            flat = memory.allocate("gradients", size * (s.accumulation_bytes or s.bytes))
            if (s.accumulation_bytes or s.bytes) != s.master_bytes:
                memory.touch("gradients", size * s.master_bytes)
            memory.free(flat)

    def sub_groups_on_gpu(self):
        """Sizes of those sub-groups whose optimizer stays on the GPU though the rest is offloaded."""
        sizes = list(self.sub_groups())
        return sizes[: int((1 - self.settings.offload_ratio) * len(sizes))]

    def sub_groups(self):
        """Sizes of the pieces in which the optimizer steps: whole parameters until sub_group_size is reached."""
        for group in self.groups:
            size = 0
            for weight in group:
                size += self.shard(weight)
                if size >= self.settings.sub_group_size:
                    yield size
                    size = 0
            if size:
                yield size


def simulate(settings):
    """Replay one step of `settings`. Returns the Memory, with its peak of each phase, and the number of parameters.
    Raises UserError for a key of the model section that the replay does not know."""
    check_counted(settings.model)
    engine = {0: Replicated, 1: Sharded, 2: Sharded, 3: Gathered}[settings.stage](settings)
    return engine.run(), engine.size

"""The planner's replay of settings that no run has: other people's models, older versions of DeepSpeed, CPU ranks.

`OtherSettings` and `simulate_other` stand beside the planner's `Settings` and `simulate`. Only measurements that were
made elsewhere, and the tests' own engines on CPU ranks, need them."""

import itertools
from dataclasses import dataclass

from minzero.planner.activations import Module, Trace
from minzero.planner.replay import Stage0, Stage12
from minzero.planner.settings import Settings
from minzero.planner.stage3 import Stage3


@dataclass
class OtherSettings(Settings):
    """precision may also be amp: fp32 weights, fp16 products (torch.autocast)."""

    # other models
    sequence: int | None = None  # tokens; None: the model's block_size
    attention: str = "flash"  # no (T, T) matrix is kept; plain: the softmax of every head is; plain32: in float32
    loss: str = "chunked"  # model.py's; plain: all logits, in float32; half: all, in the model's type; fused
    separate_qkv: bool = False  # three matrices in place of one, as in minGPT
    masks: bool = False  # a (T, T) mask of one byte an entry in each block, as in minGPT
    score_bytes: int | None = None  # kept for each entry of plain attention, if not what the rest implies
    relu: bool = False  # the MLP keeps only its activation, not also that one's input
    # other versions and backends
    on_cpu: bool = False  # gloo's reduce_scatter copies its input, and log_softmax fp16 logits into float32
    rank: int | None = None  # whose memory; None: the rank that holds most
    whole_blocks: bool = False  # as ours: a block is one module for ZeRO-3's hooks, and recomputed inside of them
    one_group: bool = False  # all parameters in one group of the optimizer; ours are decayed or spared
    bucket_factor: float = 1.0  # 2021: ZeRO-2's buckets had room for 4.5 times their size
    stale_bucket: bool = False  # 2021, ZeRO-2: a bucket of the step before lived until the first reduction; this was
    # concluded from the measurements, as was that stage 3 gathered one tensor at a time; the rest was read in 0.3.15
    coalesced: bool = True  # 2021: each parameter was gathered and reduced on its own
    prefetches: bool = True  # 2021: an invalid trace switched prefetching and reuse off
    keeps_weights: bool = False  # 2021: autograd held views of gathered weights from forward to backward

    @property
    def length(self):
        return self.sequence or self.model.block_size

    @property
    def amp(self):
        return self.precision == "amp"

    @property
    def bytes(self):
        return 4 if self.amp else super().bytes

    @property
    def product_bytes(self):
        return 2 if self.amp else self.bytes


class OtherTrace(Trace):
    """Models that are not model.py's."""

    def norm_and_loss(self, norm, weight):
        if self.settings.loss == "chunked":
            return super().norm_and_loss(norm, weight)
        return [norm, *self.head_and_loss(weight)]

    def head_and_loss(self, weight):
        """All logits at once, and a loss of its own."""
        s = self.settings
        logits = s.tokens * s.model.vocab_size
        output = logits * s.product_bytes
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

    def chunked_head(self, weight):
        return super().chunked_head(weight, on_gpu=not self.settings.on_cpu)

    def whole_blocks(self):
        return self.settings.whole_blocks

    def own_gradient(self):
        return self.narrow if self.settings.amp else super().own_gradient()

    def norm(self, name, *sizes):
        module = super().norm(name, *sizes)
        module.forward = self.narrow if self.settings.amp else 0
        return module

    def projections(self):
        if not self.settings.separate_qkv:
            return super().projections()
        # under autocast each makes a fp16 copy of the norm's fp32 output
        kept = self.narrow * (2 if self.settings.amp else 1)
        names = ("key", "query", "value")
        sizes = {"kept": kept, "backward": 2 * self.narrow, "leaving": 2 * self.narrow}  # all three read one input
        return [self.linear(name, self.width, self.width, **sizes) for name in names]

    def scores(self, number):
        if self.settings.attention == "flash":
            return super().scores(number)
        return Module("attend", inside=self.plain_scores(), hooked=False)

    def plain_scores(self):
        """Attention that keeps a (T, T) matrix for each head."""
        s, narrow = self.settings, self.narrow
        entries = s.tokens * s.length * s.model.n_head
        softmax_bytes = 4 if s.amp or s.attention == "plain32" else s.product_bytes  # autocast's softmax is float32
        scores = entries * softmax_bytes
        casts = entries * s.product_bytes if softmax_bytes > s.product_bytes else 0
        masked = entries * (1 + softmax_bytes) if s.model.dropout else 0
        kept = scores + masked + casts if s.score_bytes is None else entries * s.score_bytes
        sizes = {"kept": kept, "forward": scores + 2 * narrow, "backward": 2 * scores}
        return [
            Module("scores", **sizes, own=True, hooked=False),
            Module("gather", kept=narrow, forward=narrow, backward=2 * narrow, hooked=False),
        ]

    def mlp(self):
        module = super().mlp()
        if self.settings.relu:
            up = module.inside[0]
            up.kept, up.forward = 0, up.kept
        return module


class OtherEngine:
    """What differs at every stage; stands before the stage's own class."""

    def trace(self):
        return OtherTrace(self.settings).model()

    def optimizer_groups(self):
        return [self.weights] if self.settings.one_group else super().optimizer_groups()

    def resident(self):
        if self.settings.masks:
            self.memory.allocate("overhead", self.settings.model.n_layer * self.settings.length**2)
        super().resident()

    def forward(self, module, keeps=True):
        super().forward(module, keeps)
        s = self.settings
        if (
            module is self.model and s.amp and s.activation_checkpointing
        ):  # nothing saved refers to autocast's fp16 weights
            self.memory.free(self.autocast)


class OtherStage0(OtherEngine, Stage0):
    """Under autocast it is DDP: gradients and buckets stay, and fp16 copies of the weights are cached."""

    def resident(self):
        super().resident()
        if self.settings.amp:
            self.memory.allocate("gradients", self.size * 4)
            self.memory.allocate("buckets", self.size * 4)
            self.autocast = self.memory.allocate("gathered", self.size * 2)

    def reduce_later(self, weight, gradient):
        if self.settings.amp:
            self.memory.free(gradient)
        else:
            super().reduce_later(weight, gradient)

    def end_backward(self):
        if not self.settings.amp:
            super().end_backward()


class OtherStage12(OtherEngine, Stage12):
    def resident(self):
        super().resident()
        self.stale = []
        if self.settings.stale_bucket:
            self.stale = [self.memory.allocate("buckets", self.bucket_bytes())]

    def bucket_bytes(self):
        return int(self.settings.reduce_bucket_size * self.settings.bucket_factor) * self.settings.bytes

    def make_buffers(self):
        number = 2 if self.settings.overlap_comm else 1
        return [self.memory.allocate("buckets", self.bucket_bytes()) for _ in range(number)]

    def slice_of_rank(self):
        rank = self.settings.rank
        return super().slice_of_rank() if rank is None else self.slices()[rank]

    def flatten_bucket(self):
        if self.settings.coalesced:
            super().flatten_bucket()
        for bucket in self.stale:
            self.memory.free(bucket)
        self.stale = []


class OtherStage3(OtherEngine, Stage3):
    def resident_optimizer(self, shards):
        super().resident_optimizer(shards)
        s = self.settings
        if s.coalesced:
            return
        if s.offload_optimizer and not sum(
            self.sub_groups_on_gpu()
        ):  # two buffers for a gradient on its way to the CPU
            self.memory.allocate("buckets", 2 * max(self.shard(weight) for weight in self.weights) * s.bytes)
        if s.overlap_comm:  # a second bucket
            self.memory.allocate("buckets", s.reduce_bucket_size * s.bytes)

    def gather(self, weights):
        if self.settings.coalesced:
            super().gather(weights)
            return
        for weight in weights:
            super().gather([weight])

    def wait_for(self, weights):
        missing = any(weight not in self.gathered for weight in weights)
        if missing and not self.settings.coalesced:  # who waits for one waits for all under way
            weights = list(self.flight)
        super().wait_for(weights)

    def record_recomputation(self, block):
        if not self.settings.whole_blocks:
            self.record_forward(block)

    def recompute(self, block):
        """Around the block: its hooks fetch the weights once more."""
        if self.settings.whole_blocks:
            super().recompute(block)
            return
        self.fetch(block, forward=True)
        super().recompute(block)
        self.release(block, forward=True)

    def prefetch(self, module):
        s = self.settings
        if not s.prefetches:
            return
        if s.coalesced:
            super().prefetch(module)
            return
        ahead, size = {}, 0  # a bucket of what comes next and is not here, if nothing is under way
        for weight in itertools.chain.from_iterable(self.needs[m] for m in self.order[self.at :]):
            if self.flight or self.live >= s.max_live_parameters or size >= s.prefetch_bucket_size:
                break
            if weight not in self.gathered and weight not in ahead:
                ahead[weight] = True
                size += weight.size
        self.gather(ahead)

    def needed_soon(self, weight, leaf=False):
        return self.settings.prefetches and super().needed_soon(weight, leaf)

    def release(self, module, forward):
        if not (self.settings.keeps_weights and forward):
            super().release(module, forward)

    def flatten_bucket(self):
        s = self.settings
        temporary = super().flatten_bucket() if s.coalesced else []
        if s.on_cpu:
            self.memory.touch("buckets", sum(weight.size for weight, _ in self.bucket) * s.bytes)
        return temporary


def simulate_other(settings):
    """As memory.simulate: the Memory of one step, and the number of parameters."""
    engine = {0: OtherStage0, 1: OtherStage12, 2: OtherStage12, 3: OtherStage3}[settings.stage](settings)
    return engine.run(), engine.size

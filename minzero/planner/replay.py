"""A replay of one training step's allocations: the walk that all stages share, and stages 0 to 2 (3 is in stage3.py).

An engine goes through one step of the model in activations.py, and allocates and frees what DeepSpeed 0.19.8 does, in
the same order. It follows runtime/zero/stage_1_and_2.py, stage3.py, partition_parameters.py and
partitioned_param_coordinator.py. Sizes of allocations are in bytes, sizes of weights and buckets in elements.
"""

import itertools
import math
from collections import Counter

from minzero.adapters import BYTES
from minzero.planner.activations import calls_of, trace, weights_of

PARTS = ("parameters", "gradients", "optimizer", "gathered", "buckets", "activations", "logits", "overhead")
PHASES = ("forward", "loss", "backward", "reduction", "step")


class Memory:
    """The allocations of one device.

    held: {part: bytes}; total: their sum; peaks: {phase: (the largest total in it, held at that moment)}."""

    def __init__(self):
        self.held = Counter()
        self.total = 0
        self.phase = "forward"
        self.peaks = {}

    def allocate(self, part, size):
        """Returns the tensor, for free()."""
        self.held[part] += size
        self.total += size
        if self.phase not in self.peaks or self.total > self.peaks[self.phase][0]:
            self.peaks[self.phase] = (self.total, dict(self.held))
        return part, size

    def free(self, tensor):
        part, size = tensor
        self.held[part] -= size
        self.total -= size

    def touch(self, part, size):
        """A temporary that is freed at once."""
        self.free(self.allocate(part, size))


class Engine:
    """One rank's step: the walk through the model. A stage defines its resident tensors, how weights are fetched and
    released, and how gradients are reduced."""

    def __init__(self, settings):
        self.settings = settings
        self.memory = Memory()
        self.model = self.trace()
        self.weights = weights_of(self.model)
        self.size = sum(weight.size for weight in self.weights)
        self.trained = sum(weight.size for weight in self.weights if weight.trained)
        self.groups = self.optimizer_groups()
        # stages 1 and 2 have their buffers anyway where the optimizer is offloaded
        self.contiguous = settings.contiguous_gradients or (settings.stage < 3 and settings.offload_optimizer)
        self.kept = {}  # module -> the tensor that it saved for the backward pass
        self.passing = []  # the last call's tensor in a block that does not keep it, because it is recomputed
        self.named = []  # and those that have a name in the code of the calls under way
        self.cached = {}  # module of such a block -> the part of its tensor that is kept
        self.pending = {}  # shared weight -> the sum of its gradients so far
        self.uses = Counter()  # shared weight -> how many gradients it has so far
        # of one micro-batch: elements gathered and reduced, and in how many calls
        self.traffic = Counter()

    @property
    def kept_bytes(self):
        """Bytes that all blocks would keep of a micro-batch for the backward pass, if none was recomputed."""
        blocks = [module for module in self.model.inside if module.name.startswith("block")]
        return sum(call.kept for block in blocks for call in calls_of(block) if call is not block)

    def trace(self):
        return trace(self.settings)

    def optimizer_groups(self):
        """engine.py's: decayed weights and spared ones."""
        trained = [weight for weight in self.weights if weight.trained]
        groups = [[w for w in trained if w.decayed == decayed] for decayed in (True, False)]
        return [group for group in groups if group]

    def run(self):
        """One optimizer step in its steady state; returns the memory with its peaks."""
        s, memory = self.settings, self.memory
        memory.allocate("overhead", 2 * s.tokens * 8 + s.mask_bytes)  # inputs and targets, int64
        memory.allocate("parameters", math.ceil(s.packed * BYTES))
        self.resident()
        for self.micro_step in range(2 if s.gradient_accumulation_steps > 1 else 1):  # later ones are as the second
            self.last = self.micro_step or s.gradient_accumulation_steps == 1
            self.traffic.clear()
            memory.phase = "forward"
            self.forward(self.model)
            memory.phase = "backward"
            stream = memory.allocate("activations", s.tokens * s.model.n_embd * s.bytes)  # the stream's gradient
            self.backward(self.model)
            memory.free(stream)
            memory.phase = "reduction"
            self.end_backward()
        memory.phase = "step"
        self.step()
        return memory

    # ---- the walk

    def forward(self, module, keeps=True):
        """keeps: whether tensors are saved for the backward pass; else only the last call's stays, for the next."""
        memory = self.memory
        if module.hooked:
            self.fetch(module, forward=True)
        if module.name == "head":
            memory.phase = "loss"
        names = len(self.named)
        for child in module.inside:
            self.forward(child, keeps and not module.recomputed)
        self.free_all(self.named, names)
        if module.recomputed and keeps:
            self.free_all(self.passing)
            self.kept[module] = memory.allocate("activations", 0 if self.settings.activation_offload else module.output)
        if module in self.cached and keeps:  # recomputed: what was kept is a part of what is kept now
            memory.free(self.cached.pop(module))
        if not keeps:
            self.pass_on(module)
        elif module.kept:
            self.kept[module] = memory.allocate(module.part, module.kept)
        if module.forward:
            memory.touch(module.part, module.forward)
        if module.hooked:
            self.release(module, forward=True)

    def pass_on(self, module):
        """Allocate a call's output in a block that keeps little, because it is recomputed. It is there until the next
        call has read it, and under a name until the call around it ends."""
        memory = self.memory
        named = max(module.named - module.cached, 0)
        if named:
            self.named.append(memory.allocate(module.part, named))
        if not module.kept:
            return
        if module.cached:
            self.cached[module] = memory.allocate(module.part, module.cached)
        self.passing.append(memory.allocate(module.part, max(module.kept - module.cached - named, 0)))
        if len(self.passing) > 1:
            memory.free(self.passing.pop(0))

    def backward(self, module):
        memory = self.memory
        if module.hooked:
            self.fetch(module, forward=False)
        if module.recomputed:
            self.recompute(module)
        for child in reversed(module.inside):
            self.backward(child)
        if module in self.kept and not module.own:
            memory.free(self.kept.pop(module))
        flowing = memory.allocate(module.part, module.backward)
        trained = [weight for weight in module.weights if weight.trained]
        gradients = [memory.allocate("gradients", weight.size * self.settings.bytes) for weight in trained]
        # Before the hooks of its weights' gradients run, autograd frees what a call saved and the gradient that came
        # in. The one that goes out is as large as the saved input, which counts as the previous call's until its turn.
        if module in self.kept:
            memory.free(self.kept.pop(module))
        memory.free(flowing)
        leaving = memory.allocate(module.part, module.leaving)
        for weight, gradient in zip(trained, gradients, strict=True):
            self.take_gradient(weight, gradient)
        memory.free(leaving)
        if module.hooked:
            self.release(module, forward=False)

    def recompute(self, block):
        """The forward pass of a block again, this time keeping what its backward pass needs. It is inside of the hooks
        that fetch the block's weights, and leaves out the sum at the end, which nothing in the backward pass needs."""
        self.memory.free(self.kept.pop(block))
        for child in block.inside[:-1]:
            self.forward(child)

    def take_gradient(self, weight, gradient):
        """Autograd sums a shared weight's gradients before the engine sees them: the first waits for the last."""
        self.uses[weight] += 1
        if self.uses[weight] < weight.uses:
            self.pending[weight] = gradient
            return
        self.uses[weight] = 0
        if weight in self.pending:
            self.memory.free(self.pending.pop(weight))
        self.reduce_later(weight, gradient)

    def put_into_bucket(self, weight, gradient):
        """A gradient that fits into the buffer is copied; one larger than all of it stays until it is reduced, and
        without a buffer (contiguous_gradients false) each does."""
        if self.contiguous and self.elements + weight.size <= self.settings.reduce_bucket_size:
            self.memory.free(gradient)
            gradient = None
        self.bucket.append((weight, gradient))
        self.elements += weight.size

    def free_all(self, tensors, spared=0):
        """Free these, the last first, and take them out of the list. spared: how many stay."""
        while len(tensors) > spared:
            self.memory.free(tensors.pop())

    def shard(self, weight):
        """Elements of one rank's shard of a weight."""
        return -(-weight.size // self.settings.world_size)

    # ---- defined by each stage

    def resident(self):
        """Allocate what lives as long as the engine."""
        raise NotImplementedError

    def fetch(self, module, forward):
        """Before a module's forward (or backward) pass."""

    def release(self, module, forward):
        """After a module's forward (or backward) pass."""

    def reduce_later(self, weight, gradient):
        """A gradient is there."""
        raise NotImplementedError

    def end_backward(self):
        """After the backward pass of a micro-batch."""
        raise NotImplementedError

    def step(self):
        """The optimizer's step."""
        raise NotImplementedError

    def orthogonalize(self):
        """Muon's matrices of one call: in float32, normalised, and narrower ones (muon.py)."""
        self.memory.touch("overhead", 12 * self.settings.largest_of_muon)


class Stage0(Engine):
    """Every rank holds everything. 16-bit weights have a float32 copy of each and of its gradient."""

    def resident(self):
        s = self.settings
        self.memory.allocate("parameters", self.size * s.bytes)
        master_bytes = s.master_bytes if s.bytes < 4 else 0
        self.memory.allocate("optimizer", round(self.trained * (s.moment_bytes + master_bytes)))

    def reduce_later(self, weight, gradient):
        if self.micro_step:  # added to the first micro-batch's
            self.memory.free(gradient)

    def end_backward(self):
        if self.last:
            self.memory.touch("buckets", min(self.trained, 500_000_000) * self.settings.bytes)

    def step(self):
        master = self.memory.allocate("gradients", self.trained * 4 if self.settings.bytes < 4 else 0)
        self.orthogonalize()
        self.memory.free(master)


class Stage12(Engine):
    """Stages 1 and 2: whole weights, a slice of the optimizer, and of the gradients those that the slice touches."""

    def resident(self):
        s = self.settings
        self.memory.allocate("parameters", self.size * s.bytes)
        if not s.offload_optimizer:
            elements = -(-self.trained // s.world_size)
            self.memory.allocate("optimizer", round(elements * (s.master_bytes + s.moment_bytes)))
        self.bucket = []  # (weight, its gradient if that was not copied)
        self.elements = 0  # in the bucket
        self.buffers = []
        self.waiting = {}  # weight -> its gradient, which is reduced after the backward pass
        self.partition = []  # gradients of this rank's slice, of this micro-batch
        self.accumulated = []  # and of those before
        self.reduced = []  # gradients of other ranks' slices that were reduced where they are, and are freed later
        self.touched = self.slice_of_rank()
        self.wide = s.stage == 2 and s.accumulation_bytes == 4 and s.bytes < 4  # summed in float32

    def slice_of_rank(self):
        """{weight: elements of it in the slice} of the rank whose slices touch the most: whole tensors are kept of
        the weights in which a slice begins or ends."""
        return max(self.slices(), key=lambda touched: sum(weight.size for weight in touched))

    def slices(self):
        """For each rank: {weight: elements of it in the rank's slice}; each group is cut into equal slices."""
        ranks = self.settings.world_size
        slices = [{} for _ in range(ranks)]
        for group in self.groups:
            total, end = sum(weight.size for weight in group), 0
            for weight in group:
                begin, end = end, end + weight.size
                for rank in range(begin * ranks // total, -(-end * ranks // total)):
                    low, high = rank * total / ranks, (rank + 1) * total / ranks
                    slices[rank][weight] = min(end, high) - max(begin, low)
        return slices

    def make_buffers(self):
        """The first gradient allocates the buckets."""
        size = self.settings.reduce_bucket_size * self.settings.bytes
        return [self.memory.allocate("buckets", size) for _ in range(2 if self.settings.overlap_comm else 1)]

    def reduce_later(self, weight, gradient):
        s = self.settings
        if self.contiguous and not self.buffers:
            self.buffers = self.make_buffers()
        if s.stage == 1:  # summed over the micro-batches, and reduced with the last one
            if weight in self.waiting:
                self.memory.free(gradient)
            gradient = self.waiting.setdefault(weight, gradient)
        if s.stage == 2 or (s.overlap_comm and self.last):  # else after the backward pass, all at once
            self.waiting.pop(weight, None)
            self.add(weight, gradient)

    def add(self, weight, gradient):
        """Into the bucket, which is reduced first if it would overflow."""
        if self.elements + weight.size > self.settings.reduce_bucket_size:
            self.reduce()
        self.put_into_bucket(weight, gradient)

    def flatten_bucket(self):
        """The slices for all ranks are flattened into one temporary tensor. Where gradients are summed in float32, this
        rank's slices are added to the sums out of it, one after the other, each by a float32 copy."""
        memory = self.memory
        own = [math.ceil(self.touched[weight]) for weight, _ in self.bucket if weight in self.touched]
        if self.wide and own and not self.accumulated:
            self.accumulated = [memory.allocate("gradients", 4 * size) for size in self.partition_sizes()]
        flat = memory.allocate("buckets", self.elements * self.settings.bytes if len(self.bucket) > 1 else 0)
        if self.wide and own:
            memory.touch("gradients", 4 * max(own))
        memory.free(flat)

    def reduce(self):
        s, memory = self.settings, self.memory
        phase_before, memory.phase = memory.phase, "reduction"
        if s.stage == 2 and s.overlap_comm:
            self.free_all(self.reduced)
        self.flatten_bucket()
        for weight, gradient in self.bucket:
            if weight in self.touched:
                stays = self.keep_reduced(weight, gradient)
            else:
                stays = s.stage == 1 or (s.overlap_comm and not self.contiguous)
                self.reduced += [gradient] if gradient and stays else []
            if gradient and not stays:
                memory.free(gradient)
        self.bucket = []
        self.elements = 0
        memory.phase = phase_before

    def keep_reduced(self, weight, gradient):
        """Of a reduced gradient, what this rank's optimizer will read. Returns whether that is the gradient itself."""
        s, memory = self.settings, self.memory
        if s.offload_optimizer:
            memory.touch("overhead", 8 * math.ceil(self.touched[weight]))  # the norm, in float64
        elif gradient and not self.contiguous:
            self.partition.append(gradient)
            return True
        elif not self.partition and not self.wide:
            size = sum(w.size for w in self.touched) * s.bytes
            self.partition = [memory.allocate("gradients", size)]
        return False

    def partition_sizes(self):
        """Elements of this rank's slice of each group."""
        return [-(-sum(weight.size for weight in group) // self.settings.world_size) for group in self.groups]

    def end_backward(self):
        if self.settings.stage == 1 and not self.last:
            return  # the buckets stay as well
        if self.waiting:
            order = {weight: number for number, weight in enumerate(itertools.chain(*self.groups))}
            for weight in sorted(self.waiting, key=order.get):
                self.add(weight, self.waiting.pop(weight))
        self.reduce()
        self.free_all(self.buffers)
        self.free_all(self.reduced)
        if self.accumulated:  # the new gradients are added to those so far
            self.free_all(self.partition)
        else:
            self.accumulated = self.partition
        self.partition = []

    def step(self):
        s = self.settings
        if s.offload_optimizer:
            return
        self.memory.touch("overhead", 8 * math.ceil(max(self.touched.values())))
        for size in [] if self.wide else self.partition_sizes():
            flat = self.memory.allocate("gradients", size * s.bytes)
            if s.bytes < 4:
                self.memory.touch("gradients", size * 4)
            self.memory.free(flat)
            if s.largest_of_muon:
                flat = self.memory.allocate("gradients", size * 4)
                self.orthogonalize()
                self.memory.free(flat)

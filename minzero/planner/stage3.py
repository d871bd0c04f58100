"""A replay of ZeRO-3's step: weights are gathered, prefetched and released as by DeepSpeed's coordinator."""

import bisect
import itertools
from collections import deque

from minzero.planner.activations import calls_of, weights_of
from minzero.planner.replay import Engine


class Stage3(Engine):
    """Everything in slices; weights are gathered for the modules that need them, some ahead of time."""

    def resident(self):
        s, memory = self.settings, self.memory
        shards = sum(self.shard(weight) for weight in self.weights)
        self.persistent = {w for w in self.weights if w.size <= s.persistence_threshold}
        if not s.offload_param:
            memory.allocate("parameters", shards * s.bytes)
            if s.second_copy > 1:  # made in the first forward pass, dropped after the update
                memory.allocate("parameters", self.size * s.bytes / min(s.second_copy, s.world_size))
        if s.world_size > 1 or s.offload_param:
            memory.allocate("gathered", sum(w.size for w in self.persistent) * s.bytes)
        self.resident_optimizer(sum(self.shard(weight) for weight in self.weights if weight.trained))
        if self.contiguous:
            memory.allocate("buckets", s.reduce_bucket_size * s.bytes)
        self.bucket = []  # (weight, its gradient if that was not copied)
        self.elements = 0  # in the bucket
        self.free_gather = s.world_size == 1 and not s.offload_param  # a gathered weight is the shard itself
        self.gathered = dict.fromkeys(self.persistent)  # weight -> its tensor
        self.flight = {}  # weight -> (the weights of the same call, its tensor, whether that is the weight itself)
        self.unreleased = []  # weights of embeddings, at the end of a backward pass
        self.leaf = None  # the leaf module whose backward pass runs
        self.leaf_gradients = []  # (weight, gradient) of that module, reduced when it ends
        self.place_of = {weight: number for number, weight in enumerate(itertools.chain(*self.groups))}
        self.record_trace()
        self.restart()

    def resident_optimizer(self, shards):
        """Master weights, moments and gradients. shards: elements of this rank's weights that are trained."""
        s, memory = self.settings, self.memory
        if not s.offload_optimizer:
            # float32 weights have a master copy too: stage3.py compares a torch.device with a string to see that it
            # needs none, and these are never equal
            memory.allocate("optimizer", round(shards * (s.moment_bytes + s.master_bytes)))
            memory.allocate("gradients", shards * (s.accumulation_bytes or s.bytes))
            return
        on_gpu = sum(self.sub_groups_on_gpu())
        if on_gpu:
            memory.allocate("optimizer", round(on_gpu * (s.moment_bytes + s.master_bytes)))
            memory.allocate("gradients", on_gpu * 4)

    # ---- the coordinator's trace of a first step: the modules in the order of their hooks, and their weights

    def record_trace(self):
        self.needs = {m: weights_of(m) if m.leaf else m.weights for m in calls_of(self.model)}
        self.order = []
        self.record_forward(self.model)
        self.turn = len(self.order)  # the step at which the backward pass of the model begins
        self.record_backward(self.model)
        # elements of all weights before each step of the trace, as they count when a leaf is released: with what is
        # inside of each module; and when another module is: without, so that blocks count as nothing
        self.order_sums = {True: [0], False: [0]}
        for leaf, sums in self.order_sums.items():
            for module in self.order:
                weights = weights_of(module) if leaf else module.weights
                sums.append(sums[-1] + sum(weight.size for weight in weights))
        self.next_uses = {}  # weight -> the steps of the trace that need it
        for step, module in enumerate(self.order):
            for weight in self.needs[module]:
                self.next_uses.setdefault(weight, []).append(step)

    def record_forward(self, module):
        if module.hooked:
            self.order.append(module)
        for child in module.inside:
            self.record_forward(child)

    def record_backward(self, module):
        if module.hooked:
            self.order.append(module)
        if module.recomputed:
            self.record_recomputation(module)
        for child in reversed(module.inside):
            self.record_backward(child)

    def record_recomputation(self, block):
        """There are no hooks inside of a leaf."""

    def restart(self):
        """The coordinator at the beginning of a forward pass."""
        self.at = 0  # the step of the trace
        self.live = 0  # elements of the weights that are gathered
        self.copied = set()  # weights that were gathered before: of them there may be a second copy
        self.queue = deque((weight, step) for step, module in enumerate(self.order) for weight in self.needs[module])
        self.fetched_for = {}  # weight -> the last step of the trace that a fetch was meant for

    # ---- weights

    def gather(self, weights):
        """Several weights in one call arrive in a flat tensor, and are copied out of it when waited for."""
        s = self.settings
        weights = [weight for weight in weights if weight not in self.gathered and weight not in self.flight]
        if not weights:
            return
        self.live += sum(weight.size for weight in weights)
        self.traffic["gathers"] += 1
        self.traffic["gathered"] += sum(weight.size for weight in weights)
        first = [weight for weight in weights if weight not in self.copied]
        self.copied.update(first)
        self.traffic["gathered_first"] += sum(weight.size for weight in first)
        self.traffic["gathers_first"] += bool(first)
        sizes = [0 if self.free_gather else self.shard(weight) * s.world_size * s.bytes for weight in weights]
        if len(weights) == 1 or s.world_size == 1 or s.allgather_sequential:
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
        self.wait_for(self.needs[module])
        self.prefetch(module)
        self.at += 1

    def wait_for(self, weights):
        for weight in weights:
            self.wait(weight)

    def prefetch(self, module):
        """Gather the weights that come next in the trace, up to the limits of the settings."""
        s = self.settings
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
        if module.name.endswith("embedding") and not forward:
            # its hook waits for a gradient of its input, and token ids have none: freed after the backward pass
            self.unreleased += [weight for weight in module.weights if weight not in self.persistent]
            return
        if module is self.leaf and not forward:
            gradients = sorted(self.leaf_gradients, key=lambda pair: self.place_of[pair[0]])
            self.leaf = None
            self.leaf_gradients = []
            for weight, gradient in gradients:
                self.reduce_later(weight, gradient)
        for weight in self.needs[module]:
            if weight in self.persistent or self.gathered.get(weight) is None:
                continue
            if not self.needed_soon(weight, module.leaf):
                self.free_gathered(weight)

    def needed_soon(self, weight, leaf=False):
        """Whether a prefetch was meant for a later step, or the weight's next use is within the reuse distance. When a
        leaf is released, DeepSpeed takes what is inside of a later module for its own, so all weights are in use where
        the backward pass of the model begins."""
        if self.fetched_for.get(weight, -1) > self.at:
            return True
        uses = self.next_uses[weight]
        following = bisect.bisect_left(uses, self.at)
        steps = uses[following : following + 1]
        if leaf and self.at <= self.turn:
            steps = [*steps, self.turn]
        if not steps:
            return False
        sums = self.order_sums[leaf]
        distance = sums[min(steps)] - sums[self.at]
        return distance < self.settings.max_reuse_distance

    def free_gathered(self, weight):
        if self.gathered.get(weight) is not None:
            self.memory.free(self.gathered.pop(weight))
            self.live -= weight.size

    # ---- gradients

    def reduce_later(self, weight, gradient):
        if self.leaf:
            self.leaf_gradients.append((weight, gradient))
            return
        if self.elements and self.elements + weight.size > self.settings.reduce_bucket_size:
            self.reduce()
        self.put_into_bucket(weight, gradient)

    def flatten_bucket(self):
        """reduce_scatter's input, padded to whole shards; it lives until the reduction ends."""
        s = self.settings
        several = len(self.bucket) > 1 or any(weight.size % s.world_size for weight, _ in self.bucket)
        if not several:
            return []
        size = sum(self.shard(weight) for weight, _ in self.bucket) * s.world_size * s.bytes
        return [self.memory.allocate("buckets", size)]

    def reduce(self):
        s, memory = self.settings, self.memory
        phase_before, memory.phase = memory.phase, "reduction"
        self.traffic["reductions"] += 1
        temporary = self.flatten_bucket()
        shards = [self.shard(weight) for weight, _ in self.bucket]
        if s.accumulation_bytes and s.accumulation_bytes != s.bytes:
            temporary.append(memory.allocate("gradients", sum(shards) * s.accumulation_bytes))
        if s.offload_optimizer and shards:
            # on a GPU also at the first micro-batch: what was copied to the CPU is copied back for the norm
            copy = memory.allocate("gradients", max(shards) * s.bytes)
            memory.touch("overhead", min(max(shards), 250_000_000) * 8)  # the norm, in float64
            memory.free(copy)
        for _, gradient in self.bucket:
            if gradient:
                memory.free(gradient)
        for tensor in temporary:
            memory.free(tensor)
        self.bucket = []
        self.elements = 0
        memory.phase = phase_before

    def end_backward(self):
        self.reduce()
        for weight in self.unreleased:
            self.free_gathered(weight)
        self.unreleased = []
        for weight in list(self.flight):
            self.wait(weight)
            self.free_gathered(weight)
        self.restart()
        if self.last:
            for weight in list(self.gathered):
                self.free_gathered(weight)

    # ---- the optimizer

    def step(self):
        s, memory = self.settings, self.memory
        if s.offload_optimizer:
            # torch's AdamW, which updates the sub-groups on the GPU, holds a root of one moment
            memory.touch("optimizer", max(self.sub_groups_on_gpu(), default=0) * 4)
            return
        memory.touch("overhead", 8 * max(self.shard(weight) for weight in self.weights if weight.trained))
        if s.world_size > 1 or s.offload_param:  # persistent weights too go back to slices
            memory.free(("gathered", sum(w.size for w in self.persistent) * s.bytes))
        gradient_bytes = s.accumulation_bytes or s.bytes
        for size in self.sub_groups():
            flat = memory.allocate("gradients", size * gradient_bytes)
            if gradient_bytes != s.master_bytes:
                memory.touch("gradients", size * s.master_bytes)
            self.orthogonalize()
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

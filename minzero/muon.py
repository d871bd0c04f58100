"""Muon for the matrices of the blocks, AdamW for everything else (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon).

The momentum of the gradient is an element-wise state, so each rank keeps it of its own elements, as AdamW its moments.
The update is that momentum made orthogonal, which needs whole matrices: each is sent to one rank, made orthogonal
there, and sent back in parts. All of this is in the optimizer's step, after the gradient was summed, clipped and found
good.

DeepSpeed's function orthogonalises. Its own Muon is not used: docs/optimizers.md has the reasons.
"""

import math
from typing import NamedTuple

import torch
from deepspeed import comm

from minzero import dist
from minzero.config.sections import ModelConfig
from minzero.mup import role_of
from minzero.sizes import MUON_AT_A_TIME
from minzero.zero import KINDS_OF_MUON, local_fragments, newton_schulz, optimizer_state, sharded_tensors


class Matrices(NamedTuple):
    """Matrices of one shape that lie one after the other in a flattened parameter, and are made orthogonal one by
    one."""

    parameter: str
    start: int  # the first element
    shape: tuple  # (how many, rows, columns)

    @property
    def elements(self):
        return math.prod(self.shape)

    def overlap(self, start, length):
        """(first element in these matrices, how many) of elements [start, start + length) of the parameter, or None."""
        first = max(start, self.start)
        end = min(start + length, self.start + self.elements)
        return (first - self.start, end - first) if end > first else None


def matrices_of(model: ModelConfig, name, shape):
    """The Matrices of a parameter that Muon updates; none of one that is AdamW's: embeddings, output layer, routers,
    vectors. Queries, keys and values are matrices of their own, as are SwiGLU's gate and value, and each expert's.
    shape: of the parameter."""
    if len(shape) < 2 or role_of(name) != "hidden":
        return []
    experts = shape[0] if len(shape) == 3 else 1
    rows, columns = shape[-2:]
    module = name.split(".")[-2]
    if module == "qkv" and model.kv_heads != model.n_head:  # grouped queries
        key_rows = model.kv_heads * model.head_size
        query_rows = rows - 2 * key_rows
        keys_and_values = handled_at_once(name, query_rows * columns, 2, key_rows, columns)
        return [Matrices(name, 0, (1, query_rows, columns)), *keys_and_values]
    count = {"qkv": 3, "up": 2 if model.gated else 1}.get(module, 1)
    return handled_at_once(name, 0, experts * count, rows // count, columns)


def handled_at_once(name, start, count, rows, columns):
    """`count` matrices of one shape, from element `start` of a parameter on, in Matrices of at most MUON_AT_A_TIME
    elements."""
    most = max(1, MUON_AT_A_TIME // (rows * columns))
    return [
        Matrices(name, start + first * rows * columns, (min(most, count - first), rows, columns))
        for first in range(0, count, most)
    ]


def orthogonal(matrices):
    """(n, rows, columns) -> each made nearly orthogonal, times sqrt(max(1, rows / columns)): DeepSpeed 0.19.8's
    muon_update after its momentum. In float16 where the device has it, else in float32."""
    rows, columns = matrices.shape[-2:]
    return newton_schulz(matrices).float().mul_(math.sqrt(max(1, rows / columns)))


class Round(NamedTuple):
    """One exchange, in which each rank makes at most one of some Matrices orthogonal. From the view of this rank."""

    sent: list  # for each rank: (offset in the flat tensor, length) of what this one has of that one's matrices
    received: list  # for each rank: (first element, length) of what that one has of this one's matrices
    shape: tuple | None  # of these


class Muon(torch.optim.AdamW):
    """Muon for the groups that have a "momentum", AdamW for the others, over DeepSpeed's flat tensors or whole
    parameters.

    matrices: {name of a parameter: its Matrices}. `attach` must follow when DeepSpeed has taken the optimizer."""

    def __init__(self, groups, matrices, **adam):
        super().__init__(groups, **adam)
        self.matrices = matrices
        self.rounds = {}  # id of a flat tensor: its Rounds
        self.device = None

    def attach(self, engine):
        """Find out which rank has which elements of which matrix. Every rank must call this."""
        self.device = engine.device
        own = [fragment for fragment in local_fragments(engine) if fragment.parameter in self.matrices]
        if engine.zero_optimization_stage() == 0:  # every rank has all, and computes all
            for fragment in own:
                parts = self.matrices[fragment.parameter]
                self.rounds[id(fragment.flat)] = [
                    Round([(part.start, part.elements)], [(0, part.elements)], part.shape) for part in parts
                ]
            return
        places = {f.parameter: (f.group, f.start, f.length, f.offset) for f in own}
        of_ranks = dist.gather(places)
        groups = {name: place[0] for found in of_ranks for name, place in found.items()}
        for group, flat in enumerate(sharded_tensors(engine)):
            parts = [part for name in self.matrices if groups[name] == group for part in self.matrices[name]]
            if parts:
                self.rounds[id(flat)] = rounds_of(parts, of_ranks, comm.get_rank())

    @torch.no_grad()
    def step(self, closure=None):
        groups = self.param_groups
        self.param_groups = [group for group in groups if "momentum" not in group]
        super().step()
        self.param_groups = groups
        if not self.rounds:  # DeepSpeed tries the optimizer while it makes the engine
            return
        for group in groups:
            if "momentum" in group:
                for flat in group["params"]:
                    self.update(flat, **group)

    def update(self, flat, lr, momentum, weight_decay, **_):
        """Update a flat tensor by its gradient, which is overwritten: Nesterov's momentum, orthogonalisation, decay."""
        state = optimizer_state(self, flat, KINDS_OF_MUON)
        state["step"] += 1
        state["exp_avg"].lerp_(flat.grad, 1 - momentum)
        update = flat.grad.lerp_(state["exp_avg"], momentum)
        for one in self.rounds[id(flat)]:
            self.make_orthogonal(update.view(-1), one)
        flat.mul_(1 - lr * weight_decay)
        flat.add_(update, alpha=-lr)

    def make_orthogonal(self, flat, one):
        """Make the matrices of a Round orthogonal, in place. flat: this rank's part of them and others."""
        lengths_sent = [length for _, length in one.sent]
        lengths_received = [length for _, length in one.received]
        own = torch.cat([flat[offset : offset + length] for offset, length in one.sent]).to(self.device)
        moved = exchange(own, lengths_sent, lengths_received)
        del own  # the memory of one matrix
        if one.shape:
            whole = torch.empty(math.prod(one.shape), device=self.device)
            for (first, length), piece in zip(one.received, moved.split(lengths_received), strict=True):
                whole[first : first + length] = piece
            del moved
            whole = orthogonal(whole.view(one.shape)).reshape(-1)
            moved = torch.cat([whole[first : first + length] for first, length in one.received])
            del whole
        moved = exchange(moved, lengths_received, lengths_sent)
        for (offset, length), piece in zip(one.sent, moved.split(lengths_sent), strict=True):
            flat[offset : offset + length] = piece


def rounds_of(parts, of_ranks, rank):
    """The Rounds of this rank for the Matrices of one tensor, the largest first, so that those of one round are alike.
    of_ranks: for each rank {parameter: (group, start, length, offset) of its fragment}."""
    ranks = len(of_ranks)
    parts = sorted(parts, key=lambda part: -part.elements)  # stable: the same on all ranks
    rounds = []
    for begin in range(0, len(parts), ranks):
        of_round = parts[begin : begin + ranks]
        received, shape = [(0, 0)] * ranks, None
        if rank < len(of_round):
            shape = of_round[rank].shape
            received = [overlap_of(of_round[rank], places)[0] for places in of_ranks]
        sent = [overlap_of(part, of_ranks[rank])[1] for part in of_round]
        rounds.append(Round(sent + [(0, 0)] * (ranks - len(of_round)), received, shape))
    return rounds


def overlap_of(part, places):
    """What a rank has of some Matrices: ((first element in these, length), (offset in its flat tensor, length)).
    places: {parameter: (group, start, length, offset)} of that rank."""
    _, start, length, offset = places.get(part.parameter, (0, 0, 0, 0))
    found = part.overlap(start, length)
    if found is None:
        return (0, 0), (0, 0)
    first, elements = found
    return found, (offset + part.start + first - start, elements)


def exchange(tensor, lengths_sent, lengths_received):
    """Send parts of a flat tensor to the ranks, and return what they have sent, both in their order. Every rank must
    call this."""
    if len(lengths_sent) == 1:
        return tensor
    arrived = tensor.new_empty(sum(lengths_received))
    comm.all_to_all_single(arrived, tensor, lengths_received, lengths_sent)  # DeepSpeed's: it counts its calls
    return arrived

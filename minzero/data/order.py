"""The order of the data: the window of sample i of a run is a pure function of (seed, i, the data sets).

Every epoch visits each window once, in its own order. The order is never stored: a Feistel network turns a position
into a window by arithmetic alone, so a trillion tokens cost no memory and resuming a run takes one integer. It does
not depend on which rank reads sample i, or in which micro-batch.
"""

import functools
import math
from fractions import Fraction

import numpy as np

from minzero.errors import UserError

ROUNDS = 8
LARGEST_PERIOD = 100_000  # samples after which a mixture's sequence repeats; its table takes 5 bytes a sample


def mix(values):
    """Scramble uint64 values; the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@functools.lru_cache(maxsize=1024)
def round_keys(seed, epoch):
    """The keys of one epoch's permutation, (ROUNDS,) uint64. Cached: they cost as much as the permutation of a
    micro-batch and rarely change."""
    seeds = np.array([seed % 2**64], dtype=np.uint64)
    epochs = np.array([epoch], dtype=np.uint64)
    key = mix(mix(seeds + np.uint64(0x9E3779B97F4A7C15)) + epochs * np.uint64(ROUNDS))
    return mix(key + np.arange(ROUNDS, dtype=np.uint64))


def permute(positions, n, keys):
    """Map positions in [0, n) to [0, n), one to one. positions: (k,) uint64; keys: (ROUNDS,) uint64.

    A Feistel network over pairs (left, right) of Z_a x Z_b with a * b >= n; a result outside [0, n) is permuted again
    until it falls inside ("cycle walking": Black and Rogaway, Ciphers with Arbitrary
    Finite Domains, CT-RSA 2002). a * b exceeds n by less than a, so this is rare."""
    root = max(1, math.isqrt(n))
    a, b = np.uint64(root), np.uint64(-(-n // root))
    left, right = positions // b, positions % b
    for number in range(ROUNDS):
        if number % 2:
            right = (right + mix(left ^ keys[number]) % b) % b
        else:
            left = (left + mix(right ^ keys[number]) % a) % a
    result = left * b + right
    outside = result >= n
    if outside.any():
        result[outside] = permute(result[outside], n, keys)
    return result


def windows_of(samples, n, seed):
    """Sample numbers -> window numbers, (k,) int64. samples: (k,) integers >= 0; n: number of windows in the data."""
    samples = np.asarray(samples, dtype=np.uint64)
    epochs, positions = samples // np.uint64(n), samples % np.uint64(n)
    result = np.empty(len(samples), dtype=np.int64)
    for epoch in set(epochs.tolist()):  # nearly always one
        chosen = epochs == epoch
        result[chosen] = permute(positions[chosen], n, round_keys(seed, epoch))
    return result


class Schedule:
    """The sequence of a mixture: for sample i of a run, the data set and the number of the sample within it.

    weights: positive numbers, one a data set, taken as the decimals they are written as. After any number of samples
    each data set has had its share to within less than one sample: the quota method (Balinski and Young, The Quota
    Method of Apportionment, American Mathematical Monthly 82, 1975). It gives the next seat to the state that would
    fall below its quota first, among those that the seat does not put a whole seat above it. With weights a_c / period
    the sequence repeats after `period` samples, so a table of one period is enough for any i.

    Raises UserError if the weights have no common period up to LARGEST_PERIOD."""

    def __init__(self, weights):
        shares = [Fraction(str(weight)) for weight in weights]
        shares = [share / sum(shares) for share in shares]
        self.period = math.lcm(*(share.denominator for share in shares))
        if self.period > LARGEST_PERIOD:
            rounded = ", ".join(f"{float(share):.3f}" for share in shares)
            raise UserError(
                f"data.path: the weights {', '.join(map(str, weights))} repeat only after {self.period} samples, "
                f"expected at most {LARGEST_PERIOD}; round them, as {rounded}"
            )
        self.counts = [int(share * self.period) for share in shares]  # samples of each in a period
        taken = [0] * len(shares)
        self.sets = np.zeros(self.period, dtype=np.uint8 if len(shares) <= 256 else np.uint32)
        self.before = np.zeros(self.period, dtype=np.uint32)  # earlier samples of the same set in the period
        for sample in range(self.period):
            fits = [c for c, n in enumerate(self.counts) if taken[c] * self.period < n * (sample + 1)]
            # floats distinguish these fractions: terms below 100,000 make them differ by 1e-10 or not at all
            chosen = min(fits, key=lambda c: (taken[c] + 1) / self.counts[c])
            self.sets[sample] = chosen
            self.before[sample] = taken[chosen]
            taken[chosen] += 1

    def draws(self, samples):
        """Sample numbers (k,) -> numbers of the data set and of the sample within it, both (k,) int64."""
        rounds, places = np.divmod(np.asarray(samples, dtype=np.int64), self.period)
        sets = self.sets[places]
        return sets.astype(np.int64), rounds * np.array(self.counts)[sets] + self.before[places]


def sample_numbers(first_sample, micro_step, rank, world_size, micro_batch_size):
    """The sample numbers of one micro-batch of one rank, (micro_batch_size,) int64.

    A step of a run is consecutive samples from first_sample on. Ranks and micro-batches only divide them, so the global
    batch does not depend on the number of ranks."""
    first = first_sample + (micro_step * world_size + rank) * micro_batch_size
    return np.arange(first, first + micro_batch_size)


def validation_windows(total, wanted):
    """`wanted` of `total` windows, spread evenly, or all of them: the same at every evaluation."""
    count = min(total, max(1, wanted))
    return np.arange(count) * total // count

"""Which window of the data is sample i of a run: a pure function of (seed, i, number of windows).

Every epoch visits each window once, in an order of its own. The order is never stored: a Feistel
network turns a position into a window by arithmetic alone, so a trillion tokens cost no memory and
resuming a run takes one integer. Which rank reads sample i, in which micro-batch, does not matter.
"""

import numpy as np

ROUNDS = 8


def mix(values):
    """Scramble uint64 values; the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(positions, n, keys):
    """Map positions in [0, n) to [0, n), one to one for each key.

    positions, keys: (k,) uint64. A Feistel network over pairs (left, right) of Z_a x Z_b with
    a * b >= n; a result outside [0, n) is sent through again until it falls inside ("cycle
    walking": Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002). a * b exceeds n
    by less than a, so this is rare."""
    a = np.uint64(max(1, int(np.sqrt(float(n)))))
    b = np.uint64(-(-n // int(a)))
    result, todo = positions.copy(), np.arange(len(positions))
    while len(todo):
        left, right, key = result[todo] // b, result[todo] % b, keys[todo]
        for number in range(ROUNDS):
            round_key = mix(key + np.uint64(number))
            if number % 2:
                right = (right + mix(left ^ round_key) % b) % b
            else:
                left = (left + mix(right ^ round_key) % a) % a
        result[todo] = left * b + right
        todo = todo[result[todo] >= n]
    return result


def windows_of(samples, n, seed):
    """Sample numbers -> window numbers. samples: (k,) integers >= 0; n: windows of the data set."""
    samples = np.asarray(samples, dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the point
        epoch = samples // np.uint64(n)
        keys = mix(mix(np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15)) + epoch * np.uint64(ROUNDS))
        return permute(samples % np.uint64(n), n, keys).astype(np.int64)


def sample_numbers(step, micro_step, rank, world_size, micro_batch_size, accumulation):
    """The samples that one rank takes in one micro-batch of one optimizer step.

    Step s of a run is samples [s * batch, (s + 1) * batch); ranks and micro-batches only divide them
    up, so the global batch is the same whatever the number of ranks."""
    round_size = micro_batch_size * world_size
    first = (step * accumulation + micro_step) * round_size + rank * micro_batch_size
    return np.arange(first, first + micro_batch_size)


def validation_windows(total, wanted):
    """`wanted` windows spread evenly over all `total`, or all of them: the same at every evaluation."""
    count = min(total, max(1, wanted))
    return np.arange(count) * total // count

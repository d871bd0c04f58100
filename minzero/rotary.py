"""Rotary positions (RoFormer: Su et al. 2021, arXiv 2104.09864) and their scalings to longer contexts.

Computed as transformers computes them, to the last bit: an angle is a position times a frequency, so at position 10,000
another rounding of a frequency would show."""

import math

import torch

from minzero.config.sections import ModelConfig


def rotary_angles(config: ModelConfig, length, device):
    """Cosines and sines by which channel pair i is rotated at position t: the angle is t times the i-th frequency.

    Returns two (length, rotary_channels / 2) float32 tensors."""
    frequencies, factor = scaled_frequencies(config, device)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
    return angles.cos() * factor, angles.sin() * factor


def scaled_frequencies(config: ModelConfig, device):
    """The frequencies of all pairs, radians a token, and the factor of cosines and sines."""
    size = config.rotary_channels
    wavelengths = config.rotary_theta ** (torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)
    frequencies = 1.0 / wavelengths
    scaling = config.rotary_scaling
    if scaling is None:
        return frequencies, 1.0
    kind = scaling["rope_type"]
    if kind == "linear":  # Chen et al. 2023, arXiv 2306.15595
        return frequencies / scaling["factor"], 1.0
    if kind == "llama3":
        return llama3_frequencies(frequencies, scaling), 1.0
    return yarn_frequencies(wavelengths, config.rotary_theta, scaling), yarn_factor(scaling)


def llama3_frequencies(frequencies, scaling):
    """Llama 3.1's: pairs that are rotated by few full turns within the original context have their frequency divided by
    `factor`, those rotated by many keep it, with a ramp between (meta-llama/llama-models, models/llama3/model.py,
    apply_scaling)."""
    factor, low, high = (scaling[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    context = scaling["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    slowed = torch.where(wavelengths > context / low, frequencies / factor, frequencies)
    share = (context / wavelengths - low) / (high - low)
    between = (1 - share) * slowed / factor + share * slowed
    is_between = ~(wavelengths < context / high) * ~(wavelengths > context / low)
    return torch.where(is_between, between, slowed)


def yarn_frequencies(wavelengths, theta, scaling):
    """YaRN's: as Llama 3.1's, with a ramp over the pairs (Peng et al. 2023, arXiv 2309.00071, section 3.2)."""
    size = 2 * len(wavelengths)
    context = scaling["original_max_position_embeddings"]

    def pair_rotated(times):
        return size * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    first = pair_rotated(scaling.get("beta_fast") or 32)
    last = pair_rotated(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first = math.floor(first)
        last = math.ceil(last)
    first = max(first, 0)
    last = min(last, size - 1)
    if first == last:
        last += 0.001
    pairs = torch.arange(size // 2, dtype=torch.float32, device=wavelengths.device)
    kept = 1 - torch.clamp((pairs - first) / (last - first), 0, 1)
    return 1.0 / (scaling["factor"] * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def yarn_factor(scaling):
    """The factor of YaRN's cosines and sines, which makes attention's scores larger by its square (section 3.4)."""

    def of(weight):
        return 0.1 * weight * math.log(scaling["factor"]) + 1.0

    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return of(scaling["mscale"]) / of(scaling["mscale_all_dim"])
    return of(1)

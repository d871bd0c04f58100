"""Width transfer (muP): initial weights and learning rates with which the best rate of a narrow model is also that of a
wide one. Needs no torch.

Tensor Programs V (Yang et al. 2022, arXiv 2203.03466), table 3, for Adam: the formulation without multipliers in the
model. Factors are relative to a model of width train.mup_base_width, where all are 1.
"""


def width_ratio(config, base_width):
    """The width of a model over that of its base; 1 without a base. config: a ModelConfig."""
    return config.n_embd / base_width if base_width else 1


def role_of(name):
    """What the matrix of this name is, by which of its sides grow with the width: input (embeddings: the outputs),
    output (the output layer, a router of experts: the inputs), hidden (all others: both)."""
    parts = name.split(".")
    if parts[-2] in ("head", "router"):
        return "output"
    return "hidden" if parts[0] == "blocks" else "input"


def std_factors(model, config, base_width):
    """{module: by what the initial standard deviation of its weight is multiplied}: as 1 / sqrt(fan-in) for hidden
    matrices, as 1 / fan-in for the output. model: the GPT of this ModelConfig."""
    ratio = width_ratio(config, base_width)
    factors = {"input": 1.0, "hidden": ratio**-0.5, "output": 1 / ratio}
    return {module: factors[role_of(f"{name}.weight")] for name, module in model.named_modules()}


def rate_factor(role, ratio):
    """By what AdamW's learning rate is multiplied."""
    return 1.0 if role == "input" else 1 / ratio

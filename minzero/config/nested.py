"""Nested dictionaries of settings: laid over each other, or written flat."""


def merge(base, over):
    """A new dictionary: `base` with the values of `over`, section by section."""
    merged = dict(base)
    for name, value in over.items():
        both_are_sections = isinstance(value, dict) and isinstance(merged.get(name), dict)
        if both_are_sections and name != "path":  # data.path: a mixture of data sets is one value
            value = merge(merged[name], value)
        merged[name] = value
    return merged


def flat(values, prefix=""):
    """{"train": {"lr": 1}} -> {"train.lr": 1}, for nested dictionaries."""
    found = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found

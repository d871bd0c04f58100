"""minZeRO trains GPTs with DeepSpeed. From Python:

from minzero import load

model, tokenizer = load("out/tiny")
"""

__all__ = ["load"]


def __getattr__(name):
    if name == "load":  # imported only when it is used: it needs torch
        from minzero.trained import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The model that train.init_from names gives the keys of the model section that a config leaves out.

torch and transformers, which take seconds, are imported only where train.init_from is set.
"""

import dataclasses
import json
import os

from minzero import commands
from minzero.config.build import build
from minzero.config.sections import Config, ModelConfig

NOT_OF_THE_WEIGHTS = ("dropout", "init_std")  # settings of training: left out, they have their defaults
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
ROUTER_LOSSES = ("balance_loss", "balance_over", "router_z_loss")  # published configs lack the last two


def model_left_out(config: Config, given):
    """The ModelConfig whose keys count where the model section leaves them out: that of the run that is continued, or
    else of the model that train.init_from names. A run that is continued needs that model no more.

    config: as far as it is given; given: the names of its model section's keys. Rank 0 prints a line on stderr. Raises
    UserError if there is no such model, or the keys that are given differ from it."""
    from minzero import resume, trained

    train = config.train
    if saved := resume.saved_model(train):
        source, section = saved
        model = build({"model": section}, source / "state.json").model
    else:
        keys = {name: getattr(config.model, name) for name in given}
        source = train.init_from
        model = trained.model_to_start_from(source, lambda saved: dataclasses.replace(saved, **keys))
        defaults = ModelConfig()
        model = dataclasses.replace(model, **{name: getattr(defaults, name) for name in NOT_OF_THE_WEIGHTS})
    if os.environ.get("RANK", "0") == "0" and (keys := in_words(model, given)):
        commands.say(f"model: the keys that the config leaves out are those of {source}: {keys}")
    return model


def in_words(model: ModelConfig, given):
    """The keys of a model that are not given, as "n_layer 24, mlp swiglu": the sizes, a router's losses, and what is
    not the default."""
    always = SIZES + ROUTER_LOSSES if model.n_expert else SIZES
    words = []
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if field.name not in given and (field.name in always or value != field.default):
            words.append(f"{field.name} {value if isinstance(value, str) else json.dumps(value)}")
    return ", ".join(words)

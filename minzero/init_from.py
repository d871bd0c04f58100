"""The model that train.init_from names gives the keys of the model section that a config leaves out.

torch and transformers, which take seconds, are imported only where train.init_from is set.
"""

import dataclasses
import json

from minzero import commands
from minzero.config.build import build
from minzero.config.sections import Config, ModelConfig

NOT_OF_THE_WEIGHTS = ("dropout", "init_std")  # settings of training: left out, they have their defaults
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
ROUTER_LOSSES = ("balance_loss", "balance_over", "router_z_loss")  # published configs lack the last two


def model_defaults(config: Config, given):
    """The ModelConfig whose keys count where the model section leaves them out: that of the run that is continued, or
    else of the model that train.init_from names. A run that is continued needs that model no more.

    config: as far as it is given; given: the names of its model section's keys. Rank 0 prints a line on stderr. Raises
    UserError if there is no such model, or the keys that are given differ from it."""
    from minzero import resume, trained

    train = config.train
    if saved := resume.saved_model(train):
        source, saved_config = saved
        model = build({"model": saved_config["model"]}, source / "state.json").model
        before = saved_config["train"].get("init_from")
        if before != train.init_from and commands.is_first_rank():
            began = f"weights of {before}" if before else "random weights"
            commands.say(
                f"warning: train.init_from {train.init_from} is not read: {train.out_dir} holds a run that began with "
                f"{began}, and that is continued; for another one give another --train.out_dir"
            )
    else:
        keys = {name: getattr(config.model, name) for name in given}
        source = train.init_from
        model = trained.model_to_start_from(source, lambda saved: dataclasses.replace(saved, **keys))
        defaults = ModelConfig()
        model = dataclasses.replace(model, **{name: getattr(defaults, name) for name in NOT_OF_THE_WEIGHTS})
    if commands.is_first_rank() and (keys := in_words(model, given)):
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

"""The section `model` of a config file: the shape of a model, and what it computes."""

from dataclasses import dataclass

from minzero.config.values import in_short, key, nearest_divisors, printable
from minzero.errors import UserError

# rope_type of model.rotary_scaling: (the names that it needs, those that it may have), as transformers has them
ROTARY_SCALINGS = {
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
}


def is_chosen(layers, layer):
    """Whether a key that chooses layers chooses this one: every k-th, or those of a list."""
    if isinstance(layers, list):
        return layer in layers
    return layers is not None and (layer + 1) % layers == 0


@dataclass
class ModelConfig:
    n_layer: int = key(12, "transformer blocks", minimum=1, maximum=10**5)
    n_head: int = key(12, "query heads of each attention", minimum=1, maximum=2**20)
    n_kv_head: int | None = key(
        None, "key and value heads, shared by groups of query heads; null: n_head", minimum=1, maximum=2**20
    )
    n_embd: int = key(768, "width of the residual stream", minimum=1, maximum=2**20)
    head_dim: int | None = key(None, "channels of a head; null: n_embd / n_head", minimum=1, maximum=2**20)
    block_size: int = key(1024, "context length in tokens", minimum=1, maximum=2**30)
    vocab_size: int = key(50257, "number of token ids", minimum=1, maximum=2**32)
    mlp_hidden: int | None = key(
        None,
        "hidden width of the MLP; null: 4 n_embd (gelu), 8/3 n_embd rounded up to a multiple of 64 (swiglu)",
        minimum=1,
        maximum=2**24,
    )
    dropout: float = key(0.0, "probability of dropping an activation", minimum=0, maximum=0.99)
    bias: bool = key(True, "biases in the linear layers and layer norms")
    qkv_bias: bool | None = key(None, "biases of queries, keys and values; null: as bias")
    norm: str = key("layernorm", "normalisation of each sub-layer", ["layernorm", "rmsnorm"])
    norm_position: str = key(
        "before", "whether a norm is before a sub-layer or after it", ["before", "after"], off="before"
    )
    norm_eps: float = key(
        1e-5, "epsilon of the norms, added to the variance or mean square under the root", minimum=1e-12, maximum=1
    )
    position: str = key(
        "learned", "position encoding: learned embeddings, or rotary angles of queries and keys", ["learned", "rotary"]
    )
    rotary_theta: float = key(10000.0, "base of the rotary wavelengths", minimum=1, maximum=1e12)
    rotary_fraction: float = key(1.0, "part of a head's channels that are rotated", minimum=1e-6, maximum=1, off=1.0)
    rotary_scaling: dict | None = key(
        None, "longer rotary wavelengths, as transformers' rope_scaling: rope_type linear, llama3 or yarn; null: none"
    )
    no_rotary_layers: int | list[int] | None = key(
        None,
        "layers without rotary positions: every k-th (k), or a list of numbers from 0; null: none",
        minimum=1,
        maximum=10**5,
    )
    qk_norm: str = key(
        "none", "normalise queries and keys; head: each head by itself, all: over all heads", ["none", "head", "all"]
    )
    sliding_window: int | None = key(
        None, "tokens that a token attends to, itself included; null: all before it", minimum=1, maximum=2**30
    )
    full_attention_layers: int | list[int] | None = key(
        None,
        "layers that sliding_window leaves out: every k-th (k), or a list of numbers from 0; null: none",
        minimum=1,
        maximum=10**5,
    )
    parallel_residual: bool = key(False, "attention and MLP read the same residual stream, not one after the other")
    mlp: str = key("gelu", "activation of the MLP; gelu: its tanh form, as GPT-2's", ["gelu", "gelu_exact", "swiglu"])
    n_expert: int | None = key(
        None,
        "MLPs of a block, of which each token goes through some (mixture of experts); null: one for all",
        minimum=1,
        maximum=2**16,
    )
    n_expert_per_token: int = key(2, "experts that a token goes through", minimum=1, maximum=2**16, off=2)
    n_shared_expert: int = key(0, "further experts that every token goes through", minimum=0, maximum=2**16)
    normalize_experts: bool = key(True, "the weights of a token's experts add up to 1", off=True)
    balance_loss: float = key(
        0.01,
        "weight of the load-balancing loss (equal numbers of tokens per expert)",
        minimum=0,
        maximum=1e3,
        off=0.01,
    )
    balance_over: str = key(
        "layer",
        "whether balance_loss is for each layer or, as in transformers, over all",
        ["layer", "model"],
        off="layer",
    )
    router_z_loss: float = key(
        0.001, "weight of the loss that keeps the router's logits small", minimum=0, maximum=1e3, off=0.001
    )
    tie_embeddings: bool = key(True, "the output layer shares the token embedding's weights")
    init_std: float = key(0.02, "standard deviation of the initial weights", minimum=1e-6, maximum=1)
    family: str | None = key(
        None, "model_type of transformers that an export has; null: the first that computes the same"
    )

    def check(self):
        if self.head_dim is None and self.n_embd % self.n_head:
            raise UserError(
                f"model.n_head: {self.n_head} does not divide model.n_embd {self.n_embd}; "
                f"nearest that do: {nearest_divisors(self.n_embd, self.n_head)}, or set model.head_dim"
            )
        if self.n_head % self.kv_heads:
            raise UserError(
                f"model.n_kv_head: {self.n_kv_head} does not divide model.n_head {self.n_head}; "
                f"nearest that do: {nearest_divisors(self.n_head, self.n_kv_head)}"
            )
        if self.position == "rotary":
            self.check_rotary()
        else:
            names = "rotary_fraction", "rotary_scaling", "no_rotary_layers"
            self.refuse_unused("model.position learned", "model.position rotary", *names)
        if self.sliding_window is None:
            reason = "model.sliding_window null, where every layer has full attention"
            self.refuse_unused(reason, "model.sliding_window", "full_attention_layers")
        for name in ("no_rotary_layers", "full_attention_layers"):
            self.check_layers(name)
        self.check_experts()

    def refuse_unused(self, reason, remedy, *names):
        """Raises UserError for one of these keys that is not at its default, where it would have no effect."""
        for name in names:
            value, default = getattr(self, name), self.__dataclass_fields__[name].default
            if value != default:
                raise UserError(
                    f"model.{name}: found {in_short(value)} with {reason}; set {remedy}, or this to {in_short(default)}"
                )

    def check_experts(self):
        if self.n_expert is None:
            names = "n_expert_per_token", "n_shared_expert", "normalize_experts"
            self.refuse_unused("model.n_expert null, which is one MLP for all tokens", "model.n_expert", *names)
            return
        if self.n_expert_per_token > self.n_expert:
            raise UserError(
                f"model.n_expert_per_token: found {self.n_expert_per_token}, expected at most model.n_expert "
                f"{self.n_expert}; set --model.n_expert_per_token {self.n_expert}"
            )

    def check_rotary(self):
        if self.rotary_channels < 2 or self.rotary_channels % 2:
            raise UserError(
                f"model.position: rotary rotates pairs of channels, but {self.rotary_channels} of a head's are to be "
                "rotated; choose head_dim (or n_embd / n_head) and rotary_fraction so that their product is even"
            )
        if self.rotary_scaling is None:
            return
        found = f"model.rotary_scaling: found {in_short(self.rotary_scaling)}"
        kind = self.rotary_scaling.get("rope_type")
        if not isinstance(kind, str) or kind not in ROTARY_SCALINGS:
            raise UserError(f"{found}, expected rope_type {', '.join(ROTARY_SCALINGS)}, or null for none")
        needed, optional = ROTARY_SCALINGS[kind]
        given = self.rotary_scaling.keys() - {"rope_type"}
        if unknown := sorted(given - needed - optional):
            raise UserError(
                f"{found}, in which {kind} has no {printable(', '.join(unknown))}; expected {', '.join(sorted(needed))}"
            )
        if missing := sorted(needed - given):
            raise UserError(f"{found}, expected also {', '.join(missing)}")
        for name, value in self.rotary_scaling.items():
            if name == "truncate" and isinstance(value, bool):
                continue
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if name != "rope_type" and not (is_number and 0 < value < 1e12):
                raise UserError(f"{found}, in which {name} is {in_short(value)}, expected a number above 0")
        if kind == "yarn" and (self.rotary_theta <= 1 or self.rotary_scaling["original_max_position_embeddings"] < 1):
            raise UserError(
                f"{found}, expected original_max_position_embeddings of at least 1 and a model.rotary_theta above 1"
            )
        if self.rotary_scaling["factor"] < 1:
            raise UserError(f"{found}, in which factor is {self.rotary_scaling['factor']}, expected at least 1")
        if kind == "llama3" and self.rotary_scaling["high_freq_factor"] <= self.rotary_scaling["low_freq_factor"]:
            raise UserError(f"{found}, expected a high_freq_factor above low_freq_factor")

    def check_layers(self, name):
        """Raises UserError if a key that chooses layers chooses none that is there."""
        value = getattr(self, name)
        numbers = value if isinstance(value, list) else [(value or 1) - 1]  # the first of every k-th
        wrong = next((number for number in numbers if not 0 <= number < self.n_layer), None)
        if wrong is not None:
            raise UserError(
                f"model.{name}: found layer {wrong}, expected 0 to {self.n_layer - 1}, as model.n_layer says"
            )

    @property
    def kv_heads(self):
        return self.n_kv_head or self.n_head

    @property
    def head_size(self):
        """Channels of a head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def rotary_channels(self):
        """Channels of a head that are rotated."""
        return int(self.head_size * self.rotary_fraction)

    @property
    def biased_qkv(self):
        """Whether queries, keys and values have biases."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def gated(self):
        """Whether the MLP multiplies two products."""
        return self.mlp == "swiglu"

    def has_rotary(self, layer):
        """Whether a layer has rotary positions."""
        return self.position == "rotary" and not is_chosen(self.no_rotary_layers, layer)

    def window_of(self, layer):
        """Tokens that a token of this layer attends to, itself included; None: all before it."""
        return None if is_chosen(self.full_attention_layers, layer) else self.sliding_window

    @property
    def mlp_width(self):
        """Hidden width of the MLP. SwiGLU has three matrices instead of two, so 8/3 of the width
        keeps the parameters of a GELU MLP of 4 (Shazeer 2020, arXiv 2002.05202, section 2)."""
        if self.mlp_hidden:
            return self.mlp_hidden
        return -(-8 * self.n_embd // 3 // 64) * 64 if self.gated else 4 * self.n_embd

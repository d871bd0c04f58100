"""One training setting as the planner sees it: the keys of a configuration that change memory or speed."""

import dataclasses
import functools
import json
from dataclasses import dataclass, field

from minzero.adapters import count_adapters, count_of
from minzero.config.deepspeed import (
    auto_values,
    offload_device,
    offload_ratio,
    offloads_optimizer,
    with_auto_values,
    zero_stage,
)
from minzero.config.sections import LoraConfig, ModelConfig, Recomputation
from minzero.data.mixture import Mixture
from minzero.errors import UserError
from minzero.sizes import MOST_HEAD_SIZE, largest_of_muon, moment_bytes

LARGEST_VOCABULARY = 2**31  # of any data
MOST_LAYERS = 2**12  # a model with more is not planned: each layer is replayed

# key of deepspeed.zero_optimization -> field of Settings
ZERO_KEYS = {
    "reduce_bucket_size": "reduce_bucket_size",
    "stage3_prefetch_bucket_size": "prefetch_bucket_size",
    "stage3_param_persistence_threshold": "persistence_threshold",
    "stage3_max_live_parameters": "max_live_parameters",
    "stage3_max_reuse_distance": "max_reuse_distance",
    "sub_group_size": "sub_group_size",
    "contiguous_gradients": "contiguous_gradients",
    "stage3_allgather_sequential": "allgather_sequential",
    "zero_hpz_partition_size": "second_copy",
}
# Keys that `settings_of` reads by other means, and keys that have no effect on memory as it is modelled.
OTHER_ZERO_KEYS = {"stage", "overlap_comm", "offload_optimizer", "offload_param"}
WITHOUT_EFFECT = {"allgather_bucket_size", "round_robin_gradients", "ignore_unused_parameters"}
WITHOUT_EFFECT |= {"stage3_gather_16bit_weights_on_model_save", "log_trace_cache_warnings", "enable_sanity_checks"}


@dataclass
class Settings:
    """One training setting. Defaults of the engine are DeepSpeed 0.19.8's. Bucket sizes and thresholds are in elements,
    widths in bytes per element."""

    model: ModelConfig
    world_size: int = 1
    stage: int = 3
    micro_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    precision: str = "bf16"  # bf16, fp16 or fp32
    activation_checkpointing: bool | int | float | str = 0  # as the key of the train section
    activation_offload: bool = False  # the inputs of recomputed blocks are kept in CPU memory
    offload_optimizer: bool = False
    offload_ratio: float = 1.0  # stage 3: the share of the optimizer in CPU memory, counted in sub-groups
    offload_param: bool = False
    optimizer_on_nvme: bool = False  # where it is offloaded, on a drive and not in CPU memory
    param_on_nvme: bool = False
    overlap_comm: bool = False
    contiguous_gradients: bool = True  # gradients are copied into a bucket; else they stay until they are reduced
    allgather_sequential: bool = False  # stage 3: each weight is gathered straight into its own tensor
    second_copy: int = 1  # stage 3: so many ranks keep a second copy of the weights together; 1: none
    reduce_bucket_size: int = 500_000_000
    prefetch_bucket_size: int = 50_000_000
    persistence_threshold: int = 100_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    sub_group_size: int = 1_000_000_000
    accumulation_bytes: int | None = None  # of an accumulated gradient; None: as wide as the weights
    compiled: bool = False  # the loss keeps no probabilities, and SwiGLU not the activated gate
    attended: float | None = None  # tokens of the mean token's document, where attention is within documents
    lora: LoraConfig = field(default_factory=LoraConfig)  # with a rank: adapters are trained, and nothing else
    save_in_background: bool = False  # a copy of the optimizer is in CPU memory while a checkpoint is written
    master_bytes: int = 4
    moment_bytes: float = 8  # both of Adam's moments; the mean where Muon has one of its own weights
    largest_of_muon: int = 0  # elements of the matrices that Muon makes orthogonal at a time; 0: AdamW alone

    @property
    def adapters(self):
        """Parameters of adapters, which then are all that is trained; 0: none, and all weights are trained."""
        return count_adapters(self.model, self.lora)

    @property
    def packed(self):
        """Parameters of the frozen base that are in 4 bits (four_bit.py), whole on each rank."""
        return count_of(self.model) if self.adapters and self.lora.base_bits else 0

    @property
    def recomputation(self):
        """What is recomputed in the backward pass."""
        return Recomputation.of(self.activation_checkpointing)

    @property
    def length(self):
        """Tokens of a sequence."""
        return self.model.block_size

    @property
    def tokens(self):
        """Tokens of a micro-batch."""
        return self.micro_batch_size * self.length

    @property
    def bytes(self):
        """Width of the weights and of the residual stream."""
        return {"bf16": 2, "fp16": 2, "fp32": 4}[self.precision]

    @property
    def varlen(self):
        """Whether attention takes one document after the other (document_attention.py)."""
        model = self.model
        return bool(self.attended and self.bytes == 2 and not model.dropout and model.head_size <= MOST_HEAD_SIZE)

    def has_mask(self, layer):
        """Whether a mask hides tokens of a sequence from others in this layer: of documents or a sliding window."""
        if self.attended:
            return not self.varlen
        return (self.model.window_of(layer) or self.length) < self.length

    @property
    def mask_bytes(self):
        """Bytes of the masks that layers share, one for each pair of tokens: that of a sliding window is the same in
        all sequences, and that of documents another in each."""
        masked = filter(self.has_mask, range(self.model.n_layer))
        kinds = len({self.model.window_of(layer) for layer in masked})
        return kinds * self.length**2 * (self.micro_batch_size if self.attended else 1)

    def compared(self, layer):
        """Tokens that attention computes products with for the mean token of this layer. Flash attention skips the
        masked half; under a mask nothing is skipped."""
        if self.has_mask(layer):
            return self.length
        return min(self.model.window_of(layer) or self.length, self.attended or self.length) / 2

    @property
    def product_bytes(self):
        """Width of the inputs and outputs of matrix products: the weights' own, as nothing here casts
        (torch.autocast would)."""
        return self.bytes


@functools.cache
def attended_tokens(path, block_size, document_mask):
    """The mean length in tokens of a token's document, where attention is within documents, as the data says if it is
    here; else None. path: data.path in JSON. document_mask: data.document_mask."""
    if document_mask is False:
        return None
    try:
        data = Mixture(json.loads(path), "train", block_size, LARGEST_VOCABULARY, 0, None, document_mask)
    except UserError:  # train.py says what is wrong with it
        return None
    return data.attended() if data.has_documents else None


def gradient_accumulation_steps(config, gpus):
    """Micro-batches of one step, rounded up where the batch does not divide."""
    tokens_at_once = config.model.block_size * config.train.micro_batch_size * gpus
    return -(-config.train.global_batch_tokens // tokens_at_once)


def settings_of(config, gpus, memory, card=None):
    """The Settings of a run's configuration on this many GPUs. memory: bytes of one, by which "auto" is resolved; None
    where nothing is "auto". card: decides what precision and compile "auto" are; None: one with bf16. Raises UserError
    for a model too deep to be planned."""
    train = config.train
    if config.model.n_layer > MOST_LAYERS:
        raise UserError(f"model.n_layer: found {config.model.n_layer}, expected at most {MOST_LAYERS} to be planned")
    precision = train.precision
    if precision == "auto":
        precision = card.precision if card else "bf16"
    accumulation = gradient_accumulation_steps(config, gpus)
    values = auto_values(config, gpus, precision, memory, accumulation)
    deepspeed = with_auto_values(config.deepspeed, values)
    zero = deepspeed.get("zero_optimization", {})
    stage = zero_stage(deepspeed)
    overlap_comm = zero.get("overlap_comm")
    if overlap_comm is None:
        overlap_comm = stage == 3
    accumulated_type = deepspeed.get("data_types", {}).get("grad_accum_dtype")
    return Settings(
        model=config.model,
        world_size=gpus,
        stage=stage,
        micro_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        precision=precision,
        activation_checkpointing=train.activation_checkpointing,
        activation_offload=train.activation_offload,
        offload_optimizer=offloads_optimizer(config.deepspeed),
        offload_ratio=offload_ratio(zero),
        offload_param=offload_device(zero, "offload_param") != "none",
        optimizer_on_nvme=offload_device(zero, "offload_optimizer") == "nvme",
        param_on_nvme=offload_device(zero, "offload_param") == "nvme",
        overlap_comm=overlap_comm,
        compiled=train.compile is True or (train.compile == "auto" and not (card and card.is_cpu)),
        # checkpoint.py copies no optimizer that lives on NVMe: memory may not hold it
        save_in_background=train.save_in_background and offload_device(zero, "offload_optimizer") != "nvme",
        lora=config.lora,
        moment_bytes=moment_bytes(config.model, train.optimizer),
        largest_of_muon=largest_of_muon(config.model) if train.optimizer == "muon" else 0,
        attended=attended_tokens(json.dumps(config.data.path), config.model.block_size, config.data.document_mask),
        accumulation_bytes={"fp32": 4, "bf16": 2, "fp16": 2}.get(accumulated_type),
        **{field: zero[key] for key, field in ZERO_KEYS.items() if key in zero},
    )


def settings_as_run(config, gpus, made):
    """The Settings of a run that was made, with its stage, precision, compilation and values of "auto". config: a
    Config; made: the run's config.json."""
    values = made["deepspeed_auto"] | {"zero_optimization.stage": made["stage"]}
    deepspeed = with_auto_values(config.deepspeed, values)
    settings = settings_of(dataclasses.replace(config, deepspeed=deepspeed), gpus, memory=None)
    return dataclasses.replace(settings, precision=made["precision"], compiled=made["compiled"])

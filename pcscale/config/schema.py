"""Every setting of a run, with its type, range, default, theme and unit. The help and the docs are made from this."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from pcscale.common.units import parse_bytes
from pcscale.config import defaults


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, found true or false")
    return value


def _check_rank(value: Any) -> Any:
    if value != "full" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError("expected full, or a number of at least 1")
    return value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_trackers(value: Any) -> Any:
    return [] if value == "none" else _as_list(value)


def _check_size(value: Any) -> Any:
    parse_bytes(value)
    return str(value)


TEXT_FREE = ("magnitude", "random")
"""Importances that need no text: they look at no activations."""
REBUILDING_STARTS = ("least_squares", "pca_least_squares")
"""Starts for which calibration solves least squares over ffn channels."""
ROTATING_STARTS = ("pca", "pca_least_squares")
"""Starts whose residual stream is rotated."""
_OF_RECORDS = (
    *("projection_rates", "base_home", "base_precision", "residency", "record_dtype", "moments", "projection_rank"),
)
"""Settings without a meaning for hard pruning, which has no records."""

Number = Annotated[float, BeforeValidator(_refuse_bool), Field(allow_inf_nan=False)]
Whole = Annotated[int, BeforeValidator(_refuse_bool)]
Count = Annotated[Whole, Field(gt=0)]
Size = Annotated[str, BeforeValidator(_check_size)]
Names = Annotated[list[str], BeforeValidator(_as_list)]

Rank = Annotated[str | int, BeforeValidator(_check_rank)]
Importance = Literal["activation", "energy", "magnitude", "random"]
Start = Literal["selection", "rescaled", "least_squares", "pca", "pca_least_squares"]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


_MODEL: dict[str, Any] = {"theme": "model"}
_DATA: dict[str, Any] = {"theme": "data"}
_TRAINING: dict[str, Any] = {"theme": "training"}
_MEMORY: dict[str, Any] = {"theme": "memory"}
_OUTPUT: dict[str, Any] = {"theme": "output"}


class DataConfig(_Settings):
    """Where the text comes from."""

    train: Names = Field(min_length=1)
    """Text to train on: files or globs (.txt, .jsonl, .parquet, each also gzipped), or one Hub data set id."""
    validation: Names | None = Field(default=None, min_length=1)
    """Held-out text, in the same forms. Absent: the last part of train is held out."""


class DistillConfig(_Settings):
    """How the base teaches the compressed model."""

    weight: Annotated[Number, Field(gt=0, le=1)] = 0.5
    """Share w of the loss: (1 - w) cross entropy + w temperature² KL(base ‖ compressed). Units: fraction."""
    temperature: Annotated[Number, Field(gt=0)] = 1.0
    """What both models' logits are divided by in the KL."""
    top_k: Count | None = None
    """Count only so many of the base's most likely tokens, and all others as one: its head is then read in blocks, once
    a step. Absent: the whole distribution, with the base's head on the device. Units: tokens."""
    cache: Annotated[str, Field(min_length=1)] | None = None
    """A folder that `pcscale teach` filled with what the base says of this text: no step runs the base then. Needs
    `distill.top_k`, and at most that of the folder. Absent: the base runs in every step."""

    @model_validator(mode="after")
    def _a_cache_holds_the_most_likely(self) -> "DistillConfig":
        if self.cache is not None and self.top_k is None:
            raise ValueError("a cache holds the base's most likely tokens alone: set top_k beside cache")
        return self


GROUPS: dict[str, type[BaseModel]] = {"data": DataConfig, "distill": DistillConfig}
"""Settings that hold settings of their own."""


class PlanConfig(_Settings):
    """Everything that a run's plan depends on: all settings but its text and its folder."""

    base: str = Field(min_length=1, json_schema_extra=_MODEL)
    """The base model: a local checkpoint folder or a Hub id."""
    keep: Annotated[Number, Field(gt=0, lt=1)] | None = Field(default=None, json_schema_extra=_MODEL)
    """Share of the base's real parameter count to keep; 0.5 where no size is given at all. Units: fraction."""
    target_params: Annotated[Number, Field(gt=0)] | None = Field(default=None, json_schema_extra=_MODEL)
    """Instead of `keep`: the parameter count to come close to. Units: parameters."""
    hidden_size: Count | None = Field(default=None, json_schema_extra=_MODEL)
    """Instead of `keep`, with intermediate_size: the exact residual width. Units: channels."""
    intermediate_size: Count | None = Field(default=None, json_schema_extra=_MODEL)
    """Instead of `keep`, with hidden_size: the exact ffn width. Units: channels."""
    method: Literal["projected", "hard_prune"] = Field(default="projected", json_schema_extra=_MODEL)
    """`projected` trains projections of the frozen base; `hard_prune`, the control arm, trains the same start alone."""
    start: Start = Field(default=defaults.START, json_schema_extra=_MODEL)
    """The compressed model before training. `selection` keeps the most important channels, as published; `rescaled`
    puts the norms right for what they no longer see; `least_squares` also rebuilds dropped channels from kept ones;
    `pca` rotates the residual stream onto its main directions; `pca_least_squares` also rebuilds ffn channels."""
    importance: Importance = Field(default=defaults.IMPORTANCE, json_schema_extra=_MODEL)
    """How channels are scored: by sums of activations on calibration text, by the energy that they give to what reads
    them there, by weight magnitude, or at random (with `seed`)."""
    calibration_tokens: Count = Field(default=defaults.CALIBRATION_TOKENS, json_schema_extra=_MODEL)
    """Tokens of training text that activation scores are taken on. Units: tokens."""
    trust_remote_code: bool = Field(default=False, json_schema_extra=_MODEL)
    """Let a tokenizer run code that comes with the base. Models are always stock classes."""

    sequence_length: Annotated[Whole, Field(gt=1)] = Field(default=defaults.SEQUENCE_LENGTH, json_schema_extra=_DATA)
    """Length of a packed sequence. Units: tokens."""
    eval_tokens: Count = Field(default=defaults.EVAL_TOKENS, json_schema_extra=_DATA)
    """At most this much held-out text is evaluated. Units: tokens."""

    max_steps: Count = Field(default=1000, json_schema_extra=_TRAINING)
    """Optimizer steps. Units: steps."""
    per_device_train_batch_size: Count = Field(default=defaults.BATCH_SIZE, json_schema_extra=_TRAINING)
    """Sequences in a micro batch. Units: sequences."""
    gradient_accumulation_steps: Count = Field(default=8, json_schema_extra=_TRAINING)
    """Micro batches in a step. Units: micro batches."""
    learning_rate: Annotated[Number, Field(gt=0)] = Field(default=defaults.LEARNING_RATE, json_schema_extra=_TRAINING)
    """Peak rate of the projections. With hard_prune: of everything, and 3e-4 by default."""
    aux_learning_rate: Annotated[Number, Field(gt=0)] | None = Field(default=None, json_schema_extra=_TRAINING)
    """Peak rate of aux, norms and biases. Absent: three times `learning_rate`."""
    distill: DistillConfig | None = Field(default=None, json_schema_extra=_TRAINING)
    """Let the base teach, by a layer-major pass in every step, or from a folder (`distill.cache`) without one."""
    projection_rates: Literal["uniform", "per_matrix"] = Field(
        default=defaults.PROJECTION_RATES, json_schema_extra=_TRAINING
    )
    """`uniform` trains every projection at `learning_rate`, as published; `per_matrix` divides it by the mean norm of
    the base weight's rows (of its columns on the out side) where that is above 1: a step moves all weights alike."""
    warmup_steps: Annotated[Whole, Field(ge=0)] = Field(default=40, json_schema_extra=_TRAINING)
    """Steps from 0.1 of the rate to the whole of it; a cosine back to 0.1 follows. Units: steps."""
    weight_decay: Annotated[Number, Field(ge=0)] = Field(default=defaults.WEIGHT_DECAY, json_schema_extra=_TRAINING)
    """Decoupled decay of D and aux (hard_prune: of the matrices); never of norms and biases."""
    adam_beta1: Annotated[Number, Field(ge=0, lt=1)] = Field(default=defaults.BETAS[0], json_schema_extra=_TRAINING)
    """Decay rate of the first moment."""
    adam_beta2: Annotated[Number, Field(ge=0, lt=1)] = Field(default=defaults.BETAS[1], json_schema_extra=_TRAINING)
    """Decay rate of the second moment."""
    adam_epsilon: Annotated[Number, Field(gt=0)] = Field(default=defaults.EPSILON, json_schema_extra=_TRAINING)
    """Added to the root of the second moment."""
    max_grad_norm: Annotated[Number, Field(gt=0)] = Field(default=1.0, json_schema_extra=_TRAINING)
    """The norm that the compressed model's gradients are clipped to."""
    max_skipped_steps: Count = Field(default=10, json_schema_extra=_TRAINING)
    """The run stops after so many steps in a row whose loss or gradients were not finite. Units: steps."""
    bf16: bool = Field(default=False, json_schema_extra=_TRAINING)
    """Hold and run the compressed model in bfloat16; records and gradients have a precision of their own."""
    gradient_checkpointing: bool = Field(default=False, json_schema_extra=_TRAINING)
    """Recompute activations in the backward pass instead of keeping them."""
    seed: Annotated[Whole, Field(ge=0, lt=2**63)] = Field(default=0, json_schema_extra=_TRAINING)
    """Seed of the data order, of random scores, of stochastic rounding and of the fixed factor of a low rank."""

    base_home: Literal["disk", "cpu", "device", "zero"] = Field(default="disk", json_schema_extra=_MEMORY)
    """Where the frozen base lives: `disk` maps its files, `cpu` holds it in host memory (pinned where there is a GPU),
    `device` beside the model, `zero` parts it among the ranks by DeepSpeed's ZeRO-3 (with `deepspeed`)."""
    base_precision: Literal["stored", "int8"] = Field(default="stored", json_schema_extra=_MEMORY)
    """The precision that training keeps the base's matrices in: `stored`, or `int8`, coded once into a file of the run
    folder; the start is the same, since aux makes up for what 8 bits lose."""
    residency: Literal["device", "cpu", "disk"] = Field(default="device", json_schema_extra=_MEMORY)
    """Where records and moments live: on the `device`, in host memory (`cpu`, pinned where there is a GPU), or in files
    of the run folder (`disk`). Only those of the matrices under way are on the device."""
    record_dtype: Literal["float32", "bfloat16"] = Field(default="float32", json_schema_extra=_MEMORY)
    """The dtype of D and aux; `bfloat16` is rounded stochastically."""
    moments: Literal["32bit", "8bit"] = Field(default="32bit", json_schema_extra=_MEMORY)
    """The precision of AdamW's moments; `8bit` is block-wise, and leaves tensors below 4096 values in 32 bits."""
    projection_rank: Rank = Field(default="full", json_schema_extra=_MEMORY)
    """The rank of D: `full`, or a number, which makes D a product of two thin factors that are never multiplied. At
    rank 64 SmolLM2-135M has a seventh of D's values and a quarter of the sweep's FLOPs; after 100 steps its held-out
    loss was 0.04 nats above whole D's, at rates where rounding alone moves it by as much (docs/lab_log.md)."""
    gradient_dtype: Literal["float32", "bfloat16"] = Field(default="float32", json_schema_extra=_MEMORY)
    """The dtype that the gradients of the compressed weights accumulate in; `bfloat16` needs bf16."""
    gradient_home: Literal["device", "cpu"] = Field(default="device", json_schema_extra=_MEMORY)
    """Where those gradients accumulate."""
    pinned_memory: Size | None = Field(default=None, json_schema_extra=_MEMORY)
    """Cap on the host memory that residency takes: all records with `cpu`, buffers with `disk`. Absent: what lets
    motion overlap with compute. Units: bytes."""
    deepspeed: Annotated[str, Field(min_length=1)] | None = Field(default=None, json_schema_extra=_MEMORY)
    """A DeepSpeed configuration file, or the name of one that comes with pcscale, such as `zero3_offload_cpu`. Absent:
    one process without DeepSpeed."""
    memory_snapshot: bool = Field(default=False, json_schema_extra=_MEMORY)
    """Record the allocator of a GPU while training, into `memory_snapshot.pickle` of the run folder, for torch's own
    viewer (pytorch.org/memory_viz)."""
    max_memory: Size = Field(default="2GiB", json_schema_extra=_MEMORY)
    """Cap on the merge's anonymous memory, beside 300 MiB of interpreter. Units: bytes."""

    logging_steps: Count = Field(default=10, json_schema_extra=_OUTPUT)
    """A line is printed every so many steps; metrics.jsonl has all of them. Units: steps."""
    eval_steps: Count = Field(default=100, json_schema_extra=_OUTPUT)
    """Held-out text is evaluated every so many steps. Units: steps."""
    save_steps: Count = Field(default=100, json_schema_extra=_OUTPUT)
    """A checkpoint is written every so many steps. Units: steps."""
    keep_checkpoints: Count = Field(default=2, json_schema_extra=_OUTPUT)
    """How many checkpoints stay. Units: checkpoints."""
    max_shard_size: Size = Field(default="5GB", json_schema_extra=_OUTPUT)
    """Largest file of the merged model. Units: bytes."""
    report_to: Annotated[list[Literal["tensorboard", "wandb"]], BeforeValidator(_as_trackers)] = Field(
        default=[], json_schema_extra=_OUTPUT
    )
    """Trackers that get every step's metrics too; each needs its own package."""

    @model_validator(mode="before")
    @classmethod
    def _hard_pruning_has_a_rate_of_its_own(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("method") == "hard_prune":
            return {"learning_rate": defaults.HARD_PRUNE_LEARNING_RATE, **values}
        return values

    @model_validator(mode="after")
    def _settings_go_together(self) -> "PlanConfig":
        if (self.hidden_size is None) != (self.intermediate_size is None):
            raise ValueError("hidden_size and intermediate_size go together: set both or neither")
        given = [key for key in ("keep", "target_params", "hidden_size") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say the size: keep one of them")
        if self.start != "selection" and self.importance in TEXT_FREE:
            raise ValueError(
                f"start {self.start} is made of activations: set importance energy or activation, or start selection"
            )
        if self.gradient_dtype == "bfloat16" and not self.bf16:
            raise ValueError("gradient_dtype bfloat16 needs bf16: true: gradients of a float32 model are float32")
        if self.base_home == "zero" and (self.deepspeed is None or self.base_precision == "int8"):
            raise ValueError("base_home zero keeps the base as it is stored: set deepspeed, and no base_precision")
        if self.deepspeed is not None and self.gradient_home == "cpu":
            raise ValueError("gradient_home cpu is for one process: with deepspeed, ZeRO's offload moves gradients")
        if self.method == "hard_prune":
            if self.aux_learning_rate is not None:
                raise ValueError("aux_learning_rate has no meaning with method hard_prune: set learning_rate")
            for key in _OF_RECORDS:
                if getattr(self, key) != PlanConfig.model_fields[key].default:
                    raise ValueError(f"{key} has no meaning with method hard_prune, which has no records: remove it")
        return self

    @property
    def aux_rate(self) -> float:
        """Peak rate of aux, norms and biases; with hard_prune of everything."""
        if self.aux_learning_rate is not None:
            return self.aux_learning_rate
        return defaults.aux_learning_rate(self.method, self.learning_rate)

    @property
    def rank(self) -> int | None:
        """`projection_rank` as a number; None: full."""
        return self.projection_rank if isinstance(self.projection_rank, int) else None

    @property
    def product_rank(self) -> int | None:
        """The rank that products go through; None: a dense S is added to D, and multiplies whole."""
        return None if self.rotates else self.rank

    @property
    def rotates(self) -> bool:
        return self.start in ROTATING_STARTS

    @property
    def rebuilds(self) -> bool:
        return self.start in REBUILDING_STARTS

    @property
    def sequences_per_step(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.sequence_length

    def wanted_sequences(self, world_size: int) -> int:
        """The most training sequences that a run on so many ranks can use without repeating one."""
        trained_on = self.max_steps * self.sequences_per_step * world_size
        return max(trained_on, self.calibration_tokens // self.sequence_length)


class RunConfig(PlanConfig):
    """One run: the settings that `pcscale compress` reads from run.yaml."""

    output: str = Field(min_length=1, json_schema_extra=_OUTPUT)
    """The run folder. It must be new or empty unless `--resume` is given."""
    data: DataConfig = Field(json_schema_extra=_DATA)
    """Training and held-out text: `data.train`, `data.validation`."""

    def resolved(self) -> "RunConfig":
        """The same settings with those filled in that follow from others, so that they stay when defaults change."""
        return self.model_copy(update={"aux_learning_rate": self.aux_rate}) if self.method == "projected" else self


class EvaluateSettings(_Settings):
    """Text and its amount: the settings of `pcscale evaluate`."""

    data: list[str] = Field(min_length=1)
    """Text: files, globs or a Hub data set id."""
    tokens: Count = defaults.EVAL_TOKENS
    """At most this many tokens of text. Units: tokens."""
    sequence_length: Annotated[Whole, Field(gt=1)] = defaults.SEQUENCE_LENGTH
    """Length of a sequence. Units: tokens."""
    batch_size: Count = defaults.BATCH_SIZE
    """Sequences at a time."""


class CalibrateSettings(EvaluateSettings):
    """One calibration: the settings of `pcscale calibrate`."""

    base: str = Field(min_length=1)
    """Checkpoint folder or Hub id."""
    output: str = Field(min_length=1)
    """The file to write, such as scores.safetensors."""
    importance: Importance = defaults.IMPORTANCE
    """Kind of scores: energy, activation, magnitude or random."""
    tokens: Count = defaults.CALIBRATION_TOKENS
    """At most this many tokens of text. Units: tokens."""
    seed: Annotated[Whole, Field(ge=0, lt=2**63)] = 0
    """Seed of random scores."""

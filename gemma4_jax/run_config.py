"""The config of a run: every field with its default, its meaning and its rule. Pure Python.

Experiments are ConfigDicts (`gemma4_jax.configs`), which the command line changes and `parse` makes a RunConfig of;
below the door there is nothing else. A rule stands beside its field, or, where fields depend on each other, in the
first class that has them all. Values that follow from others are 0 until `resolved`.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from gemma4_jax.config import Gemma4Config
from gemma4_jax.fields import (
    BELOW_ONE,
    FRACTION,
    NOT_EMPTY,
    POSITIVE,
    SEED,
    Rule,
    Section,
    at_least,
    field,
    one_of,
    parse,
    require,
)
from gemma4_jax.files import LOCAL, is_remote
from gemma4_jax.vision.geometry import SOFT_TOKEN_BUDGETS

_NO_ADDRESS = Rule(lambda value: not is_remote(value), LOCAL)
_PATH = Rule(lambda value: bool(value.strip()) and not is_remote(value), LOCAL)


@dataclasses.dataclass(frozen=True)
class InitConfig(Section):
    """What a run begins from."""

    section = "init"
    from_hf: str = field(
        "",
        "Begin from the weights of a checkpoint in Hugging Face's format, a folder with config.json and safetensors; "
        '"" is random. Its architecture must be `model`, which may leave out towers: these are carried into exports.',
        _NO_ADDRESS,
    )
    from_run: str = field(
        "",
        "Begin from the parameters of the last checkpoint of another run, or of what `gemma4 convert` wrote; "
        '"" is random.',
        _NO_ADDRESS,
    )

    upcycle_from: str = field(
        "",
        "Begin a model with experts from the weights of a dense one in Hugging Face's format, of the same architecture "
        'without them: at first it computes the same; "" is random.',
        _NO_ADDRESS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {f"init.{name}": value for name, value in vars(self).items() if value}
        if len(given) > 1:
            (first, of_first), (second, of_second), *_ = given.items()
            require(False, second, of_second, f"empty where {first}={of_first!r} is given")


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section):
    """Devices along each axis of the mesh. Their product is the number of devices; one may be -1, the rest."""

    section = "mesh"
    data: int = field(-1, "Rows of the batch are spread, parameters are copied.")
    fsdp: int = field(1, "Rows of the batch are spread, parameters and optimizer state too.")
    expert: int = field(1, "Rows of the batch are spread, experts too; tokens travel to their experts.")
    context: int = field(1, "Positions of a row are spread.")
    tensor: int = field(1, "Heads, MLP width and vocabulary are spread.")


@dataclasses.dataclass(frozen=True)
class SourceConfig(Section):
    """A source of documents."""

    name: str
    kind: str = field("jsonl", "Format of its records, a key of gemma4_jax.data.sources.KINDS.", NOT_EMPTY)
    path: str = field("", "Where they are, as the kind reads it: a file, an address, or of tfds NAME/SPLIT.")
    task: str = field(
        "auto",
        'What becomes of a record, a key of gemma4_jax.data.tasks.TASKS; "auto" goes by the columns that it has.',
        NOT_EMPTY,
    )
    weight: float = field(
        1.0, "Its share of the documents drawn, relative to the sum; of 0 nothing is drawn.", at_least(0)
    )
    epochs: int = field(0, "Times that it is read; 0 for as long as the run goes on.", at_least(0))
    at_end: str = field(
        "drop",
        'What follows its last epoch: "drop", it drops out and the others go on in their proportions; "stop", the data '
        "ends with its last document, and the run when all that was read until then is trained on, or before, at "
        "train.num_steps.",
        one_of("drop", "stop"),
    )
    held_out: float = field(0.0, "Share of its records that training never sees; evaluation reads them.", BELOW_ONE)
    columns: Mapping[str, str] = field({}, "What the task calls a part of a record -> what the record calls it.")
    options: Mapping[str, Any] = field({}, "What else the kind and the task take.")

    @property
    def section(self) -> str:
        return f"data.sources.{self.name}"


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    """What is read, and how rows are packed."""

    section = "data"
    sources: Mapping[str, SourceConfig] = field({}, "Name -> source.")
    seq_len: int = field(512, "Tokens in a packed row.", at_least(2))
    images_per_row: int = field(6, "Images in a packed row, at most; 0 trains on text alone.", at_least(0))
    patches_per_row: int = field(
        0,
        "Patches in a packed row, at most; a multiple of the patches that pool into one soft token. 0 has room for "
        "images_per_row of the largest images.",
        at_least(0),
    )
    frames_per_row: int = field(
        0,
        "Frames of sounds in a packed row, at most; a multiple of 4. A second has 100, and the longest sound, of 30 s, "
        "takes 3004. 0 trains without sounds.",
        Rule(lambda value: value >= 0 and value % 4 == 0, "a multiple of 4, and at least 0"),
    )
    soft_tokens_per_image: int = field(
        70,
        "Most soft tokens that an image may become: 70, 140, 280, 560 or 1120. More tokens, finer reading, more "
        "compute.",
        one_of(*SOFT_TOKEN_BUDGETS),
    )
    batch_size: int = field(
        8, "Rows in a batch, over all hosts and devices, before it is split into microbatches.", at_least(1)
    )
    num_workers: int = field(
        0,
        "Processes that read, pack and decode ahead of the training process, at most one for each of its rows; 0 does "
        "it in threads of that process. What is read, and in which order, does not depend on the number.",
        at_least(0),
    )
    cache_dir: str = field(
        "",
        "Folder that keeps what becomes of the files of images and sounds, by their content, for later epochs and for "
        'other runs; hosts and runs may share it, and it may be deleted at any time. "" keeps nothing.',
        _NO_ADDRESS,
    )
    cache_bytes: int = field(
        10**11,
        "Bytes that data.cache_dir may have: with so many nothing is added, and nothing is deleted. An image takes "
        "6,912 for each soft token, so that the default holds 51,000 images of 280.",
        at_least(1),
    )
    long_masked: str = field(
        "drop",
        'Text longer than a row is split, unless part of it carries no loss: "drop" leaves such a document out, and '
        '"cut_context" shortens it: tokens go from the left of the text before its first learned one, of which the '
        "last segment is the question and stays. Where that is not enough it is left out too.",
        one_of("drop", "cut_context"),
    )
    loss_weighting: str = field(
        "token",
        'What weighs the same in the loss: "token", every token that carries loss; "document", every document, however '
        'much of it carries loss; "square_root", between the two: a document weighs the square root of its learned '
        "tokens. A piece of a text that is split counts as a document.",
        one_of("token", "document", "square_root"),
    )
    max_left_out: float = field(
        0.5,
        "Share of a source's documents that may be left out (unreadable, too large for a row, nothing to learn); above "
        "it the run stops. Looked at from the source's hundredth document on, and at once where it gives nothing.",
        BELOW_ONE,
    )
    allow_changes: bool = field(
        False,
        "Go on with a run whose data is not what it was: documents may then come again or not at all until the epoch "
        "ends.",
    )
    seed: int = field(0, "Seed of the order of documents and of everything random in making them.", SEED)

    @property
    def mixture(self) -> dict[str, SourceConfig]:
        """The sources that documents are drawn from, sorted by name."""
        return {name: source for name, source in sorted(self.sources.items()) if source.weight}

    @property
    def stopping(self) -> list[str]:
        """The sources with which the data ends, by name; of none, it is endless."""
        return [name for name, source in self.mixture.items() if source.at_end == "stop"]

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {name: source.weight for name, source in self.sources.items()}
        require(bool(self.mixture), "data.sources", given, "at least one source with a weight above 0")
        epochs = {name: source.epochs for name, source in self.mixture.items()}
        for name in self.stopping:
            require(epochs[name] > 0, f"data.sources.{name}.epochs", 0, "at least 1 with at_end='stop'")
        goes_on = "0 for one source that is drawn from, or at_end='stop': nothing is left when all have dropped out"
        require(0 in epochs.values() or bool(self.stopping), "data.sources.*.epochs", epochs, goes_on)


@dataclasses.dataclass(frozen=True)
class TrainConfig(Section):
    """The training step."""

    section = "train"
    num_steps: int = field(
        1000, "Optimizer steps of the whole run; it takes fewer where its data ends before.", at_least(1)
    )
    grad_accum_steps: int = field(
        1, "Microbatches that a batch is split into; their gradients are accumulated.", at_least(1)
    )
    compute_dtype: str = field(
        "auto",
        'Type of activations: "float32", "bfloat16", or "auto": bfloat16 on accelerators, float32 on CPU.',
        one_of("auto", "bfloat16", "float32"),
    )
    frozen_dtype: str = field(
        "float32",
        'Type in which frozen parameters are kept: "float32", or "bfloat16" for half of their memory.',
        one_of("float32", "bfloat16"),
    )
    attention: str = field(
        "auto",
        'What computes attention: "auto", by shape and platform, or a key of gemma4_jax.ops.attention.IMPLEMENTATIONS.',
        NOT_EMPTY,
    )
    experts: str = field(
        "auto",
        'What computes the experts: "auto", by platform, or a key of gemma4_jax.ops.expert_parallel.IMPLEMENTATIONS, '
        'such as "mosaic_gpu", of tokamax for Hopper GPUs in bfloat16, which auto does not take.',
        NOT_EMPTY,
    )
    expert_exchange: str = field(
        "auto",
        'How tokens travel to the experts of other devices: "gather", all of them to all; "ragged", each to its own, '
        'not on CPU; or "auto", which is gather.',
        one_of("auto", "gather", "ragged"),
    )
    remat: str = field(
        "none",
        'What the forward pass keeps for the backward pass: "none" recomputes nothing, "dots" keeps the results of '
        'weight matmuls, "attention" those of attention, "full" only the input of each layer; "offload" moves that to '
        "the memory of the host. All but the last also keep what experts of other devices made of the tokens.",
        one_of("none", "dots", "attention", "full", "offload"),
    )
    loss_chunk: int = field(
        128,
        "Positions of a row whose logits exist at one time, at most: the largest divisor of data.seq_len is taken, and "
        "where mesh.context spreads a row, as many positions from each of its devices.",
        at_least(1),
    )
    z_loss_weight: float = field(
        0.0,
        "Weight of the z-loss of the vocabulary, the squared log-sum-exp of a token's logits, which keeps them from "
        "drifting; 0 switches it off.",
        at_least(0),
    )
    load_balance_weight: float = field(
        -1.0,
        "Weight of the load-balance loss of each layer's experts; 0 switches it off. -1 is 0.01 for a run from random "
        "parameters and 0 for one from a checkpoint, whose experts have found their work.",
        Rule(lambda value: value >= 0 or value == -1, "at least 0, or -1"),
    )
    router_z_weight: float = field(
        0.0,
        "Weight of the z-loss of each layer's router, which keeps its scores small; 0 switches it off.",
        at_least(0),
    )


@dataclasses.dataclass(frozen=True)
class GroupConfig(Section):
    """A group of parameters that is trained in its own way."""

    section = "optimizer.groups"
    pattern: str = field("", "Regular expression that matches the whole dotted path of a parameter.", NOT_EMPTY)
    learning_rate_scale: float = field(
        1.0, "Factor on the learning rate; 0 freezes the group, which then has no optimizer state.", at_least(0)
    )
    weight_decay: float | None = field(
        None,
        "Of its matrices, in place of optimizer.weight_decay; None is that.",
        Rule(lambda value: value is None or value >= 0, "at least 0, or None"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            re.compile(self.pattern)
        except re.error as error:
            require(False, "optimizer.groups", self.pattern, f"regular expressions ({error})")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Section):
    """AdamW, its schedule, and what it trains."""

    section = "optimizer"
    learning_rate: float = field(3e-3, "Peak of the learning rate: linear warmup to it, then cosine decay.", POSITIVE)
    warmup_steps: int = field(50, "Steps of warmup.", at_least(0))
    final_learning_rate_fraction: float = field(
        0.1, "The learning rate at the last step, as a fraction of the peak.", FRACTION
    )
    b1: float = field(0.9, "Decay of AdamW's first moment.", BELOW_ONE)
    b2: float = field(0.95, "Decay of AdamW's second moment.", BELOW_ONE)
    eps: float = field(1e-8, "AdamW's epsilon.", POSITIVE)
    weight_decay: float = field(
        0.1,
        "Decoupled weight decay of matrices and embeddings; norm scales and other vectors are never decayed.",
        at_least(0),
    )
    clip_norm: float = field(1.0, "The global gradient norm is cut to this.", POSITIVE)
    groups: tuple[GroupConfig, ...] = field(
        (),
        'Groups of parameters, such as {"pattern": r"vision\\..*", "learning_rate_scale": 0.0}: the first that matches '
        "decides, and one that matches nothing is an error. A parameter in none of them is trained, unless it is in a "
        "tower for which a row has no room: such a tower would only decay.",
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Section):
    """Checkpoints of a run."""

    section = "checkpoint"
    every_steps: int = field(
        200,
        "Steps between checkpoints, which is as many as a run that is killed repeats at most; the last step is always "
        "kept. A checkpoint is whole before the second step after it begins.",
        at_least(1),
    )
    keep: int = field(2, "Checkpoints to keep; older ones are deleted.", at_least(1))
    checksums: bool = field(
        True,
        "Keep a checksum of every file of a checkpoint, with which it is verified before it is read; False keeps only "
        "the sizes, where reading terabytes again takes too long.",
    )


@dataclasses.dataclass(frozen=True)
class EvaluatorConfig(Section):
    """Something that is measured now and then."""

    name: str
    kind: str = field("answers", "What is measured, a key of gemma4_jax.train.evaluators.EVALUATORS.", NOT_EMPTY)
    source: str = field(
        "",
        "The source whose held-out documents are read; one that holds none back is read whole if its weight is 0. "
        '"" is the first that holds documents back.',
    )
    every_steps: int = field(200, "Steps between evaluations; the last step is always evaluated.", at_least(1))
    num_documents: int = field(1000, "Documents that an evaluation reads, at most.", at_least(1))
    batch_size: int = field(0, "Rows in a batch of evaluation; 0 is as many as a microbatch has.", at_least(0))
    options: Mapping[str, Any] = field({}, "What else the kind takes.")

    @property
    def section(self) -> str:
        return f"evaluators.{self.name}"


@dataclasses.dataclass(frozen=True)
class LogConfig(Section):
    """What is written while a run goes on."""

    section = "log"
    every_steps: int = field(10, "Steps between lines of metrics.jsonl and of the terminal.", at_least(1))
    tensorboard: bool = field(True, "Also write TensorBoard event files.")
    profile_step: int = field(
        0, "Step whose trace goes to run_dir/profile, for TensorBoard or Perfetto; 0 traces none.", at_least(0)
    )


@dataclasses.dataclass(frozen=True)
class ExportConfig(Section):
    """The export at the end of a run."""

    section = "export"
    at_end: bool = field(True, "Write a Hugging Face-format export when the run ends.")
    dir: str = field("", 'Where to; "" is the folder `export` in run_dir.', _NO_ADDRESS)


@dataclasses.dataclass(frozen=True)
class RunConfig(Section):
    """A run."""

    model: Gemma4Config
    data: DataConfig
    name: str = field("gemma4", "What the run is called in its report.", NOT_EMPTY)
    seed: int = field(0, "Seed of the initial parameters. The order of the data has its own, data.seed.", SEED)
    run_dir: str = field(
        "runs/gemma4",
        "Where everything the run writes goes. A run started again in the same place resumes from its newest "
        "checkpoint.",
        _PATH,
    )
    tokenizer: str = field(
        "bundled",
        'The tokenizer: "bundled" is the small one in this package, anything else the path of a tokenizer.json, which '
        "the run copies into its directory.",
        _PATH,
    )
    init: InitConfig = InitConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluators: Mapping[str, EvaluatorConfig] = field({}, "Name -> what is measured now and then.")
    log: LogConfig = LogConfig()
    export: ExportConfig = ExportConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        data, train = self.data, self.train
        divides = f"a divisor of data.batch_size={data.batch_size}"
        upcycled = self.init.upcycle_from
        has_experts = self.model.text.num_experts > 0
        require(has_experts or not upcycled, "init.upcycle_from", upcycled, "empty, as model.text has no experts")
        whole = data.batch_size % train.grad_accum_steps == 0
        require(whole, "train.grad_accum_steps", train.grad_accum_steps, divides)
        warmup = self.optimizer.warmup_steps
        shorter = f"less than train.num_steps={train.num_steps}"
        require(warmup < train.num_steps, "optimizer.warmup_steps", warmup, shorter)
        for evaluator in self.evaluators.values():
            known = f"one of data.sources, {', '.join(data.sources)}, or empty"
            is_known = not evaluator.source or evaluator.source in data.sources
            require(is_known, f"{evaluator.section}.source", evaluator.source, known)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
        """The inverse of `fields.to_dict`, also after it went through JSON or a ConfigDict.

        Raises:
          InputError: a field is unknown, missing, or has a value that is not possible.
        """
        return parse(cls, values)

    def resolved(self, context: int = 1) -> "RunConfig":
        """With every value that follows from others: patches, chunk, balance of the experts, rows of evaluation.

        Args:
          context: devices over which the positions of a row are spread. A chunk has as many positions from each.
        """
        data, train = self.data, self.train
        vision = self.model.vision
        cell = vision.pooling_size**2 if vision else 0
        patches = data.patches_per_row or data.images_per_row * data.soft_tokens_per_image * cell
        length, most = data.seq_len // context, min(train.loss_chunk, data.seq_len) // context
        # Where there is none, `check_mesh` says so of the value that was given.
        chunk = next((n * context for n in range(most, 0, -1) if length % n == 0), train.loss_chunk)
        rows = data.batch_size // train.grad_accum_steps
        balance = 0.0 if self.init.from_hf or self.init.from_run else 0.01
        balance = balance if train.load_balance_weight < 0 else train.load_balance_weight
        return dataclasses.replace(
            self,
            data=dataclasses.replace(data, patches_per_row=patches),
            train=dataclasses.replace(train, loss_chunk=chunk, load_balance_weight=balance),
            evaluators={
                name: dataclasses.replace(evaluator, batch_size=evaluator.batch_size or rows)
                for name, evaluator in self.evaluators.items()
            },
        )


def check_mesh(config: RunConfig, mesh: Mapping[str, int]) -> None:
    """Checks that rows and positions of a batch spread evenly.

    Args:
      config: of the run, resolved for the mesh.
      mesh: mesh axis -> devices along it.
    Raises:
      InputError: they do not.
    """
    data, steps = config.data, config.train.grad_accum_steps
    rows = mesh["data"] * mesh["fsdp"] * mesh["expert"]
    sizes = f"data={mesh['data']}, fsdp={mesh['fsdp']}, expert={mesh['expert']}"
    shards = f"a multiple of {rows * steps}: {rows} shards of rows ({sizes}) times train.grad_accum_steps={steps}"
    require(data.batch_size % (rows * steps) == 0, "data.batch_size", data.batch_size, shards)
    for evaluator in config.evaluators.values():
        is_even = evaluator.batch_size % rows == 0
        even = f"a multiple of the {rows} shards of rows ({sizes})"
        require(is_even, f"{evaluator.section}.batch_size", evaluator.batch_size, even)
    if mesh["context"] > 1:
        even = f"a multiple of {2 * mesh['context']}, two chunks for each shard of mesh.context={mesh['context']}"
        require(data.seq_len % (2 * mesh["context"]) == 0, "data.seq_len", data.seq_len, even)
        chunk, even = config.train.loss_chunk, f"a position or more for each shard of mesh.context={mesh['context']}"
        require(chunk % mesh["context"] == 0, "train.loss_chunk", chunk, even)

"""Every field of a run, with its default. Other configs start from `get_config` and change what they need.

  gemma4 train --config=base:SIZE     # the defaults, with another architecture

This file is also the schema: a config, wherever it comes from, has exactly these fields with values of these types,
and anything else stops the run before it begins.
"""

import dataclasses

from ml_collections import ConfigDict

from gemma4_jax import sizes
from gemma4_jax.errors import InputError


def get_config(size: str = "quickstart") -> ConfigDict:
    """The defaults of a run.

    Args:
      size: name of the architecture that `model` starts from, a key of `gemma4_jax.sizes.SIZES`.
    Returns:
      A locked ConfigDict: a field that is not here cannot be added by mistake.
    Raises:
      InputError: there is no such size.
    """
    if size not in sizes.SIZES:
        raise InputError(f"{size!r} is not a size of the model: there are {', '.join(sizes.SIZES)}.")
    config = ConfigDict()

    # What the run is called in its report.
    config.name = "gemma4"
    # Seed of the initial parameters. The order of the data has its own, data.seed.
    config.seed = 0
    # Where everything the run writes goes. A run started again in the same place resumes from its newest checkpoint.
    config.run_dir = "runs/gemma4"
    # The tokenizer: "bundled" is the small one in this package, anything else the path of a tokenizer.json, which
    # the run copies into its directory.
    config.tokenizer = "bundled"

    config.init = init = ConfigDict()
    # Begin from the weights of a checkpoint in Hugging Face's format, a folder with config.json and safetensors; ""
    # is random. Its architecture must be `model`, which may leave out towers: these are carried into exports.
    init.from_hf = ""
    # Begin from the parameters of the last checkpoint of another run, or of what `gemma4 convert` wrote; "" is random.
    init.from_run = ""

    # The architecture, field by field as in gemma4_jax.config: --config.model.text.num_heads=4 overrides one.
    config.model = ConfigDict(dataclasses.asdict(sizes.SIZES[size]()))

    # Devices along each axis of the mesh. Their product is the number of devices; one of them may be -1, the rest.
    config.mesh = mesh = ConfigDict()
    # Rows of the batch are spread, parameters are copied.
    mesh.data = -1
    # Rows of the batch are spread, parameters and optimizer state too.
    mesh.fsdp = 1
    # Rows of the batch are spread, experts too; tokens travel to their experts.
    mesh.expert = 1
    # Positions of a row are spread.
    mesh.context = 1
    # Heads, MLP width and vocabulary are spread.
    mesh.tensor = 1

    config.data = data = ConfigDict()
    # Source -> its share of the documents drawn; shares are relative to their sum. "digits" and "python" ship with the
    # package. To change the set of sources on the command line give the whole field:
    # --config.data.mixture="{'digits': 1.0}".
    data.mixture = ConfigDict({"digits": 0.9, "python": 0.1})
    # Source of your own -> where it is: {"mine": "jsonl:train.jsonl"} lets data.mixture name "mine". The forms are in
    # gemma4_jax.data.sources.
    data.sources = ConfigDict()
    # Tokens in a packed row.
    data.seq_len = 512
    # Images in a packed row, at most; 0 trains on text alone.
    data.images_per_row = 6
    # Patches in a packed row, at most; a multiple of the patches that pool into one soft token.
    data.patches_per_row = 1680
    # Most soft tokens that an image may become: 70, 140, 280, 560 or 1120. More tokens, finer reading, more compute.
    data.soft_tokens_per_image = 70
    # Rows in a batch, over all hosts and devices, before it is cut into train.grad_accum_steps pieces.
    data.batch_size = 8
    # Processes that read and pack ahead of the training process; 0 does it in a thread of that process. The order of
    # documents depends on the number.
    data.num_workers = 0
    # Text longer than a row is split, unless part of it carries no loss: "drop" leaves such a document out, and
    # "cut_context" shortens it: tokens go from the left of the text before its first learned one, of which the last
    # segment is the question and stays. Where that is not enough it is left out too.
    data.long_masked = "drop"
    # Share of a source's documents that may be left out (unreadable, too large for a row, nothing to learn); above it
    # the run stops. Looked at from the source's hundredth document on, and at once where it gives nothing at all.
    data.max_left_out = 0.5
    # Go on with a run whose data is not what it was: documents may then come again or not at all until the epoch ends.
    data.allow_changes = False
    # Seed of the order of documents and of everything random in making them.
    data.seed = 0

    config.train = train = ConfigDict()
    # Optimizer steps of the whole run.
    train.num_steps = 1000
    # Pieces that a batch is worked through in, to hold a batch larger than memory would.
    train.grad_accum_steps = 1
    # Type of activations: "float32", "bfloat16", or "auto": bfloat16 on accelerators, float32 on CPU.
    train.compute_dtype = "auto"
    # What computes attention: "auto", by shape and platform, or a key of gemma4_jax.ops.attention.IMPLEMENTATIONS.
    train.attention = "auto"
    # What computes the experts: "auto", by platform, or a key of gemma4_jax.ops.expert_parallel.IMPLEMENTATIONS.
    train.experts = "auto"
    # What the forward pass keeps for the backward pass: "none" recomputes nothing, "dots" keeps the results of
    # weight matmuls, "full" keeps only the input of each block.
    train.remat = "none"
    # Positions of a row whose logits exist at one time; a divisor of data.seq_len.
    train.loss_chunk = 128
    # Weight of the load-balance loss of the experts; 0 switches it off.
    train.load_balance_weight = 0.01

    config.optimizer = optimizer = ConfigDict()
    # Peak of the learning rate: linear warmup to it, then cosine decay.
    optimizer.learning_rate = 3e-3
    # Steps of warmup.
    optimizer.warmup_steps = 50
    # The learning rate at the last step, as a fraction of the peak.
    optimizer.final_learning_rate_fraction = 0.1
    # Decay of AdamW's first moment.
    optimizer.b1 = 0.9
    # Decay of AdamW's second moment.
    optimizer.b2 = 0.95
    # AdamW's epsilon.
    optimizer.eps = 1e-8
    # Decoupled weight decay of matrices and embeddings; norm scales and other vectors are never decayed.
    optimizer.weight_decay = 0.1
    # The global gradient norm is cut to this.
    optimizer.clip_norm = 1.0
    # Factor on the learning rate by group of parameters; 0 freezes the group, which then has no optimizer state.
    optimizer.learning_rate_scale = scale = ConfigDict()
    # The vision tower and the projection of its soft tokens.
    scale.vision = 1.0
    # The tables of token and of per-layer embeddings.
    scale.embedding = 1.0
    # Everything else, but for the audio tower: it is frozen, for no source gives documents with sounds.
    scale.decoder = 1.0

    config.checkpoint = checkpoint = ConfigDict()
    # Steps between checkpoints, which is as many as a run that is killed repeats at most; the last step is always kept.
    # A checkpoint is whole before the second step after it begins.
    checkpoint.every_steps = 200
    # Checkpoints to keep; older ones are deleted.
    checkpoint.keep = 2
    # Keep a checksum of every file of a checkpoint, with which it is verified before it is read; False keeps only the
    # sizes, where reading terabytes again takes too long.
    checkpoint.checksums = True

    config.eval = evaluation = ConfigDict()
    # The source to evaluate on: one of data.sources, all of it, or "digits" or "python", whose held-out documents are
    # read; "" is the first of data.mixture that holds documents back. Numbers are read in "digits" alone.
    evaluation.source = ""
    # Steps between evaluations; the last step is always evaluated.
    evaluation.every_steps = 200
    # Documents that an evaluation reads, at most; of "digits", each is an image.
    evaluation.num_documents = 1000
    # Rows in a batch of evaluation.
    evaluation.batch_size = 8

    config.log = log = ConfigDict()
    # Steps between lines of metrics.jsonl and of the terminal.
    log.every_steps = 10
    # Also write TensorBoard event files.
    log.tensorboard = True

    config.export = export = ConfigDict()
    # Write a Hugging Face-format export when the run ends.
    export.at_end = True
    # Where to; "" is the folder `export` in run_dir.
    export.dir = ""

    return config.lock()

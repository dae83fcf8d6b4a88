"""Generation: one pass over whole prompts, then token by token with a key-value cache, greedily or by sampling.

Prompts of a batch stand at the beginning of their rows, and what a row writes follows its own prompt without a gap, so
prompts of different lengths need no special care: a place of the cache counts once its row has reached it.

Shapes are rounded up to a few sizes, and each of them is compiled once.
"""

import contextlib
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from gemma4_jax.audio.features import FRAMES_PER_SOFT_TOKEN
from gemma4_jax.batch import Batch, padding, sizes_of
from gemma4_jax.errors import InputError
from gemma4_jax.model import Gemma4
from gemma4_jax.ops.cross_entropy import vocabulary_logits
from gemma4_jax.sharding import BATCH_AXES, constrain
from gemma4_jax.text.attention import KeyValues, view_tokens
from gemma4_jax.text.decoder import Cache


class PromptProcessor(Protocol):
    """What `generate` needs of a processor: prompts to a Batch, ids to text, and the tokens that end an answer."""

    @property
    def stop_tokens(self) -> tuple[int, ...]: ...

    def __call__(
        self, inputs: Any, *, images: Any = None, audios: Any = None, add_generation_prompt: bool = False, **chat: Any
    ) -> Batch: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class Sampler(NamedTuple):
    """How the next token is drawn; scalars, which apply one after the other.

    Attributes:
      temperature: divides the logits, above 0.
      top_k: only the k likeliest tokens are drawn from, and those as likely as the k-th.
      cut: of those, the unlikeliest that together have no more than this probability are left out; 1 - top_p.
    """

    temperature: jax.Array
    top_k: jax.Array
    cut: jax.Array


def generate(
    model: Gemma4,
    processor: PromptProcessor,
    prompts: Any,
    *,
    images: Any = None,
    audios: Any = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    **chat: Any,
) -> list[str]:
    """What the model writes after prompts.

    Args:
      model: on any mesh.
      processor: of the model, from `load_hf`.
      prompts: a text or a conversation, or a list of them, as `processor` takes them.
      images, audios: of the prompts, as `processor` takes them.
      max_new_tokens, temperature, top_k, top_p, seed: as in `generate_tokens`.
      chat: variables of the chat template, and `tools`.
    Returns:
      One text for each prompt, without the token that ended it.
    Raises:
      InputError: a prompt or an argument is not acceptable.
    """
    batch = processor(prompts, images=images, audios=audios, add_generation_prompt=True, **chat)
    written = generate_tokens(
        model,
        batch,
        max_new_tokens=max_new_tokens,
        stop_tokens=processor.stop_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    return [processor.decode(ids[:-1] if ids[-1] in processor.stop_tokens else ids) for ids in written]


def generate_tokens(
    model: Gemma4,
    prompts: Batch,
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """Token ids that the model writes after prompts.

    Args:
      model: on any mesh.
      prompts: one document a row, from the row's first place; targets and loss weights are not read.
      max_new_tokens: tokens to write at most, for each prompt.
      stop_tokens: ids that end an answer.
      temperature: 0 takes the likeliest token each time; above 0 draws from softmax(logits / temperature).
      top_k: draw from the k likeliest tokens only, and those as likely as the k-th; 0 is no limit. Needs a temperature.
      top_p: of those, from the likeliest that together reach this probability; 1 is no limit. Needs a temperature.
      seed: of the draws.
    Returns:
      For each prompt its new ids, ending with a stop token if one was written.
    Raises:
      InputError: a row is not one prompt, or an argument is out of range.
    """
    _check_arguments(max_new_tokens, temperature, top_k, top_p, seed)
    lengths = _check_prompts(model, prompts, max_new_tokens)
    graphdef, state = nnx.split(model)
    sharding = jax.tree.leaves(state)[0].sharding
    mesh: Any = sharding.mesh if isinstance(sharding, NamedSharding) else None
    if mesh is not None and mesh.shape["context"] > 1:
        raise InputError(
            f"mesh.context={mesh.shape['context']} cannot spread single tokens: generate on a mesh with 1."
        )
    shards = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    padded = _pad(prompts, rows=-(-len(lengths) // shards) * shards, model=model)
    lengths = np.pad(lengths, (0, len(padded.tokens) - len(lengths)))
    sampler = None
    if temperature:
        vocab_size = model.config.text.vocab_size
        k = min(top_k or vocab_size, vocab_size)
        sampler = Sampler(jnp.float32(temperature), jnp.int32(k), jnp.float32(1 - top_p))
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        written = _write(
            graphdef,
            state,
            padded,
            lengths,
            sampler,
            np.array(stop_tokens, np.int32),
            max_new_tokens,
            jax.random.key(seed),
            num_places=_round_up(max_new_tokens),
        )
    rows = np.asarray(written)[: len(prompts.tokens), :max_new_tokens]
    return [_until_stop(row.tolist(), stop_tokens) for row in rows]


def _check_arguments(max_new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int) -> None:
    rules = (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < math.inf, "a finite number of at least 0"),
        ("top_k", top_k, top_k >= 0, "at least 0, where 0 is no limit"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("seed", seed, 0 <= seed < 2**32, "between 0 and 2**32 - 1"),
    )
    for name, value, holds, accepted in rules:
        if not holds:
            raise InputError(f"{name}={value!r} is not possible: it must be {accepted}.")
    if not temperature and (top_k or top_p < 1):
        name, value = ("top_k", top_k) if top_k else ("top_p", top_p)
        raise InputError(
            f"{name}={value} does nothing at temperature=0, which takes the likeliest token: give a temperature above "
            "0, such as 1."
        )


def _check_prompts(model: Gemma4, prompts: Batch, max_new_tokens: int) -> np.ndarray:
    """Length of every prompt, [B] int32."""
    segment_ids = np.asarray(prompts.segment_ids)
    lengths = np.sum(segment_ids > 0, axis=1)
    is_prompt = np.arange(segment_ids.shape[1]) < lengths[:, None]
    if not len(lengths) or lengths.min() == 0 or np.any(segment_ids != is_prompt):
        raise InputError("prompts must have one document a row, from the row's first place: pack them one by one.")
    longest, limit = int(lengths.max()), model.config.text.max_positions
    if longest + max_new_tokens > limit:
        raise InputError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} are more than the {limit} positions of "
            "the model: shorten one of them."
        )
    return lengths.astype(np.int32)


def _until_stop(ids: list[int], stop_tokens: Sequence[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids, start=1) if token in stop_tokens), len(ids))
    return ids[:end]


def _round_up(size: int) -> int:
    """The next of the sizes that are compiled: 0, and from 16 on four to a doubling."""
    step = max(16, 1 << max(0, (size - 1).bit_length() - 3))
    return -(-size // step) * step


def _pad(prompts: Batch, *, rows: int, model: Gemma4) -> Batch:
    """The batch with more padding: `rows` rows, and its other sizes rounded up."""
    arrays = {name: np.asarray(array) for name, array in vars(prompts).items()}
    sizes = sizes_of(arrays)
    cell = 1 if model.config.vision is None else model.config.vision.pooling_size**2
    for dim, unit in (("length", 1), ("patches", cell), ("frames", FRAMES_PER_SOFT_TOKEN)):
        sizes[dim] = _round_up(sizes[dim] // unit) * unit
    padded = padding(sizes | {"batch": rows})
    for name, array in arrays.items():
        padded[name][tuple(map(slice, array.shape))] = array
    return Batch(**padded)  # type: ignore[arg-type]  # numpy arrays on the host


@partial(jax.jit, static_argnames=("graphdef", "num_places"))
def _write(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    prompts: Batch,
    lengths: jax.Array,
    sampler: Sampler | None,
    stop_tokens: jax.Array,
    max_new_tokens: jax.Array,
    key: jax.Array,
    *,
    num_places: int,
) -> jax.Array:
    """[B, num_places] int32 new tokens; after a stop token, and from `max_new_tokens` on, they mean nothing.

    Args:
      graphdef, state: the model.
      prompts, lengths: padded; a row of length 0 is padding.
      sampler: None is greedy.
      stop_tokens: [n] int32.
      max_new_tokens, key: scalars.
      num_places: in the cache, for new tokens.
    """
    model = nnx.merge(graphdef, state)
    logits, cache = _prefill(model, prompts, lengths, num_places)
    first = _choose(logits, sampler, jax.random.fold_in(key, 0))
    written = jnp.zeros((len(lengths), num_places), jnp.int32).at[:, 0].set(first)
    is_done = (lengths == 0) | jnp.isin(first, stop_tokens)

    def goes_on(carry: tuple) -> jax.Array:
        step, _, _, is_done = carry
        return (step < max_new_tokens) & ~jnp.all(is_done)

    def take_step(carry: tuple) -> tuple:
        step, written, cache, is_done = carry
        index = (lengths + step - 1)[:, None]  # of the token that was written last
        tokens = jax.lax.dynamic_slice_in_dim(written, step - 1, 1, axis=1)
        hidden, cache = _advance(model, _text_batch(prompts, tokens, index), index, cache)
        chosen = _choose(vocabulary_logits(hidden[:, 0], model.head), sampler, jax.random.fold_in(key, step))
        written = jax.lax.dynamic_update_slice_in_dim(written, chosen[:, None], step, axis=1)
        return step + 1, written, cache, is_done | jnp.isin(chosen, stop_tokens)

    written = jax.lax.while_loop(goes_on, take_step, (jnp.int32(1), written, cache, is_done))[1]
    return constrain(written, None, None)  # whole in every process


def _prefill(model: Gemma4, prompts: Batch, lengths: jax.Array, num_places: int) -> tuple[jax.Array, Cache]:
    """Logits [B, V] after the last token of every prompt, and the cache with `num_places` free places behind them."""
    B, T = prompts.tokens.shape
    index = jnp.broadcast_to(jnp.arange(T), (B, T))
    hidden, cache = _advance(model, prompts, index, _empty_cache(model, B, T + num_places))
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    return vocabulary_logits(jnp.take_along_axis(hidden, last, axis=1)[:, 0], model.head), cache


def _advance(model: Gemma4, batch: Batch, index: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Final hidden states [B, T, D] of the tokens of a batch, and the cache with them in it at `index` [B, T]."""
    x, per_layer = model.embed(batch)
    num_keys = cache[0].k.shape[2]
    view = view_tokens(model.config.text, batch, model.kernels, index=index, num_keys=num_keys)
    hidden, _, extended = model.decoder(x, per_layer, view, cache)
    assert extended is not None
    return hidden, extended


def _text_batch(prompts: Batch, tokens: jax.Array, positions: jax.Array) -> Batch:
    """One more token [B, 1] of each row, with neither images nor sounds."""
    sizes = sizes_of(vars(prompts)) | {"length": 1, "patches": 0, "frames": 0}
    text = {"tokens": tokens, "positions": positions, "segment_ids": jnp.ones_like(tokens)}
    return Batch(**jax.tree.map(jnp.asarray, padding(sizes)) | text)


def _empty_cache(model: Gemma4, rows: int, places: int) -> Cache:
    text = model.config.text
    periods = text.num_own_layers // text.attention_period

    def layer(is_global: bool) -> KeyValues:
        heads = (text.num_global_kv_heads, text.global_head_dim) if is_global else (text.num_kv_heads, text.head_dim)
        return KeyValues(*(jnp.zeros((periods, rows, places, *heads), model.embedder.dtype) for _ in range(2)))

    return tuple(layer(text.is_global(i)) for i in range(text.attention_period))


def _choose(logits: jax.Array, sampler: Sampler | None, key: jax.Array) -> jax.Array:
    """[B, V] logits -> [B] int32 tokens; the likeliest without a sampler."""
    if sampler is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, _filter(logits, sampler), axis=-1).astype(jnp.int32)


def _filter(logits: jax.Array, sampler: Sampler) -> jax.Array:
    """[B, V] logits over the temperature, minus infinity for tokens that are not drawn. As transformers does it."""
    logits = logits / sampler.temperature
    order = jnp.argsort(logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)  # the likeliest last
    weakest = jnp.take(ranked, jnp.maximum(ranked.shape[-1] - sampler.top_k, 0), axis=-1)
    ranked = jnp.where(ranked < weakest[:, None], -jnp.inf, ranked)
    is_drawn = (jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1) > sampler.cut).at[:, -1].set(True)
    kept = jnp.where(is_drawn, ranked, -jnp.inf)
    return jnp.put_along_axis(logits, order, kept, axis=-1, inplace=False)

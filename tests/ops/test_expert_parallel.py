import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.errors import InputError
from gemma4_jax.ops import expert_parallel
from gemma4_jax.ops.expert_parallel import IMPLEMENTATIONS, apply_experts, choose
from gemma4_jax.ops.policy import KernelPolicy
from gemma4_jax.sharding import make_mesh
from gemma4_jax.stack import remat
from tests.ops import test_grouped

B, T, D, E, C, F = 8, 6, 8, 8, 2, 4

ON_CPU = [name for name in IMPLEMENTATIONS if name != "mosaic_gpu"]

# float32 sums in another order: the largest measured error is 6e-7 of the largest entry.
TOLERANCE = 3e-6


@pytest.fixture
def inputs():
    """x, choices, weights, gate_up, down; the load is uneven and some experts have no token at all."""
    keys = jax.random.split(jax.random.key(0), 5)
    x, gate_up, down = (
        jax.random.normal(key, shape) for key, shape in zip(keys, ((B, T, D), (E, D, 2, F), (E, F, D)), strict=False)
    )
    gate_up *= D**-0.5  # as in a model: of gates far from zero, gelu's slope is a difference of nearly equal numbers
    preference = jnp.array([3.0, 0, 0, -9, 2, -9, 0, 0])
    _, choices = jax.lax.top_k(jax.random.gumbel(keys[3], (B, T, E)) + preference, C)
    assert len(set(np.bincount(choices.ravel(), minlength=E))) > 3
    assert np.bincount(choices.ravel(), minlength=E)[3] == 0
    return x, choices, jax.random.uniform(keys[4], (B, T, C)), gate_up, down


def naive(x, choices, weights, gate_up, down):
    """A copy of the weights of its expert for every choice of every token."""
    gate, up = (jnp.einsum("btd,btcdf->btcf", x, gate_up[choices][..., half, :]) for half in (0, 1))
    out = jnp.einsum("btcf,btcfd->btcd", jax.nn.gelu(gate, approximate=True) * up, down[choices])
    return jnp.sum(out * weights[..., None], axis=2)


def value_and_gradients(function, inputs):
    """The output, and the gradients for x, weights, gate_up and down of a scalar of it."""
    x, choices, weights, gate_up, down = inputs
    direction = jax.random.normal(jax.random.key(9), x.shape)

    @jax.jit
    def compute(*differentiated):
        def scalar(x, weights, gate_up, down):
            out = function(x, choices, weights, gate_up, down)
            return jnp.sum(out * direction), out

        (_, out), gradients = jax.value_and_grad(scalar, argnums=(0, 1, 2, 3), has_aux=True)(*differentiated)
        return out, *gradients

    return compute(x, weights, gate_up, down)


def assert_close(given, expected):
    for ours, plain in zip(given, expected, strict=True):
        assert np.abs(plain).max() > 0
        np.testing.assert_allclose(ours, plain, rtol=0, atol=TOLERANCE * np.abs(plain).max())


interpreted = test_grouped.interpreted


def load(inputs, kind):
    """The inputs with their choices balanced, random, or all of the same experts."""
    x, choices, *rest = inputs
    even = (jnp.arange(B * T)[:, None] + jnp.array([0, E // 2])) % E
    same = jnp.zeros_like(choices) + jnp.array([5, 2])
    return x, {"balanced": even.reshape(B, T, C), "random": choices, "all to one": same}[kind], *rest


LOADS = ("balanced", "random", "all to one")


@pytest.mark.parametrize("kind", LOADS)
@pytest.mark.parametrize("implementation", ON_CPU)
def test_every_token_reaches_every_expert_that_it_chose(implementation, kind, inputs):
    def experts(*inputs):
        return apply_experts(*inputs, implementation=implementation)

    inputs = load(inputs, kind)
    assert_close(value_and_gradients(experts, inputs), value_and_gradients(naive, inputs))


@pytest.mark.parametrize("implementation", ON_CPU)
def test_in_bfloat16_only_what_lies_between_two_products_is_rounded(implementation, inputs):
    def experts(*inputs):
        return apply_experts(*inputs, implementation=implementation)

    half = [value.astype(jnp.bfloat16) if value.dtype == jnp.float32 else value for value in inputs]
    half[2] = inputs[2]
    exact = value_and_gradients(
        naive, [value if value.dtype == jnp.int32 else value.astype(jnp.float32) for value in half]
    )
    for ours, plain in zip(value_and_gradients(experts, half), exact, strict=True):
        error = np.asarray(ours, np.float32) - plain
        # The largest measured is 0.6%, a rounding or two of bfloat16.
        assert np.linalg.norm(error) < 0.015 * np.linalg.norm(plain)


def test_what_is_auto_goes_by_the_platform_and_what_does_not_exist_there_is_refused():
    assert [choose(KernelPolicy(platform)).implementation for platform in ("cpu", "gpu", "tpu")] == [
        "blocks", "blocks", "megablox",
    ]  # fmt: skip
    assert choose(KernelPolicy(experts="ragged")).implementation == "ragged"
    assert choose(KernelPolicy("tpu", experts="megablox")).implementation == "megablox"
    with pytest.raises(
        InputError, match=r"experts='fast' is not possible on tpu: .* auto, blocks, megablox, ragged or"
    ):
        choose(KernelPolicy("tpu", experts="fast"))
    with pytest.raises(
        InputError, match=r"experts='megablox' is not possible on cpu \(.* TPUs\): .* auto, blocks, ragged or dense"
    ):
        choose(KernelPolicy("cpu", experts="megablox"))


@pytest.mark.parametrize(
    ("platform", "reason"), [("cpu", "Hopper GPUs"), ("gpu", r"tokamax is not .*\[mosaic_gpu\]\"")]
)
def test_kernels_for_hopper_are_taken_where_they_are_named_and_can_be(platform, reason, monkeypatch):
    policy = KernelPolicy(platform, experts="mosaic_gpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=rf"experts='mosaic_gpu' is not possible on {platform} \(.*{reason}\): it must"
    ):
        choose(policy)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert choose(KernelPolicy("gpu", experts="mosaic_gpu")).implementation == "mosaic_gpu"
    assert choose(KernelPolicy("gpu")).implementation == "blocks"


def test_tokens_are_gathered_unless_the_other_exchange_is_named_where_it_exists():
    assert [choose(KernelPolicy(platform)).exchange for platform in ("cpu", "gpu", "tpu")] == ["gather"] * 3
    assert choose(KernelPolicy("tpu", expert_exchange="ragged")).exchange == "ragged"
    with pytest.raises(InputError, match=r"expert_exchange='ragged' is not possible on cpu: it must be auto or gather"):
        choose(KernelPolicy("cpu", expert_exchange="ragged"))


@pytest.mark.parametrize("implementation", ON_CPU)
def test_the_implementation_that_is_named_is_run(implementation, inputs):
    marks = {"blocks": "while", "megablox": "gmm", "ragged": "ragged_dot", "dense": "gef"}
    program = str(jax.make_jaxpr(lambda *inputs: apply_experts(*inputs, implementation=implementation))(*inputs))
    assert [name for name, mark in marks.items() if mark in program and name != "dense"] == (
        [] if implementation == "dense" else [implementation]
    )


@pytest.mark.parametrize("implementation", ON_CPU)
def test_padding_goes_to_no_expert(implementation, inputs):
    x, choices, weights, gate_up, down = inputs
    is_token = jnp.arange(T) < jnp.array([T, 4, 0, 1, T, 2, 3, 5])[:, None]

    def experts(*inputs):
        return apply_experts(*inputs, implementation=implementation, is_token=is_token)

    kept = value_and_gradients(naive, (x, choices, weights * is_token[..., None], gate_up, down))
    given = value_and_gradients(experts, inputs)
    np.testing.assert_array_equal(given[0][~is_token], 0)
    expected = *kept[:2], kept[2] * is_token[..., None], *kept[3:]  # a weight that is multiplied by 0 has no gradient
    assert_close(given, expected)
    # What stands in padding is nobody's business: it may be no number.
    if implementation != "dense":
        spoilt = value_and_gradients(experts, (jnp.where(is_token[..., None], x, jnp.nan), choices, *inputs[2:]))
        for ours, clean in zip(spoilt, given, strict=True):
            np.testing.assert_array_equal(ours, clean)


@pytest.mark.parametrize("implementation", ["blocks", "megablox"])
def test_an_expert_that_is_no_number_spoils_only_the_tokens_that_chose_it(implementation, inputs):
    x, choices, weights, gate_up, down = inputs

    def experts(*inputs):
        return apply_experts(*inputs, implementation=implementation)

    given = value_and_gradients(experts, (x, choices, weights, gate_up.at[4].set(jnp.nan), down))
    expected = value_and_gradients(experts, inputs)
    chose_it = np.any(choices == 4, axis=-1)
    assert 0 < chose_it.sum() < chose_it.size
    for i, is_spoilt in enumerate((chose_it, chose_it, choices == 4, np.arange(E) == 4, np.arange(E) == 4)):
        assert np.all(np.isnan(given[i][is_spoilt]).any(axis=-1))
        np.testing.assert_array_equal(given[i][~is_spoilt], expected[i][~is_spoilt])


MESHES = [
    {"data": 8},
    {"expert": 2, "fsdp": 4},
    {"data": 2, "expert": 4},
    {"expert": 8},
    {"data": 2, "expert": 2, "tensor": 2},
    {"expert": 4, "context": 2},
    {"fsdp": 2, "context": 2, "tensor": 2},
]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("implementation", ["blocks", "ragged", "dense"])
def test_experts_spread_over_a_mesh_are_those_of_one_device(implementation, sizes, inputs):
    def experts(*inputs):
        return apply_experts(*inputs, implementation=implementation)

    alone = value_and_gradients(experts, inputs)
    with jax.set_mesh(make_mesh(sizes)):
        spread = value_and_gradients(experts, inputs)
    assert_close(spread, alone)


@pytest.mark.parametrize("kind", LOADS)
def test_nothing_is_dropped_on_a_mesh_that_divides_neither_rows_nor_positions(kind, inputs):
    is_token = jnp.arange(5) < jnp.array([5, 2, 0])[:, None]
    x, choices, weights, *matrices = load(inputs, kind)
    inputs = x[:3, :5], choices[:3, :5], weights[:3, :5], *matrices

    def experts(*inputs):
        return apply_experts(*inputs, implementation="blocks", is_token=is_token)

    alone = value_and_gradients(experts, inputs)
    with jax.set_mesh(make_mesh({"expert": 4, "context": 2})):
        spread = value_and_gradients(experts, inputs)
    assert_close(spread, alone)


def test_float32_matrices_of_bfloat16_tokens_have_float32_gradients_on_a_mesh(inputs):
    def experts(x, choices, weights, gate_up, down):
        return apply_experts(x.astype(jnp.bfloat16), choices, weights, gate_up, down, implementation="blocks")

    exact = value_and_gradients(naive, inputs)
    with jax.set_mesh(make_mesh({"fsdp": 4, "expert": 2})):
        spread = value_and_gradients(experts, inputs)
    for ours, plain in zip(spread[1:], exact[1:], strict=True):
        assert ours.dtype == jnp.float32
        assert np.linalg.norm(ours - plain) < 0.015 * np.linalg.norm(plain)


def collectives(inputs, axis, policy):
    """How often each collective over a mesh axis stands in the gradients of a layer of experts."""
    x, choices, weights, gate_up, down = inputs

    def loss(x, *matrices):
        layer = remat(lambda x: jnp.sin(apply_experts(x, choices, weights, *matrices, implementation="dense")), policy)
        return jnp.sum(jnp.sin(layer(x)))

    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 2, "expert": 2})):
        program = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(x, gate_up, down))
    found = re.findall(r"\b(psum|all_gather|reduce_scatter)\[[^\[\]]*?ax(?:es|is_name)=\(([^)]*)\)", program)
    return Counter(name for name, axes in found if f"'{axis}'" in axes)


def test_gradients_of_matrices_are_scattered_to_the_devices_that_hold_the_parts(inputs):
    assert collectives(inputs, "fsdp", "none") == {"all_gather": 2, "reduce_scatter": 2}
    assert collectives(inputs, "data", "none") == {"psum": 2}  # of the parts
    # The backward pass gathers the matrices again, once.
    assert collectives(inputs, "fsdp", "full") == {"all_gather": 4, "reduce_scatter": 2}


@pytest.mark.parametrize(("policy", "back"), [("full", 1), ("attention", 1), ("dots", 1), ("offload", 2)])
def test_what_experts_of_other_devices_made_is_kept_and_does_not_travel_again(policy, back, inputs):
    # Tokens, choices and weights go to the experts, once more for the backward pass, and with the gradient that goes
    # there another comes back.
    assert collectives(inputs, "expert", policy) == {"all_gather": 3 + 3 + 1, "reduce_scatter": back + 1}


@pytest.fixture
def emulated(monkeypatch):
    """`ragged_all_to_all`, which does not exist on CPU, as gathers: each device takes what was sent to it."""

    def emulate(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
        here = jax.lax.axis_index(axis_name)
        sent = [jax.lax.all_gather(x, axis_name) for x in (operand, input_offsets, send_sizes, output_offsets)]
        taken = jnp.zeros(len(output), bool)
        for source, (rows, first, sizes, places) in enumerate(zip(*sent, strict=True)):
            row = jnp.arange(len(output)) - places[here]
            is_own = (row >= 0) & (row < sizes[here])
            output = jnp.where(is_own[:, None], rows[jnp.clip(row + first[here], 0, len(rows) - 1)], output)
            is_promised = (
                (sizes[here] == recv_sizes[source]) & (jnp.sum(is_own) == sizes[here]) & ~(taken & is_own).any()
            )
            taken |= is_own
            if jnp.issubdtype(output.dtype, jnp.floating):
                output = jnp.where(is_promised, output, jnp.nan)
        return output

    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulate)


def assert_spread_is_alone(inputs, sizes, **given):
    """What experts give on a mesh is what they give on one device."""

    def experts(*inputs):
        return apply_experts(*inputs, **given)

    with jax.set_mesh(make_mesh(sizes)):
        spread = value_and_gradients(experts, inputs)
    assert_close(spread, value_and_gradients(naive, inputs))


@pytest.mark.parametrize("kind", LOADS)
@pytest.mark.parametrize(
    "sizes", [{"data": 4, "expert": 2}, {"expert": 8}, {"expert": 2, "context": 2, "tensor": 2}], ids=str
)
def test_tokens_that_are_sent_to_their_experts_alone_come_back_complete(sizes, kind, inputs, emulated):
    assert_spread_is_alone(load(inputs, kind), sizes, implementation="blocks", exchange="ragged")


def test_a_token_travels_to_a_device_once_and_padding_nowhere(inputs, emulated, monkeypatch):
    sent, plain = [], jax.lax.ragged_all_to_all

    def count(operand, output, first, sizes, *rest, axis_name):
        if operand.ndim == 2 and operand.shape[1] == D:
            jax.debug.callback(lambda sizes: sent.append(int(sizes.sum())), sizes)
        return plain(operand, output, first, sizes, *rest, axis_name=axis_name)

    monkeypatch.setattr(jax.lax, "ragged_all_to_all", count)
    x, choices, *rest = inputs
    is_token = jnp.arange(T) < jnp.array([T, 4, 0, 1, T, 2, 3, 5])[:, None]
    with jax.set_mesh(make_mesh({"data": 4, "expert": 2})):
        out = jax.jit(
            lambda *inputs: apply_experts(*inputs, implementation="blocks", exchange="ragged", is_token=is_token)
        )(x, choices, *rest)
        jax.block_until_ready(out)
        jax.effects_barrier()
    shards = [len({int(c) // (E // 2) for c in chosen}) for chosen in choices[is_token]]
    assert sum(sent) == 2 * sum(shards)  # there and back


@pytest.mark.parametrize("kind", LOADS)
@pytest.mark.parametrize("sizes", [{"expert": 8}, {"fsdp": 2, "expert": 4}], ids=str)
def test_a_device_works_through_more_choices_than_its_share_in_pieces(sizes, kind, inputs, monkeypatch):
    monkeypatch.setattr(expert_parallel, "PIECE", 0.8)
    assert_spread_is_alone(load(inputs, kind), sizes, implementation="ragged")


@pytest.mark.parametrize("sizes", [{"expert": 4, "fsdp": 2}, {"expert": 2, "context": 2, "tensor": 2}], ids=str)
def test_the_kernels_for_tpu_are_right_on_a_mesh_as_far_as_they_can_be_interpreted(sizes, inputs):
    assert_spread_is_alone(inputs, sizes, implementation="megablox")

"""A model with experts that begins as a dense one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemma4_jax.errors import InputError
from gemma4_jax.hf.save import export_state
from gemma4_jax.sharding import make_mesh
from gemma4_jax.tokenizer import Tokenizer
from gemma4_jax.train.initialize import check_source, initial_values
from gemma4_jax.train.program import make_program
from gemma4_jax.train.upcycle import dense_config
from tests.hf import samples
from tests.train.tiny import typed


@pytest.fixture
def config(shallow_config, tmp_path):
    """Of a run with experts, and a dense checkpoint to begin from."""
    shallow_config.init.upcycle_from = str(tmp_path / "dense")
    config = typed(shallow_config)
    assert config.model.text.num_experts
    dense = dense_config(config.model)
    model = samples.model(dense, samples.lively_weights(dense))
    export_state(nnx.state(model), dense, tmp_path / "dense", tokenizer=Tokenizer.load("bundled"), max_soft_tokens=70)
    return config


def test_at_first_it_computes_what_the_dense_model_does_and_its_experts_can_learn(config, tmp_path):
    check_source(config)
    program = make_program(config, make_mesh({"expert": 2, "fsdp": 2}, jax.devices()[:4]))
    with jax.set_mesh(program.mesh):
        values = initial_values(program.config, program.state, tmp_path)
    for given, wanted in zip(jax.tree.leaves(values), jax.tree.leaves(program.state.model), strict=True):
        assert given.sharding.is_equivalent_to(wanted.sharding, given.ndim)
    values = jax.tree.map(np.asarray, values)
    dense = dense_config(config.model)
    documents = [[document] for document in samples.all_documents(dense)]
    batch = jax.tree.map(jnp.asarray, samples.batch(documents, dense))

    def loss(params: nnx.State, buffers: nnx.State, graphdef: nnx.GraphDef) -> jax.Array:
        logits = nnx.merge(graphdef, params, buffers)(batch)
        of_targets = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(of_targets * batch.loss_weights) / jnp.sum(batch.loss_weights)

    graphdef, *expected = nnx.split(samples.model(dense, samples.lively_weights(dense)), nnx.Param, ...)
    params, buffers = nnx.split_state(values, nnx.Param, ...)
    value, gradient = jax.jit(jax.value_and_grad(loss), static_argnums=2)(params, buffers, program.graphdef)
    # One more norm divides by a root mean square of one and an epsilon: the largest measured difference is 2e-6.
    np.testing.assert_allclose(value, jax.jit(loss, static_argnums=2)(*expected, graphdef), rtol=1e-5)
    opened = gradient["decoder"]["own"]["layers"][0]["moe"]["post_norm"]["scale"].get_value()
    assert np.abs(opened).max() > 1e-6


def test_experts_are_parts_of_the_dense_mlp(config, tmp_path):
    program = make_program(config, make_mesh({}, jax.devices()[:1]))
    with jax.set_mesh(program.mesh):
        layer = initial_values(program.config, program.state, tmp_path)["decoder"]["own"]["layers"][0]
    width, (mlp, experts) = config.model.text.expert_dim, (layer["mlp"], layer["moe"]["experts"])
    for expert in range(config.model.text.num_experts):
        channels = np.arange(expert * width, (expert + 1) * width) % config.model.text.mlp_dim
        gate_up, down = experts["gate_up"].get_value()[:, expert], experts["down"].get_value()[:, expert]
        for i, name in enumerate(("gate", "up")):
            np.testing.assert_array_equal(gate_up[:, :, i], mlp[name]["kernel"].get_value()[..., channels])
        np.testing.assert_array_equal(down, mlp["down"]["kernel"].get_value()[:, channels])


def test_what_cannot_be_upcycled_is_refused(config, shallow_config, tmp_path):
    shallow_config.model.text.embed_dim *= 2
    with pytest.raises(InputError, match=r"another model: text\.embed_dim"):
        check_source(typed(shallow_config))
    with pytest.raises(InputError, match=r"init.upcycle_from='.*' is not possible: .*no experts"):
        dataclasses.replace(config, model=dense_config(config.model))
    with pytest.raises(InputError, match=r"init.upcycle_from='b' .*empty where init.from_hf='a' is given"):
        dataclasses.replace(config.init, from_hf="a", upcycle_from="b")

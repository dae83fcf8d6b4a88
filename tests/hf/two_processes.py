"""One of two processes that load a checkpoint into arrays spread over both, and export them again.

python -m tests.hf.two_processes PROCESS PORT IN OUT
"""

import sys

import jax
from flax import nnx

from gemma4_jax import sizes
from gemma4_jax.hf.load import Checkpoint, load_state
from gemma4_jax.hf.save import export_state
from gemma4_jax.model import Gemma4
from gemma4_jax.sharding import make_mesh, param_shardings
from gemma4_jax.tokenizer import Tokenizer


def main(process: str, port: str, source: str, out: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(process))
    config = sizes.quickstart()
    state = nnx.state(nnx.eval_shape(lambda: Gemma4(config, nnx.Rngs(0))))
    shardings = param_shardings(state, make_mesh({"fsdp": 2}))
    wanted = jax.tree.map(lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), state, shardings)
    loaded = load_state(Checkpoint(source), wanted, config)
    assert not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(loaded))
    export_state(loaded, config, out, tokenizer=Tokenizer.load("bundled"), max_soft_tokens=70)


if __name__ == "__main__":
    main(*sys.argv[1:])

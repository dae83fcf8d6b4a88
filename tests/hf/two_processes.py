"""One of two processes that load a checkpoint into arrays spread over both, export them again, and fail to.

python -m tests.hf.two_processes PROCESS PORT IN OUT
"""

import sys
from pathlib import Path

import jax
from flax import nnx

from gemma4_jax import sizes
from gemma4_jax.config import Gemma4Config
from gemma4_jax.errors import InputError
from gemma4_jax.hf import save
from gemma4_jax.hf.load import Checkpoint, load_state
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
    options = {"tokenizer": Tokenizer.load("bundled"), "max_soft_tokens": 70}
    save.export_state(loaded, config, out, **options)
    fails(loaded, config, Path(source) / "config.json", options)  # a file is in the place
    save.write_tensor_file = fill_the_disk  # of the first process, for the other one writes nothing
    fails(loaded, config, Path(out).with_name("another"), options)


def fails(state: nnx.State, config: Gemma4Config, place: Path, options: dict) -> None:
    """An export fails in both processes, and neither waits for the other."""
    reason = ""
    try:
        save.export_state(state, config, place, **options)
    except InputError as error:
        reason = str(error)
    assert reason
    assert ("the first process failed" in reason) == (jax.process_index() == 1), reason


def fill_the_disk(path: Path, outgoing: list, metadata: dict) -> None:
    for tensor in outgoing[:3]:
        for _ in tensor.blocks():
            pass
    raise OSError(28, "No space left on device")


if __name__ == "__main__":
    main(*sys.argv[1:])

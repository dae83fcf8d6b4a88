"""One of the processes of a run on two devices that is taken to its end, or as far as it says.

python -m tests.integration.two_processes PROCESS COUNT PORT RUN_DIR NUM_STEPS AXIS SOURCES

AXIS of the mesh is of size 2. SOURCES are those of data.sources, in JSON; of {}, those of the tiny config.
"""

import json
import sys
from pathlib import Path

import jax

from gemma4_jax.launch import command_line
from gemma4_jax.train.loop import train
from tests.train.tiny import typed


def main(process: str, count: str, port: str, run_dir: str, num_steps: str, axis: str, sources: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_num_cpu_devices", 2 // int(count))
    jax.distributed.initialize(f"localhost:{port}", num_processes=int(count), process_id=int(process))
    config = command_line.load(Path(__file__).parents[1] / "train" / "tiny.py")
    config.model.text.num_layers, config.model.text.num_kv_shared_layers = 2, 0
    config.model.text.num_experts = 0  # which take a quarter of the time, and do not know of processes
    config.run_dir, config.train.num_steps = run_dir, int(num_steps)
    if given := json.loads(sources):
        with config.unlocked():
            config.data.sources = given
    config.mesh.data, config.mesh[axis] = 1, 2
    config.checkpoint.every_steps = config.evaluators.eval.every_steps = 2
    config.evaluators.eval.num_documents = 4
    print(sorted(train(typed(config)).items()))


if __name__ == "__main__":
    main(*sys.argv[1:])

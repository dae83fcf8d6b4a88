#!/bin/bash
# Prepares data on many machines: an array job of SLURM, each task of which makes every N-th shard.
#
#   sbatch --array=0-31 launch/prepare_slurm.sh --config=my_config.py --out=/shared/prepared
#
# Tasks know nothing of each other: they may run in any order, again, or twice at the same time. One that fails is given
# again with --requeue, or by the same sbatch with --array=ITS_NUMBER; what is done stays. Whichever ends last writes the
# manifest. The folder must be on a disk that all machines share.
#SBATCH --job-name=gemma4-prepare
#SBATCH --cpus-per-task=16
#SBATCH --mem=32G
#SBATCH --requeue
set -euo pipefail
# SLURM_ARRAY_TASK_COUNT counts the tasks of this array alone: NUM_TASKS keeps the number where only some are run again.
exec gemma4 prepare --task="${SLURM_ARRAY_TASK_ID}/${NUM_TASKS:-$SLURM_ARRAY_TASK_COUNT}" \
  --workers="${SLURM_CPUS_PER_TASK}" "$@"

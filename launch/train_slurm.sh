#!/bin/bash
# Trains on the GPUs of several machines: a job of SLURM, with one process for each GPU.
#
#   sbatch --nodes=4 launch/train_slurm.sh --config=my_config.py --config.run_dir=/shared/runs/mine
#
# The axes of the config's mesh multiply to the number of all GPUs. Config, data and run directory must be on a disk that
# all machines share. Five minutes before the end of its time, and when it is preempted, the run saves and leaves; the
# same sbatch goes on from there.
#SBATCH --job-name=gemma4-train
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail
# A task sees all GPUs of its machine, of which JAX takes the one with the task's number there: --gpus-per-task would
# hide the others, and that number with them.
exec srun --cpus-per-task="${SLURM_CPUS_PER_TASK}" --kill-on-bad-exit=1 gemma4 train --distributed "$@"

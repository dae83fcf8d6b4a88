#!/bin/bash
# Trains on a Cloud TPU slice of several hosts: starts the same command on each of them.
#
#   TPU=my-slice ZONE=us-east5-a launch/train_tpu_pod.sh --config=pretrain_e2b --config.run_dir=/shared/runs/e2b
#
# The package is installed on every host, with its extra `tpu`; config, data and run directory are on a disk that all of
# them mount. The run lives as long as this command: start it where it may stay, as in tmux. The same command goes on.
set -euo pipefail
exec gcloud compute tpus tpu-vm ssh "${TPU:?the name of the slice}" --zone="${ZONE:?the zone it is in}" --worker=all \
  --command="gemma4 train --distributed $(printf '%q ' "$@")"

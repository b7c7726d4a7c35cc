#!/bin/bash
# Two nodes under Slurm: sbatch configs/cluster/slurm.sh [arguments of tir_alp.train]
# Started in the checkout, which all nodes see. SIGTERM, which Slurm sends before the time is up, ends
# the run with a checkpoint; submit it again with --resume runs/NAME.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=B:TERM@300
set -euo pipefail
source .venv/bin/activate

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | cut -d' ' -f1)
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')

srun --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --node-ip-address="$address" --port=6379 --block &
until ray status --address="$address:6379" >/dev/null 2>&1; do sleep 2; done
srun --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --exclude="$head" \
  ray start --address="$address:6379" --block &

export RAY_ADDRESS="$address:6379"
python -m tir_alp.train --config configs/cluster/two_nodes.toml "$@" &
run=$!
trap 'kill -TERM $run' TERM
wait $run || wait $run # the first wait ends with the signal, the second with the run

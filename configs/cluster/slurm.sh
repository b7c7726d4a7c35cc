#!/bin/bash
# A run on the nodes of a Slurm job. In the checkout, which all nodes see:
#   sbatch configs/cluster/slurm.sh --config configs/cluster/two_nodes.toml
#   sbatch configs/cluster/slurm.sh --resume runs/NAME
# The arguments after the script are those of tir_alp.train. SIGTERM, which Slurm sends before the time
# is up, ends the run with a checkpoint. The job's exit code is that of the run.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --no-kill
#SBATCH --signal=B:TERM@300
set -euo pipefail
fail() { echo "slurm.sh: $*" >&2; exit 1; }
[ $# -gt 0 ] || fail "what is to run? --config FILE, or --resume runs/NAME"
source .venv/bin/activate

# By default a step does not inherit the CPUs of the job.
on() { srun --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --nodelist="$1" "${@:2}"; }
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=$(on "${nodes[0]}" python -c 'import ray; print(ray.util.get_node_ip_address())')
export RAY_ADDRESS="$address:$((20000 + SLURM_JOB_ID % 10000))" # jobs may share a node
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # after the run there is nothing to wait for
export RAY_worker_niceness=0 # Ray's 15 would let every other program of a node go first

wait_for() { # waits until Ray has this number of nodes
  until [ "$(ray status 2>/dev/null | grep -c '^ 1 node_')" -ge "$1" ]; do
    [ "$(jobs -r | wc -l)" -eq "$1" ] || fail "Ray has ended on one of ${nodes[*]:0:$1}"
    [ $SECONDS -lt 600 ] || fail "Ray is not on all of ${nodes[*]:0:$1} after $SECONDS s"
    sleep 2
  done
}
start=(ray start --block --disable-usage-stats --num-cpus="$SLURM_CPUS_PER_TASK")
on "${nodes[0]}" env -u RAY_ADDRESS "${start[@]}" --head --node-ip-address="$address" \
  --port="${RAY_ADDRESS##*:}" &
wait_for 1
for node in "${nodes[@]:1}"; do
  on "$node" "${start[@]}" --address="$RAY_ADDRESS" &
done
wait_for ${#nodes[@]}

python -m tir_alp.train "$@" &
run=$!
trap 'kill -TERM $run' TERM
wait $run || wait $run # the signal ends the first wait, the end of the run the second

# shellcheck shell=bash
# Sourced by the batch files: goes to the project, enters its environment, and starts one program on all nodes of the job.
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?is set by sbatch; submit this file instead of running it}"
if [[ ! -f launch/train.py ]]; then
  echo "sbatch must be called in the project's folder, got $PWD; cd there first" >&2
  exit 1
fi
if [[ -f .venv/bin/activate ]]; then
  # shellcheck disable=SC1091  # made by launch/test.sh or launch/demo.sh
  source .venv/bin/activate
fi

# One rank for each GPU that the job got on a node; on nodes without GPUs, RANKS_PER_NODE says how many.
ranks_per_node="${SLURM_GPUS_ON_NODE:-${RANKS_PER_NODE:-1}}"
if [[ -z "${SLURM_GPUS_ON_NODE:-}" ]]; then
  export DS_ACCELERATOR=cpu
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
# Of this job only: a process that is killed while DeepSpeed compiles leaves a lock behind, on which others would hang.
export TORCH_EXTENSIONS_DIR="${TMPDIR:-/tmp}/qad-extensions-$SLURM_JOB_ID"

# launch_on_all_nodes PROGRAM [ARGUMENT ...]: one task a node, each an `accelerate launch` that starts the node's ranks.
# The first node that fails ends the others.
launch_on_all_nodes() {
  local nodes
  nodes="$(scontrol show hostnames "$SLURM_JOB_NODELIST")" # no pipe into head: scontrol would die of it now and then
  # srun does not take over the job's --cpus-per-task (since SLURM 22.05): without it all ranks share one core.
  # shellcheck disable=SC2016  # SLURM_NODEID is known on the node only
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' on_node \
    --config_file configs/accelerate/multi_node.yaml \
    --deepspeed_multinode_launcher standard \
    --num_machines "$SLURM_JOB_NUM_NODES" \
    --num_processes "$((SLURM_JOB_NUM_NODES * ranks_per_node))" \
    --main_process_ip "${nodes%%$'\n'*}" \
    --main_process_port "$((20000 + SLURM_JOB_ID % 10000))" \
    "$@"
}

#!/bin/bash
# A SLURM script for two nodes of four GPUs, one torchrun per node. Not run yet.
#   sbatch slurm-two-nodes.sh run.yaml [key=value ...] [--resume]
#SBATCH --job-name=pcscale
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00

set -euo pipefail

# Activate the environment that pcscale is installed in here; every node must see it, and the run folder.

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / 4))

srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" \
    --nproc-per-node=4 \
    --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$first_node:29500" \
    -m pcscale compress "$@" deepspeed=zero3_offload_cpu

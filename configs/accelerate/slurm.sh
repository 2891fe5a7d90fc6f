#!/bin/bash
# Two machines with eight GPUs each:  sbatch configs/accelerate/slurm.sh configs/sd15_diffusion_dpo.yaml [SECTION.KEY=VALUE]...
# Slurm sends SIGTERM five minutes before the time is over; the run then saves and leaves, and the same command goes on
# with it where the configuration says `resume_from_checkpoint: latest`.
#SBATCH --job-name=diffalign
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -euo pipefail
# torch's launcher kills its processes 30 seconds after it told them to stop; a step and a checkpoint may take longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=270

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDRESS="$first" GPUS=$((SLURM_NNODES * 8))

# shellcheck disable=SC2016 # each machine fills in its own rank
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch \
  --config_file configs/accelerate/multi_node.yaml \
  --num_machines "$SLURM_NNODES" --num_processes "$GPUS" \
  --machine_rank "$SLURM_NODEID" --main_process_ip "$MASTER_ADDRESS" \
  -m diffalign train "$@"' diffalign "$@"

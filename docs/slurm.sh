#!/bin/bash
#SBATCH --job-name=isicle
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1      # one torchrun on each machine, which starts a process for each GPU
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120      # 120 s before the time is over, this script is told
#
# A training script on several machines, for longer than a job may take: before the time is over, and when the job is
# canceled by SIGTERM, the run saves and the job goes back into the queue. It ends when the run does, or fails.
#
#     sbatch docs/slurm.sh TrainISICLE.py --data cifar10 --epochs 1000
#
# Start it in the root of the repository, with its environment active. All machines must see --models_dir.

export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # which srun does not take from the job
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

run=
signalled=
trap 'signalled=yes; kill -TERM $run' TERM # srun passes it on; every process ends after its step, when all is saved
srun torchrun \
    --nnodes="$SLURM_NNODES" \
    --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_backend=c10d \
    --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_endpoint="$first:$((20000 + SLURM_JOB_ID % 10000))" \
    "$@" --resume auto &
run=$!

while kill -0 "$run" 2>/dev/null; do
    wait "$run" # the signal ends it early
done
wait "$run"
code=$?
if [ -n "$signalled" ] && [ "$code" -ne 0 ]; then # torchrun ends with 1 after SIGTERM
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

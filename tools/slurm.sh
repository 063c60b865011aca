#!/usr/bin/env bash
# Two nodes of eight GPUs:  sbatch tools/slurm.sh  from the root of the repository, with its .venv.
# The folder must be on a disk that both nodes share, as must weights/ and runs/ in it.
#SBATCH --job-name=leapalign
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@600
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
set -uo pipefail
source .venv/bin/activate
port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs of one node do not meet
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# One torchrun on each node. --shard 8 keeps the all-gathers of weights inside a node. torchrun gives the ranks time to
# write a checkpoint before it ends them.
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "$host:$port" \
    --rdzv-id "$SLURM_JOB_ID" --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout 900 \
    train.py flux-dev-hpsv2 --shard 8 --resume &
job=$!

# Slurm sends USR1 to this script ten minutes before the time is over. The ranks save, train.py exits with 75, and the
# job is queued again: with --resume the same command goes on. torchrun's own exit code is 1, so the signal is noted.
requeue=0
trap 'requeue=1; kill -USR1 $job' USR1
while true; do
    wait $job # a signal ends `wait`, not the job
    code=$?
    kill -0 $job 2> /dev/null || break
done
if [ $requeue = 1 ] || [ $code = 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code

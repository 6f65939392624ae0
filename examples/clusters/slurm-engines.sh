#!/bin/bash
# Millions of requests on eight nodes, each an engine of its own: sbatch slurm-engines.sh
# They share the rows by files in the output's folder. A node that is taken away delays no other: its
# rows go on elsewhere a minute later, and the step ends when all rows have been answered.
#SBATCH --job-name=jaxmoe
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --no-kill

srun --no-kill --kill-on-bad-exit=0 jaxmoe batch "${CHECKPOINT:-scout}" --engines each \
    --input "${INPUT:-requests/*.jsonl}" --output "${OUTPUT:-answers}" --mesh expert=8 --rows 64
code=$?
if [ "$code" != 0 ] && [ "$code" != 1 ] && [ "$code" != 65 ]; then  # 1: a mistake, 65: rows failed
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

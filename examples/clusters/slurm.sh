#!/bin/bash
# A file of requests on two nodes of eight GPUs: sbatch slurm.sh
# One process a node. Two minutes before time is up or the nodes are taken away, SLURM sends SIGTERM:
# the job ends with exit code 75 and is put into the queue again, where it goes on; so does a stuck one (70).
#SBATCH --job-name=jaxmoe
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

srun jaxmoe doctor --mesh data=2,expert=8 --shared "$PWD" || exit

srun jaxmoe generate "${CHECKPOINT:-maverick}" \
    --prompts "${PROMPTS:-requests.jsonl}" --output "${OUTPUT:-answers.jsonl}" --mesh data=2,expert=8
code=$?
if [ "$code" = 75 ] || [ "$code" = 70 ]; then  # told to end, or stuck
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

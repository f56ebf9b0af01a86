#!/bin/bash
# One run on a SLURM cluster, through preemption and time limits until it is complete:
#
#     sbatch scripts/slurm.sh +experiment=pretrain
#
# Five minutes before its time is over, and when it is preempted, the program gets SIGTERM: it finishes the step, saves,
# and ends with 143 (124 for max_time). Then the job goes back into the queue, and the same command goes on.
# Several GPUs: sbatch --ntasks-per-node=4 --gpus=4 scripts/slurm.sh +experiment=pretrain trainer=ddp
# and machines: sbatch --nodes=2 --ntasks-per-node=4 --gpus=8 scripts/slurm.sh +experiment=pretrain trainer=ddp trainer.num_nodes=2
#
#SBATCH --job-name=cucafera
#SBATCH --ntasks-per-node=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300

srun --kill-on-bad-exit=1 python -m cucafera.run "$@"
status=$?
if [ "$status" -eq 143 ] || [ "$status" -eq 124 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

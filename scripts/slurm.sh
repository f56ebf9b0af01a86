#!/bin/bash
# A run on a SLURM cluster, requeued after preemption and time limits until it is complete:
#
#     sbatch scripts/slurm.sh +experiment=pretrain
#
# Five minutes before the time limit, and on preemption, the program gets SIGTERM: it finishes the step, saves a
# checkpoint, and exits with 143 (124 for max_time). Then the job is requeued, and the same command resumes the run.
# Several GPUs: sbatch --ntasks-per-node=4 --gpus=4 scripts/slurm.sh +experiment=pretrain trainer=ddp
# Several nodes: sbatch --nodes=2 --ntasks-per-node=4 --gpus=8 scripts/slurm.sh +experiment=pretrain trainer=ddp trainer.num_nodes=2
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

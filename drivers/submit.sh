#!/usr/bin/env bash
# drivers/submit.sh [options of sbatch] drivers/job.sbatch [words]: sbatch, which is asked first whether that can start at
# all. Slurm itself would let a job with more tasks than the cluster has cores wait for ever.
if ! said=$(sbatch --test-only "$@" 2>&1); then
    echo "error: this can never start here: $(tail -n 1 <<<"$said")" >&2
    sinfo -o "partition %P: %D nodes of %c cores, at most %l" >&2
    exit 1
fi
exec sbatch "$@"

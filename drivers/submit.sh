#!/usr/bin/env bash
# drivers/submit.sh [options of sbatch] drivers/job.sbatch [words]: sbatch, which is asked first whether that can start at
# all. Slurm itself would let a job with more tasks than the cluster has cores wait for ever. It only looks at nodes that are
# in service, so where others are not the job may have to wait for them. It is asked again where all are: one may have come
# back since.
set -u
refused() { ! said=$(sbatch --test-only "$@" 2>&1); }

if refused "$@"; then
    away=$(sinfo -h -N -t down,drain,fail,maint,no_respond -o %N | sort -u | paste -sd,)
    if [[ $said == *"node configuration is not available"* && $away ]]; then
        echo "note: no nodes that are in service can start this; it waits for $away, if there are enough of them then" >&2
    elif refused "$@"; then
        echo "error: this can never start here: $(tail -n 1 <<<"$said")" >&2
        sinfo -o "partition %P: %D nodes of %c cores, at most %l" >&2
        exit 1
    fi
fi
exec sbatch "$@"

#!/usr/bin/env bash
# The trainings of the scale in params.yaml as a SLURM job array, one GPU each, and what follows from them.
#
#     cluster/submit.sh [STUDY...]
#
# Makes the data here (the login node has the network), submits the trainings that are not finished, and then a job that
# records them in DVC and, where no study was named, makes every table and figure. Studies that are not all of a stage are
# recorded once the others are there too. Submit again after a failure: only what is missing runs. GRES= for a cluster
# without GPUs; further options of sbatch from its SBATCH_... variables (SBATCH_PARTITION).
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

# shellcheck disable=SC2046
dvc repro $(python -m cryo_lib.paper.cluster data "$@")
mkdir -p cluster/logs
missing=$(python -m cryo_lib.paper.cluster missing "$@")
after=()
if [[ -n $missing ]]; then
    gres=${GRES-gpu:1}
    array=$(sbatch --parsable --array="$missing" ${gres:+--gres="$gres"} cluster/train.sbatch)
    echo "trainings $missing: job $array"
    after=(--dependency="afterok:${array%%;*}")
fi
if [[ -z $(python -m cryo_lib.paper.cluster stages "$@") ]]; then
    echo "no collection: these studies are not all that a stage trains"
    exit
fi
echo "collection: job $(sbatch --parsable "${after[@]}" cluster/collect.sbatch "$@")"

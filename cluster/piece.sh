#!/usr/bin/env bash
# A piece of the trainings of the scale in params.yaml on a machine without this project's environment: torch, numpy, and what
# cluster/pack.sh carried there. Ends at the first line of metrics after the minutes given, counting from its start: leave room
# for one. Call it until nothing is left.
#
#     cluster/piece.sh MINUTES [--workers N] [PATTERN...]      as of `python -m cryo_lib.paper.cluster train`
set -euo pipefail
minutes=${1:?"usage: cluster/piece.sh MINUTES [--workers N] [PATTERN...]"}
shift
cd "$(dirname "$0")/.."
scale=$(sed -n 's/^scale: //p' params.yaml)
if [[ ! -d build/wheels/site ]]; then
    python3 -m pip install --quiet --no-index --no-deps --target build/wheels/site build/wheels/*.whl
fi
export PYTHONPATH="$PWD:$PWD/build/wheels/site"
if [[ ! -f data/$scale/rnap/card.json ]]; then
    python3 -m cryo_lib.paper.notebooks script 01 -p scale "$scale" -s data \
        -p core_chain "$(sed -n 's/^  core_chain: "\{0,1\}\([^" ]*\).*/\1/p' params.yaml)" \
        -p clamp_chain "$(sed -n 's/^  clamp_chain: "\{0,1\}\([^" ]*\).*/\1/p' params.yaml)"
fi
spent=$((SECONDS / 60 + 1))
exec python3 -m cryo_lib.paper.cluster train --minutes "$((minutes > spent ? minutes - spent : 0))" "$@"

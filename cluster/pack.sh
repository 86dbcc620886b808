#!/usr/bin/env bash
# What a GPU machine that has only torch and numpy needs for the trainings of the scale in params.yaml: the sources, the atomic
# models (made here, from whatever source params.yaml names), and the wheels that training imports. Unpack it there and call
# cluster/piece.sh; bring runs/ and data/ back and let cluster/collect.sbatch take them up.
#
#     cluster/pack.sh [OUT.tar [PYTHON]]         default: build/pack.tar, wheels for this Python; 3.12: for that one
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
out=${1:-build/pack.tar}
scale=$(sed -n 's/^scale: //p' params.yaml)
names='scipy|gemmi|finufft|pyyaml|safetensors|packaging|pandas|threadpoolctl'
names+='|platformdirs|python-dateutil|six|tzdata|matplotlib|contourpy|cycler|fonttools|kiwisolver|pillow|pyparsing|nbformat|fastjsonschema|jsonschema'
names+='|jsonschema-specifications|referencing|rpds-py|attrs|traitlets|jupyter_core|typing_extensions'
names+='|pydantic|pydantic_core|annotated-types|typing-inspection'
dvc repro structures
rm -rf build/wheels
mkdir -p build/wheels
grep -iE "^($names)==" requirements.lock >build/wheels/requirements.txt
pip download --quiet --no-deps --only-binary=:all: ${2:+--python-version "$2"} --dest build/wheels -r build/wheels/requirements.txt
git describe --always --dirty --exclude '*' >build/revision
git ls-files cryo_lib notebooks cluster scales dvc.yaml pyproject.toml | tar -cf "$out" -T - params.yaml build/revision "data/$scale/structures" build/wheels/*.whl
ls -lh "$out"

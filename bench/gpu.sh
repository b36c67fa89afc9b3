#!/usr/bin/env bash
# All that has to be measured on a GPU, in at most 8 minutes on one H200: the parts of bench/gpu.py, each with its limit of time.
#
#   make demo-data && bash bench/gpu.sh        # one GPU of 80 GB, 40 GB of disk under TMPDIR; results in $OUT, else gpu-results
#   bash bench/gpu.sh --tiny                   # at a size that says nothing, without a GPU too
#   bash bench/gpu.sh pause speed              # some parts only
#
# What has to be carried to a machine that reaches no network: this folder with demo/model and demo/squad (git ignores them), and wheels of what
# its Python lacks. PYTHON names one with torch for CUDA, WHEELS a folder with the wheels; they are installed to a folder that goes with this
# script. Beside torch and transformers at least: ray jsonschema jsonschema-specifications referencing rpds-py deepspeed (`pip wheel --no-deps`
# makes it of the source) hjson pydantic pydantic_core annotated-types typing-inspection datasets dill multiprocess evaluate hpbandster Pyro4
# serpent ConfigSpace more-itertools. Ray's wheel has 79 MB: `split -b 40M` it where less is carried at once, and `cat` the pieces there.
set -uo pipefail
cd "$(dirname "$0")/.."

declare -A LIMITS=([fp16]=80 [pause]=60 [speed]=130 [launches]=60 [memory]=80 [evaluation]=50) # seconds, 460 in all, the rest is for the start
PARTS=(fp16 pause speed launches memory evaluation)
python=${PYTHON:-${VENV:-.venv}/bin/python}
out=${OUT:-gpu-results}
tiny=()
chosen=()
for argument in "$@"; do
	case $argument in
	--tiny) tiny=(--tiny) ;;
	*) chosen+=("$argument") ;;
	esac
done
for part in "${chosen[@]}"; do
	[[ -v LIMITS[$part] ]] || { echo "gpu.sh: no part '$part'; there are ${PARTS[*]}" >&2 && exit 2; }
done
((${#chosen[@]})) || chosen=("${PARTS[@]}")
[[ -d demo/model ]] || { echo "gpu.sh: demo/model is missing: make demo-data" >&2 && exit 2; }

if [[ -n ${WHEELS:-} ]]; then
	site=$(mktemp -d)
	trap 'rm -rf "$site"' EXIT
	"$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl || exit 2
	export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then
	mkdir -p "$out"
	nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.max.sm --format=csv | tee "$out/gpu.txt"
elif [[ ${#tiny[@]} -eq 0 ]]; then
	echo "gpu.sh: no GPU for $python: this needs one, or --tiny" >&2
	exit 2
fi

failed=()
for part in "${chosen[@]}"; do
	timeout --kill-after=5 "$((LIMITS[$part] * (${#tiny[@]} ? 10 : 1)))" "$python" bench/gpu.py "$part" "${tiny[@]}" --out "$out"
	rc=$?
	((rc == 124 || rc == 137)) && echo "$part: not done within ${LIMITS[$part]} s"
	((rc == 0)) || failed+=("$part")
	echo
done
echo "results: $out; $SECONDS s"
if ((${#failed[@]})); then
	echo "failed: ${failed[*]}"
	exit 1
fi

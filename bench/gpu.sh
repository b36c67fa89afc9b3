#!/usr/bin/env bash
# The real size in fp16 on a GPU: a short search with a random BLOOM-560M (bench/full_size.py), then how long a trial takes to its
# first step (bench/turnaround.py). It has not been run yet.
#
#   make demo-data && bash bench/gpu.sh        # one GPU of 24 GB, 71 GB of disk
set -euo pipefail
cd "$(dirname "$0")/.."
python=${VENV:-.venv}/bin/python

"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no GPU: this needs one")'
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits --loop=1 > gpu-memory.$$ &
sampler=$!
trap 'kill "$sampler" 2> /dev/null || true; rm -f gpu-memory.$$' EXIT
"$python" bench/full_size.py
echo "most GPU memory in use: $(sort -n gpu-memory.$$ | tail -n 1) MiB"
"$python" bench/turnaround.py --full

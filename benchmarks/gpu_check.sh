#!/usr/bin/env bash
# Proves this code on a GPU and measures it, in about ten minutes: gpu_check.sh OUT [WHEELS]
#
# It needs Python with PyTorch. Other packages come from the folder WHEELS where the machine has no
# network. First the tests that need a GPU, then the rows of bench.py, the most telling first, then
# two trainings; each figure is in OUT as soon as it is known, and OUT/table.md has the rows in the
# end. Without a GPU (DEVICE=cpu) it rehearses: the tests on the CPU, one small row and one short training.
set -u
cd "$(dirname "$0")/.."
out=${1:?usage: gpu_check.sh OUT [WHEELS]}
wheels=${2:-}
device=${DEVICE:-cuda}
mkdir -p "$out"

python=${PYTHON:-python3}
if ! "$python" -c "import accelerate, diffusers, einops, hypothesis, pytest, tyro" 2>/dev/null; then
    "$python" -m venv --system-site-packages "$out/venv"
    python="$out/venv/bin/python"
    needed=$("$python" - <<'PY'
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
for name in [*project["dependencies"], *extras["test"], *extras["bench"]]:
    if not name.startswith(("torch>", "unet-diffusion", "pytest-xdist")):
        print(name.replace(" ", ""))
PY
    )
    # shellcheck disable=SC2086
    "$python" -m pip install -q ${wheels:+--no-index --find-links "$wheels"} $needed || exit 1
fi
export PYTHONPATH="$PWD" HF_HUB_OFFLINE=1

{
    date -u +"%Y-%m-%d %H:%M UTC"
    git log -1 --format="commit %h" 2>/dev/null
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
    "$python" -c "import torch; print('PyTorch', torch.__version__, 'CUDA', torch.version.cuda)"
} | tee "$out/machine.txt"

UNET_GPU_TESTS=$device timeout "${TEST_SECONDS:-240}" \
    "$python" -m pytest -m gpu tests/gpu -q -p no:cacheprovider 2>&1 | tee "$out/tests.txt" | tail -n 5

rows="ddpm-step-64-compiled classic-step-bf16 sampling-compiled ddpm-256-step default-step-bf16"
rows="$rows sd-v1 ddpm-step-32-bf16 default-step sampling predict-4096 predict-16384"
rounds=3
trainings="--only folder cifar10 --minutes 0.5 --steps 300"
if [ "$device" = cpu ]; then
    rows="evaluation"
    rounds=1
    trainings="--only folder --minutes 0.1 --images 16"
fi
for row in $rows; do
    if [ "$SECONDS" -gt "${ROWS_UNTIL:-450}" ]; then break; fi
    timeout "${ROW_SECONDS:-120}" "$python" benchmarks/bench.py --device "$device" --rows "$row" \
        --rounds "$rounds" --out "$out/$row.json" 2>&1 | tee "$out/$row.txt"
done
# shellcheck disable=SC2086
timeout "${TRAINING_SECONDS:-120}" "$python" benchmarks/trainings.py $trainings \
    --out "$out/trainings.json" 2>&1 | tee "$out/trainings.txt" | tail -n 3
cat "$out"/machine.txt "$out"/*.md > "$out/table.tmp" 2>/dev/null
mv "$out/table.tmp" "$out/table.md"

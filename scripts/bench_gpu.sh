#!/bin/sh
# Benchmarks of training steps on a GPU machine that is lent for a short time and has no network: from a copy of the
# repository, without a virtual environment, in as many minutes as are left. What that machine's Python lacks (diffusers
# and pydantic, mostly) can lie as wheels in .whl/; they go to a folder of their own. Call it again, with the record of
# the last call in OUT, to go on.
#
#   MINUTES=9 OUT=results COMMIT=abc123 sh scripts/bench_gpu.sh [arguments of python -m benchmarks.real_widths]
set -eu

python=${PYTHON:-python3}
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
out=${OUT:-$root/benchmarks/results}
site=${SITE:-${TMPDIR:-/tmp}/diffalign-site}

if [ -d "$root/.whl" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "$root"/.whl/*.whl
fi
mkdir -p "$out"
for record in "$root"/benchmarks/results/real_widths_*.json; do
    [ -f "$record" ] && [ ! -f "$out/$(basename "$record")" ] && cp "$record" "$out/"
done

cd "$root"
PYTHONPATH="$site:$root" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 "$python" -m benchmarks.real_widths \
    --output "$out" --minutes "${MINUTES:-9}" ${COMMIT:+--commit "$COMMIT"} "$@"

#!/usr/bin/env bash
# For a GPU machine that is rented by the minute: what matters most comes first, results are written after every case,
# and each part has a time limit. A session that is cut off loses only the running case.
#
#   benchmarks/gpu_session.sh OUT [PART...]
#
# Parts, in their order: tests first disturbance experts settings baselines arena generating gentle limited large. All but the
# last by default. OUT gets one JSON a part and one text, session.txt. SECONDS_EACH bounds a part (default 540); PYTHON is the
# interpreter; ARGS are passed to every run of the benchmarks.
set -u
cd "$(dirname "$0")/.."
out=${1:?folder for the results}
shift
parts=("${@:-}")
[ -n "${parts[0]}" ] || parts=(tests first disturbance experts settings baselines arena generating gentle limited)
python=${PYTHON:-python3}
each=${SECONDS_EACH:-540}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

run() {
    local name=$1 start=$SECONDS
    shift
    echo "== $name: $*"
    timeout --signal=TERM --kill-after=15 "$each" "$@"
    echo "== $name: exit $? after $((SECONDS - start)) s"
}

for part in "${parts[@]}"; do
    if [ "$part" = tests ]; then
        run tests "$python" -m pytest -m gpu -q --maxfail=20 -p no:cacheprovider
    else
        # shellcheck disable=SC2086  # ARGS are several words
        run "$part" "$python" -m benchmarks "gpu-$part" --out "$out" --name "$part" \
            --budget "$((each - 20))" --case-timeout 150 ${ARGS:-}
    fi
done 2>&1 | tee -a "$out/session.txt"

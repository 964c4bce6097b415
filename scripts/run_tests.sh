#!/bin/sh
# All tests, without a GPU or the model hub; makes the environment if it is missing. Arguments go to pytest:
#   sh scripts/run_tests.sh
#   sh scripts/run_tests.sh tests/test_scripts.py -k wrapper
set -eu
cd "$(dirname "$0")/.."
NPROC=1
OMP_NUM_THREADS=1    # two processes run the tests, file by file
. scripts/env.sh

[ $# -gt 0 ] || set -- tests
export HF_HUB_OFFLINE=1
exec "$PYTHON" -m pytest -n 2 --dist loadfile "$@"

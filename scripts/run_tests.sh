#!/bin/sh
# All tests, without a GPU or the model hub; makes the environment if it is missing. Arguments go to pytest:
#   sh scripts/run_tests.sh
#   sh scripts/run_tests.sh tests/test_scripts.py -k wrapper
set -eu
cd "$(dirname "$0")/.."
NPROC=1    # the tests are one process, which may use all the cores
. scripts/env.sh

[ $# -gt 0 ] || set -- tests
export HF_HUB_OFFLINE=1
exec "$PYTHON" -m pytest "$@"

#!/bin/sh
# Serve a stage directory with vLLM, as an OpenAI-compatible server. Examples:
#   sh scripts/vllm_deployment.sh outputs/sft
#   VLLM_API_KEY=secret sh scripts/vllm_deployment.sh outputs/sft --host 0.0.0.0 --port 8001 --tensor-parallel-size 2
#   DRY_RUN=1 sh scripts/vllm_deployment.sh outputs/sft
# Base, adapter, its rank, chat template and stop tokens are found in the directory (tools/vllm_command.py). Arguments
# after it go to `vllm serve`, come last and win. vLLM pins a torch of its own, so it belongs into an environment of its
# own (python3 -m venv vllm-env && vllm-env/bin/pip install 'vllm>=0.22'). Read beside what scripts/env.sh lists, optional:
#   VLLM           the program, as vllm-env/bin/vllm (else the vllm on PATH)
#   VLLM_API_KEY   key that requests must bring; vLLM reads it itself
set -eu
cd "$(dirname "$0")/.."
directory=${1:-}
[ $# -eq 0 ] || shift
. scripts/env.sh

case $directory in
    '' | -*) stop "the first argument is a stage directory: sh scripts/vllm_deployment.sh outputs/sft" ;;
esac
printed=$("$PYTHON" -m tools.vllm_command "$directory" "$@") || exit $?
set --
while IFS= read -r argument; do
    set -- "$@" "$argument"
done <<EOF
$printed
EOF
VLLM=${VLLM:-vllm}
if [ "${DRY_RUN:-}" = 1 ]; then
    printf '%s\n' "$VLLM" "$@"
    exit
fi
command -v "$VLLM" >/dev/null ||
    stop "$VLLM is not there: pip install 'vllm>=0.22' in an environment of its own, and VLLM=its/bin/vllm"
exec "$VLLM" "$@"

# What every wrapper shares: hardware, Python environment, base model, launcher. Sourced from the repository's root
# after `set -eu`; defines choose_base, choose_parent, launch, run, go_on, and the variables that wrappers hand on.
#
# Read from the environment, all optional (relative paths count from the repository's root):
#   BASE_MODEL     hub name or directory to start from; "starter" is the small model built from data/
#   OUTPUT_ROOT    directory that holds the stages' outputs (outputs)
#   NPROC          processes on this machine (one per visible GPU, else 1)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT
#                  several machines: how many, which one this is (0, 1, ...), where number 0 is reached (port 29500)
#   DEEPSPEED      DeepSpeed configuration, e.g. scripts/zero2.json
#   PRECISION      flags of the number format, e.g. "--bf16 True" (chosen by hardware)
#   EPOCHS, LEARNING_RATE, BATCH_SIZE, ACCUMULATION, LORA_RANK, LORA_ALPHA, MODULES_TO_SAVE
#                  (chosen by the stage and the size of the base)
#   PYTHON         interpreter to use as it is (else the active environment if it meets requirements.txt, else .venv)
#   DRY_RUN        1 prints the command, one argument a line, and neither installs nor builds nor runs anything

say() { printf '%s\n' "$*" >&2; }

stop() {
    say "$0: error: $*"
    exit 2
}

# -- arguments that decide something here --

given_model=
given_deepspeed=
given_precision=

# "$@" comes last and wins, so what is chosen and reported here must follow it.
read_arguments() {
    previous=
    for argument; do
        case $previous in
            --model_name_or_path) given_model=$argument ;;
            --deepspeed) given_deepspeed=$argument ;;
            --bf16 | --fp16)
                if [ "$argument" = True ]; then
                    given_precision=${previous#--}
                elif [ "$given_precision" = "${previous#--}" ]; then
                    given_precision=
                fi
                ;;
        esac
        case $argument in
            --model_name_or_path=*) given_model=${argument#*=} ;;
            --deepspeed=*) given_deepspeed=${argument#*=} ;;
        esac
        previous=$argument
    done
}

# -- hardware --

# Print the compute capability of each GPU that CUDA_VISIBLE_DEVICES leaves, one a line.
list_gpus() {
    command -v nvidia-smi >/dev/null || return 0
    nvidia-smi --query-gpu=compute_cap,uuid --format=csv,noheader 2>/dev/null |
        awk -F ', *' -v visible="${CUDA_VISIBLE_DEVICES-all}" '
            BEGIN { count = 0 }
            /^[0-9]+\.[0-9]+/ { capability[count] = $1; uuid[count++] = $2; all = all count - 1 "," }
            END {
                wanted = split(visible == "all" ? all : visible, names, ",")
                for (n = 1; n <= wanted; n++) {
                    found = -1
                    if (names[n] ~ /^[0-9]+$/ && names[n] + 0 < count) found = names[n] + 0
                    if (names[n] ~ /^MIG-/ && count > 0) found = 0
                    if (names[n] ~ /^GPU-/)
                        for (gpu = 0; gpu < count; gpu++)
                            if (index(uuid[gpu], names[n]) == 1) found = gpu
                    if (found < 0) exit    # CUDA, too, sees nothing from the first name on that is no GPU
                    print capability[found]
                }
            }'
}

# nproc knows about affinity, but it reports OMP_NUM_THREADS where that is set, and no container's limit.
count_cores() {
    cores=$(unset OMP_NUM_THREADS OMP_THREAD_LIMIT && nproc 2>/dev/null || getconf _NPROCESSORS_ONLN || echo 1)
    if read -r quota period 2>/dev/null </sys/fs/cgroup/cpu.max && [ "$quota" != max ]; then
        limit=$(((quota + period - 1) / period))
        [ "$limit" -ge "$cores" ] || cores=$limit
    fi
    echo "$cores"
}

find_hardware() {
    GPUS=0
    format=bf16
    for capability in $(list_gpus); do
        GPUS=$((GPUS + 1))
        case $capability in
            [1-7].*) format=fp16 ;;    # bfloat16 arithmetic begins with 8.0
        esac
    done
    CORES=$(count_cores)
    if [ "$GPUS" -gt 0 ]; then
        : "${PRECISION=--$format True}" "${NPROC:=$GPUS}"
        ACTIVATION_CHECKPOINTING=True
    else
        : "${PRECISION=--use_cpu True}" "${NPROC:=1}"
        ACTIVATION_CHECKPOINTING=False    # it trades time for memory, and here time is short
    fi
    case $NPROC in
        *[!0-9]* | 0) stop "NPROC must be a whole number from 1, got '$NPROC'" ;;
    esac
    if [ "$GPUS" -gt 0 ] && [ "$NPROC" -gt "$GPUS" ]; then
        stop "NPROC=$NPROC, but one process needs one GPU and $GPUS can be seen (nvidia-smi, CUDA_VISIBLE_DEVICES)"
    fi
    if [ -z "${OMP_NUM_THREADS:-}" ]; then
        OMP_NUM_THREADS=$((CORES / NPROC))
        [ "$OMP_NUM_THREADS" -ge 1 ] || OMP_NUM_THREADS=1
    fi
    export OMP_NUM_THREADS
}

# -- locks: two starts at once shall not build the same thing twice --

# take_lock DIRECTORY WHAT: mkdir succeeds for one alone. On a shared disk the holder may sit on another machine.
take_lock() {
    lock=$1
    machine=$(uname -n)
    told=
    [ -w "$(dirname "$lock")" ] || stop "cannot write in $(dirname "$lock")"
    while ! mkdir "$lock" 2>/dev/null; do
        holder=$(cat "$lock/holder" 2>/dev/null || echo unknown)
        pid=${holder%% *}
        if [ "$holder" = "$pid $machine" ] && ! ps -p "$pid" >/dev/null 2>&1 && ! kill -0 "$pid" 2>/dev/null; then
            # The holder is dead. Of those that wait one alone can make this directory, and thereby inherits the lock.
            if mkdir "$lock/inherited-from-$pid" 2>/dev/null; then
                break
            fi
        fi
        [ -n "$told" ] || say "$2: another start is at work on it ($holder); waiting (if there is none: rm -r '$lock')"
        told=1
        sleep 1
    done
    trap 'rm -rf "$lock"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    echo "$$ $machine" >"$lock/holder"
}

release_lock() {
    rm -rf "$lock"
    trap - EXIT INT TERM HUP
}

# -- Python environment --

# examine INTERPRETER: print its full path if it meets requirements.txt, else why it does not (status 1).
examine() {
    "$1" -c '
import os, sys

def refuse(reason):
    print(reason)
    sys.exit(1)

if sys.version_info < (3, 10):
    refuse("is Python " + sys.version.split()[0])
if os.path.realpath(sys.prefix) == os.path.realpath(".venv") and not os.path.exists(sys.argv[1]):
    refuse("is unfinished or older than requirements.txt")
from importlib.metadata import PackageNotFoundError, version
try:
    from packaging.requirements import Requirement
except ImportError:
    try:
        from pip._vendor.packaging.requirements import Requirement
    except ImportError:
        refuse("lacks the package packaging")
for line in open("requirements.txt", encoding="utf-8"):
    line = line.split("#")[0].strip()
    if not line or line.startswith("-"):
        continue
    wanted = Requirement(line)
    if wanted.marker and not wanted.marker.evaluate():
        continue
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        refuse("lacks " + line)
    if not wanted.specifier.contains(found, prereleases=True):
        refuse("has " + wanted.name + " " + found + " instead of " + line)
print(sys.executable)
' "$marker" 2>/dev/null
}

# Set PYTHON to the active environment or .venv, whichever has what is needed; status 1 if neither has.
find_python() {
    active=python3
    command -v python3 >/dev/null || active=python
    if PYTHON=$(examine "$active"); then
        return
    fi
    problem=$PYTHON
    PYTHON=$(examine "$PWD/.venv/bin/python") || return 1
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        say "environment: .venv; the active one ${problem:-does not start}"
    fi
}

# Print the first Python that can make an environment; else say why none can.
find_base_python() {
    why=
    for candidate in python3 python python3.13 python3.12 python3.11 python3.10 python3.14; do
        command -v "$candidate" >/dev/null || continue
        fault=$("$candidate" -c '
import sys

name = "Python " + sys.version.split()[0]
if sys.version_info < (3, 10):
    print(name + " is too old")
else:
    try:
        import ensurepip, venv
    except ImportError:
        print(name + " has no module venv (Debian, Ubuntu: apt install python3-venv)")
' 2>/dev/null) || continue
        if [ -z "$fault" ]; then
            echo "$candidate"
            return
        fi
        why=${why:-": $fault"}
    done
    stop "found no Python 3.10 or newer that can make an environment$why; install one"
}

# Install requirements.txt into .venv, whatever an earlier attempt left there.
make_environment() {
    take_lock .venv.lock .venv
    if find_python; then
        release_lock
        return
    fi
    if [ -d .venv ]; then
        say "environment: .venv ${PYTHON:-has no Python that starts}; repairing it, pip fetches what is missing"
    else
        say "environment: $active ${problem:-does not start}; installing requirements.txt into .venv, once:" \
            "some minutes, 2 GB (on Linux several GB more if pip takes the torch build with CUDA)"
    fi
    PYTHON=$PWD/.venv/bin/python
    if ! { "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' &&
        { "$PYTHON" -m pip --version || "$PYTHON" -m ensurepip; }; } >/dev/null 2>&1; then
        base=$(find_base_python)
        "$base" -m venv --clear .venv >&2
    fi
    rm -f .venv/.complete-*
    # pip writes INSTALLER near the end of a package: one without it was cut off, and pip would take it for installed.
    for package in .venv/lib/python*/site-packages/*.dist-info; do
        [ -e "$package/INSTALLER" ] || rm -rf "$package"
    done
    "$PYTHON" -m pip install --disable-pip-version-check -r requirements.txt >&2 ||
        stop "pip could not install requirements.txt, its own words are above; the next start goes on from here"
    : >"$marker"    # last: without it the next start begins with a repair
    release_lock
    say "environment: .venv is complete"
}

find_environment() {
    marker=$(cksum <requirements.txt)
    marker=.venv/.complete-${marker%% *}
    if [ -n "${PYTHON:-}" ]; then
        name=$PYTHON
        PYTHON=$(command -v "$name") || stop "PYTHON=$name is no program (a relative path counts from $PWD)"
        case $PYTHON in
            /*) ;;
            *) PYTHON=$PWD/$PYTHON ;;
        esac
        say "environment: $PYTHON (PYTHON)"
    elif find_python; then
        :
    elif [ "${DRY_RUN:-}" = 1 ]; then
        say "environment: .venv would be made first"
        PYTHON=$active
    else
        make_environment
    fi
    case $PYTHON in
        */*) PATH=${PYTHON%/*}:$PATH ;;    # DeepSpeed looks for ninja there
    esac
    export PATH PYTHONUNBUFFERED=1
    # Nothing is reported to anybody. HF_TOKEN, HF_ENDPOINT and HF_HOME pass through as they are.
    export HF_HUB_DISABLE_TELEMETRY=1 GRADIO_ANALYTICS_ENABLED=False DO_NOT_TRACK=1
    export TRL_EXPERIMENTAL_SILENCE=1
}

# -- model --

# base_of DIRECTORY: print the base model on which the stage there was trained.
base_of() {
    "$PYTHON" -c '
import json, os, sys

directory = sys.argv[1]
path = os.path.join(directory, "stage.json")
try:
    with open(path, encoding="utf-8") as stream:
        name = json.load(stream)["base_model"]["name_or_path"]
    print(os.path.normpath(os.path.join(directory, name)) if name.startswith(".") else name)
except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    sys.exit(path + ": names no base model (" + repr(error) + "); run that stage again or move the directory away")
' "$1"
}

is_same() {
    [ "$1" = "$2" ] || { [ -d "$1" ] && [ -d "$2" ] && [ "$(cd "$1" && pwd -P)" = "$(cd "$2" && pwd -P)" ]; }
}

# settle_model BASE WHY: set what follows from the size of the base, where the user did not, and tell the choice.
settle_model() {
    case $1 in
        starter | */starter)    # it takes few rows at a time, and has not yet met the control tokens of a chat
            SCALE=starter
            : "${LORA_RANK:=32}" "${LORA_ALPHA:=64}" "${ACCUMULATION:=1}"
            : "${MODULES_TO_SAVE=embed_tokens}"
            ;;
        *)
            SCALE=real
            : "${LORA_RANK:=16}" "${LORA_ALPHA:=32}" "${ACCUMULATION:=4}"
            : "${MODULES_TO_SAVE=}"
            ;;
    esac
    say "model: $MODEL ($2)"
}

# by_scale STARTER REAL: print the value that suits the size of the base; each wrapper knows its stage's two.
by_scale() {
    if [ "$SCALE" = starter ]; then echo "$1"; else echo "$2"; fi
}

build_starter() {
    if [ "${DRY_RUN:-}" = 1 ]; then
        say "model: $1 would be built first"
        return
    fi
    mkdir -p "$OUTPUT_ROOT"
    take_lock "$1.lock" "$1"
    if [ ! -f "$1/stage.json" ]; then
        say "model: building $1 from data/, about three minutes, once"
        "$PYTHON" -m tools.build_starter_model --output_dir "$1" >&2
    fi
    release_lock
}

# Set MODEL to what the user named, or to what suits the hardware. An argument is a remark for the line about it.
choose_base() {
    starter=$OUTPUT_ROOT/starter
    if [ -n "$given_model" ]; then
        MODEL=$given_model
        reason="--model_name_or_path${1:-}"
    elif [ -n "${BASE_MODEL:-}" ]; then
        MODEL=$BASE_MODEL
        [ "$MODEL" != starter ] || MODEL=$starter
        reason="BASE_MODEL${1:-}"
    elif [ "$GPUS" -gt 0 ]; then
        MODEL=Qwen/Qwen3-0.6B-Base
        reason="GPU found; BASE_MODEL=name or path chooses another, BASE_MODEL=starter a tiny one without download"
    else
        MODEL=$starter
        reason="no GPU found; BASE_MODEL=name or path chooses another"
    fi
    MODEL=${MODEL%/}
    base=$MODEL
    if [ "$MODEL" = "$starter" ]; then
        [ -f "$starter/stage.json" ] || build_starter "$starter"
    elif [ -f "$MODEL/stage.json" ]; then
        base=$(base_of "$MODEL")
    fi
    settle_model "$base" "$reason"
}

# choose_parent STAGE: continue that stage if it was run, on the base the user wants; else start from a base.
choose_parent() {
    parent=$OUTPUT_ROOT/$1
    if [ -n "$given_model" ] || [ ! -f "$parent/stage.json" ]; then
        choose_base
        return
    fi
    base=$(base_of "$parent")
    wanted=${BASE_MODEL:-$base}
    [ "$wanted" != starter ] || wanted=$OUTPUT_ROOT/starter
    if is_same "$wanted" "$base" || is_same "$wanted" "$parent"; then
        MODEL=$parent
        settle_model "$base" "continues the stage found there, on $base"
    else
        choose_base "; $parent was trained on $base and is left aside"
    fi
}

# -- launch --

# launch SCRIPT ARGUMENTS: replace this shell by the training, in one process or in several.
launch() {
    read_arguments "$@"
    format=${given_precision:-fp32}
    if [ "$GPUS" -gt 0 ]; then
        hardware="$GPUS GPU$(plural "$GPUS"), $CORES CPU core$(plural "$CORES")"
    else
        hardware="$CORES CPU core$(plural "$CORES")"
    fi
    processes="$NPROC process$(plural "$NPROC" es)"
    NNODES=${NNODES:-1}
    case $NNODES in
        *[!0-9]* | 0) stop "NNODES must be a whole number from 1, got '$NNODES'" ;;
    esac
    if [ "$NNODES" -gt 1 ]; then
        [ -n "${MASTER_ADDR:-}" ] || stop "NNODES=$NNODES needs MASTER_ADDR, the address of machine 0"
        [ -n "${NODE_RANK:-}" ] || stop "NNODES=$NNODES needs NODE_RANK, this machine's number from 0 to NNODES - 1"
        set -- -m torch.distributed.run --nproc_per_node "$NPROC" --nnodes "$NNODES" --node_rank "$NODE_RANK" \
            --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" "$@"
        processes="$processes on each of $NNODES machines"
    elif [ "$NPROC" -gt 1 ] || [ "$GPUS" -gt 1 ] || [ -n "$given_deepspeed" ]; then
        # A lone process that sees several GPUs would use DataParallel; DeepSpeed without a launcher asks for MPI.
        set -- -m torch.distributed.run --standalone --nproc_per_node "$NPROC" "$@"
    fi
    say "hardware: $hardware, $processes, $format"
    if [ "${DRY_RUN:-}" = 1 ]; then
        printf '%s\n' "$PYTHON" "$@"
        exit
    fi
    exec "$PYTHON" "$@"
}

# -- several steps --

# run COMMAND: as launch does it, but come back.
run() {
    if [ "${DRY_RUN:-}" = 1 ]; then printf '%s\n' "$@"; else "$@"; fi
}

# go_on DIRECTORY: print the flag with which a stage goes on that was interrupted there.
go_on() {
    set -- "$1" "$1"/checkpoint-*/complete.json
    if [ -f "$2" ]; then
        echo --resume_from_checkpoint True
    elif [ -d "$1" ]; then
        echo --overwrite_output_dir True
    fi
}

plural() { [ "$1" -eq 1 ] || echo "${2:-s}"; }

OUTPUT_ROOT=${OUTPUT_ROOT:-outputs}
read_arguments "$@"
find_hardware
find_environment

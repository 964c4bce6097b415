"""What the stage scripts share: plain functions, called in order, by name."""

import importlib.util
import logging
import os
import sys
import warnings
from pathlib import Path


def continue_in_project_environment() -> None:
    """Go on in .venv, which the wrappers make, when this Python has no torch: `python inference.py` just works."""
    if importlib.util.find_spec("torch") is not None:
        return
    python = Path(__file__).resolve().parents[1] / ".venv" / "bin" / "python"
    if python.is_file() and os.environ.get("STAGEKIT_ENVIRONMENT") != str(python):
        os.environ["STAGEKIT_ENVIRONMENT"] = str(python)  # once: a .venv without torch must not start itself for ever
        os.execv(python, [str(python), *sys.orig_argv[1:]])
    # while python -m looks for the module, argv[0] is "-m"
    name = sys.orig_argv[sys.orig_argv.index("-m") + 1] if sys.argv[0] == "-m" else Path(sys.argv[0]).name
    print(
        f"{name}: error: {sys.executable} has no torch; pip install -r requirements.txt, or start with sh "
        "scripts/run_sft.sh, which makes .venv",
        file=sys.stderr,
    )
    raise SystemExit(2)


continue_in_project_environment()
# Telemetry of the libraries off: a run reports to its user, nobody else.
for name, value in {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "GRADIO_ANALYTICS_ENABLED": "False"}.items():
    os.environ.setdefault(name, value)
# Notes of the libraries to their own developers; what a user can act on is said by this project in one line.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|torch|accelerate|peft|deepspeed)\.")
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

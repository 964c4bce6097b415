"""What the stage scripts share: plain functions, called in order, by name."""

import logging
import os
import warnings

# Telemetry of the libraries off: a run reports to its user, nobody else.
for name, value in {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "GRADIO_ANALYTICS_ENABLED": "False"}.items():
    os.environ.setdefault(name, value)
# Notes of the libraries to their own developers; what a user can act on is said by this project in one line.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|torch|accelerate|peft|deepspeed)\.")
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

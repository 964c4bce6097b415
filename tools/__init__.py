"""Programs around the stages; run them from the root: python -m tools.NAME --help"""

import stagekit  # noqa: F401  (goes on in .venv where this Python has no torch)

"""What every benchmark ends with: on what it ran, and its table."""

import os
import platform
from pathlib import Path


def hardware() -> str:
    """The GPU, or the cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"


def publish(lines: list[str], output: str | None) -> None:
    """Print a table; --output also keeps it in a file."""
    text = "\n".join(lines) + "\n"
    print(text)
    if output:
        Path(output).write_text(text, encoding="utf-8")

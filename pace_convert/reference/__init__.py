"""The reference model: a small trained Qwen2 that travels with the package, and the work it
can do.
"""

from importlib.resources import files
from pathlib import Path


def reference_model() -> Path:
    """Folder of the embedded model."""
    return Path(str(files("pace_convert.reference"))) / "model"

"""Version of the code, with its commit."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path


@functools.cache
def code_version() -> str:
    """Version of the package, with the commit if it runs from a checkout."""
    from repmetrics import __version__

    checkout, git = Path(__file__).parents[1], shutil.which("git")
    if git is None or not (checkout / ".git").exists():  # an installation inside another repository has no .git here
        return __version__
    command = [git, "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # fails if git distrusts the owner
    return f"{__version__} ({result.stdout.strip()})" if result.returncode == 0 else __version__

"""Version of the code, with its commit."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path


@functools.cache
def code_version() -> str:
    """The version of this package, with the commit where it runs from a checkout."""
    from repmetrics import __version__

    checkout, git = Path(__file__).parents[1], shutil.which("git")
    if git is None or not (checkout / ".git").exists():  # a user's own repository around an installation is not ours
        return __version__
    asked = [git, "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)  # fails where git distrusts the owner
    return f"{__version__} ({found.stdout.strip()})" if found.returncode == 0 else __version__

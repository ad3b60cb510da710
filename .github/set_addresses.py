"""Write the repository's address into README.md and pyproject.toml, for the page of a release on PyPI.

    python .github/set_addresses.py https://github.com/OWNER/NAME v0.1.0

PyPI shows the README outside of the repository, where relative links lead nowhere.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def absolute_links(text: str, address: str, tag: str) -> str:
    """Markdown whose relative links and pictures have the repository's address.

    Example:
        >>> absolute_links("[a](docs/a.md) ![b](b.png) [c](https://c.org) [d](#d)", "https://host/o/n", "v1")
        '[a](https://host/o/n/blob/v1/docs/a.md) ![b](https://host/o/n/raw/v1/b.png) [c](https://c.org) [d](#d)'
    """

    def link(match: re.Match[str]) -> str:
        mark, label, target = match.groups()
        return f"{mark}[{label}]({address}/{'raw' if mark else 'blob'}/{tag}/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)", link, text)


def project_urls(text: str, address: str, tag: str) -> str:
    """pyproject.toml with the addresses of the project."""
    urls = {"Repository": address, "Issues": f"{address}/issues", "Changelog": f"{address}/blob/{tag}/CHANGELOG.md"}
    table = "".join(f'{name} = "{url}"\n' for name, url in urls.items())
    return text.replace("[project.scripts]\n", f"[project.urls]\n{table}\n[project.scripts]\n", 1)


def main() -> None:
    """Change both files."""
    address, tag = sys.argv[1:]
    for name, change in (("README.md", absolute_links), ("pyproject.toml", project_urls)):
        path = Path(name)
        path.write_text(change(path.read_text(encoding="utf-8"), address, tag), encoding="utf-8")


if __name__ == "__main__":
    main()

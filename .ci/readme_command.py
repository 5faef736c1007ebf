"""Print the shell command that README.md marks with ``<!-- command: NAME -->``."""

import re
import sys
from pathlib import Path


def readme_command(name: str) -> str:
    """Return the single line of the code block after the mark."""
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- command: {re.escape(name)} -->\n+```bash\n([^\n]+)\n```", readme)
    if found is None:
        raise SystemExit(f"README.md marks no one-line command {name!r}")
    return found.group(1)


if __name__ == "__main__":
    print(readme_command(sys.argv[1]))

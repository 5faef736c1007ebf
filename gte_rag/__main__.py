"""``python -m gte_rag``: the command line."""

from __future__ import annotations

import sys

from gte_rag.cli import main

if __name__ == "__main__":
    sys.exit(main())

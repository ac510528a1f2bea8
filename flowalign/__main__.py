"""`python -m flowalign`, the same as the command `flowalign`; torchrun and accelerate start it this way."""

from __future__ import annotations

import sys

from flowalign.cli import main

if __name__ == "__main__":
    sys.exit(main())

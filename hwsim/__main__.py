"""``python -m hwsim``: the command line."""

from __future__ import annotations

from hwsim.cli import main

if __name__ == "__main__":
    main()

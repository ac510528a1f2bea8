"""The run-time type checker of the tests; conftest.py has it check every annotated call of the three packages."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

# As for static checkers, an int will do where a float is asked for.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))

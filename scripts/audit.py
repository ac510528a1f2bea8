"""Known vulnerabilities of what is installed, by pip-audit and the OSV database; of ours none is known to anyone else.

    pip install pip-audit && python scripts/audit.py

Exit status 1 where a package has one that is mended in a later version. Where pip-audit is not installed, or the
database cannot be reached, the audit is left out, and the line says why: that is no fault of what is audited.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

SECONDS = 180.0
COMMAND = (
    sys.executable, "-m", "pip_audit", "--vulnerability-service", "osv", "--format", "json", "--skip-editable",
    "--progress-spinner", "off", "--timeout", "15",
)  # fmt: skip


def audit(command: Sequence[str]) -> tuple[int, str]:
    """The exit status, and what is to be said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 0, f"skipped: {error}"
    try:
        told: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        return 0, f"skipped: pip-audit came to no result ({said[:300]})"
    found = [(package, one) for package in told for one in package.get("vulns", ())]
    lines = [_line(package, one) for package, one in found]
    mended = any(one.get("fix_versions") for _, one in found)
    return int(mended), "\n".join([*lines, f"{len(told)} packages, {len(found)} known vulnerabilities"])


def _line(package: dict[str, Any], one: dict[str, Any]) -> str:
    versions = ", ".join(one.get("fix_versions", ())) or "no version yet"
    return f"{package['name']} {package.get('version')}: {one['id']}, mended in {versions}"


def main() -> int:
    if importlib.util.find_spec("pip_audit") is None:
        print("audit skipped: pip-audit is not installed")
        return 0
    code, said = audit(COMMAND)
    print(f"audit {said}")
    return code


if __name__ == "__main__":
    sys.exit(main())

"""A dozen kill -9 (kill9.py does a hundred) of the server alone."""
import subprocess
import sys

import pytest

from server import BINARY, PATIENCE, ROOT


@pytest.mark.parametrize("jobs", [1, 3])
def test_kill9(jobs):
    ran = subprocess.run([sys.executable, ROOT / "tests" / "fault" / "kill9.py", "--claas", BINARY, "--kills", "12", "--seed", "7", "--longest",
                          str(0.6 * PATIENCE), "--set", f"trainer.jobs={jobs}"], capture_output=True, text=True, timeout=120 * PATIENCE, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr

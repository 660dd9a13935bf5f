"""A dozen kill -9 (kill9.py does a hundred) of the server alone."""
import subprocess
import sys

from server import BINARY, PATIENCE, ROOT


def test_kill9():
    ran = subprocess.run([sys.executable, ROOT / "tests" / "fault" / "kill9.py", "--claas", BINARY, "--kills", "12", "--seed", "7", "--longest",
                          str(0.6 * PATIENCE)], capture_output=True, text=True, timeout=120 * PATIENCE, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr

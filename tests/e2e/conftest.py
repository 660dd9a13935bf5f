"""Fixtures: real servers, each with a data directory of its own, ended by its process id (server.py has the class).

Environment: CLAAS_BIN (the binary; default build/tools/claas); CLAAS_TEST_MODEL (path of the embedded model; tests that need
a model which can talk are skipped without it); CLAAS_TEST_PATIENCE (factor on every limit of time, for sanitizer builds).
"""
import os
import subprocess

import pytest

from server import BINARY, PATIENCE, Server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One server of a tiny random model for the tests of a module."""
    running = Server(tmp_path_factory.mktemp("server") / "db").start()
    yield running
    assert running.stop() == 0, running.log()


@pytest.fixture
def make_server(tmp_path):
    """Servers that a test starts and stops itself, by default all on one directory."""
    made = []

    def make(data=None, **more):
        made.append(Server(data or tmp_path / "db", **more))
        return made[-1]

    yield make
    for one in made:
        one.kill()


@pytest.fixture(scope="session")
def real_server(tmp_path_factory):
    """A server of the embedded model."""
    model = os.environ.get("CLAAS_TEST_MODEL")
    if not model:
        pytest.skip("CLAAS_TEST_MODEL is not set")
    running = Server(tmp_path_factory.mktemp("real") / "db", model=model, settings=()).start()
    yield running
    assert running.stop() == 0, running.log()


@pytest.fixture
def adapter(server, request):
    """A new adapter of the module's server, with a name of the test's own."""
    name = "e2e/" + "".join(c if c.isalnum() else "-" for c in request.node.name)
    server.call("POST", "/v1/lora/init", {"lora_id": name, "overwrite": True})
    return name


@pytest.fixture
def claas(server):
    """Runs the command line tool against the module's server: claas("lora", "list")."""

    def run(*arguments, stdin="", url=None):
        environment = {**os.environ, "CLAAS_URL": url or server.url}
        return subprocess.run([BINARY, *arguments], input=stdin, capture_output=True, text=True, errors="replace",
                              timeout=120 * PATIENCE, env=environment, check=False)

    return run

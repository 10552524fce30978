import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
SCRIPT = """
import sys
from nla_llm.study import run
sys.exit(run(sys.argv[1], store=sys.argv[2], jobs={jobs}, progress=False).exit_code)
"""


@pytest.fixture
def toy():
    """File of the toy study."""
    return FOLDER / "toy.py"


@pytest.fixture
def store_path(tmp_path):
    return tmp_path / "results" / "store.sqlite"


@pytest.fixture
def start(toy, store_path, tmp_path):
    """Start a real run of the toy study as a process of its own."""
    started = []

    def start(*, jobs=0, sleep=0.0, log="log.txt"):
        environment = {**os.environ, "TOY_SLEEP": str(sleep), "TOY_LOG": str(tmp_path / log), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", SCRIPT.format(jobs=jobs), str(toy), str(store_path)]
        process = subprocess.Popen(  # noqa: S603 - this interpreter, on a file of ours
            command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()

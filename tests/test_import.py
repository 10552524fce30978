"""``import nla_llm`` costs nothing that is not asked for."""

import subprocess
import sys

HEAVY = ("sympy", "matplotlib", "pandas", "scipy", "torch", "typst", "rich", "typer", "hypothesis", "pytest")
SCRIPT = f"""
import sys, time
start = time.perf_counter()
import nla_llm as nl
seconds = time.perf_counter() - start
print(seconds, *[name for name in {HEAVY!r} if name in sys.modules])
"""


def test_import_is_quick_and_loads_nothing_heavy():
    runs = [
        subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout.split()  # noqa: S603 - ourselves
        for _ in range(3)
    ]
    assert all(loaded == [] for _, *loaded in runs)
    assert min(float(seconds) for seconds, *_ in runs) < 0.5

import sys
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from nla_llm.cli import main


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def sentence(self):
        """What standard error says of a refused command, and nothing else."""
        assert self.code == 2, self
        assert "Traceback" not in self.err
        return " ".join(self.err.split())


@pytest.fixture
def nla(tmp_path, monkeypatch, capsys):
    """Run the command line in an empty folder; gives exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the folder is looked in for methods

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["nla-llm", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        return Outcome(ended.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def no_reports(monkeypatch):
    """Leave the reports out, where records are what is looked at."""
    monkeypatch.setattr("nla_llm.cli.bench.write_reports", lambda summaries, reports: [])


@pytest.fixture
def save(tmp_path):
    """Write arrays to a safetensors file in the folder."""

    def save(name, **arrays):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, path)
        return Path(name)

    return save


@pytest.fixture
def qkv():
    """Two heads of 24 tokens, dimension 4, with a mask that hides the last four keys."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 24, 4)).astype(np.float32)
    return {"q": q, "k": k, "v": v, "mask": np.arange(24) < 20}


@pytest.fixture
def pair():
    """A base, and what rank 3 made of it: two layers of two matrices, and a vector."""
    rng = np.random.default_rng(0)
    base, tuned = {}, {}
    for layer in range(2):
        for kind, shape in (("q_proj", (24, 16)), ("up_proj", (16, 40))):
            name = f"model.layers.{layer}.{kind}.weight"
            base[name] = (
                rng.standard_normal(shape).astype(ml_dtypes.bfloat16).astype(float)
            )  # what training starts from
            update = rng.standard_normal((shape[0], 3)) @ rng.standard_normal((3, shape[1]))
            tuned[name] = base[name] + 0.02 * update * np.linalg.norm(base[name]) / np.linalg.norm(update)
    base["model.norm.weight"] = np.ones(16)
    tuned["model.norm.weight"] = np.full(16, 1.125)
    return base, tuned


@pytest.fixture
def saved(save, pair):
    """The pair in float32."""
    base, tuned = ({k: x.astype(np.float32) for k, x in arrays.items()} for arrays in pair)
    return save("b.safetensors", **base), save("t.safetensors", **tuned)

"""Records of adapters: against the product that is never formed."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from nla_llm.linalg.factors import factored_svd
from nla_llm.problems.adapters import open_adapter
from nla_llm.study.adapters import MANY_AT_THE_TOP, clamped_share, module_records, recompressed

DATA = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture
def adapter(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "lora_a.lora_down.weight": rng.standard_normal((6, 40)) * np.arange(6, 0, -1)[:, None],
        "lora_a.lora_up.weight": rng.standard_normal((30, 6)),
        "lora_a.alpha": np.array(3.0),
        "lora_wide.lora_down.weight": rng.standard_normal((6, 4)),
        "lora_wide.lora_up.weight": rng.standard_normal((5, 6)),
        "lora_zero.lora_down.weight": rng.standard_normal((2, 8)),
        "lora_zero.lora_up.weight": np.zeros((7, 2)),
    }
    save_file({k: v.astype(np.float32) for k, v in arrays.items()}, tmp_path / "a.safetensors")
    return open_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["lora_a", "lora_wide"])
def test_records_against_the_product(adapter, name):
    """The scale included; also where there are more columns than the matrix has."""
    left, right = adapter.factors(name)
    product = adapter.modules[name].scale * left @ right.T
    s = np.linalg.svd(product, compute_uv=False)
    whole, *others = module_records(adapter, name, [2], None, "frobenius")
    assert whole["spectral"].contains(s[0])
    assert whole["frobenius"].contains(np.linalg.norm(s))
    assert whole["rank_90"] == np.argmax(np.cumsum(s**2) >= 0.9 * np.sum(s**2)) + 1
    (cut,) = [record for record in others if record["what"] == "truncation"]
    assert float(cut["relative_frobenius"]) == pytest.approx(np.linalg.norm(s[2:]) / np.linalg.norm(s), rel=1e-5)
    assert float(cut["relative_spectral"]) == pytest.approx(s[2] / s[0], rel=1e-5)


def test_a_tolerance_gives_the_least_rank(adapter):
    left, right = adapter.factors("lora_a")
    svd = factored_svd(left, right)
    s = np.linalg.svd(left @ right.T, compute_uv=False)
    for tolerance in (0.2, 0.5, 0.9):
        cut = recompressed(svd, tolerance=tolerance, norm="spectral")
        assert s[cut.rank] <= tolerance * s[0] < s[cut.rank - 1] or cut.rank == 1
        assert np.linalg.norm(left @ right.T - cut.left @ cut.right.T, 2) <= tolerance * s[0]


def test_a_product_of_zeros_is_told_and_not_divided_by(adapter):
    whole, *others = module_records(adapter, "lora_zero", [1], None, "frobenius")
    assert float(whole["spectral"]) == 0
    assert whole["stable_rank"] is None
    assert all(record["what"] == "spectrum" for record in others)


@pytest.mark.parametrize("quantile", [None, 0.99, 0.999])
def test_clamping_at_a_quantile_leaves_its_trace(quantile):
    """As extraction does it: both factors at the quantile of their entries together."""
    rng = np.random.default_rng(2)
    left, right = rng.standard_normal((300, 8)), rng.standard_normal((200, 8))
    if quantile is None:
        assert clamped_share(left, right) < MANY_AT_THE_TOP / 10
        return
    top = np.quantile(np.concatenate([left.ravel(), right.ravel()]), quantile)
    share = clamped_share(left.clip(-top, top), right.clip(-top, top))
    assert share == pytest.approx(2 * (1 - quantile), rel=0.4)


def test_a_published_extraction_was_clamped_and_a_trained_adapter_was_not():
    if not DATA.is_dir():
        pytest.skip("the folder shared/data with real adapters is not here")
    for file, clamped in (("analog_svd_rank4.safetensors", True), ("lora_disney.safetensors", False)):
        found = open_adapter(DATA / file)
        shares = [clamped_share(*found.factors(name)) for name in found.modules]
        assert (np.median(shares) > MANY_AT_THE_TOP) == clamped

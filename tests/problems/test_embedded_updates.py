"""The shipped updates of the embedded model: complete, of the rank they claim, and as good as their record says."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import load_file

from nla_llm.problems.embedded import embedded_model, heldout_tokens, training_record
from nla_llm.problems.embedded_updates import EmbeddedUpdates, embedded_updates

UPDATES = embedded_updates()
RANKS, SEEDS = (1, 2, 4, 8, 16), (0, 1)


def runs():
    """Name of a run whose update is shipped → the update."""
    adapters = {f"lora-{rank}-{seed}": UPDATES.adapter(rank, seed) for rank, seed in UPDATES.adapters}
    return {"full-0": UPDATES.full} | adapters


def test_the_folder_is_complete_and_small():
    files = [path for path in UPDATES.directory.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 * 10**6
    assert UPDATES.adapters == [(rank, seed) for rank in RANKS for seed in SEEDS]
    assert embedded_updates() is UPDATES


def test_all_updates_are_of_the_linear_maps_of_the_layers():
    shapes = {n: s for n, s in embedded_model().config.shapes().items() if len(s) == 2 and ".layers." in n}
    assert len(shapes) == 6 * 7
    for name, update in runs().items():
        assert {n: tuple(u.shape) for n, u in update.items()} == shapes, name


def test_the_full_update_is_what_float16_holds():
    for name, delta in UPDATES.full.items():
        assert delta.dtype == np.float32
        assert np.array_equal(delta, delta.astype(np.float16)), name
        assert np.abs(delta).max() > 0


@pytest.mark.parametrize("rank", RANKS)
def test_an_adapter_has_its_rank_and_not_less(rank):
    for seed in SEEDS:
        for name, op in UPDATES.adapter(rank, seed).items():
            s = np.linalg.svd(op.dense().astype(np.float64), compute_uv=False)
            assert op.rank == rank
            assert (s[rank:] <= 8 * np.finfo(np.float32).eps * s[0]).all(), name  # 8 is empirical
            assert s[rank - 1] > 1e-4 * s[0], name


def test_seeds_differ():
    first, second = (UPDATES.adapter(4, seed) for seed in SEEDS)
    assert all(np.abs(first[name].dense() - second[name].dense()).max() > 1e-3 for name in first)


def test_an_adapter_is_what_peft_makes_of_the_same_files():
    folder, stem = UPDATES.directory / "lora-2-1", "base_model.model.model.layers.5.mlp.up_proj"
    config, stored = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    assert len(stored) == 2 * 6 * 7
    assert (config["peft_type"], config["r"], config["use_rslora"]) == ("LORA", 2, True)
    a, b = (stored[f"{stem}.lora_{x}.weight"].astype(np.float64) for x in "AB")
    assert a.dtype == np.float64
    wanted = config["lora_alpha"] / math.sqrt(2) * b @ a
    np.testing.assert_allclose(UPDATES.adapter(2, 1)["model.layers.5.mlp.up_proj.weight"].dense(), wanted, rtol=1e-5,
                               atol=1e-6 * np.abs(wanted).max())  # fmt: skip


@pytest.mark.parametrize("name", ["full-0", "lora-1-0", "lora-16-1"])
def test_losses_are_those_that_the_trainer_recorded(name):
    model, recorded = embedded_model().updated(runs()[name]), UPDATES.record["runs"][name]["losses"]
    for domain, tokens in {"new": UPDATES.heldout.piece(0), "old": heldout_tokens()}.items():
        # five decimals, and the rounding of two implementations in float32: 1e-4 is empirical
        assert math.isclose(model.loss(tokens), recorded[domain][0], abs_tol=1e-4)


def test_every_update_is_better_than_none_on_the_new_domain():
    record = UPDATES.record
    before = np.array(record["base"]["losses"]["new"])
    for name, run in record["runs"].items():
        assert np.mean(np.array(run["losses"]["new"]) < before) > 0.9, name
        assert run["loss"]["new"] < record["base"]["loss"]["new"] - 0.2, name
        assert abs(run["loss_before_cast"]["new"] - run["loss"]["new"]) < 1e-3, name
    assert record["runs"]["full-0"]["loss"]["new"] < record["base"]["loss"]["new"] - 0.8


def test_all_runs_saw_as_many_tokens_and_adapt_what_they_say():
    record = UPDATES.record["runs"]
    assert len({run["tokens"] for run in record.values()}) == 1
    for name, update in runs().items():
        count = sum(math.prod(u.shape) if name == "full-0" else u.rank * sum(u.shape) for u in update.values())
        assert record[name]["trained_parameters"] == count


def test_nothing_held_out_was_trained_on():
    text, files = UPDATES.record["text"], UPDATES.heldout.files
    assert set(files) <= set(text["heldout_files"])
    assert not set(text["heldout_files"]) & set(text["validation_files"])
    assert len(files) == len(set(files)) == 24
    assert not set(files) & set(training_record()["text"]["validation_files"])


def test_pieces_have_a_length_and_refuse_what_is_not_there():
    held = UPDATES.heldout
    assert held.piece(3).shape == (1024,)
    assert np.array_equal(held.piece(3, 10), held.piece(3)[:10])
    with pytest.raises(ValueError, match=r"piece must be in 0 \.\.\. 23, got 24"):
        held.piece(24)
    with pytest.raises(ValueError, match=r"n must be in 1 \.\.\. 1024, .*got 0"):
        held.piece(0, 0)


def test_an_adapter_that_is_not_there_gets_a_sentence():
    with pytest.raises(ValueError, match=r"no adapter of rank 3 and seed 0; \(rank, seed\) is one of \[\(1, 0\)"):
        UPDATES.adapter(3)


def test_the_scale_without_rslora_is_alpha_over_the_rank(tmp_path):
    folder = tmp_path / "lora-2-0"
    folder.mkdir()
    source = UPDATES.directory / "lora-2-0"
    (folder / "adapter_model.safetensors").write_bytes((source / "adapter_model.safetensors").read_bytes())
    config = json.loads((source / "adapter_config.json").read_text()) | {"use_rslora": False}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name = "model.layers.0.self_attn.q_proj.weight"
    plain, stabilised = EmbeddedUpdates(tmp_path).adapter(2)[name], UPDATES.adapter(2)[name]
    np.testing.assert_allclose(plain.left * math.sqrt(2), stabilised.left, rtol=1e-6)


def test_the_record_is_plain_json_without_paths():
    text = (UPDATES.directory / "training.json").read_text(encoding="utf-8")
    assert "/home/" not in text
    assert {"base", "runs", "searches", "options", "text", "versions", "step_processor_seconds"} <= set(
        json.loads(text)
    )

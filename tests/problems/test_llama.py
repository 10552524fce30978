"""The forward pass against a plain derivation and against transformers, and each of its hooks."""

import cmath
import json
import math
import subprocess
import sys
import warnings

import array_api_strict
import numpy as np
import pytest
from safetensors.numpy import save_file

from nla_llm.operators import Dense, LowRank
from nla_llm.problems import _llama_functions
from nla_llm.problems.checkpoint import CheckpointError
from nla_llm.problems.llama import LlamaConfig, LlamaModel, Rotary, load_llama

SMALL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 23,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "tie_word_embeddings": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one head for all": {"num_key_value_heads": 1},
    "a head each": {"num_key_value_heads": 6},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}},
    "llama3": {"rope_parameters": LLAMA3},
}


def random_weights(config, dtype=np.float64, seed=0):
    """Matrices that keep the size of what they act on, gains near one, biases that matter."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in config.shapes().items():
        x = rng.standard_normal(shape) / math.sqrt(shape[-1])
        weights[name] = (1 + x if "norm" in name else 4 * x if "embed" in name else x).astype(dtype)
    return weights


def random_model(seed=0, dtype=np.float64, **changes):
    config = LlamaConfig.from_json(SMALL | changes)
    return LlamaModel(config, random_weights(config, dtype, seed))


def random_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, SMALL["vocab_size"], shape)


def write_checkpoint(directory, weights, **changes):
    (directory / "config.json").write_text(json.dumps(SMALL | changes))
    save_file(weights, directory / "model.safetensors")
    return directory


# -- an independent derivation: one token, one head, one key at a time, rotations as complex numbers ---------------


def derived_frequencies(rope, d):
    result = []
    for i in range(d // 2):
        f = rope.theta ** (-2 * i / d)
        wavelength = 2 * math.pi / f
        if rope.kind == "linear":
            f /= rope.factor
        elif rope.kind == "llama3":
            longest = rope.original_length / rope.low_freq_factor
            shortest = rope.original_length / rope.high_freq_factor
            if wavelength > longest:
                f /= rope.factor
            elif wavelength > shortest:
                share = (rope.original_length / wavelength - rope.low_freq_factor) / (
                    rope.high_freq_factor - rope.low_freq_factor
                )
                f = (1 - share) * f / rope.factor + share * f
        result.append(f)
    return result


def derived_logits(config, weights, tokens):
    """Logits (n, vocabulary) of one sequence, in float64 and by loops."""
    d, n, half = config.head_dim, len(tokens), config.head_dim // 2
    frequencies = derived_frequencies(config.rotary, d)

    def norm(x, name):
        return [
            x_i / math.sqrt(sum(x**2) / len(x) + config.rms_norm_eps) * g
            for x_i, g in zip(x, weights[name], strict=True)
        ]

    def linear(x, name):
        return weights[f"{name}.weight"] @ np.array(x) + weights.get(f"{name}.bias", 0.0)

    def turned(x, position):
        z = [complex(x[i], x[i + half]) * cmath.exp(1j * position * frequencies[i]) for i in range(half)]
        return np.array([c.real for c in z] + [c.imag for c in z])

    xs = [weights["model.embed_tokens.weight"][t] for t in tokens]
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        y = [norm(x, f"{name}.input_layernorm.weight") for x in xs]
        qs, ks, vs = ([linear(x, f"{name}.self_attn.{p}_proj") for x in y] for p in "qkv")
        for i in reversed(range(n)):
            heads = []
            for h in range(config.num_attention_heads):
                kv = h // (config.num_attention_heads // config.num_key_value_heads)
                q = turned(qs[i][h * d : h * d + d], i)
                weight = [math.exp(q @ turned(ks[j][kv * d : kv * d + d], j) / math.sqrt(d)) for j in range(i + 1)]
                heads.append(sum(w * vs[j][kv * d : kv * d + d] for j, w in enumerate(weight)) / sum(weight))
            xs[i] = xs[i] + linear(np.concatenate(heads), f"{name}.self_attn.o_proj")
        for i in range(n):
            z = norm(xs[i], f"{name}.post_attention_layernorm.weight")
            gate = linear(z, f"{name}.mlp.gate_proj")
            xs[i] = xs[i] + linear(
                gate / (1 + np.exp(-gate)) * linear(z, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj"
            )
    head = weights["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return np.stack([head @ norm(x, "model.norm.weight") for x in xs])


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_a_plain_derivation(variant):
    model = random_model(**VARIANTS[variant])
    tokens = random_tokens(9)
    wanted = derived_logits(model.config, model.weights, tokens)
    np.testing.assert_allclose(model.logits(tokens), wanted, rtol=0, atol=1e-13 * np.abs(wanted).max())


def test_a_batch_is_its_sequences():
    model, tokens = random_model(), random_tokens(3, 8)
    batch = model.logits(tokens)
    assert batch.shape == (3, 8, 23)
    for row, one in zip(batch, tokens, strict=True):
        np.testing.assert_allclose(row, model.logits(one), rtol=0, atol=1e-13 * np.abs(row).max())


def test_later_tokens_do_not_change_earlier_logits():
    model, tokens = random_model(), random_tokens(12)
    changed = tokens.copy()
    changed[7:] = (changed[7:] + 1) % 23
    a, b = model.logits(tokens), model.logits(changed)
    np.testing.assert_allclose(a[:7], b[:7], rtol=0, atol=1e-14 * np.abs(a).max())
    assert np.abs(a[7:] - b[7:]).max() > 0.1


def test_a_single_token_works():
    model = random_model()
    np.testing.assert_allclose(
        model.logits([5]), derived_logits(model.config, model.weights, [5]), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_frequencies_of_the_rotary_kinds(kind):
    rope = Rotary(500000.0, kind, 8.0, 1.0, 4.0, 8192)
    found = rope.frequencies(128)
    np.testing.assert_allclose(found, derived_frequencies(rope, 128), rtol=1e-13)
    plain = Rotary(500000.0).frequencies(128)
    assert np.isclose(found[-1], plain[-1] / 8, rtol=1e-13)
    assert (found[0] == plain[0]) == (kind == "llama3")


def test_large_gates_do_not_overflow():
    x = np.array([-1e4, -100.0, -1.0, 0.0, 1.0, 100.0, 1e4], np.float32)
    wanted = np.array([0.0, -100 * math.exp(-100), -1 / (1 + math.e), 0.0, 1 / (1 + math.exp(-1)), 100.0, 1e4])
    np.testing.assert_allclose(_llama_functions.silu(x), wanted, rtol=1e-6, atol=1e-42)


# -- other libraries and precisions --------------------------------------------------------------------------------


def converted(model, convert):
    return LlamaModel(model.config, {name: convert(w) for name, w in model.weights.items()})


def test_array_api_strict_agrees():
    model, tokens = random_model(attention_bias=True), random_tokens(2, 8)
    strict = converted(model, array_api_strict.asarray)
    wanted = model.logits(tokens)
    np.testing.assert_allclose(np.asarray(strict.logits(tokens)), wanted, rtol=0, atol=1e-13 * np.abs(wanted).max())
    assert math.isclose(strict.loss(tokens), model.loss(tokens), rel_tol=1e-13)
    assert array_api_strict.isdtype(strict.capture(tokens)[1].q.dtype, "real floating")


@pytest.mark.torch
def test_torch_agrees():
    torch = pytest.importorskip("torch")
    model, tokens = random_model(attention_bias=True), random_tokens(2, 8)
    other = converted(model, torch.from_numpy)
    wanted = model.logits(tokens)
    for ids in (tokens, torch.from_numpy(tokens)):
        np.testing.assert_allclose(other.logits(ids).numpy(), wanted, rtol=0, atol=1e-13 * np.abs(wanted).max())
    assert math.isclose(other.loss(tokens), model.loss(tokens), rel_tol=1e-13)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_torch_in_half_precision_is_as_wrong_as_its_epsilon(tmp_path, name):
    torch = pytest.importorskip("torch")
    weights = {k: w.astype(np.float32) for k, w in random_model().weights.items()}
    write_checkpoint(tmp_path, weights)
    half = load_llama(tmp_path, dtype=getattr(torch, name), like=torch.empty(0))
    assert half.embedding.dtype == getattr(torch, name)
    tokens = random_tokens(12)
    wanted = load_llama(tmp_path).logits(tokens)
    error = np.abs(half.logits(tokens).double().numpy() - wanted).max() / np.abs(wanted).max()
    eps = torch.finfo(getattr(torch, name)).eps
    assert eps / 16 < error < 16 * eps  # 16 is empirical: two layers, widths about ten


def test_float32_is_as_wrong_as_its_epsilon():
    tokens, exact = random_tokens(16), random_model()
    single = LlamaModel(exact.config, {k: w.astype(np.float32) for k, w in exact.weights.items()})
    x, y = single.logits(tokens), exact.logits(tokens)
    assert x.dtype == np.float32
    assert 1e-9 < np.abs(x - y).max() / np.abs(y).max() < 32 * 2.0**-23


# -- loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(10,), (3, 10)])
@pytest.mark.parametrize("at_once", [1, 23 * 4, 1 << 20])
def test_loss_is_the_cross_entropy_of_the_logits(monkeypatch, shape, at_once):
    monkeypatch.setattr(_llama_functions, "_LOGITS_AT_ONCE", at_once)
    model, tokens = random_model(), random_tokens(*shape)
    logits = model.logits(tokens)[..., :-1, :]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = -np.take_along_axis(log_p, tokens[..., 1:, None], axis=-1)[..., 0]
    per_token = model.loss(tokens, per_token=True)
    assert per_token.shape == (*shape[:-1], 9)
    np.testing.assert_allclose(per_token, wanted, rtol=0, atol=1e-13 * wanted.max())
    assert math.isclose(model.loss(tokens), wanted.mean(), rel_tol=1e-13)
    assert math.isclose(model.perplexity(tokens), math.exp(wanted.mean()), rel_tol=1e-12)


def test_the_last_token_of_a_loss_is_only_scored():
    model, tokens = random_model(), random_tokens(33)  # one more than the positions of the model
    assert model.loss(tokens, per_token=True).shape == (32,)
    with pytest.raises(ValueError, match="got 34 tokens, the model takes at most 33"):
        model.loss(random_tokens(34))


# -- replaced attention --------------------------------------------------------------------------------------------


def exact_method(problem, rng=None):
    return problem.exact()


def uniform_method(problem, rng=None):
    n = problem.n_q
    return Dense(np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None])


def noisy_method(problem, rng=None):
    return Dense(problem.exact().dense() * rng.uniform(0.5, 1.5, (problem.n_q, problem.n_k)))


def test_exact_attention_in_the_place_of_exact_attention_changes_nothing():
    model, tokens = random_model(), random_tokens(2, 11)
    wanted = model.logits(tokens)
    found = model.logits(tokens, attention={0: exact_method, 1: exact_method})
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-13 * np.abs(wanted).max())


def test_a_float64_method_serves_a_float32_model():
    model, tokens = random_model(dtype=np.float32), random_tokens(11)
    found = model.logits(tokens, attention={1: exact_method})
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, model.logits(tokens), rtol=0, atol=1e-4)


def test_uniform_attention_equals_a_model_with_zero_queries():
    tokens = random_tokens(11)
    model = random_model()
    zero_queries = dict(model.weights)
    zero_queries["model.layers.1.self_attn.q_proj.weight"] = np.zeros((24, 12))
    wanted = LlamaModel(model.config, zero_queries).logits(tokens)
    found = model.logits(tokens, attention={1: uniform_method})
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-13 * np.abs(wanted).max())
    assert np.abs(found - model.logits(tokens)).max() > 1e-3
    assert model.loss(tokens, attention={1: uniform_method}) != model.loss(tokens)


def test_the_seed_decides_what_a_method_draws_and_layers_draw_apart():
    model, tokens = random_model(), random_tokens(11)
    drawn = {}

    def method(layer):
        def draw(problem, rng=None):
            drawn.setdefault(layer, []).append(rng.bit_generator.state["state"]["state"])
            return noisy_method(problem, rng)

        return draw

    both = {0: method(0), 1: method(1)}
    a, b = model.logits(tokens, attention=both, rng=3), model.logits(tokens, attention=both, rng=3)
    assert np.array_equal(a, b)
    assert not np.array_equal(a, model.logits(tokens, attention=both, rng=4))
    model.logits(tokens, attention={1: both[1]}, rng=3)
    assert drawn[1][0] == drawn[1][1] == drawn[1][3] != drawn[1][2]
    assert drawn[0][0] != drawn[1][0]


def test_a_method_that_breaks_down_is_named_with_its_layer():
    def broken(problem, rng=None):
        return Dense(np.full((problem.n_q, problem.n_k), np.nan))

    with pytest.raises(FloatingPointError, match="in layer 1 gave NaN or infinite"):
        random_model().logits(random_tokens(4), attention={1: broken})


def test_an_operator_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"in layer 0 gave an operator \(3, 3\), attention is \(3, 2, 4, 4\)"):
        random_model().logits(random_tokens(4), attention={0: lambda problem, rng=None: Dense(np.eye(3))})


@pytest.mark.parametrize(
    ("attention", "error", "sentence"),
    [
        (exact_method, TypeError, "map layers to methods"),
        ({2: exact_method}, ValueError, r"layer must be in 0 \.\.\. 1, got 2"),
        ({-1: exact_method}, ValueError, r"layer must be in 0 \.\.\. 1, got -1"),
        ({"0": exact_method}, TypeError, "a layer must be an integer, got '0'"),
        ({0: "uniform"}, TypeError, r"attention\[0\] must be a method"),
    ],
)
def test_what_is_no_replacement_is_refused(attention, error, sentence):
    with pytest.raises(error, match=sentence):
        random_model().logits(random_tokens(4), attention=attention)


@pytest.mark.parametrize(("rng", "error"), [(1.5, TypeError), (True, TypeError), (-1, ValueError)])
def test_what_is_no_seed_is_refused(rng, error):
    with pytest.raises(error, match="rng must"):
        random_model().logits(random_tokens(4), rng=rng)


# -- replaced embedding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("tied_model", [True, False])
def test_a_replaced_embedding_equals_a_model_that_has_it(tie, tied_model):
    tokens, model = random_tokens(9), random_model(tie_word_embeddings=tied_model)
    left, s, right = np.linalg.svd(model.embedding, full_matrices=False)
    factors = LowRank(left[:, :4] * s[:4], right[:4].T)
    weights = dict(model.weights) | {"model.embed_tokens.weight": factors.dense()}
    weights["lm_head.weight"] = factors.dense() if tie and tied_model else model.head
    config = LlamaConfig.from_json(SMALL | {"tie_word_embeddings": False})
    wanted = LlamaModel(config, weights).logits(tokens)
    for embedding in (factors, factors.dense()):
        found = model.logits(tokens, embedding=embedding, tie=tie)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-13 * np.abs(wanted).max())
    assert model.loss(tokens, embedding=factors, tie=tie) != model.loss(tokens)


@pytest.mark.parametrize("tied", [True, False])
def test_updated_weights_equal_a_model_that_has_them(tied):
    model = random_model(tie_word_embeddings=tied)
    rng, tokens = np.random.default_rng(1), random_tokens(9)
    left, right = rng.standard_normal((10, 2)), rng.standard_normal((12, 2))
    updates = {
        "model.layers.1.mlp.up_proj.weight": LowRank(left, right),
        "model.layers.0.self_attn.k_proj.weight": rng.standard_normal((12, 12)),
        "model.embed_tokens.weight": rng.standard_normal((23, 12)),
    }
    dense = {name: u.dense() if isinstance(u, LowRank) else u for name, u in updates.items()}
    wanted = LlamaModel(model.config, {n: w + dense[n] if n in dense else w for n, w in model.weights.items()})
    before = model.logits(tokens)
    updated = model.updated(updates)
    np.testing.assert_allclose(updated.logits(tokens), wanted.logits(tokens), rtol=1e-12)
    assert not np.allclose(updated.logits(tokens), before)
    assert np.array_equal(model.logits(tokens), before)
    assert updated.weights["model.norm.weight"] is model.weights["model.norm.weight"]
    minus = {name: -u for name, u in dense.items()}
    np.testing.assert_allclose(updated.updated(minus).logits(tokens), before, rtol=1e-9)


def test_updates_that_do_not_fit_are_refused():
    model, name = random_model(), "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=r"updates has 'up_proj', which is no weight of the model"):
        model.updated({"up_proj": np.zeros((10, 12))})
    with pytest.raises(
        ValueError, match=r"updates\['model.*up_proj.weight'\] must have shape \(10, 12\), got \(12, 10\)"
    ):
        model.updated({name: np.zeros((12, 10))})
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.updated({name: np.full((10, 12), np.nan)})


def test_an_embedding_of_another_shape_or_with_nan_is_refused():
    model = random_model()
    with pytest.raises(ValueError, match=r"embedding must have shape \(23, 12\), got \(12, 23\)"):
        model.logits([1], embedding=model.embedding.T)
    with pytest.raises(ValueError, match="NaN"):
        model.logits([1], embedding=np.full((23, 12), np.nan))


# -- capture and weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (2,)])
def test_capture_yields_what_the_attention_of_each_layer_sees(batch):
    model, tokens, seen = random_model(attention_bias=True), random_tokens(*batch, 7), {}

    def spy(layer):
        def method(problem, rng=None):
            seen[layer] = problem
            return problem.exact()

        return method

    model.logits(tokens, attention={0: spy(0), 1: spy(1)})
    problems = model.capture(tokens)
    assert len(problems) == 2
    for layer, problem in enumerate(problems):
        assert problem.q.shape == (*batch, 3, 2, 7, 4)
        assert problem.k.shape == problem.v.shape == (*batch, 3, 1, 7, 4)
        assert problem.causal
        assert problem.scale == 0.5
        for name in "qkv":
            np.testing.assert_allclose(getattr(problem, name), getattr(seen[layer], name), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_inputs_of_linear_maps(batch):
    """The inputs of the maps reproduce what the attention sees and, in the last layer, what the model answers."""
    model, tokens = random_model(), random_tokens(*batch, 7)
    inputs, c = model.linear_inputs(tokens), model.config
    assert set(inputs) == {name for name in c.shapes() if name.endswith("proj.weight")}
    for name, x in inputs.items():
        assert x.shape == (7 * 2 ** len(batch), c.shapes()[name][1])
    for layer, problem in enumerate(model.capture(tokens)):
        name = f"model.layers.{layer}.self_attn.v_proj.weight"
        v = np.moveaxis(problem.v[..., 0, :, :], -3, -2)  # heads beside their entries
        np.testing.assert_allclose(inputs[name] @ model.weights[name].T, v.reshape(len(inputs[name]), -1), rtol=1e-5)
    assert inputs[f"model.layers.{layer}.mlp.gate_proj.weight"] is not inputs[name]
    np.testing.assert_array_equal(model.logits(tokens), random_model().logits(tokens))  # nothing is left behind


def test_capture_takes_layers_in_the_order_asked_for():
    model, tokens = random_model(), random_tokens(7)
    first, second = model.capture(tokens)
    assert np.array_equal(model.capture(tokens, layers=[1, 0])[0].q, second.q)
    assert np.array_equal(model.capture(tokens, layers=[0])[0].q, first.q)
    assert not np.allclose(first.q, second.q)
    assert model.capture(tokens, layers=[]) == []
    with pytest.raises(ValueError, match="layer must be in"):
        model.capture(tokens, layers=[2])


def test_logits_of_rotated_heads_depend_on_the_distance_alone():
    problem = random_model().capture([5] * 8, layers=[0])[0]  # one token, repeated: only positions differ
    products = problem.q[1, 0] @ problem.k[1, 0].T
    for distance in range(-3, 4):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=0, atol=1e-13 * np.abs(products).max())
    assert np.ptp(products[:, 0]) > 1e-3 * np.abs(products).max()


@pytest.mark.parametrize("head", range(6))
def test_query_key_is_the_form_of_the_logits_at_one_position(head):
    model = random_model()
    problem = model.capture([11], layers=[0])[0]
    x = model.embedding[11] / np.sqrt(np.mean(model.embedding[11] ** 2) + 1e-5)
    x = x * model.weights["model.layers.0.input_layernorm.weight"]
    form = model.query_key(0, head)
    assert form.shape == (12, 12)
    assert form.rank == 4
    wanted = float(problem.q[head // 2, head % 2, 0] @ problem.k[head // 2, 0, 0])
    assert math.isclose(float(x @ form.dense() @ x), wanted, rel_tol=1e-12)


def test_query_key_refuses_what_is_not_there():
    with pytest.raises(ValueError, match="layer must be in"):
        random_model().query_key(2, 0)
    with pytest.raises(ValueError, match=r"head must be in 0 \.\.\. 5, got 6"):
        random_model().query_key(0, 6)


# -- tokens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "error", "sentence"),
    [
        ([], ValueError, "not be empty"),
        (np.zeros((2, 0), int), ValueError, "not be empty"),
        (3, ValueError, r"got shape \(\)"),
        (np.zeros((1, 1, 2), int), ValueError, r"got shape \(1, 1, 2\)"),
        ([1.0, 2.0], TypeError, "integers, got float64"),
        ([True, False], TypeError, "integers, got bool"),
        ([0, 23], ValueError, r"0 \.\.\. 22, got 0 \.\.\. 23"),
        ([-1, 3], ValueError, r"0 \.\.\. 22, got -1 \.\.\. 3"),
        (np.zeros(33, int), ValueError, "got 33 tokens, the model takes at most 32"),
        ("text", ValueError, r"no tokenizer\.json beside the weights"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(tokens, error, sentence):
    model = random_model()
    for ask in (model.logits, model.capture):
        with pytest.raises(error, match=sentence):
            ask(tokens)


def test_a_loss_needs_two_tokens():
    with pytest.raises(ValueError, match="at least two tokens"):
        random_model().loss([1])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_tokens_of_any_integer_type(dtype):
    tokens = random_tokens(5)
    assert np.array_equal(random_model().logits(tokens.astype(dtype)), random_model().logits(tokens.tolist()))


# -- configurations ------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_layout():
    sizes = {k: SMALL[k] for k in list(SMALL)[:7]} | {"hidden_size": 24}
    config = LlamaConfig.from_json(sizes)
    assert (config.num_key_value_heads, config.head_dim, config.max_position_embeddings) == (6, 4, 2048)
    assert (config.rms_norm_eps, config.rotary) == (1e-6, Rotary(10000.0))
    assert {config.tie_word_embeddings, config.attention_bias, config.mlp_bias} == {False}
    assert config.group == 1


def test_older_and_newer_files_say_the_same_of_rotary_positions():
    old = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    wanted = Rotary(100.0, "llama3", 4.0, 1.0, 4.0, 16)
    assert LlamaConfig.from_json(SMALL | {"rope_parameters": LLAMA3}).rotary == wanted
    assert LlamaConfig.from_json(SMALL | {"rope_scaling": old}).rotary == wanted
    linear = {"type": "linear", "factor": 2.0}
    assert LlamaConfig.from_json(SMALL | {"rope_scaling": linear}).rotary == Rotary(100.0, "linear", 2.0)
    assert LlamaConfig.from_json(SMALL | {"rope_scaling": None}).rotary == Rotary(100.0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2' .* not supported; model_type 'llama'"),
        ({"model_type": None}, "model_type = None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "'LlamaForSequenceClassification'.* not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"vocab_size": None}, "'vocab_size' is missing"),
        ({"hidden_size": 0}, "hidden_size = 0 is not a positive integer"),
        ({"head_dim": 3}, "head_dim = 3 is odd"),
        ({"num_key_value_heads": 4}, "num_attention_heads = 6 is no multiple"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers = '2'"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps = -1.0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes'"),
        ({"rope_theta": math.inf}, "rope_theta = inf"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "type 'yarn' is not supported; default, linear, llama3"),
        ({"rope_scaling": {"type": "linear"}}, "'factor' is missing"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "low_freq_factor = 1.0 is not below"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_theta": 1e4, "rope_parameters": LLAMA3}, "rope_theta = 10000.0 contradicts rope_parameters"),
        ({"rope_scaling": {"type": "yarn"}, "rope_parameters": LLAMA3}, "rope_scaling = .* contradicts"),
        ({"rope_parameters": [1]}, r"rope_parameters = \[1\]"),
    ],
)
def test_a_config_that_asks_for_something_else_is_refused(tmp_path, changes, sentence):
    (tmp_path / "config.json").write_text(json.dumps(SMALL | changes))
    with pytest.raises(CheckpointError, match=rf"config\.json.*{sentence}"):
        LlamaConfig.from_json(tmp_path / "config.json")


# -- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [True, False])
def test_a_loaded_model_is_the_model_that_was_saved(tmp_path, keep):
    weights = random_weights(LlamaConfig.from_json(SMALL), np.float16)
    model = load_llama(write_checkpoint(tmp_path, weights), keep=keep)
    wanted = LlamaModel(model.config, {k: w.astype(np.float32) for k, w in weights.items()})
    tokens = random_tokens(9)
    for _ in range(2):
        assert np.array_equal(model.logits(tokens), wanted.logits(tokens))
    name = "model.layers.1.mlp.up_proj.weight"
    assert (model.weights[name] is model.weights[name]) == keep
    assert model.embedding is model.embedding
    assert set(model.weights) == set(weights)


def test_weights_are_read_when_they_are_needed(tmp_path):
    weights = random_weights(LlamaConfig.from_json(SMALL), np.float32)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
    model = load_llama(write_checkpoint(tmp_path, weights))
    assert model.query_key(1, 0).shape == (12, 12)
    assert len(model.capture(random_tokens(5))) == 2  # the last feed-forward part is not needed for it
    with pytest.raises(
        CheckpointError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' in .*model\.safetensors has 1"
    ):
        model.logits(random_tokens(5))


def test_a_wrong_shape_and_a_missing_weight_are_named_at_once(tmp_path):
    weights = random_weights(LlamaConfig.from_json(SMALL), np.float32)
    write_checkpoint(tmp_path, weights, hidden_size=18)
    with pytest.raises(
        CheckpointError, match=r"embed_tokens\.weight' in .*has shape \(23, 12\), its config\.json asks for"
    ):
        load_llama(tmp_path)
    write_checkpoint(tmp_path, weights, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"model\.safetensors holds no tensor 'lm_head\.weight'"):
        load_llama(tmp_path)
    write_checkpoint(tmp_path, weights | {"model.norm.weight": np.ones(12, np.int8)})
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' in .*stored as int8"):
        load_llama(tmp_path)


def test_a_tied_head_that_differs_from_the_embedding_is_refused(tmp_path):
    weights = random_weights(LlamaConfig.from_json(SMALL), np.float32)
    embedding = weights["model.embed_tokens.weight"]
    load_llama(write_checkpoint(tmp_path, weights | {"lm_head.weight": embedding.copy()}))
    write_checkpoint(tmp_path, weights | {"lm_head.weight": 2 * embedding})
    with pytest.raises(CheckpointError, match=r"config\.json ties lm_head\.weight .* set tie_word_embeddings to false"):
        load_llama(tmp_path)


@pytest.mark.parametrize("dtype", ["int32", "bfloat16", np.int64, "nonsense"])
def test_a_dtype_that_cannot_compute_is_refused(tmp_path, dtype):
    write_checkpoint(tmp_path, random_weights(LlamaConfig.from_json(SMALL), np.float32))
    with pytest.raises(TypeError, match="dtype must be a floating dtype"):
        load_llama(tmp_path, dtype=dtype)


def test_weights_given_by_hand_are_checked():
    model = random_model()
    weights = dict(model.weights)
    with pytest.raises(ValueError, match=r"'lm_head\.weight'"):
        LlamaModel(LlamaConfig.from_json(SMALL | {"tie_word_embeddings": False}), weights)
    with pytest.raises(ValueError, match=r"'model\.norm\.weight'\] has shape \(3,\)"):
        LlamaModel(model.config, weights | {"model.norm.weight": np.ones(3)})
    with pytest.raises(ValueError, match="use one dtype"):
        LlamaModel(model.config, weights | {"model.norm.weight": np.ones(12, np.float32)})


def test_nothing_optional_is_imported():
    code = (
        "import sys, nla_llm.problems.embedded, nla_llm.problems.llama, nla_llm.problems.checkpoint\n"
        "print(sorted({'torch', 'transformers', 'tokenizers', 'scipy', 'sympy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603 - own code
    assert done.stdout.strip() == "[]"


# -- transformers --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("tokenizers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other people's imports
        found = pytest.importorskip("transformers")
        found.LlamaForCausalLM  # noqa: B018 - loads it here, under this filter
    found.utils.logging.disable_progress_bar()
    return found


@pytest.mark.hf
@pytest.mark.filterwarnings("ignore")  # of other people's code
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers(transformers, tmp_path, variant, dtype):
    import torch

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(SMALL | {"initializer_range": 0.3} | VARIANTS[variant]))
    theirs = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    for name, p in theirs.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
    theirs.save_pretrained(tmp_path, max_shard_size="2KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    tokens = random_tokens(2, 24)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(tokens)).logits.numpy()
    ours = load_llama(tmp_path)
    assert ours.weights.checkpoint.stored_dtype("model.norm.weight") == dtype
    found = ours.logits(tokens)
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())

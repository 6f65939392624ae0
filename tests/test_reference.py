"""The judge judged: against transformers' golden logits, known numbers, and deliberate mistakes."""

import functools
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from tests import reference, tiny
from tests.oracle import draw

rng = np.random.default_rng(0)
right = {name: getattr(reference, name) for name in dir(reference)}  # before any patch


@functools.cache
def golden(name):
    case = tiny.read_golden(name)
    return case, case.tensors()


def golden_error(name):
    """Largest distance of the reference from the golden logits."""
    case, tensors = golden(name)
    ours = reference.logits(case.config, tensors, case.tokens)
    return abs(ours[:, case.first_row :] - case.logits).max()


def decode_error(name):
    case, tensors = golden(name)
    ours = reference.logits(case.config, tensors, case.tokens)
    return abs(ours[:, case.decode_from :] - case.decode_logits).max()


@pytest.mark.parametrize("name", tiny.golden_names())
def test_matches_transformers(name):
    assert golden_error(name) < 1e-4


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_matches_transformers_through_its_cache(name):
    assert decode_error(name) < 1e-4


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_same_greedy_tokens(name):
    case, tensors = golden(name)
    whole = np.concatenate([case.tokens[:, : case.prompt], case.greedy], axis=1)
    likeliest = reference.logits(case.config, tensors, whole).argmax(-1)
    np.testing.assert_array_equal(likeliest[:, case.prompt - 1 : -1], case.greedy)
    chunk = case.config["attention_chunk_size"]
    assert whole.shape[1] // chunk - case.prompt // chunk >= 3


# Mistakes that implementations of this model are known to make. Each replaces a function of the
# reference, and the golden file beside its name must see the difference.


def scaled(*factors):
    scaling = tiny.rope_scaling(*factors)
    return {"frequencies": lambda config: right["frequencies"](config | {"rope_scaling": scaling})}


def unscaled(config):
    return right["frequencies"](config | {"rope_scaling": None})


def half_split(x, positions, freqs):
    """Pairs feature m with m + d/2."""
    order = np.arange(x.shape[-1]).reshape(2, -1).T.ravel()
    return right["rotate"](x[..., order], positions, freqs)[..., np.argsort(order)]


def sees(local_of=lambda local: local):
    """`visible` with another idea of which layers are local."""

    def visible(config, local, positions, segments):
        return right["visible"](config, local_of(local), positions, segments)

    return {"visible": visible}


def sliding_window(config, local, positions, segments):
    seen = right["visible"](config, False, positions, segments)
    distance = positions[:, :, None] - positions[:, None, :]
    return seen & (distance < config["attention_chunk_size"]) if local else seen


def decodes_with(seen_by_step):
    """Queries after the 10 prefilled tokens see `seen_by_step(positions)` on local layers."""

    def visible(config, local, positions, segments):
        seen = right["visible"](config, local, positions, segments)
        step = positions[:, :, None] >= 10
        return np.where(step & local, seen_by_step(positions), seen)

    return visible


def whole_cache(positions):
    return positions[:, :, None] >= positions[:, None, :]


def first_key(positions):
    """As if the one decoded row of the mask were row 0."""
    return positions[:, None, :] == 0


def temperature_at(positions_of):
    return {"temperature": lambda c, p: right["temperature"](c, positions_of(p))}


def temperature_with(**fixed):
    return {"temperature": lambda c, p: right["temperature"](c | fixed, p)}


def temperature_everywhere(x, positions, freqs):
    """Scales rotated queries too; 8 heads are queries, 4 are keys."""
    case, _ = golden("temperature_steps")
    factor = right["temperature"](case.config, positions)[..., None, None]
    return right["rotate"](x, positions, freqs) * (factor if x.shape[2] == 8 else 1)


def norm_over_all_heads(config, x):
    flat = x.reshape(*x.shape[:2], -1)
    return right["rms_norm"](flat, config["rms_norm_eps"]).reshape(x.shape)


def norm_every_layer(q, k, v, seen, eps=0.1):
    q, k = right["rms_norm"](q, eps), right["rms_norm"](k, eps)
    return right["softmax_attention"](q, k, v, seen)


def tiled_heads(q, k, v, seen):
    """Query head j reads key/value head j % K."""
    k, v = (np.tile(t, (1, 1, q.shape[2] // t.shape[2], 1)) for t in (k, v))
    return right["softmax_attention"](q, k, v, seen)


def softmax_over_all(logits, top_k):
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return weights * (right["route"](logits, top_k) > 0)


def renormalised(logits, top_k):
    scores = right["route"](logits, top_k)
    return scores / scores.sum(-1, keepdims=True)


def on_output(w, e, x, score):
    return score * right["routed"](w, e, x, 1.0)


def on_both(w, e, x, score):
    return score * right["routed"](w, e, x, score)


def up_half_first(w, e, x, score):
    gate_up = np.roll(w["feed_forward.experts.gate_up_proj"][e], 64, axis=-1)
    return right["routed"]({**w, "feed_forward.experts.gate_up_proj": {e: gate_up}}, e, x, score)


MISTAKES = {
    # Rotary frequencies.
    "rope_8_4_for_16_1": ("rope_factors", scaled(8.0, 1.0, 4.0)),
    "rope_high_freq_factor_4": ("rope_factors", scaled(16.0, 1.0, 4.0)),
    "rope_scaling_ignored": ("rope_factors", {"frequencies": unscaled}),
    "rope_ramp_as_threshold": ("rope_ramp", scaled(8.0, 1.0, 1.0)),
    "rope_16_1_without_scaling": ("rope_unscaled", scaled()),
    "rope_8_4_without_scaling": ("rope_unscaled", scaled(8.0, 1.0, 4.0)),
    "rope_pairs_half_split": ("rope_factors", {"rotate": half_split}),
    # Which layers are local, and what they see.
    "chunks_on_global_layers_only": ("chunk_layers", sees(lambda local: not local)),
    "chunks_on_all_layers": ("chunk_layers", sees(lambda local: True)),
    "chunks_on_no_layer": ("chunk_layers", sees(lambda local: False)),
    "window_for_chunk": ("chunk_layers", {"visible": sliding_window}),
    "global_at_first_of_four": ("global_layers", {"is_local": lambda config, i: i % 4 != 0}),
    "no_global_layer": ("global_layers", {"is_local": lambda config, i: True}),
    "layer_list_ignored": ("layer_lists", {"is_local": lambda config, i: (i + 1) % 4 != 0}),
    "layer_list_inverted": ("layer_lists", {"is_local": lambda c, i: not c["no_rope_layers"][i]}),
    "heads_tiled": ("chunk_layers", {"softmax_attention": tiled_heads}),
    # Temperature.
    "temperature_absent": ("temperature_steps", temperature_at(lambda p: 0 * p)),
    "temperature_absent_by_default": ("scout", temperature_at(lambda p: 0 * p)),
    "temperature_position_off_by_one": ("temperature_steps", temperature_at(lambda p: p - 1)),
    "temperature_bfloat16_positions": (
        "temperature_edge",
        temperature_at(lambda p: p.astype(ml_dtypes.bfloat16).astype(int)),
    ),
    "temperature_floor_fixed": ("temperature_steps", temperature_with(floor_scale=8192)),
    "temperature_scale_fixed": ("temperature_edge", temperature_with(attn_scale=0.1)),
    "temperature_on_local_layers": ("temperature_steps", {"rotate": temperature_everywhere}),
    # QK norm.
    "qk_norm_absent": ("qk_norm", {"qk_norm": lambda config, x: x}),
    "qk_norm_fixed_eps": ("qk_norm", {"qk_norm": lambda config, x: right["rms_norm"](x, 1e-6)}),
    "qk_norm_over_all_heads": ("qk_norm", {"qk_norm": norm_over_all_heads}),
    "qk_norm_on_global_layers": (
        "qk_norm",
        {"qk_norm": lambda config, x: x, "softmax_attention": norm_every_layer},
    ),
    "qk_norm_though_off": ("rope_unscaled", {"softmax_attention": norm_every_layer}),
    # Experts.
    "score_on_expert_output": ("router", {"routed": on_output}),
    "score_on_input_and_output": ("router", {"routed": on_both}),
    "score_softmax": ("router", {"route": softmax_over_all}),
    "score_renormalised": ("router", {"route": renormalised}),
    "score_renormalised_over_top_2": ("router_top2", {"route": renormalised}),
    "second_expert_dropped": ("router_top2", {"route": lambda x, k: right["route"](x, 1)}),
    "up_half_first": ("router", {"routed": up_half_first}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_golden_sees_mistake(mistake, monkeypatch):
    name, patches = MISTAKES[mistake]
    for function, wrong in patches.items():
        monkeypatch.setattr(reference, function, wrong)
    assert golden_error(name) > 1e-2


@pytest.mark.parametrize("seen_by_step", [whole_cache, first_key])
def test_golden_sees_decode_mistake(seen_by_step, monkeypatch):
    monkeypatch.setattr(reference, "visible", decodes_with(seen_by_step))
    assert decode_error("scout") > 1e-2


def test_golden_files_are_small():
    assert sum(path.stat().st_size for path in tiny.GOLDEN.iterdir()) < 1_500_000


def test_qk_norm_commutes_with_rotation():
    """Each head's norm survives rotation, so norm before RoPE is no mistake to look for."""
    config = tiny.scout_like()
    x, positions = rng.standard_normal((1, 5, 2, 16)), np.arange(5)[None]
    freqs = reference.frequencies(config)
    before = reference.rotate(reference.qk_norm(config, x), positions, freqs)
    after = reference.qk_norm(config, reference.rotate(x, positions, freqs))
    np.testing.assert_allclose(before, after, atol=1e-12)


# Padding, packing and far positions, where transformers is no judge.


def left_padded(case, pads):
    tokens = np.pad(case.tokens, ((0, 0), (pads, 0)), constant_values=7)
    segments = np.pad(np.ones_like(case.tokens), ((0, 0), (pads, 0)))
    return tokens, segments


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_left_padding_changes_nothing(name):
    case, tensors = golden(name)
    tokens, segments = left_padded(case, pads=5)
    padded = reference.logits(case.config, tensors, tokens, segments)
    assert abs(padded[:, 5:] - case.logits).max() < 1e-4
    assert not padded[:, :5].any()


def test_golden_sees_positions_that_count_padding(monkeypatch):
    case, tensors = golden("scout")
    monkeypatch.setattr(
        reference, "segment_positions", lambda s: np.arange(s.size).reshape(s.shape)
    )
    tokens, segments = left_padded(case, pads=5)
    padded = reference.logits(case.config, tensors, tokens[:1], segments[:1])
    assert abs(padded[:, 5:] - case.logits[:1]).max() > 1e-2


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_packed_rows_do_not_meet(name):
    case, tensors = golden(name)
    tokens = np.concatenate([*case.tokens, [0, 0]])[None]
    segments = np.repeat([1, 2, 0], [60, 60, 2])[None]
    packed = reference.logits(case.config, tensors, tokens, segments)
    assert abs(packed[0, :120].reshape(2, 60, -1) - case.logits).max() < 1e-4


def test_local_layers_repeat_at_ten_million():
    """With local layers alone, a chunk's logits do not depend on which chunk it is."""
    config = tiny.scout_like(num_hidden_layers=3)
    tensors = tiny.random_tensors(config, 0)
    tokens = rng.integers(0, 128, (1, 48))  # 3 chunks
    near = np.arange(48)[None]
    far = near + 10_485_760 - 48  # the last positions of the context
    first = reference.logits(config, tensors, tokens, positions=near)
    last = reference.logits(config, tensors, tokens, positions=far)
    np.testing.assert_allclose(last, first, atol=1e-7)


# Numbers of the published models.


def test_published_frequencies():
    scout = reference.frequencies(tiny.published_scout())
    maverick = reference.frequencies(tiny.published_maverick())
    for freqs in (scout, maverick):
        assert freqs[[0, 1, 34]] == pytest.approx([1.0, 0.8146172, 9.384739e-4], rel=1e-6)
    assert scout[[35, 63]] == pytest.approx([4.778106e-5, 1.534463e-7], rel=1e-6)
    assert maverick[35] == pytest.approx(7.644970e-4, rel=1e-6)
    np.testing.assert_allclose(scout[35:] * 16, maverick[35:])
    np.testing.assert_array_equal(scout[:35], maverick[:35])


def test_frequencies_of_the_newer_spelling():
    older = tiny.scout_like()
    rope = {**older["rope_scaling"], "rope_theta": older["rope_theta"]}
    newer = {k: v for k, v in older.items() if k not in ("rope_theta", "rope_scaling")}
    found = reference.frequencies(newer | {"rope_parameters": rope})
    np.testing.assert_array_equal(found, reference.frequencies(older))


@pytest.mark.parametrize(
    ("position", "factor"),
    [
        (0, 1.0),
        (8190, 1.0),
        (8191, 1.069315),
        (16382, 1.069315),
        (16383, 1.109861),
        (32767, 1.160944),
        (131071, 1.283321),
        (1048575, 1.485981),
        (10485759, 1.715540),
    ],
)
def test_published_temperature(position, factor):
    found = reference.temperature(tiny.published_scout(), np.array([[position]]))
    assert found.item() == pytest.approx(factor, abs=1e-6)


@pytest.mark.parametrize(
    ("config", "names", "parameters"),
    [
        (tiny.published_scout(), 579, 107_769_861_120),
        (tiny.published_maverick(), 507, 400_711_848_960),
    ],
    ids=["scout", "maverick"],
)
def test_published_tensors(config, names, parameters):
    shapes = tiny.tensor_shapes(config)
    assert len(shapes) == names
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters


def test_published_layers():
    scout, maverick = tiny.published_scout(), tiny.published_maverick()
    everywhere = range(48)
    for config in (scout, maverick):
        globals_ = [i for i in everywhere if not reference.is_local(config, i)]
        assert globals_ == [3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47]
    assert all(reference.is_moe(scout, i) for i in everywhere)
    assert [i for i in everywhere if reference.is_moe(maverick, i)] == list(range(1, 48, 2))


# The helpers that other tests build on.


def test_nested_checkpoint_is_the_same_model():
    config = tiny.maverick_like(num_hidden_layers=2)
    tensors = tiny.random_tensors(config, 0)
    tokens = rng.integers(0, 128, (1, 9))
    plain = reference.logits(config, tensors, tokens)
    np.testing.assert_array_equal(reference.logits(*tiny.nested(config, tensors), tokens), plain)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_written_checkpoint_reads_back(tmp_path, shards, dtype):
    config = tiny.maverick_like(num_hidden_layers=2)
    tensors = tiny.random_tensors(config, 0, dtype)
    tiny.write_checkpoint(tmp_path, config, tensors, shards)
    assert json.loads((tmp_path / "config.json").read_text()) == config
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == shards
    where = dict.fromkeys(tensors, "model.safetensors")
    if shards > 1:
        where = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert where.keys() == tensors.keys()
    for name, tensor in tensors.items():
        with safe_open(tmp_path / where[name], "flax") as file:
            assert np.asarray(file.get_tensor(name)).tobytes() == tensor.tobytes()


@pytest.mark.parametrize("seed", range(3))
def test_draw_is_fair(seed):
    config, tokens, info = draw.draw(seed)
    again = draw.draw(seed)
    assert again[0] == config and again[2] == info
    np.testing.assert_array_equal(again[1], tokens)
    assert tokens.shape[1] > 3 * config["attention_chunk_size"]
    assert 0 < info["decode_from"] < tokens.shape[1]
    assert info["router_gap"] >= draw.ROUNDING

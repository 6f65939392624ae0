"""Choosing tokens without sorting: as a plain reference does, on every mesh, in little memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxmoe.generation import vocab
from jaxmoe.generation.counts import Counts, new_counts
from jaxmoe.generation.sampler import Bias, Choice, Draws, Penalties, choose, keep_likely
from jaxmoe.generation.sampling import NO_TOKEN
from jaxmoe.mesh import MeshConfig
from pallas_kernels.compile.absent import absent_h100s, compiler_options
from pallas_kernels.platform import Target
from tests.conftest import one_device
from tests.isolation import assert_isolated, put

V = 202_048  # Llama 4's vocabulary
CHI_SQUARE_999 = {5: 20.52}  # exceeded once in 1000 by chance; degrees of freedom
QUARTERS = [0.0, 0.0, 0.0, 0.0]  # four tokens of probability exactly 1/4


@pytest.fixture(params=["cpu", "gpu"])
def platform(request, monkeypatch):
    """Passes that find one digit of two, and those of accelerators, which find more at once."""
    monkeypatch.setattr(vocab, "target", lambda: Target(request.param, "", None))


def row_draws(rows, **fields):
    """Draws with rows of these numbers, others as if they were not there."""
    fields = {"seed": 0, "request": np.arange(rows), "index": 0, "temperature": 1} | fields
    dtypes = {"seed": np.int32, "request": np.uint32, "index": np.int32, "top_k": np.int32}
    return Draws(
        **{
            name: jnp.asarray(np.broadcast_to(x, rows).astype(dtypes.get(name, np.float32)))
            for name, x in fields.items()
        }
    )


def kept(logits, **fields):
    """The tokens of one row that its settings keep."""
    values = jnp.asarray(logits, jnp.float32)[None]
    part = vocab.this_part(len(logits), len(logits))
    return np.flatnonzero(
        np.isfinite(keep_likely(part, values, row_draws(1, **fields))[0])
    ).tolist()


class Mix:
    """Rows with settings of their own, logits of many ties, and all that can change them.

    Logits are multiples of 1/32 after all changes, so that equal ones are so in any precision.
    """

    def __init__(self, rows, size, seed):
        rng = np.random.default_rng(seed)
        self.logits = rng.integers(-12, 7, (rows, size)).astype(np.float32) / 2
        self.draws = row_draws(
            rows,
            seed=rng.integers(0, 2**31, rows),
            request=rng.integers(0, 2**32, rows),
            index=rng.integers(0, 1000, rows),
            temperature=rng.choice([0, 0.5, 1, 2, 4], rows),
            top_k=rng.choice([0, 1, 2, 5, 30, size, 2 * size], rows),
            top_p=np.where(rng.random(rows) < 0.3, 1, rng.random(rows) + 1e-6),
            min_p=np.where(rng.random(rows) < 0.5, 0, rng.random(rows) ** 4),
        )
        self.penalties = Penalties(
            *(jnp.asarray(rng.choice(x, rows), jnp.float32) for x in ([1, 2], [0, 0.75], [0, 0.25]))
        )
        self.drafts = np.random.default_rng(seed + 1).integers(-1, size, (rows, 3), np.int32)
        self.penalties = self.penalties._replace(drafts=jnp.asarray(self.drafts))
        ids, values = rng.integers(-1, size, (rows, 4)), rng.choice([-np.inf, -3, 2.5], (rows, 4))
        self.bias = Bias(jnp.asarray(ids, jnp.int32), jnp.asarray(values, jnp.float32))
        self.allowed = rng.random((rows, size)) < 0.8
        self.allowed[:, 0] = self.allowed[:, -1] = True
        self.generated = rng.poisson(0.4, (rows, size)).astype(np.int16)
        self.prompt = rng.random((rows, size)) < 0.3

    @property
    def choice(self):
        return Choice(self.draws, self.penalties, self.bias, words(self.allowed))

    def counts(self):
        """On the current mesh, and the batch's rows in reverse order there."""
        counts = new_counts(*self.logits.shape)
        extra = ((0, 0), (0, counts.prompt.shape[1] - self.logits.shape[1]))
        return Counts(
            *(jnp.pad(jnp.asarray(x[::-1]), extra) for x in (self.generated, self.prompt))
        )

    def choose(self, top=None):
        rows = jnp.arange(len(self.logits))[::-1]
        run = jax.jit(functools.partial(choose, top=top))
        return run(jnp.asarray(self.logits), self.choice, self.counts(), rows)

    def reference(self, i):
        """The token of row i: sorted, in float64, with the noise of jax.random."""
        draws = Draws(*(np.asarray(x)[i] for x in self.draws))
        logits = self._changed(i)
        if np.isneginf(logits.max()):
            return NO_TOKEN
        if draws.temperature == 0:
            return int(np.argmax(logits))
        values = (logits - logits.max()) / float(draws.temperature)
        values[np.exp(values) < draws.min_p] = -np.inf
        order = np.argsort(-values, kind="stable")
        values[order[draws.top_k or len(order) :]] = -np.inf
        p = np.exp(values[order]) / np.exp(values).sum()
        if draws.top_p < 1:
            values[order[np.cumsum(p) - p > draws.top_p]] = -np.inf
        key = jax.random.key(draws.seed)
        key = jax.random.fold_in(jax.random.fold_in(key, draws.request), draws.index)
        return int(np.argmax(values + np.asarray(jax.random.gumbel(key, values.shape))))

    def _changed(self, i):
        logits = np.where(self.allowed[i], self.logits[i].astype(np.float64), -np.inf)
        for token, value in zip(*(np.asarray(x)[i] for x in self.bias), strict=True):
            if token >= 0:
                logits[token] += value
        factors = self.penalties[:3]
        repetition, presence, frequency = (np.asarray(x)[i].astype(float) for x in factors)
        generated = self.generated[i].copy()
        np.add.at(generated, self.drafts[i][self.drafts[i] >= 0], 1)
        for token in np.flatnonzero((generated > 0) | self.prompt[i]):
            better = logits[token] > 0
            logits[token] *= 1 / repetition if better else repetition
        return logits - frequency * generated - presence * (generated > 0)


def words(allowed):
    """Masks of bits, the first token's the lowest, as llguidance lays them out."""
    extra = -allowed.shape[1] % 32
    bits = np.pad(allowed, ((0, 0), (0, extra)))
    return jnp.asarray(np.packbits(bits, axis=1, bitorder="little").view(np.uint32))


@pytest.mark.parametrize("size", [2, 37, 260])
def test_tokens_are_those_of_a_sorting_reference(size, platform):
    """A hundred rows of their own settings: no filter, penalty or order of them is wrong."""
    mix = Mix(100, size, seed=size)
    tokens = mix.choose().token.tolist()
    assert tokens == [mix.reference(i) for i in range(100)]


@pytest.mark.parametrize(
    ("top_p", "tokens"),
    [(1e-6, [0]), (0.24, [0]), (0.25, [0, 1]), (0.5, [0, 1, 2]), (0.74, [0, 1, 2])],
)
def test_top_p_keeps_a_token_while_the_mass_before_it_is_at_most_p(top_p, tokens, platform):
    """At 0.5 the mass before the third token is exactly 0.5; the mass with it is 0.75."""
    assert kept(QUARTERS, top_p=top_p) == tokens


def test_of_equal_tokens_the_first_are_kept(platform):
    """Seven tokens share the largest value, so that top-k has to choose among them."""
    values = np.full(100, -1.0)
    values[[5, 17, 30, 31, 32, 64, 99]] = 0
    assert kept(values, top_k=1) == [5]
    assert kept(values, top_k=4) == [5, 17, 30, 31]
    assert kept(values, top_k=8) == [0, 5, 17, 30, 31, 32, 64, 99]
    assert kept(values, top_k=0) == kept(values, top_k=101) == list(range(100))


def test_negative_zero_equals_zero(platform):
    """A difference that underflows; its bits are those of the least negative number."""
    assert kept([-0.0, 0.0, -1.0], top_k=1) == [0]
    assert kept([0.0, -0.0, -1.0], top_k=1) == [0]


def test_top_p_is_of_what_top_k_keeps(platform):
    """Top-k keeps two of 0.4, 0.3, 0.2, 0.1 as 4/7 and 3/7; among all tokens 0.5 needs both."""
    values = np.log([0.4, 0.3, 0.2, 0.1]) - np.log(0.4)
    assert kept(values, top_p=0.5) == [0, 1]
    assert kept(values, top_p=0.5, top_k=2) == [0]


def test_min_p_is_part_of_the_largest_and_comes_before_top_p(platform):
    values = np.log([0.4, 0.3, 0.2, 0.1]) - np.log(0.4)
    assert kept(values, min_p=0.7) == [0, 1]
    assert kept(values, min_p=1.0) == [0]
    assert kept(values, min_p=0.7, top_p=0.5) == [0]
    assert kept(values, min_p=0.0) == [0, 1, 2, 3]


def test_top_p_adds_what_is_too_small_for_float32():
    """200,000 tokens of 1e-8 are 0.002 together; added one by one to 1 they would be nothing."""
    values = np.full(200_001, np.log(1e-8))
    values[100_000] = 0
    assert kept(values, top_p=0.998) == [100_000]
    top_p = (1 + 50_000e-8) / (1 + 200_000e-8)
    assert abs(len(kept(values, top_p=top_p)) - 50_000) < 20  # float32's top_p is that inexact


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logit_that_is_not_finite_gives_no_token_to_its_row_alone(temperature):
    """Catches one NaN among many numbers, which a maximum may drop."""
    logits = np.random.default_rng(0).standard_normal((5, 1000), np.float32)
    choice = Choice(row_draws(5, temperature=temperature, top_k=50, top_p=0.9, min_p=0.01))
    run = jax.jit(functools.partial(choose, top=3))
    want = run(logits, choice)
    for value in (np.nan, np.inf, -np.inf):
        got = run(put(logits, ([1, 3], [500, 999]), value), choice)
        hit = np.array([False, True, False, True, False])
        for one, other in zip(got, want, strict=True):
            assert_isolated(one, other, hit)
        assert (np.asarray(got.token)[hit] == NO_TOKEN).all()
        assert np.isnan(np.asarray(got.logprob)[hit]).all()
        assert (np.asarray(got.top_ids)[hit] == NO_TOKEN).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_token_is_left(temperature):
    """By mask and by bias; if none is left there is no token, though logits are finite."""
    logits = np.random.default_rng(1).standard_normal((3, 70), np.float32)
    draws = row_draws(3, temperature=temperature, top_k=3, top_p=0.5)
    allowed = np.zeros((3, 70), bool)
    allowed[0, 69] = allowed[1, [32, 40]] = True
    bias = Bias(jnp.array([[40, -1]] * 3), jnp.array([[-jnp.inf, 5.0]] * 3))
    run = jax.jit(functools.partial(choose, top=1))
    chosen = run(jnp.asarray(logits), Choice(draws, None, bias, words(allowed)))
    assert chosen.token.tolist() == [69, 32, NO_TOKEN]
    assert np.isfinite(chosen.logprob).tolist() == [True, True, False]
    assert chosen.top_ids[:, 0].tolist() == logits.argmax(1).tolist()


def test_rows_of_the_batch_do_not_matter():
    """Each row alone and the batch turned round give the same tokens."""
    mix = Mix(16, 64, seed=5)
    choice = mix.choice._replace(penalties=None)
    run = jax.jit(choose)
    together = run(jnp.asarray(mix.logits), choice).token
    order = np.random.default_rng(0).permutation(16)
    turned = run(jnp.asarray(mix.logits[order]), jax.tree.map(lambda x: x[order], choice))
    np.testing.assert_array_equal(turned.token, together[order])
    for i in (0, 9):
        alone = run(mix.logits[i : i + 1], jax.tree.map(lambda x, i=i: x[i : i + 1], choice))
        assert alone.token.tolist() == [together[i]]


def chi_square(counts, probabilities):
    expected = counts.sum() * probabilities
    return ((counts - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_frequencies_are_the_probabilities_that_are_kept(temperature):
    """The same counts reject a temperature that is a quarter off: the test can fail."""
    probabilities = np.array([0.3, 0.02, 0.2, 0.15, 0.14, 0.11, 0.08])  # the second is left out
    rows, logits = 30_000, np.log(probabilities).astype(np.float32)
    draws = row_draws(rows, temperature=temperature, top_k=6)
    tokens = jax.jit(choose)(jnp.broadcast_to(logits, (rows, 7)), Choice(draws)).token
    counts = np.delete(np.bincount(tokens, minlength=7), 1)

    def kept_probabilities(temperature):
        weights = np.delete(probabilities, 1) ** (1 / temperature)
        return weights / weights.sum()

    assert counts.sum() == rows
    assert chi_square(counts, kept_probabilities(temperature)) < CHI_SQUARE_999[5]
    assert chi_square(counts, kept_probabilities(1.25 * temperature)) > 2 * CHI_SQUARE_999[5]


def test_seed_request_and_index_each_change_the_draw():
    """One after another by one, over 200 rows: a sum of them would repeat tokens."""
    logits = jnp.zeros((200, 1000))
    evens, run = 2 * np.arange(200), jax.jit(choose)
    tokens = [
        run(logits, Choice(row_draws(200, seed=s, request=evens + r, index=7 + i))).token
        for s, r, i in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    for one in range(4):
        for other in range(one):
            assert (tokens[one] == tokens[other]).sum() < 5


@pytest.mark.runs_long  # programs compiled in full: those that users get
@pytest.mark.parametrize(
    ("mesh", "size"), [("tensor=8", 1003), ("data=2,tensor=4", 1003), ("tensor=8", 1024)]
)
def test_tokens_do_not_depend_on_the_mesh(mesh, size):
    """Bits of everything, with and without a vocabulary that the mesh divides."""
    mix = Mix(16, size, seed=size)
    mix.logits += np.random.default_rng(2).standard_normal(mix.logits.shape).astype(np.float32)
    with jax.set_mesh(one_device()):
        want = mix.choose(top=20)
    with jax.set_mesh(MeshConfig.parse(mesh).make()):
        got = mix.choose(top=20)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


def abstract(mesh, rows):
    """Arguments of all parts, the vocabulary sharded."""

    def array(dtype, *shape, spec=()):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    sharded, by_row = PartitionSpec(None, "tensor"), PartitionSpec()
    number = functools.partial(array, spec=by_row)
    f32, i32, u32 = jnp.float32, jnp.int32, jnp.uint32
    kinds = (i32, u32, i32, f32, i32, f32, f32)
    choice = Choice(
        Draws(*(number(kind, rows) for kind in kinds)),
        Penalties(*(number(f32, rows) for _ in range(3))),
        Bias(number(i32, rows, 8), number(f32, rows, 8)),
        number(u32, rows, -(-V // 32)),
    )
    counts = Counts(*(array(kind, 64, V, spec=sharded) for kind in (jnp.int16, bool)))
    return array(f32, rows, V, spec=sharded), choice, counts, number(i32, rows)


def lower(mesh, rows, top):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(functools.partial(choose, top=top)).lower(*abstract(mesh, rows))


def sorts(text):
    """The longest dimension of what each sort or top-k works on."""
    lines = re.findall(r"(?i).*(?: sort\(|stablehlo\.sort|topk|chlo\.top_k).*", text)
    sizes = (re.findall(r"(?<=[\[,<x])\d+(?=[\],x])", line) for line in lines)
    return [max(map(int, found), default=0) for found in sizes]


@pytest.mark.reads_compiled
def test_no_device_holds_or_sorts_the_vocabulary():
    """Each of eight devices has an eighth. Only the top-20 of each are merged by sorting."""
    rows = 8
    lowered = lower(MeshConfig.parse("tensor=8").make(), rows, 20)
    compiled = lowered.compile()
    text = compiled.as_text()
    assert f"[{rows},{V // 8}]" in text and not re.search(rf"[\[,]{V}[,\]]", text)
    assert sorts(lowered.as_text()) == [8 * 20]
    shard = rows * V // 8 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 20 * shard


@pytest.mark.reads_compiled
def test_one_device_does_not_sort_the_vocabulary():
    lowered = lower(one_device(), 8, 20)
    for text in (lowered.as_text(), lowered.compile().as_text()):
        assert str(V) in text and not sorts(text)
    assert sorts(jax.jit(jnp.argsort).lower(jnp.zeros((2, V))).as_text())  # would be found


@pytest.mark.absent_gpu
def test_a_gpu_chooses_without_the_host():
    """No loop waits for data and nothing branches; temporaries are a few times the logits."""
    mesh = MeshConfig(tensor=8).make(absent_h100s(8))
    compiled = lower(mesh, 8, 20).compile(compiler_options())
    text = compiled.as_text()
    loops = re.findall(r" while\(.*", text)
    assert len(loops) == 5 and all("known_trip_count" in loop for loop in loops)
    assert " conditional(" not in text and all(size <= 160 for size in sorts(text))
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * 8 * V // 8 * 4


def test_penalties_need_counts(untyped):
    mix = Mix(2, 8, seed=0)
    with pytest.raises(ValueError, match="need counts"):
        choose(jnp.asarray(mix.logits), mix.choice)

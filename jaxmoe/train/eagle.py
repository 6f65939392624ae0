"""Training an EAGLE-3 head on the hidden states of its target, which stays as it is.

The head makes its passes from every place of a text at once (`jaxmoe.model.eagle_unroll.unroll`),
and each pass is held against what the target says at its place: the training-time test of Li et
al., arXiv 2503.01840, section 3.2, with the loss of SpecForge.

Shape letters: B rows, S tokens a row, D embed, G draft vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Int32

from jaxmoe import mesh as meshes
from jaxmoe.checkpoint.heads import load_head, read_head_config
from jaxmoe.config import Llama4Config
from jaxmoe.eagle_config import EagleConfig, check_stated, check_target, default_layer_ids
from jaxmoe.errors import UserError
from jaxmoe.model.eagle import abstract_eagle, draft_logits, init_eagle
from jaxmoe.model.eagle_unroll import ahead, unroll
from jaxmoe.model.layers import product
from jaxmoe.model.transformer import forward, positions_of
from jaxmoe.train.config import HeadConfig, TrainConfig
from jaxmoe.train.cross_entropy import token_losses
from jaxmoe.train.data import Batch
from jaxmoe.train.loss import Loss, next_tokens
from jaxmoe.train.metrics import HELD_OUT_LOSS
from jaxmoe.train.step import TARGETS, cast_all

HEAD, TOKEN_IDS = "head", "token_ids"  # beside the target's own parameters
COUNTED = 1000  # batches, at most, whose tokens make the draft vocabulary


class HeadLosses(NamedTuple):
    """A batch's losses; of each pass sums over places, divided by the first pass's targets."""

    total: Float[Array, ""]  # of which the gradient is taken
    by_pass: Float[Array, "passes"]  # nats
    right: Float[Array, "passes"]  # where the head's likeliest token is the target's
    targets: Int[Array, ""]  # of the first pass


def eagle_config(wanted: HeadConfig, target: Llama4Config) -> EagleConfig:
    """The head of a run: that of `wanted.init`, or one of the sizes it gives.

    Raises:
        UserError: if it cannot be read, or does not fit the target.
    """
    if wanted.init is not None:
        config = read_head_config(wanted.init)
        check_target(config, target, wanted.init)
        return config
    layers = target.num_hidden_layers
    config = EagleConfig(
        hidden_size=target.hidden_size,
        intermediate_size=wanted.intermediate_size or target.intermediate_size_mlp,
        num_attention_heads=wanted.num_attention_heads or target.num_attention_heads,
        num_key_value_heads=wanted.num_key_value_heads or target.num_key_value_heads,
        head_dim=wanted.head_dim or target.head_dim,
        vocab_size=target.vocab_size,
        draft_vocab_size=min(wanted.draft_vocab_size, target.vocab_size),
        layer_ids=wanted.layer_ids or default_layer_ids(layers),
        rms_norm_eps=target.rms_norm_eps,
        rope_theta=wanted.rope_theta,
    )
    check_target(config, target, "head")
    return config


def is_head_param(name: str) -> bool:
    """The predicate that trains the head's parameters alone."""
    return name.startswith(f"{HEAD}.")


@dataclasses.dataclass(frozen=True)
class HeadPlan:
    """A run's head before its first step.

    Attributes:
        config: of the head.
        wanted: what the run says of it.
        target: the model's config.
        batches: of the run, whose tokens choose the draft vocabulary.
        count: how many batches the run has.
    """

    config: EagleConfig
    wanted: HeadConfig
    target: Llama4Config
    batches: Callable[[int], Any]
    count: int

    def loss(self) -> Loss:
        """The loss of the run."""
        return head_loss(self.config, self.wanted.passes, self.wanted.decay)

    def abstract(self, shapes: dict, mesh: jax.sharding.Mesh) -> dict:
        """The shapes of the target's parameters with the head's; those that are there stay."""
        everywhere = meshes.sharding(mesh, PartitionSpec())
        ids = jax.ShapeDtypeStruct((self.config.draft_vocab_size,), jnp.int32, sharding=everywhere)
        return {HEAD: abstract_eagle(self.config, mesh, jnp.float32), TOKEN_IDS: ids} | shapes

    def first(self, params: dict, mesh: jax.sharding.Mesh, seed: int) -> dict:
        """The target's parameters with the head's before the first step; those there stay."""
        if HEAD in params:
            return params
        if self.wanted.init is not None:
            head = load_head(self.wanted.init, mesh, self.target, jnp.float32)
            return params | {HEAD: head.params, TOKEN_IDS: head.token_ids}
        shardings = jax.tree.map(
            lambda x: x.sharding, abstract_eagle(self.config, mesh, jnp.float32)
        )
        init = jax.jit(functools.partial(init_eagle, self.config), out_shardings=shardings)
        size, vocab = self.config.draft_vocab_size, self.config.vocab_size
        ids = most_common_tokens(self.batches, min(self.count, COUNTED), vocab, size)
        everywhere = meshes.sharding(mesh, PartitionSpec())
        placed = jax.make_array_from_callback(ids.shape, everywhere, lambda index: ids[index])
        return params | {HEAD: init(jax.random.key(seed)), TOKEN_IDS: placed}


def head_plan(
    config: TrainConfig, target: Llama4Config, batches: Callable[[int], Any]
) -> HeadPlan | None:
    """The head of a run; None if the run trains none.

    Raises:
        UserError: as `eagle_config`; or for layers that the result could not name.
    """
    if config.head is None:
        return None
    count, head = config.steps * config.accumulate, eagle_config(config.head, target)
    check_stated(head.layer_ids, target.num_hidden_layers)  # else the run fails when it is over
    return HeadPlan(head, config.head, target, batches, count)


def most_common_tokens(
    batches: Callable[[int], Any], count: int, vocab: int, size: int
) -> Int32[np.ndarray, "size"]:
    """The tokens that are learned most often in the first batches, ascending.

    Of tokens that are equally common the first of the vocabulary are taken.

    Args:
        batches: the batch of a number.
        count: of batches to count.
        vocab: the target's vocabulary.
        size: tokens to choose.
    """
    if size >= vocab:
        return np.arange(vocab, dtype=np.int32)
    seen = np.zeros(vocab, np.int64)
    for number in range(count):
        tokens, segment_ids, learned, *_ = batches(number)
        counts = np.asarray(segment_ids) != 0
        counts = counts if learned is None else counts & np.asarray(learned)
        seen += np.bincount(np.asarray(tokens)[counts].reshape(-1), minlength=vocab)
    return np.sort(np.argsort(-seen, kind="stable")[:size]).astype(np.int32)


def head_losses(
    config: EagleConfig,
    target: Llama4Config,
    params: dict,
    tokens: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    learned: Bool[Array, "B S"] | None = None,
    *,
    passes: int,
    decay: float,
) -> HeadLosses:
    """Runs the target and the head's passes.

    Pass n at the place t counts where the token t + 2 + n is a target of its text and the target's
    own likeliest token at t + 1 + n is in the draft vocabulary. Its loss is the cross entropy of
    the head's probabilities under the target's, both over the draft vocabulary. The total is the
    sum of the passes' losses times `decay` to the power of n. All are divided by the number of the
    first pass's targets, so that batches count by these.

    Args:
        config: of the head.
        target: the target's config.
        params: the target's, with the head's as `HEAD` and its `TOKEN_IDS`.
        tokens, segment_ids, learned: as of `jaxmoe.train.data.Batch`.
        passes: of the head.
        decay: of each pass's weight.
    """
    positions = positions_of(segment_ids)
    said = forward(target, params, tokens, positions, segment_ids, states=config.layer_ids)
    hidden, states = jax.lax.stop_gradient((said.hidden, cast(jax.Array, said.states)))
    matrix = draft_matrix(target, params)
    likeliest = jnp.argmax(product("BSD,DG->BSG", hidden, matrix), axis=-1)
    likeliest = jnp.take(params[TOKEN_IDS], likeliest)
    can_guess = token_losses(target, params, hidden, likeliest).right
    targets = next_tokens(tokens, segment_ids, learned)[1] & can_guess
    head = params[HEAD]
    found = unroll(config, head, params["embed"], tokens, states, segment_ids, passes)

    @jax.checkpoint  # else logits of all passes are kept
    def of_pass(out, wanted, counts):
        logits = draft_logits(config, head, out)
        said = product("BSD,DG->BSG", wanted, matrix)
        nats = soft_cross_entropy(logits, said)
        right = jnp.argmax(logits, axis=-1) == jnp.argmax(said, axis=-1)
        return tuple(jnp.sum(jnp.where(counts, x, 0.0)) for x in (nats, right))

    sums, numbers = [], []
    for n, out in enumerate(found, start=1):
        counts = ahead(targets, n) & (ahead(segment_ids, n) == segment_ids) & (segment_ids != 0)
        sums.append(of_pass(out, ahead(hidden, n), counts))
        numbers.append(jnp.sum(counts))
    number = numbers[0]
    nats, right = (jnp.stack(x) / jnp.maximum(number, 1) for x in zip(*sums, strict=True))
    weights = jnp.float32(decay) ** jnp.arange(passes)
    return HeadLosses(jnp.sum(weights * nats), nats, right, number)


def draft_matrix(target: Llama4Config, params: dict) -> Float[Array, "D G"]:
    """The columns of the target's last matrix that make the draft vocabulary's logits."""
    if target.tie_word_embeddings:
        columns = jnp.take(params["embed"], params[TOKEN_IDS], axis=0).T
    else:
        columns = jnp.take(params["lm_head"], params[TOKEN_IDS], axis=1)
    return meshes.constrain_param(columns, ("embed", "vocab"))


def soft_cross_entropy(
    logits: Float[Array, "B S G"], wanted: Float[Array, "B S G"]
) -> Float[Array, "B S"]:
    """-sum p log q of the distributions q of `logits` and p of `wanted`, in float32."""
    p = jax.nn.softmax(wanted, axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(p * logits, axis=-1)


def head_loss(config: EagleConfig, passes: int, decay: float) -> Loss:
    """The loss of `train` for a head; arguments as for `head_losses`."""

    def loss(model: Llama4Config, params: dict, batch: Any) -> tuple[jax.Array, dict]:
        tokens, segment_ids, learned, _ = jax.tree.map(jnp.asarray, Batch(*batch))
        rows = tokens, segment_ids, learned
        found = head_losses(config, model, params, *rows, passes=passes, decay=decay)
        metrics = {"loss": found.total, "pass_loss": found.by_pass, "right": found.right}
        return found.total, metrics | {TARGETS: found.targets.astype(jnp.float32)}

    return loss


def held_out_head_loss(
    model: Llama4Config, loss: Loss, held_out: Callable[[], Any], dtype: str, params: dict
) -> dict[str, Any]:
    """The mean of a head's loss over held-out batches, and of what its passes get right.

    Args:
        model: the target's config.
        loss: of the head.
        held_out: the batches; none makes an empty record.
        dtype: to compute in.
        params: of target and head.
    """
    sums: dict[str, Any] = {}
    total = 0.0
    for batch in held_out():
        found = jax.device_get(_judged(loss, model, dtype, params, batch))
        targets = float(found.pop(TARGETS))
        total += targets
        for name in ("loss", "right"):
            sums[name] = sums.get(name, 0.0) + targets * np.asarray(found[name], np.float64)
    if not total:
        return {}
    right = np.round(sums["right"] / total, 4).tolist()
    return {HELD_OUT_LOSS: float(sums["loss"] / total), "held_out_right": right}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _judged(loss: Loss, model: Llama4Config, dtype: str, params: dict, batch: Any) -> dict:
    found = loss(model, cast_all(params, dtype), batch)[1]
    return {name: meshes.on_all_devices(x) for name, x in found.items()}


def refuse_pictures(has_pictures: bool) -> None:
    """Raises a UserError if a head's data has pictures."""
    if has_pictures:
        raise UserError("a head is trained on texts; leave rows with pictures out of its data.")


def head_of(params: dict) -> dict:
    """What a head's run writes of all parameters."""
    return {name: params[name] for name in (HEAD, TOKEN_IDS)}

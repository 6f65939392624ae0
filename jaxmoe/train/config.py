"""`TrainConfig`: everything that a training run depends on, read from one YAML file."""

import collections
import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from jaxmoe.errors import UserError
from jaxmoe.fields import Range, read_fields
from jaxmoe.parsing import read_yaml

_Period = Annotated[int, Range(0, 10**9)]  # in steps or documents; 0 means never
_Fraction = Annotated[float, Range(0.0, 1.0)]
_Dtype = Literal["float32", "bfloat16"]
_Beta = Annotated[float, Range(0.0, 0.999999)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A part of a mixture.

    Attributes:
        path: a file of rows, or a pattern such as `chats/*.jsonl`.
        weight: its share of the rows, in proportion to the other sources' weights. Without weights
            all files are one source.
        name: what records call it, whose losses are told apart; None takes its path.
    """

    path: str
    weight: Annotated[float, Range(1e-6, 1e6)] | None = None
    name: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on, and how it gets into rows: `tokens`, `files` or `sources`.

    Attributes:
        files: files of rows, or patterns such as `chats/*.jsonl`: JSON Lines, also in gzip, arrays
            of JSON, or Parquet. A row is a text, a conversation, or a prompt and its completion.
        sources: instead of `files`, files and their weights.
        held_out: more files, which are not trained on, for the held-out loss.
        tokens: instead of `files`, a file of token ids: an `.npy` array [tokens], or raw numbers
            of `dtype`. Every document begins with the model's `bos_token_id`. `jaxmoe make-tokens`
            makes one.
        dtype: of raw numbers, such as nanoGPT's `.bin` of uint16; an `.npy` file names its own.
        length: tokens a row.
        batch_size: rows a step, over the whole mesh.
        held_out_every: of so many documents the last is held out; 0 holds out none.
        too_long: what becomes of a document of more than `length` tokens: the run ends before it
            begins, or the document loses its end, is cut into several, or is left out.
        on_bad: whether a row that cannot be used stops the run before it begins, or is skipped
            and counted.
        tiles: of pictures, that a row has room for; None means as many as `length` has.
    """

    files: tuple[str, ...] = ()
    sources: tuple[SourceConfig, ...] = ()
    held_out: tuple[str, ...] = ()
    tokens: str | None = None
    dtype: Literal["uint16", "uint32", "int32"] | None = None
    length: Annotated[int, Range(2, 2**24)]
    batch_size: Annotated[int, Range(1, 2**20)]
    held_out_every: _Period = 0
    too_long: Literal["error", "truncate", "split", "drop"] = "error"
    on_bad: Literal["stop", "skip"] = "stop"
    tiles: Annotated[int, Range(1, 2**20)] | None = None

    def __post_init__(self):
        if self.held_out_every == 1:
            raise UserError("held_out_every 1 leaves nothing to train on; use 2 or more, or 0.")
        if [self.tokens is not None, bool(self.files), bool(self.sources)].count(True) != 1:
            raise UserError("give one of 'files', 'sources' and 'tokens', which say what is read.")
        if self.tokens is None and self.dtype is not None:
            raise UserError("'dtype' is that of raw 'tokens'; leave it out.")
        if self.tokens is not None and self.held_out:
            raise UserError("'held_out' goes with 'files'; of 'tokens', use 'held_out_every'.")
        if len({source.weight is None for source in self.sources}) == 2:
            raise UserError("some of 'sources' have a 'weight'; give all of them one, or none.")
        self._check_names()

    def _check_names(self) -> None:
        if any(source.name is not None and source.weight is None for source in self.sources):
            raise UserError(
                "'sources' have a 'name' and no 'weight', without which all are one source; give "
                "each a weight, or leave the names out."
            )
        if twice := [name for name, n in collections.Counter(self.source_names).items() if n > 1]:
            raise UserError(f"two of 'sources' are called {twice[0]!r:.80}; give one a 'name'.")

    @property
    def mixture(self) -> list[tuple[tuple[str, ...], float]]:
        """The files of each source, and its weight."""
        if any(source.weight is not None for source in self.sources):
            return [((source.path,), source.weight or 1.0) for source in self.sources]
        return [(self.files or tuple(source.path for source in self.sources), 1.0)]

    @property
    def source_names(self) -> tuple[str, ...]:
        """What records call the sources of `mixture`; empty if there is only one."""
        if len(self.mixture) == 1:
            return ()
        return tuple(source.name or source.path for source in self.sources)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer with a linear warm-up, a cosine decay and clipping by global norm.

    Attributes:
        name: `adamw`; `adafactor`, which keeps of each matrix's squared gradients the means of rows
            and columns only, of each expert its own; or `muon`, which keeps one mean and
            orthogonalizes it, and uses AdamW for embeddings, head, routers and vectors.
        peak_lr: the learning rate after the warm-up.
        warmup_steps: over which the learning rate rises from 0.
        final_lr: the learning rate of the last step, as a fraction of `peak_lr`.
        beta1: how much of the gradients' running mean each step keeps; `adafactor` has none.
        beta2: likewise of their squares; `adafactor` keeps 1 - step^-0.8 instead.
        moments: the dtype of the gradients' running mean; other statistics are float32.
        offload: keep the optimizer's statistics in the host's memory between steps.
        weight_decay: of the matrices, times the learning rate; norms do not decay.
        clip_norm: gradients of a larger global norm are scaled down to it; 0 scales none.
    """

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    peak_lr: Annotated[float, Range(1e-12, 1.0)]
    warmup_steps: _Period = 100
    final_lr: _Fraction = 0.1
    beta1: _Beta = 0.9
    beta2: _Beta = 0.95
    moments: _Dtype = "float32"
    offload: bool = False
    weight_decay: Annotated[float, Range(0.0, 10.0)] = 0.1
    clip_norm: Annotated[float, Range(0.0, 1e6)] = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """LoRA: small matrices beside the model's, which alone are trained.

    Patterns are of dotted names, as `layers.3.attention.q`, `*.experts.*`, `*.shared.*`,
    `*.router` or `vision.*`.

    Attributes:
        rank: the rank of the product that is added to a matrix.
        alpha: over the rank, it scales the product.
        targets: patterns of the matrices that get an adapter.
        ranks: other ranks, by a pattern; the first that matches counts.
        rslora: scale by `alpha` over the root of the rank.
        init: an adapter to go on from, whose ranks, scales and targets count instead.
        layout: the version of PEFT that reads the experts' adapters, whose two sides are swapped
            from 0.19 on.
    """

    rank: Annotated[int, Range(1, 4096)] = 16
    alpha: Annotated[float, Range(1e-3, 1e6)] = 32.0
    targets: tuple[str, ...] = ("layers.*.attention.*",)
    ranks: dict = dataclasses.field(default_factory=dict)
    rslora: bool = False
    init: str | None = None
    layout: Literal["peft-0.18", "peft-0.19"] = "peft-0.19"

    def __post_init__(self):
        if not self.targets:
            raise UserError("adapter 'targets' is empty; leave it out, or name matrices.")
        for pattern, rank in self.ranks.items():
            if type(pattern) is not str or type(rank) is not int or not 1 <= rank <= 4096:
                raise UserError(
                    f"adapter 'ranks' gives {pattern!r:.80} the rank {rank!r:.80}; expected a "
                    "whole number from 1 to 4096."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """Training on pairs of a chosen and a rejected answer (docs/training.md).

    Attributes:
        objective: the loss of a pair, as of `jaxmoe.train.preferences.pair_losses`.
        beta: how much a change from the reference costs.
        label_smoothing: the share of pairs that are labelled wrongly, for "sigmoid".
        sft_loss: how much the cross entropy of the chosen answers counts beside it.
    """

    objective: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    beta: Annotated[float, Range(1e-6, 1e3)] = 0.1
    label_smoothing: Annotated[float, Range(0.0, 0.5)] = 0.0
    sft_loss: Annotated[float, Range(0.0, 100.0)] = 0.0

    def __post_init__(self):
        if self.label_smoothing and self.objective != "sigmoid":
            raise UserError(
                f"'label_smoothing' is for the objective sigmoid, not {self.objective}; leave it "
                "out."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """An EAGLE-3 head, which is trained on its target's hidden states (docs/drafts.md).

    Attributes:
        init: a head of `jaxmoe convert --target` to go on from, whose sizes, layers and vocabulary
            count instead.
        draft_vocab_size: how many tokens it can guess: those that are learned most often.
        intermediate_size: of its feed-forward layer; None takes that of the target's dense layers.
        num_attention_heads: None takes the target's.
        num_key_value_heads: likewise.
        head_dim: likewise.
        rope_theta: of its rotary positions.
        layer_ids: the target's layers whose inputs it reads; default: 2, L/2 and L-3 of L.
        passes: how many tokens of a chain it learns to guess.
        decay: how much each pass counts, of the one before.
    """

    init: str | None = None
    draft_vocab_size: Annotated[int, Range(1, 2**20)] = 32000
    intermediate_size: Annotated[int, Range(1, 2**22)] | None = None
    num_attention_heads: Annotated[int, Range(1, 2**14)] | None = None
    num_key_value_heads: Annotated[int, Range(1, 2**14)] | None = None
    head_dim: Annotated[int, Range(2, 2**14)] | None = None
    rope_theta: Annotated[float, Range(1.0, 1e12)] = 10000.0
    layer_ids: tuple[Annotated[int, Range(0, 2**12)], ...] = ()
    passes: Annotated[int, Range(1, 64)] = 7
    decay: Annotated[float, Range(0.0, 1.0)] = 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        model: a Hugging Face `config.json`, written out; the weights are drawn from `seed`.
        init: instead of `model`, a checkpoint of `jaxmoe convert` or of another run: the run
            begins with its weights.
        data: the tokens; None where `jaxmoe.train.trainer.train` is given batches.
        preference: train on pairs of a chosen and a rejected answer, which the rows of `data` are.
        adapter: train adapters of the model `init` instead of its parameters, and write them as
            PEFT does.
        head: train a draft head for the model `init`, which stays as it is, and write it in the
            layout that SGLang and vLLM read.
        output: the run's folder: checkpoint, metrics, and what a killed run resumes from.
        steps: optimizer steps in all.
        tokenizer: a folder whose tokenizer reads the rows of `data`, and whose files go with the
            checkpoint; None takes `init`'s.
        mesh: axes and sizes, as in `expert=4,sequence=2`, or a YAML file; None means `data=-1`.
        cpu_devices: simulate so many devices on the CPU; None takes the devices that are there.
        seed: of the initial parameters and of the order of the data.
        dtype: of computation.
        params_dtype: of the parameters being trained. `bfloat16` keeps no float32 copy: updates are
            rounded up or down at random, so that small ones count on average.
        checkpoint_dtype: of the parameters in the finished checkpoint.
        router_loss: how much the load-balance loss counts beside the cross entropy.
        router_z_loss: likewise the routers' z-loss, the mean squared log-sum-exp of their logits;
            ST-MoE takes 0.001.
        z_loss: likewise the z-loss, the mean squared log-sum-exp of the logits; PaLM takes 0.0001.
        selection_bias: how much a step moves each expert's bias, by which alone routers choose,
            towards an even load; DeepSeek-V3 takes 0.001. 0 moves none, and makes none.
        frozen: names of parameters that are not trained, or patterns such as
            `layers.*.feed_forward.router`.
        accumulate: batches whose gradients make one step. They run one after the other and count by
            their targets, as if they were one batch, in the memory of one.
        remat: what the backward pass computes again, to save memory: nothing, whole layers (`full`
            or `true`), layers but for their attention (`attention`), or all but products with
            matrices (`dots`).
        not_finite: what a step does whose loss or gradient is not finite: `stop` ends the run,
            `skip` leaves it out, ten in a row end the run.
        keep: `best` keeps, beside the last checkpoint, the one of the least held-out loss.
        log_to: writes records to TensorBoard's files or W&B too, by `tensorboardX` or `wandb`.
        train_vision: where rows have pictures, train the vision tower too; else it stays as it is.
        log_every: steps from record to record; 0 logs only the last.
        evaluate_every: steps from one held-out loss to the next; 0 evaluates only at the end.
        save_every: steps from one saved state to the next; 0 saves only when the run is told to
            stop.
    """

    model: dict = dataclasses.field(default_factory=dict)
    init: str | None = None
    data: DataConfig | None
    preference: PreferenceConfig | None = None
    optimizer: OptimizerConfig
    adapter: AdapterConfig | None = None
    head: HeadConfig | None = None
    output: str
    steps: Annotated[int, Range(1, 10**9)]
    tokenizer: str | None = None
    mesh: str | None = None
    cpu_devices: Annotated[int, Range(1, 1024)] | None = None
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    dtype: _Dtype = "float32"
    params_dtype: _Dtype = "float32"
    checkpoint_dtype: _Dtype = "float32"
    router_loss: Annotated[float, Range(0.0, 100.0)] = 0.01
    router_z_loss: Annotated[float, Range(0.0, 100.0)] = 0.0
    z_loss: Annotated[float, Range(0.0, 100.0)] = 0.0
    selection_bias: Annotated[float, Range(0.0, 1.0)] = 0.0
    frozen: tuple[str, ...] = ()
    accumulate: Annotated[int, Range(1, 2**16)] = 1
    remat: Literal["none", "full", "attention", "dots", True, False] = "none"
    not_finite: Literal["stop", "skip"] = "stop"
    keep: Literal["last", "best"] = "last"
    log_to: Literal["tensorboard", "wandb"] | None = None
    train_vision: bool = True
    log_every: _Period = 10
    evaluate_every: _Period = 0
    save_every: _Period = 0

    def __post_init__(self):
        if bool(self.model) == (self.init is not None):
            raise UserError("give either 'model', a config.json, or 'init', a checkpoint.")
        if self.adapter is not None and self.init is None:
            raise UserError("'adapter' needs 'init', the checkpoint that it is for.")
        if self.adapter is not None and self.selection_bias:
            raise UserError(
                "'selection_bias' moves parameters of the model, for which the files of an adapter "
                "have no place; leave it out, or train without 'adapter'."
            )
        self._check_head()
        data = self.data
        if self.keep == "best" and data and not (data.held_out_every or data.held_out):
            raise UserError("keep best needs held-out documents: give data 'held_out_every'.")
        if self.keep == "best" and not self.evaluate_every:
            raise UserError("keep best needs 'evaluate_every', the steps between held-out losses.")

    def _check_head(self) -> None:
        if self.head is None:
            return
        if self.init is None:
            raise UserError("'head' needs 'init', the checkpoint that it drafts for.")
        others = {"adapter": self.adapter, "preference": self.preference}
        others |= {"selection_bias": self.selection_bias, "frozen": self.frozen}
        for name in (name for name, value in others.items() if value):
            raise UserError(f"'head' trains a draft head alone; leave {name!r} out.")

    @property
    def result(self) -> str:
        """The name of what the finished run writes."""
        if self.head is not None:
            return "head"
        return "checkpoint" if self.adapter is None else "adapter"

    @property
    def rows(self) -> DataConfig:
        """The `data` of a run that has some.

        Raises:
            UserError: if there is none.
        """
        if self.data is None:
            raise UserError("the config gives 'data' no value; give it a mapping, or give batches.")
        return self.data

    @property
    def tokenizer_folder(self) -> str | None:
        """Where the tokenizer files are that go with the checkpoint."""
        return self.init if self.tokenizer is None else self.tokenizer


def read_train_config(path: str | Path) -> TrainConfig:
    """Reads a YAML file with the fields of `TrainConfig`.

    Raises:
        UserError: if the file cannot be read, or has an unknown key or a value out of its range.
    """
    return read_fields(TrainConfig, read_yaml(path), str(path))

"""evaluate.py logits: every path agrees with float64 NumPy, and every mistake is one line."""

import numpy as np
import pytest

from jaxmoe.cli import evaluate_logits
from jaxmoe.errors import UserError
from tests import reference, tiny
from tests.conftest import load_tiny
from tests.scripts import refuses, succeeds

LENGTH = 53  # of 16 tokens a chunk
CONFIG = tiny.scout_like(num_hidden_layers=2, no_rope_layer_interval=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One local and one global layer."""
    return load_tiny(tmp_path_factory.mktemp("evaluate"), CONFIG, tiny.random_tensors(CONFIG, 6))


@pytest.fixture(scope="module")
def batch():
    """Left padding before two packed segments, and a long segment before right padding."""
    tokens = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (2, LENGTH), np.int32)
    segment_ids = np.array([[0] * 5 + [1] * 20 + [2] * 28, [4] * 50 + [0] * 3], np.int32)
    return {"tokens": tokens, "segment_ids": segment_ids}


@pytest.fixture(scope="module")
def want(model, batch):
    return reference.logits(CONFIG, model.tensors, batch["tokens"], batch["segment_ids"])


@pytest.fixture
def tokens(tmp_path):
    """Writes arrays as an npz file."""

    def write(**arrays):
        np.savez(tmp_path / "tokens.npz", **arrays)
        return tmp_path / "tokens.npz"

    return write


@pytest.mark.parametrize(
    "options",
    [
        ["--mesh", "expert=2,sequence=2,tensor=2", "--cpu-devices", 8],
        ["--prefill-chunk", 27],  # more than an attention chunk; the last one is shorter
        ["--decode-from", 30],
    ],
    ids=["whole", "chunks", "decode"],
)
def test_padded_and_packed_logits(model, tokens, batch, want, tmp_path, options):
    output = tmp_path / "logits.npy"
    succeeds(
        "evaluate.py",
        "logits",
        model.checkpoint,
        "--tokens",
        tokens(**batch),
        "--output",
        output,
        *options,
    )
    got = np.load(output)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {"tokens.npz", "logits.npy"}


def test_tokens_alone_are_one_segment(model, tokens, batch, tmp_path):
    output, one_row = tmp_path / "logits.npy", batch["tokens"][:1]
    args = "--tokens", tokens(tokens=one_row.astype(np.int64)), "--output", output
    succeeds("evaluate.py", "logits", model.checkpoint, *args)
    want = reference.logits(CONFIG, model.tensors, one_row)
    np.testing.assert_allclose(np.load(output), want, rtol=0, atol=1e-4)


ONES = np.ones((2, 6), np.int32)


@pytest.mark.parametrize(
    ("arrays", "options", "words"),
    [
        ({"token": ONES}, [], ["tokens.npz", "no array `tokens`"]),
        ({"tokens": ONES, "segment_ids": ONES + np.eye(2, 6, 3, int)}, [], ["row 0", "segment"]),
        ({"tokens": ONES * 128}, [], ["128", "0 to 127"]),
        ({"tokens": ONES}, ["--prefill-segment", 0], ["--prefill-chunk 0"]),
        ({"tokens": ONES}, ["--mesh", "data=3", "--cpu-devices", 2], ["data=3", "2 device"]),
    ],
    ids=["no tokens", "segment in parts", "vocabulary", "flag", "mesh"],
)
def test_mistakes(model, tokens, tmp_path, arrays, options, words):
    output = tmp_path / "logits.npy"
    args = "--tokens", tokens(**arrays), "--output", output, *options
    refuses("evaluate.py", "logits", model.checkpoint, *args, words=words)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.npz"]


@pytest.fixture
def read_tokens():
    """The script's own function: a process for each bad array would take a minute."""
    return evaluate_logits.read_tokens


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"tokens": ONES * 1.0}, "`tokens` is float64 (2, 6)"),
        ({"tokens": ONES[0]}, "`tokens` is int32 (6,)"),
        ({"tokens": ONES[:, :0]}, "`tokens` is int32 (2, 0)"),
        ({"tokens": ONES, "segment_ids": ONES[:, :5]}, "`segment_ids` is int32 (2, 5)"),
        ({"tokens": ONES, "segment_ids": ONES > 0}, "`segment_ids` is bool (2, 6)"),
        ({"tokens": ONES.astype(object)}, "cannot be read as npz"),
    ],
)
def test_bad_arrays(read_tokens, tokens, arrays, words):
    path = tokens(**arrays)
    with pytest.raises(UserError) as caught:
        read_tokens(str(path))
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "npy", "cut"])
def test_a_file_that_is_no_npz_is_named(read_tokens, tokens, tmp_path, kind):
    path = tmp_path / "file"
    if kind == "npy":
        np.save(tmp_path / "file.npy", ONES)
        (tmp_path / "file.npy").rename(path)
    elif kind != "missing":
        path.write_bytes(
            {"empty": b"", "text": b"1 2 3", "cut": tokens(tokens=ONES).read_bytes()[:99]}[kind]
        )
    with pytest.raises(UserError, match="cannot be read as npz") as caught:
        read_tokens(str(path))
    assert str(path) in str(caught.value)


def test_an_existing_output_is_kept(model, tokens, tmp_path):
    output = tmp_path / "logits.npy"
    output.write_text("precious")
    args = "--tokens", tokens(tokens=ONES), "--output", output
    refuses("evaluate.py", "logits", model.checkpoint, *args, words=[output, "not empty"])
    assert output.read_text() == "precious"


def test_an_output_in_a_missing_folder_is_named(model, tokens, tmp_path):
    args = "--tokens", tokens(tokens=ONES), "--output", tmp_path / "nowhere" / "logits.npy"
    refuses(
        "evaluate.py", "logits", model.checkpoint, *args, words=["nowhere", "cannot be written"]
    )


def test_a_missing_checkpoint_is_named(tokens, tmp_path):
    args = "--tokens", tokens(tokens=ONES), "--output", tmp_path / "logits.npy"
    refuses("evaluate.py", "logits", tmp_path / "nowhere", *args, words=[tmp_path / "nowhere"])

"""Batch jobs end with each row answered once, whoever comes, goes, stalls or returns."""

import contextlib
import json
import os
import subprocess
import sys
import time

import pytest

from jaxmoe.batch import folder as job_folder
from jaxmoe.batch import leases, manifest, storage
from jaxmoe.batch.formats import error_of
from jaxmoe.batch.leases import Leases
from jaxmoe.batch.sources import find_sources
from jaxmoe.batch.storage import storage_of
from jaxmoe.errors import UserError
from tests.batch import fake

IDS = [f"r{n}" for n in range(10)]


@pytest.fixture
def source(tmp_path):
    return fake.write_rows(tmp_path / "in.jsonl", 10)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


def ids(output, folder="answers"):
    return [line["id"] for line in fake.lines_of(output, folder)]


@pytest.fixture
def alive(monkeypatch):
    """Owners of leases whose processes cannot be looked at, as on other hosts."""
    monkeypatch.setattr(leases, "_has_ended", lambda content: False)


def test_parts_are_in_the_order_of_the_rows(source, output):
    with fake.open_job(output, source) as job:
        before = len(os.listdir("/dev/fd"))
        assert fake.answer(job, first=True) == 10
        assert len(os.listdir("/dev/fd")) <= before + 1  # the input; journals are closed
        assert job.done
        assert job.summarize()["answered"] == 10
    assert ids(output) == IDS
    assert [path.name for path in sorted((output / "answers").iterdir())] == [
        "000000.jsonl",
        "000001.jsonl",
        "000002.jsonl",
    ]
    assert not list((output / "journal").iterdir()) and not list((output / "leases").iterdir())


def test_what_was_answered_is_not_answered_again(source, output):
    with fake.open_job(output, source) as job:
        assert fake.answer(job, most=6) == 6
    assert ids(output) == IDS[:4]  # nothing half-written looks finished
    with fake.open_job(output, source) as job:
        assert (job.rows, job.ended) == (10, 4)
        assert fake.answer(job) == 4
    assert ids(output) == IDS


def test_a_torn_line_of_a_journal_is_answered_again(source, output):
    with fake.open_job(output, source) as job:
        fake.answer(job, most=6)
    (journal,) = (output / "journal").iterdir()
    first, second = journal.read_bytes().splitlines()
    journal.write_bytes(b"\0" * len(first) + b"\n" + second[:-5])  # as after a loss of power
    with fake.open_job(output, source) as job:
        assert fake.answer(job) == 6
    assert ids(output) == IDS


def test_programs_share_the_blocks(source, output):
    with fake.open_job(output, source) as one, fake.open_job(output, source) as other:
        feeds = [fake.Feed(job, fake.reader_of) for job in (one, other)]
        taken = [feed.more(True) for feed in feeds]
        for feed, requests in zip(feeds, taken, strict=True):
            for request in requests:
                feed.take_in(fake.record_of(request))
        assert [request.id for requests in taken for request in requests] == IDS[:8]
        assert fake.answer(other) == 2
    assert ids(output) == IDS


def test_a_silent_owner_loses_its_block_and_comes_too_late(source, output, alive):
    """A stopped process that goes on after its lease ended publishes nothing a second time."""
    slow = fake.open_job(output, source, expiry=0.3)
    with contextlib.ExitStack() as stack:
        stack.enter_context(slow)
        late = fake.Feed(slow, fake.reader_of)
        requests = late.more(True)
        late.take_in(fake.record_of(requests[0]))
        assert slow._worker is not None
        slow._worker._leases._ended.set()  # it shows no more signs of life
        with fake.open_job(output, source, expiry=0.3) as other:
            assert fake.answer(other) == 9  # the row of the other's journal is kept
            assert other.done
        for request in requests[1:]:
            late.take_in(fake.record_of(request) | {"tokens": [666]})
    assert ids(output) == IDS
    assert all(line["tokens"] != [666] for line in fake.lines_of(output))


def test_a_living_owner_keeps_its_block(source, output, alive):
    with fake.open_job(output, source, expiry=0.3) as slow:
        requests = fake.Feed(slow, fake.reader_of).more(True)
        with fake.open_job(output, source, expiry=0.3) as other:
            feed = fake.Feed(other, fake.reader_of)
            for _ in range(2):
                for request in feed.more(True):
                    feed.take_in(fake.record_of(request))
            ends = time.monotonic() + 1
            while time.monotonic() < ends:
                assert not feed.more(False)
    assert ids(output) == IDS[len(requests) :]


def test_a_block_that_was_given_back_has_another_owner(tmp_path):
    folder = storage_of(tmp_path)
    with Leases(folder) as watcher:
        for _ in range(2):  # who had it last time is known, and gone
            with Leases(folder) as owner:
                assert owner.take("000000", [])
                assert not watcher.take("000000", folder.names(leases.LEASES))


def test_an_owner_of_many_leases_is_looked_at_once(tmp_path, alive):
    folder, time_ = storage_of(tmp_path), [0.0]
    with Leases(folder, 600.0) as owner, Leases(folder, 600.0, lambda: time_[0]) as other:
        blocks = [f"{i:06}" for i in range(9)]
        assert all(owner.take(block, []) for block in blocks)
        read, asked = folder.read, []
        folder.read = lambda name: asked.append(name) or read(name)
        for time_[0] in (0.0, 599.0, 600.0):
            held = time_[0] < 600
            assert all(other._is_held(f"{leases.LEASES}{b}.0") == held for b in blocks)
            assert not held or asked.count(leases.WORKERS + owner.owner) == 1
            asked.clear()


def test_processes_of_another_container_are_not_looked_at(tmp_path, monkeypatch):
    """They have ids of their own, on a host of the same name."""
    folder = storage_of(tmp_path)
    with Leases(folder) as other:
        name = json.loads(folder.read(leases.WORKERS + other.owner) or b"")["process"]
        ended = json.dumps({"process": name.rpartition("-")[0] + "-0"}).encode()
        assert leases._has_ended(ended)
        monkeypatch.setattr(os, "readlink", lambda path: "pid:[1]")
        assert not leases._has_ended(ended)


def test_a_job_is_not_looked_at_in_each_step(source, output, monkeypatch):
    """The processes of a program would wait for one another in each."""
    with fake.open_job(output, source) as job:
        feed, looks = fake.Feed(job, fake.reader_of), []
        monkeypatch.setattr(job, "take", lambda: looks.append(0))
        assert not any(feed.more(False) for _ in range(100))
        assert 1 < len(looks) < 10


def test_a_dead_process_of_this_machine_loses_its_block_at_once(tmp_path):
    folder = storage_of(tmp_path)
    script = (
        "import sys\nfrom jaxmoe.batch.leases import Leases\n"
        "from jaxmoe.batch.storage import storage_of\n"
        "own = Leases(storage_of(sys.argv[1]))\nown._show(0)\nassert own.take('000000', [])"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    names = folder.names(leases.LEASES)
    assert len(names) == 1
    with Leases(folder) as own:
        assert own.take("000000", names)
        assert own.has("000000", folder.names(leases.LEASES))
    assert folder.names(leases.LEASES) == names


def test_failed_rows_run_again_when_asked(tmp_path, output):
    source = fake.write_rows(tmp_path / "in.jsonl", 30)
    with source.open("a") as file:
        file.write('{"id": "r3", "tokens": [7]}\n{"id": "r31"}\n')
    wrong = ["r12", "r3", "r31"]
    with fake.open_job(output, source) as job:
        fake.answer(job, failing=True)
        assert job.summarize()["failed"] == 3
    assert ids(output, "errors") == wrong
    assert len(ids(output)) == 29
    with fake.open_job(output, source, retry=True) as job:
        assert fake.answer(job) == 1  # the others fail before they run
        assert (job.summarize()["failed"], job.summarize()["answered"]) == (2, 30)
    assert ids(output, "errors") == wrong[1:]
    assert sorted(ids(output)) == sorted(f"r{n}" for n in range(30))
    with fake.open_job(output, source) as job:
        assert job.done


def test_a_row_that_fails_may_end_the_rest(source, output):
    """Also one that is refused, so that none of its block runs."""
    source.write_text('{"id": 1}\n' * 4 + source.read_text())
    with fake.open_job(output, source) as job:
        feed = fake.Feed(job, fake.reader_of, ends_with_errors=True)
        assert not feed.more(True)
        assert feed.stops() and not job.done
        assert feed.failed is not None and "exactly one of" in error_of(feed.failed.line)


def test_what_a_killed_program_left_is_removed(tmp_path, output, monkeypatch):
    """It was killed after it wrote a part, and before it tidied up."""
    source = fake.write_rows(tmp_path / "in.jsonl", 30)

    def killed(*_):
        raise UserError("killed")

    for retry in (False, True):
        with fake.open_job(output, source, retry=retry) as job:
            monkeypatch.setattr(storage.LocalStorage, "delete", killed)
            with contextlib.suppress(UserError):
                while not job.done:
                    fake.answer(job, failing=not retry)
            monkeypatch.undo()
        with fake.open_job(output, source) as job:
            fake.answer(job, failing=not retry)
            job.summarize()
        assert ids(output, "errors") == ([] if retry else ["r12"])
        assert not list((output / "journal").iterdir()) and not list((output / "leases").iterdir())
    assert sorted(ids(output)) == sorted(f"r{n}" for n in range(30))


def test_what_a_dead_owner_said_of_a_part_is_replaced(source, output):
    """It saw no row fail and ended before the answers; the next one sees one, as it may."""
    folder = storage_of(output)
    folder.put("reports/000000.json", b'{"failed": []}')
    folder.put("errors/000001.jsonl", b'{"id": "r5"}\n')
    source.write_text(source.read_text().replace("[2]", "[13]"))
    with fake.open_job(output, source) as job:
        fake.answer(job, failing=True)
        assert job.summarize()["failed"] == 1
    assert ids(output, "errors") == ["r1"]
    with fake.open_job(output, source, retry=True) as job:
        assert fake.answer(job) == 1
    assert sorted(ids(output)) == IDS


def test_a_retry_that_was_stopped_goes_on_by_the_same_command(source, output):
    with source.open("a") as file:
        file.write('{"id": "x", "tokens": [13]}\n{"id": "y", "tokens": [13]}\n' * 2)
    with fake.open_job(output, source) as job:
        fake.answer(job, failing=True)
    with fake.open_job(output, source, retry=True) as job:
        assert fake.answer(job, most=1) == 1
        with fake.open_job(output, source, retry=True) as other:  # a second program takes part
            assert not other.done
    with fake.open_job(output, source, retry=True) as job:
        fake.answer(job)
        assert job.done and job.summarize()["answered"] == 12
    assert sorted(ids(output)) == sorted([*IDS, "x", "y"])


def test_a_retry_of_a_shard_leaves_the_others_theirs(tmp_path, output):
    source = fake.write_rows(tmp_path / "in.jsonl", 30)
    for retry in (False, True):
        with fake.open_job(output, source, shard=(1, 2), retry=retry) as job:
            fake.answer(job, failing=not retry)
    with fake.open_job(output, source, shard=(0, 2)) as job:
        fake.answer(job)
        assert job.done
    assert sorted(ids(output)) == sorted(f"r{n}" for n in range(30))


def test_a_jobs_own_answers_are_no_input(source, output):
    for _ in range(2):
        with fake.open_job(output, source.parent / "**") as job:
            fake.answer(job)
    assert ids(output) == IDS
    with pytest.raises(UserError, match="all inputs are in the output"):
        fake.open_job(output, output / "answers").__enter__()


def test_a_report_is_made_once_of_the_same_parts(source, output, monkeypatch):
    with fake.open_job(output, source) as job:
        fake.answer(job, most=8)
        assert job.summarize()["answered"] == 8
    with fake.open_job(output, source) as job:
        fake.answer(job)
        report = job.summarize()
        assert report["answered"] == 10
        monkeypatch.setattr(job_folder, "draw_report", None)
        assert job.summarize() == report


def test_a_retry_comes_after_the_end(source, output):
    with fake.open_job(output, source) as job:
        fake.answer(job, most=3)
    with (
        pytest.raises(UserError, match="after the job has ended"),
        fake.open_job(output, source, retry=True),
    ):
        pass


def test_shards_together_are_the_job(source, output):
    for i in (1, 0):
        with fake.open_job(output, source, shard=(i, 2)) as job:
            fake.answer(job)
            assert job.done
    assert ids(output) == IDS


def test_a_limit_ends_the_job_early(source, output):
    with fake.open_job(output, source, limit=5) as job:
        assert fake.answer(job) == 5
    assert ids(output) == IDS[:5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: fake.write_rows(path, 10, max_tokens=4), "in.jsonl has changed since"),
        (lambda path: path.write_text(path.read_text()[:-30]), "in.jsonl has changed since"),
        (lambda path: fake.write_rows(path, 11), "in.jsonl has changed since"),
        (lambda path: fake.write_rows(path.with_name("more.jsonl"), 2), "now there are others"),
    ],
)
def test_changed_inputs_are_refused_and_nothing_is_lost(source, output, change, message):
    with fake.open_job(output, source.parent / "*.jsonl") as job:
        fake.answer(job, most=5)
    before = ids(output)
    change(source)
    with pytest.raises(UserError, match=message), fake.open_job(output, source.parent / "*.jsonl"):
        pass
    assert ids(output) == before


def test_the_same_content_with_another_time_goes_on(source, output):
    with fake.open_job(output, source) as job:
        fake.answer(job, most=5)
    os.utime(source, (1, 1))
    with fake.open_job(output, source) as job:
        fake.answer(job)
    assert ids(output) == IDS


def test_other_settings_are_another_job(source, output):
    with fake.open_job(output, source):
        pass
    with (
        pytest.raises(UserError, match="of another job"),
        fake.open_job(output, source, settings="others"),
    ):
        pass


def test_a_full_disk_loses_nothing(source, output, monkeypatch):
    """The row that cannot be kept is not answered; those before are."""
    with fake.open_job(output, source) as job:
        folder = job._folder
        assert folder is not None

        def full(*_):
            raise UserError("out/journal cannot be written: No space left on device.")

        monkeypatch.setattr(fake.Feed, "_end", full)
        with pytest.raises(UserError, match="No space"):
            fake.answer(job)
    monkeypatch.undo()
    with fake.open_job(output, source) as job:
        fake.answer(job)
    assert ids(output) == IDS


def test_blocks_lie_where_the_manifest_says(tmp_path):
    """Over files of any size, with blank lines, read in any order."""
    counts = [3, 0, 9, 1, 14]
    for i, count in enumerate(counts):
        lines = [json.dumps({"id": f"{i}-{n}", "tokens": [1]}) for n in range(count)]
        (tmp_path / f"{i}.jsonl").write_text("\n".join([*lines, "", ""]))
    sources = find_sources([str(tmp_path)])
    made = manifest.make_manifest("job", sources, block=5)
    assert (made.rows, made.block, made.blocks) == (27, 8, 4)
    assert manifest.decode(made.encode(), "manifest.json") == made
    expected = [f"{i}-{n}" for i, count in enumerate(counts) for n in range(count)]
    reader, found = manifest.RowReader(made, sources), {}
    for block in (0, 2, 3, 1):
        found[block] = [json.loads(row.content)["id"] for _, row in reader.read(block)]
        assert len(found[block]) == made.size(block)
    assert [id_ for block in range(4) for id_ in found[block]] == expected


def test_repeated_ids_are_found(tmp_path):
    texts = ['{"id": "a"}', '{"id": 1}', '{"id": "1"}', "no JSON", "no JSON", '{"id": "a"}', "[]"]
    (tmp_path / "in.jsonl").write_text("\n".join(texts))
    made = manifest.make_manifest("job", find_sources([str(tmp_path / "in.jsonl")]))
    assert made.repeated == (3, 6)

"""One folder on a disk or an object store: the same promises, whatever fails."""

import errno
import os
import subprocess
import sys
import threading

import pytest

from jaxmoe.batch import objects, storage
from jaxmoe.batch.process_name import process_name
from jaxmoe.batch.storage import LocalStorage, Storage, storage_of
from jaxmoe.errors import UserError


@pytest.fixture(params=["path", "file", "s3"])
def place(request, tmp_path) -> Storage:
    if request.param == "s3":
        return storage_of(request.getfixturevalue("store"))
    return storage_of(tmp_path / "new" if request.param == "path" else f"file://{tmp_path}/a%20b")


def test_a_folder_of_whole_files(place):
    assert place.read("job.json") is None and place.names() == []
    place.put("job.json", b"1")
    place.put("job.json", b"2")
    assert place.create("leases/7", b"mine") and not place.create("leases/7", b"yours")
    place.put("leases-7", b"")
    place.put("leases/in/8", b"")
    assert place.read("job.json") == b"2" and place.read("leases/7") == b"mine"
    assert place.names() == ["job.json", "leases-7", "leases/7", "leases/in/8"]
    assert place.names("lea") == ["leases-7", "leases/7", "leases/in/8"]
    assert place.names("leases/") == ["leases/7", "leases/in/8"]
    assert place.names("leases/i") == ["leases/in/8"] and place.names("absent/") == []
    place.delete("leases/7")
    place.delete("leases/7")
    assert place.read("leases/7") is None and place.create("leases/7", b"yours")


@pytest.mark.parametrize("name", ["", "/a", "a//b", "../a", ".a", "a/.b"])
def test_names_stay_in_the_folder_and_are_listed(place, name):
    for call in (place.read, place.delete, lambda name: place.put(name, b"")):
        with pytest.raises(ValueError, match="is no name of a file"):
            call(name)


def test_a_file_to_append_to(tmp_path, store):
    with LocalStorage(tmp_path).append("logs/a") as file:
        file.write(b"1")
        file.flush()
        assert LocalStorage(tmp_path).read("logs/a") == b"1"
    with LocalStorage(tmp_path).append("logs/a") as file:
        file.write(b"2")
    assert LocalStorage(tmp_path).read("logs/a") == b"12"
    assert storage_of(store).append("logs/a") is None


def test_one_of_many_creates_a_file(tmp_path):
    won = []

    def race(owner: str) -> None:
        mine = LocalStorage(tmp_path)
        won.extend(i for i in range(40) if mine.create(f"leases/{i}", owner.encode()))

    threads = [threading.Thread(target=race, args=(f"owner {i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == list(range(40))


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    """And not what a living one writes, nor what may be one of another machine."""
    place, own = LocalStorage(tmp_path / "job"), process_name()
    place.sweep()  # of a folder that is not there yet
    place.put("answers/0.jsonl", b"1")
    script = (
        "import os, sys\nfrom jaxmoe.batch.storage import storage_of\n"
        "os.fsync = lambda descriptor: os._exit(9)\n"
        "storage_of(sys.argv[1]).create('answers/1.jsonl', b'1')"
    )
    assert subprocess.run([sys.executable, "-c", script, str(place)]).returncode == 9
    assert len(os.listdir(tmp_path / "job/answers")) == 2
    others = {f".{name}.0a.partial" for name in (own, "0" * 16 + "-1-0", "no name")}
    for name in others:
        (tmp_path / "job/answers" / name).touch()
    place.sweep()
    assert set(os.listdir(tmp_path / "job/answers")) == {"0.jsonl", *others}


@pytest.mark.parametrize("call", ["put", "create"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, call):
    place = LocalStorage(tmp_path)
    place.put("old", b"1")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"new cannot be written: No space left on device\.$"):
            getattr(place, call)("new", b"2")
        with pytest.raises(UserError, match="old cannot be written"):
            place.put("old", b"2")
    assert os.listdir(tmp_path) == ["old"] and place.read("old") == b"1"


def test_a_file_that_a_killed_process_was_writing_is_not_listed(tmp_path, monkeypatch):
    place, names = LocalStorage(tmp_path), []
    monkeypatch.setattr(storage, "publish", lambda *_: names.extend(os.listdir(tmp_path)))
    place.put("part", b"1")
    (tmp_path / names[0]).write_bytes(b"half")  # as a killed process leaves it
    assert names != ["part"] and place.names() == []


def test_a_link_whose_reply_was_lost_is_ones_own(tmp_path, monkeypatch):
    link = os.link

    def lost(source, target):
        link(source, target)
        raise FileExistsError

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", lost)
        assert LocalStorage(tmp_path).create("lease", b"mine")
    assert LocalStorage(tmp_path).read("lease") == b"mine"

    def taken(source, target):
        raise FileExistsError

    monkeypatch.setattr(os, "link", taken)
    (tmp_path / "other").write_bytes(b"mine")
    monkeypatch.setattr(LocalStorage, "_path", lambda self, name: tmp_path / name)
    assert not LocalStorage(tmp_path).create("other", b"mine")


def test_a_file_system_without_links_is_named(tmp_path, monkeypatch):
    def refused(source, target):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    with pytest.raises(UserError, match=r"without hard links.*choose a folder on another"):
        LocalStorage(tmp_path).create("lease", b"mine")
    assert os.listdir(tmp_path) == []


def test_what_a_store_did_without_a_reply_is_done_once(store, proxy):
    place, faults = storage_of(store), ["busy", "lost"]
    proxy.faults["PUT"] = list(faults)
    assert place.create("lease", b"mine")
    assert not place.create("lease", b"yours") and place.read("lease") == b"mine"
    proxy.faults |= {"PUT": ["slow", *faults], "GET": list(faults), "POST": list(faults)}
    assert place.create("slow", b"1")
    place.put("part", b"1")
    assert place.read("part") == b"1"
    proxy.faults["GET"] = list(faults)
    assert place.names() == ["lease", "part", "slow"]
    place.delete("part")
    assert place.read("part") is None and not any(proxy.faults.values())


def test_a_file_of_another_owner_stays_theirs_when_a_reply_is_lost(store, proxy):
    assert storage_of(store).create("lease", b"theirs")
    proxy.faults["PUT"] = ["lost", "busy"]
    assert not storage_of(store).create("lease", b"mine")
    assert storage_of(store).read("lease") == b"theirs"


def test_a_store_that_goes_on_refusing_is_named(store, proxy, monkeypatch):
    monkeypatch.setattr(objects, "PATIENCE", 0.2)
    place = storage_of(store)
    proxy.faults |= {method: ["busy"] * 999 for method in ("GET", "PUT", "POST")}
    calls = {
        "read": lambda: place.read("a"),
        "written": lambda: place.create("a", b""),
        "deleted": lambda: place.delete("a"),
    }
    for done, call in calls.items():
        with pytest.raises(UserError, match=rf"^{store}/a cannot be {done}: .*503.*\.$"):
            call()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://host/folder", "is no place; give a path, or s3://bucket/folder"),
        ("file://elsewhere/folder", "is on another host"),
        ("s3://", "s3:"),
    ],
)
def test_other_places_are_refused(url, words):
    with pytest.raises(UserError, match=words):
        storage_of(url)


def test_a_bucket_that_is_not_there_is_named(store):
    with pytest.raises(UserError, match=r"^s3://other-bucket/a/b cannot be written: "):
        storage_of("s3://other-bucket/a").put("b", b"")


def test_without_obstore_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(UserError, match=r"pip install '\.\[batch\]', or give a path"):
        storage_of("gs://bucket/folder")

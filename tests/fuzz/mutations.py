"""Ways to damage a file: its bytes, and, where it is JSON or YAML, its values."""

import copy
import json
import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import yaml

# What readers stumble over: types, ranges, lengths, depth, and words that other readers understand.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, -100, 2**31, 2**32, 2**40, 2**63, 2**64, -(2**63), 10**9,
    10**12, 10**30, 0.0, -0.0, 0.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"),
    "", "0", "1", "a", "null", "true", "1e5", "\0", "\ud800", "é", "..", "/", "../../etc/passwd",
    "a" * 300, "x" * 100_000, "float32", "bfloat16", "uint16", [], [0], [-1], [None], [[]],
    [2**40], [1, 2, 3, 4, 5], ["a"], {}, {"a": 1}, {"": {}}, {"format": "2"},
)  # fmt: skip
WORDS = (
    b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"{", b"}", b"[", b"]", b'"', b",", b":", b"NaN",
    b"Infinity", b"null", b"-1", b"1e999", b"9" * 5000, b"[" * 100_000, b'{"a":' * 100_000,
    b"\\ud800", b"\\u0000", b"\n", b"\r\n", b"&a [*a, *a]", b"!!python/object:os.system {}",
)  # fmt: skip


def mutate(content: bytes, name: str, random: random.Random) -> bytes:
    """A damaged copy of a file's content; by its name, it may be known to hold JSON or YAML."""
    ways: list[Callable[[bytes, random.Random], bytes]] = [mutate_bytes]
    if name.endswith((".json", ".yaml", ".jsonl")):
        ways += [mutate_values] * 3
    if name.endswith(".safetensors"):
        ways += [mutate_header] * 3
    if name.endswith(".png"):
        ways += [mutate_chunk]
    found = random.choice(ways)(content, random)
    return found if random.random() < 0.8 else mutate_bytes(found, random)


def mutate_bytes(content: bytes, random: random.Random) -> bytes:
    """Flips, cuts, repeats, moves, inserts and replaces bytes."""
    data = bytearray(content)
    a, b = sorted(random.randrange(len(data) + 1) for _ in range(2))
    near = min(a + random.choice((1, 2, 4, 8, 64)), len(data))
    match random.randrange(9):
        case 0 if data:
            data[a % len(data)] ^= 1 << random.randrange(8)
        case 1 if data:
            data[a % len(data)] = random.randrange(256)
        case 2:
            del data[a:]
        case 3:
            del data[a:near]
        case 4:
            data[a:a] = data[a:near] * random.choice((1, 3, 100))
        case 5:
            data[a:a] = random.choice(WORDS)
        case 6:
            data[a:near] = random.choice(WORDS)
        case 7:
            data[a:near] = random.randbytes(near - a)
        case _:
            data[a:b] = bytes(reversed(data[a:b]))
    return bytes(data)


def mutate_values(content: bytes, random: random.Random) -> bytes:
    """Replaces, removes, copies or nests one of the values of JSON or YAML."""
    text = content.decode("utf-8", errors="replace")
    lines = text.split("\n")
    if len(lines) > 1 and all(line.startswith("{") for line in lines if line):  # JSON lines
        at = random.randrange(len(lines))
        lines[at] = _mutate_document(lines[at], random)
        return "\n".join(lines).encode("utf-8", errors="surrogatepass")
    return _mutate_document(text, random).encode("utf-8", errors="surrogatepass")


def mutate_header(content: bytes, random: random.Random) -> bytes:
    """The same in the header of a safetensors file, whose length stays right."""
    length = int.from_bytes(content[:8], "little")
    header = mutate_values(content[8 : 8 + length], random)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def mutate_chunk(content: bytes, random: random.Random) -> bytes:
    """Damages, removes, copies or moves one chunk of a PNG file, whose checksums stay right."""
    chunks, at = [], 8
    while at + 8 <= len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        chunks.append(content[at + 4 : at + 8 + size])  # its kind and its data
        at += size + 12
    chosen = random.randrange(len(chunks))
    chunk = chunks.pop(chosen)
    new = {
        0: [],
        1: [chunk, chunk],
        2: [random.choice((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"zTXt", b"eXIf")) + chunk[4:]],
    }.get(random.randrange(6), [chunk[:4] + mutate_bytes(chunk[4:], random)])
    place = chosen if random.random() < 0.9 else random.randrange(len(chunks) + 1)
    chunks[place:place] = new
    return content[:8] + b"".join(
        (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        for chunk in chunks
    )


def _mutate_document(text: str, random: random.Random) -> str:
    try:
        document = json.loads(text)
        write: Callable[[Any], str] = json.dumps
    except ValueError:
        try:
            document, write = yaml.safe_load(text), yaml.safe_dump
        except (yaml.YAMLError, ValueError):
            return text
    try:
        return write(mutate_value(document, random))
    except (yaml.YAMLError, ValueError):  # half a surrogate pair
        return text


def mutate_value(document: Any, random: random.Random) -> Any:
    """A copy with one place changed."""
    document = copy.deepcopy(document)
    places = list(_places(document))
    if not places:
        return random.choice(VALUES)
    parent, key = random.choice(places)
    match random.randrange(8):
        case 0:
            del parent[key]
        case 1:
            other, there = random.choice(places)
            try:
                parent[key], other[there] = other[there], parent[key]
            except LookupError:
                pass
        case 2 if isinstance(parent, dict):
            parent[str(random.choice(VALUES))] = parent.pop(key)
        case 3 if isinstance(parent, dict):
            parent[f"{key}x"] = copy.deepcopy(parent[key])
        case 4:
            parent[key] = [parent[key]]
        case 5 if isinstance(parent[key], int | float):
            parent[key] = parent[key] * random.choice((2, -1, 0.5, 10, 2**20)) + random.choice(
                (0, 1)
            )
        case _:
            parent[key] = random.choice(VALUES)
    return document


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])

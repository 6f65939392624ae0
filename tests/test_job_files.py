"""`jaxmoe run`: a file stands for a command line, by that command's own parser."""

from pathlib import Path

import pytest

from jaxmoe.cli.main import COMMANDS, command_module
from jaxmoe.cli.run import command_line
from jaxmoe.errors import UserError

EXAMPLES = Path(__file__).parents[1] / "examples/jobs"
JOB = """command: generate
checkpoint: here
prompts: in.jsonl
"""


@pytest.fixture
def line(tmp_path, monkeypatch):
    """The words that a job's content stands for."""
    monkeypatch.chdir(tmp_path)

    def line(content, *flags):
        Path("job.yaml").write_text(content)
        name, words = command_line("job.yaml", flags)
        return [name, *words]

    return line


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_what_their_commands_accept(path):
    name, words = command_line(str(path))
    assert name == path.stem
    command_module(name).make_parser().parse_args(words)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_parser(name):
    assert command_module(name).make_parser().description


@pytest.mark.parametrize(
    "more, words",
    [
        ("max-new-tokens: 9", ["--max-new-tokens=9"]),
        ("max_new_tokens: 9", ["--max-new-tokens=9"]),
        ("mesh: {expert: 8, tensor: 2}", ["--mesh=expert=8,tensor=2"]),
        ("mesh: mesh.yaml", ["--mesh=mesh.yaml"]),
        ("stop: [a, '-b']", ["--stop=a", "--stop=-b"]),
        ("stop-id: [1, 2]", ["--stop-id=1", "--stop-id=2"]),
        ("stop_ids: 1", None),  # no flag's name
        ("adapter: {a: x, b: y}", ["--adapter=a=x", "--adapter=b=y"]),
        ("ignore-eos: true", ["--ignore-eos"]),
        ("ignore-eos: false", []),
        ("kv:", []),
        ("temperature: 0.60", ["--temperature=0.60"]),
        ("temperature: 1e-1", ["--temperature=1e-1"]),
        ("compilation-cache: off", ["--compilation-cache=off"]),  # which YAML takes for false
        ("json-schema: {type: object}", ['--json-schema={"type": "object"}']),
    ],
)
def test_a_key_is_a_flag(line, more, words):
    if words is None:
        with pytest.raises(
            UserError, match=r"unknown key 'stop_ids'; the nearest one is 'stop-id'"
        ):
            line(JOB + more)
    else:
        found = line(JOB + more)
        assert sorted(found) == sorted(["generate", "here", "--prompts=in.jsonl", *words])


def test_flags_override(line):
    job = JOB + "mesh: expert=2\nstop: [a, b]\nignore-eos: true\nmin-p: 0.1\n"
    flags = ("--mesh", "expert=8", "--stop=c", "--min-p=0")
    assert line(job, *flags) == [
        *("generate", "here", "--prompts=in.jsonl", "--ignore-eos"),
        *flags,
    ]
    assert "--stop=a" not in line(job, "--sto=c")  # which argparse accepts
    assert line("command: plan\nmodel: scout", "--target", "h100x8")[-1] == "h100x8"


def test_subcommands_and_lists_of_arguments(line):
    content = "command: make-tokens\ninputs: [a, b]\ncheckpoint: c\noutput: t.npy\n"
    assert line(content) == ["make-tokens", "c", "a", "b", "--output=t.npy"]
    content = "command: train\nconfig: run.yaml\nshow-data: true\n"
    assert line(content) == ["train", "run.yaml", "--show-data"]
    assert line(content.replace("true", "5"))[-1] == "--show-data=5"
    content = "json: x\ncommand: evaluate loops\ncheckpoint: c"
    assert line(content) == ["evaluate", "loops", "c", "--json=x"]


@pytest.mark.parametrize(
    "content, words",
    [
        ("prompt: x", "job.yaml lacks 'command'; add a line such as 'command: generate'"),
        ("- generate", "job.yaml holds no mapping"),
        ("command: run", "line 1 has the unknown command 'run'; the nearest one is"),
        ("x: 1\ncommand: generat", "line 2 has the unknown command 'generat'; the nearest one is"),
        ("command: [a]", "has the unknown command ''"),
        ("command: evaluate", "'command: evaluate' is to say which, one of logits, needle"),
        ("command: evaluate neddle", "unknown command 'neddle'; the nearest one is 'needle'"),
        (
            JOB + "meshh: x",
            "job.yaml line 4 has the unknown key 'meshh'; the nearest one is 'mesh'",
        ),
        (JOB + "rows: many", "line 4 gives 'rows' the value 'many'; expected a whole number"),
        (JOB + "rows: [1, 2]", r"line 4 gives 'rows' the value \[1, 2\]; expected one value"),
        (JOB + "kv: int9", "line 4 gives 'kv' the value 'int9'; expected bf16 or int8"),
        (JOB + "chat: 1", "line 4 gives 'chat' the value 1; expected true or false"),
        (JOB + "stop: [[a]]", "expected texts and numbers"),
        (JOB + "top-p: 1\ntop_p: 1", "line 5 gives 'top_p' again; remove one"),
        (JOB + "<<: {top-p: 1}", "merges mappings with <<; write the keys themselves"),
        ("command: generate\nprompt: x", "job.yaml lacks 'checkpoint'; add it"),
        ("command: read\ncheckpoint: x\ntext: t", "job.yaml lacks 'output'; add it"),
    ],
)
def test_a_mistake_is_a_sentence(line, content, words):
    with pytest.raises(UserError, match=words):
        line(content)

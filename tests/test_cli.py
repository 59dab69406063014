"""The command line: every verb has help with an example that parses, one-line errors, and --json."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import BinaryIO, Never

import pytest
from conftest import TIMEOUT

from harness.cli import VERBS, main
from harness.errors import EvidenceIncomplete, open_given
from harness.provenance.signing import keys

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example_that_this_command_line_understands(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the verb's own parser takes the example; only running it is left out."""
    module = import_module(f"harness.commands.{verb}")
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    seen: list[object] = []
    for example in module.EXAMPLE.split(" && "):
        assert example in " ".join(shown.split())
        from harness.commands import Outcome

        monkeypatch.setattr(module, "run", lambda arguments: seen.append(arguments) or Outcome({}, ""))
        words = shlex.split(example.split(" > ")[0])[1:]
        assert main(words) == 0
    assert seen


def test_examples_speak_of_one_world() -> None:
    """Oracle: the steps that `harness train configs/tiny.yaml` saves, and the keys that README makes."""
    examples = " ".join(import_module(f"harness.commands.{verb}").EXAMPLE for verb in VERBS)
    assert set(re.findall(r"runs/tiny/checkpoints/step-(\d+)", examples)) <= {"00000040", "00000060"}
    assert set(re.findall(r"checkpoints/step-", examples)) == {"checkpoints/step-"}
    assert {name.rpartition("/")[2] for name in re.findall(r"(\S+)\.(?:ed25519|p256)\.pub", examples)} == {
        "alice"
    }


def test_one_rank_answers_for_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: one JSON object in all, that of rank 0."""
    from harness.training import loop

    result = loop.Result("runs/x", "genesis", 0, 2, "ab" * 32, 1.5, {})
    for answer in (result, None):
        monkeypatch.setattr(loop, "train", lambda *_, answer=answer, **__: answer)
        assert main(["train", str(ROOT / "configs" / "tiny.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"] == "ab" * 32


def test_a_launch_hears_its_scheduler_before_torch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the signal that this test sends before the loop listens itself; the old handler comes back."""
    from harness.signals import StopRequest
    from harness.training import loop

    heard: list[int] = []

    def train(*_: object, stop: StopRequest, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        heard.append(stop.signal)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop, "train", train)
    assert main(["train", str(ROOT / "configs" / "tiny.yaml")]) == 0
    assert heard == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_verbs_that_scripts_rely_on_keep_their_names() -> None:
    """Oracle: the names, written down here."""
    wanted = "train verify show diff lineage kernels report watch keys config plan doctor"
    assert set(wanted.split()) <= set(VERBS)


ERRORS = {
    "no such config": (["train", "nowhere.yaml"], 2),
    "no such run": (["verify", "nowhere", "--policy", "nowhere.yaml"], 2),
    "no trust": (["verify", "."], 2),
    "no such checkpoint": (["show", "nowhere"], 2),
    "nothing to compare": (["diff", "nowhere", "elsewhere"], 2),
    "no such lineage": (["lineage", "nowhere"], 2),
    "no such ledger": (["kernels", "nowhere"], 2),
    "no such report": (["report", "nowhere", "--out", "out"], 2),
    "no such key": (["keys", "show", "nowhere.pub"], 2),
    "unknown key": (["config", str(ROOT / "configs" / "tiny.yaml"), "train.stepz=3"], 2),
    "no such plan": (["plan", "nowhere.yaml"], 2),
    "a reason for nothing": (["train", str(ROOT / "configs" / "tiny.yaml"), "--reason", "typo"], 2),
    "nothing named": (["verify"], 2),
    "no action": (["keys"], 2),
    "no such option": (["show", "nowhere", "--recent"], 2),
    "no such verb": (["verfy", "nowhere"], 2),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_one_line_and_the_same_as_json(name: str, tmp_path: Path) -> None:
    """Oracle: exit code 2, one line on stderr without a traceback; --json prints one object."""
    words, code = ERRORS[name]
    for extra in ([], ["--json"]):
        command = [sys.executable, "-m", "harness", *words, *extra]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=TIMEOUT
        )
        assert done.returncode == code, done.stderr
        assert done.stderr.startswith("harness: ")
        assert len(done.stderr.splitlines()) == 1
        if extra:
            assert json.loads(done.stdout)["exit_code"] == done.returncode
        else:
            assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--key", "--policy"])
@pytest.mark.parametrize(
    ("there", "code", "said"),
    [
        ("nothing", 2, "No such file or directory"),
        ("folder", 2, "Is a directory"),
        ("secret", 3, "Permission denied"),
        ("pipe", 2, "it is a pipe"),
    ],
)
def test_whom_to_trust_is_read_or_the_reason_has_its_code(
    option: str,
    there: str,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Oracle: DESIGN.md section 2: a wrong path is usage, a disk that does not let it be read environment."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    path = tmp_path / "run" if there == "folder" else tmp_path / there

    if there == "pipe":
        os.mkfifo(path)

    def denied(file: Path) -> BinaryIO:
        if file == path and there == "secret":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_given(file)

    for module in ("signing.keys", "policy.reader"):
        monkeypatch.setattr(f"harness.provenance.{module}.open_given", denied)
    assert main(["verify", str(tmp_path / "run"), option, str(path)]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert f"cannot be read: {said}: {path}; check the path" in line


def test_a_key_comes_through_a_pipe_that_the_shell_has_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: what `keys show` says of the file itself, to whom `<(cat FILE)` is a path."""
    file = keys.create(tmp_path / "me").public[0]
    receiving, sending = os.pipe()
    os.write(sending, file.read_bytes())
    os.close(sending)
    try:
        said = []
        for path in (file, Path(f"/dev/fd/{receiving}")):
            assert main(["keys", "show", str(path), "--json"]) == 0
            said.append({**json.loads(capsys.readouterr().out), "file": None})
    finally:
        os.close(receiving)
    assert said[0] == said[1]


def test_whoever_blames_the_machine_says_what_to_do() -> None:
    """Oracle: the calls in the syntax trees of all modules; the other kinds of errors have a usual remedy."""
    told = {"EnvironmentFault", "ResumeRefused"}
    for path in sorted((ROOT / "harness").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in told:
                assert "remedy" in [each.arg for each in node.keywords], f"{path}:{node.lineno}"


@pytest.mark.parametrize("there", ["nothing", "folder", "loop", "prose"])
@pytest.mark.parametrize(
    "command",
    [
        "verify run --key me.ed25519.pub --head FILE",
        "verify run --key me.ed25519.pub --since FILE",
        "policy new --key me.ed25519.pub --head FILE",
        "policy new --key me.ed25519.pub --authority FILE",
        "policy check FILE",
        "verify FILE --key me.ed25519.pub",
        "verify run --key FILE",
        "verify run --policy FILE",
        "report run --out report --claims FILE",
        "lineage FILE",
        "watch FILE --once",
    ],
)
def test_a_path_that_is_the_wrong_one_is_usage(
    command: str,
    there: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Oracle: DESIGN.md section 2: exit code 2 is usage, and an error is one line that says what to do."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    keys.create(tmp_path / "me")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "prose").write_text("Dear diary\n")
    assert main(command.replace("FILE", there).split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert there in line
    assert "; " in line


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    """Oracle: `head` closes the pipe; nothing on stderr."""
    command = f"{sys.executable} -m harness config {ROOT}/configs/tiny.yaml | head -1"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("descriptor", ["> /dev/full", ">&-", "<&- >&- 2>&-"])
def test_an_answer_that_cannot_be_written_is_told_in_one_line(descriptor: str, tmp_path: Path) -> None:
    """Oracle: exit code 3 for a full disk behind stdout; a stdout that the caller has closed is no error."""
    command = f"{sys.executable} -m harness config {ROOT}/configs/tiny.yaml {descriptor}"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    said = ["harness: no space left while writing the answer: stdout"] if "full" in descriptor else []
    assert done.returncode == 3 * len(said)
    assert [line.partition(";")[0] for line in done.stderr.splitlines()] == said


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("show nowhere 2> /dev/full", 2),
        ("show nowhere --json > /dev/full 2> /dev/full", 2),
        ("show nowhere --json 2> /dev/null | true; exit ${PIPESTATUS[0]}", 2),
        ("--version > /dev/full 2> /dev/null", 3),
        ("--version | true; exit ${PIPESTATUS[0]}", 0),
    ],
)
def test_an_error_that_cannot_be_told_keeps_its_exit_code(words: str, code: int, tmp_path: Path) -> None:
    """Oracle: the exit code of the error; 1 would say that evidence is wrong. Nothing on stderr."""
    command = ["bash", "-c", f"{sys.executable} -m harness {words}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "")


def test_work_goes_on_when_nobody_reads_what_it_tells(tmp_path: Path) -> None:
    """Oracle: the line behind it; a watchdog that could not tell why it leaves would never leave."""
    script = "import sys; from harness.terminal import tell; tell('a', sys.stdout); tell('b', sys.stdout)"
    command = f"{sys.executable} -c \"{script}; print('on', file=sys.stderr)\" > /dev/full"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "on\n")


def test_an_answer_is_utf8_whatever_the_terminal_is(tmp_path: Path) -> None:
    """Oracle: the bytes of the name; a log head or HTML that is redirected into a file has to be UTF-8."""
    command = [sys.executable, "-m", "harness", "config", str(ROOT / "configs" / "tiny.yaml"), "run.name=é漢"]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert "é漢".encode() in done.stdout


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "out"),
            3,
            "harness keys failed: Permission denied: out",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), 3, "no space left while running harness keys"),
        (
            EvidenceIncomplete("is missing", where="a"),
            4,
            "is missing: a; get the whole folder from its maker",
        ),
        (KeyboardInterrupt(), 130, "stopped by the keyboard"),
    ],
)
def test_what_no_verb_foresaw_of_the_machine_is_one_line(
    raised: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Oracle: the exit codes of `harness.errors`, where 1 would say that evidence is wrong."""
    module = import_module("harness.commands.keys")

    def run(_: object) -> Never:
        raise raised

    monkeypatch.setattr(module, "run", run)
    assert main(["keys", "show", "x"]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_ctrl_c_while_a_verb_is_imported_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 130, as the shell gives for SIGINT."""

    def interrupted(name: str) -> Never:
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    assert main(["keys", "show", "x"]) == 130
    assert capsys.readouterr().err == "harness: stopped by the keyboard\n"


def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path: Path) -> None:
    """Oracle: the same line and code, although an exception would abort the process: this torch does what
    C++ does with one that comes from a Python module that it imports."""
    lines = ["import os, signal", "try:", "    os.kill(os.getpid(), signal.SIGINT)"]
    (tmp_path / "torch.py").write_text("\n".join([*lines, "except BaseException:", "    os.abort()"]))
    command = [sys.executable, "-m", "harness", "plan", str(ROOT / "configs" / "tiny.yaml")]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environ = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    assert (done.returncode, done.stderr) == (130, "harness: stopped by the keyboard\n")

"""One thing in or beside a run folder is not as it should be, and every verb that reads is called.

Example::

    place = mistreated.Place.made(tmp_path)
    for change in mistreated.STAND_INS:
        with place.changed(place.root / "log" / "checkpoint", change):
            for words in place.commands():
                place.call(words)          # raises AssertionError for whatever must never happen

What must never happen, whatever lies there: an exception, an exit code that is not documented, a character
that a terminal would obey, an error of more than one line, a second object after ``--json``, a folder that is
not as it was, and a verdict ``verified`` that says other things than it said of the folder as it was.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import random
import shutil
import socket
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fuzz
import later_facts
import run_folder
from attack import signed
from attacks_on_timestamps import tsa
from authority import stamp_log
from run_folder import SampleRun
from test_unreadable import permissions

from harness import cli
from harness.audit import attest
from harness.audit.folders import opening
from harness.format import layout, strict_json
from harness.provenance import later
from harness.provenance.policy import canonical, reader
from harness.provenance.signing import keys
from harness.provenance.transparency import log
from harness.provenance.transparency.authorities import pem_of

CODES = {0, 1, 2, 3, 4}
"""Exit codes of what reads (DESIGN.md)."""
POLICY = """\
format: harness-policy/1
identities:
  - name: me
    keys: [me.ed25519.pub, me.p256.pub]
    runs: [sample, base]
    valid: {from: 2026-01-01, until: 2027-06-01T00:00:00Z}
  - {name: bob, keys: [bob.ed25519.pub], statements: [countersignature, replay], runs: ["*"]}
required: [checkpoint, slsa, log]
threshold: 1
revoked: ["%s"]
timestamps: {certificates: [tsa.pem]}
witnesses: {keys: [one.ed25519.pub], threshold: 1}
max_age: 3650d
"""
FACTS = {
    later.REPLAY: later_facts.replay,
    later.TEST_RESULT: later_facts.test_result,
    later.SVR: later_facts.svr,
}
_VOLATILE = ("seconds", "notes", "checks", "bytes_hashed", "timestamps", "since")
Change = Callable[[Path], None]


def _stand_in(make: Change) -> Change:
    def change(path: Path) -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)

    return change


def _socket(path: Path) -> None:
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as made:
        here = os.open(path.parent, os.O_DIRECTORY)
        try:
            made.bind(f"/proc/self/fd/{here}/{path.name}")  # a path of more than 108 bytes cannot be bound
        finally:
            os.close(here)


def _huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 33)


STAND_INS: Mapping[str, Change] = {
    "nothing": _stand_in(lambda path: None),
    "nothing in it": _stand_in(Path.touch),
    "a folder": _stand_in(Path.mkdir),
    "a link to nowhere": _stand_in(lambda path: path.symlink_to("nowhere")),
    "a link to itself": _stand_in(lambda path: path.symlink_to(path.name)),
    "a link to an endless device": _stand_in(lambda path: path.symlink_to("/dev/zero")),
    "a link to the root": _stand_in(lambda path: path.symlink_to("/")),
    "a pipe": _stand_in(lambda path: os.mkfifo(path)),
    "a socket": _stand_in(_socket),
    "a huge file of holes": _stand_in(_huge),
    "a file that may not be read": lambda path: path.chmod(0),
    "a second name of it": lambda path: os.link(path, path.with_name(f"{path.name}.twin")),
}
"""What stands where a file or a folder stood, or is wrong with it."""


@dataclass
class Place:
    """A run with everything that a run can have, the files that its auditor keeps, and a copy of both."""

    folder: Path
    good: Path
    """The copy."""
    verdicts: dict[tuple[str, ...], Any] = field(default_factory=dict)
    """Of commands about the folder as it is made: what ``verify --json`` says."""
    accepted: list[str] = field(default_factory=list)
    """Changes that ``verify`` of the whole run has accepted, to be looked at."""

    @property
    def root(self) -> Path:
        """The run."""
        return self.folder / "run"

    @classmethod
    def made(cls, folder: Path) -> Place:
        """Everything below ``folder``, which exists."""
        place = cls(folder / "place", folder / "good")
        place.folder.mkdir()
        _make(place.folder)
        shutil.copytree(place.folder, place.good, symlinks=True)
        for words in place.commands():
            code, document = place.call(words)
            if words[0] == "verify" and "--json" in words:
                place.verdicts[words] = (code, document)
        return place

    def paths(self) -> list[Path]:
        """Every file and folder that may be changed; that of the run itself is not among them."""
        left = (
            self.root,
            *self.folder.glob("*.key"),
            self.folder / "base",
            *(self.folder / "base").rglob("*"),
        )
        return [each for each in sorted(self.folder.rglob("*")) if each not in left]

    def commands(self) -> list[tuple[str, ...]]:
        """What is called; verbs that write do so elsewhere."""
        run, out = str(self.root), str(self.folder.parent / "out")
        newest, earlier = (str(run_folder.checkpoint(self.root, step)) for step in (30, 20))
        policy = ("--policy", str(self.folder / "team.yaml"))
        key = ("--key", str(self.folder / "me.ed25519.pub"), str(self.folder / "me.p256.pub"))
        bob = (*key, str(self.folder / "bob.ed25519.pub"))
        head, base = str(self.folder / "run.head"), str(self.folder / "base")
        commands = [
            ("verify", run, *policy, "--head", head, "--json"),
            ("verify", run, *bob, "--with", base, "--json"),
            ("verify", run, *bob, "--with", base, "--since", head),
            ("verify", run, "--key", str(self.folder / "me.p256.pub")),
            ("verify", newest, *bob),
            ("verify", str(self.folder / "exported"), *bob, "--json"),
            ("gate", str(self.folder), *bob),
            ("show", run),
            ("show", earlier, *bob),
            ("show", newest, "--json"),
            ("show", newest, "--rerun", f"{out}/rerun", *bob),
            ("lineage", run),
            ("lineage", run, *bob, "--with", base, str(self.folder / "exported")),
            ("lineage", run, "--format", "html", "--with", base),
            ("lineage", run, "--format", "mermaid", *bob),
            ("lineage", run, "--format", "json"),
            ("diff", run, base),
            ("diff", earlier, newest, *bob, "--json"),
            ("kernels", run),
            ("kernels", newest, *bob),
            ("report", run, base, "--out", f"{out}/report"),
            ("report", run, "--out", f"{out}/report", *policy),
            ("watch", run, "--once"),
            ("head", run, *key),
            ("policy", "check", str(self.folder / "team.yaml")),
            ("policy", "check", str(self.root / "policy.json")),
            ("export", newest, f"{out}/exported", "--signing-key", str(self.folder / "me.key"), *bob),
            ("keys", "show", str(self.folder / "me.ed25519.pub")),
            ("config", str(self.root / "run.yaml")),
        ]
        return commands

    def call(self, words: tuple[str, ...], about: str = "") -> tuple[int, Any]:
        """Exit code and, with ``--json``, the document of one command. Raises `AssertionError`."""
        before = _state(self.folder)
        code, out, err = call(words)
        shutil.rmtree(self.folder.parent / "out", ignore_errors=True)
        told = (about, words, code, out[-2000:], err[-2000:])
        assert _state(self.folder) == before, ("changed", told)
        assert code in CODES, told
        for line in (out + err).split("\n"):
            assert line.isprintable(), (line, told)
        assert len(err.splitlines()) <= 1, told
        document = None
        if "--json" in words:
            document = json.loads(out)
            assert isinstance(document, dict), told
        elif code in (2, 3):
            assert not out, told
            assert err.startswith("harness: "), told
        self._compare(words, code, document, told)
        return code, document

    def _compare(self, words: tuple[str, ...], code: int, document: Any, told: object) -> None:
        if code or words not in self.verdicts:
            return
        about = str(told[0])  # type: ignore[index]
        if about.startswith("run/") and "--head" in words:
            self.accepted.append(about)
        was, wanted = self.verdicts[words]
        if was == 0:
            assert _lasting(document) == _lasting(wanted), told

    @contextlib.contextmanager
    def changed(self, path: Path, change: Change) -> Iterator[None]:
        """Within, ``path`` is changed; permissions hold for root too."""
        inside = path.relative_to(self.folder)
        change(path)
        try:
            with permissions():
                yield
        finally:
            for each in (path, path.with_name(f"{path.name}.twin")):
                if os.path.lexists(each):
                    if not each.is_symlink():
                        each.chmod(0o700)
                    shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()
            source = self.good / inside
            if source.is_dir():
                shutil.copytree(source, path, symlinks=True)
            else:
                shutil.copy2(source, path)


def possible(place: Place, path: Path, name: str) -> bool:
    """Whether ``name`` of `STAND_INS` can be done to ``path``, and need not make whoever reads it wait: what
    the auditor brings may come through a pipe."""
    given = not path.is_relative_to(place.root) and not path.is_relative_to(place.folder / "exported")
    return not (given and name == "a pipe") and (path.is_file() or name != "a second name of it")


def call(words: tuple[str, ...]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `harness WORDS` in this process."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        code = cli.main(list(words))
    out, err = (each.buffer.getvalue().decode() for each in streams)  # type: ignore[attr-defined]
    return code, out, err


def damaged(chance: random.Random, other: bytes, signer: keys.Signer) -> Change:
    """Changes of a file's contents by chance: its bytes, a value in its JSON, or a value in what a bundle
    signs, which ``signer`` then signs."""

    def change(path: Path) -> None:
        data = path.read_bytes()
        while path.read_bytes() == data:
            new = fuzz.mutated(data, other, chance)
            if path.name.endswith(".sigstore.json") and chance.random() < 0.5:
                with contextlib.suppress(ValueError, KeyError):
                    payload = base64.b64decode(json.loads(data)["dsseEnvelope"]["payload"])
                    new = signed(fuzz.mutated(payload, other, chance), signer)
            path.write_bytes(new)

    return change


def _make(folder: Path) -> None:
    """The run and what lies beside it."""
    me, bob, _ = (run_folder.identity(folder / name) for name in ("me", "bob", "one"))
    (folder / "tsa.pem").write_text("".join(pem_of(each) for each in tsa().trusted))
    (folder / "team.yaml").write_text(POLICY % ("0" * 64))
    base = SampleRun(folder / "base", me, name="base", values="a")
    base.advance(10, 20)
    copy = canonical.written(reader.load(folder / "team.yaml"))
    run = SampleRun(folder / "run", me, start=base.saved[10].as_start(base), policy=copy)
    run.advance(10)
    run.resume("same-data", differences=[{"what": "world size", "before": "1", "after": "2"}])
    run.advance(20)
    run.train(25)
    run.save()
    skipped = run.set_aside(25)
    run.resume(at=20, skipped=[skipped])
    run.advance(30)
    run.prune(10)
    everybody = folder / "everybody.yaml"
    keys_of = "[me.ed25519.pub, me.p256.pub, bob.ed25519.pub]"
    everybody.write_text(f"format: harness-policy/1\nidentities: [{{name: all, keys: {keys_of}}}]\n")
    last, anybody = run_folder.checkpoint(run.root, 30), reader.load(everybody)
    everybody.unlink()
    for kind, facts in FACTS.items():
        attest.add(opening.open_checkpoint(last, anybody), kind, facts(), me)
    attest.countersign(opening.open_checkpoint(last, anybody), bob)
    attest.enter(opening.open_checkpoint(last, anybody), me)
    stamp_log(run.root / layout.LOG, tsa(), log.read_claimed(run.root / layout.LOG).head.size)
    head = ("head", str(run.root), "--out", str(folder / "run.head"), "--key", str(folder / "me.ed25519.pub"))
    for more in ((), ("--cosign", str(folder / "one.key"), "--name", "one")):
        assert call((*head, *more))[0] == 0
    shutil.copyfile(folder / "run.head", run.root / "log" / "checkpoint")
    (run.root / "events").mkdir()
    events = [
        {"time": 1.0, "level": "error", "event": "e", "error": "Traceback"},
        {"time": 2.0, "event": "span"},
    ]
    (run.root / "events" / "rank-00000.jsonl").write_bytes(b"".join(map(strict_json.dumps, events)))
    newest = str(run_folder.checkpoint(run.root, 30))
    words = ["export", newest, str(folder / "exported"), "--signing-key", str(folder / "me.key")]
    code, _, err = call(
        (*words, "--key", *(str(folder / f"{name}.pub") for name in ("me.ed25519", "me.p256", "bob.ed25519")))
    )
    assert code == 0, err


def _state(folder: Path) -> dict[str, tuple[int, ...]]:
    """What reading must leave as it is."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            told = os.lstat(os.path.join(place, name))
            size = 0 if stat.S_ISDIR(told.st_mode) else told.st_size
            found[os.path.join(place, name)] = (
                told.st_ino,
                told.st_mode,
                size,
                told.st_mtime_ns,
                told.st_nlink,
            )
    return found


def _lasting(document: Any) -> Any:
    """What a verdict says, but for what a timestamp, which nobody asks for, may add."""
    told = {name: value for name, value in document.items() if name not in _VOLATILE}
    return {**told, "checkpoints": [{**each, "shown_at": None} for each in told["checkpoints"]]}

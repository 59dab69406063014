"""Every parser of the auditing half on changed inputs: only errors of ours, in bounded memory and time.

python scripts/fuzz.py [--minutes 30] [--only NAME…] [--seed 0] [--json FILE]

Each target is a parser with valid inputs, made here with real keys. An input is changed by bytes (flipped,
cut, doubled, spliced with another, numbers at their limits) or, where it is JSON, by values (another type, a
key twice, a huge number, deep nesting); what is signed is signed again after the change, so that the parsers
behind the signature see it. An input that is accepted, or refused for a reason not heard before, is changed
further. The minutes are the processor's. A crash, an error that is not ours, an input that takes longer than
`SECONDS`, or memory beyond `MEMORY` ends the run with exit code 1 and the input as hex.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from harness import config, strict_yaml
from harness.audit.run import chain
from harness.audit.verification import verify
from harness.errors import HarnessError
from harness.format import layout, ledger, safetensors_header, strict_json
from harness.format.manifest import Manifest
from harness.provenance import agreement, corpora, exports, later, log_record, statements
from harness.provenance.policy import canonical, reader, rules
from harness.provenance.signing import envelope, keyless, keys, model_signature, pkcs11_token
from harness.provenance.transparency import authorities, log, tiles, timestamp, witness
from harness.report import claim_file

ROOT = Path(__file__).parent.parent
NOW = datetime(2026, 11, 27, tzinfo=UTC)
SECONDS = 5
"""Of the processor, for one input."""
PATIENCE = 300
"""Seconds on the clock for one input: a parser that waits takes none of the processor's."""
MEMORY = 512 << 20
"""Bytes of address space that all inputs together may add."""
_LARGEST = 1 << 16
"""Bytes of an input; the caps themselves are tested by tests/."""
_KEPT = 400
"""Inputs of a target that are changed further."""
_TOKENS = (
    b'"', b"\\", b"\\ud800", b"\xff", b"\x00", b"{", b"}", b"[", b"]", b":", b",", b"\n", b"\r\n", b"- ",
    b"&a", b"*a", b"!!python/object", b"NaN", b"-0", b"1e999", b"9007199254740993", b"null", b"true", b"../",
    b"=", b"%", b"\xe2\x80\x94 ", b"\xef\xbb\xbf", b"\x7f" + b"\xff" * 7, b"0" * 40, b"[" * 70, "é".encode(),
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 2**53, 2**53 + 1, 10**40, 0.5, "", "x", "a" * 300, "../..", "\u0000", "\ud800",
    [], [[]], {}, {"a": {}}, "2026-13-45T99:99:99Z", "h1:", "0" * 64, "g" * 64, "\n", "1e5", "Infinity",
)  # fmt: skip


@dataclass
class Target:
    """A parser and what it is fed."""

    parse: Callable[[bytes], object]
    seeds: list[bytes]
    runs: int = 0
    accepted: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Reasons of refusal, numbers and names left out."""


class Failed(Exception):
    """An input that must not do what it did."""


def targets(folder: Path) -> dict[str, Target]:
    """Every parser, with inputs that are made below ``folder``."""
    run_folder = importlib.import_module("run_folder")
    facts = importlib.import_module("later_facts")
    authority = importlib.import_module("authority")
    sigstore = importlib.import_module("sigstore_instance")
    local, subject = sigstore.Instance(), keyless.Subject(sigstore.ISSUER, sigstore.IDENTITY)
    root_of_sigstore = strict_json.dumps(local.trusted_root())
    tsa, many = authority.Authority("tsa"), authority.Authority("tsa", between=2)
    signer = run_folder.identity(folder / "me")
    root = run_folder.build(folder / "run", signer)
    checkpoint = run_folder.checkpoint(root, 20)
    ed25519, p256 = keys.public_keys(signer)

    def read(name: str) -> bytes:
        return (checkpoint / name).read_bytes()

    def payload(name: str) -> bytes:
        return envelope.open_bundle(read(name), [ed25519, p256], where=name).payload

    statement = statements.parse_checkpoint(payload(layout.CHECKPOINT_BUNDLE), where="seed")
    text = _policy(folder)
    makers = {later.REPLAY: facts.replay(), later.TEST_RESULT: facts.test_result(), later.SVR: facts.svr()}
    added = {kind: later.build(kind, predicate, statement) for kind, predicate in makers.items()}
    entries = (root / "log/tile/entries/000.p/3").read_bytes()
    book = log.read(root / layout.LOG, [ed25519])
    model = read("model.safetensors")
    text_of_head = log.text_of(book.head)
    told = {"checkpoint_id": statement.subject_id, "dir_hash": statement.dir_hash, "name": "x"}
    private = folder / "tried.key"
    found = {
        "strict JSON": Target(
            lambda data: strict_json.dumps(strict_json.loads(data, where="x")),
            [read(layout.MANIFEST), read(layout.TRAINER), b'{"a":[1,2.5,"\\u00e9",null,true]}'],
        ),
        "strict YAML": Target(
            lambda data: strict_yaml.read(data.decode("utf-8", "surrogateescape"), "x"),
            [text, (root / "run.yaml").read_bytes(), *_configs()],
        ),
        "policy": Target(
            lambda data: reader.parse(data.decode("utf-8", "replace"), where="x", folder=folder), [text]
        ),
        "policy, copy": Target(
            lambda data: canonical.written(
                reader.parse(data.decode("utf-8", "replace"), where="x", folder=folder / "nowhere")
            ),
            [canonical.written(reader.parse(text.decode(), where="x", folder=folder))],
        ),
        "config": Target(
            lambda data: config.parse(data.decode("utf-8", "replace"), "x"),
            [*_configs(), (root / "run.yaml").read_bytes()],
        ),
        "claims": Target(
            lambda data: claim_file.parse(data.decode("utf-8", "replace"), where="x"), _claims()
        ),
        "safetensors header": Target(
            lambda data: safetensors_header.parse(data, len(data), where="x"),
            [model, read("rng-rank-00000.safetensors")],
        ),
        "bundle": Target(
            lambda data: envelope.open_bundle(data, [ed25519, p256], where="x"),
            [read(layout.CHECKPOINT_BUNDLE), read(layout.SLSA_BUNDLE), read(layout.MODEL_SIGNATURE)],
        ),
        "keyless bundle": Target(
            lambda data: keyless.open_bundle(data, [subject], root_of_sigstore, where="x"),
            [strict_json.dumps(local.bundle(payload(layout.CHECKPOINT_BUNDLE)))],
        ),
        "checkpoint statement": Target(
            lambda data: statements.parse_checkpoint(data, where="x"), [payload(layout.CHECKPOINT_BUNDLE)]
        ),
        "model signature": Target(
            lambda data: model_signature.verify(envelope.sign(data, signer.p256, p256), [p256], where="x"),
            [payload(layout.MODEL_SIGNATURE)],
        ),
        "manifest": Target(lambda data: Manifest.parse(data, where="x").to_bytes(), [read(layout.MANIFEST)]),
        "trainer.json": Target(
            lambda data: list(agreement.trainer_disagreements(data, statement, "x")), [read(layout.TRAINER)]
        ),
        "ledger": Target(
            lambda data: ledger.Ledger.parse(data, "x").to_bytes(), [_ledger(), read(layout.LEDGER)]
        ),
        "metrics": Target(
            lambda data: list(chain.check(data.splitlines(keepends=True), _anchors(root), {}, "x")),
            [b"".join((root / layout.METRICS).read_bytes().splitlines(keepends=True)[:3])],
        ),
        "corpus statement": Target(
            lambda data: corpora.parse_corpus(data, where="x"),
            [_statement(corpora.PREDICATE_TYPE, _corpus(), told)],
        ),
        "export statement": Target(
            lambda data: exports.parse_export(data, where="x"),
            [_statement(exports.PREDICATE_TYPE, example(exports.SCHEMA), told)],
        ),
        "log head": Target(
            lambda data: log.open_note(data, [ed25519], where="x"), [(root / "log/checkpoint").read_bytes()]
        ),
        "log head, signed": Target(
            lambda data: log.claimed(data, where="x"), [(root / "log/checkpoint").read_bytes()]
        ),
        "log head, cosigned": Target(
            lambda data: witness.cosigned(data, [ed25519]) if log.claimed(data, where="x") else None,
            [witness.cosign((root / "log/checkpoint").read_bytes(), signer, "w", NOW, where="x")],
        ),
        "log entries": Target(lambda data: tiles.parse_entries(data, 3, "x"), [entries]),
        "log record": Target(
            lambda data: log_record.parse_record(data, where="x"),
            [*book.records, log_record.statement_record("0" * 32, "0" * 64, "svr-0", "0" * 64)],
        ),
        "timestamp": Target(
            lambda data: timestamp.opened(data, text_of_head, [*tsa.trusted, *many.trusted], where="x"),
            [tsa.stamp(text_of_head), many.stamp(text_of_head)],
        ),
        "timestamp, signed": Target(
            lambda data: timestamp.opened(tsa.signed(data), text_of_head, tsa.trusted, where="x"),
            [tsa.info(text_of_head, "20261124000000.25Z", nonce=5)],
        ),
        "timestamp, answer": Target(
            lambda data: timestamp.granted(data, where="x"),
            [tsa.stamp(text_of_head), tsa.signed(tsa.info(text_of_head), status=2)],
        ),
        "certificate": Target(
            lambda data: authorities.parse(data, where="x"),
            [tsa.root.public_bytes(authority.Encoding.PEM), *many.trusted],
        ),
        "public key": Target(
            lambda data: keys.parse_public(data, where="x"), [ed25519.pem, p256.pem, _open_ssh(signer)]
        ),
        "PKCS#11 URIs": Target(
            lambda data: pkcs11_token.references(data, "x"),
            [b"pkcs11:token=a%20b;id=%01;type=private?module-path=/m.so&pin-source=file:/p\n"],
        ),
        "private key": Target(
            lambda data: _private(private, data),
            [(folder / "me.key").read_bytes(), _open_ssh_private(signer)],
        ),
    }
    for kind, data in added.items():
        read_later = partial(later.parse, name=f"{kind}-0", checkpoint=statement, where="x")
        found[kind] = Target(lambda data, parse=read_later: parse(data).summary, [data])
    found["run folder"] = _folder_target(root, rules.from_keys([ed25519, p256]))
    return found


def _policy(folder: Path) -> bytes:
    return (
        "format: harness-policy/1\n"
        "identities:\n"
        f"  - name: alice\n    keys: [{folder}/me.ed25519.pub, {folder}/me.p256.pub]\n"
        "    runs: ['sample*']\n    valid: {from: 2026-01-01, until: 2027-01-01T00:00:00Z}\n"
        "required: [checkpoint, slsa]\nthreshold: 1\nmax_age: 30d\n"
    ).encode()


def _configs() -> list[bytes]:
    return [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))][:6]


def _claims() -> list[bytes]:
    text = (ROOT / "docs" / "method.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    return [each.encode() for each in blocks if "claims:" in each] or [
        b"format: harness-claims/1\nclaims: []\n"
    ]


def _statement(kind: str, predicate: Any, told: dict[str, str]) -> bytes:
    return statements.statement_bytes(told["checkpoint_id"], told["dir_hash"], told["name"], kind, predicate)


def _corpus() -> Any:
    """The sums of a corpus's documents are checked besides its schema."""
    predicate = example(corpora.SCHEMA)
    predicate["documents"]["read"] = {"documents": 2, "bytes": 2}
    return predicate


def _ledger() -> bytes:
    return ledger.Ledger(mode="warn").to_bytes()


def _anchors(root: Path) -> list[chain.Anchor]:
    line = json.loads((root / layout.METRICS).read_bytes().splitlines()[2])
    loss, norm = repr(line["loss"]), repr(line["grad_norm"])
    return [
        chain.Anchor(3, line["chain"], "0" * 64, 0, loss, norm, line["gradients"], line.get("state"), {}, "x")
    ]


def _open_ssh(signer: keys.Signer) -> bytes:
    from cryptography.hazmat.primitives import serialization as form

    return (
        signer.ed25519.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH) + b" me\n"
    )


def _open_ssh_private(signer: keys.Signer) -> bytes:
    from cryptography.hazmat.primitives import serialization as form

    return signer.ed25519.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption())


def _private(path: Path, data: bytes) -> object:
    path.write_bytes(data)
    path.chmod(0o600)
    return keys.load_signer(path)


def _folder_target(root: Path, trusted: rules.Policy) -> Target:
    """`harness verify` of a run in which one file, drawn by the input's first byte, is the rest of it."""
    good = shutil.copytree(root, root.with_name("good"))
    names = sorted(str(path.relative_to(good)) for path in good.rglob("*") if path.is_file())

    def parse(data: bytes) -> object:
        if not data:
            return None
        name = names[data[0] % len(names)]
        (root / name).write_bytes(data[1:])
        try:
            return json.dumps(verify.verify(root, trusted, quiet=True).document())
        finally:
            shutil.copyfile(good / name, root / name)

    return Target(parse, [bytes([number]) + (good / name).read_bytes() for number, name in enumerate(names)])


def example(schema: dict[str, Any]) -> Any:
    """A value that fits one of our closed schemas."""
    if "anyOf" in schema:
        return example(schema["anyOf"][0])
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    kind = schema["type"]
    if kind == "object":
        known = {name: example(inner) for name, inner in schema.get("properties", {}).items()}
        return known or (
            {"a": example(schema["additionalProperties"])} if "additionalProperties" in schema else {}
        )
    if kind == "array":
        return [example(schema["items"])]
    if kind == "string":
        texts = ("text", "0" * 64, "0" * 32, "1.5", "2026-11-26T12:00:00Z", "h1:", "blake3:" + "0" * 64)
        pattern = schema.get("pattern", "")
        return next(text for text in texts if re.search(pattern, text))
    return {"integer": 1, "boolean": True, "null": None}[kind]


def mutated(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """``data`` changed once or a few times."""
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        data = _change_value(data, chance) if chance.random() < 0.4 else _change_bytes(data, other, chance)
    return data[:_LARGEST]


def _change_bytes(data: bytes, other: bytes, chance: random.Random) -> bytes:
    place, kind = chance.randrange(len(data) + 1), chance.randrange(8)
    length = chance.choice((1, 1, 2, 4, 16, 200))
    rest = data[place + length :]
    if kind == 0 and place < len(data):
        return data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]
    if kind == 1:
        return data[:place] + rest
    if kind == 2:
        return data[:place] + data[place : place + length] * 2 + rest
    if kind == 3:
        return data[:place] + chance.choice(_TOKENS) + data[place:]
    if kind == 4:
        return data[:place] + chance.choice(_TOKENS) + rest
    if kind == 5:
        start = chance.randrange(len(other) + 1)
        return data[:place] + other[start : start + length * 4] + rest
    if kind == 6:
        return data[:place] + chance.randbytes(length) + rest
    return data[:place]


def _change_value(data: bytes, chance: random.Random) -> bytes:
    """A JSON document with one of its values replaced, removed, or given twice; other bytes as they are."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return data
    holders = list(_holders(document))
    if not holders:
        return json.dumps(chance.choice(_VALUES)).encode("utf-8", "surrogatepass")
    holder, key = chance.choice(holders)
    if chance.random() < 0.2:
        del holder[key]
    elif chance.random() < 0.1 and isinstance(holder, list):
        holder.append(holder[key])
    elif chance.random() < 0.1 and isinstance(holder, dict):
        holder[chance.choice(("", "x", "__metadata__", "a.b", "\u0000"))] = chance.choice(_VALUES)
    else:
        holder[key] = chance.choice(_VALUES)
    written = json.dumps(document, ensure_ascii=chance.random() < 0.5, separators=(",", ":"))
    return written.encode("utf-8", "surrogatepass")


def _holders(value: Any) -> list[tuple[Any, Any]]:
    """Every place in ``value``: what holds it, and its key."""
    found: list[tuple[Any, Any]] = []
    pending = [value]
    while pending:
        each = pending.pop()
        items = each.items() if isinstance(each, dict) else enumerate(each) if isinstance(each, list) else ()
        for key, inner in items:
            found.append((each, key))
            pending.append(inner)
    return found


def feed(target: Target, data: bytes) -> bool:
    """Give one input to ``target``; returns whether it did something new. Raises what is not ours."""
    target.runs += 1
    try:
        target.parse(data)
    except HarnessError as error:
        reason = re.sub(r"`.*`|'.*'|\".*\"|[0-9a-f]{12,}…?|\d+", "_", error.what)[:80]
        target.reasons[reason] += 1
        return target.reasons[reason] == 1
    target.accepted += 1
    return target.accepted < 20


def fuzz(found: dict[str, Target], minutes: float, seed: int) -> None:
    """Feed all targets by turns. Raises `Failed` with the input."""
    chance = random.Random(seed)
    end = time.process_time() + 60 * minutes
    for name in itertools.cycle(found):
        target = found[name]
        turn_ends = time.process_time() + 0.5
        while time.process_time() < turn_ends:
            data = mutated(chance.choice(target.seeds), chance.choice(target.seeds), chance)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(PATIENCE)
            try:
                new = feed(target, data)
            except BaseException as error:
                raise Failed(f"{name}: {type(error).__name__}: {error}\n{data.hex()}") from error
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.alarm(0)
            if new:
                target.seeds.append(data)
                del target.seeds[_KEPT:]
        if time.process_time() > end:
            return


def limit() -> None:
    """Bound the memory of this process from here on, and the time of each input."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))

    def late(*_: object) -> None:
        raise Failed(f"took more than {SECONDS} s of the processor, or waited for {PATIENCE} s")

    signal.signal(signal.SIGPROF, late)
    signal.signal(signal.SIGALRM, late)


def main() -> None:
    """Fuzz, print, keep."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter, description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    with tempfile.TemporaryDirectory() as name:
        found = targets(Path(name))
        chosen = {each: found[each] for each in arguments.only or found}
        limit()
        try:
            fuzz(chosen, arguments.minutes, arguments.seed)
        except Failed as error:
            print(error)
            raise SystemExit(1) from None
    for each, target in chosen.items():
        told = f"{target.runs} inputs, {target.accepted} accepted, {len(target.reasons)} reasons of refusal"
        print(f"{each:<22}{told}")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    total = sum(target.runs for target in chosen.values())
    minutes = f"{arguments.minutes:g} minutes of the processor"
    print(f"no crash in {minutes}, {total} inputs; {memory:.0f} MiB at most")
    if arguments.json is not None:
        rows = {each: [target.runs, target.accepted, len(target.reasons)] for each, target in chosen.items()}
        told_of = {
            "minutes": arguments.minutes,
            "seed": arguments.seed,
            "targets": rows,
            "memory_mib": memory,
        }
        arguments.json.write_text(json.dumps(told_of))


if __name__ == "__main__":
    main()

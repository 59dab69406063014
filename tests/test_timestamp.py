"""Timestamps of RFC 3161: what counts as a good one, and asking an authority for one."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import authority
import jsonschema
import pytest
import run_folder
from authority import Authority, answering
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from harness.audit.run import kept_head
from harness.audit.verification import report_schema
from harness.checkpoint.stamper import Stamper
from harness.cli import main
from harness.errors import ConfigError, EnvironmentFault, UsageError, VerificationFailed
from harness.format import der
from harness.provenance import log_record
from harness.provenance.policy import reader
from harness.provenance.transparency import authorities, log, timestamp, timestamp_client
from harness.provenance.transparency.log import Head

HEAD = Head(3, bytes(range(32)), "harness/run/one")
TEXT = log.text_of(HEAD)
YEAR_2001 = "20010101000000Z"

Bad = tuple[Authority, bytes]
BAD: dict[str, tuple[Callable[[], Bad], str]] = {}
"""Name → what makes a timestamp that must not count, and what is said of it."""
OPENSSL_ACCEPTS = {
    "a byte after the end",
    "a crowd of certificates",
    "a thirteenth month",
    "a time before the certificate",
    "a time of another zone",
    "an accuracy below nothing",
    "an algorithm of another digest",
    "an extension of the timestamp that nobody here understands",
    "another type of contents",
    "more bytes than any has",
}
"""Where `openssl ts -verify` (3.0.19) asks less: it looks at certificates as of now, and reads no time."""


def bad(says: str) -> Callable[[Callable[[], Bad]], Callable[[], Bad]]:
    """Register a timestamp that must be refused with a reason that ``says`` this."""

    def register(make: Callable[[], Bad]) -> Callable[[], Bad]:
        BAD[make.__name__.replace("_", " ")] = (make, says)
        return make

    return register


def _with(says: str, name: str, **options: object) -> None:
    """Register a good timestamp by an authority with another certificate."""

    def make() -> Bad:
        tsa = Authority("tsa", **options)  # type: ignore[arg-type]
        return tsa, tsa.stamp(TEXT)

    make.__name__ = name
    bad(says)(make)


def _signed(says: str, name: str, **changes: object) -> None:
    """Register a timestamp that is signed in another way."""

    def make() -> Bad:
        tsa = Authority("tsa")
        return tsa, tsa.signed(tsa.info(TEXT), **changes)  # type: ignore[arg-type]

    make.__name__ = name
    bad(says)(make)


def _info(says: str, name: str, **changes: object) -> None:
    """Register a timestamp that says something else."""

    def make() -> Bad:
        tsa = Authority("tsa")
        return tsa, tsa.signed(tsa.info(TEXT, **changes))  # type: ignore[arg-type]

    make.__name__ = name
    bad(says)(make)


def _now(name: str, value: bytes) -> Callable[[authority.Values], object]:
    """A change of one signed attribute."""
    return lambda values: values.update({name: value})


@bad("is a timestamp of something else")
def another_message() -> Bad:
    tsa = Authority("tsa")
    return tsa, tsa.stamp(log.text_of(Head(2, HEAD.root, HEAD.origin)))


@bad("for which no certificate of the policy vouches")
def an_authority_of_the_same_name() -> Bad:
    return Authority("tsa"), Authority("tsa").stamp(TEXT)


@bad("for which no certificate of the policy vouches")
def an_authority_that_brings_its_own_root() -> Bad:
    other = Authority("tsa")
    brought = [authority.der_of(each) for each in (other.certificate, other.root)]
    return Authority("tsa"), other.signed(other.info(TEXT), certificates=brought)


@bad("does not bring the certificate of its signer")
def the_certificate_of_another_signer() -> Bad:
    tsa = Authority("tsa")
    other = authority.der_of(Authority("tsa").certificate)
    return tsa, tsa.signed(tsa.info(TEXT), certificates=[other])


@bad("for which no certificate of the policy vouches")
def a_link_of_the_path_that_is_no_authority() -> Bad:
    tsa = Authority("tsa", between=1)
    tsa.chain = [authority.issued("tsa 0", tsa.issuer_key, "tsa root", tsa.root_key)]
    return tsa, tsa.stamp(TEXT)


@bad("for which no certificate of the policy vouches")
def more_authorities_than_the_root_allows() -> Bad:
    tsa = Authority("tsa", between=2, path_length=1)
    return tsa, tsa.stamp(TEXT)


@bad("for which no certificate of the policy vouches")
def a_link_of_the_path_is_not_there() -> Bad:
    tsa = Authority("tsa", between=1)
    tsa.chain = []
    return tsa, tsa.stamp(TEXT)


@bad("has bytes after its end")
def a_byte_after_the_end() -> Bad:
    tsa = Authority("tsa")
    return tsa, tsa.stamp(TEXT) + b"\0"


@bad("is larger than 65536 bytes")
def more_bytes_than_any_has() -> Bad:
    tsa = Authority("tsa")
    return tsa, tsa.stamp(TEXT) + bytes(1 << 16)


@bad("brings more than 8 certificates")
def a_crowd_of_certificates() -> Bad:
    tsa = Authority("tsa")
    own = authority.der_of(tsa.certificate)
    return tsa, tsa.signed(tsa.info(TEXT), certificates=[own] * 9)


_with("is not for timestamps alone", "no purpose", usages=())
_with(
    "is not for timestamps alone", "another purpose too",
    usages=(ExtendedKeyUsageOID.TIME_STAMPING, ExtendedKeyUsageOID.CODE_SIGNING),
)  # fmt: skip
_with("is not for timestamps alone", "a purpose of which nobody need take notice", critical=False)
_with("when the certificate of its authority was not valid", "a certificate that has expired",
      end=authority.START.replace(month=6))  # fmt: skip
_with("for which no certificate of the policy vouches", "an extension that nobody here understands", odd=True)
_signed(
    "is not signed by the certificate that it names",
    "another key",
    by=ec.generate_private_key(ec.SECP256R1()),
)
_signed("is signed over something else", "another digest of the contents", change=_now(
    authority.MESSAGE_DIGEST, der.encode(der.OCTETS, bytes(32))))  # fmt: skip
_signed("is signed over something else", "another type of contents", change=_now(
    authority.CONTENT_TYPE, der.encode_oid(authority.DATA)))  # fmt: skip
_signed("names another certificate of its signer", "another certificate named", change=_now(
    authority.SIGNING_CERTIFICATE, authority.named(b"another")))  # fmt: skip
_signed("does not name the certificate of its signer", "no certificate named",
        change=lambda values: values.pop(authority.SIGNING_CERTIFICATE))  # fmt: skip
_signed("lacks the signed attribute", "no digest of the contents",
        change=lambda values: values.pop(authority.MESSAGE_DIGEST))  # fmt: skip
_signed("without signed attributes", "no signed attributes", change=lambda values: values.clear())
_signed("has 2 signers", "two signers", signers=2)
_signed("has 0 signers", "no signer", signers=0)
_signed("does not bring the certificate", "no certificate", certificates=[])
_signed("is no timestamp that was granted", "a refusal", status=2)
_signed("is signed, and is no timestamp", "signed data of another type", kind=authority.DATA)
_signed("not RSA or ECDSA with SHA-2", "an algorithm of another digest", algorithm="1.2.840.10045.4.3.4")
_info("is over another digest than sha256", "another digest of the message", hashed="2.16.840.1.101.3.4.2.3")
_info("is a timestamp of another version", "a version to come", version=2)
_info("when the certificate of its authority was not valid", "a time before the certificate", time=YEAR_2001)
_info("states a time that is none", "a thirteenth month", time="20261301000000Z")
_info("states a time that is none", "a time of another zone", time="20261124000000+0100")
_info("has an accuracy that is none", "an accuracy below nothing",
      accuracy=der.encode(der.SEQUENCE, der.encode(der.INTEGER, b"\xff")))  # fmt: skip
_info("must be understood", "an extension of the timestamp that nobody here understands",
      extensions=der.encode(der.context(1), der.encode(
          der.SEQUENCE, der.encode_oid("1.2.3"), der.encode(der.BOOLEAN, b"\xff"), der.encode(der.OCTETS, b"")
      )))  # fmt: skip


def opened(tsa: Authority, data: bytes, text: bytes = TEXT) -> timestamp.Stamp:
    """As whoever trusts the root of ``tsa`` opens it."""
    return timestamp.opened(data, text, tsa.trusted, where="there")


def by_openssl(folder: Path, tsa: Authority, data: bytes) -> bool:
    """Whether `openssl ts -verify` takes ``data`` for a timestamp of `TEXT`."""
    (folder / "text").write_bytes(TEXT)
    (folder / "stamp.tsr").write_bytes(data)
    (folder / "root.pem").write_bytes(tsa.root.public_bytes(Encoding.PEM))
    words = ["openssl", "ts", "-verify", "-data", "text", "-in", "stamp.tsr", "-CAfile", "root.pem"]
    return subprocess.run(words, cwd=folder, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("between", [0, 2])
def test_a_good_timestamp_counts_here_and_elsewhere(tmp_path: Path, between: int) -> None:
    """Oracle: `openssl ts -verify`, another implementation, on the same bytes."""
    tsa = Authority("tsa", between=between)
    data = tsa.stamp(TEXT)
    assert opened(tsa, data) == timestamp.Stamp("2026-11-24T00:00:00Z", "CN=tsa", None)
    assert by_openssl(tmp_path, tsa, data)


@pytest.mark.parametrize("name", sorted(BAD))
def test_a_timestamp_that_breaks_one_rule_counts_for_nothing(tmp_path: Path, name: str) -> None:
    """Oracle: the rule; and `openssl ts -verify`, which refuses it too but for what is listed."""
    make, says = BAD[name]
    tsa, data = make()
    with pytest.raises(VerificationFailed, match=says):
        opened(tsa, data)
    assert by_openssl(tmp_path, tsa, data) == (name in OPENSSL_ACCEPTS)


def test_no_byte_of_a_timestamp_can_change() -> None:
    """Oracle: a bit of each byte flipped; CMS has versions 3 and 1 here, so of that byte another bit."""
    tsa = Authority("tsa")
    data = tsa.stamp(TEXT)
    version = data.index(b"\x02\x01\x03") + 2
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 4 if place == version else 1 << place % 8
        with pytest.raises(VerificationFailed):
            opened(tsa, bytes(changed))


def test_a_policy_may_name_any_certificate_of_the_path() -> None:
    """Oracle: the same timestamp under each of them, and under that of an authority beside the path."""
    tsa = Authority("tsa", between=2)
    data = tsa.stamp(TEXT)
    for each in (tsa.root, *tsa.chain, tsa.certificate):
        assert timestamp.opened(data, TEXT, [authority.der_of(each)], where="there").authority == "CN=tsa"
    beside = authority.issued("tsa 1", ec.generate_private_key(ec.SECP256R1()), "x", tsa.issuer_key, ca=True)
    with pytest.raises(VerificationFailed, match="no certificate of the policy vouches"):
        timestamp.opened(data, TEXT, [authority.der_of(beside)], where="there")


def test_certificates_that_all_sign_each_other_are_compared_once_each() -> None:
    """Oracle: the pairs of what comes with it and the policy's root; paths of five there are 840."""
    tsa, key = Authority("tsa"), ec.generate_private_key(ec.SECP256R1())
    crowd = [authority.issued("crowd", key, "crowd", key, ca=True) for _ in range(7)]
    tsa.certificate = authority.issued("tsa", tsa.key, "crowd", key)
    brought = [authority.der_of(each) for each in (tsa.certificate, *crowd)]
    before = authorities._signed_by.cache_info().misses
    with pytest.raises(VerificationFailed, match="no certificate of the policy vouches"):
        opened(tsa, tsa.signed(tsa.info(TEXT), certificates=brought))
    assert authorities._signed_by.cache_info().misses - before <= 8 * 8


def test_the_moment_is_the_latest_that_the_authority_means() -> None:
    """Oracle: the sums by hand: 0.25 s and an accuracy of 1.8 s after midnight end in the third second."""
    tsa = Authority("tsa")
    accuracy = der.encode(der.SEQUENCE, der.encode_integer(1), der.encode(0x80, b"\x03\x20"))
    data = tsa.signed(tsa.info(TEXT, "20261124000000.25Z", accuracy=accuracy, nonce=5))
    assert opened(tsa, data) == timestamp.Stamp("2026-11-24T00:00:03Z", "CN=tsa", 5)


def test_openssl_answers_and_what_is_kept_is_whole(tmp_path: Path) -> None:
    """Oracle: `openssl ts -reply`, whose certificates are in no order of DER, and `openssl ts -verify`."""
    tsa = Authority("tsa")
    before = time.time()
    with answering(tsa.openssl(tmp_path)) as url:
        data = timestamp_client.ask(url, TEXT)
    stamp = opened(tsa, data)
    assert stamp.moment >= f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(before))}"
    assert by_openssl(tmp_path, tsa, data)


def _asked(request: bytes) -> int:
    """The number that a request carries."""
    return der.integer(der.children(der.parse(request, where="here"), where="here")[2], where="here")


def _refusal(status: bytes) -> bytes:
    return der.encode(der.SEQUENCE, der.encode(der.SEQUENCE, status))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda tsa, asked: tsa.signed(tsa.info(TEXT, nonce=asked + 1)), "its number differs"),
        (lambda tsa, asked: tsa.signed(tsa.info(TEXT)), "its number differs"),
        (lambda tsa, asked: tsa.signed(tsa.info(b"x", nonce=asked)), "is a timestamp of something else"),
        (lambda tsa, asked: tsa.signed(tsa.info(TEXT, nonce=asked), status=2), "refused with status 2"),
        (lambda tsa, asked: _refusal(der.encode(der.INTEGER, b"\1" * 5000)), "more than 64 bytes"),
        (lambda tsa, asked: b"<html>", "cut off"),
        (lambda tsa, asked: bytes(1 << 17), "more than 65536 bytes"),
    ],
)  # fmt: skip
def test_an_answer_that_is_not_to_the_question_is_refused(
    answer: Callable[[Authority, int], bytes], says: str
) -> None:
    """Oracle: each answer by hand."""
    tsa = Authority("tsa")
    with (
        answering(lambda request: answer(tsa, _asked(request))) as url,
        pytest.raises(EnvironmentFault, match=says),
    ):
        timestamp_client.ask(url, TEXT)


def test_a_server_that_is_none_or_not_there_is_told_in_one_line() -> None:
    """Oracle: the reason in the message: another type, another code, nobody at the port."""
    with answering(lambda request: b"hello", kind="text/html") as url:
        with pytest.raises(EnvironmentFault, match="is of type text/html"):
            timestamp_client.ask(url, TEXT)
        gone = url
    with (
        answering(lambda request: b"", code=503) as url,
        pytest.raises(EnvironmentFault, match="Unavailable"),
    ):
        timestamp_client.ask(url, TEXT)
    with pytest.raises(EnvironmentFault, match="refused"):
        timestamp_client.ask(gone, TEXT)


# Beside a run that trains.


@contextmanager
def stamper(folder: Path, answer: Callable[[bytes], bytes]) -> Iterator[tuple[Stamper, list[str]]]:
    """A stamper of the log ``folder``, and what it warned of."""
    warned: list[str] = []
    with answering(answer) as url:
        yield Stamper(folder, url, 240, warned.append), warned


def test_heads_are_timestamped_behind_and_an_older_one_gives_way(tmp_path: Path) -> None:
    """Oracle: the files that are there: of five heads in a row, all asked for before the first answer, the
    last and not all others, each good."""
    tsa = Authority("tsa")
    answer, asked_for_all = tsa.openssl(tmp_path), threading.Event()

    def late(request: bytes) -> bytes:
        asked_for_all.wait(240)
        return answer(request)

    with stamper(tmp_path, late) as (made, warned):
        for size in range(1, 6):
            made.stamp(Head(size, HEAD.root, HEAD.origin))
        asked_for_all.set()
        made.finish()
    assert not warned
    sizes = {int(path.stem): path for path in (tmp_path / "timestamps").iterdir()}
    assert 5 in sizes
    assert len(sizes) < 5
    for size, path in sizes.items():
        opened(tsa, path.read_bytes(), log.text_of(Head(size, HEAD.root, HEAD.origin)))


def test_an_authority_that_fails_is_told_and_the_next_head_is_timestamped(tmp_path: Path) -> None:
    """Oracle: one line for the head that has none, and a file for the next one."""
    tsa = Authority("tsa")
    works = tsa.openssl(tmp_path)
    down = True
    with stamper(tmp_path, lambda request: b"" if down else works(request)) as (made, warned):
        made.stamp(HEAD)
        made.finish()
        assert len(warned) == 1
        assert warned[0].startswith("the log's head of 3 records has no timestamp: the authority's answer")
        down = False
        made.stamp(Head(4, HEAD.root, HEAD.origin))
        made.finish()
    assert [path.name for path in (tmp_path / "timestamps").iterdir()] == ["4.tsr"]
    assert len(warned) == 1


def test_an_authority_that_does_not_answer_keeps_nobody(tmp_path: Path) -> None:
    """Oracle: the end of the wait, while the authority still holds the question; the request's own end."""
    asked, done = threading.Event(), threading.Event()

    def answer(request: bytes) -> bytes:
        asked.set()
        done.wait(240)
        return b""

    with stamper(tmp_path, answer) as (made, warned):
        made.stamp(HEAD)
        assert asked.wait(240)
        made.seconds = 0.05
        made.finish()
        assert not done.is_set()
        assert [text for text in warned if "does not wait for it any longer" in text]
        done.set()
    done.clear()
    with answering(answer) as url, pytest.raises(EnvironmentFault, match=r"not within 0\.05 s"):
        timestamp_client.ask(url, TEXT, seconds=0.05)
    done.set()
    assert not (tmp_path / "timestamps").exists()


def test_a_header_that_comes_byte_by_byte_has_the_same_time(tmp_path: Path) -> None:
    """Oracle: the end, while the server would go on with its header for minutes, each byte well in time."""
    sent = []

    def drip() -> None:
        connection, _ = server.accept()
        with connection, suppress(OSError):
            for each in b"HTTP/1.0 200 OK\r\nX: " + b"x" * 3000:
                connection.send(bytes([each]))
                sent.append(each)
                time.sleep(0.1)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=drip, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(EnvironmentFault, match=r"not within 0\.3 s"):
            timestamp_client.ask(url, TEXT, seconds=0.3)
    assert len(sent) < 3000


def test_a_certificate_is_one_in_pem_or_der_and_nothing_else() -> None:
    """Oracle: each text by hand."""
    pem = Authority("tsa").root.public_bytes(Encoding.PEM)
    tsa = authorities.parse(b"a comment\n" + pem, where="there")
    assert authorities.parse(tsa, where="there") == tsa
    for text, says in (
        (b"", "holds 0 certificates"),
        (pem + pem, "holds 2 certificates"),
        (pem.replace(b"MII", b"AAA"), "cannot be read"),
        (pem.replace(b"MII", b"M(I"), "broken base64"),
        (tsa + b"\0", "cannot be read"),
    ):
        with pytest.raises(VerificationFailed, match=says):
            authorities.parse(text, where="there")


@given(st.data(), st.integers(0, 12))
def test_a_record_is_there_since_the_earliest_head_that_holds_it(data: st.DataObject, size: int) -> None:
    """Oracle: the definition, head by head and record by record; statements may be entered twice."""
    names = data.draw(st.lists(st.sampled_from("abcdef"), min_size=size, max_size=size))
    moments = data.draw(st.lists(st.tuples(st.integers(0, size), st.sampled_from("0123456789")), max_size=4))
    records = tuple(log_record.statement_record("run", "id", "svr-0", name) for name in names)
    expected: dict[str, str] = {}
    for end, moment in moments:
        for name in names[:end]:
            expected[name] = min(moment, expected.get(name, moment))
    assert log_record.first_seen(log.Log(Head(size, b""), records), moments) == expected


# In a run folder.


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with a run of ``me``."""
    run_folder.build(tmp_path / "run", run_folder.identity(tmp_path / "me"))
    return tmp_path


def policy(folder: Path, tsa: Authority) -> None:
    """``file.yaml`` names the root by its file."""
    (folder / "root.pem").write_bytes(tsa.root.public_bytes(Encoding.PEM))
    rules = "format: harness-policy/1\nidentities: [{name: me, keys: [me.ed25519.pub, me.p256.pub]}]\n"
    (folder / "file.yaml").write_text(f"{rules}timestamps: {{certificates: [root.pem]}}\n")


def test_a_head_is_timestamped_verified_and_shown_from_the_front_door(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: OpenSSL's authority and verifier; what the verbs print and exit with, before and after."""
    monkeypatch.chdir(run)
    tsa = Authority("tsa")
    policy(run, tsa)

    def said(*words: str) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = main([*words, "--json"])
        return code, json.loads(capsys.readouterr().out)

    public = ["--key", "me.ed25519.pub", "me.p256.pub"]
    code, document = said("policy", "new", *public, "--authority", "root.pem", "--out", "made.yaml")
    assert (code, {"rule": "timestamps", "reason": "CN=tsa root"} in document["reasons"]) == (0, True)
    assert said("policy", "check", "made.yaml")[0] == 0
    assert said("policy", "new", *public, "--authority", "me.p256.pub")[0] == 2
    code, document = said("verify", "run", "--policy", "made.yaml")
    assert (code, document["verdict"], document["timestamps"]) == (4, "cannot tell", [])
    assert {each["check"] for each in document["findings"]} == {"timestamp"}
    with answering(tsa.openssl(run)) as url:
        code, document = said("head", "run", "--timestamp", url, "--policy", "file.yaml")
    assert (code, document["timestamp"]) == (0, "run/log/timestamps/3.tsr")
    for rules in ("file.yaml", "made.yaml"):
        code, document = said("verify", "run", "--policy", rules)
        assert (code, document["findings"]) == (0, [])
        jsonschema.validate(document, report_schema.SCHEMA)
        (stamp,) = document["timestamps"]
        assert (stamp["size"], stamp["authority"]) == (3, "CN=tsa")
        assert [each["shown_at"] for each in document["checkpoints"]] == [stamp["moment"]] * 3
    assert main(["show", "run", "--policy", "file.yaml"]) == 0
    assert f"at {stamp['moment']} at the latest" in capsys.readouterr().out
    assert main(["verify", "run", "--policy", "file.yaml"]) == 0
    assert f"a timestamp of CN=tsa shows that the first 3 records were there at {stamp['moment']}" in (
        capsys.readouterr().out
    )
    assert main(["verify", "run", *public]) == 0
    assert "timestamps: 1 not checked (the policy names no authority)" in capsys.readouterr().out
    lines = (run / "run" / "log" / "checkpoint").read_bytes().splitlines(keepends=True)[:3]
    (run / "head").write_bytes(b"".join(lines))
    words = ["openssl", "ts", "-verify", "-data", "head", "-in", "run/log/timestamps/3.tsr"]
    subprocess.run([*words, "-CAfile", "root.pem"], check=True, capture_output=True)


def test_a_head_that_has_a_timestamp_keeps_the_older_one(run: Path) -> None:
    """Oracle: the file after a second request, to nobody; and the error for what is no URL."""
    (run / "run" / "log" / "timestamps").mkdir()
    path = authority.stamp_log(run / "run" / "log", Authority("tsa"), 3)
    before = path.read_bytes()
    taken = kept_head.take(run / "run", None)
    assert kept_head.stamp(taken, "http://127.0.0.1:1/") == path
    assert path.read_bytes() == before
    with pytest.raises(UsageError, match="no user, no question mark"):
        kept_head.stamp(taken, "https://me:secret@tsa.example.org/")


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ("timestamps: {certificates: []}", "an empty one: .*:3"),
        ("timestamps: {roots: [root.pem]}", "unknown key `roots`: .*:3"),
        ("timestamps: {certificates: [none.pem]}", "is missing: .*none.pem"),
        ("timestamps: {certificates: [me.ed25519.pub]}", "holds 0 certificates in PEM"),
        ("timestamps: {certificates: [root.pem, root.pem]}", "the same certificate twice: .*:3"),
        ("required: [checkpoint, timestamp]", "timestamps names no certificate: .*:3"),
    ],
)
def test_a_policy_whose_timestamps_make_no_sense_is_refused(run: Path, rules: str, says: str) -> None:
    """Oracle: file and line of each."""
    policy(run, Authority("tsa"))
    text = (run / "file.yaml").read_text().splitlines()[:2]
    (run / "bad.yaml").write_text("\n".join([*text, rules, ""]))
    with pytest.raises(ConfigError, match=says):
        reader.load(run / "bad.yaml")

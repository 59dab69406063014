"""`harness.format.manifest`: the list that a checkpoint's id is the digest of."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import accepted

from harness.errors import VerificationFailed
from harness.format import manifest, strict_json
from harness.format.manifest import FileEntry, Manifest, TensorEntry

DIGESTS = st.binary(max_size=4).map(lambda data: hashlib.sha256(data).hexdigest())
PARTS = st.text("abcABC.-_ä0", min_size=1, max_size=4).filter(lambda part: part not in (".", ".."))
PATHS = st.lists(PARTS, min_size=1, max_size=3).map("/".join)
GOOD = Manifest(
    (FileEntry("config.json", 3, "0" * 64), FileEntry("model.safetensors", 100, "1" * 64)),
    (TensorEntry("w", "model.safetensors", "F32", (3,), 88, 100, "blake3:" + "2" * 64),),
)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Valid manifests."""
    paths = sorted(draw(st.lists(PATHS, max_size=5, unique_by=str.casefold)))
    files = tuple(FileEntry(path, draw(st.integers(0, 2**53)), draw(DIGESTS)) for path in paths)
    tensors = []
    for entry in files:
        for name in draw(st.lists(PARTS, max_size=2, unique=True)):
            start = draw(st.integers(0, entry.size))
            end = draw(st.integers(start, entry.size))
            digest = f"blake3:{draw(DIGESTS)}"
            tensors.append(TensorEntry(name, entry.path, "F32", (1, 2), start, end, digest))
    return Manifest(files, tuple(sorted(tensors, key=lambda each: (each.file, each.start, each.name))))


@given(manifests())
@settings(deadline=None)
def test_a_manifest_is_read_back_from_its_bytes(value: Manifest) -> None:
    """Oracle: the value itself; and the bytes are the only ones of that value."""
    data = value.to_bytes()
    assert Manifest.parse(data, where="x") == value
    assert Manifest.parse(data, where="x").to_bytes() == data


@st.composite
def changed(draw: st.DrawFn) -> bytes:
    """The document of a good manifest with one value replaced by something odd, or with bytes changed."""
    document = json.loads(GOOD.to_bytes())
    place: Any = document
    for _ in range(draw(st.integers(1, 3))):
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key]:
            break
        place = place[key]
    odd = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text()
        | st.just([])
        | st.just({})
        | PATHS
    )
    key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else list(range(len(place)))))
    place[key] = draw(odd)
    return json.dumps(document).encode()


@given(changed() | st.binary(max_size=100))
@settings(deadline=None, max_examples=1000)
def test_any_bytes_are_a_manifest_or_refused(data: bytes) -> None:
    """Oracle: what is accepted writes and reads back equal; no other exception than ours."""
    for value in accepted(Manifest.parse, data):
        assert Manifest.parse(value.to_bytes(), where="there") == value


@pytest.mark.parametrize(
    "path",
    [
        "../a",
        "a/../b",
        "/a",
        "a//b",
        "a/",
        "./a",
        ".",
        "..",
        "",
        "a\\b",
        "a\x00b",
        "a\nb",
        "a\x1b[2J",
        "ä",
        "a\u202eb",
        "x" * 5000,
        "\ud800",
        "MANIFEST.json",
        "manifest.JSON",
        "model.sig",
        "provenance/x",
    ],
)
def test_an_unsafe_path_is_refused(path: str) -> None:
    """Oracle: paths that leave the folder, that systems or terminals read otherwise, or that we reserve."""
    with pytest.raises(VerificationFailed):
        manifest.check_paths([path], "there")


@pytest.mark.parametrize(
    ("paths", "reason"),
    [
        (["b", "a"], "not sorted"),
        (["a", "a"], "not sorted"),
        (["A", "a"], "differ only by case"),
        (["stra\u00dfe", "strasse"], "not sorted"),
        (["strasse", "stra\u00dfe"], "differ only by case"),
    ],
)
def test_paths_that_meet_on_some_file_system_are_refused(paths: list[str], reason: str) -> None:
    """Oracle: Unicode case folding."""
    with pytest.raises(VerificationFailed, match=reason):
        manifest.check_paths(paths, "there")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"files": (GOOD.files[1], GOOD.files[0])}, "not sorted"),
        ({"files": (GOOD.files[0]._replace(sha256="0" * 63), GOOD.files[1])}, "broken sha256"),
        ({"files": (GOOD.files[0]._replace(sha256="A" * 64), GOOD.files[1])}, "broken sha256"),
        ({"files": (GOOD.files[0]._replace(size=-1), GOOD.files[1])}, "broken file entry"),
        ({"files": GOOD.files[:1]}, "a file that is not listed"),
        ({"tensors": GOOD.tensors * 2}, "names a tensor of a file twice"),
        ({"tensors": (GOOD.tensors[0]._replace(end=101),)}, "outside its file"),
        ({"tensors": (GOOD.tensors[0]._replace(start=101),)}, "outside its file"),
        ({"tensors": (GOOD.tensors[0]._replace(dtype="F31"),)}, "unknown dtype"),
        ({"tensors": (GOOD.tensors[0]._replace(shape=(-1,)),)}, "broken shape"),
        ({"tensors": (GOOD.tensors[0]._replace(digest="md5:" + "0" * 32),)}, "broken digest"),
        ({"tensors": (GOOD.tensors[0]._replace(name="a\0"),)}, "unsafe tensor name"),
        ({"tensors": (GOOD.tensors[0]._replace(name="x"), GOOD.tensors[0])}, "not sorted by file"),
    ],
)  # fmt: skip
def test_a_broken_entry_is_refused(changes: dict[str, Any], reason: str) -> None:
    """Oracle: the module's docstring; the reason names the rule."""
    with pytest.raises(VerificationFailed, match=reason):
        Manifest.parse(replace(GOOD, **changes).to_bytes(), where="there")


@pytest.mark.parametrize("change", [{"format": "harness-manifest/2"}, {"extra": 1}, {"files": {}}])
def test_another_format_is_refused(change: dict[str, Any]) -> None:
    """Oracle: the module's docstring."""
    document = json.loads(GOOD.to_bytes()) | change
    with pytest.raises(VerificationFailed):
        Manifest.parse(strict_json.dumps(document), where="there")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            'module "rsc.io/quote"\n\nrequire "rsc.io/sampler" v1.3.0\n',
            "h1:LzX7hefJvL54yjefDEDHNONDjII0t9xZLPXsUe+TKr0=",
        ),
        (
            'module "rsc.io/sampler"\n\nrequire "golang.org/x/text" v0.0.0-20170915032832-14c0d48ead0c\n',
            "h1:T1hPZKmBbMNahiBKFy5HrXp6adAjACjK9JXDnKaTXpA=",
        ),
    ],
)
def test_dir_hash_is_the_hash_of_go_modules(content: str, expected: str) -> None:
    """Oracle: go.sum lines of rsc.io/quote v1.5.2 and rsc.io/sampler v1.3.0, over their go.mod alone."""
    digest = hashlib.sha256(content.encode()).hexdigest()
    assert manifest.dir_hash([("go.mod", digest)]) == expected


def test_dir_hash_is_what_coreutils_compute(tmp_path: Path) -> None:
    """Oracle: `sha256sum` over the sorted output of `sha256sum`, in base64."""
    names = ["b", "a", "c/d", "c-e", "ä"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    script = "find . -type f | cut -c3- | LC_ALL=C sort | xargs sha256sum | sha256sum | cut -d' ' -f1"
    shell = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    pairs = [(name, hashlib.sha256(name.encode()).hexdigest()) for name in names]
    assert base64.b64decode(manifest.dir_hash(pairs).removeprefix("h1:")).hex() == shell.stdout.strip()


def test_the_checkpoint_id_is_the_sha256_of_the_file() -> None:
    """Oracle: hashlib."""
    assert manifest.checkpoint_id(GOOD.to_bytes()) == hashlib.sha256(GOOD.to_bytes()).hexdigest()


def test_the_state_digest_does_not_depend_on_files_or_places() -> None:
    """Oracle: the definition in the docstring, computed by hand; generator states do not count."""
    tensor = GOOD.tensors[0]
    line = b"w\0F32\x003\0blake3:" + b"2" * 64 + b"\n"
    assert manifest.state_digest([tensor]) == hashlib.sha256(line).hexdigest()
    moved = tensor._replace(file="model-00001-of-00002.safetensors", start=0, end=12)
    rng = tensor._replace(file="rng-rank-00000.safetensors", name="other")
    assert manifest.state_digest([moved, rng]) == manifest.state_digest([tensor])
    for change in ({"name": "v"}, {"dtype": "I32"}, {"shape": (1, 3)}, {"digest": "blake3:" + "3" * 64}):
        assert manifest.state_digest([tensor._replace(**change)]) != manifest.state_digest([tensor])

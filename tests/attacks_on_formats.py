"""Attacks on manifest, safetensors headers and trainer.json, by somebody with the right key or none."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

from attack import Scene, attack

TENSOR = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}


def _first_file(scene: Scene, **changes: Any) -> None:
    scene.manifest(20, lambda document: document["files"][0].update(changes))


@attack("has the unsafe path '../evil'")
def the_manifest_names_a_path_outside(scene: Scene) -> None:
    _first_file(scene, path="../evil")


@attack("has the unsafe path '/etc/passwd'")
def the_manifest_names_an_absolute_path(scene: Scene) -> None:
    _first_file(scene, path="/etc/passwd")


@attack("has the unsafe path")
def the_manifest_names_a_path_with_a_backslash(scene: Scene) -> None:
    _first_file(scene, path="..\\evil")


@attack("has the unsafe path")
def the_manifest_names_a_path_with_a_zero_byte(scene: Scene) -> None:
    _first_file(scene, path="a\0b")


@attack("has the unsafe path")
def the_manifest_names_a_decomposed_path(scene: Scene) -> None:
    _first_file(scene, path="a\u0308")


@attack("has paths that differ only by case")
def the_manifest_names_twins_by_case(scene: Scene) -> None:
    twin = {"path": "CONFIG.JSON", "size": 3, "sha256": "0" * 64}
    scene.manifest(20, lambda document: document["files"].insert(0, twin))


@attack("lists 'MANIFEST.json', which is no payload")
def the_manifest_lists_itself(scene: Scene) -> None:
    itself = {"path": "MANIFEST.json", "size": 3, "sha256": "0" * 64}
    scene.manifest(20, lambda document: document["files"].insert(0, itself))


@attack("lists 'provenance/evil.py', which is no payload")
def the_manifest_lists_a_file_beside_the_statements(scene: Scene) -> None:
    (scene.checkpoint(20) / "provenance" / "evil.py").write_text("")
    digest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    evil = {"path": "provenance/evil.py", "size": 0, "sha256": digest}
    scene.manifest(20, lambda document: document["files"].insert(4, evil))


@attack("has the key `format` twice")
def the_manifest_has_a_key_twice(scene: Scene) -> None:
    data = (scene.checkpoint(20) / "MANIFEST.json").read_bytes()
    scene.write_manifest(20, b'{"format":"harness-manifest/0",' + data[1:])


@attack("beyond 2**53")
def the_manifest_holds_a_huge_integer(scene: Scene) -> None:
    data = (scene.checkpoint(20) / "MANIFEST.json").read_bytes()
    scene.write_manifest(20, data.replace(b'"size":', b'"size":9007199254740993', 1))


@attack("holds NaN")
def the_manifest_holds_nan(scene: Scene) -> None:
    data = (scene.checkpoint(20) / "MANIFEST.json").read_bytes()
    size = json.loads(data)["files"][0]["size"]
    scene.write_manifest(20, data.replace(b'"size":%d' % size, b'"size":NaN', 1))


@attack("outside its file")
def the_manifest_places_a_tensor_outside_its_file(scene: Scene) -> None:
    scene.manifest(20, lambda document: document["tensors"][0].update(end=1 << 40))


@attack("the header describes other tensors than the manifest")
def the_manifest_names_a_tensor_otherwise(scene: Scene) -> None:
    scene.manifest(20, lambda document: document["tensors"][0].update(name="other"))


@attack("has another digest in the manifest")
def the_manifest_has_another_tensor_digest(scene: Scene) -> None:
    scene.manifest(20, lambda document: document["tensors"][0].update(digest="blake3:" + "0" * 64))


# safetensors headers; the file keeps its size, since the header is padded.


def _header(scene: Scene, text: bytes) -> None:
    path = scene.model(20)
    path.write_bytes(struct.pack("<Q", 4088) + text.ljust(4088) + path.read_bytes()[4096:])


def _headers(**tensors: Any) -> bytes:
    return json.dumps(tensors).encode()


@attack("overlaps the tensor before it")
def a_header_has_overlapping_tensors(scene: Scene) -> None:
    _header(scene, _headers(a=TENSOR, b=TENSOR))


@attack("leaves a hole")
def a_header_leaves_a_hole(scene: Scene) -> None:
    _header(scene, _headers(a=TENSOR, b={**TENSOR, "data_offsets": [48, 60]}))


@attack("has the key `a` twice")
def a_header_names_a_tensor_twice(scene: Scene) -> None:
    _header(scene, _headers(a=TENSOR)[:-1] + b"," + _headers(a={**TENSOR, "dtype": "I32"})[1:])


@attack("has the key `format` twice")
def a_header_has_metadata_twice(scene: Scene) -> None:
    _header(scene, b'{"__metadata__":{"format":"pt","format":"tf"}}')


@attack("unsafe tensor name")
def a_header_names_a_tensor_with_a_zero_byte(scene: Scene) -> None:
    _header(scene, _headers(**{"a\0": TENSOR}))


@attack("has other fields than")
def a_header_has_an_unknown_field(scene: Scene) -> None:
    _header(scene, _headers(a={**TENSOR, "code": "evil"}))


@attack("its header describes")
def a_header_leaves_bytes_behind_its_tensors(scene: Scene) -> None:
    _header(scene, _headers(a=TENSOR))


@attack("announces a header of")
def a_header_is_longer_than_its_file(scene: Scene) -> None:
    path = scene.model(20)
    path.write_bytes(struct.pack("<Q", 1 << 62) + path.read_bytes()[8:])


@attack("is nested deeper than 64")
def a_header_is_nested_deeply(scene: Scene) -> None:
    _header(scene, b"[" * 4000)


@attack("has 1000 dimensions")
def a_header_has_a_tensor_of_very_many_dimensions(scene: Scene) -> None:
    _header(scene, _headers(a={"dtype": "F32", "shape": [9] * 1000, "data_offsets": [0, 12]}))


# trainer.json and the ledger, as a signer with the right key may write them.


def _listed(scene: Scene, path: str, data: bytes, step: int = 20) -> None:
    """Replace a payload file, and have the manifest list and the right key sign it."""
    (scene.checkpoint(step) / path).write_bytes(data)

    def change(document: dict[str, Any]) -> None:
        for entry in document["files"]:
            if entry["path"] == path:
                entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())

    scene.manifest(step, change)


@attack("has step 21, the statement 20")
def trainer_json_says_another_step_than_the_statement(scene: Scene) -> None:
    data = (scene.checkpoint(20) / "trainer.json").read_bytes()
    _listed(scene, "trainer.json", data.replace(b'"step":20,"world', b'"step":21,"world'))


@attack("has step True, the statement 1")
def trainer_json_says_true_for_one(scene: Scene) -> None:
    scene.rebuild(steps=(1, 20))
    data = (scene.checkpoint(1) / "trainer.json").read_bytes()
    _listed(scene, "trainer.json", data.replace(b'"step":1,"world', b'"step":true,"world'), step=1)


@attack("is nested deeper than 64")
def trainer_json_is_nested_deeply(scene: Scene) -> None:
    _listed(scene, "trainer.json", b"[" * 100_000)


@attack("holds Infinity")
def trainer_json_holds_infinity(scene: Scene) -> None:
    _listed(scene, "trainer.json", b'{"step":Infinity}')


@attack("lists no trainer.json")
def the_manifest_lists_no_trainer_json(scene: Scene) -> None:
    (scene.checkpoint(20) / "trainer.json").unlink()
    scene.manifest(20, lambda document: document["files"].pop())


@attack("names another ledger.json than the manifest")
def the_ledger_is_swapped_and_listed(scene: Scene) -> None:
    data = (scene.checkpoint(20) / "ledger.json").read_bytes()
    _listed(scene, "ledger.json", data.replace(b'"warn"', b'"off"'))


@attack("ledger.json")
def the_ledger_is_swapped(scene: Scene) -> None:
    data = (scene.checkpoint(20) / "ledger.json").read_bytes()
    (scene.checkpoint(20) / "ledger.json").write_bytes(data.replace(b'"warn"', b'"none"'))

"""Attacks on the files of a checkpoint by somebody who has no key, and on formats by somebody who has one."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

from attack import Scene, attack, flip

TENSOR = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}


@attack("tensor `head.bias`")
def a_bit_of_a_tensor_is_flipped(scene: Scene) -> None:
    flip(scene.model(20), -1)


@attack("the header (bytes 0 to 4096)")
def a_space_in_a_header_padding_becomes_a_newline(scene: Scene) -> None:
    path = scene.model(20)
    data = bytearray(path.read_bytes())
    data[4095] = ord("\n")
    path.write_bytes(bytes(data))


@attack("optimizer-00001-of-00001.safetensors")
def a_bit_of_the_optimizer_state_is_flipped(scene: Scene) -> None:
    flip(scene.checkpoint(10) / "optimizer-00001-of-00001.safetensors", -5)


@attack("rng-rank-00000.safetensors")
def a_bit_of_a_generator_state_is_flipped(scene: Scene) -> None:
    flip(scene.checkpoint(30) / "rng-rank-00000.safetensors", -1)


@attack("config.json")
def a_byte_of_a_json_file_is_changed(scene: Scene) -> None:
    (scene.checkpoint(20) / "config.json").write_bytes(b"[]\n")


@attack("the sha256 is not the one in MANIFEST.json")
def the_step_in_trainer_json_is_changed(scene: Scene) -> None:
    path = scene.checkpoint(20) / "trainer.json"
    path.write_bytes(path.read_bytes().replace(b'"step":20', b'"step":21'))


@attack("the manifest says")
def a_file_is_truncated(scene: Scene) -> None:
    os.truncate(scene.model(20), scene.model(20).stat().st_size - 1)


@attack("the manifest says")
def a_file_is_extended(scene: Scene) -> None:
    with open(scene.model(20), "ab") as stream:
        stream.write(b"\0")


@attack("is in the manifest, not in the folder")
def a_file_is_removed(scene: Scene) -> None:
    (scene.checkpoint(20) / "config.json").unlink()


@attack("is in the manifest, not in the folder")
def a_file_is_renamed(scene: Scene) -> None:
    (scene.checkpoint(20) / "config.json").rename(scene.checkpoint(20) / "Config.json")


@attack("is not in the manifest")
def a_file_is_added(scene: Scene) -> None:
    (scene.checkpoint(20) / "payload.py").write_text("evil")


@attack("is not in the manifest")
def an_empty_file_is_added(scene: Scene) -> None:
    (scene.checkpoint(20) / "empty").touch()


@attack("is not in the manifest")
def a_file_is_added_in_a_git_folder(scene: Scene) -> None:
    (scene.checkpoint(20) / ".git" / "hooks").mkdir(parents=True)
    (scene.checkpoint(20) / ".git" / "hooks" / "post-checkout").write_text("evil")


@attack("is not in the manifest")
def a_file_is_added_beside_the_statements(scene: Scene) -> None:
    (scene.checkpoint(20) / "provenance" / "model.safetensors").write_text("evil")


@attack("holds folders that are nested too deeply")
def a_file_is_hidden_deeper_than_a_path_can_name(scene: Scene) -> None:
    here = os.getcwd()
    os.chdir(scene.checkpoint(20))
    for _ in range(20):
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    Path("evil").touch()
    os.chdir(here)


@attack("is an empty folder")
def an_empty_folder_is_added(scene: Scene) -> None:
    (scene.checkpoint(20) / "empty").mkdir()


@attack("is not a regular file")
def a_file_becomes_a_symbolic_link_to_its_own_contents(scene: Scene) -> None:
    outside = scene.model(20).rename(scene.root.parent / "outside")
    scene.model(20).symlink_to(outside)


@attack("is not a regular file")
def a_folder_becomes_a_symbolic_link(scene: Scene) -> None:
    outside = (scene.checkpoint(20) / "provenance").rename(scene.root.parent / "outside")
    (scene.checkpoint(20) / "provenance").symlink_to(outside)


@attack("is not a folder")
def a_checkpoint_becomes_a_symbolic_link(scene: Scene) -> None:
    outside = scene.checkpoint(20).rename(scene.root.parent / "step-00000020")
    scene.checkpoint(20).symlink_to(outside)


@attack("is not a folder")
def a_checkpoint_becomes_a_file(scene: Scene) -> None:
    scene.checkpoint(40).write_text("not a checkpoint")


@attack("has 2 hard links")
def a_file_has_a_second_name_outside(scene: Scene) -> None:
    os.link(scene.model(20), scene.root.parent / "twin")


@attack("is not a regular file")
def a_file_becomes_a_pipe(scene: Scene) -> None:
    scene.model(20).unlink()
    os.mkfifo(scene.model(20))


@attack("is not a regular file")
def a_statement_becomes_a_pipe(scene: Scene) -> None:
    scene.bundle(20).unlink()
    os.mkfifo(scene.bundle(20))


@attack("is in the manifest, not in the folder")
def a_file_becomes_a_folder(scene: Scene) -> None:
    scene.model(20).unlink()
    scene.model(20).mkdir()
    (scene.model(20) / "model.safetensors").write_text("evil")


@attack("is not in the manifest")
def model_sig_becomes_a_folder(scene: Scene) -> None:
    (scene.checkpoint(20) / "model.sig").unlink()
    (scene.checkpoint(20) / "model.sig").mkdir()
    (scene.checkpoint(20) / "model.sig" / "evil.py").write_text("evil")


@attack(r"evil\x1b[2J")
def a_file_name_holds_terminal_commands(scene: Scene) -> None:
    (scene.checkpoint(20) / "evil\x1b[2J\n").write_text("evil")


@attack("is not in the manifest")
def a_file_name_is_no_unicode(scene: Scene) -> None:
    (Path(os.fsdecode(os.fsencode(scene.checkpoint(20)) + b"/\xff\xfe"))).write_text("evil")


@attack("is no checkpoint's name")
def a_stranger_lies_among_the_checkpoints(scene: Scene) -> None:
    (scene.root / "checkpoints" / "step-20").mkdir()


# The manifest, changed by somebody without a key.


@attack("is not the manifest that the statement is about")
def the_manifest_is_edited(scene: Scene) -> None:
    path = scene.checkpoint(20) / "MANIFEST.json"
    path.write_bytes(path.read_bytes().replace(b'"shape":[3]', b'"shape":[4]', 1))


@attack("is not the manifest that the statement is about")
def the_manifest_is_written_with_other_white_space(scene: Scene) -> None:
    path = scene.checkpoint(20) / "MANIFEST.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()), indent=1))


@attack("is missing", 4)
def the_manifest_is_removed(scene: Scene) -> None:
    (scene.checkpoint(20) / "MANIFEST.json").unlink()
    scene.target = scene.checkpoint(20)


# The manifest, as a signer with the right key may write it.


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
    scene.manifest(20, lambda document: document["tensors"][0].update(digest="sha256:" + "0" * 64))


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

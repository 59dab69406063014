"""Attacks on the files of a checkpoint by somebody who has no key."""

from __future__ import annotations

import json
import os
from pathlib import Path

from attack import Scene, attack, flip


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

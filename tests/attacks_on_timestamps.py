"""Attacks on timestamps, and by whoever wants something to look older, or younger, than it is."""

from __future__ import annotations

import dataclasses
import os
import shutil
import stat
from datetime import timedelta
from functools import cache
from pathlib import Path

from attack import NOBODY, Scene, attack
from authority import SIGNING_CERTIFICATE, Authority, der_of, named, stamp_log

from harness.format import der, layout
from harness.provenance.policy import rules
from harness.provenance.signing.keys import public_keys
from harness.provenance.transparency import log, timestamp

BEFORE, REVOKED, AFTER = "20261124000000Z", "2026-12-01T00:00:00Z", "20261202000000Z"
"""Moments of timestamps, and of a revocation between them."""


@cache
def tsa() -> Authority:
    """The authority that the policy names."""
    return Authority("tsa")


@cache
def stranger() -> Authority:
    """One that calls itself the same."""
    return Authority("tsa")


def stamped(scene: Scene, size: int = 3, time: str = BEFORE, *, by: Authority | None = None) -> Path:
    """The auditor trusts `tsa`; the head of ``size`` records is timestamped, by it or another."""
    scene.trust(authorities=tsa().trusted)
    return stamp_log(scene.root / layout.LOG, by or tsa(), size, time)


def required(scene: Scene) -> None:
    """The auditor wants timestamps."""
    scene.trust(authorities=tsa().trusted, required=scene.policy.required | {rules.TIMESTAMP})


def revoked(scene: Scene) -> None:
    """The maker's keys count only where they are shown to have signed before `REVOKED`."""
    moments = {key.key_id: REVOKED for key in public_keys(scene.signer)}
    scene.trust(revoked=frozenset(moments), revoked_from=moments)


@attack("the policy requires timestamps, and none covers 3 checkpoints, the first that of step 10", 4)
def timestamps_are_required_and_removed(scene: Scene) -> None:
    required(scene)


@attack("the policy requires timestamps, and none covers 1 checkpoint, that of step 30", 4)
def timestamps_are_required_and_the_newest_checkpoint_has_none(scene: Scene) -> None:
    required(scene)
    stamped(scene, 2)


@attack("the policy requires timestamps, and a checkpoint folder alone has none", 4)
def timestamps_are_required_and_a_checkpoint_is_taken_out_of_its_run(scene: Scene) -> None:
    required(scene)
    scene.target = shutil.copytree(scene.checkpoint(20), scene.root.parent / "alone")


@attack("for which no certificate of the policy vouches")
def a_timestamp_is_of_an_authority_that_nobody_knows(scene: Scene) -> None:
    stamped(scene, by=stranger())


@attack("is a timestamp of something else")
def a_timestamp_is_moved_to_another_head(scene: Scene) -> None:
    stamped(scene, 2).rename(scene.root / layout.LOG / timestamp.path_of(3))


@attack("is a timestamp of something else")
def a_timestamp_is_of_another_log(scene: Scene) -> None:
    path = stamped(scene)
    path.write_bytes(tsa().stamp(b"harness/run/another\n3\n" + b"A" * 43 + b"=\n"))


@attack("is a timestamp of something else")
def the_history_under_a_timestamp_is_rewritten_by_the_signer(scene: Scene) -> None:
    kept = stamped(scene).read_bytes()
    scene.rebuild(values="other")
    stamped(scene).write_bytes(kept)


@attack("is a timestamp of 3 records, and the log has 2: it was rolled back")
def the_run_is_rolled_back_behind_a_timestamp(scene: Scene) -> None:
    stamped(scene)
    kept = shutil.copytree(scene.root / layout.LOG / timestamp.FOLDER, scene.root.parent / "kept")
    shutil.rmtree(scene.checkpoint(30))
    scene.relog(log.read_claimed(scene.root / layout.LOG).records[:2])
    shutil.copytree(kept, scene.root / layout.LOG / timestamp.FOLDER)


@attack("is not signed by the certificate that it names")
def a_byte_of_a_timestamp_is_changed(scene: Scene) -> None:
    path = stamped(scene)
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


@attack("has an element that is cut off")
def a_timestamp_is_cut_short(scene: Scene) -> None:
    path = stamped(scene)
    path.write_bytes(path.read_bytes()[:-9])


@attack("has an element that is cut off")
def a_timestamp_is_empty(scene: Scene) -> None:
    stamped(scene).write_bytes(b"")


@attack("has a certificate of an unreadable key: Unknown key type")
def a_timestamp_is_of_a_certificate_whose_key_nobody_can_read(scene: Scene) -> None:
    path = stamped(scene)
    book = log.read_claimed(scene.root / layout.LOG)
    known, unknown = (der.encode_oid(f"1.2.840.10045.2.{number}") for number in (1, 9))
    odd = der_of(tsa().certificate).replace(known, unknown, 1)
    info = tsa().info(log.text_of(book.head))
    path.write_bytes(
        tsa().signed(
            info, certificates=[odd], change=lambda values: values.update({SIGNING_CERTIFICATE: named(odd)})
        )
    )


@attack("is larger than 65536 bytes")
def a_timestamp_has_no_end(scene: Scene) -> None:
    stamped(scene).write_bytes(bytes(1 << 20))


@attack("is a symbolic link")
def a_timestamp_becomes_a_symbolic_link(scene: Scene) -> None:
    path = stamped(scene)
    outside = path.rename(scene.root.parent / "outside.tsr")
    path.symlink_to(outside)


@attack("is not a regular file")
def a_pipe_lies_where_a_timestamp_that_nobody_asks_for_would(scene: Scene) -> None:
    path = stamped(scene)
    scene.trust(authorities=())
    path.unlink()
    os.mkfifo(path)


@attack("is not a regular file")
def a_socket_lies_where_a_timestamp_would(scene: Scene) -> None:
    path = stamped(scene)
    path.unlink()
    os.mknod(path, 0o600 | stat.S_IFSOCK)


@attack("is no file of a log of 3 records")
def the_folder_of_timestamps_is_a_link_that_leads_to_itself(scene: Scene) -> None:
    scene.trust(authorities=tsa().trusted)
    (scene.root / layout.LOG / timestamp.FOLDER).symlink_to(timestamp.FOLDER)


@attack("is no file of a log of 3 records")
def the_timestamps_lie_elsewhere(scene: Scene) -> None:
    folder = stamped(scene).parent
    folder.symlink_to(folder.rename(scene.root.parent / "elsewhere"))


@attack("has 2 hard links")
def a_timestamp_has_a_second_name_outside(scene: Scene) -> None:
    os.link(stamped(scene), scene.root.parent / "outside.tsr")


@attack("is no file of a log of 3 records")
def a_timestamp_has_a_name_that_is_none(scene: Scene) -> None:
    path = stamped(scene)
    path.rename(path.with_name("03.tsr"))


@attack("is no file of a log of 3 records")
def a_file_lies_beside_the_timestamps(scene: Scene) -> None:
    stamped(scene).with_name("evil.py").write_text("import os\n")


@attack("is signed by none of the 0 accepted keys")
def a_key_is_revoked_and_the_timestamp_is_younger(scene: Scene) -> None:
    stamped(scene, 3, AFTER)
    revoked(scene)


@attack("is signed by none of the 0 accepted keys")
def a_key_is_revoked_within_what_the_authority_means(scene: Scene) -> None:
    """It states the second before the revocation, and is exact to a second."""
    path = stamped(scene)
    book = log.read_claimed(scene.root / layout.LOG)
    second = der.encode(der.SEQUENCE, der.encode_integer(1))
    info = tsa().info(log.text_of(book.head), "20261130235959Z", accuracy=second)
    path.write_bytes(tsa().signed(info))
    revoked(scene)


@attack("is signed by none of the 0 accepted keys")
def a_checkpoint_is_added_by_a_thief_after_the_last_good_timestamp(scene: Scene) -> None:
    stamped(scene, 2)
    stamped(scene, 3, AFTER)
    revoked(scene)


@attack("is signed by none of the 0 accepted keys")
def a_thief_has_an_authority_of_their_own_that_states_any_time(scene: Scene) -> None:
    stamped(scene, by=stranger())
    revoked(scene)


@attack("is signed by none of the 0 accepted keys")
def a_key_is_revoked_and_the_policy_names_no_authority(scene: Scene) -> None:
    stamped(scene)
    scene.trust(authorities=())
    revoked(scene)


@attack("neither a kept head nor a timestamp shows that maker signed before 2026-12-01T00:00:00Z")
def a_signature_whose_time_must_be_proven_has_a_younger_timestamp(scene: Scene) -> None:
    (own,) = scene.policy.identities
    scene.trust(identities=(dataclasses.replace(own, name="maker", valid_until=REVOKED, proven=True),))
    stamped(scene, 3, AFTER)


@attack("the newest evidence is of 2026-11-23T20:00:00Z")
def an_old_state_is_timestamped_again_to_look_young(scene: Scene) -> None:
    """Anybody can have anything timestamped today; that says nothing of what is newer."""
    stamped(scene, 3, "20351231000000Z")
    scene.trust(max_age=timedelta(0))


@attack(NOBODY)
def a_stranger_signs_the_head_that_is_timestamped(scene: Scene) -> None:
    """The timestamp is good; it does not say who may sign."""
    stamped(scene)
    scene.restate(20, lambda statement: None, by=scene.stranger)

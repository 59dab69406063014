"""`harness verify` as an auditor types it: exit codes, what is printed, and what it must not import."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import run_folder
from attack import flip, trusted
from conftest import TIMEOUT
from run_folder import SampleRun

import harness as package
from harness.audit.verification import verify
from harness.cli import main
from harness.provenance.policy import policy_schema, reader, rules
from harness.provenance.signing import keys, model_signature


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a valid run and the maker's keys, not to be changed."""
    root = tmp_path_factory.mktemp("sample")
    run_folder.build(root / "run", run_folder.identity(root / "me"))
    return root


def harness(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`harness WORDS` in ``folder``."""
    command = [sys.executable, "-m", "harness", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=TIMEOUT)


KEYS = ["--key", "me.ed25519.pub", "me.p256.pub"]


@pytest.mark.parametrize("path", ["run", "run/checkpoints/step-00000020"])
def test_a_good_folder_is_verified(sample: Path, path: str) -> None:
    """Oracle: exit code 0, the verdict first, and the same as JSON."""
    done = harness(sample, "verify", path, *KEYS)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"verified  {path}\n")
    document = json.loads(harness(sample, "verify", path, *KEYS, "--json").stdout)
    assert (document["verdict"], document["findings"]) == ("verified", [])
    assert [each["steps"]["to"] for each in document["checkpoints"]] in ([10, 20, 30], [20])


def _flip(name: str) -> Callable[[Path], object]:
    return lambda folder: flip(folder / name, -2)


MODEL_ONLY: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "nothing": (lambda folder: None, 4, "signature: no Ed25519 key was given"),
    "a statement, which is not read": (_flip("provenance/slsa.sigstore.json"), 4, "no Ed25519 key"),
    "a byte of a tensor": (_flip("model.safetensors"), 1, "payload: tensor `head.bias` (bytes"),
    "a byte of a small file": (_flip("config.json"), 1, "payload: has other bytes than were signed (sha256)"),
    "the manifest": (_flip("MANIFEST.json"), 1, "manifest: is not the manifest that model.sig signs"),
    "model.sig": (_flip("model.sig"), 1, "model signature: "),
    "no model.sig": (lambda folder: (folder / "model.sig").unlink(), 4, "model signature: "),
    "one file more": (lambda folder: (folder / "x.py").touch(), 1, "file set: is not in the manifest"),
    "one file less": (lambda folder: (folder / "config.json").unlink(), 1, "file set: is in the manifest"),
}


@pytest.mark.parametrize("name", MODEL_ONLY)
def test_a_p256_key_alone_tells_whether_the_files_are_the_signed_ones(tmp_path: Path, name: str) -> None:
    """Oracle: the contract of `--key`, which takes either key: evidence is missing, so never good; of the
    whole run and of the checkpoint, what was changed in the checkpoint is found."""
    change, code, said = MODEL_ONLY[name]
    signer = run_folder.identity(tmp_path / "me")
    root = run_folder.build(tmp_path / "run", signer)
    folder = root / "checkpoints" / "step-00000020"
    whom = rules.from_keys([keys.load_public(tmp_path / "me.p256.pub")], statements=False)
    change(folder)
    for path in (folder, root):
        report = verify.verify(path, whom, quiet=True)
        assert report.exit_code == code
        assert said in "\n".join(f"{each.check}: {each}" for each in report.findings)
        assert report.checkpoints == ()
    other = run_folder.identity(tmp_path / "other")
    wrong = rules.from_keys(
        [key for key in keys.public_keys(other) if key.algorithm == "p256"], statements=False
    )
    assert verify.verify(root, wrong, quiet=True).exit_code == 1


def test_a_model_signature_that_lists_other_files_than_the_manifest_is_refused(tmp_path: Path) -> None:
    """Oracle: both are the signer's own, and say two things of one file."""
    signer = run_folder.identity(tmp_path / "me")
    folder = run_folder.build(tmp_path / "run", signer) / "checkpoints" / "step-00000020"
    public = [key for key in keys.public_keys(signer) if key.algorithm == "p256"]
    path, private = folder / "model.sig", signer.p256
    assert private is not None
    listed = model_signature.verify(path.read_bytes(), public, where="x")
    other = {**listed, "config.json": "0" * 64}
    path.write_bytes(model_signature.sign(other.items(), private, public[0], folder.name))
    report = verify.verify(folder, rules.from_keys(public, statements=False), quiet=True)
    assert report.exit_code == 1
    assert "lists other files than model.sig signs" in [each.what for each in report.findings]


@pytest.mark.parametrize("judged", [".", "checkpoints/step-00000020"])
def test_nobody_is_trusted_by_a_key_or_a_policy_in_the_run(
    sample: Path, tmp_path: Path, judged: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 2 for copies of the very keys and policy with which it is verified from outside."""
    root = tmp_path / "run"
    shutil.copytree(sample / "run", root)
    for folder in (tmp_path, root):
        for kind in ("ed25519", "p256"):
            shutil.copy(sample / f"me.{kind}.pub", folder)
        text = json.dumps(
            {
                "format": policy_schema.FORMAT,
                "identities": [{"name": "me", "keys": ["me.ed25519.pub", "me.p256.pub"]}],
            }
        )
        (folder / "team.json").write_text(text)
    for words in (["--key", "me.ed25519.pub"], ["--key", "me.p256.pub"], ["--policy", "team.json"]):
        good = main(["verify", str(root / judged), words[0], str(tmp_path / words[1])])
        assert good == (4 if "p256" in words[1] else 0)
        capsys.readouterr()
        assert main(["verify", str(root / judged), words[0], str(root / words[1])]) == 2
        assert "from the folder that is checked" in capsys.readouterr().err


@pytest.fixture
def family(tmp_path: Path) -> tuple[SampleRun, SampleRun]:
    """A run with checkpoints 10 and 20, and one that began with 20."""
    signer = run_folder.identity(tmp_path / "me")
    base = SampleRun(tmp_path / "base", signer, name="base")
    base.advance(10, 20)
    child = SampleRun(tmp_path / "child", signer, name="child", start=base.saved[20].as_start(base))
    child.advance(10, 20)
    return base, child


def judged(run: SampleRun, *beside: Path) -> tuple[int, str]:
    """Exit code, and findings and notes as text."""
    report = verify.verify(run.root, trusted(run.signer), beside=beside, quiet=True)
    return report.exit_code, "\n".join([*map(str, report.findings), *report.notes])


def test_what_a_run_began_with_is_checked_where_it_is_at_hand(family: tuple[SampleRun, SampleRun]) -> None:
    """Oracle: the parent as it was, pruned, and one checkpoint of it alone; without it a note says so."""
    base, child = family
    assert judged(child, base.root)[0] == 0
    assert judged(child, base.saved[20].folder)[0] == 0
    code, text = judged(child)
    assert (code, "not at hand, so not checked" in text) == (0, True)
    base.prune(20)
    assert judged(child, base.root)[0] == 0
    assert verify.verify(child.saved[20].folder, trusted(child.signer), beside=[base.root]).exit_code == 0


def test_lines_that_no_checkpoint_has_signed_are_named(
    family: tuple[SampleRun, SampleRun],
) -> None:
    """Oracle: the last line's step; a run that has just saved has none, one step on there is one."""
    base, _ = family
    assert "metrics.jsonl: signed up to step 20\n" in judged(base)[1] + "\n"
    with base.root.joinpath("metrics.jsonl").open("ab") as stream:
        stream.write(b'{"step":21}\n')
    assert "metrics.jsonl: signed up to step 20, later lines are not yet\n" in judged(base)[1] + "\n"


def test_a_start_that_is_not_what_the_child_says_is_found(family: tuple[SampleRun, SampleRun]) -> None:
    """Oracle: a lie about step or statement, a parent that is another run, a parent that was changed."""
    base, child = family
    for lie, says in (
        ({"step": 10}, "began with step 10 of base, and that checkpoint is step 20"),
        ({"bundle_sha256": "0" * 64}, "whose statement was another one"),
        ({"run": "0" * 32}, "is not in what --with names"),
        ({"checkpoint": "0" * 64}, "is not in what --with names"),
    ):
        told = {**base.saved[20].as_start(base), **lie}
        liar = SampleRun(
            child.root.parent / f"liar {says[:12]}{len(lie)}{next(iter(lie))}", child.signer, start=told
        )
        liar.advance(10)
        code, text = judged(liar, base.root)
        assert (code, says in text) == (4 if "names" in says else 1, True), text
    (base.saved[20].folder / "MANIFEST.json").write_bytes(b"{}")
    assert judged(child, base.root)[0] == 1


def test_keys_may_be_given_together_or_one_by_one(sample: Path) -> None:
    """Oracle: all forms of the contract give the same verdict."""
    forms = (
        ["verify", "run", "--key", "me.ed25519.pub", "--key", "me.p256.pub"],
        ["verify", "--key=me.ed25519.pub", "run"],
        ["verify", "run", "--key", "me.p256.pub", "me.ed25519.pub"],
    )
    assert [harness(sample, *form).returncode for form in forms] == [0, 0, 0]


def test_a_link_to_a_run_or_checkpoint_is_followed_and_none_inside(sample: Path, tmp_path: Path) -> None:
    """Oracle: the auditor's own link is fine, a link in the evidence is not."""
    (tmp_path / "link").symlink_to(sample / "run" / "checkpoints" / "step-00000010")
    given = [word.replace("me.", f"{sample}/me.") for word in KEYS]
    assert harness(tmp_path, "verify", "link", *given).returncode == 0
    shutil.copytree(sample / "run", tmp_path / "run")
    model = tmp_path / "run" / "checkpoints" / "step-00000010" / "model.safetensors"
    model.rename(tmp_path / "elsewhere")
    model.symlink_to(tmp_path / "elsewhere")
    done = harness(tmp_path, "verify", "run", *given)
    assert done.returncode == 1
    assert "is not a regular file" in done.stdout


def test_a_flipped_bit_is_located(sample: Path, tmp_path: Path) -> None:
    """Oracle: the tensor whose bytes the test has changed."""
    shutil.copytree(sample / "run", tmp_path / "run")
    model = tmp_path / "run" / "checkpoints" / "step-00000020" / "model.safetensors"
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    given = [word.replace("me.", f"{sample}/me.") for word in KEYS]
    done = harness(tmp_path, "verify", "run", *given)
    assert done.returncode == 1
    assert done.stdout.startswith("FAILED")
    (line,) = [line for line in done.stdout.splitlines() if line.lstrip().startswith("wrong")]
    assert f"(bytes {len(data) - 12} to {len(data)})" in line
    assert "step-00000020/model.safetensors" in line


def test_without_a_key_nothing_is_said_about_it(sample: Path) -> None:
    """Oracle: a usage error, and the copy of the policy in the folder is not looked at."""
    done = harness(sample, "verify", "run")
    assert done.returncode == 2
    assert "give --key" in done.stderr


def test_another_persons_key_is_not_enough(sample: Path, tmp_path: Path) -> None:
    """Oracle: exit code 1 with every signature refused."""
    run_folder.identity(tmp_path / "other")
    done = harness(sample, "verify", "run", "--key", str(tmp_path / "other.ed25519.pub"))
    assert done.returncode == 1
    assert done.stdout.count("is signed by none of the 1 accepted keys") == 3


def test_a_policy_file_decides_and_its_errors_have_a_line(sample: Path, tmp_path: Path) -> None:
    """Oracle: the same folder under three policies."""
    given = f"keys: [{sample}/me.ed25519.pub, {sample}/me.p256.pub]"
    head = f"format: harness-policy/1\nidentities:\n  - name: me\n    {given}\n"
    cases = {
        "": 0,
        "revoked: [" + "0" * 64 + "]\n": 0,
        "threshold: 1\nlog_head: {origin: harness/run/0, size: 9, root: " + "0" * 64 + "}\n": 1,
    }
    for number, (rest, expected) in enumerate(cases.items()):
        file = tmp_path / f"{number}.yaml"
        file.write_text(head + rest)
        assert harness(sample, "verify", "run", "--policy", str(file)).returncode == expected
    broken = tmp_path / "broken.yaml"
    broken.write_text(head + "treshold: 2\n")
    done = harness(sample, "verify", "run", "--policy", str(broken))
    assert done.returncode == 2
    assert "broken.yaml:5" in done.stderr


@pytest.mark.parametrize("limits", [{"valid_until": "2026-01-01T00:00:00Z"}, {"runs": ("another",)}])
def test_what_is_signed_out_of_time_or_place_is_said_once(sample: Path, limits: dict[str, Any]) -> None:
    """Oracle: one finding a checkpoint, the reason, though the rest that is signed does not count either."""
    signer = keys.load_signer(sample / "me.key")
    policy = trusted(signer)
    limited = rules.Identity("alice", policy.identities[0].keys, **limits)
    policy = replace(policy, identities=(limited,))
    report = verify.verify(run_folder.checkpoint(sample / "run", 20), policy, quiet=True)
    (finding,) = report.findings
    assert finding.check == "policy"
    assert "valid until" in finding.what or "may not sign for the run" in finding.what
    assert not {"slsa", "model signature", "policy"} & set(report.passed)
    whole = verify.verify(sample / "run", policy, quiet=True)
    assert [(each.check, each.what) for each in whole.findings] == [("policy", finding.what)] * 3
    assert any(note.startswith("log: not checked") for note in whole.notes)


def test_a_pruned_checkpoint_alone_cannot_be_told_good(sample: Path, tmp_path: Path) -> None:
    """Oracle: exit code 4 for the checkpoint, 0 for the run."""
    signer = run_folder.identity(tmp_path / "me")
    run_folder.build(tmp_path / "run", signer, pruned=(10,))
    assert harness(tmp_path, "verify", "run", *KEYS).returncode == 0
    done = harness(tmp_path, "verify", "run/checkpoints/pruned-step-00000010", *KEYS)
    assert done.returncode == 4
    assert done.stdout.startswith("cannot tell")


def test_what_a_key_alone_does_not_check_is_said(sample: Path) -> None:
    """Oracle: notes of a verification with the Ed25519 key only, of one checkpoint."""
    trust = rules.from_keys([keys.load_public(sample / "me.ed25519.pub")])
    notes = verify.verify(sample / "run" / "checkpoints" / "step-00000010", trust).notes
    assert "model.sig: not checked (no P-256 key given)" in notes
    assert any(note.startswith("lineage and log: not checked") for note in notes)


def test_the_auditors_half_needs_neither_torch_nor_numpy_nor_pydantic(sample: Path) -> None:
    """Oracle: an interpreter in which importing them is an error."""
    code = (
        "import sys\n"
        "for name in ('torch', 'numpy', 'accelerate', 'safetensors', 'pydantic'): sys.modules[name] = None\n"
        "from harness.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, "verify", "run", *KEYS]
    done = subprocess.run(command, cwd=sample, env=os.environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_that_cannot_be_read_is_the_environments_fault(
    sample: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: an I/O error is neither good nor forged."""
    from harness.errors import EnvironmentFault

    trust = rules.from_keys([keys.load_public(sample / "me.ed25519.pub")])

    def failing(*words: object, **options: object) -> int:
        raise OSError(5, "Input/output error", "disk")

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(EnvironmentFault, match="Input/output error"):
        verify.verify(sample / "run", trust, quiet=True)


def test_a_system_that_does_not_say_which_cores_are_allowed(
    sample: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the verdict; macOS has no `os.sched_getaffinity`."""
    monkeypatch.delattr(os, "sched_getaffinity")
    trust = rules.from_keys([keys.load_public(sample / "me.ed25519.pub")])
    assert verify.verify(sample / "run", trust, quiet=True).verdict == "verified"


def test_a_program_asks_as_the_command_line_does(sample: Path, tmp_path: Path) -> None:
    """Oracle: the command's JSON; one flipped byte; `import harness` alone loads nothing of ours."""
    (sample / "team.yaml").write_text(
        "format: harness-policy/1\nidentities:\n- name: me\n  keys: [me.ed25519.pub, me.p256.pub]\n"
    )
    report = package.verify(sample / "run", sample / "team.yaml")
    typed = json.loads(harness(sample, "verify", "run", "--policy", "team.yaml", "--json").stdout)
    assert (report.exit_code, report.verdict) == (0, "verified")
    assert report.document()["checkpoints"] == typed["checkpoints"]
    copy = shutil.copytree(sample / "run", tmp_path / "run")
    flip(run_folder.checkpoint(copy, 20) / "model.safetensors", -1)
    failed = package.verify(str(copy), reader.load(sample / "team.yaml"))
    assert (failed.exit_code, ["head.bias" in each.what for each in failed.findings]) == (1, [True])
    code = "import sys, harness; print(sorted(name for name in sys.modules if name.startswith('harness')))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "['harness']\n"

"""A run folder is handed to strangers: nothing private gets into any byte of it."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
from collections.abc import Iterator
from importlib import util
from pathlib import Path

import pytest
from conftest import Place
from toy_task import config

from harness import config as configs
from harness import environment, privacy

SECRET = "sesame-0b5e7c"
USER = "adalovelace1815"
HOST = "node-planted-7731"
VARIABLES = (
    *("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "MY_PASSWORD", "NCCL_COMM_ID"),
    *("NCCL_TOPO_FILE", "SLURM_JOB_NODELIST", "SLURM_NODELIST", "SSH_CONNECTION", "http_proxy"),
)
PLANTED_HOST = f"import socket\nsocket.gethostname = lambda: {HOST!r}\n"
LEAKY = '''
import os, pathlib, socket
from toy_task import Toy

class Leaky(Toy):
    """Fails with a message and a traceback that name home and host, until it is told not to."""

    def __init__(self, *, seed, folder):
        super().__init__(seed=seed)
        self._folder, self._losses = pathlib.Path(folder), 0
        assert self._folder.is_dir()

    def loss(self, model, batch):
        self._losses += 1
        if self._losses == 81 and "MENDED" not in os.environ:
            raise OSError(f"{self._folder}/x.bin is broken on {socket.gethostname()}")
        return super().loss(model, batch)
'''


def test_no_byte_of_a_run_tells_a_secret_the_home_the_user_or_the_host(tmp_path: Path) -> None:
    """Oracle: values planted where a run could pick them up, searched in every byte that it left, payloads of
    bundles decoded; and that the run goes on, its written paths being what they were."""
    root = tmp_path / USER
    root.mkdir()
    place = Place(root)
    (root / "data").mkdir()
    (root / "leaky.py").write_text(LEAKY)
    (root / "sitecustomize.py").write_text(PLANTED_HOST)
    task = f'{{kind: "leaky:Leaky", options: {{folder: {root}/data}}}}'
    track = f"{{wandb: {'offline' if util.find_spec('wandb') else 'off'}}}"
    place.write("toy.yaml", config(place.run, task=task, track=track))
    environ = {
        **dict.fromkeys(VARIABLES, SECRET),
        "USER": USER,
        "LOGNAME": USER,
        "HOSTNAME": HOST,
        "NCCL_ALGO": f"{root}/nccl on {HOST}",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    crashed = place.harness("train", f"{root}/toy.yaml", environ=environ, fresh=True)
    assert crashed.code == 1, crashed.err
    assert "x.bin is broken" in crashed.err
    mended = place.harness(
        "train", f"{root}/toy.yaml", "--json", environ={**environ, "MENDED": "1"}, fresh=True
    )
    assert mended.code == 0, mended.err
    assert json.loads(mended.out)["kind"] == "exact"
    assert b"x.bin is broken on <host>" in (place.run / "events/rank-00000.jsonl").read_bytes()
    assert list((place.run / "wandb").glob("*/*.wandb")) or "off" in track
    real = re.compile(rf"(?<!\w){re.escape(socket.gethostname())}(?!\w)".encode())
    planted = re.compile("|".join([SECRET, USER, HOST, re.escape(str(tmp_path))]).encode())
    assert list(leaks(place.run, planted)) == []
    # A short name may stand in a tensor by chance.
    assert list(leaks(place.run, real, "*.json*")) == []


def leaks(root: Path, sought: re.Pattern[bytes], names: str = "*") -> Iterator[str]:
    """Where ``sought`` stands in the files ``names`` below ``root``, base64 payloads included."""
    for path in sorted(root.rglob(names)):
        if not path.is_file():
            continue
        data = path.read_bytes()
        parts = [str(path.relative_to(root)).encode(), data]
        parts += [base64.b64decode(text) for text in re.findall(rb'"payload": ?"([A-Za-z0-9+/=]+)"', data)]
        for part in parts:
            for match in sought.finditer(part):
                yield f"{path.relative_to(root)}: {part[max(0, match.start() - 60) : match.end() + 20]!r}"


def test_a_path_below_home_is_written_as_such_and_read_under_another_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the text under one home, the settings under another; a link to the home counts as home."""
    (tmp_path / "real").mkdir()
    (tmp_path / "ada").symlink_to(tmp_path / "real")
    monkeypatch.setenv("HOME", str(tmp_path / "ada"))
    file = tmp_path / "c.yaml"
    options = f"{{a: {tmp_path}/real/x, b: [{tmp_path}/ada/y], c: '{tmp_path}/adair/z'}}"
    file.write_text(config(tmp_path / "ada" / "run", task=f"{{kind: toy, options: {options}}}"))
    text = configs.resolved_text(configs.load(file).settings)
    assert "dir: ~/run\n" in text.replace('"', "")
    monkeypatch.setenv("HOME", "/home/bob")
    read = configs.parse(text, "run.yaml")
    assert read.run.dir == Path("/home/bob/run")
    assert read.task.options == {"a": "/home/bob/x", "b": ["/home/bob/y"], "c": f"{tmp_path}/adair/z"}
    assert configs.resolved_text(read) == text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/home/ada", "~"),
        ("--out=/home/ada/x:/home/ada/y", "--out=~/x:~/y"),
        ("/home/adalbert/x", "/home/adalbert/x"),
        (
            "/scratch/ada/x on node7: node7.net, node77",
            "/scratch/<user>/x on <host>: <host>.net, node77",
        ),
    ],
)
def test_free_text_loses_only_what_is_private(text: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: written by hand."""
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setattr(privacy, "_user", lambda: "ada")
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    assert privacy.scrubbed(text) == told


def test_the_host_is_told_only_when_it_is_asked_for() -> None:
    """Oracle: the machine's own name."""
    assert "host" not in environment.facts()
    assert environment.facts(host=True)["host"] == socket.gethostname()

"""What a determinism mode changes, what is read back, and how torch's refusals are told."""

from __future__ import annotations

import os

import pytest
import torch
from conftest import Place
from test_train import predicate
from toy_task import config

from harness.determinism import settings
from harness.errors import EnvironmentFault, TrainingFailed


@pytest.fixture
def restored(monkeypatch):
    """Process-wide flags as they were, after the test."""
    yield monkeypatch
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.backends.cudnn.deterministic = False


@pytest.mark.parametrize("mode", ["off", "warn"])
def test_off_and_warn_change_nothing(mode):
    """Oracle: every setting that is read back, and the whole environment, before and after."""
    before, environment = settings.read_back(), dict(os.environ)
    assert settings.apply(mode) == []
    assert settings.read_back() == before
    assert dict(os.environ) == environment


def test_strict_is_read_back_and_tells_what_it_changed(restored):
    """Oracle: torch's own getters; warn_only stays off."""
    changes = settings.apply("strict")
    held = settings.read_back()
    assert "deterministic_algorithms = True (was False)" in changes
    assert torch.are_deterministic_algorithms_enabled() is held["deterministic_algorithms"] is True
    assert torch.is_deterministic_algorithms_warn_only_enabled() is held["deterministic_warn_only"] is False
    assert held["inductor_deterministic"] is True
    assert torch.backends.cudnn.deterministic
    assert settings.apply("strict") == []


def test_strict_makes_an_indexing_gradient_come_out_the_same_each_time(restored):
    """Oracle: 30 executions on two threads; without strict they differ (tests/test_ledger.py)."""
    settings.apply("strict")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert len({gradient_of_indexing() for _ in range(30)}) == 1
    finally:
        torch.set_num_threads(before)


def gradient_of_indexing() -> bytes:
    """The bytes of a gradient that sums 60,000 rows into 20."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.zeros(20, 16, requires_grad=True)
    index = torch.randint(0, 20, (60_000,), generator=generator)
    scale = torch.randn(60_000, 16, generator=generator)
    (weight[index] * scale).sum().backward()
    assert weight.grad is not None
    return weight.grad.numpy().tobytes()


REFUSED = {
    "put_": lambda: torch.zeros(3).put_(torch.tensor([0]), torch.ones(1)),
    "max_unpooling2d_forward_out": lambda: torch.nn.functional.max_unpool2d(
        torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1, dtype=torch.int64), 2
    ),
}


@pytest.mark.parametrize("op", REFUSED)
def test_strict_refuses_an_operator_without_deterministic_form_and_names_it(restored, op):
    """Oracle: torch raises; the explanation bears the operator, the mode and a way out, on one line."""
    settings.apply("strict")
    with pytest.raises(RuntimeError) as raised:
        REFUSED[op]()
    explained = settings.explain(raised.value)
    assert isinstance(explained, TrainingFailed)
    text = str(explained)
    assert f"`{op}`" in text
    assert "determinism.mode strict" in text
    assert "determinism.mode=warn" in text
    assert "\n" not in text


def test_the_remedy_names_an_alternative_where_one_is_known():
    """Oracle: the catalogue's row for put_ and for interpolate."""
    put = settings.explain(RuntimeError("put_ does not have a deterministic implementation, but you set ..."))
    assert put is not None
    assert "index_put_" in str(put)
    resized = settings.explain(
        RuntimeError("upsample_bilinear2d_backward_out_cuda does not have a deterministic implementation")
    )
    assert resized is not None
    assert "nearest" in str(resized)


def test_the_cublas_refusal_tells_the_variable_to_set():
    """Oracle: the text that torch raises on CUDA without a workspace (aten/src/ATen/Context.cpp)."""
    message = (
        "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or "
        "`at::Context::setDeterministicAlgorithms(true)`, but this operation is not deterministic because it "
        "uses CuBLAS and you have CUDA >= 10.2."
    )
    assert "CUBLAS_WORKSPACE_CONFIG=:4096:8" in str(settings.explain(RuntimeError(message)))


def test_other_errors_are_not_explained():
    """Oracle: an error about something else."""
    assert settings.explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


@pytest.fixture
def cuda_build(monkeypatch):
    """A build that says it has CUDA, with none of the variables set."""
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NCCL_PROTO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO"):
        monkeypatch.setenv(name, "to be removed by monkeypatch")
        monkeypatch.delenv(name)
    return monkeypatch


def test_strict_sets_what_cublas_and_nccl_read_at_start(cuda_build, restored):
    """Oracle: the environment; a value that the user chose stays."""
    cuda_build.setenv("NCCL_PROTO", "LL128")
    changes = settings.apply("strict")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["NCCL_ALGO"] == "Ring"
    assert os.environ["NCCL_PROTO"] == "LL128"
    assert "NCCL_ALGO = Ring (was None)" in changes
    assert not any(line.startswith("NCCL_PROTO") for line in changes)


def test_strict_refuses_a_cublas_workspace_that_is_not_deterministic(cuda_build, restored):
    """Oracle: NVIDIA's documentation allows :4096:8 and :16:8."""
    cuda_build.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(EnvironmentFault, match=":0:0 is not deterministic"):
        settings.apply("strict")


def test_strict_refuses_to_come_too_late(cuda_build, restored):
    """Oracle: CUDA says that it has started; the remedy is the line to type."""
    cuda_build.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(EnvironmentFault) as raised:
        settings.apply("strict")
    assert "export CUBLAS_WORKSPACE_CONFIG=:4096:8" in str(raised.value)


PRECISE = """
import torch
from toy_task import Toy


class Precise(Toy):
    def loss(self, model, batch):
        torch.set_float32_matmul_precision("high")
        return super().loss(model, batch)
"""


def test_what_the_first_step_changes_is_said_and_signed_as_it_then_is(place: Place) -> None:
    """Oracle: the task's loss sets another precision of products; nothing else is said to change."""
    (place.root / "precise_task.py").write_text(PRECISE)
    task, train = '{kind: "precise_task:Precise"}', "{steps: 1, global_batch: 2, micro_batch: 2}"
    place.write("toy.yaml", config(place.run, task=task, train=train, evaluate="{every: 0}"))
    assert (done := place.harness("train", "toy.yaml")).code == 0, done.err
    changed = "float32_matmul_precision: highest → high"
    if torch.backends.cuda.is_built():  # torch keeps an older name of the same choice in step
        changed += "; matmul_allow_tf32: False → True"
    assert f"by the first step, and signed as it is now: {changed}\n" in done.out + done.err
    signed = predicate(place.run / "checkpoints" / "step-00000001")
    assert signed["determinism"]["settings"]["float32_matmul_precision"] == "high"  # type: ignore[index]
    assert signed["determinism"]["settings"]["changed_by_first_step"] == changed  # type: ignore[index]
    assert signed["environment"]["stack"]["float32_matmul_precision"] == "highest"  # type: ignore[index]


def test_strict_settings_that_were_undone_stop_the_run(restored):
    """Oracle: torch's own switch, back at its default; another setting may change."""
    settings.apply("strict")
    before = settings.read_back()
    assert settings.read_again("strict", before) == (before, [])
    torch.use_deterministic_algorithms(False)
    with pytest.raises(TrainingFailed, match="deterministic_algorithms: True → False"):
        settings.read_again("strict", before)
    assert "deterministic_algorithms: True → False" in settings.read_again("warn", before)[1]


def test_the_stack_names_the_libraries_that_multiply():
    """Oracle: the words that torch prints of its build."""
    stack, told = settings.stack(), torch.__config__.show()
    assert f"Math Kernel Library Version {stack['mkl']}-" in told or stack["mkl"] is None
    assert f"MKL-DNN v{stack['onednn']} " in told or stack["onednn"] is None


def test_the_thread_count_is_read_back_not_remembered():
    """Oracle: torch, after a change."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert settings.read_back()["threads"] == 1
        torch.set_num_threads(2)
        assert settings.read_back()["threads"] == 2
    finally:
        torch.set_num_threads(before)


def test_a_machine_with_other_cores_is_the_same_stack_where_operators_have_as_many_threads(monkeypatch):
    """Oracle: what torch asks the machine for and no operator uses."""
    before = settings.stack()
    monkeypatch.setattr(torch, "get_num_interop_threads", lambda: 96)
    monkeypatch.setattr(os, "cpu_count", lambda: 192)
    assert settings.stack() == before
    assert 96 not in before.values()


def test_the_stack_is_flat_plain_and_repeatable():
    """Oracle: values that JSON has, the same when asked twice, every setting among them."""
    stack = settings.stack()
    assert stack == settings.stack()
    assert all(value is None or isinstance(value, str | int | bool) for value in stack.values())
    assert settings.read_back().items() <= stack.items()
    assert stack["torch"] == torch.__version__
    assert stack["cpu_capability"] == torch.backends.cpu.get_cpu_capability()

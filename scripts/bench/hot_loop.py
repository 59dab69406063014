"""What the harness adds to a step: µs over a bare PyTorch loop on a model so small that little else is left.

python scripts/bench/hot_loop.py [--steps 1500] [--rounds 3] [--json FILE]

One layer, width 32, 32 tokens, batch 1, fp32, one thread, fused AdamW; `every audit` clips. Each loop runs
for real (the harness: `harness.training.loop.train`), and whenever it fetches a batch, one step of the bare
loop runs in between: every step is compared with its neighbour, and medians are over thousands of pairs.
Peers that are not installed are left out and named: HF Trainer and Lightning need
`pip install transformers lightning` in an environment of their own.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import table_task
import torch
from interleave import Pairs, keep, spread, table, verdict
from table_task import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from harness import config
from harness.provenance.signing import keys
from harness.training.loop import train

SIZES = {"layers": 1, "width": 32, "heads": 2, "length": 32}
OFF, ALL = "harness, audits off", "harness, every audit"
LIMITS = {OFF: 30.0, ALL: 100.0}
LIMIT_STEP = 607.0
"""µs of the bare step on the machine for which the limits were set (facts/performance.md, section 1)."""
NO_AUDITS = ["determinism.mode=off", "determinism.step_digests=false", "optimizer.clip=null"]


def build() -> tuple[Table, nn.Module, torch.optim.Optimizer]:
    """Task, model and optimizer as every loop has them: no weight decay on vectors, so two groups."""
    torch.manual_seed(0)
    task = Table(seed=0, **SIZES)
    model = task.build_model()
    groups = [
        {"params": [each for each in model.parameters() if each.dim() >= 2], "weight_decay": 0.1},
        {"params": [each for each in model.parameters() if each.dim() < 2], "weight_decay": 0.0},
    ]
    return task, model, torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)


def bare() -> Callable[[], None]:
    """One step of the bare loop; the loss is read, as any loop does that prints it or stops at NaN."""
    task, model, optimizer = build()
    places = iter(np.resize(np.arange(task.samples), 10**6).reshape(-1, 1))
    epochs = np.zeros(1, dtype=np.int64)

    def step() -> None:
        loss = task.loss(model, task.gather(next(places), epochs))
        loss.backward()
        loss.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class Fetching(Dataset[Tensor]):
    """The table's rows for a DataLoader; each fetch calls ``pairs.fetched``."""

    def __init__(self, task: Table, pairs: Pairs) -> None:
        self._rows, self._pairs = task.rows, pairs

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Tensor:
        self._pairs.fetched()
        return self._rows[index]


def run_harness(pairs: Pairs, folder: Path, overrides: list[str], steps: int) -> None:
    """A fresh run of the real loop."""
    with tempfile.TemporaryDirectory(dir=folder) as run:
        made = config.load(folder / "tiny.yaml", [f"run.dir={run}/run", f"train.steps={steps}", *overrides])
        table_task.on_batch = pairs.fetched
        try:
            train(made, quiet=True)
        finally:
            table_task.on_batch = None


def run_accelerate(pairs: Pairs, steps: int) -> None:
    """The loop of accelerate's quicktour: everything prepared, `accelerator.backward`."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    task, model, optimizer = build()
    loader = DataLoader(Fetching(task, pairs), batch_size=1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    def batches() -> Iterator[Tensor]:
        while True:
            yield from loader

    for _, batch in zip(range(steps), batches(), strict=False):
        optimizer.zero_grad()
        loss = task.loss(model, (batch,))
        accelerator.backward(loss)
        loss.item()
        optimizer.step()


def run_hf(pairs: Pairs, folder: Path, steps: int) -> None:
    """transformers' Trainer on the same module, logging and saving switched off."""
    from transformers import Trainer, TrainingArguments

    task, model, _ = build()

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, rows: Tensor) -> dict[str, Tensor]:
            return {"loss": task.loss(self.model, (rows,))}

    arguments = TrainingArguments(
        output_dir=str(folder / "hf"),
        max_steps=steps,
        per_device_train_batch_size=1,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        max_grad_norm=0,
        disable_tqdm=True,
        use_cpu=True,
        optim="adamw_torch_fused",
    )
    collate = {"data_collator": lambda rows: {"rows": torch.stack(rows)}}
    Trainer(Wrapped(), arguments, train_dataset=Fetching(task, pairs), **collate).train()


def run_lightning(pairs: Pairs, steps: int) -> None:
    """Lightning's Trainer with one logged value, bars and checkpoints switched off."""
    import lightning

    task, model, optimizer = build()

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Tensor, number: int) -> Tensor:
            loss = task.loss(self.model, (batch,))
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(max_steps=steps, accelerator="cpu", logger=False, **quiet)
    trainer.fit(Module(), DataLoader(Fetching(task, pairs), batch_size=1))


def loops(folder: Path, steps: int) -> dict[str, Callable[[Pairs], None]]:
    """Name → one run of it, for all that is installed."""
    found: dict[str, Callable[[Pairs], None]] = {
        OFF: lambda pairs: run_harness(pairs, folder, NO_AUDITS, steps),
        ALL: lambda pairs: run_harness(pairs, folder, [], steps),
        "accelerate, documented loop": lambda pairs: run_accelerate(pairs, steps),
    }
    if importlib.util.find_spec("transformers"):
        found["HF Trainer, stripped"] = lambda pairs: run_hf(pairs, folder, steps)
    if importlib.util.find_spec("lightning"):
        found["Lightning Trainer, self.log"] = lambda pairs: run_lightning(pairs, steps)
    return found


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    added: dict[str, list[float]] = {}
    bare_us: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys.create(folder / "me")
        (folder / "tiny.yaml").write_text(config_text(folder))
        for _ in range(arguments.rounds):
            for each, run in loops(folder, arguments.steps).items():
                pairs = Pairs(bare())
                run(pairs)
                added.setdefault(each, []).extend(pairs.added())
                bare_us.setdefault(each, []).extend(pairs.settled()[1])
    rows = [("loop", "bare step µs", "added µs", "added / bare step")]
    share = {each: statistics.median(added[each]) / statistics.median(bare_us[each]) for each in added}
    for each, values in added.items():
        rows.append(
            (each, f"{statistics.median(bare_us[each]):.0f}", spread(values, "+.0f"), f"{share[each]:+.1%}")
        )
    print(table(rows))
    for each, limit in LIMITS.items():
        allowed = limit / LIMIT_STEP
        text = (
            f"{each}: {share[each]:+.1%} of a bare step; {limit:.0f} of {LIMIT_STEP:.0f} µs are {allowed:.1%}"
        )
        print(verdict(text, share[each], allowed))
    missing = [each for each in ("transformers", "lightning") if not importlib.util.find_spec(each)]
    if missing:
        print(f"not installed, so not measured: {', '.join(missing)}")
    keep(
        arguments.json, {"added_us": {each: statistics.median(added[each]) for each in added}, "share": share}
    )


def config_text(folder: Path) -> str:
    """The config of the harness's runs."""
    sizes = ", ".join(f"{key}: {value}" for key, value in SIZES.items())
    return (
        f"run: {{dir: x}}\ntask: {{kind: 'table_task:Table', options: {{{sizes}}}}}\n"
        "train: {steps: 1, global_batch: 1, micro_batch: 1}\ncheckpoint: {every: 1000000}\n"
        f"schedule: {{kind: constant}}\nsigning: {{key: {folder}/me.key}}\n"
    )


if __name__ == "__main__":
    main()

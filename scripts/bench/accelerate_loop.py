"""A training loop as accelerate documents it, with `save_state`, `load_state` and `skip_first_batches`.

python scripts/bench/accelerate_loop.py FOLDER STEPS EVERY

Follows examples/by_feature/checkpointing.py of accelerate: saves every so many steps, and when FOLDER holds
a saved state, continues from the newest. Dropout, shuffling, one loader process, an epoch of five steps.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

EPOCH = 5
BATCH = 10
PAUSE = 0.03
"""Seconds that a step lasts longer, so that a kill finds its middle."""


def main(folder: Path, steps: int, every: int) -> None:
    """Train to ``steps``."""
    accelerator = Accelerator(cpu=True)
    set_seed(3)
    x = torch.randn(EPOCH * BATCH, 8)
    data = TensorDataset(x, (x[:, 0] > 0).long())
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, num_workers=1)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    saved = sorted(folder.glob("step_*"))
    done = int(saved[-1].name.removeprefix("step_")) if saved else 0
    if saved:
        accelerator.load_state(str(saved[-1]))
    for epoch in range(done // EPOCH, -(-steps // EPOCH)):
        within = done % EPOCH if epoch == done // EPOCH else 0
        active = accelerator.skip_first_batches(loader, within) if within else loader
        for number, (inputs, labels) in enumerate(active, start=epoch * EPOCH + within + 1):
            if number > steps:
                return
            time.sleep(PAUSE)
            loss = nn.functional.cross_entropy(model(inputs), labels)
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if number % every == 0:
                accelerator.save_state(str(folder / f".step_{number:04d}"))
                (folder / f".step_{number:04d}").rename(folder / f"step_{number:04d}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

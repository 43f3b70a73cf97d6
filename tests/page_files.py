"""What pages take for granted: files that their reader has, by page. Each is run before the page's own code."""

from __future__ import annotations

CHECKPOINT = """
import timm
import torch

model = timm.create_model("test_resnet", num_classes=3)
torch.save({"state_dict": model.state_dict(), "arch": "test_resnet", "epoch": 1}, "model_best.pth.tar")
"""

# A train.py that does with the model what timm's does: a moving average, an optimiser, a checkpoint of its saver.
TIMM_SCRIPT = """
import pathlib

import nmfx
import timm

nmfx.find_scheme(timm.create_model("test_resnet", num_classes=3), target=0.75).scheme.save("scheme.yaml")
pathlib.Path("output").mkdir()
pathlib.Path("train.py").write_text('''
import timm, timm.optim, timm.utils, torch
model = timm.create_model("sparse_test_resnet", num_classes=3, in_chans=3)
optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.01)
average = timm.utils.ModelEmaV3(model)
model(torch.randn(2, 3, 32, 32)).square().sum().backward()
optimizer.step()
average.update(model)
saver = timm.utils.CheckpointSaver(model, optimizer, model_ema=average, checkpoint_dir="output", recovery_dir="output")
saver.save_checkpoint(0, metric=1.0)
''')
"""

LOOP = """
import itertools

import torch
from torch import nn

import nmfx

model, x = nn.Sequential(nn.Conv2d(16, 32, 1), nn.Flatten(), nn.Linear(32 * 16, 16)), torch.randn(4, 16, 4, 4)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
batches = itertools.repeat(x)


def loss_of(model, batch):
    return model(batch).square().mean()
"""

BEFORE = {
    "README.md": CHECKPOINT,
    "docs/guides/timm-checkpoint.md": CHECKPOINT,
    "docs/how-it-works.md": LOOP,
    "docs/guides/training.md": TIMM_SCRIPT,
    "docs/guides/without-training.md": CHECKPOINT,
}

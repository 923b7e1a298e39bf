"""Count on the CPU where a training step's own code would wait for a GPU: operations that read values or need a size.

Not counted are copies to the GPU, and what Lightning does around `training_step`: batches, optimizer, progress bar.
"""

import functools
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")
pytest.importorskip("lightning.pytorch")

import trainers  # noqa: E402

from sgalign.training import (  # noqa: E402
    AlignMotifsModule,
    AlignSGTRModule,
    MotifsModule,
    SceneGraphData,
    SGTRModule,
)

READS = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten.bincount"}
TO_HOST = {torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy}
# These read tensors that lie on the CPU whatever the device of the model: lengths, drawn sizes, costs already fetched.
ON_HOST = {"packed", "augment", "_assign"}
SMALL_SGTR = dict(
    backbone="resnet10", stride=16, dim=32, heads=4, ffn_dim=32, entity_layers=2, entity_queries=12, encoder_layers=1,
    layers=2, queries=9, short_sides=[48, 64], long_side=96,
)  # fmt: skip


def place():
    """Return the innermost function of ours that is running, or "transformers" below DETR's code."""
    for frame in reversed(traceback.extract_stack()):
        if "transformers" in Path(frame.filename).parts:
            return "transformers"
        if "sgalign" in Path(frame.filename).parts:
            return frame.name
    return "elsewhere"


class Waits(TorchDispatchMode):
    """Counts operations whose result the host needs before it goes on."""

    def __init__(self):
        super().__init__()
        self.places = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).rpartition(".")[0]
        masks = [index for index in args[1] if index is not None] if name == "aten.index" else []
        if name in READS or name.startswith("aten._unique") or any(mask.dtype == torch.bool for mask in masks):
            self.places[place()] += 1
        return function(*args, **(kwargs or {}))


class Transfers(TorchFunctionMode):
    """Counts calls that bring a tensor to the host."""

    def __init__(self, places):
        super().__init__()
        self.places = places

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in TO_HOST:
            self.places[place()] += 1
        return function(*args, **(kwargs or {}))


def waits_of_a_step(module, data):
    """Return how often the second training step waits, by function."""
    waits, training_step = Waits(), module.training_step

    @functools.wraps(training_step)
    def counted(batch, batch_index):
        if batch_index == 0:
            return training_step(batch, batch_index)
        with Transfers(waits.places), waits:
            return training_step(batch, batch_index)

    module.training_step = counted
    trainers.trainer(limit_train_batches=2, limit_val_batches=0).fit(module, datamodule=data)
    return {name: count for name, count in waits.places.items() if name not in ON_HOST}


@pytest.mark.parametrize("module", [MotifsModule, AlignMotifsModule])
def test_motifs_waits_for_its_pairs_and_its_loss(module):
    """How many pairs are kept depends on the draw; a loss that is not finite must end the run before it spoils it."""
    found = waits_of_a_step(module(**trainers.SMALL_MOTIFS), SceneGraphData(batch_size=4))
    assert found == {"sample_pairs": 1, "finite": 1}


@pytest.mark.parametrize("module", [SGTRModule, AlignSGTRModule])
def test_sgtr_waits_once_for_all_matching(module):
    """Layers and images are matched from one transfer. Beside it: annotations of each of the two images, padding, loss.

    DETR's own code is transformers'; how often that waits is not ours to fix.
    """
    found = waits_of_a_step(module(**SMALL_SGTR), SceneGraphData(images=True, batch_size=2))
    del found["transformers"]
    assert found == {"match": 1, "annotations_of": 2, "finite": 1, "_decode": 1}

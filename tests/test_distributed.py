"""Two processes under gloo on the CPU, as `--trainer.strategy=ddp --trainer.devices=2` runs them."""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
from trainers import trainer_without_sanity_check  # noqa: E402

from sgalign.data import collate  # noqa: E402
from sgalign.models.detector import ObjectDetections  # noqa: E402
from sgalign.training import AlignMotifsModule, DetectorModule, MotifsModule, SGTRModule  # noqa: E402
from sgalign.training.datamodule import SceneGraphData  # noqa: E402

SMALL = {"embed_dim": 8, "hidden_dim": 8, "relation_dim": 16}


class FrozenStatistics(AlignMotifsModule):
    """Align-Motifs that counts the evaluated images and keeps the statistics of batch normalization.

    Otherwise each of two processes would normalize by half of the images.
    """

    def on_train_epoch_start(self):
        self.network.position[1].eval()

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        with self.recall.sync_context():
            self.images_evaluated = self.recall.images.clone()


def fit(out, name, **options):
    """Train on 16 scenes with a global batch of 8. Write the weights and return metrics, masks and learning rate."""
    import lightning.pytorch as pl
    from torch.utils.data import DistributedSampler

    world = int(os.environ.get("WORLD_SIZE", "1"))
    pl.seed_everything(0, verbose=False)
    data = SceneGraphData(batch_size=8 // world)
    data.train, data.validation = data.train[:16], data.validation[:11]  # one process gets 6 of the 11, the other 5
    # In order, so that both runs see the same global batches.
    data.train_dataloader = lambda: data._loader(  # type: ignore[method-assign]
        data.train, sampler=DistributedSampler(range(16), world, data.trainer.global_rank, shuffle=False)
    )
    module = FrozenStatistics(**SMALL, **options)
    strategy = "ddp" if world > 1 else "auto"
    trainer = trainer_without_sanity_check(devices=world, strategy=strategy, max_epochs=2, use_distributed_sampler=True)
    trainer.validate(module, datamodule=data, verbose=False)
    report = {"metrics": {k: float(v) for k, v in module.recall.compute().items() if "/" not in k}}
    report["images"] = int(module.images_evaluated)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(out / f"{name}.ckpt")
    batch = collate(data.train[:4], 20)
    masks = [module.draw_mask(batch, 0).flatten().tolist() for _ in range(2)]
    return report | {"masks": masks, "rate": trainer.optimizers[0].param_groups[0]["lr"]}


def stop(out, name, *, of_images):
    """Train with infinite numbers in the second process's second step. Return the error that ends this process."""
    import lightning.pytorch as pl
    from test_sgtr import SMALL as SGTR

    pl.seed_everything(0, verbose=False)
    data, rank = SceneGraphData(batch_size=2, images=of_images), int(os.environ["RANK"])
    data.train, data.validation = data.train[:16], data.validation[:2]
    module = SGTRModule(**SGTR) if of_images else MotifsModule(**SMALL)

    def infinite(_, __, found):
        return found._replace(logits=torch.inf * found.logits) if module.global_step == rank == 1 else found

    module.on_train_start = lambda: module.network.register_forward_hook(infinite)
    interrupted = pl.callbacks.ModelCheckpoint(out, filename=name, save_top_k=0, save_on_exception=True)
    strategy = "ddp_find_unused_parameters_true"
    trainer = trainer_without_sanity_check(
        devices=2, strategy=strategy, callbacks=[interrupted], enable_checkpointing=True
    )
    with pytest.raises(ValueError) as caught:
        trainer.fit(module, datamodule=data)
    return str(caught.value)


def evaluate_one(out, name):
    """Validate SGTR on a single image, which two processes cannot share, and return the logged numbers."""
    import lightning.pytorch as pl
    from test_sgtr import SMALL as SGTR

    pl.seed_everything(0, verbose=False)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    data = SceneGraphData(batch_size=2, images=True)
    data.train, data.validation = data.train[:16], data.validation[:1]
    trainer = trainer_without_sanity_check(devices=world, strategy="ddp" if world > 1 else "auto")
    (logged,) = trainer.validate(SGTRModule(**SGTR), datamodule=data, verbose=False)
    return logged


def detect(out, name, *, images):
    """Validate a detector, one image at a time, and return the logged numbers.

    It finds all objects of an image and one that is wrong, also in the copy of an image that a process without an
    image of its own gets.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    data = SceneGraphData(batch_size=1, images=True)
    data.train, data.validation = data.train[:16], data.validation[:images]
    known = {graph.image_id: graph for graph in data.validation}

    def detected(batch):
        graph = known[batch.image_ids[0]]
        boxes, labels = torch.cat((graph.boxes, graph.boxes[:1])), torch.cat((graph.labels, graph.labels[1:2]))
        scores = torch.cat((torch.full((len(graph.labels),), 0.5), torch.ones(1)))
        return [ObjectDetections(boxes, labels, scores, *torch.zeros(2, len(labels), 1))]

    module = DetectorModule(backbone="resnet18", min_size=64, max_size=96)
    module.detect = detected
    trainer = trainer_without_sanity_check(devices=world, strategy="ddp" if world > 1 else "auto")
    (logged,) = trainer.validate(module, datamodule=data, verbose=False)
    return logged


def resume_one(out, name):
    """Resume only the first process from a checkpoint. Return the error that ends this process."""
    data = SceneGraphData(batch_size=4)
    data.train, data.validation = data.train[:16], data.validation[:2]
    path = None if os.environ["RANK"] == "1" else out / "masked.ckpt"
    with pytest.raises(ValueError) as caught:
        trainer_without_sanity_check(devices=2, strategy="ddp", max_epochs=3).fit(
            AlignMotifsModule(**SMALL, **MASKED), datamodule=data, ckpt_path=path
        )
    return str(caught.value)


MASKED = {"mask_ratio": 0.5, "learning_rate_images": 4}
RUNS = {
    "unmasked": functools.partial(fit, mask_ratio=0.0),
    "masked": functools.partial(fit, **MASKED),
    "masked again": functools.partial(fit, **MASKED),
    "Motifs stops": functools.partial(stop, of_images=False),
    "one resumes": resume_one,
    "one image": evaluate_one,
    "detector, 3 images": functools.partial(detect, images=3),
    "detector, 1 image": functools.partial(detect, images=1),
    "SGTR stops": functools.partial(stop, of_images=True),
}


def run_all(out):
    """Do all runs, one after the other, and write what they return. Each process does this."""
    for name, run in RUNS.items():
        os.environ["WORLD_SIZE"] = "2"  # Lightning deletes it after a run
        (out / f"{name} {os.environ['RANK']}.json").write_text(json.dumps(run(out, name)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder in which two processes have done all runs."""
    pytest.importorskip("transformers", reason="SGTR needs DETR")
    out = tmp_path_factory.mktemp("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = os.environ | {
            "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, __file__, str(out)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    try:
        outputs = [process.communicate(timeout=300)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(text[-3000:] for text in outputs)
    return out


def both(folder, name):
    """Return what a run returned in each of the two processes."""
    return [json.loads((folder / f"{name} {rank}.json").read_text()) for rank in range(2)]


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def test_two_processes_are_one_with_the_same_global_batch(folder, tmp_path):
    """Metrics are merged, and no image counts twice."""
    one = fit(tmp_path, "one", mask_ratio=0.0)
    for rank in both(folder, "unmasked"):
        assert rank["images"] == one["images"] == 11
        assert rank["metrics"] == pytest.approx(one["metrics"], abs=1e-12)
    ours, theirs = weights(folder / "unmasked.ckpt"), weights(tmp_path / "one.ckpt")
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=2e-4, rtol=1e-3)


def test_two_processes_can_evaluate_a_single_image(folder, tmp_path):
    one = evaluate_one(tmp_path, "one")
    assert {"val/found", "val/relations_found", "val/R@50"} <= one.keys()
    for logged in both(folder, "one image"):
        assert logged == pytest.approx(one, abs=1e-6)


@pytest.mark.parametrize("images", [1, 3])
def test_the_detections_of_two_processes_are_merged(folder, tmp_path, images):
    """One process has more images than the other, or has no image of its own."""
    one = detect(tmp_path, "one", images=images)
    assert one.keys() >= {"val/found", "val/mAP", "val/mAP_50"} and 0.1 < one["val/mAP"] < 1
    name = f"detector, {images} image{'s' * (images > 1)}"
    for logged in both(folder, name):
        assert logged == pytest.approx(one, abs=1e-6)


def test_a_checkpoint_of_two_processes_serves_one(folder):
    assert MotifsModule.load_from_checkpoint(folder / "unmasked.ckpt").network is not None


def test_ranks_draw_different_masks_that_repeat(folder):
    first, second = both(folder, "masked")
    assert first["masks"][0] == first["masks"][1], "of one step and batch"
    assert first["masks"][0] != second["masks"][0]
    assert both(folder, "masked again") == [first, second]


def test_metrics_are_merged(folder):
    first, second = both(folder, "masked")
    assert first["metrics"] == second["metrics"]


def test_the_learning_rate_is_for_the_images_of_all_processes(folder):
    assert both(folder, "masked")[0]["rate"] == pytest.approx(2e-3), "the step has twice the images"


@pytest.mark.parametrize("kind", ["Motifs", "SGTR"])
def test_processes_stop_together_if_the_loss_of_one_is_not_finite(folder, kind):
    """If one stopped alone, all would wait: it for the others at its checkpoint, the others for it in the next step."""
    first, second = both(folder, f"{kind} stops")
    assert first == "the loss must be finite, but the loss of another process was not finite at step 1"
    assert second.startswith("the loss must be finite, got ") and " or check the data of this step's images " in second
    weights(folder / f"{kind} stops.ckpt")


def test_processes_stop_together_if_only_some_have_a_checkpoint(folder):
    """Otherwise they would train from different steps, for example on machines that do not share the folder."""
    for message in both(folder, "one resumes"):
        assert message.startswith(
            "ckpt_path must be the same checkpoint in all processes, but process 0 has that of step 4, and process 1 "
            "has none"
        )


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))

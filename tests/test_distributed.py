"""Two processes under gloo on the CPU, as `--trainer.strategy=ddp --trainer.devices=2` runs them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")

from sgalign.data import collate  # noqa: E402
from sgalign.training import AlignMotifsModule, MotifsModule, SGTRModule  # noqa: E402
from sgalign.training.datamodule import SceneGraphData  # noqa: E402

SMALL = {"embed_dim": 8, "hidden_dim": 8, "relation_dim": 16}


class FrozenStatistics(AlignMotifsModule):
    """BatchNorm would see half of the images in each of two processes. Also notes how many images were evaluated."""

    def on_train_epoch_start(self):
        self.network.position[1].eval()

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        with self.recall.sync_context():
            self.images_evaluated = self.recall.images.clone()


def fit(out, **options):
    """Trains on 16 scenes, a global batch of 8, and writes the weights, metrics and masks; run by each process."""
    import lightning.pytorch as pl
    from torch.utils.data import DistributedSampler

    world = int(os.environ.get("WORLD_SIZE", "1"))
    pl.seed_everything(0, verbose=False)
    data = SceneGraphData(batch_size=8 // world)
    data.train, data.validation = data.train[:16], data.validation[:11]  # 6 and 5
    # In order, so that both runs see the same global batches.
    data.train_dataloader = lambda: data._loader(  # type: ignore[method-assign]
        data.train, sampler=DistributedSampler(range(16), world, data.trainer.global_rank, shuffle=False)
    )
    module = FrozenStatistics(**SMALL, **options)
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", max_epochs=2, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, enable_checkpointing=False,
        use_distributed_sampler=True,
    )  # fmt: skip
    trainer.validate(module, datamodule=data, verbose=False)
    report = {"metrics": {k: float(v) for k, v in module.recall.compute().items() if "/" not in k}}
    report["images"] = int(module.images_evaluated)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(out / f"world{world}.ckpt")
    batch = collate(data.train[:4], 20)
    masks = [module.draw_mask(batch, 0).flatten().tolist() for _ in range(2)]
    report |= {"masks": masks, "rate": trainer.optimizers[0].param_groups[0]["lr"]}
    (out / f"world{world}_rank{trainer.global_rank}.json").write_text(json.dumps(report))


def stop(out, of_images):
    """Train where the second process's numbers are infinite in the second step, until that is an error."""
    import lightning.pytorch as pl
    from test_sgtr import SMALL as SGTR

    pl.seed_everything(0, verbose=False)
    data, rank = SceneGraphData(batch_size=2, images=of_images), int(os.environ["RANK"])
    data.train, data.validation = data.train[:16], data.validation[:2]
    module = SGTRModule(**SGTR) if of_images else MotifsModule(**SMALL)

    def infinite(_, __, found):
        return found._replace(logits=torch.inf * found.logits) if module.global_step == rank == 1 else found

    module.on_train_start = lambda: module.network.register_forward_hook(infinite)
    interrupted = pl.callbacks.ModelCheckpoint(out, filename="interrupted", save_top_k=0, save_on_exception=True)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_find_unused_parameters_true", max_epochs=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, callbacks=[interrupted],
    )  # fmt: skip
    with pytest.raises(ValueError) as caught:
        trainer.fit(module, datamodule=data)
    (out / f"world2_rank{rank}.json").write_text(json.dumps(str(caught.value)))


def launch(out, world, function="fit", **options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        environment = os.environ | {
            "WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, __file__, function, str(out), json.dumps(options)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    for process in processes:
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output.decode()[-3000:]
    return [json.loads((out / f"world{world}_rank{rank}.json").read_text()) for rank in range(world)]


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def test_two_processes_are_one_with_the_same_global_batch(tmp_path):
    """Metrics are merged, and no image counts twice."""
    (one,) = launch(tmp_path, 1, mask_ratio=0.0)
    for rank in launch(tmp_path, 2, mask_ratio=0.0):
        assert rank["images"] == one["images"] == 11
        assert rank["metrics"] == pytest.approx(one["metrics"], abs=1e-12)
    ours, theirs = weights(tmp_path / "world2.ckpt"), weights(tmp_path / "world1.ckpt")
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=2e-4, rtol=1e-3)
    # A checkpoint of two processes serves one.
    module = MotifsModule.load_from_checkpoint(tmp_path / "world2.ckpt")
    assert module.network is not None


def test_ranks_draw_masks_of_their_own_that_repeat(tmp_path):
    options = {"mask_ratio": 0.5, "learning_rate_images": 4}
    first, second = launch(tmp_path, 2, **options)
    assert first["masks"][0] == first["masks"][1], "of one step and batch"
    assert first["masks"][0] != second["masks"][0]
    assert launch(tmp_path, 2, **options) == [first, second]
    assert first["rate"] == pytest.approx(2e-3), "twice the images that the learning rate is for"
    assert first["metrics"] == second["metrics"], "merged"


@pytest.mark.parametrize("kind", ["Motifs", "SGTR"])
def test_processes_stop_together_where_the_loss_of_one_is_not_finite(tmp_path, kind):
    """One that stopped alone would wait for the others before its checkpoint, and they for it in the next step."""
    if kind == "SGTR":
        pytest.importorskip("transformers")
    first, second = launch(tmp_path, 2, "stop", of_images=kind == "SGTR")
    assert first == "the loss must be finite, but the loss of another process was not finite at step 1"
    assert second.startswith("the loss must be finite, got ") and " or look at the data of images " in second
    weights(tmp_path / "interrupted.ckpt")


if __name__ == "__main__":
    {"fit": fit, "stop": stop}[sys.argv[1]](Path(sys.argv[2]), **json.loads(sys.argv[3]))

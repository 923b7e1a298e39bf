"""The number of times that the host waits for a GPU in a training step, counted on a pretend GPU."""

import math

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pl = pytest.importorskip("lightning.pytorch")
pytest.importorskip("transformers")

import pretend_gpu  # noqa: E402
import trainers  # noqa: E402
from lightning.pytorch.accelerators import CPUAccelerator  # noqa: E402
from lightning.pytorch.strategies import SingleDeviceStrategy  # noqa: E402
from test_sgtr import SMALL, outputs  # noqa: E402
from torchvision.models.detection.image_list import ImageList  # noqa: E402
from torchvision.models.detection.transform import resize_boxes  # noqa: E402
from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss  # noqa: E402

from sgalign.data import Objects, ScenesDataset, collate  # noqa: E402
from sgalign.data.transfer import HostCopy, send, to_host  # noqa: E402
from sgalign.models import ImageFeatures  # noqa: E402
from sgalign.models.entity_loss import EntityLoss  # noqa: E402
from sgalign.models.graph_assembly import Annotations, Entities, assign, relation_costs  # noqa: E402
from sgalign.nn import RelationAlignment, replace_attention  # noqa: E402
from sgalign.ops import backends  # noqa: E402
from sgalign.training import (  # noqa: E402
    AlignMotifsModule,
    AlignSGTRModule,
    DetectorModule,
    EntityDetectorModule,
    MotifsModule,
    SceneGraphData,
    SGTRModule,
)

LAYERS = {"layers": 6, "entity_layers": 6, "encoder_layers": 3}  # as published
DETR = {name: value for name, value in SMALL.items() if name not in ("layers", "queries", "encoder_layers")}
MOTIFS = trainers.SMALL_MOTIFS | {"relations_per_image": 20}


class FewScenes(SceneGraphData):
    def _read(self, split, **options):
        graphs = (g for g in map(self._open(split).__getitem__, range(30)) if len(g.relations))
        return [graph for graph, _ in zip(graphs, range(18))]


class Accelerator(CPUAccelerator):
    def setup_device(self, device):
        pass


class Counted(pl.Callback):
    """A callback that counts in each training step except the last, including the fetch of the next batch."""

    def __init__(self, gpu):
        self.gpu, self.steps, self.calls, self.step = gpu, [], 0, None

    def on_train_batch_start(self, *_):
        self.stop()
        self.step = self.gpu.count()
        self.step.__enter__()

    def on_after_backward(self, *_):
        self.calls = self.gpu.calls

    def on_train_batch_end(self, trainer, *_):
        if trainer.is_last_batch:
            self.step.__exit__(None, None, None)

    def stop(self):
        if self.step is not None:
            self.step.__exit__(None, None, None)
            self.steps.append((self.gpu.waits, self.calls))


def count(monkeypatch, module, batch_size=6, **options):
    """Return the waits, and the operators of forward and backward, of each of two steps."""
    choose = backends.choose

    def choose_cpu(backend, device, dtype):
        return "cpu" if device.type == "pretend" else choose(backend, device, dtype)

    monkeypatch.setattr(backends, "choose", choose_cpu)
    gpu = pretend_gpu.PretendGPU()
    counted = Counted(gpu)
    strategy = SingleDeviceStrategy(device=pretend_gpu.device(), accelerator=Accelerator())
    options = {"limit_train_batches": 3, "limit_val_batches": 1, "num_sanity_val_steps": 0} | options
    pl.seed_everything(0)
    with gpu:
        run = trainers.trainer(
            accelerator="auto", strategy=strategy, callbacks=[counted], gradient_clip_val=1.0, **options
        )
        run.fit(module, FewScenes(None, batch_size=batch_size, images=module.looks_at_images))
    assert len(counted.steps) == 2
    return counted.steps


# The host waits once for the losses, which are checked before the optimizer's step. The gradients are queued by then,
# so the device computes meanwhile. SGTR also waits once for the matching costs of all layers and images, including
# DETR's, because the Hungarian method runs on the host and decides which losses there are.
LOSSES, COSTS = 1, 1


@pytest.mark.parametrize(
    ("make", "expected", "operators"),  # operators is an upper limit, because torch's composition of operators changes
    [
        (lambda: MotifsModule(**MOTIFS), LOSSES, 650),
        (lambda: AlignMotifsModule(**MOTIFS), LOSSES, 720),
        (lambda: AlignMotifsModule(mask_granularity="feature", supervise_mirror=True, **MOTIFS), LOSSES, 720),
        (lambda: AlignSGTRModule(**SMALL | LAYERS), COSTS + LOSSES, 7300),
        (lambda: SGTRModule(protocol="predcls", focal=False, **SMALL), COSTS + LOSSES, 3600),
    ],
    ids=["Motifs", "Align-Motifs", "Align-Motifs, features", "Align-SGTR", "SGTR, PredCls"],
)
def test_training_step_waits_for_losses_and_matching_alone(monkeypatch, make, expected, operators):
    for waits, calls in count(monkeypatch, make()):
        print(f"{waits.total()} waits, {calls} operators")
        assert waits.total() == expected, waits
        assert calls < operators


def test_number_of_waits_depends_on_neither_images_nor_layers(monkeypatch):
    few = count(monkeypatch, SGTRModule(**SMALL), batch_size=1)
    assert [waits.total() for waits, _ in few] == [COSTS + LOSSES] * 2


def test_images_of_one_size_add_no_wait(monkeypatch):
    """They need no padding mask, and the host does not have to wait to know that."""
    steps = count(monkeypatch, SGTRModule(**SMALL | {"short_sides": [64], "long_side": 64}), batch_size=1)
    assert [waits.total() for waits, _ in steps] == [COSTS + LOSSES] * 2


def test_image_features_add_only_the_waits_of_torchvision(monkeypatch):
    """Torchvision copies two small tensors per image to normalize it, and finds the boxes of each of four levels."""
    sizes = {"backbone": "resnet18", "min_size": 64, "max_size": 96}
    module = MotifsModule(vision="images", **sizes, **MOTIFS)
    for waits, _ in count(monkeypatch, module, batch_size=3):
        assert waits.total() == LOSSES + 2 * 3 + 4, waits


def test_resized_boxes_equal_those_of_torchvision():
    original, now = [(480, 641), (333, 500)], [(600, 801), (601, 900)]
    features = ImageFeatures({}, ImageList(torch.zeros(2, 3, 8, 8), now), original)
    boxes = [torch.rand(50, 4) * 400, torch.rand(0, 4)]
    for ours, *theirs in zip(features.resized(boxes), boxes, original, now):
        assert torch.equal(ours, resize_boxes(*theirs))


def test_progress_bar_adds_no_wait(monkeypatch):
    """Lightning reads the losses that it shows in each step. They are on the host by then."""
    for waits, _ in count(monkeypatch, AlignMotifsModule(**MOTIFS), enable_progress_bar=True):
        assert waits.total() == LOSSES, waits


# ---- the counter


@pytest.fixture
def waits():
    """A pretend GPU's device, and a function that counts the waits of a function."""
    gpu, device = pretend_gpu.PretendGPU(), pretend_gpu.device()

    def count_waits(function):
        with gpu.count():
            function()
        return gpu.waits.total()

    with gpu:
        yield device, count_waits


def test_operations_that_wait_are_counted(waits):
    device, count_waits = waits
    x, host = torch.rand(3, 4, device=device), torch.arange(3)
    for function in (
        lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.tolist(), lambda: x.cpu().numpy(),
        lambda: torch.tensor([1, 2], device=device), lambda: x.new_tensor([1.0]), lambda: x[[0, 2]],
        lambda: x[:, [0, 2]], lambda: x[host], lambda: x[x[:, 0] > 0], lambda: x.nonzero(), lambda: host.to(device),
        lambda: torch.equal(x, x), lambda: x.masked_select(x > 0), lambda: x.unique(), lambda: to_host([x, x]),
        lambda: x[0].long().bincount(), lambda: x.repeat_interleave(torch.ones_like(x[:, 0]).long(), dim=0),
        lambda: HostCopy(x).read(), lambda: host.float().copy_(x[:, 0]),
    ):  # fmt: skip
        assert count_waits(function) == 1


def test_operations_that_do_not_wait_are_not_counted(waits):
    device, count_waits = waits
    x, host = torch.rand(3, 4, device=device), torch.arange(3)
    for function in (
        lambda: x + 1, lambda: x[0], lambda: x[:, ::2], lambda: x[send(host, device)], lambda: HostCopy(x),
        lambda: torch.full((), 3, device=device), lambda: x.where(x > 0, 0), lambda: x[0].fill_(1),
        lambda: x.repeat_interleave(x[:, 0].long(), dim=0, output_size=int(x.held[:, 0].long().sum())),
        lambda: to_host([host, host]), lambda: host.tolist(),
    ):  # fmt: skip
        assert count_waits(function) == 0


def test_tensors_on_the_host_and_on_the_device_do_not_mix(waits):
    device, _ = waits
    with pytest.raises(RuntimeError, match="tensors on the host and on the device"):
        torch.rand(3, 4, device=device)[:, 0] + torch.arange(3)


def test_pretend_gpu_gives_the_results_of_the_cpu(monkeypatch):
    """The last logged metrics of three training steps are compared."""
    logged = []
    for on_device in (True, False):
        pl.seed_everything(0)
        module = AlignMotifsModule(**MOTIFS)
        if on_device:
            count(monkeypatch, module, limit_val_batches=0)
        else:
            run = trainers.trainer(limit_train_batches=3, limit_val_batches=0, gradient_clip_val=1.0)
            run.fit(module, FewScenes(None, batch_size=6))
        logged.append({name: value.cpu() for name, value in module.trainer.callback_metrics.items()})
    assert {"train/loss", "train/alignment"} <= logged[0].keys()
    for name, value in logged[0].items():
        torch.testing.assert_close(value, logged[1][name], msg=name)


# ---- replacements of loops that waited


def test_pairs_equal_those_of_a_loop():
    lengths = [3, 0, 1, 4]
    objects = Objects.of(torch.tensor(lengths))
    expected, start = [], 0
    for length in lengths:
        expected += [[start + s, start + o] for s in range(length) for o in range(length) if s != o]
        start += length
    assert objects.pairs.tolist() == expected and objects.pair_counts.tolist() == [6, 0, 0, 12]
    assert objects.images.tolist() == [0, 0, 0, 2, 3, 3, 3, 3]
    assert objects.positions.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert Objects.of(torch.tensor([0])).pairs.shape == (0, 2)


def test_batch_keeps_its_counts_on_the_host():
    batch = collate([ScenesDataset("train")[index] for index in range(3)], 20)
    with pretend_gpu.PretendGPU():
        moved = batch.to(pretend_gpu.device())
        rows = torch.arange(0, len(batch.pairs), 2)
        kept = moved.keep_pairs(rows)
        assert {name for name, value in moved._asdict().items() if isinstance(value, pretend_gpu.PretendTensor)} == {
            "sizes", "boxes", "labels", "scores", "images", "positions", "pairs", "targets"
        }  # fmt: skip
        assert torch.equal(kept.pairs.cpu(), batch.pairs[rows]) and torch.equal(kept.related, batch.related[rows])
        assert [len(pairs) for pairs in kept.pairs_by_image()] == kept.pair_counts.tolist()
    assert kept.pair_counts.sum() == len(rows) and torch.equal(batch.related, batch.targets[:, 0] == 0)


def test_costs_of_a_batch_equal_those_of_its_images():
    """Padding of images with fewer relations changes nothing."""
    torch.manual_seed(0)
    said, sizes = outputs(images=3), torch.tensor([[100.0, 50], [60, 80], [90, 90]])
    found = Entities(torch.rand(3, 6, 5), torch.rand(3, 6, 4) * 0.4 + 0.1)
    truths = []
    for count_ in (4, 0, 2):
        labels, boxes = torch.randint(5, (2, count_)), torch.rand(2, count_, 4) * 0.4 + 0.1
        truths.append(Annotations(torch.randint(4, (count_,)), labels, boxes))
    together = relation_costs(said, found, sizes, truths)
    for image, truth in enumerate(truths):
        one = slice(image, image + 1)
        parts = said.logits[:, one], said.vectors[:, one], said.class_logits[:, :, one], said.boxes[:, :, one]
        alone = relation_costs(type(said)(*parts), Entities(*(t[one] for t in found)), sizes[one], [truth])
        torch.testing.assert_close(together[image], alone[0])
        assert together[image].shape[-1] == len(truth.predicates)


def test_losses_of_entities_and_their_gradients_equal_those_of_transformers():
    """transformers computes the losses layer by layer, with its own matching."""
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 7, 6, requires_grad=True)
    boxes = (torch.rand(3, 2, 7, 4) * 0.4 + 0.1).requires_grad_()
    objects = [(torch.randint(1, 6, (count_,)), torch.rand(count_, 4) * 0.4 + 0.1) for count_ in (4, 0)]
    ours = EntityLoss(5)
    matches = assign(to_host(ours.costs(logits, boxes, objects)))
    found = ours(logits, boxes, objects, matches)
    library = ImageLoss(HungarianMatcher(1, 5, 2), 5, 0.1, ["labels", "boxes"])
    assert (
        torch.equal(library.empty_weight, ours.empty_weight) and library.state_dict().keys() == ours.state_dict().keys()
    )
    targets = [{"class_labels": labels - 1, "boxes": true} for labels, true in objects]
    expected = {"classes": 0.0, "boxes": 0.0, "overlaps": 0.0}
    for layer in range(3):
        losses = library({"logits": logits[layer], "pred_boxes": boxes[layer]}, targets)
        for name, theirs in (("classes", "loss_ce"), ("boxes", "loss_bbox"), ("overlaps", "loss_giou")):
            expected[name] = expected[name] + losses[theirs]
    for name, loss in found.items():
        torch.testing.assert_close(loss, expected[name], msg=name)
        for one, other in zip(*(torch.autograd.grad(of, (logits, boxes), retain_graph=True, allow_unused=True)
                                for of in (loss, expected[name]))):  # fmt: skip
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)


def test_costs_that_are_not_finite_are_refused_by_name():
    module = EntityDetectorModule(**DETR)
    with pytest.raises(ValueError, match=r"must be finite, got inf \(costs of matching inf\) at step"):
        module.read_costs([torch.full((1, 2, 2), float("inf"))])
    with pytest.raises(ValueError, match=r"must be finite, got nan \(largest logit nan, costs of matching 0\) at step"):
        module.read_costs([torch.zeros(1, 2, 2)], {"largest logit": torch.tensor(float("nan"))})


def test_loss_that_is_not_finite_changes_no_weight():
    """It is found after the backward and before the optimizer's step."""
    pl.seed_everything(0)
    module, before = MotifsModule(**MOTIFS), {}

    def start():
        before.update({name: value.clone() for name, value in module.state_dict().items()})
        module.network.register_forward_hook(
            lambda _, __, prediction: prediction._replace(logits=math.inf * prediction.logits)
        )

    module.on_train_start = start
    with pytest.raises(ValueError, match=r"loss must be finite, got nan \(loss nan\) at step 0: check .* images .*, "):
        trainers.trainer(limit_train_batches=2).fit(module, FewScenes(None, batch_size=2))
    learned = dict(module.named_parameters())
    assert before and all(torch.equal(learned[name], before[name]) for name in learned)


@pytest.mark.parametrize("steps", [1, 3])
def test_infinite_gradients_of_a_finite_loss_end_the_run(steps, tmp_path):
    """They are found with the next step's loss, or before weights are evaluated or saved."""
    pl.seed_everything(0)
    module = MotifsModule(**MOTIFS)
    module.on_train_start = lambda: module.network.predicate.bias.register_hook(lambda gradient: gradient * math.inf)
    interrupted = pl.callbacks.ModelCheckpoint(tmp_path, filename="interrupted", save_top_k=0, save_on_exception=True)
    options = {"limit_train_batches": steps, "num_sanity_val_steps": 0, "enable_checkpointing": True}
    run = trainers.trainer(callbacks=[interrupted], **options)
    expected = "at step 1 these are not finite: .*network.predicate.bias.* resume from an earlier checkpoint"
    with pytest.raises(ValueError, match=expected):
        run.fit(module, FewScenes(None, batch_size=2))
    assert run.state.stage is None  # Lightning has ended the run
    with pytest.raises(ValueError, match="weights must be finite, but .*network.predicate.bias"):
        run.save_checkpoint(tmp_path / "by hand.ckpt")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="weights must be finite, but .*network.predicate.bias"):
        run.test(module, FewScenes(None, batch_size=2))


def test_image_that_is_not_finite_is_named():
    """The error does not name the means of batch normalization, which the image makes infinite or NaN as well."""
    pl.seed_everything(0)
    module = DetectorModule(backbone="resnet18", min_size=64, max_size=96)
    data = FewScenes(None, batch_size=2, images=True)

    def start():
        losses = module.network.losses

        def of_a_bad_image(images, *annotations):
            if module.global_step == 1:
                images[0][0, :9, :9] = math.nan  # 9 x 9 pixels, because resizing leaves out single pixels
            return losses(images, *annotations)

        module.network.losses = of_a_bad_image

    module.on_train_start = start
    with pytest.raises(
        ValueError,
        match="the loss must be finite, got .* at step 1: lower learning_rate, or check .* images .*, ",
    ):
        trainers.trainer(limit_train_batches=3, num_sanity_val_steps=0).fit(module, data)


def test_mirror_of_a_decoder_adds_no_wait(monkeypatch):
    choose = backends.choose
    monkeypatch.setattr(
        backends,
        "choose",
        lambda backend, device, dtype: "cpu" if device.type == "pretend" else choose(backend, device, dtype),
    )
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, batch_first=True), 2)
    replace_attention(decoder)
    align = RelationAlignment(heads={"predicate": nn.Linear(16, 3)})
    queries, memory, padding = torch.randn(2, 5, 16), torch.randn(2, 9, 16), torch.arange(9).expand(2, 9) > 6
    gpu, device = pretend_gpu.PretendGPU(), pretend_gpu.device()
    with gpu:
        decoder, align = decoder.to(device), align.to(device)
        queries, memory, padding = (x.to(device) for x in (queries, memory, padding))
        with gpu.count():
            with align.mirror(decoder, step=3) as mirror:
                hidden, mirrored = mirror.both(
                    decoder, mirror.mask_rows(queries), memory, memory_key_padding_mask=padding
                )
            mirror.loss(predicate=(hidden, mirrored)).backward()
    assert gpu.calls > 100 and not gpu.waits, gpu.waits

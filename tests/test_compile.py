"""The option `compile`: the results of eager mode from few graphs, and a new mask in each step."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

pytest.importorskip("torchvision")
pl = pytest.importorskip("lightning.pytorch")
pytest.importorskip("transformers")

import test_sgtr  # noqa: E402
import trainers  # noqa: E402
from test_sgtr import FewScenes, entities, mirrored_heads  # noqa: E402

from sgalign.data import ScenesDataset, SeenBatch, collate  # noqa: E402
from sgalign.models import Motifs  # noqa: E402
from sgalign.models.sgtr import MirrorMask  # noqa: E402
from sgalign.training import AlignMotifsModule, AlignSGTRModule  # noqa: E402

# No feature map has as many positions as there are entities, because compilation takes equal sizes for the same size.
SMALL = test_sgtr.SMALL | {"layers": 1, "encoder_layers": 0, "entity_queries": 11}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.manual_seed(0)
    torch._dynamo.reset()


def graphs(counter):
    return sum(len(graph.graph.nodes) > 0 for graph in counter.graphs)


def sgtr_step(net, heads, found, seed):
    """Return the outputs of both branches and the gradients of all weights."""
    mask = MirrorMask(0.3, torch.tensor(seed))
    said, mirrored = net.dual_branch(found.last(), heads, mask)
    parameters = [*net.parameters(), *(p for head in heads for p in head.parameters())]
    loss = sum(t.square().sum() for t in (*said, *mirrored))
    return [*said, *mirrored, *torch.autograd.grad(loss, parameters)]


def check_sgtr(backend, **close):
    net = test_sgtr.network(layers=1, encoder_layers=0)
    heads = mirrored_heads(net)
    steps = [
        (entities(images=2, positions=11), 5),
        (entities(images=2, positions=11), 6),
        (entities(images=3, positions=13, count=7), -(1 << 62)),
    ]
    expected = [sgtr_step(net, heads, *step) for step in steps]
    names = list(net.state_dict())
    counter = CompileCounterWithBackend(backend)
    net.compile(backend=counter, dynamic=True, fullgraph=True)
    for step, of_step in zip(steps, expected):
        for ours, theirs in zip(sgtr_step(net, heads, *step), of_step, strict=True):
            torch.testing.assert_close(ours, theirs, **close)
    assert graphs(counter) == 1 and list(net.state_dict()) == names
    found, _ = steps[0]
    first, again, other = (sgtr_step(net, heads, found, seed)[4] for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.allclose(first, other)
    assert graphs(counter) == 1


def test_sgtr_is_one_graph_for_all_seeds_and_sizes():
    check_sgtr("eager")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_sgtr_equals_eager(backend):
    check_sgtr(backend, rtol=1e-6, atol=1e-8)


def check_motifs(backend, **close):
    scenes = [ScenesDataset("train")[index] for index in range(12)]
    motifs = Motifs(torch.ones(17, 17, 21), **trainers.SMALL_MOTIFS)
    head = motifs.new_predicate_head()

    def step(batch):
        generator = torch.Generator().manual_seed(len(batch.labels))
        dropped = torch.rand(len(batch.labels), 1, generator=generator) < 0.4
        prediction, mirrored = motifs.dual_branch(SeenBatch(batch), head, dropped=dropped)
        loss = prediction.logits.square().sum() + mirrored.sin().sum()
        return [prediction.logits, mirrored, *torch.autograd.grad(loss, [*motifs.parameters(), *head.parameters()])]

    batches = [collate(scenes[start : start + count], 20) for start, count in ((0, 3), (3, 2), (5, 4))]
    expected, names = [step(batch) for batch in batches], list(motifs.state_dict())
    counter = CompileCounterWithBackend(backend)
    motifs.compile(backend=counter, dynamic=True, fullgraph=True)
    for batch, of_batch in zip(batches, expected):
        for ours, theirs in zip(step(batch), of_batch, strict=True):
            torch.testing.assert_close(ours, theirs, **close)
    assert graphs(counter) == 1 and list(motifs.state_dict()) == names


def test_motifs_relation_head_is_one_graph_for_all_sizes():
    check_motifs("aot_eager")


@pytest.mark.slow
def test_motifs_compiled_by_inductor_equals_eager():
    check_motifs("inductor", rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind, first",
    [
        pytest.param(AlignMotifsModule, False, id="Motifs, eager first"),
        pytest.param(AlignSGTRModule, True, id="SGTR, compiled first", marks=pytest.mark.slow),
    ],
)
def test_a_run_resumes_with_and_without_compilation(kind, first, monkeypatch, tmp_path):
    """The weights after two epochs equal those of a run that is never compiled, and few graphs are compiled."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(kind, "compiler", {"backend": counter, "dynamic": True})
    options = trainers.SMALL_MOTIFS if kind is AlignMotifsModule else SMALL
    images = kind is AlignSGTRModule

    def run(epochs, ckpt_path=None, **compiled):
        pl.seed_everything(0)
        module = kind(**options, **compiled)
        run = trainers.trainer(max_epochs=epochs, limit_train_batches=2, limit_val_batches=1, num_sanity_val_steps=0)
        run.fit(module, FewScenes(None, batch_size=2, images=images), ckpt_path=ckpt_path)
        return run, module.state_dict()

    _, expected = run(2)
    half, states = run(1, compile=first)
    assert states.keys() == expected.keys()
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, found = run(2, ckpt_path=tmp_path / "half.ckpt", compile=not first)
    assert 1 <= graphs(counter) <= 2  # for training, and for validation
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)

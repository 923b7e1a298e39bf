"""One model is trained over two machines, here two network namespaces with torchrun in each."""

from contextlib import ExitStack

import pytest
import torch

pytest.importorskip("lightning")
from two_machines import EPOCHS, STEPS_PER_EPOCH, by_process, checkpoint, train, two_machines  # noqa: E402

from sgalign.commands import main as cli  # noqa: E402

STEPS = EPOCHS * STEPS_PER_EPOCH
DIES = STEPS_PER_EPOCH + 3  # the step after which a process dies, in the middle of the second epoch


@pytest.fixture(scope="module")
def machines():
    """Two machines. The tests are skipped where the system does not allow them."""
    with ExitStack() as stack:
        try:
            pair = stack.enter_context(two_machines())
        except PermissionError as error:
            pytest.skip(f"no network namespaces: {error}")
        yield pair


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    assert cli.main(["make-dataset", str(folder), "--format", "coco", "--sizes", "40", "8", "12"]) == 0
    return folder


@pytest.fixture(scope="module")
def undisturbed(machines, data, tmp_path_factory):
    """The folder and the steps of a run in which no process dies."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return folder, train(machines, folder, data)


def numbers(lines):
    return [line.step for line in lines]


@pytest.mark.slow
def test_two_machines_train_one_model(undisturbed):
    folder, lines = undisturbed
    for rank in range(2):
        (process,) = by_process(lines, rank)
        assert numbers(process) == list(range(1, STEPS + 1))
    assert checkpoint(folder)["global_step"] == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_survives_the_death_of_a_process_and_ends_as_if_it_had_not_died(
    rank, undisturbed, machines, data, tmp_path
):
    """All processes start again from the last epoch. Only rank 0 writes checkpoints."""
    lines = train(machines, tmp_path / "run", data, kill=f"{rank} {DIES}")
    for each in range(2):
        before, after = by_process(lines, each)
        assert numbers(before) in (list(range(1, DIES + 1)), list(range(1, DIES))), "the other rank may stop earlier"
        assert numbers(after) == list(range(STEPS_PER_EPOCH + 1, STEPS + 1))
    for name in ("last", "best"):
        ours, theirs = checkpoint(tmp_path / "run", name), checkpoint(undisturbed[0], name)
        assert ours["global_step"] == theirs["global_step"]
        for kind in ("state_dict", "optimizer_states"):
            torch.testing.assert_close(ours[kind], theirs[kind], rtol=0, atol=0)

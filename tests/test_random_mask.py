"""The random mask: published answers of its generator, the compiled mask and the definition, and statistics."""

import math

import pytest
import torch
from covers import cover

from sgalign import random_attention_mask
from sgalign.ops import reference

# Counter, key and answer of `philox4x32 7` in Random123's kat_vectors.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
]


@pytest.mark.parametrize("counter, key, answer", KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, answer):
    counter, key, answer = ([int(word, 16) for word in words.split()] for words in (counter, key, answer))
    words = reference.philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [word.item() for word in words] == answer


def test_mask_reads_the_words_in_the_documented_order():
    """The first known answer belongs to lane 0 of row 0. The number of key 32 * i starts at its bit 16 * i."""
    words = [int(word, 16) for word in KNOWN_ANSWERS[0][2].split()]
    numbers = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    for i, number in enumerate(numbers):
        below, above = (
            random_attention_mask(1, 1, 1, 256, ratio=ratio / 65536, seed=0)[0, 0, 0, 32 * i].item()
            for ratio in (number, number + 1)
        )
        assert (below, above) == (False, True)


@pytest.mark.parametrize(
    "shape, stream, seed",
    cover(
        [(1, 1, 1, 1), (2, 3, 5, 31), (1, 2, 3, 256), (1, 1, 4, 257), (2, 1, 3, 1000)],
        [0, 1, 2**31 - 1],
        [0, 1, -1, 0x123456789ABCDEF, 2**63 - 1, -(2**63)],
    ),
    ids=str,
)
def test_compiled_mask_equals_the_definition(shape, stream, seed, instruction_set):
    batch, heads, queries, keys = shape
    for threshold in (0, 1, 13107, 32768, 65535, 65536):
        expected = reference.random_mask(
            batch * heads,
            queries,
            keys,
            threshold=threshold,
            seed=torch.tensor(seed),
            stream=stream,
            device=torch.device("cpu"),
        ).view(shape)
        mask = random_attention_mask(*shape, ratio=threshold / 65536, seed=seed, stream=stream)
        assert mask.dtype == torch.bool and torch.equal(mask, expected)


def test_an_entry_depends_on_its_own_indices_alone():
    def draw(*shape):
        return random_attention_mask(*shape, ratio=0.3, seed=9, stream=4)

    whole = draw(3, 2, 40, 700)
    for queries, keys in ((40, 1), (1, 700), (7, 255), (13, 257)):
        assert torch.equal(draw(3, 2, queries, keys), whole[:, :, :queries, :keys])
    assert torch.equal(draw(1, 2, 40, 700), whole[:1])
    assert torch.equal(draw(1, 6, 40, 700), whole.view(1, 6, 40, 700))  # batch and head count as one


def test_number_of_threads_changes_nothing(threads):
    masks = []
    for count in (1, 3):
        threads(count)
        masks.append(random_attention_mask(2, 2, 11, 300, ratio=0.5, seed=1))
    assert torch.equal(*masks)


def test_larger_ratio_drops_the_same_entries_and_more():
    masks = [random_attention_mask(1, 1, 50, 300, ratio=ratio, seed=2) for ratio in (0, 0.2, 0.5, 0.9, 1)]
    for fewer, more in zip(masks, masks[1:]):
        assert not (fewer & ~more).any() and (more & ~fewer).any()
    assert not masks[0].any() and masks[-1].all()


def test_stream_and_device_default_to_0_and_the_cpu():
    shape = (1, 2, 3, 50)
    mask = random_attention_mask(*shape, ratio=0.5, seed=3)
    assert torch.equal(mask, random_attention_mask(*shape, ratio=0.5, seed=torch.tensor([3]), stream=0, device="cpu"))


def test_seed_and_stream_change_the_mask():
    shape = (1, 2, 3, 50)
    mask = random_attention_mask(*shape, ratio=0.5, seed=3)
    assert not torch.equal(mask, random_attention_mask(*shape, ratio=0.5, seed=4))
    assert not torch.equal(mask, random_attention_mask(*shape, ratio=0.5, seed=3, stream=1))


@pytest.mark.parametrize("empty", range(4))
def test_empty_sizes_give_an_empty_mask(empty):
    shape = [2, 3, 4, 5]
    shape[empty] = 0
    assert random_attention_mask(*shape, ratio=0.5, seed=0).shape == tuple(shape)


# ----------------------------------------------------------------------------------------------------- statistics
# The seeds are fixed, so each of these tests always passes or always fails.


def deviations(count, n, p):
    return (count.double() - n * p) / math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("ratio", [0.01, 0.15, 0.5, 0.85])
def test_every_slice_has_the_ratio(ratio):
    p = round(65536 * ratio) / 65536
    masks = torch.stack(
        [
            random_attention_mask(2, 3, 64, 512, ratio=ratio, seed=seed, stream=stream)
            for seed in (0, 1, 2, -1, 1 << 32, 1 << 62)
            for stream in (0, 1, 1 << 16, 2**31 - 1)
        ]
    )
    total = deviations(masks.sum(), masks.numel(), p)
    assert abs(total) < 4
    # slices by draw (seed and stream), batch, head, query, key, chunk, group of 32 keys and lane
    views = [masks.movedim(dim, 0).flatten(1) for dim in range(5)]
    chunked = masks.unflatten(-1, (2, 8, 32))
    views += [chunked.movedim(dim, 0).flatten(1) for dim in (4, 5, 6)]
    for view in views:
        z = deviations(view.sum(1), view.shape[1], p)
        assert z.abs().max() < 5
        assert z.square().mean() < 1 + 5 * math.sqrt(2 / len(z))
    # each position, over the draws, batches and heads
    position = masks.flatten(0, 2).sum(0)
    z = deviations(position, masks.flatten(0, 2).shape[0], p)
    assert abs(z.square().mean() - 1) < 5 * math.sqrt(2 / z.numel()) * 1.2 / math.sqrt(min(p, 1 - p))


def test_neighbors_and_other_draws_are_independent():
    shape, p = (2, 4, 128, 512), 0.5
    mask = random_attention_mask(*shape, ratio=p, seed=7)
    others = {
        "stream": random_attention_mask(*shape, ratio=p, seed=7, stream=1),
        "seed": random_attention_mask(*shape, ratio=p, seed=8),
        "high word of the seed": random_attention_mask(*shape, ratio=p, seed=7 + (1 << 32)),
    }
    pairs = [(mask, other) for other in others.values()]
    pairs += [(mask[..., :-step], mask[..., step:]) for step in (1, 2, 31, 32, 33, 64, 128, 255, 256)]
    pairs += [(mask[:, :, :-step], mask[:, :, step:]) for step in (1, 2, 64)]
    pairs += [(mask[:, :-1], mask[:, 1:]), (mask[:1], mask[1:])]
    for a, b in pairs:
        agree = (a == b).sum()
        assert abs(deviations(agree, a.numel(), 0.5)) < 5


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"batch": -1}, ValueError, "batch must be at least 0, got -1"),
        ({"keys": -3}, ValueError, "keys must be at least 0, got -3"),
        ({"ratio": -0.1}, ValueError, r"ratio must be in \[0, 1\], got -0.1"),
        ({"ratio": 1.01}, ValueError, r"ratio must be in \[0, 1\], got 1.01"),
        ({"ratio": math.nan}, ValueError, r"ratio must be in \[0, 1\], got nan"),
        ({"stream": -1}, ValueError, r"stream must be in \[0, 2\*\*31\), got -1"),
        ({"stream": 2**31}, ValueError, r"stream must be in \[0, 2\*\*31\), got 2147483648"),
        ({"stream": True}, TypeError, "stream must be an int, got bool"),
        ({"stream": 1.0}, TypeError, "stream must be an int, got float"),
        ({"seed": 2**63}, ValueError, r"seed must be in \[-2\*\*63, 2\*\*63\), got 9223372036854775808"),
        ({"seed": 1.5}, TypeError, "seed must be an int.*got float"),
        ({"seed": True}, TypeError, "seed must be an int.*got bool"),
        ({"seed": torch.tensor([1, 2])}, TypeError, r"seed must hold one int64, got torch.int64 of shape \[2\]"),
        ({"seed": torch.tensor(1.0)}, TypeError, r"seed must hold one int64, got torch.float32"),
        ({"seed": torch.tensor(1), "device": "meta"}, ValueError, "seed must be on meta, got cpu"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, error, message):
    arguments = {"batch": 1, "heads": 1, "queries": 2, "keys": 3, "ratio": 0.5, "seed": 0} | change
    with pytest.raises(error, match=message):
        random_attention_mask(**arguments)


def test_device_may_have_an_index():
    mask = random_attention_mask(1, 2, 3, 40, ratio=0.5, seed=torch.tensor(5), device="cpu:0")
    assert torch.equal(mask, random_attention_mask(1, 2, 3, 40, ratio=0.5, seed=5))

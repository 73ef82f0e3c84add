"""Packing token ids, the padded edge, and batches by token budget."""

import random
import time

import numpy as np
import pytest
import torch

import modernbert_lite as ml
from modernbert_lite.batch import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS, plan_batches


def ragged(seed: int, count: int, longest: int = 40) -> list[list[int]]:
    """Sequences of random ids, some of them empty."""
    draw = random.Random(seed)
    return [[draw.randrange(1000) for _ in range(draw.choice([0, 1, draw.randrange(longest)]))] for _ in range(count)]


# ---- pack and unpack -----------------------------------------------------------------------------------------------


def test_pack_gives_the_numbers_of_its_docstring():
    batch = ml.pack([[9] * 5, [8] * 7, [7] * 2])
    assert batch.input_ids.tolist() == [9] * 5 + [8] * 7 + [7] * 2
    assert batch.cu_seqlens.tolist() == [0, 5, 12, 14]
    assert batch.position_ids.tolist() == [*range(5), *range(7), 0, 1]
    assert (batch.max_seqlen, batch.seqlens, batch.max_id) == (7, (5, 7, 2), 9)


def test_pack_has_the_promised_dtypes():
    batch = ml.pack([[1, 2], [3]])
    assert batch.input_ids.dtype == batch.position_ids.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize("seed", range(5))
def test_unpack_undoes_pack(seed):
    sequences = ragged(seed, 23)
    batch = ml.pack(sequences)
    assert [part.tolist() for part in ml.unpack(batch.input_ids, batch.cu_seqlens)] == sequences
    assert [part.tolist() for part in ml.unpack(batch.position_ids, batch.cu_seqlens)] == [
        list(range(len(sequence))) for sequence in sequences
    ]
    assert batch.seqlens == tuple(map(len, sequences))
    assert batch.max_id == max((max(s) for s in sequences if s), default=-1)


def test_token_types_are_packed_beside_the_ids():
    batch = ml.pack([[5, 6, 7], [], [8]], token_type_ids=[[0, 1, 1], [], torch.tensor([1])])
    assert batch.token_type_ids.tolist() == [0, 1, 1, 1]
    assert (batch.token_type_ids.dtype, batch.max_type) == (torch.int64, 1)
    assert batch.to("cpu").token_type_ids.tolist() == [0, 1, 1, 1]
    plain = ml.pack([[5, 6, 7]])
    assert (plain.token_type_ids, plain.max_type) == (None, 0)
    assert plain.to("cpu").token_type_ids is None
    assert ml.pack([], token_type_ids=[]).max_type == 0


@pytest.mark.parametrize("types", [[[0, 1]], [[0, 1], [0, 0]], [[0, 1, 1], [0], [0]]])
def test_token_types_must_be_one_a_token(types):
    with pytest.raises(ValueError, match=r"token_type_ids have the lengths .*, the sequences \(3, 1\)"):
        ml.pack([[5, 6, 7], [8]], token_type_ids=types)


def test_a_bad_token_type_is_named_with_its_sequence():
    with pytest.raises(ValueError, match="token_type_ids of sequence 1 holds the token type -1; types start at 0"):
        ml.pack([[5], [6, 7]], token_type_ids=[[0], [0, -1]])
    with pytest.raises(ValueError, match=r"token_type_ids of sequence 0 has shape .* torch\.float32"):
        ml.pack([[5]], token_type_ids=[[0.5]])


@pytest.mark.parametrize("side", ["left", "right"])
def test_from_padded_keeps_the_token_types_of_real_tokens(side):
    ids, types = torch.tensor([[1, 2, 3], [4, 5, 9]]), torch.tensor([[0, 1, 1], [1, 0, 7]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    if side == "left":
        ids, types, mask = ids.flip(1), types.flip(1), mask.flip(1)
    batch = ml.from_padded(ids, mask, types)
    assert batch.input_ids.tolist() == ([1, 2, 3, 4, 5] if side == "right" else [3, 2, 1, 5, 4])
    assert batch.token_type_ids.tolist() == ([0, 1, 1, 1, 0] if side == "right" else [1, 1, 0, 0, 1])
    assert batch.max_type == 1
    with pytest.raises(ValueError, match=r"token_type_ids \(2, 2\); all must be \(B, S\)"):
        ml.from_padded(ids, mask, types[:, :2])


def test_unpack_gives_views_with_the_trailing_dimensions():
    batch = ml.pack([[1, 2, 3], [], [4]])
    x = torch.arange(4 * 6).view(4, 2, 3)
    parts = ml.unpack(x, batch.cu_seqlens)
    assert [tuple(part.shape) for part in parts] == [(3, 2, 3), (0, 2, 3), (1, 2, 3)]
    parts[2].fill_(-1)
    assert (x[3] == -1).all()


@pytest.mark.parametrize(
    "make",
    [
        tuple,
        lambda ids: torch.tensor(ids, dtype=torch.int32),
        lambda ids: np.array(ids, dtype=np.int64),
        lambda ids: torch.tensor(ids, dtype=torch.uint8),
    ],
)
def test_pack_takes_other_forms_of_ids(make):
    batch = ml.pack([make([3, 1, 2]), make([5])])
    assert batch.input_ids.tolist() == [3, 1, 2, 5]
    assert batch.input_ids.dtype == torch.int64


def test_pack_takes_a_generator():
    assert ml.pack([i] * i for i in range(4)).seqlens == (0, 1, 2, 3)


def test_pack_does_not_share_memory_with_what_it_was_given():
    ids = torch.tensor([1, 2, 3])
    batch = ml.pack([ids, ids])
    ids[0] = 99
    assert batch.input_ids.tolist() == [1, 2, 3, 1, 2, 3]


def test_empty_batch():
    batch = ml.pack([])
    assert batch.input_ids.shape == batch.position_ids.shape == (0,)
    assert batch.cu_seqlens.tolist() == [0]
    assert (batch.max_seqlen, batch.seqlens, batch.max_id) == (0, (), -1)
    assert ml.unpack(batch.input_ids, batch.cu_seqlens) == []


def test_empty_sequences_keep_their_places():
    batch = ml.pack([[], [4, 5], [], []])
    assert batch.cu_seqlens.tolist() == [0, 0, 2, 2, 2]
    assert [part.tolist() for part in ml.unpack(batch.input_ids, batch.cu_seqlens)] == [[], [4, 5], [], []]


def test_a_batch_can_not_be_changed_by_name():
    with pytest.raises(AttributeError):
        ml.pack([[1]]).max_seqlen = 7


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([1.0, 2.5], r"sequence 1 .*float32.*whole numbers"),
        ([True, False], r"sequence 1 .*bool.*whole numbers"),
        (torch.tensor([1.0]), r"sequence 1 .*float32"),
        (torch.tensor([[1, 2]]), r"sequence 1 has shape \(1, 2\).*one-dimensional"),
        ([[1, 2], [3, 4]], r"sequence 1 has shape \(2, 2\)"),
        (torch.tensor(7), r"sequence 1 has shape \(\)"),
        (7, r"sequence 1 has shape \(\)"),
        ([4, -1, 2], r"sequence 1 holds the token id -1; ids start at 0"),
        (torch.zeros(0, 3, dtype=torch.int64), r"sequence 1 has shape \(0, 3\)"),
        (torch.tensor([1 + 2j]), r"sequence 1 "),
    ],
)
def test_pack_names_the_sequence_that_is_no_ids(bad, message):
    with pytest.raises(ValueError, match=message):
        ml.pack([[1, 2], bad, [3]])


@pytest.mark.parametrize("bad", ["a string", ["a", "b"], [None], None, [2**63], [2**80], [[1], [2, 3]], [-(2**70)]])
def test_pack_names_the_sequence_that_can_not_be_read_at_all(bad):
    with pytest.raises((TypeError, ValueError), match="sequence 1"):
        ml.pack([[1, 2], bad])


def test_a_batch_moves_whole():
    batch = ml.pack([[1, 2], [3]]).to("meta")
    assert {batch.input_ids.device.type, batch.cu_seqlens.device.type, batch.position_ids.device.type} == {"meta"}
    assert (batch.seqlens, batch.max_id) == ((2, 1), 3)
    assert ml.pack([[1]], device="cpu").input_ids.device.type == "cpu"


# ---- the padded edge -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("seed", range(3))
def test_padded_and_back(side, seed):
    draw = random.Random(seed)
    sequences = ragged(seed, 9, longest=13)
    width = max(map(len, sequences)) + 3
    ids, mask = torch.full((len(sequences), width), 555), torch.zeros(len(sequences), width, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        room = width - len(sequence)
        start = {"left": room, "right": 0, "both": draw.randrange(room + 1)}[side]
        ids[row, start : start + len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
        mask[row, start : start + len(sequence)] = 1

    batch = ml.from_padded(ids, mask)
    expected = ml.pack(sequences)
    assert torch.equal(batch.input_ids, expected.input_ids)
    assert torch.equal(batch.cu_seqlens, expected.cu_seqlens)
    assert torch.equal(batch.position_ids, expected.position_ids)
    assert torch.equal(ml.to_padded(batch.input_ids, mask, 555), ids)
    vectors = torch.randn(len(batch.input_ids), 2, 3)
    padded = ml.to_padded(vectors, mask, -7.0)
    assert torch.equal(padded[mask.bool()], vectors)
    assert (padded[~mask.bool()] == -7.0).all()
    assert padded.shape == (len(sequences), width, 2, 3)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_from_padded_takes_masks_of_any_dtype(dtype):
    mask = torch.tensor([[1, 1, 0], [0, 0, 1]], dtype=dtype)
    batch = ml.from_padded(torch.tensor([[1, 2, 0], [0, 0, 3]]), mask)
    assert batch.input_ids.tolist() == [1, 2, 3]
    assert ml.to_padded(batch.input_ids, mask).tolist() == [[1, 2, 0], [0, 0, 3]]


def test_from_padded_without_a_mask_takes_everything():
    batch = ml.from_padded(torch.tensor([[1, 2], [3, 4], [5, 6]]))
    assert batch.cu_seqlens.tolist() == [0, 2, 4, 6]
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6]


def test_from_padded_of_a_row_without_tokens_and_of_no_rows():
    assert ml.from_padded(torch.tensor([[1], [9]]), torch.tensor([[1], [0]])).seqlens == (1, 0)
    assert ml.from_padded(torch.zeros(0, 5, dtype=torch.int64)).seqlens == ()
    assert ml.from_padded(torch.zeros(2, 0, dtype=torch.int64)).seqlens == (0, 0)


@pytest.mark.parametrize("row", [[1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 0, 1]])
def test_from_padded_refuses_a_hole(row):
    with pytest.raises(ValueError, match="row 1 of attention_mask has a hole"):
        ml.from_padded(torch.ones(3, 4, dtype=torch.int64), torch.tensor([[0, 1, 1, 0], row, [1, 1, 1, 1]]))


@pytest.mark.parametrize(("ids", "mask"), [((2, 3), (2, 4)), ((2, 3), (3, 2)), ((6,), (6,)), ((1, 2, 3), (1, 2, 3))])
def test_from_padded_refuses_other_shapes(ids, mask):
    with pytest.raises(ValueError, match=r"all must be \(B, S\)"):
        ml.from_padded(torch.ones(ids, dtype=torch.int64), torch.ones(mask, dtype=torch.int64))


def test_to_padded_refuses_a_mask_of_another_batch():
    with pytest.raises(ValueError, match="attention_mask has 3 real tokens, the packed tensor 4"):
        ml.to_padded(torch.zeros(4, 2), torch.tensor([[1, 1, 0], [1, 0, 0]]))


# ---- batches by token budget ---------------------------------------------------------------------------------------


def test_plan_gives_the_numbers_of_its_docstring():
    assert plan_batches([3, 9, 4, 2], 8) == [[1], [2, 0], [3]]


@pytest.mark.parametrize("budget", [CPU_BATCH_TOKENS, GPU_BATCH_TOKENS])
def test_a_budget_is_filled_and_not_passed(budget):
    assert len(plan_batches([128] * (budget // 128), budget)) == 1
    assert len(plan_batches([128] * (budget // 128 + 1), budget)) == 2


@pytest.mark.parametrize("seed", range(40))
def test_plan_keeps_the_budget_and_every_index_once(seed):
    draw = random.Random(seed)
    lengths = [draw.choice([0, 1, draw.randrange(20), draw.randrange(400)]) for _ in range(draw.randrange(200))]
    budget = draw.choice([1, 7, 64, 300, 10_000])
    groups = plan_batches(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(groups)
    for group in groups:
        assert sum(lengths[i] for i in group) <= budget or len(group) == 1
    in_order = [lengths[i] for group in groups for i in group]
    assert in_order == sorted(lengths, reverse=True)  # longest first: what doesn't fit shows at once


def test_an_over_long_text_goes_alone():
    groups = plan_batches([5, 100, 0, 3, 0], 10)
    assert groups[0] == [1]
    assert sorted(map(len, groups[1:])) == [4]


def test_plan_of_nothing():
    assert plan_batches([], 8) == []


def test_plan_wastes_no_more_than_half_of_the_budget():
    lengths = [random.Random(1).randrange(1, 50) for _ in range(500)]
    groups = plan_batches(lengths, 100)
    assert len(groups) <= 2 * sum(lengths) / 100 + 1


@pytest.mark.parametrize("budget", [0, -5])
def test_plan_refuses_a_budget_without_room(budget):
    with pytest.raises(ValueError, match=f"batch_tokens is {budget}; it must be at least 1"):
        plan_batches([1], budget)


def test_a_message_about_thousands_of_sequences_is_short():
    with pytest.raises(ValueError, match="have the lengths") as error:
        ml.pack([[5]] * 9_000, token_type_ids=[[0, 0]] * 9_000)
    assert len(str(error.value)) < 200


def test_packing_lists_goes_through_one_array():
    """As a tokenizer gives them: 16,384 tokens in well under a millisecond, and the same batch as from tensors."""
    sequences = [[(7 * i + j) % 50_000 for j in range(128)] for i in range(128)]
    spent = []
    for _ in range(20):
        start = time.perf_counter()
        batch = ml.pack(sequences)
        spent.append(time.perf_counter() - start)
    other = ml.pack(map(torch.tensor, sequences))
    for name in ("input_ids", "cu_seqlens", "position_ids"):
        assert torch.equal(getattr(batch, name), getattr(other, name))
        assert getattr(batch, name).dtype == getattr(other, name).dtype
    assert (batch.seqlens, batch.max_id) == (other.seqlens, other.max_id)
    assert min(spent) < 2e-3  # 0.2 ms are usual: a tensor per sequence takes 2 to 4

import pytest
import torch

from sbattn.cache import KeyValueCache, LayerCache
from sbattn.errors import InvalidInputError, UnsupportedError


def tokens(count, seed=0, heads=2, size=4):
    return torch.randn(3, heads, count, size, generator=torch.Generator().manual_seed(seed))


def test_what_is_appended_comes_back_in_order():
    cache = LayerCache(8)
    k, v, gates = tokens(7), tokens(7, seed=1, size=5), tokens(7, seed=2)[..., 0]
    for start, end in ((0, 3), (3, 4), (4, 7)):
        held = cache.append(*(x[:, :, start:end] for x in (k, v, gates)))
        assert cache.length == end
        for found, expected in zip(held, (k, v, gates), strict=True):
            torch.testing.assert_close(found, expected[:, :, :end], rtol=0, atol=0)


def test_growing_does_not_move_what_is_held():
    cache = LayerCache(8)
    (first,) = cache.append(tokens(3))
    (second,) = cache.append(tokens(2))
    assert first.data_ptr() == second.data_ptr()


def test_buffers_take_the_dtype_of_what_comes():
    (held,) = LayerCache(4).append(tokens(2).to(torch.bfloat16))
    assert held.dtype == torch.bfloat16


def test_reset_starts_over_in_the_same_memory():
    cache = LayerCache(4)
    (before,) = cache.append(tokens(4))
    cache.reset()
    (after,) = cache.append(tokens(2, seed=5))
    assert cache.length == 2
    assert after.data_ptr() == before.data_ptr()
    torch.testing.assert_close(after, tokens(2, seed=5))


def test_reorder_lets_every_row_go_on_from_the_row_named():
    cache = KeyValueCache(2, batch=3, max_length=4)
    cache.bounds(3, 2, torch.tensor([[0, 2], [1, 2], [0, 2]]))
    for layer in cache.layers:
        layer.append(tokens(2))
    cache.reorder(torch.tensor([1, 1, 0]))
    (held,) = cache.layers[1].append(tokens(1, seed=9))
    torch.testing.assert_close(held[:, :, :2], tokens(2)[[1, 1, 0]])
    assert cache.bounds(3, 0, None).tolist() == [[1, 2], [1, 2], [0, 2]]


def test_bounds_grow_with_the_tokens_and_keep_the_padding():
    cache = KeyValueCache(1, batch=2, max_length=9)
    assert cache.bounds(2, 4, torch.tensor([[1, 4], [3, 4]])).tolist() == [[1, 4], [3, 4]]
    cache.layers[0].append(tokens(4)[:2])
    assert cache.bounds(2, 1, None).tolist() == [[1, 5], [3, 5]]
    cache.reset()
    assert cache.bounds(2, 1, None) is None


def test_a_mask_means_the_same_as_its_interval():
    mask = torch.tensor([[False, True, True], [True, True, True]])
    from_mask = KeyValueCache(1, 2, 5).bounds(2, 3, mask)
    from_interval = KeyValueCache(1, 2, 5).bounds(2, 3, torch.tensor([[1, 3], [0, 3]]))
    assert from_mask.tolist() == from_interval.tolist() == [[1, 3], [0, 3]]


def test_no_more_tokens_than_fit():
    cache = LayerCache(4)
    cache.append(tokens(3))
    with pytest.raises(
        InvalidInputError, match="3 tokens are held and 2 come, but max_length is 4"
    ):
        cache.append(tokens(2))
    assert cache.length == 3


def test_another_batch_is_refused():
    cache = LayerCache(4)
    cache.append(tokens(1))
    with pytest.raises(InvalidInputError, match="one cache for one batch"):
        cache.append(tokens(1)[:1])
    with pytest.raises(InvalidInputError, match="for a batch of 3, got 2 rows"):
        KeyValueCache(1, 3, 4).bounds(2, 1, None)


def test_gradients_are_refused_rather_than_lost():
    with pytest.raises(UnsupportedError, match=r"torch\.no_grad"):
        LayerCache(4).append(tokens(1).requires_grad_())


@pytest.mark.parametrize("padding", [[[0, 2], [0, 3]], [[1, 3], [0, 2]]])
def test_padding_on_the_right_is_refused(padding):
    with pytest.raises(InvalidInputError, match="on the left"):
        KeyValueCache(1, 2, 4).bounds(2, 3, torch.tensor(padding))


@pytest.mark.parametrize("padding", [[[-1, 3], [0, 3]], [[0, 4], [0, 3]]])
def test_padding_beyond_the_tokens_is_refused(padding):
    with pytest.raises(InvalidInputError, match="key_padding: expected 0 <= start <= end <= 3"):
        KeyValueCache(1, 2, 4).bounds(2, 3, torch.tensor(padding))


def test_padding_that_comes_late_is_refused():
    cache = KeyValueCache(1, 3, 4)
    cache.layers[0].append(tokens(1))
    with pytest.raises(InvalidInputError, match="remembered; the cache holds 1"):
        cache.bounds(3, 1, torch.ones(3, 1, dtype=torch.bool))


@pytest.mark.parametrize(
    ("sizes", "word"), [((0, 1, 1), "num_layers"), ((1, 0, 1), "batch"), ((1, 1, 0), "max_length")]
)
def test_empty_caches_are_refused(sizes, word):
    with pytest.raises(InvalidInputError, match=word):
        KeyValueCache(*sizes)

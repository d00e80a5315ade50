"""Norms, finiteness and trimmed means of gradients, and a backend whose steps gather several peers' gradients."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tesseract_async.runtime.backend import BackendSettings, ExpertBackend
from tesseract_async.runtime.gradients import GatheredGradients, are_finite, norm_of, trimmed_mean
from tesseract_async.wire.tensors import TensorSpec


@given(
    num_peers=st.integers(1, 12), share=st.floats(0, 0.49), size=st.sampled_from([0, 1, 7, 70_000]), seed=st.integers()
)
def test_it_equals_sorting(num_peers: int, share: float, size: int, seed: int) -> None:
    torch.manual_seed(seed % 2**32)
    rows = [torch.randn(size) for _ in range(num_peers)]
    num_left_out = min(int(share * num_peers + 1e-9), (num_peers - 1) // 2)
    expected = torch.stack(rows).sort(dim=0).values[num_left_out : num_peers - num_left_out].mean(dim=0)
    (merged,) = trimmed_mean([[row] for row in rows], share)
    assert merged is not None
    torch.testing.assert_close(merged, expected)


def test_an_outlier_leaves_no_trace_however_large() -> None:
    rows = [torch.full((3,), 1.0), torch.full((3,), 1.5), torch.full((3,), 2.0), torch.full((3,), 3e38)]
    (merged,) = trimmed_mean([[row] for row in rows], 0.25)
    assert merged is not None and merged.tolist() == [1.75] * 3


def test_absent_sparse_and_complex_gradients() -> None:
    sparse = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (3, 2), check_invariants=True)
    merged = trimmed_mean(
        [[None, None, sparse, torch.ones(2) * 1j], [None, torch.ones(2), sparse, torch.ones(2) + 0j]], 0.25
    )
    assert merged[0] is None
    assert merged[1] is not None and merged[1].tolist() == [0.5, 0.5]
    assert merged[2] is not None and merged[2].tolist() == [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    assert merged[3] is not None and merged[3].tolist() == [0.5 + 0.5j] * 2


def make_backend(**options: object) -> ExpertBackend:
    module = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(module.weight)
    return ExpertBackend(
        module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        args_schema=(TensorSpec((2,)),),
        settings=BackendSettings(max_gradient_norm=None, **options),  # type: ignore[arg-type]
    )


def weight_of(backend: ExpertBackend) -> list[float]:
    weight: torch.Tensor = backend.module.weight  # type: ignore[assignment]
    return weight.flatten().tolist()


def send(backend: ExpertBackend, peer: str, size: float) -> None:
    backend.step([torch.full((1, 2), size)], peer=peer)


def test_a_step_takes_the_trimmed_mean_of_peers_as_often_as_batches_came() -> None:
    backend = make_backend(step_every=4, trim_peers=0.25)
    for peer, size in (("a", 1.0), ("b", 2.0), ("c", 3.0), ("liar", -100.0)):
        send(backend, peer, size)
    assert backend.version == 1 and weight_of(backend) == [-6.0, -6.0]  # 4 x (1 + 2) / 2


def test_who_sends_more_counts_no_more_and_is_not_alone_in_a_step() -> None:
    backend = make_backend(step_every=4, trim_peers=0.25)
    for peer, size in (("a", 1.0), ("b", 1.0), ("c", 1.0), ("liar", -100.0)):
        send(backend, peer, size)
    assert backend.version == 1
    for _ in range(12):
        send(backend, "liar", -100.0)
    assert backend.version == 1, "the others are waited for"
    for peer in "abc":
        send(backend, peer, 1.0)
    assert backend.version == 2 and weight_of(backend)[0] == pytest.approx(-4.0 - 15.0)


def test_who_has_left_is_not_waited_for() -> None:
    backend = make_backend(step_every=2, trim_peers=0.25)
    for peer in ("gone", "here"):
        send(backend, peer, 1.0)
    for _ in range(8):
        assert backend.version == 1
        send(backend, "here", 1.0)
    assert backend.version == 2
    steps = backend.version
    for _ in range(12):
        send(backend, "here", 1.0)
    assert backend.version >= steps + 2, "nor is it for ever"


def test_without_trimming_all_is_as_it_was() -> None:
    backend = make_backend(step_every=2)
    for peer, size in (("a", 1.0), ("a", 2.0)):
        send(backend, peer, size)
    assert backend.version == 1 and weight_of(backend) == [-3.0, -3.0]


def test_what_was_gathered_survives_a_restart() -> None:
    backend, after = (make_backend(step_every=4, trim_peers=0.25) for _ in range(2))
    for peer, size in (("a", 1.0), ("b", 2.0)):
        send(backend, peer, size)
    after.load_state(backend.state())
    for peer, size in (("c", 1.5), ("d", 1.5)):
        send(after, peer, size)
    assert after.version == 1 and weight_of(after) == [-6.0, -6.0]


@pytest.mark.parametrize("bad", [-0.1, 0.5, 1.0])
def test_half_of_the_peers_cannot_be_left_out(bad: float) -> None:
    with pytest.raises(ValueError, match="trim_peers"):
        BackendSettings(trim_peers=bad)


@pytest.mark.parametrize("shape", [(5,), (256, 200)])  # a large one takes another way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64])
def test_the_norm_is_that_of_all_elements(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = [
        torch.randn(*shape).to(dtype),
        None,
        torch.randn(3).to(dtype),
        torch.randn(*shape[::-1]).to(dtype).permute(*reversed(range(len(shape)))),
    ]
    expected = math.hypot(*(float(x.abs().double().square().sum().sqrt()) for x in tensors if x is not None))
    assert norm_of(tensors) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("size", [4, 50_000])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_one_wrong_element_is_seen(size: int, wrong: float) -> None:
    x = torch.zeros(size)
    assert norm_of([x, None]) == 0.0
    assert are_finite([x, None])
    x[size // 2] = wrong
    assert not math.isfinite(norm_of([torch.ones(2), x]))
    assert not are_finite([torch.ones(2), x])


@pytest.mark.parametrize("size", [3, 40_000])
def test_a_square_that_is_too_large_is_no_number(size: int) -> None:
    x = torch.full((size,), 1e30)
    assert not math.isfinite(norm_of([x]))
    assert are_finite([x])


def test_expanded_and_sparse_tensors_count_as_what_they_stand_for() -> None:
    assert norm_of([torch.ones(1, 1).expand(300, 300)]) == pytest.approx(300.0)
    twice = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.tensor([3.0, 4.0]), (5,), check_invariants=True)
    assert norm_of([twice]) == pytest.approx(7.0)
    assert norm_of([]) == 0.0


def test_gradients_that_wait_for_a_step_hold_no_other_experts_gradients() -> None:
    gathered = GatheredGradients(step_every=8, trim_peers=0.0)
    gathered.add([torch.ones(64, 5)[3], None], "peer")
    [kept, absent] = gathered.merged() or ()
    assert absent is None and kept is not None and kept.eq(1).all() and kept.untyped_storage().nbytes() == kept.nbytes

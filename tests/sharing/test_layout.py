"""Layouts: what is shared of a model, how it is cut, and that reading and adding find the same elements."""

import contextlib

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tesseract_async.errors import ProtocolError
from tesseract_async.sharing import layout as layouts
from tesseract_async.sharing.fragment import Outer
from tesseract_async.sharing.layout import Cut, Layout, LayoutMismatch, MergeKind, TensorEntry
from tesseract_async.sharing.manifest import FragmentPart, SharedManifest


class Model(nn.Module):
    """Has something of each kind: tied, frozen, of 16 bits, not contiguous, floating and integer buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.narrow = nn.Parameter(torch.randn(33).to(torch.bfloat16))
        self.strided = nn.Parameter(torch.randn(5, 9).T)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def test_every_tensor_is_shared_once_by_its_kind() -> None:
    layout = Layout.of(Model())
    kinds = {entry.name: entry.kind for entry in layout.entries}
    assert kinds == {
        "narrow": "stepped",
        "strided": "stepped",
        "frozen": "fixed",
        "embedding.weight": "stepped",
        "norm.weight": "stepped",
        "norm.bias": "stepped",
        "norm.running_mean": "averaged",
        "norm.running_var": "averaged",
        "norm.num_batches_tracked": "newest",
    }
    assert [cut.kind for cut in layout.cuts] == ["stepped"] * 4 + ["averaged", "newest", "fixed"]


def test_reading_and_adding_are_exact_and_touch_nothing_else() -> None:
    torch.manual_seed(0)
    model = Model()
    layout = Layout.of(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for cut in layout.cuts:
        values = layout.read(model, cut)
        assert values.dtype == cut.dtype and values.shape == (cut.numel,)
        layout.add(model, cut, values)  # doubles floats; integers stay
    for name, tensor in model.state_dict().items():
        factor = 1 if name in ("norm.num_batches_tracked", "scratch") else 2
        assert torch.equal(tensor, before[name] * factor), name
    number = next(cut for cut in layout.cuts if cut.kind is MergeKind.NEWEST)
    layout.add(model, number, torch.tensor([2**53 + 1]))
    assert model.norm.num_batches_tracked == 2**53 + 1


def test_a_change_of_16_bits_is_rounded_once() -> None:
    model = nn.ParameterList([nn.Parameter(torch.full((4,), 1.0, dtype=torch.bfloat16))])
    layout = Layout.of(model)
    for cut in layout.cuts:
        layout.add(model, cut, torch.full((cut.numel,), 0.0039))  # less than half a step of bfloat16 above 1 is lost
        layout.add(model, cut, torch.full((cut.numel,), 0.0118))  # rounds to the next but one
    assert torch.equal(model[0].float(), torch.full((4,), 1.015625))


@given(st.lists(st.tuples(st.integers(0, 3 << 19), st.sampled_from(list(MergeKind))), max_size=12))
def test_cuts_cover_each_kind_once(sizes: list[tuple[int, MergeKind]]) -> None:
    entries = [TensorEntry(f"t{at}", (size,), torch.float32, kind) for at, (size, kind) in enumerate(sizes)]
    total = {kind: sum(size for size, one in sizes if one is kind) for kind in MergeKind}
    if not total[MergeKind.STEPPED]:
        with pytest.raises(ValueError, match="nothing to share"):
            Layout(entries)
        return
    layout = Layout(entries)
    for kind in MergeKind:
        cuts = [cut for cut in layout.cuts if cut.kind is kind]
        assert [cut.start for cut in cuts] == [0, *(cut.stop for cut in cuts)][: len(cuts)]
        assert (cuts[-1].stop if cuts else 0) == total[kind]
        assert all(0 < cut.numel <= layouts.MAX_ELEMENTS for cut in cuts)
    stepped = [cut for cut in layout.cuts if cut.kind is MergeKind.STEPPED]
    if total[MergeKind.STEPPED] >= 4 * 4 * 128:
        assert len(stepped) >= 4
    assert Layout.decode(layout.encode()).cuts == layout.cuts


def test_another_model_is_refused_by_the_names_that_differ() -> None:
    run = Layout.of(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    run.check(Layout.of(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))))
    with pytest.raises(LayoutMismatch, match=r"1\.weight is float32\[2, 4\], stepped in the run, but float32\[3, 4\]"):
        run.check(Layout.of(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))))
    with pytest.raises(LayoutMismatch, match=r"1\.bias is missing here"):
        run.check(Layout.of(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))))
    with pytest.raises(LayoutMismatch, match="float64"):
        run.check(Layout.of(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()))
    with pytest.raises(LayoutMismatch, match="and 88 more"):
        run.check(Layout.of(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), *(nn.Linear(1, 1) for _ in range(48)))))


def test_what_cannot_be_shared_is_named() -> None:
    with pytest.raises(ValueError, match=r"weight has no shape yet"):
        Layout.of(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="complex64"):
        Layout.of(nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.complex64))]))
    with pytest.raises(ValueError, match="nothing to share"):
        Layout.of(nn.ReLU())
    halves = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    halves[1].weight.data = halves[0].weight.data  # each would get all that is learned of both
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight share memory"):
        Layout.of(halves)
    expanded = nn.Linear(3, 3)
    expanded.register_buffer("mask", torch.ones(1).expand(3))
    with pytest.raises(ValueError, match="mask is expanded"):
        Layout.of(expanded)


@pytest.mark.parametrize(("here", "sent", "new", "wanted"), [(0, 1, 0, 0), (1, 0, 0, 1), (1, 1, 0, 0), (0, 0, 1, 1)])
def test_a_bool_takes_what_is_new_or_keeps_what_it_became(here: int, sent: int, new: int, wanted: int) -> None:
    model = nn.Linear(1, 1)
    model.register_buffer("flag", torch.tensor(bool(here)))
    layout = Layout.of(model)
    layout.add(model, layout.cuts[-1], torch.tensor([new - sent]))
    assert model.get_buffer("flag").item() is bool(wanted)


@given(st.binary(max_size=200))
def test_layouts_of_strangers_raise_only_protocol_errors(data: bytes) -> None:
    encoded = Layout.of(nn.Linear(2, 2)).encode()
    for attempt in (data, encoded[: len(data)], encoded + data):
        try:
            Layout.decode(attempt)
        except ProtocolError:
            continue
        assert attempt == encoded


def test_a_layout_of_endless_size_is_refused() -> None:
    for rows in (
        [["a", [2**39, 2**39], "float32", "stepped"]],
        [["a", [4], "float32", "stepped"]] * 2,
        [["a", [4], "float32", "x"]],
    ):
        with pytest.raises(ProtocolError):
            Layout.decode(layouts.msgpack.packb(rows))


def test_cut_of_integers_keeps_64_bits() -> None:
    assert Cut(MergeKind.NEWEST, 0, 1).dtype == torch.int64


def packed(value: object) -> bytes:
    data: bytes = msgpack.packb(value)
    return data


@given(
    st.binary(max_size=60) | st.lists(st.none() | st.floats() | st.text(max_size=4) | st.binary(max_size=9)).map(packed)
)
def test_a_strangers_manifest_is_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert SharedManifest.decode(data).layout.cuts
    with contextlib.suppress(ProtocolError):
        assert FragmentPart.read(1, data).cut.numel


def test_a_manifest_comes_back() -> None:
    manifest = SharedManifest(Layout.of(nn.Linear(3, 4)), Outer(learning_rate=0.5, momentum=0.0, codec="none"))
    read = SharedManifest.decode(manifest.data)
    assert read.outer == manifest.outer and read.layout.entries == manifest.layout.entries
    assert read.data == manifest.data and read.digest == manifest.digest
    for number in range(len(manifest.layout.cuts)):
        assert FragmentPart.read(number, manifest.part(number).data) == manifest.part(number)
    rate, momentum, codec, kind, start, stop, digest = msgpack.unpackb(manifest.part(1).data)
    for row in (
        [rate, momentum, codec, kind, start, start, digest],
        [rate, momentum, codec, kind, start, start + 2**40, digest],
        [rate, momentum, codec, "odd", start, stop, digest],
        [rate, momentum, codec, kind, True, stop, digest],
        [11.0, momentum, codec, kind, start, stop, digest],
        [rate, momentum, codec, kind, start, stop, b""],
        [rate],
        7,
    ):
        with pytest.raises(ProtocolError):
            FragmentPart.read(1, packed(row))
    for wrong in ([0.5, 2.0, "none", b""], [0.5, 0.0, "zip", b""], [0.5, 0.0, "none", "x"], [1, 0.0, "none", b""]):
        with pytest.raises(ProtocolError):
            SharedManifest.decode(packed(wrong))

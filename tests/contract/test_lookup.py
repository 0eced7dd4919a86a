"""A lookup in the chain is a lookup in the dense table."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tensortrain.contract import Chain, CostModel, chain_lookup, chain_to_dense, lookup, use_cost_model
from tensortrain.errors import DTypeError, ModeIndexError, ShapeError

MODEL = CostModel.reference("cpu")
CHAINS = {
    "order 1": Chain((3,), (7,), (1, 1)),
    "order 2": Chain((4, 3), (5, 6), (1, 4, 1)),
    "order 3": Chain((2, 3, 2), (5, 4, 6), (1, 3, 5, 1)),
    "size 1": Chain((1, 3, 1), (4, 1, 5), (1, 2, 2, 1)),
    "order 5": Chain((2, 1, 2, 2, 2), (3, 4, 2, 3, 2), (1, 2, 3, 2, 4, 1)),
}


@pytest.fixture(autouse=True)
def _fixed() -> Iterator[None]:
    torch.manual_seed(0)
    with use_cost_model(MODEL):
        yield


def random_cores(chain: Chain) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in chain.core_shapes]


def assert_as_dense(ids: Tensor, chain: Chain, **options: object) -> None:
    """Rows and gradients are those of the dense table."""
    cores = random_cores(chain)
    table = chain_to_dense(cores).T
    rows, expected = chain_lookup(ids, cores, chain.in_modes, **options), table[ids]  # type: ignore[arg-type]
    torch.testing.assert_close(rows, expected, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(expected)
    found = torch.autograd.grad(rows, cores, g)
    for a, b in zip(found, torch.autograd.grad(expected, cores, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("deduplicate", [True, False])
def test_all_ids(name: str, deduplicate: bool) -> None:
    chain = CHAINS[name]
    assert_as_dense(torch.randperm(chain.in_features), chain, deduplicate=deduplicate)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (3, 0, 2), (40, 5)])
@pytest.mark.parametrize("name", ["order 1", "order 3"])
def test_shapes_and_duplicates(name: str, shape: tuple[int, ...]) -> None:
    assert_as_dense(torch.randint(CHAINS[name].in_features, shape), CHAINS[name])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_integer_dtypes(dtype: torch.dtype) -> None:
    cores = random_cores(CHAINS["order 3"])
    rows = chain_lookup(torch.tensor([5, 0, 5], dtype=dtype), cores, (5, 4, 6))
    torch.testing.assert_close(rows, chain_to_dense(cores).T[[5, 0, 5]], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("max_bytes", [1, 500, 5000])
def test_chunks(max_bytes: int) -> None:
    chain = CHAINS["order 5"]
    assert_as_dense(torch.randint(chain.in_features, (50,)), chain, max_bytes=max_bytes)


def test_every_grouping_and_sharing_gives_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = CHAINS["order 3"]
    ids = torch.randint(chain.in_features, (64,))
    monkeypatch.setattr(lookup, "_MIN_SHARED", 1)
    for groups in (((0, 1), (1, 2), (2, 3)), ((0, 2), (2, 3)), ((0, 1), (1, 3)), ((0, 3),)):
        monkeypatch.setattr(lookup, "lookup_groups", lambda *args, groups=groups: groups)
        # by digit: nowhere, everywhere, at the last mode only, at all but the last
        for by_digit in (set(), {4, 6, 24}, {6}, {4}):
            monkeypatch.setattr(
                lookup, "_is_worth_grouping", lambda n, table, by_digit=by_digit: table.shape[0] in by_digit
            )
            assert_as_dense(ids, chain)
            assert_as_dense(ids, chain, deduplicate=False)


def test_prefixes_are_shared_when_that_halves_the_work() -> None:
    modes = (4, 5, 10)
    levels = lookup._prefixes(torch.arange(200), modes, share=True)
    assert [digits.shape[0] for digits, _ in levels] == [4, 20, 200]
    sparse = lookup._prefixes(torch.arange(0, 200, 10), modes, share=True)
    assert [digits.shape[0] for digits, _ in sparse] == [4, 20, 20]
    assert sparse[2][1] is None


def test_merges_follow_the_number_of_ids() -> None:
    chain = Chain((4, 4, 4), (100, 100, 100), (1, 16, 16, 1))
    few = lookup.lookup_groups(chain, 1, torch.float32, False, 2**26, MODEL)
    many = lookup.lookup_groups(chain, 2**20, torch.float32, False, 2**26, MODEL)
    assert few == ((0, 1), (1, 2), (2, 3))
    assert len(many) == 2
    small = Chain((4, 4, 4), (4, 4, 4), (1, 16, 16, 1))
    assert lookup.lookup_groups(small, 2**20, torch.float32, False, 2**26, MODEL) == ((0, 3),)
    assert len(lookup.lookup_groups(small, 2**20, torch.float32, False, 100, MODEL)) == 3


def test_intermediate_results_are_bounded() -> None:
    chain = Chain((4, 4, 4), (10, 10, 10), (1, 8, 8, 1))
    cores = random_cores(chain)
    ids, limit, sizes = torch.arange(1000), 20_000, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func._schema.name in ("aten::bmm", "aten::index_select"):
                sizes.append(out.nbytes)
            return out

    with Watch(), torch.no_grad():
        rows = chain_lookup(ids, cores, chain.in_modes, max_bytes=limit)
    assert sorted(sizes)[-1] == rows.nbytes  # the result itself, put in order
    assert sorted(sizes)[-2] <= limit


def test_gradcheck() -> None:
    chain = Chain((2, 2), (2, 3), (1, 2, 1))
    ids = torch.tensor([0, 5, 5, 2])
    assert torch.autograd.gradcheck(lambda *cores: chain_lookup(ids, cores, (2, 3)), random_cores(chain))


def test_compiles_without_a_graph_break() -> None:
    chain = CHAINS["order 3"]
    cores = random_cores(chain)
    torch._dynamo.reset()
    run = torch.compile(lambda ids: chain_lookup(ids, cores, chain.in_modes), fullgraph=True, backend="eager")
    for n in (4, 9):
        ids = torch.randint(chain.in_features, (n,))
        torch.testing.assert_close(run(ids), chain_to_dense(cores).T[ids], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("in_modes, vocabulary", [((36, 37, 38), 50257), ((31, 31, 32), 30522), ((101, 103), 10007)])
def test_vocabularies_that_the_modes_exceed(in_modes: tuple[int, ...], vocabulary: int) -> None:
    d = len(in_modes)
    chain = Chain((2, 3, 2)[:d], in_modes, (1, *[3] * (d - 1), 1))
    cores = random_cores(chain)
    table = chain_to_dense(cores).T
    for ids in (torch.arange(vocabulary), torch.randint(vocabulary, (500,)), torch.tensor([0, vocabulary - 1])):
        with torch.no_grad():
            rows = chain_lookup(ids, cores, in_modes)
        torch.testing.assert_close(rows, table[ids], rtol=1e-12, atol=1e-12)
    assert_as_dense(torch.randint(vocabulary, (300,)), chain)


def test_exports_for_any_number_of_ids() -> None:
    chain = CHAINS["order 3"]

    class Lookup(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cores = torch.nn.ParameterList(random_cores(chain))

        def forward(self, ids: Tensor) -> Tensor:
            return chain_lookup(ids, list(self.cores), chain.in_modes)

    module = Lookup()
    sizes = ({0: torch.export.Dim("n", min=2, max=1000)},)
    program = torch.export.export(module, (torch.tensor([1, 5, 5]),), dynamic_shapes=sizes)
    for n in (2, 7, 300):
        ids = torch.randint(chain.in_features, (n,))
        torch.testing.assert_close(program.module()(ids), module(ids), rtol=1e-12, atol=1e-12)


def test_messages() -> None:
    chain = CHAINS["order 3"]
    cores = random_cores(chain)
    for bad in (-1, 120):
        with pytest.raises(ModeIndexError, match="expected 0 to 119"):
            chain_lookup(torch.tensor([3, bad]), cores, chain.in_modes)
    with pytest.raises(DTypeError, match="ids must be integers"):
        chain_lookup(torch.ones(3), cores, chain.in_modes)
    with pytest.raises(ShapeError, match="in_modes must be the input modes of the cores"):
        chain_lookup(torch.tensor([3]), cores, (120,))

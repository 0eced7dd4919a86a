"""Formats that are no chain, and sums of Kronecker products: definitions, counts, best approximations."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import tensortrain as tt
from tensortrain.contract import Chain, Network
from tensortrain.errors import DTypeError, KindError, RankError, ShapeError
from tensortrain.formats import FactorSpec, Weighting, WeightShape, get_format, output_error
from tensortrain.formats.als import alternate, chain_network
from tensortrain.formats.btt import from_tt
from tensortrain.formats.cp import cp_factors
from tensortrain.formats.multilinear import expand, hooi, hosvd
from tensortrain.testing import rel_error

LINEAR = WeightShape("linear", 12, 10)
CONV = WeightShape("conv", 6, 4, (2, 3))
TABLE = WeightShape("embedding", 6, 11)
MODES: dict[str, Any] = {"out_modes": (3, 4), "in_modes": (2, 5)}

# Equations over (o1 o2, x, i1 i2), written out by hand: z is the CP rank, t the term.
EQUATIONS = {
    ("cp", "linear"): "iz,jz,mz,nz->mnij",
    ("cp", "conv"): "xz,iz,jz,mz,nz->mnxij",
    ("tucker", "linear"): "iI,jJ,MNIJ,mM,nN->mnij",
    ("tucker", "conv"): "xX,iI,jJ,MNXIJ,mM,nN->mnxij",
    ("ring", "linear"): "amib,bnja->mnij",
    ("ring", "conv"): "axb,bmic,cnja->mnxij",
    ("block_term", "linear"): "tiI,tjJ,tMNIJ,tmM,tnN->mnij",
    ("block_term", "conv"): "txX,tiI,tjJ,tMNXIJ,tmM,tnN->mnxij",
    ("btt", "linear"): "jimz,mzjn->mnij",
    ("btt", "conv"): "jximz,mzjn->mnxij",
    ("tt_separate", "linear"): "ama,anb,bic,cjd->mnij",
    ("tt_separate", "conv"): "axa,amb,bnc,cid,dje->mnxij",
}
NETWORKS = ("cp", "tucker", "ring", "block_term", "btt")


def random_cores(spec: FactorSpec) -> list[Tensor]:
    return [torch.randn(shape) for shape in spec.core_shapes]


@pytest.mark.parametrize("key", EQUATIONS, ids="-".join)
def test_the_weight_is_its_definition(key: tuple[str, str]) -> None:
    name, kind = key
    fmt = get_format(name)
    if kind == "linear":
        weight, modes = LINEAR, MODES
    else:
        weight, modes = CONV, {"out_modes": (3, 2), "in_modes": (2, 2)}
    spec = fmt.spec(weight, rank=2, **modes)
    cores = random_cores(spec)
    equation = EQUATIONS[key]
    if name == "tt_separate":  # boundary ranks are one
        inputs = [core.squeeze(0) if k == 0 else core for k, core in enumerate(cores)]
        inputs[-1] = inputs[-1].squeeze(-1)
        terms = equation.split("->")[0].split(",")
        terms[0], terms[-1] = terms[0][1:], terms[-1][:-1]
        equation = ",".join(terms) + "->" + equation.split("->")[1]
        exact = torch.einsum(equation, *inputs)
    else:
        exact = torch.einsum(equation, *cores)
    if kind == "conv":
        exact = exact.reshape(6, 2, 3, 4).permute(0, 3, 1, 2)
    found = fmt.to_dense(cores, spec)
    assert tuple(found.shape) == weight.dense_shape
    assert rel_error(found, exact.reshape(weight.dense_shape)) <= 1e-14


@pytest.mark.parametrize("name", [*NETWORKS, "kronecker", "tt_separate"])
def test_embedding_rows_are_inputs(name: str) -> None:
    fmt = get_format(name)
    spec = fmt.spec(TABLE, rank=2)
    cores = random_cores(spec)
    table = fmt.to_dense(cores, spec)
    n = math.prod(spec.in_modes)
    linear = fmt.spec(
        WeightShape("linear", 6, n), rank=spec.ranks, out_modes=spec.out_modes, in_modes=spec.in_modes, clip=False
    )
    assert linear.core_shapes == spec.core_shapes
    assert torch.equal(table, fmt.to_dense(cores, linear).T[:11])
    ids = torch.tensor([[0, 10, 3], [3, 3, 7]])
    assert rel_error(fmt.lookup(ids, cores, spec), table[ids]) <= 1e-13
    assert fmt.lookup(ids[:0], cores, spec).shape == (0, 3, 6)


def test_a_lookup_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = get_format("cp")
    spec = fmt.spec(WeightShape("embedding", 6, 300), rank=3)
    cores, ids = random_cores(spec), torch.randint(300, (500,))
    whole = fmt.lookup(ids, cores, spec)
    monkeypatch.setattr("tensortrain.formats.network._LOOKUP_BYTES", 2000)
    assert rel_error(fmt.lookup(ids, cores, spec), whole) <= 1e-14
    with pytest.raises(IndexError, match="5000"):
        fmt.lookup(torch.tensor([5000]), cores, spec)


# -- published counts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "outputs", "kernel", "rank"), [(64, 128, 3, 16), (3, 64, 7, 5), (512, 512, 3, 96)]
)
def test_counts_of_musco(channels: int, outputs: int, kernel: int, rank: int) -> None:
    # CP3: R (C + k^2 + S); Tucker-2: C R_in + R_in R_out k^2 + R_out S (arXiv:1903.09973).
    weight = WeightShape("conv", outputs, channels, (kernel, kernel))
    assert get_format("cp").spec(weight, rank=rank).n_params == rank * (channels + kernel**2 + outputs)
    tucker = get_format("tucker").spec(weight, rank=(rank, kernel**2, min(rank, channels)))
    two = get_format("tucker2").spec(weight, rank=(min(rank, channels), rank))
    assert tucker.n_params == two.n_params + kernel**4  # a full Tucker also has a factor for the positions


@pytest.mark.parametrize(("m", "n", "r"), [((8, 8), (8, 8), 2), ((16, 4), (5, 12), 3)])
def test_counts_of_block_tensor_trains(m: tuple[int, int], n: tuple[int, int], r: int) -> None:
    # r (d_in n_0 + d_out m_1) with d_in = m_0 m_1, d_out = n_0 n_1 (arXiv:2406.06248).
    weight = WeightShape("linear", math.prod(m), math.prod(n))
    spec = get_format("btt").spec(weight, rank=(r,), out_modes=m, in_modes=n)
    assert spec.n_params == r * (math.prod(n) * m[0] + math.prod(m) * n[1])


# -- ranks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_ranks_as_callers_write_them(name: str) -> None:
    fmt = get_format(name)
    spec = fmt.spec(LINEAR, rank=2, **MODES)
    assert fmt.spec(LINEAR, rank=spec.ranks, **MODES) == spec
    assert fmt.spec(LINEAR, rank=10**6, **MODES).ranks <= fmt.rank_caps(fmt.spec(LINEAR, rank=10**6, **MODES))
    share = fmt.spec(LINEAR, rank=0.5, **MODES)
    least = fmt.spec(LINEAR, rank=1, **MODES)
    assert share.n_params <= max(0.5 * LINEAR.n_params, least.n_params)
    above = tuple(1000 for _ in spec.ranks)
    assert fmt.spec(LINEAR, rank=above, **MODES).ranks == above  # as given, where somebody wants it
    for wrong in (0, -1, 1.5, 0.0, "all", (1,) * 9, (0,) * len(spec.ranks), True):
        with pytest.raises(RankError):
            fmt.spec(LINEAR, rank=wrong, **MODES)


def test_terms_and_rank_as_a_pair() -> None:
    fmt = get_format("block_term")
    assert fmt.spec(LINEAR, rank=(4, 3), **MODES).ranks == (4, 3, 3, 2, 3)
    assert fmt.spec(LINEAR, rank=3, **MODES).ranks == (2, 3, 3, 2, 3)
    with pytest.raises(RankError, match="terms"):
        fmt.spec(LINEAR, rank=(1, 2, 3), **MODES)


@pytest.mark.parametrize("name", ["btt", "kronecker"])
def test_two_modes_are_needed(name: str) -> None:
    with pytest.raises(ShapeError, match="2 each"):
        get_format(name).spec(WeightShape("linear", 8, 8), rank=1, out_modes=(2, 2, 2), in_modes=(2, 2, 2))


@pytest.mark.parametrize("name", NETWORKS)
def test_complex_weights_are_refused(name: str) -> None:
    with pytest.raises(DTypeError, match="complex"):
        get_format(name).factorize(torch.randn(12, 10, dtype=torch.complex128), LINEAR, rank=1)


@pytest.mark.parametrize("name", [*NETWORKS, "kronecker", "tt_separate"])
def test_generic_cores_reach_the_largest_matrix_rank(name: str) -> None:
    fmt = get_format(name)
    for rank in (1, 2, 3):
        spec = fmt.spec(LINEAR, rank=rank, **MODES)
        matrix = fmt.to_dense(random_cores(spec), spec)
        found = int(torch.linalg.matrix_rank(matrix))
        assert found <= fmt.max_matrix_rank(spec)
        assert name == "ring" or found == fmt.max_matrix_rank(spec)


# -- block tensor trains ------------------------------------------------------------------------------


def block_error(dense: Tensor, m: tuple[int, int], n: tuple[int, int], rank: int) -> float:
    """What the truncated SVDs of all blocks leave, one block at a time."""
    blocks, lost = dense.reshape(*m, *n), 0.0
    for i, j in itertools.product(range(m[0]), range(n[1])):
        lost += float(torch.linalg.svdvals(blocks[i, :, :, j])[rank:].square().sum())
    return math.sqrt(lost) / float(dense.norm())


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_btt_is_the_svd_of_every_block(rank: int) -> None:
    m, n, dense = (3, 7), (5, 4), torch.randn(21, 20)
    fmt, weight = get_format("btt"), WeightShape("linear", 21, 20)
    found = fmt.factorize(dense, weight, rank=rank, out_modes=m, in_modes=n)
    assert found.rel_error_bound == pytest.approx(block_error(dense, m, n, rank), rel=1e-10)
    (values,) = fmt.spectra(dense, found.value.spec)
    assert found.rel_error_bound == pytest.approx(float(values[rank:].norm() / values.norm()), rel=1e-10)
    best = float((found.value.to_dense() - dense).norm())
    for size in (1e-4, 1e-2, 1e-1):
        for _ in range(30):
            cores = [core + size * torch.randn_like(core) for core in found.value.cores]
            assert float((fmt.to_dense(cores, found.value.spec) - dense).norm()) >= best


def test_btt_is_exact_at_full_rank() -> None:
    dense = torch.randn(21, 20)
    found = get_format("btt").factorize(dense, WeightShape("linear", 21, 20), out_modes=(3, 7), in_modes=(5, 4))
    assert found.value.spec.ranks == (5,)
    assert rel_error(found.value.to_dense(), dense) <= 1e-14


def test_btt_from_a_train_of_two_modes() -> None:
    train = tt.randn_matrix((4, 6), (3, 5), 7, dtype=torch.float64)
    found = from_tt(train)
    assert found.spec.ranks == (7,)
    assert rel_error(found.to_dense(), train.to_dense()) <= 1e-14
    with pytest.raises(KindError, match="found 3"):
        from_tt(tt.randn_matrix((2, 2, 2), (2, 2, 2), 2))


def test_btt_never_errs_more_than_the_train_of_its_modes() -> None:
    dense, weight = torch.randn(12, 10), LINEAR
    for rank in (1, 2, 3):
        train = get_format("tt").factorize(dense, weight, rank=rank, **MODES)
        blocks = get_format("btt").factorize(dense, weight, rank=rank, **MODES)
        assert blocks.rel_error_bound <= train.rel_error_bound


def test_btt_whitening_is_exact_for_uncorrelated_blocks() -> None:
    m, n, rank = (3, 7), (5, 4), 2
    grams = []
    for _ in range(n[1]):
        x = torch.randn(5, 60) * torch.logspace(0, -2, 5)[:, None]
        grams.append(x @ x.T + torch.eye(5))
    gram = torch.einsum("jab,jk->ajbk", torch.stack(grams), torch.eye(4)).reshape(20, 20)
    dense, fmt, weight = torch.randn(21, 20), get_format("btt"), WeightShape("linear", 21, 20)
    options: dict[str, Any] = {"out_modes": m, "in_modes": n}
    found = fmt.factorize(dense, weight, rank=rank, gram=gram, **options)
    lost, total = 0.0, 0.0
    for i, j in itertools.product(range(3), range(4)):
        mean = grams[j].diagonal().mean()
        root = torch.linalg.cholesky(grams[j] + 1e-2 * mean * torch.eye(5))  # damped as the package damps
        values = torch.linalg.svdvals(dense.reshape(*m, *n)[i, :, :, j] @ root)
        lost, total = lost + float(values[rank:].square().sum()), total + float(values.square().sum())
    (spectrum,) = fmt.spectra(dense, found.value.spec, weighting=Weighting(gram))
    assert float(spectrum[rank:].square().sum()) == pytest.approx(lost, rel=1e-10)
    assert float(spectrum.square().sum()) == pytest.approx(total, rel=1e-10)


# -- Kronecker, Tucker, CP, ring, block terms ---------------------------------------------------------


def test_kronecker_is_van_loans_rearrangement() -> None:
    dense = torch.randn(12, 10)
    found = get_format("kronecker").factorize(dense, LINEAR, rank=2, **MODES)
    first, second = found.value.cores
    terms = sum(torch.kron(first[0, :, :, k], second[k, :, :, 0]) for k in range(2))
    assert rel_error(found.value.to_dense(), terms) <= 1e-14
    rows = [dense[4 * i : 4 * i + 4, 5 * j : 5 * j + 5].reshape(-1) for i in range(3) for j in range(2)]
    values = torch.linalg.svdvals(torch.stack(rows))
    assert rel_error(found.value.to_dense(), dense) == pytest.approx(
        float(values[2:].norm() / values.norm()), rel=1e-10
    )


def test_hooi_is_no_worse_than_the_hosvd() -> None:
    tensor = torch.randn(5, 6, 4, 3)
    bases, spectra = hosvd(tensor)
    for ranks in ((2, 2, 2, 2), (5, 1, 3, 2), (1, 1, 1, 1)):
        factors = [basis[:, :r] for basis, r in zip(bases, ranks, strict=True)]
        plain = torch.einsum("abcd,ax,by,cz,dw->xyzw", tensor, *factors)
        core, found = hooi(tensor, ranks)
        assert core.norm() >= plain.norm() * (1 - 1e-12)
        assert float((tensor - expand(core, found)).norm()) ** 2 == pytest.approx(
            float(tensor.norm() ** 2 - core.norm() ** 2), rel=1e-10
        )
    assert all(s.shape == (min(n, 360 // n),) for s, n in zip(spectra, tensor.shape, strict=True))


def test_the_best_rank_one_of_a_matrix_of_two_modes_is_its_svd() -> None:
    dense = torch.randn(7, 9)
    values = torch.linalg.svdvals(dense)
    for rank in (1, 4):
        best = float(values[rank:].norm() / values.norm())
        for name in ("cp", "tucker"):
            found = get_format(name).factorize(
                dense, WeightShape("linear", 7, 9), rank=rank, out_modes=(7,), in_modes=(9,)
            )
            assert found.rel_error_bound == pytest.approx(best, rel=1e-10)


@pytest.mark.parametrize(("shape", "rank"), [((4, 5, 6), 3), ((8, 9, 7), 4), ((3, 4, 3, 4), 3), ((5, 1, 6, 4), 2)])
def test_cp_recovers_planted_factors(shape: tuple[int, ...], rank: int) -> None:
    letters = "abcd"[: len(shape)]
    equation = ",".join(f"{letter}z" for letter in letters) + "->" + letters
    tensor = torch.einsum(equation, *(torch.randn(n, rank) for n in shape))
    factors, error = cp_factors(tensor, rank)
    assert error <= 1e-6
    assert rel_error(torch.einsum(equation, *factors), tensor) <= 1e-6
    again, _ = cp_factors(tensor, rank)
    assert all(map(torch.equal, factors, again))  # the starts come from a seed of their own


def test_cp_of_all_fibres_is_exact() -> None:
    tensor = torch.randn(3, 5, 4)
    factors, error = cp_factors(tensor, 12)
    assert error == 0
    assert rel_error(torch.einsum("az,bz,cz->abc", *factors), tensor) <= 1e-15


def test_a_ring_is_at_least_as_good_as_its_train() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        dense = torch.randn(12, 10)
        train = get_format("tt").factorize(dense, LINEAR, rank=3, **MODES)
        ring = get_format("ring").factorize(dense, LINEAR, rank=(3, 3), **MODES)
        assert ring.rel_error_bound < 0.95 * train.rel_error_bound


def test_a_ring_recovers_a_ring() -> None:
    fmt = get_format("ring")
    weight = WeightShape("linear", 24, 30)
    spec = fmt.spec(weight, rank=(2, 2, 2), out_modes=(4, 3, 2), in_modes=(2, 3, 5))
    dense = fmt.to_dense(random_cores(spec), spec)
    found = fmt.factorize(dense, weight, rank=(2, 2, 2), out_modes=(4, 3, 2), in_modes=(2, 3, 5))
    assert found.rel_error_bound <= 1e-5
    assert (
        get_format("tt").factorize(dense, weight, rank=2, out_modes=(4, 3, 2), in_modes=(2, 3, 5)).rel_error_bound > 0.1
    )


def test_more_terms_err_less() -> None:
    dense = torch.randn(12, 10)
    errors = [
        get_format("block_term").factorize(dense, LINEAR, rank=(t, 2), **MODES).rel_error_bound for t in (1, 2, 3)
    ]
    assert errors[0] > errors[1] > errors[2]
    one = get_format("tucker").factorize(dense, LINEAR, rank=2, **MODES)
    assert errors[0] == pytest.approx(one.rel_error_bound, rel=1e-8)


# -- least squares ------------------------------------------------------------------------------------


def errors_by_sweep(network: Network, target: Tensor, cores: list[Tensor], gram: Tensor | None) -> list[float]:
    errors = []
    for _ in range(8):
        cores, error = alternate(network, target, cores, gram=gram, n_sweeps=1, tol=0.0)
        errors.append(error)
    return errors


@pytest.mark.parametrize("weighted", [False, True])
def test_every_sweep_lowers_the_error(weighted: bool) -> None:
    chain = Chain((3, 2, 2), (2, 5, 2), (1, 3, 2, 1))
    network = chain_network(chain)
    x = torch.randn(20, 20) @ (torch.logspace(0, -2, 20)[:, None] * torch.randn(20, 100))
    gram = x @ x.T if weighted else None
    target = torch.randn(3, 2, 2, 2, 5, 2)
    cores = [torch.randn(shape) for shape in network.core_shapes]
    errors = errors_by_sweep(network, target, cores, gram)
    assert errors[-1] < errors[0]
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(errors))


def test_at_the_end_no_single_core_can_do_better() -> None:
    chain = Chain((3, 4), (2, 5), (1, 3, 1))
    network = chain_network(chain)
    x = torch.randn(10, 60)
    gram, target = x @ x.T, torch.randn(3, 4, 2, 5)
    cores, error = alternate(
        network, target, [torch.randn(shape) for shape in network.core_shapes], gram=gram, n_sweeps=500, tol=1e-13
    )
    matrix = target.reshape(12, 10)
    assert output_error(network.to_dense(cores) - matrix, matrix, gram) == pytest.approx(error, rel=1e-9)
    for k, size in itertools.product(range(2), (1e-3, 1e-2)):
        for _ in range(20):
            other = [core + size * torch.randn_like(core) if n == k else core for n, core in enumerate(cores)]
            assert output_error(network.to_dense(other) - matrix, matrix, gram) >= error * (1 - 1e-9)


@pytest.mark.parametrize("with_outputs", [False, True])
@pytest.mark.parametrize("name", ["tt", "kronecker", "tt_separate"])
def test_refined_trains_are_clearly_better_where_the_moment_is_no_kronecker_product(
    name: str, with_outputs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = WeightShape("linear", 36, 48)
    x = torch.randn(48, 48) @ (torch.logspace(0, -2, 48)[:, None] * torch.randn(48, 400))
    g = torch.randn(36, 100) * torch.logspace(0, -1, 36)[:, None]
    dense, output_gram = torch.randn(36, 48), g @ g.T if with_outputs else None
    fmt = get_format(name)
    refined = fmt.factorize(dense, weight, rank=6, gram=x @ x.T, output_gram=output_gram)
    monkeypatch.setattr(type(fmt), "refine_flops", 0.0)
    plain = fmt.factorize(dense, weight, rank=6, gram=x @ x.T, output_gram=output_gram)
    assert refined.rel_error_bound < 0.9 * plain.rel_error_bound
    assert refined.value.spec.ranks == plain.value.spec.ranks

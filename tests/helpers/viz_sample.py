"""A made-up report with every section, and numbers of a realistic size."""

from __future__ import annotations

import math

from tensortrain.compression.report.report import CurvePoint, LatencyRow, LayerReport, MemoryRow, Report


def falling(n: int, rate: float) -> tuple[float, ...]:
    return tuple(math.exp(-rate * k) for k in range(n))


def tt_linear(name: str, out_modes: tuple[int, ...], in_modes: tuple[int, ...], rank: int) -> LayerReport:
    n_out, n_in, d = math.prod(out_modes), math.prod(in_modes), len(in_modes)
    ranks = (1, *[rank] * (d - 1), 1)
    sizes = zip(ranks, out_modes, in_modes, ranks[1:], strict=False)
    return LayerReport(
        name=name,
        kind="Linear",
        shape=(n_out, n_in),
        format="tt",
        in_modes=in_modes,
        out_modes=out_modes,
        ranks=ranks,
        params_before=n_out * n_in + n_out,
        params_after=sum(math.prod(size) for size in sizes) + n_out,
        flops_before=2 * n_out * n_in,
        flops_after=40 * rank * n_out,
        rel_error=0.0132 * rank**0.5,
        implementation="right-to-left [0 1][2 3]",
        resident_bytes=4_210_688,
        decision="compressed: the widest layer, and its spectrum falls fast",
        spectra=tuple(falling(min(64, 16 << k), 0.05 + 0.04 * k) for k in range(d - 1)),
    )


def dense(name: str, kind: str, shape: tuple[int, ...], why: str) -> LayerReport:
    n = math.prod(shape) + shape[0]
    return LayerReport(
        name=name,
        kind=kind,
        shape=shape,
        params_before=n,
        params_after=n,
        flops_before=2 * n,
        flops_after=2 * n,
        implementation="dense",
        resident_bytes=4 * n,
        decision=why,
    )


def sample_report() -> Report:
    conv = LayerReport(
        name="features.28",
        kind="Conv2d",
        shape=(512, 512, 3, 3),
        format="tt",
        in_modes=(8, 8, 8),
        out_modes=(8, 8, 8),
        ranks=(1, 9, 20, 20, 1),
        params_before=2_359_808,
        params_after=41_612,
        flops_before=924_844_032,
        flops_after=31_000_000,
        rel_error=0.082,
        implementation="dense, cached",
        resident_bytes=9_605_680,
        decision="compressed",
        spectra=(falling(9, 0.2), falling(64, 0.03), falling(64, 0.09)),
    )
    embedding = LayerReport(
        name="encoder.embeddings.word_embeddings",
        kind="Embedding",
        shape=(30_522, 768),
        format="low_rank",
        ranks=(96,),
        params_before=23_440_896,
        params_after=3_003_840,
        rel_error=0.21,
        implementation="two lookups",
        resident_bytes=12_015_360,
        decision="compressed: a flat spectrum asked for a high rank",
        spectra=(falling(64, 0.01),),
    )
    layers = (
        dense(
            "features.0",
            "Conv2d",
            (64, 3, 3, 3),
            "left dense: 1,792 parameters, below the 4,096 worth a plan",
        ),
        conv,
        embedding,
        tt_linear("classifier.0", (4,) * 6, (2, 7, 8, 8, 7, 4), 4),
        tt_linear("classifier.3", (8, 8, 8, 8), (8, 8, 8, 8), 16),
        tt_linear("encoder.layer.11.intermediate.dense", (12, 16, 16), (8, 8, 12), 32),
        dense(
            "encoder.pooler",
            "Linear",
            (768, 768),
            "left dense: no factorized plan beats the dense product here",
        ),
        dense("classifier.6", "Linear", (1000, 4096), "left dense: excluded by name"),
    )
    before, after = sum(x.params_before for x in layers), sum(x.params_after for x in layers)
    curve = [
        CurvePoint(f"rank {rank}", method, 480 / rank * stretch, top - drop / rank, 0.002 + 0.01 / rank, 5)
        for method, stretch, top, drop in (("tt", 1.0, 0.934, 0.28), ("low rank", 0.45, 0.931, 0.5))
        for rank in (2, 4, 8, 16)
    ]
    healing = [{"step": 50 * k, "loss": 0.31 + 0.9 * math.exp(-k / 4) + 0.02 * math.sin(3 * k)} for k in range(24)]
    for k, row in enumerate(healing):
        if k % 4 == 0:
            row["metric"] = 0.926 - 0.06 * math.exp(-k / 5)
    return Report(
        title="VGG-16 to a twentieth",
        model="vgg16, 10 classes, 32 × 32 colour images",
        budget="20x",
        params_before=before,
        params_after=after,
        bytes_before=4 * before,
        bytes_after=4 * after + 9_000,
        flops_before=15_470_000_000,
        flops_after=2_310_000_000,
        metric_name="accuracy",
        metric_before=0.9312,
        metric_compressed=0.8731,
        metric_after=0.9268,
        layers=layers,
        latency=[
            LatencyRow(1, 48.2, 11.4, 55.0, 12.9, 2, "float32"),
            LatencyRow(16, 142.0, 96.0, 150.0, 109.0, 2, "float32"),
            LatencyRow(128, 980.0, 1130.0, 1012.0, 1190.0, 2, "float32"),
        ],
        memory=[
            MemoryRow(1, 1_204_224, 2_104_224, 4 * before, 4 * after + 9_000_000),
            MemoryRow(128, 154_140_672, 161_000_000, 4 * before, 4 * after + 9_000_000),
        ],
        healing=healing,
        curve=curve,
        notes=[
            "Two layers share one weight; it is counted once.",
            "At batch 128 the compressed model is slower than the dense one on this machine.",
        ],
        provenance={
            "command": "tensortrain compress vgg16 --budget 20x --seed 0",
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "versions": {"tensortrain": "0.1.0", "torch": "2.13.0", "python": "3.11.2"},
            "cpu": "a processor of two cores",
            "threads": 2,
            "seed": 0,
            "date": "2025-01-01T00:00:00+00:00",
            "wall_s": 812.4,
        },
    )

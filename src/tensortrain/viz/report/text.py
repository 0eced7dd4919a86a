"""Numbers and names as people read them, alike in terminal, figures and page."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

__all__ = [
    "between_text",
    "bytes_text",
    "compact",
    "count",
    "metric_change",
    "metric_text",
    "ms_text",
    "percent",
    "product",
    "ranks_text",
    "ratio",
    "shorten",
    "speed_text",
    "speed_tone",
]

MISSING = "–"
NO_DIFFERENCE = "no difference seen"


def count(n: float | None) -> str:
    """Every digit: 1,234,567."""
    return MISSING if n is None else f"{n:,.0f}"


def compact(n: float | None) -> str:
    """Three digits and a suffix: 1.23M."""
    if n is None or not math.isfinite(n):
        return MISSING
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= 0.9995 * size:  # so that 999,950 reads 1M and not 1000k
            return f"{_three_digits(n / size)}{suffix}"
    return _three_digits(n)


def bytes_text(n: float | None) -> str:
    """Bytes in decimal units: 12.3 MB."""
    if n is None or not math.isfinite(n):
        return MISSING
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(n) >= 0.9995 * size:
            return f"{_three_digits(n / size)} {unit}"
    return f"{n:,.0f} B"


def ms_text(ms: float | None) -> str:
    """Milliseconds, as microseconds or seconds where that reads better."""
    if ms is None or not math.isfinite(ms):
        return MISSING
    if ms < 0.1:
        return f"{_three_digits(1e3 * ms)} µs"
    return f"{_three_digits(ms)} ms" if ms < 1e4 else f"{_three_digits(ms / 1e3)} s"


def percent(share: float | None) -> str:
    """A fraction as per cent."""
    return MISSING if share is None or not math.isfinite(share) else f"{_three_digits(100 * share)} %"


def ratio(value: float | None) -> str:
    """A factor: 4.2×."""
    return MISSING if value is None or not math.isfinite(value) else f"{_three_digits(value)}×"


def speed_text(speedup: float, low: float | None = None, high: float | None = None) -> str:
    """A speed-up in words, with losses named as such.

    Args:
        speedup: How many times faster.
        low, high: Between which it lies, where that is known; nothing is claimed where 1 is one of them.
    """
    if not math.isfinite(speedup) or speedup <= 0:
        return MISSING
    if low is not None and high is not None and low <= 1 <= high:
        return NO_DIFFERENCE
    if 0.98 <= speedup <= 1.02:
        return "same speed"
    return f"{ratio(speedup)} faster" if speedup > 1 else f"{ratio(1 / speedup)} slower"


def between_text(low: float | None, high: float | None) -> str:
    """An interval of factors: 1.8× to 2.1×."""
    return MISSING if low is None or high is None else f"{ratio(low)} to {ratio(high)}"


def speed_tone(speedup: float, low: float | None = None, high: float | None = None) -> str:
    """``"good"`` for a gain, ``"bad"`` for a loss, ``""`` where :func:`speed_text` names neither."""
    words = speed_text(speedup, low, high)
    return "good" if words.endswith("faster") else "bad" if words.endswith("slower") else ""


def product(sizes: Sequence[int]) -> str:
    """A shape: 4096×1024."""
    return "×".join(map(str, sizes)) or MISSING


def ranks_text(ranks: Sequence[int]) -> str:
    """Ranks in order: 4·8·4."""
    return "·".join(map(str, ranks)) or MISSING


def metric_text(name: str | None, value: float | None) -> str:
    """A metric as it is usually quoted: accuracies in per cent, the rest as a number."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{100 * value:.2f} %" if is_share(name, value) else f"{value:.4g}"


def metric_change(name: str | None, before: float | None, after: float | None, noise: float | None = None) -> str:
    """The signed change of a metric, in points where it is quoted in per cent; none is claimed within its noise."""
    if before is None or after is None or not math.isfinite(after - before):
        return MISSING
    points = is_share(name, before) and is_share(name, after)
    if noise is not None and abs(after - before) <= noise:
        return f"{NO_DIFFERENCE}, chance gives ±{f'{100 * noise:.1f} points' if points else f'{noise:.2g}'}"
    return f"{_signed(100 * (after - before), '.2f')} points" if points else _signed(after - before, ".3g")


def is_share(name: str | None, value: float) -> bool:
    """Whether the metric is a fraction that people quote in per cent."""
    words = r"acc|precision|recall|f1|auc|top.?\d|share|success|bleu"
    return 0 <= value <= 1 and re.search(words, name or "", re.IGNORECASE) is not None


def shorten(name: str, width: int) -> str:
    """Shorten a long name: words before the last to their initial, numbers kept; then cut its middle out.

    Example:
        >>> shorten("encoder.layer.11.attention.self.query", 24)
        'e.l.11.a.self.query'
    """
    parts = name.split(".")
    for k, part in enumerate(parts[:-1]):
        if len(".".join(parts)) > width and not part.isdigit():
            parts[k] = part[:1]
    name = ".".join(parts)
    if len(name) <= width:
        return name
    tail = (width - 1) * 2 // 3
    return f"{name[: width - 1 - tail].rstrip('.')}…{name[-tail:].lstrip('.')}"


def _signed(value: float, form: str) -> str:
    return f"{value:+{form}}".replace("-", "−")


def _three_digits(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text

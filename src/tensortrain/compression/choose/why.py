"""Why a layer got what it got: what its neighbours on the menu would have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tensortrain.compression.choose.candidates import Candidate

__all__ = ["why_not_other"]

Form = tuple[int, float]  # parameters, and the share of the output that is predicted to be spoiled


def why_not_other(
    pick: Candidate,
    candidates: Sequence[Candidate],
    *,
    dense_params: int,
    reach: float | None,
    squared: Callable[[float], float] = lambda error: error**2,
) -> str:
    """One sentence: what the next larger form would have saved, and the next smaller one cost.

    Over all layers of a plan these prices are alike, as far as menus allow: that is why the ranks are what they are.

    Args:
        candidates: The layer's menu; the dense weight of ``dense_params`` is on it too.
        reach: What losing the layer wholly would change of the output; nothing is said where that is not known.
        squared: What part of that a form's relative error spoils.
    """
    if reach is None:
        return ""
    here = (pick.point.n_params, reach * squared(pick.point.rel_error))
    forms = [(dense_params, 0.0), *((one.point.n_params, reach * squared(one.point.rel_error)) for one in candidates)]
    return "; ".join(_told(here, forms))


def _told(here: Form, forms: Sequence[Form]) -> Iterator[str]:
    more = [form for form in forms if form[0] > here[0] and form[1] < here[1]]
    less = [form for form in forms if form[0] < here[0] and form[1] > here[1]]
    if more:
        best = max(more, key=lambda form: _price(here, form))
        yield f"{best[0] - here[0]:,} more parameters would spoil {_share(here[1] - best[1])} of the output less"
    if less:
        best = min(less, key=lambda form: _price(form, here))
        yield f"{here[0] - best[0]:,} fewer {_share(best[1] - here[1])} more"


def _price(small: Form, large: Form) -> float:
    """Of a parameter, in output saved."""
    return (small[1] - large[1]) / (large[0] - small[0])


def _share(loss: float) -> str:
    return f"{100 * loss:.2g} %"

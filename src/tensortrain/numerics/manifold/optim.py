r"""Optimizers that move trains on their manifold and all other parameters as torch does.

From the gradients of cores to the Riemannian gradient. Let ``G`` be the cores of a parameter and ``h_k`` the
gradient of the loss by ``G_k``, let ``X`` be their tensor and ``Z`` the gradient by ``X``, which is never formed. The
left sweep gives ``G_1 .. G_k = U_{<=k} R_k`` and the right one ``X = U_{<=k} S_k V_{>k}``, hence
``G_{k+1} .. G_d = R_k^{-1} S_k V_{>k}``. By the chain rule

    h_k = (U_{<k} R_{k-1})^H Z (R_k^{-1} S_k V_{>k})^H = R_{k-1}^H (U_{<k}^H Z V_{>k}^H) S_k^H R_k^{-H},

so the components that the projector needs are, exactly,

    U_{<k}^H Z V_{>k}^H = R_{k-1}^{-H} h_k R_k^H S_k^{-H},

two triangular solves for each core; then the gauge projection. Rounding errors of ``h_k`` grow by the condition of
``S_k``, the ratio of the largest to the smallest singular value at that bond. The cores are written back
right-orthogonal, where ``R_k = S_k``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tensortrain.cores.scaling import times_pow2
from tensortrain.cores.tolerance import compute_dtype
from tensortrain.errors import KindError, NonFiniteError, RankError
from tensortrain.numerics.manifold.components import zero_deltas
from tensortrain.numerics.manifold.parameter import as_train, is_train, trains_of
from tensortrain.numerics.manifold.point import Point, embed_cores
from tensortrain.numerics.manifold.projection import project
from tensortrain.numerics.manifold.retraction import retract
from tensortrain.numerics.manifold.tangent import TangentVector, gauged

__all__ = ["RiemannianAdam", "RiemannianSGD", "gradient_from_cores"]

Group = dict[str, Any]


class _RiemannianOptimizer(Optimizer):
    """Walks over the groups: one for each train, with ``"train": True``, and those of the other parameters."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        for name, value in defaults.items():
            _check_option(name, value)
        super().__init__(_entries_of(params, type(self).__name__), defaults)
        _check_has_train(self.param_groups, type(self).__name__)

    def add_param_group(self, param_group: Group) -> None:
        """Add modules or parameters with options of their own; see ``params`` of the class.

        Raises:
            KindError: ``"train"`` is set and the parameters are not the cores of one train.
        """
        for group in _split(param_group):
            super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient.

        Args:
            closure: Evaluates the model anew and returns the loss.

        Returns:
            The loss, where there is a closure.

        Raises:
            KindError: Some cores of a train are frozen while others have gradients.
            NonFiniteError: A train holds NaN or Inf.
            RankError: A train has lower ranks than its cores, where the manifold has no tangent space.

        Cost: O(d n r^3) flops for each train, in float64 or complex128, and a host sync or two.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # All that can be refused is refused before the first parameter moves.
        trains = [(group, _gradient_of(group)) for group in self.param_groups if group["train"]]
        for group, gradient in trains:
            if gradient is not None:
                self._step_train(group, gradient)
        for group in self.param_groups:
            for parameter in () if group["train"] else group["params"]:
                if parameter.grad is not None:
                    self._step_plain(parameter, group)
        return loss

    def _step_train(self, group: Group, gradient: TangentVector) -> None:
        direction, length = self._train_direction(gradient, group)
        moved = retract(gradient.base, direction, -length)
        for core, value in zip(group["params"], moved.cores, strict=True):
            core.copy_(value)

    def _train_direction(self, gradient: TangentVector, group: Group) -> tuple[TangentVector, float]:
        """The vector to step against, and how far; updates the state of the group."""
        raise NotImplementedError

    def _step_plain(self, parameter: Tensor, group: Group) -> None:
        raise NotImplementedError

    # -- a tangent vector in the state ---------------------------------------------------------------
    # It is kept with the bases it was made in, so that it stays the same tensor whatever happens to the cores, and in
    # the dtype of the parameters, to which torch casts a state that is loaded.

    def _keep(self, v: TangentVector, cores: Sequence[Tensor]) -> None:
        parts = {"delta": v.deltas, "left": (*v.point.left, None), "right": (None, *v.point.right)}
        for name, tensors in parts.items():
            for core, tensor in zip(cores, tensors, strict=True):
                if tensor is not None:
                    self.state[core][name] = tensor.to(core.dtype, copy=True)

    def _kept(self, cores: Sequence[Tensor], point: Point) -> TangentVector:
        """The kept vector, transported to a point; the zero vector before the first step."""
        if "delta" not in self.state[cores[0]]:
            return TangentVector(point, tuple(zero_deltas(point)))
        states = [self.state[core] for core in cores]
        dtype = point.base.dtype
        left = [state["left"].to(dtype) for state in states[:-1]]
        right = [state["right"].to(dtype) for state in states[1:]]
        deltas = [state["delta"].to(dtype) for state in states]
        return project(point.base._like(embed_cores(left, right, deltas)), at=point)


class RiemannianSGD(_RiemannianOptimizer):
    r"""Stochastic gradient descent on the manifold of trains of fixed ranks.

    For a train ``X`` with Riemannian gradient ``g``: ``m <- momentum T(m) + g + weight_decay X`` and
    ``X <- R(X, -lr m)``, with the retraction ``R`` of ``retract`` and the transport ``T`` of ``transport``. The path
    of ``X`` does not depend on the cores that hold it. All other parameters are stepped as by ``torch.optim.SGD``.

    Args:
        params: A module: the cores of each train in it (any module that keeps one in a ``ParameterList`` named
            ``cores``, as the layers of ``tensortrain.nn`` and ``TTParameter`` do) become one group, all other
            parameters another. Or an iterable of modules and parameters, or of dicts with such under ``"params"``
            and options of their own; ``"train": True`` in a dict says that its parameters are the cores of one train.
        lr: Step length.
        momentum: In ``[0, 1)``.
        weight_decay: Weight of ``||X||^2 / 2`` in the loss.

    Raises:
        KindError: There is no train among the parameters.
        RankError: An option lies outside its range.

    Accuracy: ``clip_grad_norm_`` acts on gradients of cores, and so depends on the gauge; lower ``lr`` instead.
    Source: Novikov et al., arXiv:1605.03795; Steinlechner, SIAM J. Sci. Comput. 38(5), 2016.

    Example:
        >>> import tensortrain as tt
        >>> w, z = tt.manifold.TTParameter(tt.randn((4, 5, 6), 2)), tt.randn((4, 5, 6), 2)
        >>> optimizer = tt.manifold.RiemannianSGD(w, lr=0.5)
        >>> loss = (w.value - z).norm() ** 2 / 2
        >>> loss.backward()
        >>> _ = optimizer.step()
    """

    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _train_direction(self, gradient: TangentVector, group: Group) -> tuple[TangentVector, float]:
        if group["momentum"]:
            gradient = group["momentum"] * self._kept(group["params"], gradient.point) + gradient
            self._keep(gradient, group["params"])
        return gradient, float(group["lr"])

    def _step_plain(self, parameter: Tensor, group: Group) -> None:
        step = parameter.grad
        assert step is not None
        if group["weight_decay"]:
            step = step.add(parameter, alpha=group["weight_decay"])
        if group["momentum"]:
            state = self.state[parameter]
            if "momentum_buffer" in state:
                state["momentum_buffer"].mul_(group["momentum"]).add_(step)
            else:
                state["momentum_buffer"] = step.clone()
            step = state["momentum_buffer"]
        parameter.add_(step, alpha=-float(group["lr"]))


class RiemannianAdam(_RiemannianOptimizer):
    r"""Adam on the manifold of trains of fixed ranks.

    The first moment of a train is a tangent vector that is transported from point to point. Coordinates mean nothing
    on a manifold, so the second moment is one number for each train, the mean square of ``g`` over the dimensions of
    the tangent space: ``v <- beta2 v + (1 - beta2) ||g||^2 / dim``. All other parameters are stepped as by
    ``torch.optim.Adam``.

    Args:
        params: As for ``RiemannianSGD``.
        lr: Step length: about what every coordinate of the tangent space moves.
        betas: Decay of the first and of the second moment, in ``[0, 1)``.
        eps: Added to the root of the second moment.
        weight_decay: Weight of ``||X||^2 / 2`` in the loss, as in Adam; not decoupled as in AdamW.

    Raises:
        KindError: There is no train among the parameters.
        RankError: An option lies outside its range.

    Source: Becigneul, Ganea, ICLR 2019, arXiv:1810.00760, for a product of manifolds.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _train_direction(self, gradient: TangentVector, group: Group) -> tuple[TangentVector, float]:
        cores, (beta1, beta2) = group["params"], group["betas"]
        state = self.state[cores[0]]
        first = beta1 * self._kept(cores, gradient.point) + (1 - beta1) * gradient
        self._keep(first, cores)
        square = gradient.norm().square() / gradient.point.dimension
        before = state.get("square", torch.zeros_like(square)).to(square.dtype)
        # in the dtype of the parameters, as all of the state
        state["square"] = (beta2 * before + (1 - beta2) * square).to(cores[0].real.dtype)
        state["step"] = state.get("step", torch.zeros(())) + 1
        n_steps = float(state["step"])
        root = (state["square"].to(square.dtype) / (1 - beta2**n_steps)).sqrt()
        return first / (root + group["eps"]), float(group["lr"]) / (1 - beta1**n_steps)

    def _step_plain(self, parameter: Tensor, group: Group) -> None:
        grad, (beta1, beta2) = parameter.grad, group["betas"]
        assert grad is not None
        if group["weight_decay"]:
            grad = grad.add(parameter, alpha=group["weight_decay"])
        state = self.state[parameter]
        if "step" not in state:
            state.update(step=torch.zeros(()), first=torch.zeros_like(parameter), second=torch.zeros_like(parameter))
        state["step"] += 1
        first, second = state["first"], state["second"]
        if parameter.is_complex():  # real and imaginary parts are two parameters, as in torch
            parameter, grad, first, second = map(torch.view_as_real, (parameter, grad, first, second))
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        n_steps = float(state["step"])
        root = (second.sqrt() / (1 - beta2**n_steps) ** 0.5).add_(group["eps"])
        parameter.addcdiv_(first, root, value=-float(group["lr"]) / (1 - beta1**n_steps))


def gradient_from_cores(point: Point, grads: Sequence[Tensor]) -> TangentVector:
    """Riemannian gradient from the gradients of the very cores that ``point`` was made of; see the module's text.

    Args:
        point: Of order d.
        grads: Shaped as ``point.base.cores``.

    Cost: O(d n r^3) flops.
    """
    components = []
    for k, grad in enumerate(grads):
        h = grad.reshape(grad.shape[0], -1, grad.shape[-1])
        exponent = torch.zeros_like(point.exponent)
        if k > 0:
            carry, power = point.carries[k - 1]
            h = torch.linalg.solve_triangular(carry.mH, h.flatten(1), upper=False).reshape(h.shape)
            exponent = exponent - power
        if k < point.order - 1:
            carry, power = point.carries[k]
            h = torch.linalg.solve_triangular(point.bonds[k].mH, h @ carry.mH, upper=True, left=False)
            exponent = exponent + power - point.exponent
        components.append(times_pow2(h, exponent))
    return gauged(point, components)


def _gradient_of(group: Group) -> TangentVector | None:
    """Riemannian gradient of a train, weight decay included, in float64 or complex128; ``None`` where it has none."""
    cores = group["params"]
    if all(core.grad is None for core in cores):
        return None
    _check_trainable(cores)
    wide = compute_dtype(cores[0].dtype)
    point = Point.of(as_train([core.detach().to(wide) for core in cores]))
    grads = [torch.zeros_like(core) if core.grad is None else core.grad for core in cores]
    gradient = gradient_from_cores(point, [grad.to(wide) for grad in grads])
    if group["weight_decay"]:
        gradient = gradient + group["weight_decay"] * _position(point)
    if not bool(torch.isfinite(gradient.norm())):
        raise NonFiniteError(
            f"gradients must be finite: those of a train with cores {[tuple(core.shape) for core in cores]} have NaN "
            "or Inf, expected none. Lower the step size, or skip this batch."
        )
    return gradient


def _position(point: Point) -> TangentVector:
    """The point itself, which is tangent to the manifold."""
    deltas = zero_deltas(point)
    deltas[-1] = times_pow2(point.last, point.exponent)
    return TangentVector(point, tuple(deltas))


# -- which parameters are trains ----------------------------------------------------------------------


def _entries_of(params: Any, name: str) -> list[Group]:
    if isinstance(params, Tensor) or not (isinstance(params, nn.Module) or hasattr(params, "__iter__")):
        raise KindError(
            f"{name} takes modules or parameters: params has {type(params).__name__}, expected a module, or an "
            "iterable of modules, parameters or dicts. Pass the model."
        )
    if isinstance(params, nn.Module):
        return [{"params": params}]
    entries = list(params)
    return entries if entries and isinstance(entries[0], dict) else [{"params": entries}]


def _check_has_train(groups: Sequence[Group], name: str) -> None:
    if not any(group["train"] for group in groups):
        raise KindError(
            f"{name} needs a train to move on its manifold: params has none, expected a module with cores. Pass the "
            "module instead of its parameters(), or the cores of one train as {'params': cores, 'train': True}."
        )


def _split(entry: Group) -> list[Group]:
    """One group for each train of an entry, and one for all else."""
    options = {key: value for key, value in entry.items() if key not in ("params", "train")}
    items = entry["params"]
    items = [items] if isinstance(items, (nn.Module, Tensor)) else list(items)
    if entry.get("train"):
        _check_one_train(items)
        return [{**options, "train": True, "params": items}]
    seen: set[int] = set()
    trains = [cores for item in items if isinstance(item, nn.Module) for cores in trains_of(item)]
    trains = [cores for cores in trains if _are_new(cores, seen)]
    parameters = (p for item in items for p in (item.parameters() if isinstance(item, nn.Module) else [item]))
    plain = [parameter for parameter in parameters if _are_new([parameter], seen)]
    groups: list[Group] = [{**options, "train": True, "params": cores} for cores in trains]
    return [*groups, {**options, "train": False, "params": plain}] if plain or not trains else groups


def _are_new(parameters: Sequence[Tensor], seen: set[int]) -> bool:
    """Whether none of them was met before; notes them all."""
    ids = {id(parameter) for parameter in parameters}
    fresh = not ids & seen
    seen |= ids
    return fresh


def _check_one_train(items: Sequence[Any]) -> None:
    if not is_train(items):
        shapes = [tuple(getattr(item, "shape", ())) for item in items]
        raise KindError(
            f"a group with 'train' must be the cores of one train: params has shapes {shapes}, expected parameters "
            "(r, n, s) or (r, i, j, s) whose ranks match and are 1 at both ends. Leave 'train' out."
        )


def _check_trainable(cores: Sequence[Tensor]) -> None:
    frozen = [k for k, core in enumerate(cores) if not core.requires_grad]
    if frozen:
        raise KindError(
            f"a train moves as a whole: cores {frozen} of {len(cores)} have requires_grad False, expected all True. "
            "Freeze all of them or none, or step these cores with torch.optim."
        )


def _check_option(name: str, value: Any) -> None:
    numbers = value if isinstance(value, tuple) else (value,)
    below_one = name in ("momentum", "betas")
    if not all(v >= 0 and (v < 1 or not below_one) for v in numbers):
        most = "in [0, 1)" if below_one else "of at least 0"
        raise RankError(f"{name} must be {most}: found {value}, expected a number {most}. Change it.")

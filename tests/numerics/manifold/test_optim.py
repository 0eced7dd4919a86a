import copy

import pytest
import torch
from torch import nn

import tensortrain as tt
from tensortrain.errors import KindError, NonFiniteError, RankError
from tensortrain.manifold import Point, RiemannianAdam, RiemannianSGD, TTParameter, project, retract, transport
from tensortrain.numerics.manifold.optim import gradient_from_cores
from tensortrain.testing import rel_error

OPTIMIZERS = {
    "SGD": lambda params, **kw: RiemannianSGD(params, lr=0.05, **kw),
    "momentum": lambda params, **kw: RiemannianSGD(params, lr=0.05, momentum=0.9, weight_decay=0.01, **kw),
    "Adam": lambda params, **kw: RiemannianAdam(params, lr=0.02, weight_decay=0.01, **kw),
}


@pytest.fixture(params=OPTIMIZERS)
def optimizer_of(request):
    return OPTIMIZERS[request.param]


def quadratic(target):
    return lambda x: ((x.to_dense() - target).abs() ** 2).sum() / 2


def run(parameter, optimizer, f, n_steps):
    for _ in range(n_steps):
        optimizer.zero_grad()
        f(parameter.value).backward()
        optimizer.step()
    return parameter.value.detach()


# -- the step is what the geometry says --------------------------------------------------------------


def test_gradient_from_cores_is_the_riemannian_gradient(make, regauge):
    x = make()
    target = torch.randn(x.shape, dtype=x.dtype)
    exact = project(x.to_dense() - target, at=x)
    for other, tol in (
        (x, 1e-11),
        (x.orthogonalize(0), 1e-11),
        (x.orthogonalize(x.order - 1), 1e-11),
        (regauge(x), 1e-9),
    ):
        cores = [core.detach().requires_grad_() for core in other.cores]
        grads = torch.autograd.grad(quadratic(target)(type(x)(cores)), cores)
        found = gradient_from_cores(Point.of(other), grads)
        assert rel_error(found.to_dense(), exact.to_dense()) <= tol


def test_gradient_from_cores_of_long_trains(generator):
    unit = tt.randn((2,) * 600, 2, generator=generator).normalize()
    x = tt.TensorTrain([core * (8.0 if k < 300 else 0.125) for k, core in enumerate(unit.cores)])  # 1e270 in between
    cores = [core.detach().requires_grad_() for core in x.cores]
    grads = torch.autograd.grad(tt.TensorTrain(cores).log_norm(), cores)
    found = gradient_from_cores(Point.of(x), grads)
    assert rel_error(found.deltas[-1], project(x, at=x).deltas[-1]) <= 1e-9
    assert max(float(delta.norm()) for delta in found.deltas[:-1]) <= 1e-9


def test_sgd_steps_against_the_projected_gradient(make):
    x, lr, decay = make(), 0.1, 0.3
    target = torch.randn(x.shape, dtype=x.dtype)
    parameter = TTParameter(x)
    found = run(parameter, RiemannianSGD(parameter, lr=lr, weight_decay=decay), quadratic(target), 1)
    gradient = project(x.to_dense() - target + decay * x.to_dense(), at=x)
    assert rel_error(found.to_dense(), retract(x, gradient, -lr).to_dense()) <= 1e-11
    assert found.ranks == x.ranks


def test_momentum_is_transported(make):
    x, lr, momentum = make(), 0.1, 0.8
    target = torch.randn(x.shape, dtype=x.dtype)
    parameter = TTParameter(x)
    found = run(parameter, RiemannianSGD(parameter, lr=lr, momentum=momentum), quadratic(target), 3)
    v = 0 * project(x, at=x)
    for _ in range(3):
        v = momentum * transport(v, to=x) + project(x.to_dense() - target, at=x)
        x = retract(v.base, v, -lr)
    assert rel_error(found.to_dense(), x.to_dense()) <= 1e-10


def test_adam_scales_by_one_number_for_each_train(make):
    x, lr, (beta1, beta2) = make(), 0.1, (0.9, 0.99)
    target = torch.randn(x.shape, dtype=x.dtype)
    parameter = TTParameter(x)
    optimizer = RiemannianAdam(parameter, lr=lr, betas=(beta1, beta2))
    found = run(parameter, optimizer, quadratic(target), 3)
    m, square = 0 * project(x, at=x), 0.0
    for n in range(1, 4):
        g = project(x.to_dense() - target, at=x)
        m = beta1 * transport(m, to=x) + (1 - beta1) * g
        square = beta2 * square + (1 - beta2) * g.norm() ** 2 / g.point.dimension
        m_hat, square_hat = m / (1 - beta1**n), square / (1 - beta2**n)
        x = retract(m.base, m_hat / (square_hat.sqrt() + 1e-8), -lr)
    assert rel_error(found.to_dense(), x.to_dense()) <= 1e-10


def test_path_does_not_depend_on_the_gauge(make, regauge, optimizer_of):
    x = make()
    target = torch.randn(x.shape, dtype=x.dtype)
    ends = []
    for start in (x, regauge(x)):
        parameter = TTParameter(start)
        optimizer = optimizer_of(parameter)
        run(parameter, optimizer, quadratic(target), 2)
        if start is not x:  # and in the middle of a run
            parameter.load_state_dict(TTParameter(regauge(parameter.value.detach())).state_dict())
        ends.append(run(parameter, optimizer, quadratic(target), 2))
    assert rel_error(ends[1].to_dense(), ends[0].to_dense()) <= 1e-8


# -- it optimizes ------------------------------------------------------------------------------------


def predictions(w, signs):
    """``sum_i w[i] prod_k x_k^i_k`` for rows of signs: a polynomial in which no feature has a square."""
    state = signs.new_ones((len(signs), 1))
    for k, core in enumerate(w.cores):
        state = state @ core[:, 0] + signs[:, k, None] * (state @ core[:, 1])
    return state[:, 0]


def test_sgd_recovers_a_teacher_from_samples():
    generator = torch.Generator().manual_seed(0)
    d, n_samples, rank = 10, 3000, 4
    teacher = tt.randn((2,) * d, rank, generator=generator).normalize()
    signs = torch.randint(0, 2, (n_samples, d), generator=generator) * 2.0 - 1.0
    y = predictions(teacher, signs)
    student = TTParameter(0.1 * tt.randn((2,) * d, rank, generator=generator).normalize())
    optimizer = RiemannianSGD(student, lr=0.3, momentum=0.5)

    def closure():
        optimizer.zero_grad()
        loss = (predictions(student.value, signs) - y).square().mean() / 2
        loss.backward()
        return loss

    for _ in range(120):
        loss = optimizer.step(closure)
    assert float((2 * loss.detach()).sqrt()) < 1e-8
    assert float((student.value.detach() - teacher).norm()) < 1e-7


def test_both_descend_on_layers(optimizer_of):
    torch.manual_seed(0)
    model = nn.Sequential(tt.nn.Linear(12, 16, rank=3), nn.Tanh(), nn.Linear(16, 4))
    x, y = torch.randn(64, 12), torch.randn(64, 4)
    optimizer = optimizer_of(model)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    with torch.no_grad():  # the cached weight of the layer follows the step
        torch.testing.assert_close(model(x), model[2](torch.tanh(model[0].to_dense()(x))))


def test_step_of_a_layer_is_that_of_its_weight():
    layer = tt.nn.Linear(12, 20, rank=3, bias=False)
    x, y = torch.randn(50, 12), torch.randn(50, 20)
    before = tt.TTMatrix([core.detach().clone() for core in layer.cores])
    ((x @ before.to_dense().T - y).square().sum() / 2).item()
    gradient = (x @ before.to_dense().T - y).T @ x
    ((layer(x) - y).square().sum() / 2).backward()
    RiemannianSGD(layer, lr=1e-3).step()
    expected = retract(before, project(gradient, at=before), -1e-3)
    assert rel_error(layer.weight, expected.to_dense()) <= 1e-11


# -- manners -----------------------------------------------------------------------------------------


def test_other_parameters_step_as_in_torch():
    for dtype in (torch.float64, torch.complex128):
        for mine, theirs, options in (
            (RiemannianSGD, torch.optim.SGD, {"lr": 0.1}),
            (RiemannianSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
            (RiemannianAdam, torch.optim.Adam, {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.01}),
        ):
            plain = [nn.Parameter(torch.randn(3, 4, dtype=dtype)), nn.Parameter(torch.randn(5, dtype=dtype))]
            twins = [nn.Parameter(p.detach().clone()) for p in plain]
            unused = TTParameter(tt.randn((3, 4), 2))
            optimizers = [mine([unused, *plain], **options), theirs(twins, foreach=False, **options)]
            for _ in range(4):
                for parameters, optimizer in zip((plain, twins), optimizers, strict=True):
                    optimizer.zero_grad()
                    sum((p - 1).abs().square().sum() for p in parameters).backward()
                    optimizer.step()
            for p, twin in zip(plain, twins, strict=True):
                assert torch.allclose(p, twin, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex64, torch.bfloat16])
def test_resumes_to_the_same_bits(dtype, optimizer_of):
    def new():
        torch.manual_seed(0)
        return nn.ModuleDict({"w": TTParameter(tt.randn((3, 4, 5), 2, dtype=dtype)), "b": nn.Linear(5, 1)})

    def steps(model, optimizer, n):
        for _ in range(n):
            optimizer.zero_grad()
            dense = model["w"].value.to_dense()
            ((dense - 0.1).abs().square().sum() + model["b"](torch.ones(5)).square().sum()).backward()
            optimizer.step()

    whole = new()
    optimizer = optimizer_of(whole)
    steps(whole, optimizer, 3)
    model, saved = copy.deepcopy(whole.state_dict()), copy.deepcopy(optimizer.state_dict())
    steps(whole, optimizer, 3)
    resumed = new()
    resumed.load_state_dict(model)
    again = optimizer_of(resumed)
    again.load_state_dict(saved)
    steps(resumed, again, 3)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
        assert torch.isfinite(value).all()
        assert not torch.equal(value, model[name])


def test_groups_and_schedulers():
    model = nn.Sequential(tt.nn.Linear(12, 20, rank=2), nn.Linear(20, 3))
    other = TTParameter(tt.randn((3, 4), 2))
    optimizer = RiemannianSGD([{"params": model}, {"params": [other], "lr": 0.5}], lr=0.1)
    assert [(group["train"], group["lr"], len(group["params"])) for group in optimizer.param_groups] == [
        (True, 0.1, len(model[0].cores)),
        (False, 0.1, 3),
        (True, 0.5, 2),
    ]
    extra = tt.randn((4, 5), 2)
    cores = [nn.Parameter(core) for core in extra.cores]
    optimizer.add_param_group({"params": cores, "train": True, "momentum": 0.5})
    assert optimizer.param_groups[-1]["train"]
    assert optimizer.param_groups[-1]["lr"] == 0.1
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[2]["lr"] == pytest.approx(0.05)


def test_what_has_no_gradient_stays(optimizer_of):
    model = nn.Sequential(tt.nn.Linear(12, 20, rank=2), tt.nn.Linear(20, 12, rank=2))
    before = copy.deepcopy(model.state_dict())
    for p in model[0].parameters():
        p.requires_grad_(False)
    optimizer = optimizer_of(model)
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(torch.randn(3, 12)).sum().backward()
    optimizer.step()
    assert torch.equal(model[0].cores[0], before["0.cores.0"])
    assert not torch.equal(model[1].cores[0], before["1.cores.0"])


def test_refusals_come_before_the_first_change():
    def failing(spoil):
        good, bad = (TTParameter(tt.randn((3, 4, 5), 2)) for _ in range(2))
        optimizer = RiemannianSGD(nn.ModuleList([good, bad]), lr=0.1, momentum=0.5)
        spoil(bad)
        (good.value.norm() + bad.value.norm()).backward()
        before = good.value.to_dense().detach().clone()
        return good, before, optimizer

    def deficient(parameter):
        with torch.no_grad():
            parameter.cores[0][:, :, 1] = parameter.cores[0][:, :, 0]

    def frozen(parameter):
        parameter.cores[1].requires_grad_(False)

    def infinite(parameter):
        parameter.cores[1].register_hook(lambda grad: grad * float("inf"))

    for spoil, error, message in (
        (deficient, RankError, "bond 1 has rank 2"),
        (frozen, KindError, r"cores \[1\] of 3 have requires_grad False"),
        (infinite, NonFiniteError, "gradients must be finite"),
    ):
        good, before, optimizer = failing(spoil)
        with pytest.raises(error, match=message):
            optimizer.step()
        assert torch.equal(good.value.to_dense(), before)
        assert not optimizer.state


def test_bad_arguments():
    layer = tt.nn.Linear(12, 20, rank=2)
    with pytest.raises(KindError, match="instead of its parameters"):
        RiemannianSGD(layer.parameters())
    with pytest.raises(KindError, match="needs a train"):
        RiemannianAdam(nn.Linear(3, 4))
    with pytest.raises(KindError, match="params has Parameter"):
        RiemannianSGD(layer.bias)
    with pytest.raises(KindError, match="cores of one train"):
        RiemannianSGD([{"params": [layer.bias], "train": True}])
    with pytest.raises(RankError, match="momentum must be in"):
        RiemannianSGD(layer, momentum=1.0)
    with pytest.raises(RankError, match="betas"):
        RiemannianAdam(layer, betas=(0.9, 1.0))
    with pytest.raises(RankError, match="lr must be of at least 0"):
        RiemannianSGD(layer, lr=-1.0)

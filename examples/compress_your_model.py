"""The shortest way: train a small network on scikit-learn's digits, make it 8 times smaller, look at the report."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tensortrain as tt
from tensortrain.compression import cross_entropy_loss, evaluate_accuracy, fit
from tensortrain.viz.report.html import write_html


def main(out: str = "runs/digits.html") -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=64, shuffle=True)
    test = DataLoader(TensorDataset(x[1400:], y[1400:]), batch_size=200)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    fit(model, train, loss=cross_entropy_loss(), epochs=15, lr=3e-3)

    result = tt.compress(
        model,
        budget="8x",
        data=train,
        heal={"epochs": 10, "lr": 3e-3},
        evaluate=lambda net: evaluate_accuracy(net, test),
        metric_name="accuracy",
        name="digits MLP",
    )
    print(result.plan)
    report = result.report
    print(
        f"accuracy {report.metric_before:.4f} -> {report.metric_compressed:.4f} -> {report.metric_after:.4f} "
        f"with {report.compression:.1f}x fewer parameters; report in {write_html(report, out)}"
    )


if __name__ == "__main__":
    main()

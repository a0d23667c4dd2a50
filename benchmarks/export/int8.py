"""int8 of a partly baked network against BN's, on the digits of scikit-learn: QDQ of onnxruntime, calibrated."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quant_pre_process, quantize_static
from sklearn.datasets import load_digits
from torch import Tensor, nn

import normswap
from normswap.surgery.importance import gated_modules

SEED, EPOCHS, BATCH, WIDTH, CALIBRATION = 0, 15, 32, 32, 256


def measure_int8() -> dict[str, Any]:
    """Return test accuracies in float32 and int8 of a BN network and of the converted one, and its sites by kind."""
    torch.manual_seed(SEED)
    train, test = _digits()
    bn = _network()
    _train(bn, bn.parameters(), train, EPOCHS)
    sn = normswap.convert(bn.eval(), train[0][:8]).model
    layers = list(gated_modules(sn).values())
    fixed = {id(gate) for layer in layers[::2] for gate in (layer.mean_weight, layer.var_weight)}
    with torch.no_grad():  # half of the sites leave BN, then the network is trained with them
        for layer in layers[1::2]:
            for gate in (layer.mean_weight, layer.var_weight):
                gate.copy_(torch.tensor([0.2, 0.3, 0.5]))
    _train(sn, [p for p in sn.parameters() if id(p) not in fixed], train, 5)
    counts = {"bn": sum(layer.is_at("bn") for layer in layers), "sites": len(layers)}
    return {"sites": counts, "BN": _accuracies(bn, train, test), "SN": _accuracies(sn, train, test)}


def _network() -> nn.Sequential:
    blocks = []
    for index, channels in enumerate((1, WIDTH, WIDTH, WIDTH)):
        blocks += [nn.Conv2d(channels, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()]
        blocks += [nn.MaxPool2d(2)] * (index == 1)
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10))


def _digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images (N, 1, 8, 8) and labels for training and for the test."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images))
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 8 - 1
    y = torch.tensor(labels)[order]
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


def _train(model: nn.Module, parameters: Any, data: tuple[Tensor, Tensor], epochs: int) -> None:
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(data[0])).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data[0][index]), data[1][index]).backward()
            optimizer.step()
    model.eval()


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    """The first images of the training set, one batch at a time."""

    def __init__(self, name: str, images: Tensor) -> None:
        self._batches: Iterator[dict[str, Any]] = iter([{name: part.numpy()} for part in images.split(BATCH)])

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch, None at the end."""
        return next(self._batches, None)


def _accuracies(model: nn.Module, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        plain, prepared, quantized = (Path(folder, name) for name in ("a.onnx", "b.onnx", "c.onnx"))
        normswap.export(model, plain, example_inputs=train[0][:8])
        quant_pre_process(plain, prepared)
        name = onnxruntime.InferenceSession(str(plain)).get_inputs()[0].name
        quantize_static(
            prepared,
            quantized,
            _Batches(name, train[0][:CALIBRATION]),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv", "Gemm"],
            per_channel=True,
        )
        return {"float32": _accuracy(plain, test), "int8": _accuracy(quantized, test)}


def _accuracy(path: Path, test: tuple[Tensor, Tensor]) -> float:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: test[0].numpy()})
    return float(numpy.mean(logits.argmax(1) == test[1].numpy()))

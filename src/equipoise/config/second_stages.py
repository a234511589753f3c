"""Second stages of decoupled training: what they change in the first stage's recipe. As published for ImageNet-LT: crt
and lws by Kang et al. (ICLR 2020), los by Sun et al. (ICLR 2025); the rate is the first stage's where none is named."""

from typing import Any

UNTRAINED = ("tau-norm", "ncm")  # computed; the prior of their logits is taken for that of balanced draws
ALL_STAGES: dict[str, Any] = {
    "method": "ce", "data.sampler": "instance", "loss.label_smoothing": 0.0, "optim.schedule": "cosine",
    "optim.warmup_epochs": 0, "optim.sam": 0.0, "optim.ema": 0.0, "views.mix": "none",
    "model.tune": "frozen", "model.classifier_start": "class-means", "model.anchor": 0.0,
}  # fmt: skip
_BALANCED: dict[str, Any] = {"data.sampler": "class-balanced"}
SECOND_STAGES: dict[str, dict[str, Any]] = {
    "crt": {**_BALANCED, "epochs": 10},
    "lws": {**_BALANCED, "epochs": 5, "model.classifier_start": "scaled"},
    "tau-norm": {**_BALANCED, "epochs": 1, "model.classifier_start": "scaled"},
    "ncm": {**_BALANCED, "epochs": 1, "model.classifier": "cosine"},
    "los": {"epochs": 20, "optim.lr": 5e-4, "loss.label_smoothing": 0.98},
    "balanced": {"epochs": 10, "method": "balanced-softmax", "loss.tau": 1.0},
}

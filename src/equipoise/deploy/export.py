"""A classifier becomes one file that runs without this package. It is checked against the model before it is written.

Both forms take any number of uint8 RGB images `[batch, 3, S, S]` and give scores `[batch, C]`, whose softmax is the
probability under a uniform class prior (see `predict.py`). ONNX files also give likenesses `[batch]`, where the model
tells images of none of the classes. The file also says how a picture becomes such an image.

Shapes: N images, C classes, S side of the view.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise import __version__
from equipoise.base.errors import UserError, reason
from equipoise.base.files import atomic_file
from equipoise.data.decode import DECODING
from equipoise.deploy.predict import Classifier
from equipoise.views.views import short_side

NOTES = "equipoise.json"  # the file in a .pt2 that holds what an ONNX file has in its metadata
_ANY_NUMBER = ({0: torch.export.Dim("batch")},)

Outputs = tuple[npt.NDArray[np.float32], ...]  # scores [N, C] and, where there are some, likenesses [N]
Scorer = Callable[[npt.NDArray[np.uint8]], Outputs]  # of uint8 images [N, 3, S, S]


class _Exported(nn.Module):
    """What an ONNX file computes: see above."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.encode, self.calibrated, self.known = classifier.model.encode, classifier.calibrated, classifier.known
        self.eval()

    def forward(self, images_B3SS: Tensor) -> tuple[Tensor, ...]:
        hidden_BF = self.encode(images_B3SS)
        return self.calibrated(hidden_BF), *([self.known(hidden_BF)] if self.known else [])


def export_file(classifier: Classifier, form: Literal["onnx", "torch-export"], out: Path) -> str:
    """Write the classifier to `out` and return a line about the check. Raises UserError, and writes nothing, where the
    scores differ from the model's, or the form cannot be had: its packages are missing, or torch cannot write it."""
    views_N3SS = made_up_images(classifier.checkpoint.recipe.views.size)
    content, run = (_onnx if form == "onnx" else _torch_export)(classifier, views_N3SS[:2])
    said = check(classifier, views_N3SS, run)
    with atomic_file(out) as file:
        file.write(content)
    return said


def _onnx(classifier: Classifier, example_N3SS: torch.Tensor) -> tuple[bytes, Scorer]:
    """The content of an ONNX file, and what it computes."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # pyright: ignore[reportUnusedImport] torch's exporter needs it
    except ImportError as error:
        raise UserError(f"the package {error.name} is missing; pip install onnx onnxscript onnxruntime") from None
    weights = sum(tensor.nbytes for tensor in classifier.calibrated.state_dict().values())
    if weights > 2**31 - 2**20:  # the rest of the file
        raise UserError("the network has more than 2 GB, which is all that an ONNX file holds; take --to torch-export")
    try:
        outputs = ["scores", "likenesses"][: 2 if classifier.known else 1]
        names: dict[str, Any] = {"input_names": ["images"], "output_names": outputs, "dynamic_shapes": _ANY_NUMBER}
        program = torch.onnx.export(_Exported(classifier), (example_N3SS,), dynamo=True, verbose=False, **names)
    except torch.onnx.OnnxExporterError as error:
        why = reason(error, library=True, otherwise="its exporter does not say why")
        raise UserError(f"torch cannot write this encoder as ONNX ({why}); take --to torch-export") from None
    assert program is not None
    model = program.model_proto
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        del node.metadata_props[:]  # stack traces with the paths of this machine
    notes = _notes(classifier)
    if known := classifier.known:
        said = "a picture whose likeness is below likeness_threshold shows none of the classes"
        notes |= {"none_of_these": said, "likeness_threshold": known.threshold}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in notes.items()}
    onnx.helper.set_model_props(model, texts)
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda images: tuple(map(np.asarray, session.run(outputs, {"images": images})))


def _torch_export(classifier: Classifier, example_N3SS: torch.Tensor) -> tuple[bytes, Scorer]:
    """The content of a file of `torch.export.save`, and what it computes."""
    program = torch.export.export(classifier.calibrated, (example_N3SS,), dynamic_shapes=_ANY_NUMBER)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # it has the paths of this machine
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={NOTES: json.dumps(_notes(classifier))})
    content = file.getvalue()
    read = torch.export.load(io.BytesIO(content)).module()
    return content, lambda images: (read(torch.from_numpy(images)).numpy(),)


def made_up_images(size: int) -> torch.Tensor:
    """`[N, 3, S, S]` uint8: soft shapes of all colours, the same every time."""
    shapes_N388 = 255 * torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(shapes_N388, size, mode="bilinear").byte()


def check(classifier: Classifier, views_N3SS: torch.Tensor, run: Scorer) -> str:
    """Compare what was exported with the model, on one image and on all; a line about it. Raises UserError where a
    score differs by more than is allowed: scores are logits divided by the temperature, and so are float32's errors."""
    images = views_N3SS.numpy()
    with torch.inference_mode():
        expected = [of.numpy() for of in _Exported(classifier)(views_N3SS)]
        differences = [
            np.abs(found - right[:size]).max()
            for size in (1, len(images))
            for found, right in zip(run(images[:size]), expected, strict=False)  # some give scores alone
        ]
    difference = np.max(differences)
    allowed = 1e-4 / min(1.0, classifier.temperature or 1.0)
    if not difference <= allowed:  # NaN is no agreement
        raise UserError(f"scores differ from the model's by {difference:.2g}, more than {allowed:g}; take another --to")
    return f"checked on {len(images)} made-up images: scores differ from the model's by {difference:.1g} at most"


def _notes(classifier: Classifier) -> dict[str, Any]:
    """What is needed to use a file without this package."""
    checkpoint, views = classifier.checkpoint, classifier.checkpoint.recipe.views
    return {
        "class_names": list(checkpoint.class_names),
        "train_counts": list(checkpoint.class_counts),
        "preprocessing": {
            "input": "uint8 RGB [batch, 3, size, size], 0 to 255: mean and std are applied inside",
            "decoding": DECODING,
            "size": views.size,
            # With a short side: resize it to that, keep the shape, take the centre. Without: resize to size x size.
            "short_side": short_side(views.size) if views.policy == "photos" else None,
            "filter": "bilinear, antialiased (Pillow's)",
            "mean": list(views.mean),
            "std": list(views.std),
        },
        "output": "scores: softmax(scores) is the probability under a uniform class prior; add the log of another one",
        "temperature": classifier.temperature,
        "method": checkpoint.recipe.method,
        "encoder": checkpoint.recipe.model.encoder,
        "epoch": checkpoint.epoch,
        "written_by": f"equipoise {__version__}",
    }

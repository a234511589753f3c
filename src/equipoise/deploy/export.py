"""A classifier becomes one file that runs without this package, checked against the model before it is there.

Both forms take uint8 RGB images `[batch, 3, S, S]`, 0 to 255, any number of them, and give `[batch, C]` scores: their
softmax is the probability under a uniform class prior (see `predict.py`); normalisation, temperature and training prior
are inside. How a picture becomes such an image, and what the classes are called, is said in the file.

Shapes: N images, C classes, S side of the view.
"""

import io
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from equipoise import __version__
from equipoise.base.errors import UserError, reason
from equipoise.base.files import atomic_file
from equipoise.data.decode import BadImageError, decode
from equipoise.data.images import ImageList
from equipoise.data.sources import open_data
from equipoise.deploy.predict import Classifier, as_list, find_images
from equipoise.views.views import short_side

TOLERANCE = 1e-4  # of a logit
NOTES = "equipoise.json"  # the file inside a .pt2 that says what an ONNX file says in its metadata
_CHECKED = 16  # images
_LARGEST_ONNX = 2**31 - 2**20  # bytes of weights: the format's limit, less what else is in the file


def export_onnx(classifier: Classifier, out: Path, pictures: Sequence[Path]) -> str:
    """Write an ONNX file and return a line about it. `pictures`: files or folders of images to check it with (none:
    images that the run was trained and scored on).

    Raises UserError, and writes nothing, where the packages for it are not installed, the network is too large for
    the format, no images are there to check with, torch cannot write the encoder as ONNX, or the file does not give
    what the model gives.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # pyright: ignore[reportUnusedImport] torch's exporter needs it
    except ImportError as error:
        raise UserError(
            f"the package {error.name} is missing; run: {shlex.quote(sys.executable)} -m pip install onnx onnxscript "
            "onnxruntime (the extra 'export')"
        ) from None
    size = sum(tensor.nbytes for tensor in classifier.calibrated.state_dict().values())
    if size > _LARGEST_ONNX:
        raise UserError(
            f"the network's {size / 1e9:.2f} GB do not fit in an ONNX file, whose format ends at "
            f"{_LARGEST_ONNX / 1e9:.2f} GB; take --to torch-export or safetensors"
        )
    views_N3SS = checking_views(classifier, pictures)
    try:
        program = torch.onnx.export(
            classifier.calibrated,
            (views_N3SS[:2],),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["scores"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    except torch.onnx.OnnxExporterError as error:
        why = reason(error, library=True, otherwise="its exporter does not say why")
        encoder = classifier.checkpoint.recipe.model.encoder
        raise UserError(
            f"torch cannot write {encoder} as ONNX ({why}); take --to torch-export or safetensors"
        ) from None
    assert program is not None
    model = program.model_proto
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        del node.metadata_props[:]  # stack traces with the paths of this machine
    onnx.helper.set_model_props(model, {key: _text(value) for key, value in _notes(classifier).items()})
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(images: npt.NDArray[np.uint8]) -> Any:
        return session.run(["scores"], {"images": images})[0]

    said = check(classifier, views_N3SS, run)
    return _write(out, content, said)


def export_torch(classifier: Classifier, out: Path, pictures: Sequence[Path]) -> str:
    """Write the file of `torch.export.save` and return a line about it. See `export_onnx`."""
    views_N3SS = checking_views(classifier, pictures)
    program = torch.export.export(
        classifier.calibrated, (views_N3SS[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # with the paths of this machine
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={NOTES: json.dumps(_notes(classifier))})
    content = file.getvalue()
    read = torch.export.load(io.BytesIO(content)).module()
    return _write(out, content, check(classifier, views_N3SS, lambda images: read(torch.from_numpy(images)).numpy()))


def checking_views(classifier: Classifier, pictures: Sequence[Path]) -> torch.Tensor:
    """`[N, 3, S, S]` uint8: the first of the pictures as the network takes them or, without any, images of the run's
    test part (else validation, else training), spread over it. Raises UserError where there are none."""
    if pictures:
        files, errors = find_images(pictures)
        if not files:
            raise errors[0]
        images = as_list(files)
    else:
        images = _own_images(classifier)
    chosen = np.linspace(0, len(images) - 1, min(_CHECKED, len(images))).astype(int)
    # Two at least: of a single example, torch would take the batch for one that is always of one image.
    try:
        views = [classifier.view(decode(images, int(index))) for index in (*chosen, *chosen[:1])]
    except BadImageError as error:
        raise UserError(f"{error.fault}; repair or remove it, or name pictures that can be with --images") from None
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).contiguous()


def _own_images(classifier: Classifier) -> ImageList:
    recipe, how = classifier.checkpoint.recipe, "name pictures to check the file with: --images FOLDER"
    if not classifier.checkpoint.class_counts or not recipe.data.path:
        raise UserError(f"{classifier.origin} does not say where its data lies; {how}")
    try:
        parts = open_data(recipe).named()
    except UserError as error:
        raise UserError(f"{error}; or {how}") from None
    return next(parts[part] for part in ("test", "validation", "train") if part in parts)


def check(classifier: Classifier, views_N3SS: torch.Tensor, run: Callable[[npt.NDArray[np.uint8]], Any]) -> str:
    """Hold what was exported to the model, on one image and on all; a line about it. Raises UserError where a score
    differs by more than is allowed: scores are logits divided by the temperature, and so is what float32 rounds."""
    images = views_N3SS.numpy()
    with torch.inference_mode():
        expected_NC = classifier.calibrated(views_N3SS).numpy()
        difference = max(
            float(np.abs(run(images[:size]) - expected_NC[:size]).max(initial=0)) for size in (1, len(images))
        )
    allowed = TOLERANCE / min(1.0, classifier.temperature or 1.0)
    if not difference <= allowed:  # NaN is no agreement
        raise UserError(
            f"the exported file's scores differ from the model's by {difference:.2g}, more than {allowed:g}: nothing "
            "was written; take another form with --to"
        )
    return (
        f"checked on {len(images) - 1} images: no score differs from the model's by more than {difference:.1g} "
        f"(of {allowed:g} allowed)"
    )


def _write(out: Path, content: bytes, said: str) -> str:
    with atomic_file(out) as file:
        file.write(content)
    return said


def _notes(classifier: Classifier) -> dict[str, Any]:
    """What a file must say to be used without this package."""
    checkpoint = classifier.checkpoint
    views = checkpoint.recipe.views
    photos = views.policy == "photos"
    return {
        "class_names": list(checkpoint.class_names),
        "train_counts": list(checkpoint.class_counts),
        "preprocessing": {
            "input": "uint8 RGB [batch, 3, size, size], 0 to 255: mean and std are applied inside",
            "size": views.size,
            # With a short side: to that length, keeping the shape, then the centre. Without: to the size as it is.
            "short_side": short_side(views.size) if photos else None,
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


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    # What of a name is no UTF-8 becomes an escape of JSON's.
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()

"""python onnx_predict.py MODEL.onnx PICTURE... : needs onnxruntime, numpy and Pillow alone."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def decoded(path):
    """The picture, upright, in 8 bits RGB, as `decoding` in the file's metadata says."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode[0] in "IF":
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise SystemExit(f"{path} has pixels of no known range: convert it to 8 or 16 bits")
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))  # convert would clip
    return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")


if len(sys.argv) < 3:
    raise SystemExit(__doc__)
session = onnxruntime.InferenceSession(sys.argv[1])
notes = session.get_modelmeta().custom_metadata_map
names, view, least = (
    json.loads(notes.get(key, "null")) for key in ("class_names", "preprocessing", "likeness_threshold")
)
for path in sys.argv[2:]:
    image = decoded(path)
    size, short, smaller = view["size"], view["short_side"], min(image.size)
    shape = tuple(short * side // smaller for side in image.size) if short else (size, size)
    left, top = (round((side - size) / 2) for side in shape)
    pixels = np.asarray(image.resize(shape, Image.Resampling.BILINEAR))[top : top + size, left : left + size]
    (scores,), *likenesses = session.run(None, {"images": pixels.transpose(2, 0, 1)[None]})
    strange = ["none of these"] if likenesses and likenesses[0][0] < least else []
    shares = np.exp(scores - scores.max())  # for a class prior that is not uniform, add its logarithm to the scores
    print(path, " ".join(names[scores.argmax()].split()), f"{shares.max() / shares.sum():.4f}", *strange, sep="\t")

"""The balanced contrastive loss against the matrix products that it cannot do without: `python -m benchmarks.loss`.

Forward and backward, B 256, V 2, D 1024, C 8142 (iNaturalist 2018), float32, one thread. "ratio" is our time divided by
the time of the products alone: features with features and with prototypes, and in the backward pass the gradient of
either factor of both. The mask form is the equation as it is written down, differentiated by autograd.

Then B 4096: what is allocated at the peak of forward and backward beyond the inputs and their gradients, as a share of
the full [anchors, columns] matrix, and our time divided by the mask form's (CPU time). Takes 80 s.
"""

import argparse
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Times, finish, in_turn, ratio, say_times, say_where, spread
from equipoise.method.losses import balanced_contrastive_loss

TEMPERATURE = 0.07
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def mask_form(features_BVD: Tensor, labels_B: Tensor, prototypes_CD: Tensor) -> Tensor:
    """Masks of positives and of the anchors themselves over the full matrix, as a textbook has it."""
    anchors_ND, labels_N = features_BVD.flatten(0, 1), labels_B.repeat_interleave(features_BVD.shape[1])
    columns_MD = torch.cat([anchors_ND, prototypes_CD])
    labels_M = torch.cat([labels_N, torch.arange(len(prototypes_CD), device=labels_N.device)])
    similarity_NM = anchors_ND @ columns_MD.T / TEMPERATURE
    others_NM = 1 - torch.eye(len(anchors_ND), len(columns_MD), device=anchors_ND.device)
    positives_NM = (labels_N[:, None] == labels_M).float() * others_NM
    columns_M = torch.bincount(labels_M)[labels_M].float()
    similarity_NM = similarity_NM - similarity_NM.amax(1, keepdim=True).detach()
    denominator_N1 = (similarity_NM.exp() * others_NM / (columns_M - positives_NM)).sum(1, keepdim=True)
    log_share_NM = similarity_NM - denominator_N1.log()
    return -((log_share_NM * positives_NM).sum(1) / positives_NM.sum(1)).mean()


def ours(features_BVD: Tensor, labels_B: Tensor, prototypes_CD: Tensor) -> Tensor:
    return balanced_contrastive_loss(features_BVD, labels_B, prototypes_CD, TEMPERATURE)


def inputs(batch: int, width: int, classes: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Features of two views, labels with a long tail, prototypes."""
    random = torch.Generator().manual_seed(0)
    features_BVD = F.normalize(torch.randn(batch, 2, width, generator=random), dim=-1)
    labels_B = (classes ** torch.rand(batch, generator=random)).long() - 1
    prototypes_CD = F.normalize(torch.randn(classes, width, generator=random), dim=-1)
    return features_BVD.to(device), labels_B.to(device), prototypes_CD.to(device)


def step(loss: Loss, features_BVD: Tensor, labels_B: Tensor, prototypes_CD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients as they reach what lies before: scaled by a weight, as in the total loss."""
    features_BVD, prototypes_CD = features_BVD.detach().requires_grad_(), prototypes_CD.detach().requires_grad_()
    value = loss(features_BVD, labels_B, prototypes_CD)
    (0.35 * value).backward()
    assert features_BVD.grad is not None
    assert prototypes_CD.grad is not None
    return value.detach(), features_BVD.grad, prototypes_CD.grad


def products(anchors_ND: Tensor, prototypes_CD: Tensor, of_features_NN: Tensor, of_prototypes_NC: Tensor) -> None:
    """The products themselves. The gradients of the similarities are given."""
    torch.mm(anchors_ND, anchors_ND.T)
    torch.mm(anchors_ND, prototypes_CD.T)
    gradient_ND = of_features_NN @ anchors_ND
    gradient_ND.addmm_(of_features_NN.T, anchors_ND)
    gradient_ND.addmm_(of_prototypes_NC, prototypes_CD)
    torch.mm(of_prototypes_NC.T, anchors_ND)


def peak_memory(loss: Loss, *of_batch: Tensor) -> int:
    """Bytes that the process grew by at the peak of a step, the gradients that it returns left out (Linux: high-water
    mark of the resident set)."""

    def resident(name: str) -> int:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(name))

    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: what is freed is given back, so that only what is in use counts
    step(loss, *of_batch)  # what the libraries take once, and keep, is no part of it
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the mark starts anew
    before = resident("VmRSS")
    _, *gradients = step(loss, *of_batch)
    return resident("VmHWM") - before - sum(4 * gradient.numel() for gradient in gradients)


def measure_speed(rounds: int) -> tuple[Times, Times]:
    batch, width, classes = 256, 1024, 8142
    of_batch = inputs(batch, width, classes)
    anchors_ND = of_batch[0].flatten(0, 1)
    gradients = torch.randn(len(anchors_ND), len(anchors_ND)), torch.randn(len(anchors_ND), classes)
    exact = step(mask_form, *(part.double() if part.is_floating_point() else part for part in of_batch))
    for mine, theirs in zip(step(ours, *of_batch), exact, strict=True):
        error = float((mine - theirs).norm() / theirs.norm())
        if error > 1e-5:
            raise SystemExit(f"the loss is wrong: it differs from the equation by {error:.1e}")
    print(f"B {batch}, V 2, D {width}, C {classes}, forward and backward, {rounds} rounds")
    times = in_turn(
        {
            "products alone": lambda: products(anchors_ND, of_batch[2], *gradients),
            "ours": lambda: step(ours, *of_batch),
            "mask form": lambda: step(mask_form, *of_batch),
        },
        rounds,
    )
    say_times(times)
    mask = [one / other for one, other in zip(times["mask form"].wall, times["products alone"].wall, strict=True)]
    mine = [one / other for one, other in zip(times["ours"].wall, times["products alone"].wall, strict=True)]
    print(f"  divided by the products' time: ours {spread(mine)}, mask form {spread(mask)}")
    return times["ours"], times["products alone"]


def measure_memory(rounds: int) -> dict[str, float]:
    batch, classes = 4096, 8142
    matrix = 4 * 2 * batch * (2 * batch + classes)
    narrow = inputs(batch, 128, classes)
    print(f"B {batch}, V 2, D 128, C {classes}: the full matrix is {matrix / 2**20:.0f} MiB; {rounds} rounds")
    shares = {
        "ours, D 128": peak_memory(ours, *narrow) / matrix,
        "ours, D 1024": peak_memory(ours, *inputs(batch, 1024, classes)) / matrix,
        "mask form, D 128": peak_memory(mask_form, *narrow) / matrix,
    }
    times = in_turn({"ours": lambda: step(ours, *narrow), "mask form": lambda: step(mask_form, *narrow)}, rounds)
    say_times(times)
    for name, share in shares.items():
        print(f"  {name:<20} beyond the inputs and their gradients {share:.3f} of the matrix")
    return {
        "memory_share": round(shares["ours, D 128"], 4),
        "memory_share_wide": round(shares["ours, D 1024"], 4),
        "memory_time_ratio": round(ratio(times["ours"].cpu, times["mask form"].cpu), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    say_where()
    mine, products_alone = measure_speed(rounds=11)
    finish("loss", mine, products_alone, **measure_memory(rounds=5))


if __name__ == "__main__":
    main()

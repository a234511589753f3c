"""How much of a CIFAR training step is spent on views and loading: `python -m benchmarks.waiting FOLDER [STEPS]`.

The loop of `training.py` on the data in FOLDER, with the time until the next batch is there taken apart.
"""

import statistics
import sys
import time

import torch

import equipoise
from equipoise.checkpoint import create_network
from equipoise.loader import open_batches
from equipoise.optim import create_sgd
from equipoise.plan import prepare
from equipoise.run import view_settings
from equipoise.training import loss_terms


def main(folder: str, steps: int) -> None:
    plan = prepare(equipoise.load_recipe("cifar10-lt", data=folder), "runs/not-written")
    recipe, train = plan.recipe, plan.parts.train
    network = create_network(recipe, len(train.class_names), start=True)
    network = network.to(memory_format=torch.channels_last).train()
    terms_of = loss_terms(recipe, train.class_counts, plan.device)
    optimizer = create_sgd(network.parameters(), 0.01, 0.9, 5e-4)
    batches = open_batches(train, view_settings(recipe), plan.device).training(0, 0, recipe.batch_size)
    waiting, whole = [], []
    for _ in range(steps):
        start = time.perf_counter()
        batch = next(batches)
        arrived = time.perf_counter()
        outputs = network.training_outputs(batch.images_VB3SS.flatten(0, 1), views=3)
        _, loss = terms_of(outputs, batch.labels_B)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        waiting.append(arrived - start)
        whole.append(time.perf_counter() - start)
    share = statistics.median(waiting[2:]) / statistics.median(whole[2:])
    print(f"median of {steps - 2} steps of {recipe.batch_size} images, {torch.get_num_threads()} threads:", end=" ")
    print(f"views and loading {1000 * statistics.median(waiting[2:]):.0f} ms of {statistics.median(whole[2:]):.2f} s")
    print(f'{{"share": {share:.4f}}}')


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20)

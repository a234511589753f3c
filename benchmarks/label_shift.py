"""How well the prior of unlabelled images is estimated: `python -m benchmarks.label_shift RUN SIZE...`.

SIZE test images of a run are drawn so that their classes follow a prior, 20 times for each prior. Printed: the
mean L1 error, the sum over the classes of |estimate - prior|, and the accuracy in percent, with the prior taken to be
equal, estimated by `em` (`estimate_prior`; of logits as they are: `em, T=1`) or by `bbse` (from the confusions on the
validation part; Lipton et al., ICML 2018), the shares that were `drawn`, and `known`.
"""

import sys
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from equipoise.evaluation.score import evaluate_checkpoint
from equipoise.evaluation.shift import estimate_prior, shifted_priors
from equipoise.runs.checkpoint import figures_of, load_checkpoint
from equipoise.runs.folder import chosen_checkpoint


def bbse(predicted_N, confusions_CC) -> np.ndarray:
    """The prior q of sum 1 for which P(predicted | class) q is nearest to the shares that were predicted."""
    classes = len(confusions_CC)
    shares_C = np.bincount(predicted_N, minlength=classes) / len(predicted_N)
    prior_C, _ = nnls(np.vstack([confusions_CC, np.full(classes, 100.0)]), np.append(shares_C, 100.0))
    return prior_C / prior_C.sum()


def main(run: str, *sizes: str) -> None:
    file = chosen_checkpoint(Path(run))
    checkpoint = load_checkpoint(file)
    figures, log_prior_C = figures_of(file, checkpoint), checkpoint.log_prior_of_logits().numpy()
    temperature, classes = (figures and figures["temperature"]) or 1.0, len(checkpoint.class_names)
    (_, validation), (_, test) = (evaluate_checkpoint(file, split=x, keep_logits=True) for x in ("validation", "test"))
    confusions_CC = np.zeros((classes, classes))
    np.add.at(confusions_CC, (validation.ranked_NK[:, 0], validation.labels_N), 1)
    confusions_CC /= np.maximum(confusions_CC.sum(0), 1)
    generator, rows_of = np.random.default_rng(0), [np.flatnonzero(test.labels_N == c) for c in range(classes)]
    for size in map(int, sizes):
        print(f"\n{run}, temperature {temperature:.3g}, {size} images: L1 error, then accuracy")
        for name, prior_C in list(shifted_priors(checkpoint.class_counts).items())[:11]:
            found: dict[str, list[list[float]]] = {}
            for _ in range(20):
                labels_N = generator.choice(classes, size, p=prior_C)
                logits_NC = test.logits_NC[[generator.choice(rows_of[label]) for label in labels_N]].astype(np.float64)
                scores_NC = logits_NC / temperature - log_prior_C
                guesses = {"equal": np.full(classes, 1 / classes), "em": estimate_prior(scores_NC)}
                guesses["em, T=1"] = estimate_prior(logits_NC - log_prior_C)
                guesses["bbse"] = bbse(logits_NC.argmax(1), confusions_CC)
                guesses |= {"drawn": np.bincount(labels_N, minlength=classes) / size, "known": prior_C}
                for guess, q_C in guesses.items():
                    right = ((scores_NC + np.log(np.maximum(q_C, 1e-300))).argmax(1) == labels_N).mean()
                    found.setdefault(guess, []).append([np.abs(q_C - prior_C).sum(), 100 * right])
            means = (f"{guess} {l1:.2f} {right:.1f}" for guess, of in found.items() for l1, right in [np.mean(of, 0)])
            print(f"{name:12} " + "   ".join(means))


if __name__ == "__main__":
    main(*sys.argv[1:])

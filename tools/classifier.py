# SPDX-License-Identifier: MIT
"""Do samples help a classifier?

    python tools/classifier.py RUN N CLASS [CLASS ...]

RUN is a run of train-ldm. A linear classifier learns from the photographs that RUN was trained
on, once from these alone, once with N samples of each CLASS added, and once with as many
duplicates of photographs added. It is tested on photographs that RUN has never seen. If
duplicates help as much as samples, it was not the samples that helped."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

here = Path(__file__).resolve().parent
sys.path[:0] = [str(here), str(here.parent)]  # where evaluate.py and vqldm.py lie
import evaluate
import vqldm


def fit(x, label, n_classes):
    """Features (n,512) and labels -> a linear classifier in which all classes have equal weight."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    w = torch.zeros(x.shape[1] + 1, n_classes, requires_grad=True)
    weight = 1 / torch.bincount(label, minlength=n_classes).clamp(min=1)
    optimizer = torch.optim.LBFGS([w], max_iter=200)

    def scores(x):
        return F.pad((x - mean) / std, (0, 1), value=1.0) @ w

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(scores(x), label, weight) + 0.01 * w.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return lambda x: scores(x).argmax(1)


def found(classify, x, label, classes):
    """-> {class: percentage of its images that the classifier finds}"""
    return {
        classes[c]: round(100 * float((classify(x[label == c]) == c).float().mean()), 1)
        for c in label.unique()
    }


def compare(run, n, rare):
    """Print the accuracy without samples, and three times with n samples of each class in rare."""
    state = vqldm.load_checkpoint(run, "RUN", "ldm")
    model = vqldm.restore_ldm(state, vqldm.pick_device("auto"))
    for name in rare:
        vqldm.require(name in model.classes, f"CLASS {name}: choose from {model.classes}")
    lpips = vqldm.load_lpips(model.device)
    vqldm.require(lpips, "the classifier uses LPIPS's network, see the WARNING")
    cfg = replace(model.vqgan.cfg, data=model.cfg.data or model.vqgan.cfg.data)
    images = vqldm.read_images(cfg, state["folder"])
    vqldm.require(images.classes == model.classes, "RUN: its classes are not those of its images")

    known = images.known(state["seen"])  # either stage was trained on these
    label = images.labels
    vqldm.require(not known.all(), "RUN: no unseen image is left, to test the classifier on")
    trained = set(label[known].tolist())
    gone = [name for name in rare if images.classes.index(name) not in trained]
    vqldm.require(not gone, f"CLASS: no photograph that RUN was trained on is left of {gone}")
    x = evaluate.features(lpips, images.pixels).float()
    accuracies = {}

    def report(name, classify):
        shares = found(classify, x[~known], label[~known], images.classes)
        accuracies.setdefault(name, []).append(sum(shares.values()) / len(shares))
        print(name, "balanced accuracy", round(accuracies[name][-1], 1), shares)

    alone = fit(x[known], label[known], len(images.classes))
    report("photographs alone", alone)
    made = torch.tensor([model.classes.index(name) for name in rare])
    made = made.repeat_interleave(n)  # the samples' labels
    for draw in range(3):
        ids = range(draw * len(made), (draw + 1) * len(made))
        samples = evaluate.features(lpips, model.generate(model.cfg, ids, made)[0]).float()
        print("samples recognised", found(alone, samples, made, images.classes))
        # For each sample, a photograph of its class that was trained on.
        gen = torch.Generator().manual_seed(draw)
        twins = torch.cat(
            [(known & (label == c)).float().multinomial(1, generator=gen) for c in made]
        )
        for name, more in {"with samples": samples, "with as many duplicates": x[twins]}.items():
            all_x, all_labels = torch.cat([x[known], more]), torch.cat([label[known], made])
            report(name, fit(all_x, all_labels, len(images.classes)))
    print(
        "balanced accuracy, mean of all draws:",
        {name: round(sum(values) / len(values), 1) for name, values in accuracies.items()},
    )


def main(argv=None):
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tools/classifier.py", None, __doc__, formatter_class=about)
    parser.error = lambda text: vqldm.require(False, text)  # one sentence, without the usage
    parser.add_argument("RUN", help="run folder or checkpoint of train-ldm, such as runs/my-ldm")
    parser.add_argument("N", type=int, help="how many samples of each class, such as 200")
    parser.add_argument("CLASS", nargs="+", help="a class, such as dermatofibroma")
    with vqldm.one_sentence():
        args = parser.parse_args(argv)
        vqldm.require(args.N > 0, f"N {args.N}: must be at least 1")
        compare(args.RUN, args.N, args.CLASS)


if __name__ == "__main__":
    main()

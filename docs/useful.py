"""python docs/useful.py RUN N CLASS [CLASS ...]: do N samples of each of these classes help a
classifier? The control is as many duplicates of real photographs. What they do as well is no merit
of samples."""
import sys
from dataclasses import replace
from pathlib import Path
import torch
import torch.nn.functional as F
sys.path.insert(0, str(Path(__file__).parent.parent))       # where vqldm.py lies
import vqldm

run, n, rare = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
state = vqldm.load_checkpoint(run, "RUN", "ldm")
model = vqldm.load(run)
lpips = vqldm.load_lpips(model.device)
cfg = replace(model.vqgan.cfg, data=model.cfg.data or model.vqgan.cfg.data)
images = vqldm.read_images(cfg, state["folder"].parent / "cache")
known = images.known(state["seen"])     # trained on, by either stage
label = images.labels
x = vqldm.features(lpips, images.pixels).float()

def fit(x, label):                      # -> a linear classifier for which all classes weigh alike
    mean, std = x.mean(0), x.std(0) + 1e-6
    w = torch.zeros(x.shape[1] + 1, len(images.classes), requires_grad=True)
    weight = 1 / torch.bincount(label, minlength=len(images.classes)).clamp(min=1)
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

def recalls(classify, x, label):        # the share of each class that is found
    return {images.classes[c]: round(100 * float((classify(x[label == c]) == c).float().mean()), 1)
            for c in label.unique()}

def report(name, classify):
    found = recalls(classify, x[~known], label[~known])
    print(name, "balanced accuracy", round(sum(found.values()) / len(found), 1), found)

alone = fit(x[known], label[known])
report("photographs alone", alone)
made = torch.tensor([model.classes.index(name) for name in rare]).repeat_interleave(n)
for draw in range(3):
    ids = range(draw * len(made), (draw + 1) * len(made))
    samples = vqldm.features(lpips, model.make(model.cfg, ids, made)[0]).float()
    # for each sample a photograph of its class that was trained on
    gen = torch.Generator().manual_seed(draw)
    twins = torch.cat([(known & (label == c)).float().multinomial(1, generator=gen) for c in made])
    print("samples recognised", recalls(alone, samples, made))
    for name, more in {"with samples": samples, "with as many duplicates": x[twins]}.items():
        report(name, fit(torch.cat([x[known], more]), torch.cat([label[known], made])))

# SPDX-License-Identifier: MIT
"""Tests of the programs in tools, with the helpers and fixtures of test_vqldm.py."""

import copy, csv, functools, hashlib, io, itertools, json, os, random, re, runpy, shutil, sys
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest, torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where test_vqldm.py lies
import vqldm
from test_vqldm import ORIGINAL, TOOLS, assert_equal, baseline, bytes_of, classifier, cli, copy_of
from test_vqldm import copy_stage, empty_folder, evaluate, fill, identical, images_with_ids, letters
from test_vqldm import lpips, mistaken, plain_cpu, printed, randn, random_lpips, recorded, refused
from test_vqldm import state_of, symmetries, table, train, trained, use_plain_cpu
from vqldm import rng


MISTAKES = [  # a command, and what the sentence says that refuses it
    ("classifier trained/ldm 4 wart", "CLASS wart: choose from ['mole', 'scar']"),
    ("evaluate --ckpt trained/ldm --folders one", "--folders one: is not empty; name a new folder"),
    ("evaluate --ckpt trained/ldm --data one --out one", "--out one: holds the images; name"),
    ("baseline --like x --minutes inf 1", "--minutes: must be finite, and long enough for a step"),
    ("baseline --like x --minutes 1 1e-9", "--minutes: must be finite, and long enough for a step"),
    ("baseline --like x --minutes 1 1 --out trained/ldm/last.pt", "trained/ldm/last.pt: is a"),
    ("evaluate --ckpt trained/ldm --n 1", "--n 1: must be at least 2, since pairs of images"),
    ("evaluate --ckpt trained/ldm --data one", "--class, --data: 0 unseen images are too few, 4"),
]


@pytest.mark.parametrize("command, told", MISTAKES)
def test_a_mistake_with_a_tool_ends_in_one_sentence(mistaken, command, told):
    mistaken(command, told)


# ---- tools/evaluate.py ---------------------------------------------------------------------------
@pytest.mark.parametrize("side", [64, 300])
def test_features_are_the_means_of_the_last_map_of_lpips(lpips, side):
    """Images are brought to 224×224 pixels. Larger ones are smoothed first, to avoid aliasing."""
    few = (60 * randn(2, 3, side, side).clamp(-2, 2) + 128).byte()
    images = few[[0] + 5 * [1]]  # six images need more than one batch
    x = F.interpolate(few / 255 * 2 - 1, (224, 224), mode="bilinear", antialias=True)
    want = lpips.net(lpips.scaling_layer(x))[-1].mean((2, 3))
    assert want.shape == (2, 512)
    assert_close(evaluate.features(lpips, images)[[0, 5]].float(), want, rtol=1e-4, atol=1e-5)


def test_kernel_distance_is_the_unbiased_sum_over_pairs():
    """No image is paired with itself, nor with the one that has its place in the other set."""
    a, b = randn(5, 3).double(), randn(5, 3, key=1).double() + 1
    want = 0
    for u, v, sign in ((a, a, 1), (b, b, 1), (a, b, -2)):
        for i, j in itertools.permutations(range(5), 2):
            want += sign * float(u[i] @ v[j] / 3 + 1) ** 3 / 20
    assert evaluate.kernel_distance(a, b) == pytest.approx(want)


@pytest.mark.parametrize("n, rows", [(300, [7, 255, 256, 257, 299, 0]), (256, [0, 255]), (1, [0])])
def test_the_nearest_training_image_is_found_in_all_symmetries(n, rows):
    """Training images are searched in parts of 256. One picture is no copy, and a search in float64
    tells its distance. The others are turned copies of these rows. All come 50 times."""
    pixels = torch.randint(256, (301, 3, 128, 128), generator=rng(1)).byte()
    small = pixels.double().unflatten(3, (32, 4)).unflatten(2, (32, 4)).mean((3, 5)) / 127.5 - 1
    every = np.stack([symmetries(x) for x in small[1 : n + 1].numpy()])
    away = np.sqrt(((every - small[0].numpy()) ** 2).sum((2, 3, 4)).min(1))
    turned = vqldm.augment(pixels[1:][rows], torch.arange(len(rows)) + 1)
    pictures = torch.cat([pixels[:1], turned] * 50)
    distance, row = evaluate.nearest_trained(pictures, pixels[1 : n + 1])
    assert row.tolist() == [away.argmin(), *rows] * 50
    assert distance[0] == pytest.approx(away.min(), rel=1e-4)
    assert distance[1 : 1 + len(rows)].max() < 0.1


def with_unseen_images(trained, folder):
    """Make a copy of stage 2 in folder/ldm, and 52 photographs in folder/all. The model has seen 36
    of them. Two show patient P, who is known, and two acne, a class that it does not have. So 12
    are unseen: six moles, of which one is a training image, saved again with another pixel, and six
    scars, which are greener, one by far -> the 36 images, and a function that finds green ones."""
    photos = shutil.copytree(trained.folder / "photos/train", folder / "all/train").parent
    seen = sorted(photos.rglob("*.bmp"))
    checksums = [vqldm.digest(hashlib.sha256(path.read_bytes()).digest()) for path in seen]
    known = torch.tensor([*checksums, vqldm.digest(("patient_id", "P"))])
    copy_stage(trained, folder, "ldm", seen=known, step=11)
    fill(photos, [f"mole/{i}.bmp" for i in range(7)], (180, 120, 90))
    fill(photos, [f"scar/{i}.bmp" for i in range(7)], (200, 140, 90))
    fill(photos, ["scar/6.bmp"], (190, 250, 190))
    fill(photos, "acne/a.bmp acne/b.bmp")
    with Image.open(seen[0]) as again:
        again.putpixel((0, 0), (9, 9, 9))
        again.save(photos / "mole/6.bmp")
    rows = [f"{p.relative_to(photos)},{'P' * (p.stem == '0')}" for p in photos.rglob("*.bmp")]
    (photos / "metadata.csv").write_text("\n".join(["file_name,patient_id", *rows]))
    pixels = torch.stack([vqldm.read_image(path.read_bytes(), 32) for path in seen])
    return SimpleNamespace(seen=pixels, are_green=lambda x: (x[:, 1, 20, 20] > 130).tolist())


@pytest.fixture(scope="module")
def evaluation(trained, tmp_path_factory):
    """What evaluate says of nine samples, of which four are really training images. Three of these
    are turned, and one has few colours."""
    folder, generate = tmp_path_factory.mktemp("evaluation"), vqldm.LatentDiffusion.generate
    e = with_unseen_images(trained, folder)

    def with_copies(self, settings, ids, label):
        pictures, z0 = generate(self, settings, ids, label)
        pictures[4:7] = vqldm.augment(e.seen[[7, 3, 30]] // 4 * 4, [2, 5, 0])
        pictures[8] = e.seen[9] // 12 * 12
        return pictures, z0

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        use_plain_cpu(patch)
        patch.chdir(folder)
        lpips = random_lpips(patch)
        patch.setattr(vqldm.LatentDiffusion, "generate", with_copies)
        patch.setattr(vqldm, "load_lpips", lambda device: lpips)
        patch.setattr(vqldm, "draw_rows", ORIGINAL.draw_rows)
        reconstruct, drawn = [recorded(patch, vqldm, x) for x in ("reconstruct", "draw_rows")]
        features = recorded(patch, evaluate, "features")
        e.nearest = recorded(patch, evaluate, "nearest_trained")
        e.told = recorded(patch, evaluate, "in_words")
        made = recorded(patch, vqldm.LatentDiffusion, "generate")
        words = "evaluate --ckpt ldm --data all --n 9 --autoguidance 2.5 "
        words += "--out new/results --folders new/folders"
        assert cli(*words.split()) == 0
    e.folder, e.printed, e.drawn, e.made = folder, out.getvalue(), drawn[0], made[0]
    e.numbers = json.loads((folder / "new/results/metrics.json").read_text())
    e.samples, e.latents = e.made.result
    e.real, e.other = [call.pixels for call in reconstruct]  # two sets of unseen images
    (e.measures, e.recon), (_, e.perfect) = [call.result for call in reconstruct]
    e.features = {call.pixels.numpy().tobytes(): call.result for call in features}
    return e


def test_evaluate_measures_two_halves_of_what_no_training_has_seen(evaluation):
    """Both have six images, in which the classes are mixed. Samples are of the classes of the first
    half, and made as is typed, or else as stage 2 was told when it was trained."""
    e, green = evaluation, evaluation.are_green
    assert len(e.real) == len(e.other) == e.numbers["unseen_images"] == 6
    assert len({*bytes_of(e.real), *bytes_of(e.other)}) == 12
    assert {*green(e.real)} == {True, False} and sum(green(e.real) + green(e.other)) == 6
    assert e.made.label.tolist() == [int(green(e.real)[i % 6]) for i in range(9)]
    assert (e.made.settings.steps, e.made.settings.autoguidance) == (3, 2.5)


def test_evaluate_writes_and_prints_what_it_measures_beside_its_settings(evaluation):
    """The kernels are distances from the first half. A near copy is closer to a training image than
    half the median distance of unseen images: three samples are, and the mole that was saved again.
    Half the mean is larger, as one image is far off, and a fourth sample is nearer than that."""
    e = evaluation
    want = dict(ckpt="ldm", data=str(e.folder / "all"), n=9, steps=3, autoguidance=2.5, class_="")
    want |= {**e.measures, "latent_std": float(e.latents.std()), "step": 11}
    sets = {"kernel": e.samples[:6], "kernel_perfect": e.perfect, "kernel_recon": e.recon}
    for name, images in {**sets, "kernel_real": e.other}.items():
        a, b = [e.features[one.numpy().tobytes()] for one in (e.real, images)]
        want[name] = evaluate.kernel_distance(a, b)
    (distance, _), (usual, _) = [call.result for call in e.nearest]
    assert_equal(e.nearest[0].pictures, e.samples)
    assert {*bytes_of(e.nearest[1].pictures)} == {*bytes_of(e.real), *bytes_of(e.other)}
    assert {*bytes_of(e.nearest[0].trained)} == {*bytes_of(e.seen)}
    half = sorted(usual.tolist())[5] / 2  # torch's median of 12 numbers is the sixth
    assert half < distance[8] < usual.mean() / 2
    assert (distance < half).tolist() == [4 <= i < 7 for i in range(9)]
    want |= dict(near_copies=3, near_copies_percent=100 / 3, near_copies_unseen=1)
    want |= dict(near_copies_unseen_percent=100 / 12, training_images_found=36)
    assert {name: e.numbers[name] for name in want} == pytest.approx(want)
    assert e.told[0].gap == e.numbers["kernel"] - e.numbers["kernel_perfect"]
    assert (e.folder / "new/cache").is_dir()  # beside the folder of the results

    told = {name: float(value) for name, value in re.findall(r"^(\w+) +(\S+)$", e.printed, re.M)}
    assert told.keys() == e.numbers.keys() - {f.name for f in fields(evaluate.EvaluateConfig)}
    assert told == pytest.approx({name: e.numbers[name] for name in told}, rel=1e-3)
    assert "12 unseen images of known classes: {'acne': 0, 'mole': 6, 'scar': 6}\nW" in e.printed
    assert e.printed.splitlines()[-1].startswith("6 unseen images in each set are too few")


def test_evaluate_draws_each_set_and_writes_it_into_a_folder(evaluation):
    """The worst copies are drawn first. The folders are for other programs, which compare them."""
    e = evaluation
    distance, row = e.nearest[0].result
    order = distance.argsort()
    want = dict(real=e.real, recon=e.recon, samples=e.samples)
    want["samples nearest to a training image"] = e.samples[order]
    want["that image"] = e.nearest[0].trained[row[order]]
    assert identical(e.drawn.rows, want) and [*e.drawn.rows] == [*want]
    assert e.drawn.path == Path("new/results/evaluate.png")
    assert sorted(os.listdir(e.folder / "new/folders")) == ["real", "recon", "samples"]
    for name in ("real", "recon", "samples"):
        paths = sorted((e.folder / "new/folders" / name).iterdir())
        written = [vqldm.pil_to_tensor(Image.open(path)) for path in paths]
        assert_equal(torch.stack(written), want[name])


@pytest.mark.parametrize("there, n, few", [(4, 9, 2), (39, 500, 19), (40, 500, 0), (99, 19, 19)])
def test_evaluate_warns_if_each_set_has_fewer_than_20_images(printed, there, n, few):
    """Two sets of one image would leave no pair to compare, so fewer than four are refused."""
    images, model = images_with_ids(*[range(there)] * 2), SimpleNamespace(classes=["a", "b"])
    cfg, seen = evaluate.EvaluateConfig(n=n), torch.tensor([-1])
    rows, _ = evaluate.unseen_images(cfg, model, images, seen)
    assert len(rows.diff().unique()) > there // 5  # in random order
    assert re.findall("WARNING .* only (.*) unseen images", printed()) == [str(few)] * (few > 0)
    with pytest.raises(vqldm.UserError, match="3 unseen images are too few, 4 are needed"):
        evaluate.unseen_images(cfg, model, images_with_ids([1, 2, 3], [1, 2, 3]), seen)


def test_evaluate_can_measure_one_class_on_the_same_images_at_any_seed(evaluation, monkeypatch):
    monkeypatch.chdir(evaluation.folder)
    calls = recorded(monkeypatch, vqldm, "reconstruct")
    made = recorded(monkeypatch, vqldm.LatentDiffusion, "generate")
    read = recorded(monkeypatch, vqldm, "read_images")
    for seed in (0, 7):
        assert cli(*f"evaluate --ckpt ldm --data all --class scar --n 2 --seed {seed}".split()) == 0
    assert [call.cfg.seed for call in read] == [0, 0]  # drawn images stay those of stage 1
    assert_equal(calls[0].pixels, calls[1].pixels)
    assert evaluation.are_green(calls[0].pixels) == [True] * 2
    assert [call.label.tolist() for call in made] == [[1] * 2] * 2


def test_evaluate_measures_on_the_images_of_stage_2(copy_of, tmp_path, monkeypatch, printed):
    """Or on those of stage 1, if it had none of its own. What a stage has seen is not measured."""
    names = [f"val/{kind}/{i}.bmp" for kind in ("mole", "scar") for i in range(4)]
    own = fill(tmp_path / "own", names)
    seen = vqldm.digest(hashlib.sha256((own / "val/mole/0.bmp").read_bytes()).digest())
    ldm = copy_of("ldm", dict(data=str(own)), seen=torch.tensor([seen]))
    read = recorded(monkeypatch, vqldm, "read_images")
    assert cli("evaluate", "--ckpt", ldm, "--n", 2) == 0
    assert cli("evaluate", "--ckpt", "trained/ldm", "--n", 2, "--out", ldm) == 0
    assert [call.cfg.data for call in read] == [str(own), os.path.abspath("photos")]
    assert "to measure on: 7 unseen images" in printed()


def test_evaluate_needs_no_classes_and_no_lpips(trained, tmp_path, monkeypatch, printed):
    """Copies and kernels are left out then. Without --out the results lie beside the checkpoint,
    so images may lie in a folder that another command would write into."""
    train("ldm", tmp_path / "ldm", "--unconditional")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained.folder / "photos/val", "runs/samples")
    assert cli(*"evaluate --ckpt ldm/last.pt --data runs/samples".split()) == 0
    numbers = json.loads((tmp_path / "ldm/metrics.json").read_text())
    assert "12 unseen images of known classes: {'images': 12}" in printed()
    assert numbers["training_images_found"] == 0
    assert not [name for name in numbers if "kernel" in name or "near" in name]


def test_the_last_line_of_evaluate_says_what_kernel_means():
    """From how far kernel is above kernel_perfect, what chance does, and the number of images."""
    told = evaluate.in_words
    assert told(6.4, 0.8, 20).startswith("kernel is above kernel_perfect by 6.4, give or take 0.8.")
    assert told(0.6, 0.8, 300).startswith("300 images are too few to tell kernel from")
    assert told(-0.6, 0.8, 300).startswith("300 images are too few to tell kernel from")
    assert told(-2.6, 0.8, 300).startswith("kernel is below kernel_perfect by 2.6, give or take")
    assert told(99.0, 8.0, 19).startswith("19 unseen images in each set are too few to tell how")


def test_chance_is_how_much_the_gap_of_two_kernels_varies_from_set_to_set():
    """Of samples that are off by a third of a standard deviation. Perfect ones are not off."""
    found = []
    for i in range(30):
        real, made, perfect = randn(3, 40, 4, key=("sets", i)).double()
        made = made + 0.33
        gap = evaluate.kernel_distance(real, made) - evaluate.kernel_distance(real, perfect)
        found.append(evaluate.gap_and_chance(real, made, perfect))
        assert found[-1][0] == gap
    gap, chance = torch.tensor(found).T
    assert 0.8 < chance.mean() / (2 * gap.std()) < 1.5


# ---- tools/table.py ------------------------------------------------------------------------------
def photos(names, **tables):
    """Make empty files of these names in photos/, as tools/table.py looks at names only, and tables
    of these texts, in which | begins a line."""
    for name in names.split(" & "):
        Path("photos", name).parent.mkdir(parents=True, exist_ok=True)
        Path("photos", name).touch()
    for name, text in tables.items():
        data = text if isinstance(text, bytes) else text.replace("|", "\n").encode()
        Path("photos", name.replace("_csv", ".csv")).write_bytes(data)


def converted(*words):
    """Run tools/table.py photos -> the lines of metadata.csv."""
    assert cli("table", "photos", *words) == 0
    return Path("photos/metadata.csv").read_text("utf-8").splitlines()


WARNINGS = dict(  # a short name of each, and what it says
    ids="no ids, so .*: type --group TITLE .*, or --group-by-folder LEVEL",
    id="of [0-9]+ images have no id: write it into each row, or type --group TITLE",
    big="images have the id .*: if it means none, type --group TITLE",
    none=r"no classes(, only .* patients \(--group-by-folder\))?: type --class TITLE, or A,B",
    bits="no classes from the columns of 0 and 1, .*: type --class TITLE, or A,B",
    half="rows have no .*, but 'diagnosis_1': type --class TITLE",
    blank="[0-9]+ of [0-9]+ rows have no .*: write it there, or type --class TITLE",
    number="classes: .* from .*, but .*: type --class TITLE.*, or delete this column",
    pairs="[0-9]+ pairs may be one, such as .*: if so, spell them alike",
    zeros="zeros are lost in .*; save this column as text",
    level="which level.s folders are classes.*: if .*, delete .* and add --class-by-folder LEVEL",
    shallow="images have no folder of a class: move them into one",
)


def warned(told):
    """-> the short names of all WARNINGs. Most name the titles that were not used."""
    lines = re.findall("^WARNING (.+)", told, re.M)
    found = [name for line in lines for name in WARNINGS if re.match(f".*{WARNINGS[name]}", line)]
    unused = len({*found} - {"zeros", "pairs", "level", "shallow"})
    assert len(found) == len(lines) and told.count("(not used: [") >= unused
    return " ".join(found)


# What a case is about (with flags), a table as people save it or -, and below it the metadata.csv
# that comes of it, and WARNINGs. The files that this names are there, and any after "beside".
AS_SAVED = """\
titles with capitals, blanks and hyphens: IMAGE Name;Diagnosis;Patient-ID;lesion\u00a0ID|a;mole;P;L
file_name,class,patient_id|a.jpg,mole,P !
known columns in their order, but not empty ones: \
label,class,diagnosis,dx,diagnosis_1,diagnosis_3,isic_id,image|,,,,5,,a,b|1,2,3,4,6,NA,b,a|,,,,,7,9,
file_name,class|a.jpg,5|b.jpg,6 ! ids
capitals, endings, \\, folders of the disk: image|IMG_1.jpg|IMG_2|rare\\1.JPG|3.jpg
file_name|IMG_1.JPG|img_2.jpg|rare/1.jpg|x/3.jpg ! ids
folders of the table, absolute paths: \
image|old/x/1.jpg|C:\\me\\2.jpg|/home/me/3.jpg|\\\\me\\4.jpg|~/me/5.jpg|../z/6.jpg
file_name|x/1.jpg|y/2.jpg|3.jpg|4.jpg|y/5.jpg|z/6.jpg ! ids
a folder that differs, one column of 1, beside P/x/1.jpg: image,ok|Q/x/1.jpg,1|P/x/2.jpg,1
file_name|P/x/2.jpg ! ids none
files that were converted, if no row has the new name, beside 3.jpg: \
image|1.HEIC|2.tif|2.b.jpg|2.jpg|3.2
file_name|1.jpg|2.b.png|2.jpg !
both forms of é: image,class,patient_id|\u00e9 1,\u00e9,\u00e9|e\u0301 2,e\u0301,e\u0301
file_name,class,patient_id|e\u0301 1.jpg,\u00e9,\u00e9|\u00e9 2.jpg,\u00e9,\u00e9 !
blanks, also a Mac's, and quotes:  image , class |a\u202fb , mole\u00a0|  c,  "scar; ""old"", 5"
file_name,class|a\u202fb.jpg,mole|c.jpg,"scar; ""old"", 5" !
words that mean none --group Patient-ID: \
image,class,patient_id|a,NULL,-|b,mole,?|c,unknown,missing|d,None,0|e,N/A,#N/A
file_name,class,patient_id|a.jpg,,|b.jpg,mole,|c.jpg,,|d.jpg,,0|e.jpg,, ! id
lesions and patients in several forms: image,lesion_id,patient_id|a,l-1,|b,L 01,p 7|c,,P007|d,M,
file_name,group|a.jpg,patient p 7|b.jpg,patient p 7|c.jpg,patient p 7|d.jpg,lesion M !
a column of 0 and 1 for each class: image;age;MEL;NV|a;1;0.0;1,0|b;50;1;0|9;60;;
file_name,class|a.jpg,NV|b.jpg,MEL ! ids
a column of 1 more --class mel,NV: image,MEL,NV,weight|a,1.0,0.0,1.0|b,0,1,1|c,0,0,1
file_name,class|a.jpg,MEL|b.jpg,NV|c.jpg, ! ids
columns of 0 and 1 beside folders of classes: image,patient_id,male,female|1,P,1,0|2,Q,0,1
file_name,patient_id|mel/1.jpg,P|nv/2.jpg,Q ! bits
a column of one class beside folders of classes: image,patient_id,label|1,P,done|2,Q,done
file_name,class,patient_id|mel/1.jpg,done,P|nv/2.jpg,done,Q ! number
another column that names classes: image,patient_id,diagnosis_1,diagnosis_3|a,P,Malignant,|b,Q,,nv
file_name,class,patient_id|a.jpg,,P|b.jpg,nv,Q ! half
classes in a patient's first row: image,patient_id,dx|a,P,mel|b,P,|c,P,
file_name,class,patient_id|a.jpg,mel,P|b.jpg,,P|c.jpg,,P ! blank
folders of classes in folders of patients --group-by-folder 1 --class-by-folder 2: -
file_name,class,patient_id|P1/mel/1.jpg,mel,P1|P1/nv/b/2.jpg,nv,P1|P2/3.jpg,,P2 ! shallow
names that lost their zeros, beside 098.jpg & 099.jpg: image,dx,patient_id|98,x,P|99,y,P|100,y,Q
file_name,class,patient_id|100.jpg,y,Q ! zeros
ISIC 2020's: image_name,patient_id,diagnosis,target|I_1,IP_7,unknown,0|I_2,IP_7,nevus,0
file_name,class,patient_id|I_1.jpg,,IP_7|I_2.jpg,nevus,IP_7 !
the archive's: isic_id,diagnosis_1,diagnosis_3,patient_id,lesion_id|I_1,Benign,Nevus,IP_1,|I_2,\
Malignant,Melanoma,,IL_1|I_3,Benign,Nevus,,
file_name,class,group|I_1.jpg,Nevus,patient IP_1|I_2.jpg,Melanoma,lesion IL_1|I_3.jpg,Nevus, ! id"""
AS_SAVED = [(*a.split(": ", 1), *b.split(" !")) for a, b in zip(*[iter(AS_SAVED.split("\n"))] * 2)]


@pytest.mark.parametrize("about, text, want, gaps", AS_SAVED, ids=[case[0] for case in AS_SAVED])
def test_the_table_tool_reads_what_people_save(empty_folder, printed, about, text, want, gaps):
    """The program accepts what it writes, with these images and no others."""
    names = [row["file_name"] for row in csv.DictReader(want.split("|"))]
    tables = {"metadata_csv" if text.startswith("file_name") else "labels_csv": text}
    photos(" & ".join([*names, *about.split(" beside ")[1:]]), **tables if text != "-" else {})
    assert converted(*"".join(about.partition("--")[1:]).split()) == want.split("|")
    assert warned(printed()) == gaps.strip()
    assert [*vqldm.find_images(Path("photos"))] == sorted(names)


ENCODINGS = "utf-8 utf-8-sig utf-16 utf-16-le utf-16-be cp1252".split()


@pytest.mark.parametrize("encoding, end", [*zip(ENCODINGS, 2 * ["\r\n", "\r", "\n"])])
def test_the_table_tool_reads_encodings_and_ends_of_lines(empty_folder, printed, encoding, end):
    photos("a.jpg & b.jpg", x_csv=f"image;class{end}a;Hämangiom{end}b;Nävus".encode(encoding))
    assert converted() == ["file_name,class", "a.jpg,Hämangiom", "b.jpg,Nävus"]
    assert f"read photos/x.csv, in {encoding.removesuffix('-sig')}, with ';'" in printed()


REFUSED_BY_THE_TOOL = {  # a table of the files below (and flags), and what the sentence says
    "image|7": "none of them agree, as zeros are lost in 1, such as ['7']; save this column as",
    "Bild,dx|a,x": "which of ['Bild', 'dx'] has the names? Type --name TITLE",
    "Dataset A|image,dx|a,x": "more words than titles … titles into the first row",
    "image|b|1|a": "'1' may be 2, such as ['x/1.jpg', 'y/1.jpg']; write its path below the folder",
    "image,Patient ID,patient_id|a,x,y": "['Patient ID', 'patient_id'] are one title",
    "image,dx|a,Nevus|b,nevus": "'Nevus' and 'nevus' differ only in form; use one",
    "image,lesion_id,Patient|a,L,P|b,L,Q|,L,R|,L,S": "has 4 … ['P', 'Q', 'R'] … --group 'Patient'",
    "image,patient_id,group|a,P,G": "which of ['patient_id', 'group'] counts? Type --group TITLE",
    "image,dx|a,mole|a.jpg,scar|b,mole": "a.jpg: has two rows that differ",
    'image,dx|a,"mole': "x.csv: cannot be read",
    "PK\3\4": "x.csv: is no text of columns; save it as CSV (in Excel: CSV UTF-8)",
    b"image\n\x81\xff": "is not in UTF-8, UTF-16 or cp1252",
    "image|a ~ --group-by-folder 2": "LEVEL 2: no image is so deep",
    "image|a ~ --group-by-folder 1 --class-by-folder 1": "LEVEL 1: patients and classes need",
    "image,A,B|a,1,male ~ --class A,B": "--class A,B: ['1', 'male'] is not 0 and one 1",
}


@pytest.mark.parametrize("text", REFUSED_BY_THE_TOOL)
def test_the_table_tool_refuses_what_it_would_have_to_guess(empty_folder, refused, text):
    told = REFUSED_BY_THE_TOOL[text]
    text, words = text.split(" ~ ") if " ~ " in str(text) else (text, "")
    photos("a.jpg & b.jpg & x/1.jpg & y/1.jpg & 007.jpg", x_csv=text)
    error = refused("table", "photos", *words.split())
    assert all(part in error for part in told.split(" … "))
    assert len([*Path("photos").iterdir()]) == 6  # nothing is written


CHOICES = [  # tables, the one that is typed, and the one that is read, or why none is
    ("metadata_csv a_csv b.tsv", "", "metadata.csv"),
    ("a_csv b.tsv c.txt d.xlsx x/b_csv", "", "a.csv"),
    ("a_csv x/metadata_csv", "x/metadata.csv", "x/metadata.csv"),
    ("a_csv A.CSV", "", "photos: which table? It has 2, such as ['A.CSV', 'a.csv']; name"),
    ("x/a_csv x/b.tsv", "", "(in its folders: 2, such as ['x/a.csv', 'x/b.tsv']); add the"),
    ("x.xlsx", "", "x.xlsx: is no text of columns"),
    ("a_csv b.tsv", "b.tsv", "b.tsv: is here and in photos; type its whole path"),
    ("metadata_csv a_csv", "a.csv", "metadata.csv: is there already"),
    ("metadata_csv metadata.original_csv", "", "metadata.original.csv: is in the way; rename it"),
]


@pytest.mark.parametrize("tables, typed, told", CHOICES)
def test_the_table_tool_chooses_a_table(empty_folder, capsys, tables, typed, told):
    photos("x/a.jpg", **dict.fromkeys(tables.split(), "image|a"))
    Path("b.tsv").touch()
    status, (out, error) = cli("table", "photos", *typed.split()), capsys.readouterr()
    assert f"read photos/{told}, in utf-8" in out if status == 0 else told in error
    assert (status == 0) == (" " not in told)


@pytest.mark.parametrize("name", ["metadata.csv", "labels.csv"])
def test_the_table_tool_overwrites_nothing_and_does_nothing_twice(empty_folder, printed, name):
    photos("a.jpg & b.jpg", **{name: "image;dx|a;mole|b;scar"})
    want = ["file_name,class", "a.jpg,mole", "b.jpg,scar"]
    assert converted(name) == want and "nothing to be done" not in printed()
    there = {path: path.stat() for path in Path("photos").iterdir()}
    assert converted(name) == want and "nothing to be done" in printed()
    assert {path: path.stat() for path in Path("photos").iterdir()} == there and len(there) == 4
    kept = Path("photos", name.replace("metadata", "metadata.original"))
    assert kept.read_text() == "image;dx\na;mole\nb;scar"
    Path("photos", name).write_text("image;dx\na;scar\nb;scar")
    assert cli("table", "photos", name) == 2


def test_the_table_tool_replaces_a_link_and_does_not_write_through_it(empty_folder):
    photos("a.jpg")
    Path("theirs.csv").write_text("image;dx\na;mole")
    Path("photos/metadata.csv").symlink_to("../theirs.csv")
    assert converted() == ["file_name,class", "a.jpg,mole"]
    assert Path("theirs.csv").read_text() == "image;dx\na;mole"
    assert Path("photos/metadata.original.csv").readlink() == Path("../theirs.csv")


def test_the_table_tool_shows_what_it_took(empty_folder, printed):
    titles = "Image,Diagnosis,class,Patient ID,lesion_id,,Age"
    rows = "w,scar,x,Q,,,7|x,scar,x,Q,,,7|y,scar,x,Q,,,7|z,scar,x,Q,,,7"
    rows = f"1.jpg,mole,x,P,L,,7|2.jpg,mole,x,p,,,7|3.jpg,scar,x,,M,,7|4.jpg,,x,,,,7|{rows}"
    photos(" & ".join(f"{i}.jpg" for i in range(2, 9)) + " & 1.JPG", x_csv=f"{titles}|{rows}")
    converted()
    told = """read photos/x.csv, in utf-8, with ',' between columns
taken: file_name from 'Image', patient_id from 'Patient ID', lesion_id from 'lesion_id', \
class from 'Diagnosis'
not used: ['class', 'Age']
ids that differ only in form: 1, such as ['p is P']
names that are no path below the folder: 1, such as ['1.jpg is 1.JPG']
rows without a file: 4, such as ['w', 'x', 'y']
files without a row, left out: 4, such as ['5.jpg', '6.jpg', '7.jpg']
wrote photos/metadata.csv with 4 images
classes: {'mole': 2, 'scar': 1, 'unknown': 1}
groups: 3
largest groups: 'patient P' 2, 'lesion M' 1
WARNING 1 of 4 images have no id: write it into each row, or type --group TITLE \
(not used: ['class', 'Age']), or --group-by-folder LEVEL
WARNING 1 of 4 rows have no 'Diagnosis': write it there, or type --class TITLE, or A,B for \
columns of 0 and 1 (not used: ['class', 'Age'])
"""
    assert printed() == told
    for titles in (table.NAME, table.CLASS):  # the order that --help promises
        assert f" {', '.join(titles[:-1])} or {titles[-1]}" in table.__doc__


def test_the_table_tool_warns_of_an_id_with_many_images(empty_folder, printed):
    """It may mean unknown, or the column is another: M and F, a number that Excel has shortened."""
    for n, flags, gaps in ((19, "", "big"), (18, "", ""), (19, "--group patient", "")):
        names = [f"{i}.jpg" for i in range(90)]
        rows = [f"{name},m,{i if i >= n else 999}" for i, name in enumerate(names)]
        photos(" & ".join(names), x_csv="image,dx,patient|" + "|".join(rows))
        assert cli("table", "photos", *flags.split()) == 0 and warned(told := printed()) == gaps
        assert f"groups: {91 - n}\nlargest groups: '999' {n}, '{n}' 1, " in told
        Path("photos/metadata.csv").unlink()


# What the folders of a level may be, and how an id may be spelt: in one form, and in others.
FOLDERS = {"class": ["bcc", "mel"], "date": ["2021-03", "2022-11"], "part": ["part_1", "part_2"]}
SURE, LOOSE = "P{} p-{} P_0{}".split(), "P.{} #P{} P/{}".split()


def write_table(meant, columns, spell):
    """labels.csv, with a column of names, and of ids or classes"""
    words = {n: {**one, "patient": spell().format(one["patient"][1:])} for n, one in meant.items()}
    rows = [",".join([name, *map(one.get, columns)]) for name, one in words.items()]
    Path("photos/labels.csv").write_text("\n".join([",".join(["image", *columns]), *rows]))


def as_meant(meant, known):
    """Does the program part the images by patient and by class as they are meant?"""
    read, pairs = {}, {one: set() for one in known}
    for name, (read["class"], group, _) in vqldm.find_images(Path("photos")).items():
        read["patient"] = vqldm.id_form(group[1]) if group else name
        [pairs[one].add((read[one], meant[name][one])) for one in known]
    return all(len(p) == len({a for a, _ in p}) == len({b for _, b in p}) for p in pairs.values())


@pytest.mark.parametrize("seed", range(300))
def test_a_tree_is_read_as_it_is_meant_or_asked_about(empty_folder, printed, seed):
    """It has up to four levels of folders, and a table or none. If nothing is open, there is no
    WARNING. Else there is one, and what it asks for, typed, gives what is meant."""
    draw = random.Random(seed)
    levels, columns = [draw.sample(["patient", *FOLDERS][:n], draw.randint(0, n)) for n in (4, 2)]
    spellings = SURE + LOOSE * (draw.random() < 0.3)
    meant = {}
    for i in range(60):
        image = {k: draw.choice(names) for k, names in FOLDERS.items()} | {"patient": f"P{i % 12}"}
        meant["/".join([*map(image.get, levels), f"{i}.jpg"])] = image
    photos(" & ".join(meant))
    if columns:
        write_table(meant, columns, lambda: draw.choice(spellings))
        assert cli("table", "photos") == 0
    known = {*levels, *columns} & {"patient", "class"}
    good, told = as_meant(meant, known), printed()
    is_open = not good or {*levels} - {"class"} and len(columns) < 2
    assert (good or "WARNING" in told) and (is_open or "WARNING" not in told)
    if not good:
        flags = {"patient": "--group-by-folder", "class": "--class-by-folder"}
        flags = {flags[one]: levels.index(one) + 1 for one in known if one not in columns}
        assert "spell them alike" in told or all(flag in told for flag in flags)
        Path("photos/metadata.csv").unlink(missing_ok=True)
        if columns:
            write_table(meant, columns, lambda: SURE[0])
        assert cli("table", "photos", *sum(flags.items(), ())) == 0 and as_meant(meant, known)
        assert "WARNING" not in printed() or len(known) < 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_tool_ends_as_the_program_does(capsys, monkeypatch, error):
    status, told = (130, "stopped") if error is KeyboardInterrupt else (2, "out of memory")
    works = {"table photos": "convert", "letters": "draw_letters", "classifier run 1 a": "compare"}
    for words, work in works.items():
        monkeypatch.setattr(TOOLS[words.split()[0]], work, Mock(side_effect=error))
        assert cli(*words.split()) == status and f"vqldm: {told}" in capsys.readouterr().err


# ---- tools/letters.py and tools/classifier.py ----------------------------------------------------
def test_letters_draws_a_folder_for_each_class(empty_folder):
    letters.draw_letters("letters", 2)
    classes = sorted(c for c, *_ in vqldm.find_images(Path("letters")).values())
    assert classes == sorted(2 * "ABEFGKPR")
    letters.draw_letters("again", 2)
    one, two = [sorted(Path(folder).rglob("*.png")) for folder in ("letters", "again")]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_the_classifier_gives_all_classes_equal_weight():
    """Two classes overlap, and one is ten times as frequent. Each is found equally often."""
    label = (torch.arange(1100) >= 1000).long()
    x = randn(1100, 1) + 2 * label[:, None]
    found = classifier.found(classifier.fit(x, label, 2), x, label, ["often", "rare"])
    assert found["often"] == pytest.approx(found["rare"], abs=6)


def test_the_classifier_compares_samples_with_duplicates(copy_of, tmp_path, monkeypatch, printed):
    """Stage 2 has photos of its own here. Patient P was trained on, and so is no test, in two of
    them. Classes have equal weight in what is printed."""
    own = shutil.copytree("photos", tmp_path / "own")
    rows = [f"{p.relative_to(own)},{'P' * (p.stem == '0')}" for p in own.rglob("*.bmp")]
    (own / "metadata.csv").write_text("\n".join(["file_name,patient_id", *rows]))
    copy_of("ldm", dict(data=str(own)))
    monkeypatch.setattr(vqldm, "load_lpips", lambda device: "LPIPS")
    monkeypatch.setattr(evaluate, "features", lambda net, x: F.avg_pool2d(x.double(), 8).flatten(1))
    fits, tests = [recorded(monkeypatch, classifier, name) for name in ("fit", "found")]
    assert cli("classifier", tmp_path / "ldm", 4, "scar") == 0
    trained_on = {*bytes_of(fits[0].x)}
    assert len(trained_on) == 31 and {len(call.x) for call in tests} == {4, 17}
    assert all({*bytes_of(call.x)} == trained_on for call in fits[2::2])  # with duplicates
    assert len({*bytes_of([call.x[31:] for call in fits[1::2]])}) == 3  # other samples each time
    told, shares = printed(), [*tests[0].result.values()]
    assert f"photographs alone balanced accuracy {sum(shares) / 2:.1f}" in told
    assert told.count("with samples balanced accuracy") == 3
    assert told.count("with as many duplicates balanced accuracy") == 3


# ---- tools/baseline.py ---------------------------------------------------------------------------
@pytest.fixture()
def narrow_baseline(monkeypatch):
    """tools/baseline.py with narrow networks, if diffusers is there."""
    pytest.importorskip("diffusers")
    narrow = dict(block_out_channels=(8, 8, 8), norm_num_groups=2)
    for form in (baseline.PLAIN, baseline.TUNED):
        monkeypatch.setitem(form, "vq", {**form["vq"], **narrow, "num_vq_embeddings": 16})
        monkeypatch.setitem(form, "unet", {**form["unet"], **narrow})
        monkeypatch.setitem(form, "batch", (4, 5))
    monkeypatch.setattr(baseline, "clock", lambda *a: [(0, 0.0), (1, 0.3), (2, 0.6)])
    few = functools.partial(evaluate.EvaluateConfig, n=3, steps=2)
    monkeypatch.setattr(evaluate, "EvaluateConfig", few)


@pytest.mark.parametrize("words", ["", "--tuned"])
def test_the_baseline_does_the_job_of_a_run(narrow_baseline, trained, monkeypatch, tmp_path, words):
    """On its images, in its symmetries. Three steps of both stages move all of their weights. It is
    measured on what the run has not seen, and draws 64 samples by class."""
    before, copied = {}, lambda call: before.setdefault(call.net, copy.deepcopy(call.net))
    recorded(monkeypatch, vqldm, "descend", copied)
    drawn = recorded(monkeypatch, vqldm, "draw_rows")
    measured = recorded(monkeypatch, evaluate, "measure")
    made = recorded(monkeypatch, baseline, "Model")
    (out := tmp_path / "new").mkdir()
    command = f"baseline --like trained/ldm --minutes 1 1 --out {out} {words}"
    assert cli(*command.split()) == 0 and (out / "metrics.json").is_file()
    for net, old in before.items():
        pairs = zip(net.named_parameters(), old.parameters())
        still = {name for (name, new), p in pairs if torch.equal(new, p)}
        assert still <= {"mid_block.attentions.0.to_k.bias"}  # which softmax does not see
    assert_equal(measured[0].seen, state_of("trained/ldm/last.pt")["seen"])
    assert made[0].k.shape == (30, 8, 8, 8) and made[0].classes == ["mole", "scar"]
    assert drawn[-1].path == out / "grid.png"
    shapes = {name: images.shape for name, images in drawn[-1].rows.items()}
    assert shapes == dict.fromkeys(["mole", "scar"], (32, 3, 32, 32)) and len(before) == 2


@pytest.mark.parametrize("form, weights", [("PLAIN", (0.25, 1)), ("TUNED", (1, 0.25))])
def test_the_tuned_baseline_does_not_swap_the_codebooks_two_losses(narrow_baseline, form, weights):
    coder, z = baseline.Coder(getattr(baseline, form)), randn(2, 3, 8, 8).requires_grad_()
    z_q, loss, _ = coder.codebook(z)
    loss.backward()
    assert_close(z.grad, weights[1] * 2 * (z - z_q).detach() / z.numel())
    moved = coder.codebook.embedding.weight.grad.sum(0)
    assert_close(moved, weights[0] * 2 * (z_q - z).sum((0, 2, 3)).detach() / z.numel())


def test_without_diffusers_the_baseline_says_what_to_install(empty_folder, monkeypatch, refused):
    monkeypatch.setattr(baseline, "VQModel", None)
    assert "type pip install diffusers" in refused(*"baseline --like x --minutes 1 1".split())

"""Appendices B, C and F, until they are joined with test_vqldm.py (then these lines leave)."""

import io, itertools, math, os, re, runpy, shutil, signal, sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from threading import Barrier, Event, local
from types import SimpleNamespace
from typing import get_args
from unittest.mock import Mock, call

import numpy as np
import pytest, torch
import torch.nn.functional as F
from PIL import Image

import test_vqldm
import vqldm

globals().update({k: v for k, v in vars(test_vqldm).items() if not k.startswith(("test_", "__"))})


# ---- B. A folder of images: reading ------------------------------------------------------------
def mesh(height, width, cell):
    """Black and white squares of cell pixels, which are grey from far away."""
    white = (np.indices((height, width)) // cell).sum(0) % 2 * 255
    return np.stack([white] * 3, 2).astype(np.uint8)


def test_the_middle_square_is_scaled_smoothly_and_turned(read):
    """A mesh of single pixels comes out grey, with what lies beside it, red, cut off. One of 4×4
    pixels at four times the size stays a mesh, also if a JPEG is decoded at a part of its size.
    What a camera says that it has turned is turned back."""
    wide, coarse, mirrored = mesh(40, 80, 1), mesh(64, 64, 4), Image.Exif()
    wide[:, :19] = wide[:, 61:] = 255, 0, 0
    for name, pixels in (("wide.png", wide), ("high.png", wide.transpose(1, 0, 2).copy())):
        assert (read(Image.fromarray(pixels), name) - 128).abs().max() < 20
    image = read(Image.fromarray(coarse), "a.jpg", quality=95)
    assert (image[0] - torch.from_numpy(coarse[::4, ::4, 0])).abs().max() < 40
    mirrored[0x0112] = 2
    image = read(picture(), "b.jpg", exif=mirrored)
    assert image[0, 8, 3] < 9 < image[0, 8, 12]  # red is right


@pytest.mark.filterwarnings("error")  # as PIL's of a palette's transparency
def test_what_is_transparent_is_white_whatever_lies_below(read):
    """Below lies green, or grey 150. On the right is blue, or grey 29."""
    colours, grey, alpha = picture(left="lime"), picture("L", 150, 29), picture("L", 0, 255)
    rgba, indexed = Image.merge("RGBA", [*colours.split(), alpha]), colours.quantize()
    key = dict(transparency=indexed.getpixel((0, 0)))
    files = [(rgba, "png", {}), (rgba.convert("PA"), "tif", {}), (indexed, "png", key)]
    files += [(Image.merge("LA", [grey, alpha]), "png", {}), (grey, "png", dict(transparency=150))]
    for i, (im, kind, how) in enumerate(files):
        image = read(im, f"{i}.{kind}", **how)
        assert image[:, 8, 3].tolist() == [255] * 3, (im.mode, kind, how)
        assert image[:, 8, 12].tolist() == ([29] * 3 if im.mode[0] == "L" else [0, 0, 255])


NOT_OPENED = "a.txt .git/x.png b.heic c.HEIF d.avif e.jp2 f.mpo g.jpe .hidden.png a/.b/c/1.png png"


def test_images_are_read_and_all_else_is_passed_over(tmp_path, load, said, monkeypatch):
    """Each in its row. Bad images are named, others not opened, and links to folders, which may
    lead in a circle, not followed."""
    names = "0.bmp 1.gif 2.jpeg 3.jpg 4.png 5.tif 6.tiff 7.webp a/train/8.png".split()
    names += ["b/ä b.JPeG", "z.TIFF"]
    folder = fill(tmp_path / "photos", [*names, "cut.jpg"], size=(200, 200))
    for name, mode in (("0.bmp", "L"), ("4.png", "LA"), ("5.tif", "CMYK"), ("6.tiff", "P")):
        Image.open(folder / name).convert(mode).save(folder / name)
    for name in [*NOT_OPENED.split(), "text.jpg"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("no image")
    (folder / "album.jpg").mkdir()
    for name, target in [("me", "."), ("a/up", "..")] if os.name != "nt" else []:
        (folder / name).symlink_to(target)
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-300])
    Image.new("F", (9, 9)).save(folder / "floats.tiff")  # they would be black
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(folder / "deep.png")
    Image.new("L", (400, 400)).save(folder / "giant.png")  # PIL calls it a bomb
    Image.new("RGB", (9, 9)).save(folder / "x.eps")  # as a .png, no order to start Ghostscript
    (folder / "x.eps").rename(folder / "x.png")
    ghostscript = Mock(side_effect=OSError)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", ghostscript)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200 * 200)
    images = load(folder)
    bad = "cut.jpg deep.png floats.tiff giant.png text.jpg x.png".split()
    assert re.findall(r"WARNING skipped (\S+) \w+\(", said()) == bad and not ghostscript.called
    assert classes_of(images) == ["images"] * 8 + ["a", "b", "images"]
    assert len(images.pixels[:].unique(dim=0)) == 11 and numbered(images, [8, 9, 10]) == [8, 9, 10]


def test_the_cache_sees_all_that_changes_images(tmp_path, load, monkeypatch):
    """One stamp of their files, another folder, class, size, code or Pillow. It is used if nothing
    changed, and refused if it is cut."""
    folder, stat = fill(tmp_path / "all", "a/1.bmp b/1.bmp"), Path.stat
    decoded = recorded(monkeypatch, vqldm, "decode_images")

    def now(folder=folder, **how):
        """-> Images, which must have been decoded the first of two times."""
        decoded.clear(), load(folder, **how)
        images = load(folder, **how)
        assert len(decoded) == 1
        return images

    stamps = "st_mtime_ns", "st_ctime_ns", "st_size", "st_ino"
    for name in ("none", *stamps):
        with monkeypatch.context() as patch:
            alike = {**dict.fromkeys(stamps, 0), name: 7, "st_mode": stat(folder).st_mode}
            alike = SimpleNamespace(**alike)
            patch.setattr(Path, "stat", lambda *a, alike=alike, **how: stat(*a, **how) and alike)
            now()
            assert numbered(now(fill(tmp_path / name, "a/1.bmp b/1.bmp", first=5))) == [5, 6]
    (folder / "metadata.csv").write_text("image,class\na/1.bmp,mole\nb/1.bmp,scar")
    assert now().classes == ["mole", "scar"]
    assert now(size=32).pixels.shape == (2, 3, 32, 32) and load(folder).pixels.shape[2] == 16
    monkeypatch.setattr(vqldm.Image, "__version__", "0")
    now()
    monkeypatch.setattr(vqldm, "read_image", lambda *a: torch.zeros(3, 16, 16).byte())
    assert not now().pixels[:].any()
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(vqldm.UserError, match="cache.*is damaged, delete it"):
        load(folder)


def test_what_cannot_be_read_now_ends_the_run(tmp_path, load, monkeypatch, refused):
    """Lest a class is left out. It is there next time. A lack of memory is no image's fault."""
    locked = PermissionError(13, "no", "out of memory.bmp")
    places = {"os.scandir": locked, "pathlib.Path.read_bytes": locked}
    for place, error in {**places, "PIL.Image.open": MemoryError()}.items():
        folder = fill(tmp_path / place, "a/1.bmp b/1.bmp b/val/2.bmp")
        with monkeypatch.context() as patch:
            patch.setattr(place, Mock(side_effect=error))
            told = refused("train-vq", "--size", 32, "--data", folder, "--out", tmp_path / "vq")
        assert "out of memory" in told and len(load(folder, size=32).labels) == 3


# ---- B. A folder of images: classes and groups -------------------------------------------------
def test_folders_tell_the_class_and_what_is_held_out(tmp_path, load):
    """The class is the innermost folder that is no part of a set. latest, which ends in test, is
    one. In val or test all are held out, in a mixture of classes, elsewhere a tenth."""
    want = {"a.bmp": ("images", False), "testing/a.bmp": ("images", True)}
    for part in "Test testing VALID val validation training Train".split():
        for kind in ("basal cell carcinoma", "latest", "runs"):
            place = f"{part}/x/{kind}" if "i" in part else f"{kind}/{part}"
            held = part not in ("training", "Train")
            want |= {f"{place}/{i}.bmp": (kind, held) for i in range(4)}
    names = sorted(want)
    for i in range(0, len(names), 30):
        fill(tmp_path / "Skin/test", names[i : i + 30], (i, 0, 9))
    images = load(tmp_path / "Skin/test")
    assert classes_of(images) == [want[name][0] for name in names]
    train, val, seen = vqldm.split(images, 0.1)
    for i, name in enumerate(names):
        drawn_by_lot = images.ids[i, 1] % 10 == 0
        assert (i in val) == (want[name][1] or drawn_by_lot) == (i not in train)
    counts = images.labels[val[:20]].bincount(minlength=4)
    assert (counts[[0, 2, 3]] > 2).all()  # in the order of names they would be of one class
    assert torch.equal(seen, images.ids[train].unique())


def cases(text):
    """-> the cells of each case of a table in text. A line that begins with a blank goes on."""
    found = re.split(r"\n(?=\S)", text.strip())
    return [[cell.strip() for cell in case.split("|")] for case in found]


# what is proved | table, with / for a new line | classes of 0, C, a/1 and a/2 | what is told
TABLES = r"""
the first that is filled in any row | isic_id, diagnosis_3, diagnosis_1,dx / 0,,Benign,a / 1, ,Bad
  / 2,NA,,b / C,,Bad | Benign Bad Bad unknown | classes by diagnosis_1 - split by {'image': 4}
the folder, if none is filled | image,dx / 0, / C,N/A / 1,none / 2,Unknown | images images a a
  | classes by folder
titles are exact | image,Diagnosis,color / 0,x,y / C,x,y / 1,x,y / 2,x,y | images images a a | folder
what is named is used | image,dx,patient_id / 0,mole,P / a/1,,P / 1.bmp,,P / 9,x, / 2,scar,NaN
  | mole unknown scar | 2 rows have no file, 1 files no row & by {'patient_id': 2, 'image': 1}
  & 3 images in 2 groups
a name is a path, a name in a folder, or a stem | file_name,image,class / C,0,a / 0.bmp,,b
  / a/1.bmp,,c / 2.bmp,,d | b a c d | 0 rows have no file, 0 files no row
quotes and commas | image,"class" / 0,"a, ""b"" c" / C,b / 1,c / 2,d | a,~"b"~c b c d | by class
patients, else lesions | image,lesion_id,patient_id / 0,L,P / C,M,P / 1,L, / 2,L,NA | images images
  a a | split by {'patient_id': 2, 'lesion_id': 2} & 4 images in 2 groups
who is not known is not one patient, but 0 is one | image,patient_id / 0,unknown / C,N/A / 1,0 / 2,0
  | images images a a | split by {'image': 2, 'patient_id': 2} & 4 images in 3 groups
no column of images | name,dx / 0,scar | refused | none of the columns & only ['name', 'dx']
nothing in it | | refused | none of the columns & only []
a name twice | image / 1 / 0 / 1 | refused | names 1 twice
a file under two names | image / 1 / a/1.bmp | refused | names a/1.bmp twice
two files for one name | image / 0 / 3 | refused | 3 may be any of ['b/3.bmp', 'c/3.bmp']
a quote that never ends | isic_id,dx / 0,a / 1,"b / 2,c | refused | metadata.csv: cannot be read
over csv's limit | isic_id,dx / 0,LONG | refused | metadata.csv: cannot be read
another encoding | isic_id,dx / 0,LATIN | refused | metadata.csv: cannot be read
no image of the folder | image / 9.bmp / 0.BMP / c | refused | or its metadata.csv names none
only a head | image,dx | refused | no images are there"""


def test_metadata_csv_alone_tells_images_and_classes_or_is_refused(tmp_path, load, said):
    """It is as Excel writes it. Other tables are not looked at. What may mean two things ends."""
    for i, (proved, table, classes, told) in enumerate(cases(TABLES)):
        names = "0.bmp C.bmp a/1.bmp a/2.bmp" + " b/3.bmp c/3.bmp" * (classes == "refused")
        folder = fill(tmp_path / str(i), names)
        (folder / "other.csv").write_text("image,class\n0,other\n1,other")
        content = re.sub(r"\s*/\s+", "\n", table).replace("LONG", "x" * 200_000).encode("utf-8-sig")
        (folder / "metadata.csv").write_bytes(content.replace(b"LATIN", b"\xe9"))
        try:
            found, words = classes_of(load(folder)), said()
        except vqldm.UserError as e:
            found, words = ["refused"], str(e)
        assert found == [name.replace("~", " ") for name in classes.split()], proved
        assert all(one in words for one in re.split(r"\s+& ", told)), (proved, words)


# columns, of which each counts before the next | a table's head | its row of image i | groups
ORDER = """
file_name isic_id image_id image_name image | {1},{0},class | 9,{0},x{0} | 9
diagnosis_3 diagnosis_1 dx diagnosis class label target | image,{1},{0} | {0},{1},x{0} | 9
patient_id lesion_id | image,{1},{0},class | {0},P{1},{2},x{0} | 3"""


def test_columns_are_looked_for_in_their_order(tmp_path, load):
    """Though the first of two stands behind the other."""
    folder = fill(tmp_path / "all", bmps(range(9)))
    for columns, head, row, groups in cases(ORDER):
        for first, second in itertools.pairwise(columns.split()):
            table = [row.format(i, i % 2, i // 3) for i in range(9)]
            table = "\n".join([head.format(first, second), *table])
            (folder / "metadata.csv").write_text(table)
            images = load(folder)
            assert classes_of(images) == [f"x{i}" for i in range(9)], table
            assert len(images.ids[:, 1].unique()) == int(groups), table


# ---- B. A folder of images: what is held out ---------------------------------------------------
def test_a_share_of_groups_is_held_out_whole(tmp_path, load, monkeypatch):
    """Of patients, else lesions, else contents, by the digits of their number, so alike in any
    process, whatever the order of rows and other files, and a larger share contains the smaller.
    At 0 it is only folders. Each of 300 photographs has a copy, and some of these move or leave."""
    monkeypatch.setattr(vqldm, "read_image", lambda *a: torch.zeros(3, 2, 2).byte())
    group = {i: f"P{i // 2},L{i // 3}" if i < 110 else f",L{i // 3}" for i in range(222)}
    files = {f"{folder}{i:03}.bmp": i for i in range(300) for folder in ("", "copies/")}
    changed = {name: i for name, i in reversed(files.items()) if i % 10 != 7 or "/" in name}
    changed = {name.replace("s/", "s/new" * (i % 10 == 6)): i for name, i in changed.items()}
    sides, shares = [], (0, 0.1, 0.2, 0.25, 0.5)
    for numbers in ({**files, "val/x.bmp": 999}, {"val/x.bmp": 999, **changed}):
        folder, rows = fill(tmp_path / str(len(numbers))), ["file_name,patient_id,lesion_id"]
        for name, i in numbers.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"%d" % i)
            rows.append(f"{name},{group.get(i, ',')}")
        (folder / "metadata.csv").write_text("\n".join(rows))
        images, number = load(folder), [numbers[name] for name in sorted(numbers)]
        for share in shares:
            _, val, _ = vqldm.split(images, share)
            sides.append({number[row] for row in val})
            assert sum(i in sides[-1] for i in number) == len(val)  # all copies are on one side
    assert sides[0] == {999} and sides[:5] == sides[5:]
    for share, smaller, larger in zip(shares[1:], sides, sides[1:]):
        assert smaller < larger
        for start, stop, size in ((0, 110, 2), (111, 222, 3), (222, 300, 1)):
            assert abs(len(larger & {*range(start, stop)}) / (stop - start) - share) < 0.15
            for i in range(start, stop, size):
                assert len({j in larger for j in range(i, i + size)}) == 1
    for i in range(111, 222):
        last = vqldm.digest(("lesion_id", f"L{i // 3}")) % 10
        assert (i in sides[1]) == (last == 0) and (i in sides[2]) == (last < 2)


def change_folder(folder, change):
    """What may happen to a folder of 30 images between two runs. A new image is always held out."""
    if "lesions" in change:
        rows = "".join(f"{i},{i % 9}\n" for i in range(99))
        (folder / "metadata.csv").write_text("isic_id,lesion_id\nnew,99\n" + rows)
    if "more" in change:
        fill(folder / "val", bmps(range(30, 37)), first=30)
    if "test set" in change:
        (folder / "test").mkdir()
        for name in bmps(range(0, 30, 3)):
            (folder / name).rename(folder / "test" / name)
    if "copies" in change:
        shutil.copytree(folder, folder / "val" / "b")
    fill(folder, "val/new.bmp", (200, 0, 0))


def test_nothing_that_was_ever_trained_on_is_held_out(tmp_path, load):
    """Neither trained images, nor their copies, nor other photographs of their lesions, however
    the folder changes. And it is remembered, though its files are gone."""
    for change in ("lesions", "more of these lesions", "a test set", "copies"):
        folder, n = fill(tmp_path / change, bmps(range(30))), 9 if "lesions" in change else 999
        first = load(folder)
        train, _, seen = vqldm.split(first, 0.1)
        trained = numbered(first, train)
        change_folder(folder, change)
        after = load(folder)
        again, val, seen_after = vqldm.split(after, 0.1, seen)
        known = numbered(after, after.known(seen).nonzero().flatten())
        assert {*trained} <= {*known} and {i % n for i in known} == {i % n for i in trained}
        held = {*numbered(after, val)}
        assert 200 in held and not {i % n for i in held - {200}} & {i % n for i in trained}, change
        assert torch.isin(after.ids[again], seen_after).all()
        for path in [path for i in trained[:9] for path in folder.rglob(f"{i}.bmp")]:
            path.unlink()
        for before in (seen, seen_after):
            assert torch.isin(before, vqldm.split(load(folder), 0.1, before)[2]).all()


def test_what_either_stage_saw_is_never_measured_and_never_forgotten(calm, tmp_path, monkeypatch):
    """Stage 2 and evaluate hold out what stage 1 has held out. A resume remembers all it saw, and
    the scale that its network knows, though files are lost, or renamed in a folder val."""
    photos, vq, ldm = shutil.copytree("photos", tmp_path / "all"), tmp_path / "vq", tmp_path / "ldm"
    splits, unseen = [recorded(monkeypatch, vqldm, name) for name in ("split", "unseen_images")]
    words = "--held-out", 0.4, "--data", photos, "--epochs", 1
    first = train("vq", vq, *words)
    second = train("ldm", ldm, "--vq", vq, "--epochs", 1)
    assert cli("evaluate", "--ckpt", ldm, "--n", 2) == 0
    (rows, val, seen), (again, _, _) = [call.result for call in splits]
    assert torch.equal(rows, again) and 12 < len(rows) < 30  # of 36
    assert sorted(unseen[0].result[0].tolist()) == sorted(val.tolist())
    moved = sorted(photos.glob("train/*/2?.bmp"))
    for i, path in enumerate(moved):
        path.rename((photos / "val/mole" if i % 2 else tmp_path) / f"again{i}.bmp")
    for stage, state, place in (("vq", first, vq), ("ldm", second, ldm)):
        assert cli(f"train-{stage}", "--resume", "--epochs", 3, "--out", place) == 0
        grown = state_of(place / "last.pt")
        assert grown["step"] > state["step"] and torch.equal(grown["seen"], seen)
        held = splits[-1].images.ids[splits[-1].result[1]]
        assert len(held) and not torch.isin(held, seen).any()
    assert torch.equal(grown["scale"], second["scale"])


def test_stage_2_can_have_images_of_its_own(calm, tmp_path, said):
    """With its own classes. What stage 1 saw is known here as well. Of which step stage 1 is, is
    told. A class without an image to train on is no matter for stage 1, which names it."""
    few = fill(tmp_path / "few", [f"{c}/{i}.bmp" for c in "ab" for i in range(9)], (9, 9, 9))
    fill(few, [f"val/{c}/{i}.bmp" for c in "ab" for i in range(4)], (99, 9, 9))
    shutil.copy(next(Path("photos/train/mole").iterdir()), few / "val/a/seen.bmp")
    state = train("ldm", tmp_path / "ldm", "--epochs", 1, "--data", few)
    told = said()
    assert "calm/vq/last.pt at step 12" in told.replace(os.sep, "/") and "WARNING" not in told
    assert state["classes"] == ["a", "b"]
    assert torch.isin(state_of("calm/vq/last.pt")["seen"], state["seen"]).all()
    assert cli("evaluate", "--ckpt", tmp_path / "ldm", "--n", 4) == 0
    assert re.search("to measure on: 1[0-3] unseen images", said())
    fill(few, "val/wart/0.bmp", (150, 9, 9))
    train("vq", tmp_path / "vq", "--epochs", 1, "--data", few)
    assert "WARNING no image to train on of the classes wart\n" in said()


# ---- C. Keeping a run: stop and resume ---------------------------------------------------------
def handlers():
    """Do Ctrl-C and SIGTERM do what they usually do?"""
    found = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    return [a == b for a, b in zip(found, (signal.default_int_handler, signal.SIG_DFL))]


@pytest.mark.parametrize("case", ["vq 0 INT", "vq 5 TERM", "vq 11 INT", "ldm 2 INT", "ldm 9 TERM"])
def test_stopped_and_resumed_is_the_undisturbed_run(calm, tmp_path, monkeypatch, said, case):
    """Bit for bit. A signal in this step ends the run after it, Ctrl-C after that would end it at
    once, and then both do again what they did. What to type is told, with a folder that can be
    pasted. The run may be moved, and stage 2 goes on with its own VQGAN, whatever --vq holds."""
    stage, stop, number = case.split()
    number, stop, second = getattr(signal, f"SIG{number}"), int(stop), []
    out, vq = tmp_path / "a run", shutil.copytree("calm/vq", tmp_path / "vq")

    def ask(call):
        if call.step == stop:
            signal.raise_signal(number)
            second.append(handlers())

    with monkeypatch.context() as patch:
        recorded(patch, vqldm, "next_rows", ask)
        words = [*STAGES[stage], "--out", out, *["--vq", vq][: 2 * (stage == "ldm")]]
        assert cli(*words) == 128 + number
    assert second == [[True, False]] and all(handlers())
    assert state_of(out / "last.pt")["step"] == stop + 1
    told = said().splitlines()[-1]
    assert ("add --resume" in told) == (stop < 11) and told.endswith(f" '{out}'")
    shutil.rmtree(vq)
    moved = out.rename(tmp_path / "moved")
    assert cli(STAGES[stage][0], "--resume", "--out", moved) == 0
    one, two = [state_of(Path(folder, "last.pt")) for folder in (f"calm/{stage}", moved)]
    for state in (one, two):  # the same in all but place and time
        state["config"].update(out="", vq="", resume=0, epochs=0)
    assert [part for part in one.keys() | two.keys() if not same(one[part], two[part])] == []
    assert Path(f"calm/{stage}/log.json").read_bytes() == (moved / "log.json").read_bytes()
    assert not out.exists()


def test_a_finished_run_stays_as_it_is_or_grows(calm, copy_of, tmp_path, monkeypatch):
    """It had three epochs of four steps. Other files in its folder stay, photographs may have
    moved, and a checkpoint is on the disk before it has its name."""
    out, photos = copy_of("ldm"), shutil.copytree("photos", tmp_path / "moved")
    (out / "metrics.json").write_text("somebody's")
    bars, order = recorded(monkeypatch, vqldm, "bar"), []
    for name in ("fsync", "replace"):
        recorded(monkeypatch, os, name, lambda call, name=name: order.append(name))
    for epochs, steps, data in ((3, 0, "photos"), (3.5, 2, photos)):
        bars.clear()
        words = "train-ldm --resume --guidance 2 --out".split()
        assert cli(*words, out, "--epochs", epochs, "--data", data) == 0
        old, new = state_of("calm/ldm/last.pt"), state_of(out / "last.pt")
        assert new["step"] == 12 + steps
        assert same(new["ema"], old["ema"]) == (steps == 0)
        assert [call.total for call in bars if call.name == "training"] == [steps]
        changed = {name for name in old["config"] if old["config"][name] != new["config"][name]}
        assert changed - {"epochs"} == {"resume", "guidance", "out", "data"}
        assert new["config"]["data"] == os.path.abspath(data)
    assert (out / "metrics.json").read_text() == "somebody's"
    assert len(order) > 4 and order == ["fsync", "replace"] * (len(order) // 2)


def another(field, value):
    """-> a value of a setting as it can be typed, which is not this one. Flags need none."""
    if field.type is bool:
        return []
    if get_args(field.type):
        return [next(one for one in get_args(field.type) if one != value)]
    if isinstance(value, (int, float)):
        return [value // 2 or 1 if isinstance(value, int) else value / 2 or 1]
    return ["9,9,9"] if isinstance(value, tuple) else ["elsewhere"]


def test_a_resume_changes_only_what_it_can(copy_of, refused):
    """Images may have moved, a run may grow, and samples be made in another way. Of all others,
    each alone is refused with what was recorded."""
    may_change = {"resume", "out", "device", "data", "epochs"}
    may_change |= {"sampler", "steps", "guidance", "class_guidance"}
    for stage, cls in (("vq", vqldm.VQConfig), ("ldm", vqldm.LDMConfig)):
        out = copy_of(stage)
        config = state_of(out / "last.pt")["config"]
        assert config.keys() == {field.name for field in fields(cls)}
        for field in fields(cls):
            value = config[field.name]
            flag = [f"--{field.name.replace('_', '-')}", *another(field, value)]
            if field.name not in may_change:
                words = f"train-{stage}", "--resume", "--out", out, *flag
                assert f": {field.name} was {value}\n" in refused(*words)
            elif field.name not in ("resume", "out"):
                typed = vars(vqldm.parser_of(f"train-{stage}", cls).parse_args(map(str, flag)))
                cfg, _ = vqldm.settle(cls, {**typed, "resume": True, "out": str(out)})
                assert getattr(cfg, field.name) == typed[field.name] != value
    words = "train-vq --resume --codes 9 --size 32 --seed 1 --lr .002 --out"
    assert ": codes was 16, lr was 0.001, seed was 0\n" in refused(
        *words.split(), out.parent / "vq"
    )


def test_a_resume_without_what_it_began_with_is_refused(copy_of, monkeypatch, refused):
    """Steps, classes, or LPIPS, which is here now. Nothing is written."""
    monkeypatch.setattr(vqldm, "load_lpips", lambda device: Mock())
    for stage, epochs, told, parts in (
        ("vq", 2, "fewer --epochs", {}),
        ("ldm", 4, "classes", dict(classes=["mole", "wart"])),
        ("vq", 4, "LPIPS", dict(lpips=True)),
        ("vq", 4, "LPIPS", dict(config=dict(lpips_weight=0.1))),
    ):
        folder = copy_of(stage, **parts)
        before = (folder / "last.pt").read_bytes()
        assert told in refused(f"train-{stage}", "--resume", "--epochs", epochs, "--out", folder)
        assert (folder / "last.pt").read_bytes() == before
        shutil.rmtree(folder)


# ---- C. Keeping a run: checkpoints -------------------------------------------------------------
class Code:
    """Pickled, this is an order to make a folder."""

    def __reduce__(self):
        return os.mkdir, ("trace",)


BROKEN = {  # what last.pt holds, made from the dict in a whole one
    "empty": lambda s: b"",
    "text": lambda s: b"hello",
    "a list": lambda s: [1, 2],
    "code": lambda s: dict(s, more=Code()),
    "foreign": lambda s: dict(weights=s["model"]),
    "alien": lambda s: dict(s, config=dict(s["config"], beyond=1)),
    "older": lambda s: dict(s, version=s["version"] - 1),
}
for name in ("version", "stage", "config"):
    BROKEN["no " + name] = lambda s, name=name: {part: s[part] for part in s.keys() - {name}}


def test_a_checkpoint_not_ours_or_not_whole_is_refused(calm, elsewhere, refused):
    """And runs no code. One of the other stage is told to be it, and a whole one is taken."""
    for stage, other, words in (
        ("vq", "ldm", "train-vq --resume --out bad"),
        ("vq", "ldm", "train-ldm --out new --vq bad"),
        ("ldm", "vq", "sample --n 1 --out new --ckpt bad/last.pt"),
    ):
        whole = calm.folder / "calm" / stage / "last.pt"
        path = fill(Path("bad")) / "last.pt"
        path.write_bytes(whole.read_bytes()[:-5000])
        assert "is no checkpoint of this version" in refused(*words.split()), "cut"
        for how, change in BROKEN.items():
            content = change(state_of(whole))
            path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
            assert "is no checkpoint of this version" in refused(*words.split()), how
        shutil.copy(calm.folder / "calm" / other / "last.pt", path)
        assert "belongs to the other stage" in refused(*words.split())
        shutil.copy(whole, path)
        assert vqldm.load_checkpoint("bad", "--x", stage)["step"] == 12
        assert not Path("trace").exists() and not Path("new").exists()


def test_what_fails_harms_no_checkpoint(calm, copy_of, tmp_path, monkeypatch, refused, capsys):
    """A full disk, as torch reports it, or memory, is one sentence. No half of a file is left, and
    a folder that could not be begun can be. Another mistake is none of these, and then signals do
    again what they did. Ctrl-C outside of training ends at once."""
    out, new = copy_of("vq"), [*STAGES["vq"], "--out", tmp_path / "new"]
    before = (out / "last.pt").read_bytes()
    full = ("torch.save", RuntimeError("[enforce fail at inline_container.cc] No space"))
    for place, error in (full, *[("vqldm.augment", error) for error in vqldm.NO_MEMORY]):
        with monkeypatch.context() as patch:
            patch.setattr(place, Mock(side_effect=error))
            told = "No space" if "save" in place else "out of memory"
            assert told in refused("train-vq", "--resume", "--epochs", 4, "--out", out)
            assert (out / "last.pt").read_bytes() == before
            assert told != "No space" or told in refused(*new)
        assert not [*tmp_path.glob("*/.*")]
    assert not (tmp_path / "new/last.pt").exists()
    monkeypatch.setattr(vqldm, "augment", Mock(side_effect=RuntimeError("memory leak")))
    with pytest.raises(RuntimeError, match="leak"):
        cli(*new)
    assert all(handlers())
    monkeypatch.setattr(vqldm, "read_images", Mock(side_effect=KeyboardInterrupt))
    assert cli(*STAGES["vq"], "--out", tmp_path / "x") == 130 and not (tmp_path / "x").exists()
    assert capsys.readouterr().err == "vqldm: stopped\n"


def test_of_two_starts_in_one_folder_the_second_fails(calm, tmp_path, monkeypatch, refused):
    """Though it looked there before the other's first save. A late process of torchrun is no
    second start. Later saves replace the first, and nothing is left beside it."""
    vq, out, path = tmp_path / "vq", fill(tmp_path / "samples"), tmp_path / "new/last.pt"

    def meanwhile(name, other):
        monkeypatch.setattr(vqldm, name, lambda *a: (other(), getattr(ORIGINAL, name)(*a))[1])

    meanwhile("read_images", lambda: shutil.copytree("calm/vq", vq))
    assert "another run" in refused(*STAGES["vq"], "--out", vq)
    assert (vq / "last.pt").read_bytes() == Path("calm/vq/last.pt").read_bytes()
    meanwhile("restore_ldm", lambda: (out / "metadata.csv").write_text("the other's"))
    assert "another run" in refused("sample", "--ckpt", "calm/ldm", "--out", out)
    assert [one.read_text() for one in out.iterdir()] == ["the other's"]
    vqldm.write_whole(path, 1, new=True)
    with pytest.raises(FileExistsError):
        vqldm.write_whole(path, 2, new=True)
    assert state_of(path) == 1
    vqldm.write_whole(path, 3)
    assert state_of(path) == 3 and [*path.parent.iterdir()] == [path]
    monkeypatch.setattr(vqldm, "RANK", 1)
    assert vqldm.settle(vqldm.VQConfig, {"out": str(vq)})


def test_looks_come_at_tenths_and_each_ten_minutes(calm, tmp_path, monkeypatch, refused):
    """What is done is saved before a look draws, and again with what it measured, lest a power
    cut, or a picture that cannot be drawn, costs more."""
    with monkeypatch.context() as patch:
        patch.setattr(vqldm, "draw_rows", Mock(side_effect=[None, OSError(28, "No space")]))
        assert "No space" in refused(*STAGES["vq"], "--epochs", 2.5, "--out", tmp_path)
    assert state_of(tmp_path / "last.pt")["step"] == 2  # of 10, as 8 of the 30 images are a step
    run = vqldm.Run.__new__(vqldm.Run)
    run.step, run.steps, run.log, run.line, run.looked, saved = 0, 45, [], Mock(), 0, []
    run.cfg = SimpleNamespace(folder=tmp_path)
    run.save = lambda: saved.append((run.step, run.log[-1:] and run.log[-1].get("look_b")))
    monkeypatch.setattr("time.perf_counter", lambda: 1201 if run.step >= 12 else 600)
    for _ in range(45):
        if run.end_step({"a": torch.tensor(2.0)}):
            run.end_look({"b": run.step})
    looks = [5, 9, 12, 14, 18, 23, 27, 32, 36, 41, 45]
    assert [step for step, _ in saved] == sorted(2 * looks)
    assert [measured for _, measured in saved[1::2]] == looks
    assert [row["step"] for row in run.log if "a" in row] == [10, 20, 30, 40]


# ---- C. Keeping a run: several processes, and what can go wrong --------------------------------
class TwoProcesses:
    """Two threads stand in for them. The second starts when the first waits for it, in its first
    all_reduce. By then the first has made its networks, for which both need torch's one seed. This
    is also RANK, the number of the thread's process."""

    def __init__(self, patch):
        self.mine, self.meeting, self.waits = local(), Barrier(2), Event()
        self.given = [None, None]
        beside(patch)
        patch.setattr(vqldm, "RANK", self)
        patch.setattr(vqldm.dist, "all_reduce", self.all_reduce)
        for owner, name in ((vqldm.dist, "init_process_group"), (vqldm, "signal")):
            patch.setattr(owner, name, lambda *a: None)  # signal is for the main thread alone
        patch.setattr(vqldm.dist, "destroy_process_group", lambda: None)
        patch.setattr(torch.cuda, "is_available", lambda: False)

    def __index__(self):
        return self.mine.rank

    def __eq__(self, other):
        return self.mine.rank == other

    def all_reduce(self, x):
        self.given[self.mine.rank] = x.clone()
        self.waits.set()
        self.meeting.wait(60)
        x.copy_(self.given[0] + self.given[1])
        self.meeting.wait(60)

    def process(self, rank, words):
        self.mine.rank = rank
        return cli(*words)

    def run(self, words):
        """A command in both -> their exit statuses."""
        with ThreadPoolExecutor() as pool:
            first = pool.submit(self.process, 0, words)
            assert self.waits.wait(60)
            second = pool.submit(self.process, 1, words)
            return [first.result(), second.result()]


ALIKE = "--muon-lr 0 --gan-start 0 --lam-max 1e4 --d-lr .001 --data synthetic --n-images 90"


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_end_with_the_weights_of_one(calm, tmp_path, monkeypatch, said, stage):
    """Only the first speaks, looks and saves. (No Muon, which enlarges rounding.)"""
    words = ["--balance", "--epochs", 1]
    if stage == "vq":
        words = [*ALIKE.split(), "--batch-size", 20, "--epochs", 1]
    one = train(stage, tmp_path / "one", *words)
    told_by_one = said()
    two, saved_by = TwoProcesses(monkeypatch), []
    recorded(monkeypatch, vqldm, "write_whole", lambda call: saved_by.append(two.mine.rank))
    assert two.run([*STAGES[stage], *words, "--out", tmp_path / "two"]) == [0, 0]
    assert {*saved_by} == {0}
    heads = [re.sub(r"look:.*|/(one|two)", "", told).splitlines() for told in (told_by_one, said())]
    assert heads[0] == heads[1] and len(heads[0]) > 6
    state = state_of(tmp_path / "two/last.pt")
    for part in {"model", "disc", "ema", "young"} & one.keys():
        for name, a in one[part].items():
            b = state[part][name] * (2 if name == "codebook.wins" else 1)  # each counted its half
            assert (a - b).norm() <= 1e-3 * a.norm() + 1e-5, (part, name)


def test_processes_of_torchrun_train_each_on_its_gpu(elsewhere, monkeypatch, refused):
    """They meet after each took the GPU of its number, and a signal to one stops all. Other
    commands are for one process, and a batch must be a multiple of their number."""
    did = Mock()
    with monkeypatch.context() as patch:
        beside(patch)
        patch.setenv("LOCAL_RANK", "3")
        patch.setattr(vqldm.dist, "init_process_group", did.meet)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "set_device", did.take)
        assert cli("sample", "--help") == 0
    assert did.mock_calls == [call.take(3), call.meet()]
    for mine, other in ((0, 0), (0, 15), (2, 0), (2, 15)):
        with monkeypatch.context() as patch:
            beside(patch, float(other))
            run = vqldm.Run.__new__(vqldm.Run)
            run.step, run.steps, run.signal = 7, 8, mine
            assert next(iter(run), "stopped") == (7 if mine == other == 0 else "stopped")
    monkeypatch.setattr(vqldm, "WORLD", 3)
    for command in ("sample", "evaluate"):
        assert "torchrun is for training" in refused(command)
    words = "train-vq --size 32 --n-images 60 --lpips-weight 0 --out new --batch-size 8"
    assert "--batch-size" in refused(*words.split()) and not Path("new").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_bad_batches_are_skipped(calm, tmp_path, monkeypatch, said, stage):
    """Whatever they are in the way of: no weight is spoiled, and the step is counted."""
    bad, owner, name = {2, 4, 6, 7, 8, 9, 10}, vqldm, "augment"
    if stage == "ldm":
        owner, name = vqldm.LatentDiffusion, "to_latents"
    begun, make = recorded(monkeypatch, vqldm, "next_rows"), getattr(owner, name)

    def spoiled(*a):
        step = begun[-1].step if begun else -1
        return make(*a) * (math.nan if step in bad else 1)

    monkeypatch.setattr(owner, name, spoiled)
    state = train(stage, tmp_path)
    of_disc = 5 * (stage == "vq")  # D takes part in the last seven steps
    assert said().count("is skipped") == len(bad) + of_disc
    assert state["step"] == 12
    assert all(p.isfinite().all() for p in state["model"].values())


# ---- F. Commands -------------------------------------------------------------------------------
# command | mistakes, of which the first word, up to =, stands in the sentence
MISTAKES = """
train-vq | --epoch 3 & --batchsize=4 & 5 & --overwrite & --preset huge & --resume & --size
  & --size 1.5 & --size 40 & --size 48 --widths 8,8,8,8,8 & --held-out .6 & --held-out -0.1
  & --turns upright & --epochs 0 & --epochs nan & --widths 16,x & --widths 16,0 & --lr nan & --lr -1
  & --batch-size -8 & --device cuda:77 & --device abacus & --lpips-weight x & --data= & --gan-weight
  & --data nowhere & --data empty & --data free & --out free/a.bmp --n-images 20 & --out {vq}
  & --resume --out {vq} --codes 9
train-ldm --vq {vq} | --vq nowhere & --vq {ldm} & --widths 8,8,8,8 & --target x0 & --ema 7 & --T 0
  & --schedule quadratic & --guide told & --out {ldm} & --data split & --data few & --n-images 9
sample --ckpt {ldm} | --sampler dpm & --class wart & --guidance x & --steps 0 & --n 0 & --ckpt {vq}
  & --ckpt empty & --ckpt ~no-such-user/x & --data photos & --out {vq}
evaluate --ckpt {ldm} | --ckpt nowhere & --ckpt {vq} & --n 0 & --n 1 & --data nowhere & --data empty
  & --data free & --class wart & --images empty & --resume"""


def test_every_mistake_is_one_sentence_and_nothing_is_written(calm, elsewhere, refused):
    """Nor is a run overwritten. Folders have no image, too few to hold one out, or a class that is
    held out alone."""
    folders = {"empty": "", "free": "a.bmp", "few": "0.bmp 1.bmp", "split": "a/0.bmp val/b/3.bmp"}
    for name, names in folders.items():
        fill(Path(name), names)
    runs = {stage: calm.folder / "calm" / stage for stage in STAGES}
    before = {path: path.read_bytes() for run in runs.values() for path in run.iterdir()}
    for command, mistakes in cases(MISTAKES):
        for mistake in re.split(r"\s+& ", mistakes):
            words = f"{command} {mistake}".format(**runs).split()
            words[1:1] = ["--out", "out"] if command[0] != "e" else []  # evaluate needs none
            told = refused(*words)
            assert re.split("[ =]", mistake)[0] in told, told
            assert {path.name for path in Path(".").iterdir()} <= {*folders, "cache"}, mistake
    assert before == {path: path.read_bytes() for run in runs.values() for path in run.iterdir()}


def test_help_shows_every_flag_with_its_own_meaning_and_default(monkeypatch, said):
    """Also on a console that lacks its letters, and each command is named if none is typed."""
    monkeypatch.setenv("COLUMNS", "300")
    own = {"train-vq": "widths.*16,32,64", "train-ldm": "widths.*UNet"}
    for command, words in {**own, "sample": "n .*all classes", "evaluate": "n .*unseen"}.items():
        assert cli(command, "--help") == 0
        shown = said()
        assert re.search(rf"^ +--{words}", shown, re.M)
        for field in fields(vqldm.COMMANDS[command][0]):
            flag, default = field.name.strip("_").replace("_", "-"), str(field.default)
            if command in ("sample", "evaluate") and field.name in vqldm.Sampling.__annotations__:
                default = "as trained"
            if isinstance(field.default, tuple):  # as it can be typed
                default = ",".join(map(str, field.default))
            line = rf"^ +--{flag}( [\w-]+| {{.*}})?\n? +\S.{{7,}} \[{re.escape(default)}\]$"
            assert re.search(line, shown, re.M), flag
    for words, told in (["train-vq", "--help"], "--codes"), ([], ", ".join(vqldm.COMMANDS)):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
        monkeypatch.setattr(sys, "argv", ["vqldm.py", *words])
        with suppress(SystemExit):
            runpy.run_path(vqldm.__file__, run_name="__main__")
        sys.stdout.seek(0)
        assert told in sys.stdout.read()


@pytest.fixture()
def settings_of(monkeypatch):
    """A function that types a command, which does nothing -> the settings that it was given."""
    given = []
    for name, (cls, _) in [*vqldm.COMMANDS.items()]:
        monkeypatch.setitem(vqldm.COMMANDS, name, (cls, lambda cfg, *a: given.append(cfg)))

    def call(words):
        assert cli(*words.split()) == 0, words
        return given.pop()

    return call


# what is typed | some settings that the command then has
SETTLED = """
train-vq --out new | codes 2048 & epochs 3 & widths (16,~64) & resume False & data synthetic
train-vq --out new --preset tiny | codes 64 & epochs 4 & seed 0 & widths (16,~32)
train-vq --out new --codes 9 --preset tiny --seed 3 | codes 9 & epochs 4 & seed 3
train-vq --out new --preset report --device cpu | upsample transposed & codes 2048 & device cpu
train-ldm --out new --preset tiny | T 200 & steps 50 & unconditional False & codes missing
train-ldm --out new --preset report | unconditional True & target eps & sampler ddpm & steps 1000
train-vq --resume --out vq | codes 16 & epochs 3.0 & preset tiny & out vq & resume True
train-vq --resume --out vq --preset tiny --epochs 7 --codes 16 | codes 16 & epochs 7.0
train-ldm --resume --out ldm --steps 9 | steps 9 & T 3 & widths (8,) & guidance 1.5
sample --ckpt ldm --class é | steps 3 & class_ é & n 64 & sampler ddim & seed 0
sample --ckpt ldm/last.pt --steps 9 --seed 4 | steps 9 & seed 4 & class_guidance 1.5
evaluate --ckpt ldm --guidance 2 | guidance 2.0 & steps 3 & n 500 & data"""


def test_typed_beats_recorded_beats_preset_beats_default(copy_of, elsewhere, settings_of):
    """And each command looks where the one before it writes."""
    copy_of("ldm"), copy_of("vq", config=dict(preset="tiny"))
    for words, want in cases(SETTLED):
        cfg = settings_of(words)
        for one in want.split(" & "):
            name, value = [*one.split(), ""][:2]
            assert str(getattr(cfg, name, "missing")) == value.replace("~", " "), (words, one)
    assert vqldm.VQConfig().folder == Path(vqldm.LDMConfig().vq)
    assert vqldm.LDMConfig().folder == Path(vqldm.SampleConfig().ckpt)
    assert vqldm.SampleConfig().ckpt == vqldm.EvaluateConfig().ckpt


# ---- README and NOTES --------------------------------------------------------------------------
HERE = Path(vqldm.__file__).parent
README, NOTES, SOURCE = [
    (HERE / name).read_text(encoding="utf8")
    for name in ("README.md", ".github/NOTES.md", "vqldm.py")
]


def blocks(kind, text):
    """-> the blocks of code of this kind in a page."""
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.M | re.S)


def test_every_command_in_readme_and_notes_can_be_typed(elsewhere, monkeypatch, settings_of):
    """And each flag that README names is one. No block has a comment, since zsh, the shell of a
    Mac, takes it as an argument. README's columns, in rows of images, classes and groups, are some
    of those that are read."""
    known = {"vq": {"settings": vqldm.VQConfig()}, "ldm": {"settings": vqldm.LDMConfig()}}
    monkeypatch.setattr(vqldm, "load_checkpoint", lambda where, flag, stage: known[stage])
    lines = "".join(blocks("sh", README + NOTES))
    assert "#" not in lines
    typed = re.findall(r"python3? +vqldm\.py +([^\n&]+)", lines)
    for words in typed:
        settings_of(words)
    assert [words.split()[0] for words in typed[:3]] == [*vqldm.COMMANDS][:3]
    flags = [vqldm.parser_of(name, cls).format_help() for name, (cls, _) in vqldm.COMMANDS.items()]
    flags = {*re.findall(r"--[\w-]+", "".join(flags)), "--index-url"}
    assert {*re.findall(r"(?<![\w-])--[a-z][\w-]+", README)} <= flags
    (table,) = re.findall(r"^\| column \|.*\n((?:\|.*\n)+)", README, re.M)
    rows = [re.findall("`(.*?)`", row.split("|")[1]) for row in table.splitlines()[1:]]
    for row, names in zip(rows, (vqldm.NAME, vqldm.CLASS, vqldm.GROUP), strict=True):
        assert row and {*row} <= {*names}


def test_the_python_of_readme_and_notes_runs(copy_of, elsewhere, monkeypatch, said):
    """README's runs, or is of the program. Of NOTES' the first writes folders of images for other
    metrics, the second trains a classifier. The rest are Python at least."""
    fill(Path("runs"))
    copy_of("ldm", classes=["mole", "nevus-like"]).rename("runs/ldm")
    (excerpt, example), there = blocks("python", README), {}
    code = [re.sub(" *#.*", "", text) for text in (excerpt, SOURCE)]
    assert re.sub("^\n+", "", code[0]) in re.sub("\n+", "\n", code[1])
    exec(example, there)
    assert there["images"].shape == there["recon"].shape == (4, 3, 32, 32)
    for block in blocks("python", NOTES):
        compile(block, "NOTES", "exec")
    folders, useful = blocks("python", NOTES)[:2]
    exec(folders.replace("300", "3"), there)
    for name in ("real", "recon", "samples"):
        assert len([*Path("folders", name).glob("*.png")]) == len(there[name]) == 3
    unseen = there["images"].ids[there["unseen"], 0]
    assert not torch.isin(unseen, there["seen"]).any()
    monkeypatch.setattr(vqldm, "features", lambda net, x: F.avg_pool2d(x.double(), 8).flatten(1))
    monkeypatch.setattr(sys, "argv", "useful.py runs/ldm 4 nevus-like".split())
    exec(useful, {})
    assert "with samples balanced accuracy" in said()

# SPDX-License-Identifier: MIT
"""Make the metadata.csv that vqldm.py reads, from a table as people save it.

    python tools/table.py FOLDER [TABLE]

FOLDER holds the images, or folders of them. TABLE is the table to read. If none is named, it is
FOLDER's metadata.csv, else the only .csv there, else the only .tsv. What is taken from it is shown.

  Form     Commas, semicolons or tabs. UTF-8, UTF-16, or cp1252, as Excel on Windows saves CSV.
  Titles   The first row. Capitals, blanks, - and _ do not count: "Patient ID" is patient_id.
  Names    file_name, isic_id, image_id, image_name or image, the first that is filled, or --name.
           A name is a path below FOLDER. If no file has exactly this path, these do not count:
           folders that only the table or only the disk has, the ending, capitals, the kind of
           slash, and both ways to write é. Of C:\\photos\\1.jpg, photos need not fit.
  Ids      patient_id (or patient) and lesion_id, or --group. Images of one id are held out
           together. A row's id is its patient, else its lesion's patient in any row, else its
           lesion. If some rows keep a patient and others a lesion, the column is called group.
           The table's own group counts if all of its titles are ones that vqldm.py knows, and is
           refused beside patients or lesions.
  Folders  --group-by-folder LEVEL takes folders for patients, at level 1 those in FOLDER, at 2
           those in these, and no column of ids. --class-by-folder LEVEL takes folders for classes,
           and no column. There may be no table. Without it, a row without a class is of the folder
           above its patient's, or of the class images.
  Classes  diagnosis_3, diagnosis_1, dx, diagnosis, class, label or target, the first that is
           filled, or --class. Else all columns of 0 and 1 that are not all 0, if there are two or
           more, each row has one 1, and the images are not in folders of classes. --class A,B,C
           names some of them. (True, yes and x are 1, and false, no and an empty cell are 0.)
           Else vqldm.py takes the innermost folders. If they are called like their images' ids,
           or are more than ten of fewer than six images, they count as patients here.
  Spelling P1, p-001 and "P 1" are one id, as are 7 and 7.0. Classes that differ so are refused.
  Empty    na, n/a, nan, none, null, unknown, missing, - and ? count as empty, but 0 does not.

A WARNING names the flag if ids or classes may be missing. What may mean two things is refused. No
file is overwritten: if the table is FOLDER's metadata.csv, it is kept as metadata.original.csv."""

import argparse
import csv
import io
import os
import re
import sys
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from unicodedata import normalize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where vqldm.py lies
import vqldm
from vqldm import UserError, id_form, require, say

NAME = "file_name", "isic_id", "image_id", "image_name", "image"
CLASS = "diagnosis_3", "diagnosis_1", "dx", "diagnosis", "class", "label", "target"
IDS = dict(patient_id=("patient_id", "patient"), lesion_id=("lesion_id",), group=("group",))
YES, NO = {"1", "true", "yes", "x"}, {"0", "false", "no"}
SETS = {"train", "training", *vqldm.HELD_OUT}  # folders that are no classes
CONVERTED = vqldm.SUFFIXES | {".heic", ".heif", ".avif", ".dng"}  # the table may say 1.heic


def some(words):
    return f"{len(words)}, such as {words[:3]}" if words else "none"


# ---- The table ---------------------------------------------------------------------------------
def choose_table(folder, files, typed, level):
    """-> the path of TABLE, else of metadata.csv, of the only .csv, of the only .tsv, or None"""
    if typed:
        paths = {path.resolve(): path for path in (Path(typed), folder / typed) if path.is_file()}
        require(len(paths) < 2, f"{typed}: is here and in {folder}; type its whole path")
        require(paths, f"{typed}: is no file, here or in {folder}")
        return paths.popitem()[1]
    if os.path.lexists(folder / "metadata.csv"):
        return folder / "metadata.csv"
    for endings in ({".csv"}, {".tsv"}, vqldm.TABLES[2:5]):
        fit = [name for name in files if "/" not in name and Path(name).suffix.lower() in endings]
        require(len(fit) < 2, f"{folder}: which table? It has {some(fit)}; name one after it")
        if fit:
            return folder / fit[0]
    below = [name for name in files if Path(name).suffix.lower() in {".csv", ".tsv"}]
    lacks = f"{folder}: has no .csv or .tsv (in its folders: {some(below)}); add the table's name"
    require(level, f"{lacks}, or --group-by-folder 1 if the folders in it are patients")


def decode(path):
    """-> the text of a table, and its encoding"""
    data = path.read_bytes()
    sheet = path.suffix.lower() in vqldm.TABLES[2:] or data[:3] in (b"PK\3", b"\xd0\xcf\x11")
    require(not sheet, f"{path}: is no text of columns; save it as CSV (in Excel: CSV UTF-8)")
    encodings = ["utf-8-sig", "cp1252"]
    # UTF-16 comes first, as its bytes are valid in cp1252. Every second one is 0 in Latin text.
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encodings = ["utf-16"]
    elif data.count(b"\0") > len(data) / 10:
        encodings = ["utf-16-le" if data.index(b"\0") % 2 else "utf-16-be"]
    for encoding in encodings:
        try:
            return data.decode(encoding), encoding.removesuffix("-sig")
        except UnicodeDecodeError:
            pass
    raise UserError(f"{path}: is not in UTF-8, UTF-16 or cp1252; save it as CSV UTF-8")


def read_table(path, names=NAME):
    """-> titles, and rows that are as long as these"""
    text, encoding = decode(path)
    text = re.sub(r'\A"?sep=.?"?[\r\n]+', "", text, flags=re.I)  # tells Excel the separator

    def table(separator, **how):  # without blank rows
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, **how)
        rows = ([word.strip() for word in row] for row in reader)
        return (row for row in rows if any(row))

    def fit(separator):  # one that fits leaves the title of the names whole, and makes many titles
        titles = next(table(separator), [])
        return any(plain(title) in map(plain, names) for title in titles), len(titles)

    with vqldm.explain(f"{path}: cannot be read"):  # strict: an open quote is an error
        separator = max(",;\t", key=fit)
        titles, *rows = [*table(separator, strict=True, skipinitialspace=True)] or [[]]
    for row in rows:
        more = f"{path}: a row has more words than titles, {some(row)}; put quotes around words"
        require(not any(row[len(titles) :]), f"{more}, and titles into the first row")
    say(f"read {path}, in {encoding}, with {separator!r} between columns")
    return titles, [(row + [""] * len(titles))[: len(titles)] for row in rows]


# ---- Its columns -------------------------------------------------------------------------------
def plain(title):
    return re.sub(r"[\s_-]", "", title.casefold())


def is_empty(word):
    return word.lower() in {"", *vqldm.EMPTY}


def column(titles, rows, wanted, flag="", typed=None):
    """-> the place of the title that the user has typed, else of the first wanted title whose
    column is filled in any row, or None"""
    if typed and titles.count(typed) == 1:
        return titles.index(typed)
    for title in [typed] if typed else wanted:
        places = [i for i, one in enumerate(titles) if plain(one) == plain(title)]
        alike = [titles[i] for i in places]
        require(len(places) < 2, f"the titles {alike} are one title here; rename or delete one")
        if places and (typed or not all(is_empty(row[places[0]]) for row in rows)):
            return places[0]
    known = [one for one in titles if one]
    again = "; delete metadata.csv if this tool wrote it" if "file_name" in known else ""
    require(not typed, f"{flag} {typed}: is not among the titles {known}{again}")


def id_columns(titles, rows, typed):
    """-> {column of vqldm.py: place}"""
    if typed:
        name = next((one for one in IDS if plain(one) == plain(typed)), "group")
        return {name: column(titles, rows, (), "--group", typed)}
    found = {name: column(titles, rows, wanted) for name, wanted in IDS.items()}
    found = {name: place for name, place in found.items() if place is not None}
    names = [titles[place] for place in found.values()]
    require("group" not in found or len(found) < 2, f"which of {names} counts? Type --group TITLE")
    # Elsewhere than in a table for vqldm.py, group may be what a study compares.
    return found if "group" not in found or {*titles} <= {*vqldm.COLUMNS} else {}


def yes_or_no(word):
    """-> True, False, or None if it is neither"""
    word = re.sub("[.,]0+$", "", word.lower())
    return word in YES if word in YES | NO or is_empty(word) else None


def one_hot(titles, rows, taken, folders):
    """-> the places of all columns of 0 and 1, but for those of 0, and why these are no classes"""
    bits = [i for i, title in enumerate(titles) if title and i not in taken]
    bits = [i for i in bits if all(yes_or_no(row[i]) is not None for row in rows)]
    bits = [i for i in bits if any(yes_or_no(row[i]) for row in rows)]
    one_each = all(sum(yes_or_no(row[i]) for i in bits) == 1 for row in rows)
    if len(bits) < 2 or folders and not one_each:
        return [], ""
    these = f"no classes from the columns of 0 and 1, {some([titles[i] for i in bits])}, as"
    if not one_each:  # else no choice of fewer columns has a 1 in each row
        return [], f"{these} some rows have not one 1:"
    return ([], f"{these} folders give some:") if folders else (bits, "")


def class_columns(titles, rows, typed, taken, folders):
    """-> the places of the column of classes, or of those of 0 and 1, and what speaks against it"""
    words = [word.strip() for word in (typed or "").split(",") if word.strip()]
    if len(words) > 1 and plain(typed) not in map(plain, titles):
        places = [column(titles, rows, (), "--class", word) for word in words]
        for row in rows:
            said = [yes_or_no(row[i]) for i in places]
            fits = None not in said and said.count(True) < 2
            require(fits, f"--class {typed}: {[row[i] for i in places][:3]} is not 0 and one 1")
        return places, ""
    place = column(titles, rows, CLASS, "--class", typed)
    if place is None:
        return one_hot(titles, rows, taken, folders)
    first = next((i for i, title in enumerate(titles) if plain(title) == "diagnosis1"), place)
    lost = [row for row in rows if is_empty(row[place]) and not is_empty(row[first])]
    blank = sum(not row[place] for row in rows)
    if lost and not typed:
        return [place], f"{len(lost)} rows have no {titles[place]!r}, but {titles[first]!r}:"
    if 10 * blank >= len(rows):
        return [place], f"{blank} of {len(rows)} rows have no {titles[place]!r}: write it there, or"
    return [place], ""


# ---- The files that it names -------------------------------------------------------------------
def loosely(path):
    """-> the parts of a path, all in the same form"""
    path = normalize("NFC", path.casefold()).replace("\\", "/")
    return [part.strip() for part in path.split("/") if part not in ("", ".", "..")]


def match(words, files):
    """-> {word: file}, for the words of a table that name a file"""
    index = {}  # {the name of a file, with and without its ending: paths}
    for path in files:
        name = loosely(path)[-1]
        for key in {name, Path(name).stem}:
            index.setdefault(key, []).append(path)

    def fits(word, converted=False):
        *folders, name = loosely(word) or [""]
        if converted and Path(name).suffix in CONVERTED:
            name = Path(name).stem
        # Folders must agree where both have some: a/1.jpg may be x/a/1.jpg, but never b/1.jpg.
        paths = []
        for path in index.get(name, []):
            pairs = zip(folders[::-1], loosely(path)[-2::-1])
            if all(one == other for one, other in pairs):
                paths.append(path)
        if not paths and re.match(r"[/\\~]|[a-z]+:", word, re.I):  # absolute: other folders
            paths = index.get(name, [])
        require(len(paths) < 2, f"{word!r} may be {some(paths)}; write its path below the folder")
        return paths

    exact = set(files)
    found = {word: [word] if word in exact else fits(word) for word in words}
    named = {path for paths in found.values() for path in paths}
    for word in found:
        if not found[word]:  # 1.heic may be 1.jpg by now, but not if a row names 1.jpg
            found[word] = [path for path in fits(word, converted=True) if path not in named]
    return {word: paths[0] for word, paths in found.items() if paths}


# ---- Its entries -------------------------------------------------------------------------------
def filled(words):
    return {title: normalize("NFC", word) for title, word in words.items() if not is_empty(word)}


def spell_once(entries):
    """Write ids that differ only in form as the first of them is spelt -> which these are"""
    first, written = {}, {}  # first: {column and form: id}
    for entry in entries:
        for title in {*entry} & {*IDS}:
            word = entry[title]
            entry[title] = written[word] = first.setdefault((title, id_form(word)), word)
    return [f"{word} is {one}" for word, one in written.items() if word != one]


def join_lesions(entries, title):
    """Give all rows of a lesion the patient that any of them names, and leave each row one id."""
    patients = {}  # {lesion: its patients}
    for entry in entries:
        if "lesion_id" in entry and "patient_id" in entry:
            patients.setdefault(entry["lesion_id"], set()).add(entry["patient_id"])
    for lesion, found in patients.items():
        more = f"lesion {lesion}: has {len(found)} patients, such as {sorted(found)[:3]}"
        require(len(found) < 2, f"{more}; if each patient has a lesion {lesion}, --group {title!r}")
    for entry in entries:
        lesion = entry.get("lesion_id")
        if lesion in patients:
            [entry["patient_id"]] = patients[lesion]
        if "patient_id" in entry:
            entry.pop("lesion_id", None)


def rows_to_write(entries):
    """The entries of rows that have a file -> one for each file, with one column of ids"""
    found, spelling = {}, {}
    for entry in entries:
        file, name = entry["file_name"], entry.get("class", "")
        require(found.setdefault(file, entry) == entry, f"{file}: has two rows that differ")
        fits = file == file.strip().encode(errors="ignore").decode()
        require(fits, f"{file!r}: this name fits in no table; rename the file")
        other = spelling.setdefault(id_form(name), name)
        require(name == other, f"the classes {other!r} and {name!r} differ only in form; use one")
    if len({title for entry in found.values() for title in entry} & {*IDS}) > 1:
        for entry in found.values():
            for title in {*entry} & {*IDS}:
                entry["group"] = f"{title.removesuffix('_id')} {entry.pop(title)}"
    return [*found.values()]


def is_done(path, images, rows):
    """Does vqldm.py read this table, and take the same from it?"""
    try:
        with redirect_stdout(io.StringIO()):
            there = vqldm.read_table(path, images)
    except UserError:
        return False
    there = [filled({"file_name": name, **words}) for name, words in there.items()]
    return there == [*map(filled, rows)]  # unknown and an empty word are one class


def write(path, rows):
    """Write beside it, and rename. What had the name, be it a file or a link, is kept."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    kept = path.with_stem("metadata.original")
    free = not os.path.lexists(path) or not os.path.lexists(kept)
    require(free, f"{kept}: is in the way; rename it")
    titles = [title for title in vqldm.COLUMNS if any(title in row for row in rows)]
    try:
        with beside.open("x", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, titles)
            table.writeheader()
            table.writerows(rows)
        if os.path.lexists(path):
            path.rename(kept)
            say(path, "is kept as", kept)
        beside.rename(path)
    finally:
        beside.unlink(missing_ok=True)


# ---- Its folders, and what may be missing ------------------------------------------------------
def folder_at(file, level):
    """-> the name of an image's folder at this level, or an empty one"""
    folders = Path(file or "").parent.parts
    return folders[level - 1] if len(folders) >= level else ""


def class_folder(file, level):
    """-> the innermost folder, as in vqldm.py, but one above the patient's at this level"""
    folders = Path(file).parent.parts[: level and level - 1]
    return ([one for one in folders if one.lower() not in SETS] or ["images"])[-1]


def class_folders(entries, level):
    """-> the number of folders that may be classes. If they are called like their images' ids, or
    are many with few images each, they look like patients, and there are none."""
    ids = {}  # {folder: the forms of its images' ids}
    for entry in entries:
        folder = class_folder(entry["file_name"], level)
        forms = {id_form(entry[title]) for title in IDS if title in entry}
        ids.setdefault(folder, set()).update(forms)
    named = all(forms == {id_form(folder)} for folder, forms in ids.items())
    one_each = len(entries) < 6 * len(ids) or all(len(forms) == 1 for forms in ids.values())
    return 0 if named or len(ids) > 10 and one_each or len(ids) < 2 else len(ids)


def gaps(ids, files, taken, classes, why, folders, unused, args):
    """-> what may be missing of files, and which flag adds it. taken: the titles of classes"""
    n = len(files)
    spare = SETS | {*classes} if taken else SETS
    levels = {one: {folder_at(file, one) for file in files} - spare for one in range(1, 10)}
    levels = {one: some(sorted(names)) for one, names in levels.items() if len(names) > 1}
    type_group = f"type --group TITLE (not used: {unused}), or --group-by-folder LEVEL"
    type_class = f"type --class TITLE, or A,B for columns of 0 and 1 (not used: {unused})"
    if not ids and (unused or levels):
        yield f"no ids, so a patient may be trained on and held out: {type_group}"
    if 0 < ids.total() < n:
        yield f"{n - ids.total()} of {n} images have no id: write it into each row, or {type_group}"
    for word, images in ids.most_common(1):
        if images > max(10, n / 5) and not args.group:
            yield f"{images} of {n} images have the id {word!r}: if it means none, {type_group}"
    yield from [*vqldm.doubts(ids), *vqldm.doubts(classes)]
    if why:
        yield f"{why} {type_class}"
    elif not (taken or folders or args.class_level) and (unused or levels and not args.level):
        patients = ", only folders that look like patients (--group-by-folder)" * (len(classes) > 1)
        yield f"no classes{patients}: {type_class}"
    few = len(classes) < folders and not args.level
    if taken and not args.class_ and (few or len(classes) > max(10, n / 2)):
        here = f"{some(sorted(classes))} from {taken}, but {folders} folders of classes, {n} images"
        yield f"classes: {here}: {type_class}, or delete this column"
    if args.level and max(levels, default=0) > args.level and not taken and not args.class_level:
        here = f"which level's folders are classes? Levels: {levels}. Now: {some(sorted(classes))}"
        yield f"{here}: if this is wrong, delete metadata.csv and add --class-by-folder LEVEL"
    shallow = [file for file in files if args.class_level and not folder_at(file, args.class_level)]
    if shallow:
        yield f"{len(shallow)} of {n} images have no folder of a class: move them into one"


# ---- The command -------------------------------------------------------------------------------
def find_files(names, folder, images, path):
    """-> {name: file}, and the names that have none"""
    file_of = match(names, images)
    missing = [name for name in names if name not in file_of]
    bare = {Path(file).stem.lstrip("0") for file in images if Path(file).name.startswith("0")}
    lost = [name for name in missing if Path(name).stem.lstrip("0") in bare]
    zeros = f"zeros are lost in {some(lost)}; save this column as text, so that they stay"
    none = f"{path}: names {names[:3]}, but {folder} has {images[:3]}: none of them agree"
    require(file_of, f"{none}, as {zeros}" if lost else none)
    if lost:
        say("WARNING", zeros)
    return file_of, missing


def convert(args):
    """Read a table by the rules above, show what was taken, and write metadata.csv."""
    folder, target, level = Path(args.FOLDER), Path(args.FOLDER, "metadata.csv"), args.level
    require(folder.is_dir(), f"{folder}: is no folder")
    files = vqldm.list_files(folder)
    images = [name for name in files if Path(name).suffix.lower() in vqldm.SUFFIXES]
    endings = sorted({Path(name).suffix.lower() for name in files})
    require(images, f"{folder}: has no images that can be read, only files that end in {endings}")
    for one in {level, args.class_level} - {None}:
        require(any(folder_at(name, one) for name in images), f"LEVEL {one}: no image is so deep")
        require(level != args.class_level, f"LEVEL {one}: patients and classes need two levels")
    path = choose_table(folder, files, args.TABLE, level or args.class_level)
    titles, rows = ["file_name"], [[name] for name in images]  # if there is no table
    if path:
        titles, rows = read_table(path, [args.name] if args.name else NAME)
    place = column(titles, rows, NAME, "--name", args.name)
    which = f"{path}: which of {[one for one in titles if one]} has the names? Type --name TITLE"
    require(place is not None, f"{which} (the first row must hold the titles)")
    file_of, missing = find_files([row[place] for row in rows], folder, images, path)

    # ---- the id and the class of each row ----
    ids, entries = {} if level else id_columns(titles, rows, args.group), []
    for row in rows:
        file = file_of.get(row[place])
        words = {title: row[i] for title, i in ids.items()}
        if level:
            words["patient_id"] = folder_at(file, level)
        entries.append({"file_name": file, **filled(words)})
    respelt = spell_once(entries)
    join_lesions(entries, titles[ids.get("patient_id", 0)])
    rows = [row for row in rows if row[place] in file_of]
    entries = [entry for entry in entries if entry["file_name"]]
    folders = class_folders(entries, level)
    places, why = [], ""
    if not args.class_level:
        places, why = class_columns(titles, rows, args.class_, {place, *ids.values()}, folders)
    for entry, row in zip(entries, rows):
        words = [row[i] for i in places]
        if len(places) > 1:
            words = [titles[i] for i in places if yes_or_no(row[i])]
        if args.class_level:
            words = [folder_at(entry["file_name"], args.class_level)]
        entry.update(filled({"class": "".join(words)}))
        if level and not args.class_level:
            entry.setdefault("class", class_folder(entry["file_name"], level))
    table = rows_to_write(entries)

    # ---- what was taken ----
    taken = {"file_name": [place], **{title: [i] for title, i in ids.items()}, "class": places}
    taken = {title: [titles[i] for i in places] for title, places in taken.items() if places}
    say("taken:", ", ".join(f"{title} from {str(names)[1:-1]}" for title, names in taken.items()))
    for title, one in (("patient_id", level), ("class", args.class_level)):
        if one:
            say("taken:", title, "from the folders at level", one)
    unused = [title for title in titles if title and title not in sum(taken.values(), [])]
    say("not used:", unused)
    say("ids that differ only in form:", some(respelt))
    loose = [f"{name} is {file}" for name, file in file_of.items() if name != file]
    say("names that are no path below the folder:", some(loose))
    say("rows without a file:", some(missing))
    used = [row["file_name"] for row in table]
    say("files without a row, left out:", some(sorted({*images} - {*used})))

    # ---- metadata.csv, and what vqldm.py takes from it ----
    if os.path.lexists(target) and is_done(target, images, table):
        say(target, "is in the format of vqldm.py: nothing to be done")
    else:
        free = not os.path.lexists(target) or target.exists() and path.samefile(target)
        require(free, f"{target}: is there already; delete it if this tool wrote it, or move it")
        write(target, table)
        say("wrote", target, "with", len(table), "images")
    with redirect_stdout(io.StringIO()):
        classes = Counter(class_name for class_name, *_ in vqldm.find_images(folder).values())
    say("classes:", dict(sorted(classes.items())))
    ids = Counter(row[title] for row in table for title in IDS if title in row)
    say("groups:", len(ids) + len(table) - ids.total())
    say("largest groups:", ", ".join(f"{one!r} {n}" for one, n in ids.most_common(3)) or "none")
    for gap in gaps(ids, used, taken.get("class"), classes, why, folders, unused, args):
        say("WARNING", gap)


def main(argv):
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tools/table.py", description=__doc__, formatter_class=about)
    parser.error = lambda text: require(False, text)  # one sentence, without the usage
    parser.add_argument("FOLDER", help="folder of images")
    parser.add_argument("TABLE", nargs="?", help="the table, if another is to be read")
    parser.add_argument("--name", metavar="TITLE", help="the column of names")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--class", metavar="TITLE", dest="class_", help="the column of classes")
    ids = parser.add_mutually_exclusive_group()
    ids.add_argument("--group", metavar="TITLE", help="the column of patients, scenes and so on")
    level = dict(metavar="LEVEL", type=int, choices=range(1, 10))
    ids.add_argument("--group-by-folder", dest="level", **level, help="folders that are patients")
    kinds.add_argument("--class-by-folder", dest="class_level", **level, help="and classes")
    with vqldm.one_sentence():
        convert(parser.parse_args(argv))


if __name__ == "__main__":
    main(sys.argv[1:])

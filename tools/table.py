# SPDX-License-Identifier: MIT
"""Make the metadata.csv that vqldm.py reads, from a table as people save it.

    python tools/table.py FOLDER [TABLE]

FOLDER holds the images, or folders of them. TABLE is the table to read. If none is named, it is
FOLDER's metadata.csv, else the only .csv there, else the only .tsv. What is taken from it is shown.

  Form     Commas, semicolons or tabs. UTF-8, UTF-16, or cp1252, as Excel on Windows saves CSV.
  Titles   Capitals, blanks, hyphens and underscores do not count: "Patient ID" is patient_id.
  Names    file_name, isic_id, image_id, image_name or image, the first that is filled, or --name.
           A name is a path below FOLDER. If no file has exactly this path, these do not count:
           folders that only the table or only the disk has, the ending, capitals, the kind of
           slash, and whether é is one character or two. Of C:\\photos\\1.jpg only 1.jpg counts.
  Classes  diagnosis_3, diagnosis_1, dx, diagnosis, class, label or target, the first that is
           filled, or --class. Else two or more columns of 0 and 1 with one 1 in each row. Else
           there are none in the table, and vqldm.py takes the subfolders.
  Groups   patient_id (or patient) and lesion_id, or --group. Images of a group are held out
           together. All rows of a lesion belong to the patient that any of them names.
  Empty    na, n/a, nan, none, null, unknown, missing, - and ? count as empty, but 0 does not.

What may mean two things is refused, and then nothing is written. No file is overwritten: if the
table is FOLDER's metadata.csv, it is kept as metadata.original.csv."""

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
from vqldm import UserError, require

NAME = "file_name", "isic_id", "image_id", "image_name", "image"
CLASS = "diagnosis_3", "diagnosis_1", "dx", "diagnosis", "class", "label", "target"
GROUPS = {"patient_id": ("patient_id", "patient"), "lesion_id": ("lesion_id",)}
IDS = vqldm.COLUMNS[2:]  # patient_id, lesion_id, group: what vqldm.py reads
SPREADSHEETS = {".xlsx", ".xls", ".ods"}
CONVERTED = vqldm.SUFFIXES | {".heic", ".heif", ".avif", ".dng"}  # the table may say 1.heic


# ---- The table ---------------------------------------------------------------------------------
def choose_table(folder, files, typed):
    """-> the path of TABLE, else of metadata.csv, else of the only .csv, else of the only .tsv"""
    if typed:
        paths = {path.resolve(): path for path in (Path(typed), folder / typed) if path.is_file()}
        require(len(paths) < 2, f"{typed}: is here and in {folder}; type its whole path")
        require(paths, f"{typed}: is no file, here or in {folder}")
        return paths.popitem()[1]
    if os.path.lexists(folder / "metadata.csv"):
        return folder / "metadata.csv"
    for endings in ({".csv"}, {".tsv"}, SPREADSHEETS):
        fit = [name for name in files if "/" not in name and Path(name).suffix.lower() in endings]
        require(len(fit) < 2, f"{folder}: has the tables {fit}; name one after the folder")
        if fit:
            return folder / fit[0]
    raise UserError(f"{folder}: has no .csv or .tsv; name the table after the folder")


def decode(path):
    """-> the text of a table, and its encoding"""
    data = path.read_bytes()
    spreadsheet = path.suffix.lower() in SPREADSHEETS or data.startswith((b"PK\3\4", b"\xd0\xcf"))
    require(not spreadsheet, f"{path}: is a spreadsheet; save it as CSV (in Excel: CSV UTF-8)")
    encodings = ["utf-8-sig", "cp1252"]
    # UTF-16 comes first, as its bytes are valid in cp1252. Every second one is 0 in Latin text.
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encodings = ["utf-16"]
    elif b"\0" in data:
        encodings = ["utf-16-le" if data.index(b"\0") % 2 else "utf-16-be"]
    for encoding in encodings:
        try:
            return data.decode(encoding), encoding.removesuffix("-sig")
        except UnicodeDecodeError:
            pass
    raise UserError(f"{path}: is not in UTF-8, UTF-16 or cp1252; save it as CSV UTF-8")


def read_table(path, names=NAME):
    """-> titles, rows (each as long as the titles), separator and encoding"""
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
        fits = not any(row[len(titles) :])
        require(fits, f"{path}: has more words than titles in {row}; put quotes around words")
    rows = [(row + [""] * len(titles))[: len(titles)] for row in rows]
    return titles, rows, separator, encoding


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


def one_hot(titles, rows, taken):
    """-> the places of the columns of 0 and 1, if they are two or more and each row has one 1"""
    places = [i for i, title in enumerate(titles) if title and i not in taken]
    places = [i for i in places if all(re.fullmatch("[01]([.,]0+)?", row[i]) for row in rows)]
    one_each = all([row[i][0] for i in places].count("1") == 1 for row in rows)
    return places if len(places) > 1 and one_each else []


# ---- The files that it names -------------------------------------------------------------------
def loosely(path):
    """-> the parts of a path, all in the same form. Of an absolute one, only the file's name."""
    path = normalize("NFC", path.casefold()).replace("\\", "/")
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    return parts[-1:] if re.match("/|~|[a-z]+:", path) else parts


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
        require(len(paths) < 2, f"{word!r} may be any of {paths}; write its path below the folder")
        return paths

    exact = set(files)
    found = {word: [word] if word in exact else fits(word) for word in words}
    named = {path for paths in found.values() for path in paths}
    for word in found:
        if not found[word]:  # 1.heic may be 1.jpg by now, but not if a row names 1.jpg
            found[word] = [path for path in fits(word, converted=True) if path not in named]
    return {word: paths[0] for word, paths in found.items() if paths}


# ---- Its entries -------------------------------------------------------------------------------
def join_lesions(entries):
    """Give all rows of a lesion the patient that any of them names."""
    patients = {}  # {lesion: its patients}
    for entry in entries:
        if "lesion_id" in entry and "patient_id" in entry:
            patients.setdefault(entry["lesion_id"], set()).add(entry["patient_id"])
    for entry in entries:
        lesion = entry.get("lesion_id")
        found = sorted(patients.get(lesion, ()))
        require(len(found) < 2, f"lesion {lesion}: has the patients {found}; type --group TITLE")
        if found:
            entry["patient_id"] = found[0]


def rows_to_write(entries, files):
    """The entries and the file of each row -> one row for each file"""
    found = {}
    for entry, file in zip(entries, files):
        if file:
            entry = {"file_name": file, **entry}
            require(found.setdefault(file, entry) == entry, f"{file}: has two rows that differ")
            fits = file == file.strip().encode(errors="ignore").decode()
            require(fits, f"{file!r}: this name fits in no table; rename the file")
    spelling = {}
    for entry in found.values():
        name = entry.get("class", "")
        other = spelling.setdefault(name.casefold(), name)
        require(name == other, f"the classes {other!r} and {name!r} differ by capitals; use one")
    return [*found.values()]


def is_done(path, images, rows):
    """Does vqldm.py read this table, and take the same from it? (There, unknown names a class.)"""
    try:
        with redirect_stdout(io.StringIO()):
            there = vqldm.read_table(path, images)
    except UserError:
        return False
    for words in there.values():
        if is_empty(words.get("class", "")):
            words.pop("class", None)
    return [{"file_name": name, **words} for name, words in there.items()] == rows


def write(path, rows):
    """Write beside it, and rename. What had the name, be it a file or a link, is kept."""
    beside, kept = (
        path.with_name(f".{path.name}.{os.getpid()}"),
        path.with_stem("metadata.original"),
    )
    require(not os.path.lexists(path) or not os.path.lexists(kept), f"{kept}: is in the way")
    titles = [title for title in vqldm.COLUMNS if any(title in row for row in rows)]
    try:
        with beside.open("x", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, titles)
            table.writeheader()
            table.writerows(rows)
        if os.path.lexists(path):
            path.rename(kept)
            print(path, "is kept as", kept)
        beside.rename(path)
    finally:
        beside.unlink(missing_ok=True)


# ---- The command -------------------------------------------------------------------------------
def find_columns(args, titles, rows, used):
    """-> {column of vqldm.py: place}, and the places of the columns of 0 and 1 that are classes.
    used: the rows that have a file."""
    places = {"class": column(titles, used, CLASS, "--class", args.class_)}
    if args.group:
        title = next((one for one in IDS if plain(one) == plain(args.group)), "group")
        places[title] = column(titles, rows, (), "--group", args.group)
    else:
        ours = {"group": ["group"]} if {*titles} <= {*vqldm.COLUMNS} else {}
        for title, wanted in {**GROUPS, **ours}.items():
            places[title] = column(titles, rows, wanted)
    places = {title: place for title, place in places.items() if place is not None}
    return places, [] if "class" in places else one_hot(titles, used, places.values())


def entry_of(row, places, bits, titles):
    """-> what a row says, {column of vqldm.py: word}, without empty words"""
    words = {title: row[place] for title, place in places.items()}
    for place in bits:
        if row[place].startswith("1"):
            words["class"] = titles[place]
    return {title: normalize("NFC", word) for title, word in words.items() if not is_empty(word)}


def some(words):
    return f"{len(words)}, such as {words[:3]}" if words else "none"


def convert(args):
    """Read a table by the rules above, show what was taken, and write metadata.csv."""
    folder, target = Path(args.FOLDER), Path(args.FOLDER, "metadata.csv")
    require(folder.is_dir(), f"{folder}: is no folder")
    files = vqldm.list_files(folder)
    images = [name for name in files if Path(name).suffix.lower() in vqldm.SUFFIXES]
    endings = sorted({Path(name).suffix.lower() for name in files})
    require(images, f"{folder}: has no images that can be read, only files that end in {endings}")
    path = choose_table(folder, files, args.TABLE)
    titles, rows, separator, encoding = read_table(path, [args.name] if args.name else NAME)
    known = [title for title in titles if title]

    # ---- the file, the classes and the groups of each row ----
    place = column(titles, rows, NAME, "--name", args.name)
    require(place is not None, f"{path}: which of {known} has the names? Type --name TITLE")
    names = [row[place] for row in rows]
    file_of = match(names, images)
    missing = [name for name in names if name not in file_of]
    require(
        file_of, f"{path}: names {names[:3]}, but {folder} has {images[:3]}: none of them agree"
    )
    used = [row for row, name in zip(rows, names) if name in file_of]
    places, bits = find_columns(args, titles, rows, used)
    entries = [entry_of(row, places, bits, titles) for row in rows]
    join_lesions(entries)
    table = rows_to_write(entries, map(file_of.get, names))

    # ---- what was taken ----
    print(f"read {path}, in {encoding}, with {separator!r} between columns")
    taken = {"file_name": place, **places}
    print("taken:", ", ".join(f"{title} from {titles[i]!r}" for title, i in taken.items()))
    if bits:
        print("taken: class from the columns of 0 and 1", [titles[i] for i in bits])
    unused = [title for i, title in enumerate(titles) if i not in {*taken.values(), *bits}]
    print("not used:", [title for title in unused if title])
    loose = [f"{name} is {file}" for name, file in file_of.items() if name != file]
    print("names that are no path below the folder:", some(loose))
    print("rows without a file:", some(missing))
    unnamed = {*images} - {row["file_name"] for row in table}
    print("files without a row, left out:", some(sorted(unnamed)))

    # ---- metadata.csv, and what vqldm.py takes from it ----
    if os.path.lexists(target) and is_done(target, images, table):
        print(target, "is in the format of vqldm.py: nothing to be done")
    else:
        free = not os.path.lexists(target) or target.exists() and path.samefile(target)
        require(free, f"{target}: is there already; delete it if this tool wrote it, or move it")
        write(target, table)
        print("wrote", target, "with", len(table), "images")
    found = vqldm.find_images(folder)
    classes = Counter(class_name for class_name, _, _ in found.values())
    print("classes:", dict(sorted(classes.items())))
    print("groups:", len({group or name for name, (_, group, _) in found.items()}))


def main(argv):
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tools/table.py", description=__doc__, formatter_class=about)
    parser.error = lambda text: require(False, text)  # one sentence, without the usage
    parser.add_argument("FOLDER", help="folder of images")
    parser.add_argument("TABLE", nargs="?", help="the table, if another is to be read")
    parser.add_argument("--name", metavar="TITLE", help="the column of names")
    parser.add_argument("--class", metavar="TITLE", dest="class_", help="the column of classes")
    parser.add_argument("--group", metavar="TITLE", help="the column of patients, scenes and so on")
    try:
        convert(parser.parse_args(argv))
    except (UserError, OSError) as e:
        vqldm.leave(e)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console may lack é
    main(sys.argv[1:])

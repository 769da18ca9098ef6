"""Patients: columns that are asked for, and what a pattern may not find."""

from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_folder import prepare, refused, save, table

from data_prep import grouping
from hallulib import UserError
from hallulib.data import imageset

SPEAK = {
    "patient": "patient_id PatientID patientId patientid PATIENTID PATIENT_ID patient-id"
    " patient.id id_patient Patients AnonymisedPatient PATIENTid patienten-nr",
    "subject": "subject Subject_No subjectID",
    "subj": "subj subjid",
    "person": "person person_key",
    "participant": "Participant participantcode",
    "mrn": "MRN mrn_hash",
    "pid": "pid PID p_id",
    "case": "case Case caseid CaseNumber new_case_no case_ISUP",
    "study": "study study_id StudyInstanceUID",
    "exam": "exam ExamID exams",
    "accession": "accession AccessionNumber accession_no",
    "series": "series SeriesInstanceUID",
    "lesion": "lesion lesion_id LesionNumber",
    "slide": "slide Slide_ID",
}
SILENT = (
    "inpatient_ward outpatient caseworker showcase lowercase personnel scanner spider subjective"
    " examined PatientAge patient_sex study_date StudyDescription lesion_type image_id birthday"
    " note laterality ID width 1 größe _"
).split()


@pytest.mark.parametrize("group", SPEAK)
def test_names_of_columns_that_speak_of_a_group_are_known_however_they_are_spelt(group):
    names = [*SPEAK[group].split(), f"{group} ID", f" {group.title()} # "]
    assert {name: grouping.speaks_of(name) for name in names} == dict.fromkeys(names, group)


@pytest.mark.parametrize("name", [*SILENT, "", "Patient Age", "date of the exam"])
def test_a_part_of_a_word_and_what_only_describes_a_patient_do_not_speak_of_groups(name):
    assert grouping.speaks_of(name) == ""


@given(
    st.sampled_from(grouping.GROUPS),
    st.sampled_from(["", "id", "number", "code", "uid"]),
    st.sampled_from(["_", "-", " ", ".", "Camel", ""]),
    st.sampled_from([str.lower, str.upper, str.title]),
)
def test_a_group_is_known_with_every_suffix_between_any_marks(group, suffix, mark, case):
    camel = mark == "Camel"
    name = group.title() + suffix.title() if camel else case(mark.join([group, suffix]))
    assert grouping.speaks_of(name) == group


@pytest.fixture
def lesions(tmp_path) -> Path:
    """Forty images without class folders, four of each lesion, two classes of lesions."""
    for i in range(40):
        save(tmp_path / "in" / f"{i:02}.png")
    return tmp_path / "in"


def listed(lesions: Path, name: str, owner=lambda i: f"L{i // 4}", more: str = "") -> str:
    rows = [f"{i:02}.png,{'ab'[i // 4 % 2]},{owner(i)}" for i in range(40)]
    return table(lesions, f"file,label,{name}{more}", *(row + ",x" * bool(more) for row in rows))


def owners(lesions: Path, out: str = "set") -> pd.DataFrame:
    """The table of the set with the true lesion of each row."""
    found = imageset.open(lesions.parent / out).table
    return found.assign(owner=[(int(item) - 2) // 4 for item in found["item"]])


@pytest.mark.parametrize("name", ["patient_id", "PatientID", "Patient ID", "lesion_id", "case"])
def test_a_column_that_groups_images_is_asked_for_and_then_keeps_them_together(
    lesions, capsys, name
):
    option = listed(lesions, name, more=",site")
    told = refused(capsys, lesions, option)
    assert f"table.csv: column {name!r} is not used" in told
    assert f"--patient {name!r} keeps them together, --patient none says" in told
    assert prepare(lesions, option, f"--patient={name}") == 0
    found = owners(lesions)
    assert (found.groupby("owner")["split"].nunique() == 1).all()
    assert found["patient"].nunique() == 10
    assert set(found["split"]) == {"train", "val", "test"}
    card = imageset.open(lesions.parent / "set").card
    assert list(card["report"]) == ["column 'site' of the CSV left out"]
    assert not card["warnings"]


def test_images_are_independent_only_if_somebody_says_so(lesions):
    for name in ("lesion_id", "patient"):
        option = listed(lesions, name)
        assert prepare(lesions, option, "--patient=none", "--overwrite") == 0
        opened = imageset.open(lesions.parent / "set")
        assert opened.table["patient"].nunique() == 40
        assert opened.card["report"][f"column {name!r} of the CSV left out"] == 1


@pytest.mark.parametrize(
    ("name", "owner"),
    [("case_id", str), ("case_id", lambda i: ""), ("Patient Age", lambda i: 60), ("grey", str)],
)
def test_a_column_that_groups_nothing_is_left_out_without_a_question(lesions, name, owner):
    assert prepare(lesions, listed(lesions, name, owner)) == 0
    assert imageset.open(lesions.parent / "set").card["report"][
        f"column {name!r} of the CSV left out"
    ]


def test_a_column_patient_is_used_as_it_was_and_others_beside_it_are_not_asked_for(lesions):
    assert prepare(lesions, listed(lesions, "Patient", more=",lesion_id")) == 0
    assert owners(lesions)["patient"].nunique() == 10


def test_of_several_columns_the_one_nearest_to_a_patient_is_proposed(lesions, capsys):
    rows = [f"{i:02}.png,{i % 2},S{i // 2},P{i // 4}" for i in range(40)]
    option = table(lesions, "file,label,study,mrn", *rows)
    assert "column 'mrn' is not used" in refused(capsys, lesions, option)


@pytest.mark.parametrize(
    ("owner", "told"),
    [
        (lambda i: "BUSI", "--patient study finds one patient in all 40 images;"),
        (lambda i: "xy"[i // 4 % 2], "finds one patient per class, such as 'x' for 'a';"),
    ],
)
def test_a_column_that_cannot_be_the_patient_is_refused(lesions, capsys, owner, told):
    option = listed(lesions, "study", owner)
    assert told in refused(capsys, lesions, option, "--patient=study")


def test_a_column_with_a_patient_for_every_image_is_told_on_the_card(lesions, capsys):
    assert prepare(lesions, listed(lesions, "mine", str), "--patient=mine") == 0
    told = "every image has a patient of its own: if --patient mine counts files, patients may"
    assert told in capsys.readouterr().out
    assert told in imageset.open(lesions.parent / "set").card["warnings"][0]


def test_a_column_needs_a_table_and_must_be_there(lesions, capsys):
    assert "--patient x: names a column of --csv" in refused(capsys, lesions, "--patient=x")
    told = refused(capsys, lesions, listed(lesions, "name"), "--patient=x")
    assert "table.csv: no column 'x' among ['file', 'label', 'name']; one is needed" in told
    with pytest.raises(SystemExit, match="2"):
        prepare(lesions, listed(lesions, "name"), "--patient=name", "--patient-pattern=x")


def named(root: Path, name) -> Path:
    """Twelve images in each of two classes, with the names that ``name(class, place)`` gives."""
    for label in "01":
        for k in range(12):
            save(root / "in" / label / f"{name(label, k)}.png")
    return root / "in"


THREE_EACH = lambda label, k: f"pat{k // 3}_{k}"
NUMBERS = lambda label, k: str(k + 1)
PADDED = lambda label, k: f"img_{k:03}"
PAIRED = lambda label, k: f"{4711 + 97 * k}"
PATTERNS = {
    "the class": (THREE_EACH, r"\d+", "finds one patient per class, such as '0' for '0'"),
    "the folder": (NUMBERS, r"^[^/]+", "finds one patient per class"),
    "one word": (THREE_EACH, "pat", "finds one patient in all 24 images"),
    "a word of some": (lambda c, k: "xy"[k > 5] + str(k), "x|y", ""),
    "the place": (
        THREE_EACH,
        r"_(\d+)",
        "numbers that begin anew in each class, such as '0'",
    ),
    "a number": (NUMBERS, r"(\d+)\.png", "finds numbers that begin anew"),
    "the name": (
        NUMBERS,
        "[^/]+$",
        "numbers that begin anew in each class, such as '1.png'",
    ),
    "a padded number": (PADDED, r"img_\d+", "they count files, not patients"),
    "patients": (THREE_EACH, r"pat\d+", ""),
    "patients with one image of each class": (PAIRED, r"\d+\.", ""),
}


@pytest.mark.parametrize("what", PATTERNS)
def test_a_pattern_that_finds_no_patients_is_refused_before_anything_is_written(
    tmp_path, capsys, what
):
    name, pattern, told = PATTERNS[what]
    source = named(tmp_path, name)
    if told:
        assert told in refused(capsys, source, f"--patient-pattern={pattern}")
    else:
        assert prepare(source, f"--patient-pattern={pattern}") == 0
        warnings = imageset.open(tmp_path / "set").card["warnings"]
        assert not [told for told in warnings if not told.startswith("no image is in")]


@pytest.mark.parametrize("name", ["P{0}_{1}.png", "series {1}/P{0}.png"])
def test_patients_with_one_image_of_each_class_are_patients_if_folders_are_not_classes(
    lesions, name
):
    names = [name.format(i // 2, i % 2) for i in range(40)]
    for new, file in zip(names, sorted(lesions.iterdir()), strict=True):
        (lesions / new).parent.mkdir(exist_ok=True)
        file.rename(lesions / new)
    rows = [f"{new},{(i + i // 4) % 2}" for i, new in enumerate(names)]
    assert prepare(lesions, table(lesions, "file,label", *rows), r"--patient-pattern=P\d+") == 0
    assert imageset.open(lesions.parent / "set").table["patient"].nunique() == 20


def test_a_pattern_that_finds_the_split_is_refused(tmp_path, capsys):
    for split in ("train", "test"):
        for i in range(4):
            save(tmp_path / "in" / split / "ab"[i % 2] / f"{split}_{i}.png")
    told = refused(capsys, tmp_path / "in", "--patient-pattern=^[a-z]+")
    assert "finds one patient per split, such as 'test'" in told


def test_a_pattern_with_a_patient_for_every_image_is_told_on_the_card(tmp_path, capsys):
    source = named(tmp_path, lambda label, k: f"{label}x{k}")
    assert prepare(source, r"--patient-pattern=[^/]+$") == 0
    told = "every image has a patient of its own: if --patient-pattern counts files"
    assert told in capsys.readouterr().out
    assert told in imageset.open(tmp_path / "set").card["warnings"][0]


def plan(found: dict[str, list[str]]) -> pd.DataFrame:
    """The plan of class folders: class -> the patient found in each path."""
    rows = [
        (f"{label}/{place}.png", patient, label)
        for label, patients in found.items()
        for place, patient in enumerate(patients)
    ]
    return pd.DataFrame(rows, columns=["file", "patient", "label"])


@given(
    st.lists(st.integers(2, 40), min_size=2, max_size=4),
    st.integers(0, 1),
    st.integers(1, 4),
    st.sampled_from(["", "img", "benign ("]),
    st.randoms(use_true_random=False),
)
@settings(deadline=None)
def test_numbers_of_files_are_never_taken_for_patients(sizes, start, width, prefix, rng):
    found = {}
    for label, n in zip("abcd", sizes, strict=False):
        numbers = [f"{prefix}{k:0{width}}" for k in range(start, start + n)]
        found[label] = [numbers[0], *rng.sample(numbers[1:], max(1, 3 * (n - 1) // 4))]
    if start + max(sizes) > 2 * max(map(len, found.values())):
        return  # too few are left to tell
    with pytest.raises(UserError, match="begin anew in each class"):
        grouping.check_counter(plan(found), "--patient-pattern", Path("in"))


@given(st.lists(st.integers(1, 9), min_size=6, max_size=30), st.integers(2, 4))
def test_patients_with_several_images_of_a_class_are_never_taken_for_numbers(ids, copies):
    found = {"a": [f"{i}" for i in ids] * copies, "b": [f"{i}" for i in ids]}
    grouping.check_counter(plan(found), "--patient-pattern", Path("in"))
    if len(set(ids)) > 1:
        assert grouping.check(plan(found), "--patient-pattern", Path("in")) == []

"""Patient and site of a slide, from its name, its folder or its DICOM header. Pure functions, no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from fmtrain.manifest.search import FoundSlide
from fmtrain.manifest.shown_names import examples

FOLDER = "folder"  # value of --patient: the folder below the folder of slides
# Patients in the file names of public cohorts; the second group of TCGA's barcode is the site.
_TCGA = re.compile(r"TCGA[-_]([A-Z0-9]{2})[-_]([A-Z0-9]{4})(?![A-Z0-9])", re.IGNORECASE)
_OTHERS = (
    re.compile(r"(?<![A-Z0-9])C3[LN]-\d{5}(?!\d)", re.IGNORECASE),  # CPTAC
    re.compile(r"(?<![A-Z0-9])GTEX-[A-Z0-9]{4,5}(?![A-Z0-9])", re.IGNORECASE),
    re.compile(r"(?<![A-Z0-9])patient_\d{3}(?!\d)", re.IGNORECASE),  # CAMELYON17
)


class Origin(NamedTuple):
    """Patient and site of a slide; whether the patient is known, or the slide is taken for one."""

    patient: str
    site: str
    known: bool


def cohort_patient(text: str) -> Origin | None:
    """Patient and site from an identifier of TCGA, CPTAC, GTEx or CAMELYON17 anywhere in a text.

    Example:
        >>> cohort_patient("LUAD_tcga-18-5592_DX1.svs"), cohort_patient("C3L-00601-26.svs"), cohort_patient("CMU-1.svs")
        (Origin(patient='TCGA-18-5592', site='18', known=True), Origin(patient='C3L-00601', site='', known=True), None)
    """
    if barcode := _TCGA.search(text):
        site, patient = barcode[1].upper(), barcode[2].upper()
        return Origin(f"TCGA-{site}-{patient}", site, True)
    for number, pattern in enumerate(_OTHERS):
        if match := pattern.search(text):
            return Origin(match[0].lower() if number == len(_OTHERS) - 1 else match[0].upper(), "", True)
    return None


def patient_of(slide: FoundSlide, *, rule: str | None = None) -> Origin:
    """Patient and site of a slide: by the user's rule, DICOM's PatientID, its name; else the slide is its own patient.

    Args:
        slide: The slide.
        rule: Regular expression that is searched in the path below the folder; its groups, or else the match, are the
            patient. `FOLDER` for the first folder of that path.
    """
    path = PurePosixPath(slide.relative)
    if rule == FOLDER and len(path.parts) > 1:
        return Origin(path.parts[0], _site(slide), True)
    if rule not in (None, FOLDER) and (match := re.search(str(rule), slide.relative)):
        patient = "-".join(group for group in match.groups() if group) or match[0]
        return Origin(patient, _site(slide), True)
    if slide.patient:
        return cohort_patient(slide.patient) or Origin(slide.patient, "", True)
    return cohort_patient(path.name) or cohort_patient(slide.relative) or Origin(stem(slide.name), "", False)


def _site(slide: FoundSlide) -> str:
    origin = cohort_patient(slide.patient) or cohort_patient(slide.relative)
    return origin.site if origin else ""


def stem(name: str) -> str:
    """Name of a slide without its suffixes; with its folders where several slides have the name.

    Example:
        >>> stem("a/1.2.ome.tif"), stem("1.2")
        ('a/1.2', '1')
    """
    path = PurePosixPath(name)
    base = path.name.removesuffix(path.suffix) if path.suffix else path.name
    return str(path.with_name(base.removesuffix(".ome") or base))


def check_rule(rule: str | None, slides: Sequence[FoundSlide]) -> list[str]:
    """Warnings on a rule of patients that does not fit all slides; raises if it is invalid or fits none."""
    if rule is None:
        return []
    if rule == FOLDER:
        missing = [slide.name for slide in slides if "/" not in slide.relative]
    else:
        try:
            pattern = re.compile(rule)
        except re.error as error:
            raise ValueError(f"--patient is no regular expression ({error}), got {rule!r}") from error
        missing = [slide.name for slide in slides if not pattern.search(slide.relative)]
    if len(missing) == len(slides):
        raise ValueError(f"--patient {rule} fits no slide, for example {examples(missing, limit=1)}")
    return [f"--patient does not fit {examples(missing)}; their patients come from the names"] if missing else []


def one_slide_each(origins: Mapping[str, Origin]) -> list[str]:
    """Warnings on patients that are not known, and where all patients hold one slide each."""
    remedy = "if patients have several slides, name them with --patient or a column patient in --table"
    if max(Counter(origin.patient for origin in origins.values()).values()) == 1:
        return [f"each slide is a patient of its own: {examples(list(origins))}; {remedy}"]
    guessed = [name for name, origin in origins.items() if not origin.known]
    return [f"each slide without a known patient is one of its own: {examples(guessed)}; {remedy}"] if guessed else []

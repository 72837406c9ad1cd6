"""What goes on about a picture beside its pixels and its text: modality, body part, view and laterality.

Each is an index into a closed list of ``types.py``. What a header or a table says in other words is left out and
counted: these fields are typed by hand in many hospitals, and a name in one of them must go no further.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_medgpt.ingest.identity import modality_of_header, modality_of_name
from megatron_medgpt.types import BODY_PARTS, LATERALITIES, VIEWS

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_SEVERAL = 1
"""Index of ``several`` in the three lists."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Indices into ``MODALITIES``, ``BODY_PARTS``, ``VIEWS`` and ``LATERALITIES``; 0 where nothing is known."""

    modality: int = 0
    body_part: int = 0
    view: int = 0
    laterality: int = 0
    left_out: frozenset[str] = frozenset()
    """Fields that were stated in words that are on no list."""


NO_FACTS = Facts()

_BODY_PARTS = {
    "whole-body": "wholebody fullbody entirebody 38266002 T-D0010",
    "head": "head skull cranium jaw mandible maxilla tmjoint tmj temporomandibular zygoma zygomatic pituitary sinus "
    "sinuses sella mastoid skullbase 69536005 T-D1100 89546000 T-11100 91609006 T-11180 2095001 T-22000 53620006 "
    "T-15290 59066005 T-11133 42575006 T-D1460 661005 T-D1213 70925003 T-11170 13881006 T-11166",
    "brain": "brain cerebral cerebrum neuro 12738006 T-A0100",
    "face": "face facial nose nasal 91397008 T-11196 74386004 T-11149 89545001 T-D1200",
    "eye": "eye eyes retina retinal fundus orbit orbits ocular 81745001 T-AA000 371398005 T-D0801 363654007 T-D14AE",
    "ear": "ear ears iac auditory 117590005 361078006 T-AB959",
    "mouth": "mouth oral tooth teeth dental tongue 123851003 T-D0662",
    "neck": "neck thyroid larynx pharynx parotid carotid 45048000 T-D1600 4596009 T-24100 45289007 T-61100 69748006 "
    "T-B6000",
    "head-and-neck": "headneck 774007 T-D1000",
    "chest": "chest thorax thoracic rib ribs sternum clavicle mediastinum bronchus trachea tracheal esophagus "
    "oesophagus 816094009 51185008 T-D3000 113197003 T-11300 56873002 T-11210 51299004 T-12310 72410000 T-D3300 "
    "44567001 T-25000 955009 T-26000 32849002 T-56000",
    "lung": "lung lungs pulmonary 39607008 T-28000 86598002 T-280A0",
    "heart": "heart cardiac coronary coronaries 80891009 T-32000",
    "breast": "breast breasts mamma mammary 76752008 T-04000",
    "chest-and-abdomen": "chestabdomen 416550000 R-FAB55",
    "abdomen": "abdomen abdominal belly 818981001 113345001 T-D4000",
    "liver": "liver hepatic 10200004 T-62000",
    "gallbladder": "gallbladder biliary bileduct 28231008 T-63000 28273000 T-60610 34707002 T-60600",
    "pancreas": "pancreas pancreatic 15776009 T-65000",
    "spleen": "spleen splenic 78961009 T-C3000",
    "kidney": "kidney kidneys renal ureter ureteric adrenal 64033007 T-71000 87953007 T-73000",
    "stomach": "stomach gastric 69695003 T-57000",
    "bowel": "bowel colon colonic intestine rectum rectal duodenum jejunum ileum appendix anus 71854001 T-59300 "
    "14742008 T-59000 38848004 T-58200 30315005 T-58000 34402009 T-59600 34516001 T-58600 21306003 T-58400 53505006 "
    "T-59900",
    "abdomen-and-pelvis": "abdomenpelvis 818982008 R-FAB57",
    "chest-abdomen-pelvis": "chestabdpelvis chestabdomenpelvis 416775004 R-FAB56",
    "pelvis": "pelvis pelvic sijoint sacroiliac ilium 816092008 12921003 T-D6000 39723000 T-15680 22356005 T-12340",
    "bladder": "bladder urethra urethral 89837001 T-74000 13648007 T-75000",
    "prostate": "prostate prostatic 41216001 T-92000",
    "uterus": "uterus uterine cervix ovary ovaries fetus 35039007 T-83000",
    "spine": "spine spinal cspine tspine lspine sspine lsspine tlspine ctspine lumbar sacral sacrum vertebra "
    "vertebral vertebrae coccyx cervicalspine thoracicspine lumbarspine 421060004 T-D04FF 122494005 T-11501 122495006 "
    "T-11502 122496007 T-11503 54735007 T-11AD0 64688005 T-11BF0 1217253001 1217254007 1217256009 1217257000",
    "shoulder": "shoulder scapula acjoint acromioclavicular 16982005 T-D2220 79601000 T-12280 85856004 T-15420",
    "upper-arm": "upperarm humerus arm 40983000 T-D8200 85050009 T-12410",
    "elbow": "elbow 16953009 T-15430",
    "forearm": "forearm radius ulna 14975008 T-D8500",
    "wrist": "wrist carpal 74670003 T-15460 8205005 T-D8600",
    "hand": "hand finger fingers thumb 85562004 T-D8700 7569003 T-D8800 76505004 T-D8810",
    "upper-limb": "upperlimb upperextremity 53120007 T-D8000",
    "hip": "hip hips 29836001 T-D2500 24136001 T-15710",
    "thigh": "thigh femur 68367000 T-D9100 71341001 T-12710",
    "knee": "knee knees patella meniscus 72696002 T-D9200 64234005 T-12730",
    "lower-leg": "lowerleg calf tibia fibula leg 30021000 T-D9400 87342007 T-12750",
    "ankle": "ankle 70258002 T-15750",
    "foot": "foot feet toe toes heel calcaneus 56459004 T-D9700 29707007 T-D9800 80144004 T-12770",
    "lower-limb": "lowerlimb lowerextremity 61685007 T-D9000",
    "skin": "skin cutaneous dermis 39937001 T-01000",
    "vessel": "vessel vessels aorta artery vein vascular 59820001 T-40000",
}  # fmt: skip
_VIEWS = {
    "ap": "ap anteroposterior 399348003 R-10206",
    "pa": "pa posteroanterior 272479007 R-40888",
    "frontal": "frontal 399033003 R-10202",
    "lateral": "lateral lat 399067008 R-102CD",
    "left-lateral": "ll leftlateral leftlat 399173006 R-10236",
    "right-lateral": "rl rightlateral rightlat 399198007 R-10232",
    "left-decubitus": "lld leftdecubitus leftlateraldecubitus",
    "right-decubitus": "rld rightdecubitus rightlateraldecubitus",
    "oblique": "oblique llo rlo 399182000 R-102C1 399184004 R-10238 399236003 R-10234",
    "left-anterior-oblique": "lao leftanterioroblique 399135007 R-10220",
    "right-anterior-oblique": "rao rightanterioroblique 399356000 R-40985",
    "left-posterior-oblique": "lpo leftposterioroblique 399006002 R-10212",
    "right-posterior-oblique": "rpo rightposterioroblique 399038007 R-10210",
    "axial": "axial transverse transversal 399061009 R-10241",
    "coronal": "coronal",
    "sagittal": "sagittal 30730003 G-A145",
    "craniocaudal": "cc craniocaudal xcc xccl xccm 399162004 R-10242 399192008 R-1024A 399101009 R-1024B",
    "mediolateral-oblique": "mlo mediolateraloblique 399368009 R-10226",
    "mediolateral": "ml mediolateral mediallateral 399260004 R-10224",
    "lateromedial": "lm lateromedial 399352003 R-10228",
    "lateromedial-oblique": "lmo lateromedialoblique 399099002 R-10230",
}
_LATERALITIES = {
    "left": "left l sinister 7771000 G-A101",
    "right": "right r dexter 24028007 G-A100",
    "both": "both b bilateral bilaterally 51440002 G-A102",
    "unpaired": "unpaired u median midline 130290",
}
_TOGETHER = {
    frozenset({"head", "neck"}): "head-and-neck",
    frozenset({"chest", "abdomen"}): "chest-and-abdomen",
    frozenset({"abdomen", "pelvis"}): "abdomen-and-pelvis",
    frozenset({"chest", "abdomen", "pelvis"}): "chest-abdomen-pelvis",
    frozenset({"left", "right"}): "both",
}
"""Parts that have a name together."""
_PARTS_OF = {name: parts for parts, name in _TOGETHER.items()}
_INSIDE = {
    "head": {"brain", "face", "eye", "ear", "mouth"}, "chest": {"lung", "heart", "breast"},
    "abdomen": {"liver", "gallbladder", "pancreas", "spleen", "kidney", "stomach", "bowel"},
    "pelvis": {"bladder", "prostate", "uterus"},
}  # fmt: skip
"""Regions and what lies in them: ``chest, lung`` (SLAKE) means the lung."""
_NOTHING_STATED = ("unknown", "none", "n/a", "nan", "other", "unspecified")
_WORDS_OF_A_NAME = 3
_LONGEST_VALUE = 200


def _by_word(names: dict[str, str]) -> dict[str, str]:
    return {word.lower(): name for name, words in names.items() for word in words.split()}


_LISTS = {
    "body_part": (BODY_PARTS, _by_word(_BODY_PARTS)),
    "view": (VIEWS, _by_word(_VIEWS)),
    "laterality": (LATERALITIES, _by_word(_LATERALITIES)),
}
"""Field -> its list, and the words and SNOMED codes for it (PS3.16 CID 4009, 4010, 4014, 244; old and new codes)."""


def place_in_list(field: str, stated: str) -> int | None:
    """Index in the list of ``body_part``, ``view`` or ``laterality``: 0 of an empty value, None of unknown words."""
    if not stated.strip():
        return 0
    names, known = _LISTS[field]
    stated = stated[:_LONGEST_VALUE].strip().lower()
    if stated in known:  # codes and single letters count only where they stand alone
        return names.index(known[stated])
    words = [word for word in re.findall(r"[a-z]+", stated) if len(word) > 1]
    found: set[str] = set()
    at = 0
    while at < len(words):
        for count in range(_WORDS_OF_A_NAME, 0, -1):
            name = known.get("".join(words[at : at + count])) if at + count <= len(words) else None
            if name is not None:
                found |= _PARTS_OF.get(name, {name})
                at += count - 1
                break
        at += 1
    if not found:
        return 0 if stated in _NOTHING_STATED else None
    found -= {region for region, inside in _INSIDE.items() if found & inside}
    if len(found) == 1:
        return names.index(found.pop())
    together = _TOGETHER.get(frozenset(found))
    return names.index(together) if together in names else _SEVERAL


def facts_of_header(header: Dataset) -> Facts:
    """Of a DICOM header: BodyPartExamined or AnatomicRegionSequence; ViewPosition or ViewCodeSequence; ImageLaterality,
    Laterality or the laterality of an enhanced file's frames."""
    groups = header.get("SharedFunctionalGroupsSequence") or header.get("PerFrameFunctionalGroupsSequence") or []
    anatomy = next((item for group in groups[:1] for item in group.get("FrameAnatomySequence") or []), None)
    places = [header] if anatomy is None else [header, anatomy]
    stated = {
        "body_part": [_text(header, "BodyPartExamined"), *(_code(p, "AnatomicRegionSequence") for p in places)],
        "view": [_text(header, "ViewPosition"), _code(header, "ViewCodeSequence")],
        "laterality": [
            _text(place, keyword)
            for keyword in ("ImageLaterality", "Laterality", "FrameLaterality")
            for place in places
        ],
    }
    chosen = {field: _chosen(field, values) for field, values in stated.items()}
    return Facts(
        modality_of_header(header), **{field: index or 0 for field, index in chosen.items()},
        left_out=frozenset(field for field, index in chosen.items() if index is None),
    )  # fmt: skip


def _chosen(field: str, values: Iterable[str]) -> int | None:
    """The first value that its list knows; None where there are values and none is known."""
    found = [index for value in values if (index := place_in_list(field, value)) != 0]
    return next((index for index in found if index is not None), None if found else 0)


def _text(item: Dataset, keyword: str) -> str:
    value = item.get(keyword)
    return value if isinstance(value, str) else " ".join(map(str, value or []))


def _code(item: Dataset, keyword: str) -> str:
    codes = item.get(keyword) or []
    return str(codes[0].get("CodeValue") or "") if len(codes) else ""


def facts_of_sample(stated: Facts, images: Iterable[Facts]) -> Facts:
    """What holds for a sample: what its table states, else what its files do.

    The modality is the first that a file states. Of the rest, files that differ (a frontal and a lateral picture of one
    study) make ``several``.
    """
    images = list(images)

    def agreed(field: str) -> int:
        own: int = getattr(stated, field)
        found = {getattr(image, field) for image in images} - {0}
        return own or (_SEVERAL if len(found) > 1 else next(iter(found), 0))

    return Facts(
        stated.modality or next((image.modality for image in images if image.modality), 0),
        agreed("body_part"), agreed("view"), agreed("laterality"),
        stated.left_out.union(*(image.left_out for image in images)),
    )  # fmt: skip


def facts_of_table(modality: str, **stated: str) -> Facts:
    """What a table says, in any of the usual words."""
    chosen = {field: place_in_list(field, value) for field, value in stated.items()}
    return Facts(
        modality_of_name(modality), **{field: index or 0 for field, index in chosen.items()},
        left_out=frozenset(field for field, index in chosen.items() if index is None),
    )  # fmt: skip

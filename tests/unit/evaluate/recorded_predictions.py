"""Recorded answers of every shape that models give, each with its verdicts decided by hand.

A case: (options, right option, output, right under ``letter``, right under ``official-qa``). The remark says why. None
stands where a verdict hangs on counting scattered characters; there only the second statement of the rule speaks.
"""

from __future__ import annotations

SCANS = ("PET scan", "CT scan", "Blood test", "Fundus imaging")
YES_NO = ("Yes", "No")
SIDES = ("Left lung", "Right lung", "Left kidney")
GRADES = ("Grade 1", "Grade 2", "Grade 3", "Grade 4")
TWINS = ("Liver", "Spleen", "Liver", "Kidney")
UNICODE = ("α-fetoprotein", "β-amyloid", "Größe < 3 µm", "İltihap")

CASES = [
    # letters alone
    (SCANS, "Fundus imaging", "D", True, False),  # official: a capital D is in no option
    (SCANS, "CT scan", "b", True, None),
    (SCANS, "CT scan", "B.", True, None),
    (SCANS, "CT scan", "B. CT scan", True, True),
    (SCANS, "CT scan", "b) CT scan", True, True),  # "b) ct scan" is no letter, but most like "b. ct scan"
    (YES_NO, "Yes", "A", True, False),
    (YES_NO, "No", "C", False, False),  # a letter beyond the options: similarity, which finds no "c" and takes option A
    # texts
    (SCANS, "CT scan", "CT scan", True, True),
    (SCANS, "CT scan", "ct scan", True, True),
    (SIDES, "Right lung", "Right lung", True, True),
    (SIDES, "Right lung", "It is the right lung", True, True),
    (GRADES, "Grade 3", "Grade 3", True, True),
    (GRADES, "Grade 3", "The lesion is of Grade 3.", True, True),
    (YES_NO, "Yes", "Yes", True, True),
    (YES_NO, "No", "No.", True, True),
    (YES_NO, "No", "There is no finding.", None, None),
    # announcements
    (SCANS, "CT scan", "The answer is B", True, None),
    (SCANS, "CT scan", "The answer is B.", True, None),
    (SCANS, "CT scan", "the correct answer is: B", None, None),  # the blank behind the colon hides the letter
    (SCANS, "CT scan", "Answer: B", True, None),
    (SCANS, "CT scan", "**Answer**: B", True, None),
    (SCANS, "CT scan", "**Answer:** B", True, None),
    (SCANS, "CT scan", "*Answer*: B", True, None),
    (SCANS, "CT scan", "Final answer B", True, None),
    (SCANS, "CT scan", "The final answer is B", True, None),
    (SCANS, "CT scan", "答案:B", True, False),  # official: 答案: and B are shared by "Blood test" alone
    (SCANS, "CT scan", "The answer is A? No, the answer is B", True, None),  # the last announcement counts
    (SCANS, "PET scan", "The answer is A? No, the answer is B", False, None),
    # boxes and tags
    (SCANS, "CT scan", "\\boxed{B}", True, None),
    (SCANS, "CT scan", "First \\boxed{A}, then \\boxed{B}", True, None),  # the last box counts
    (SCANS, "CT scan", "\\boxed{B. CT scan}", True, True),
    (SCANS, "CT scan", "\\boxed{\\text{B}}", None, None),  # "\text{b}" is no letter
    (SCANS, "CT scan", "\\boxed{B", None, None),  # never closed: reads as "none"
    (SCANS, "CT scan", "I boxed nothing", None, None),
    (SCANS, "CT scan", "<answer>B</answer>", True, None),
    (SCANS, "CT scan", "<think>A or B?</think><answer>B</answer>", True, None),
    (SCANS, "CT scan", "<answer>B", None, None),  # never closed: the whole text is read
    (SCANS, "CT scan", "<answer>A</answer><answer>B</answer>", None, None),  # joined: "a b"
    # paragraphs
    (SCANS, "CT scan", "B\n\nThe bones are bright.", True, None),
    (SCANS, "CT scan", "The bones are bright.\n\nB", True, None),
    (SCANS, "CT scan", "The bones are bright.\n\nB. CT scan", True, True),
    (SCANS, "CT scan", "The bones are bright.\n\nSo it is B", None, None),
    (SCANS, "CT scan", "B\n", True, None),
    # ties and repeats
    (TWINS, "Liver", "Liver", None, True),  # two options read the same: official takes the first, equal in text
    (TWINS, "Liver", "C", True, None),  # letter: the last of equal options is the right one
    (TWINS, "Liver", "A", False, None),
    (GRADES, "Grade 1", "Grade", True, True),  # all alike: the first
    (GRADES, "Grade 2", "Grade", False, False),
    # empty, and nothing in common
    (SCANS, "PET scan", "", None, False),
    (SCANS, "Fundus imaging", " \n ", None, None),
    (YES_NO, "Yes", "???", True, False),  # letter: nothing shared counts as option A
    (YES_NO, "No", "???", False, False),
    # unicode and case
    (UNICODE, "β-amyloid", "β-amyloid", True, True),
    (UNICODE, "β-amyloid", "B", True, False),
    (UNICODE, "Größe < 3 µm", "GRÖSSE < 3 µM", None, None),
    (UNICODE, "İltihap", "iltihap", True, True),
    (UNICODE, "İltihap", "Ｄ", None, None),  # a full-width letter is no letter
    (UNICODE, "α-fetoprotein", "𝐀", None, None),
    # an answer that is none of the options
    (SCANS, "Biopsy", "Biopsy", True, False),
    (SCANS, "Biopsy", "B", False, False),
    # long
    (SCANS, "CT scan", "The picture shows a slice through the chest. " * 6 + "The answer is B", True, None),
    (SCANS, "CT scan", "x" * 300, None, None),
]

SHORT = [
    # (answer, output, closed, right, F1): open and yes/no questions
    ("yes", "Yes", True, True, 1.0),
    ("Yes", "YES.", True, True, 0.0),  # "yes." is another token than "yes"
    ("no", "There is no mass", True, True, 0.4),  # {no} of {there, is, no, mass}: 2 * 1 / (1 + 4)
    ("no", "I do not know", True, True, 0.0),  # "no" stands in "not" and "know": the published rule looks inside words
    ("no", "yes and no", True, False, 0.5),
    ("yes", "", True, False, 0.0),
    ("left lung", "left lung", False, True, 1.0),
    ("left lung", "the left lung", False, False, 0.8),
    ("left lung", "Left lung.", True, True, 0.5),
    ("left lung", "left\nlung", True, False, 1.0),  # without its line break: "leftlung"
    ("left lung", "The answer is left lung", False, True, 1.0),
    ("left lung", "**Answer**: left lung", False, True, 1.0),
    ("left lung", "\\boxed{Left Lung}", False, True, 1.0),
    ("left lung", "<answer>right lung</answer>", False, False, 0.5),
    ("left lung", "a boxed thing", False, False, 0.0),  # reads as "none"
    ("left lung", "<answer>The answer is left lung</answer>", False, True, 1.0),
    ("größe", "GRÖßE", False, True, 1.0),
]

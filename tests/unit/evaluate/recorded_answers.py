"""Worked cases: an output, and what each published rule makes of it, decided by hand from the rules' description.

The question of all cases has the options PET scan, CT scan, Blood test, Fundus imaging; the right one is the last.
"""

from __future__ import annotations

OPTIONS = ("PET scan", "CT scan", "Blood test", "Fundus imaging")
ANSWER = "Fundus imaging"

# (output, right under letter, read by similarity under letter, right under official-qa, option under official-qa);
# None where a rule's outcome hangs on counting scattered characters and is left to the second statement of the rule.
WORKED = [
    ("D", True, False, False, None),  # a bare letter: no option has a capital D, the official scorer finds nothing
    ("d", True, False, False, 2),  # shares one letter with "Blood test" (10 long) and "Fundus imaging" (14 long)
    ("B", False, False, False, 2),  # the first letter of "Blood test"
    ("D. Fundus imaging", True, False, True, 3),
    ("D.", True, False, False, None),
    ("(D)", False, True, False, None),  # brackets stay: not a letter, and most like option A
    ("Fundus imaging", True, True, True, 3),
    ("fundus IMAGING", True, True, True, 3),  # case counts, but six characters in a row are enough
    ("CT scan", False, True, False, 1),
    ("The answer is D", True, False, False, None),
    ("The answer is D.", True, False, False, None),
    ("The answer is: D", False, True, False, None),  # ": d" is left: the blank after the colon hides the letter
    ("Answer: D", True, False, None, None),
    ("**Answer**: D", True, False, None, None),
    ("Final answer is D", True, False, None, None),
    ("\\boxed{D}", True, False, None, None),
    ("I think \\boxed{\\text{D}} it is", False, True, None, None),
    ("so the boxed one", False, True, None, None),  # "boxed" without braces reads as the word "none"
    ("<answer>D</answer>", True, False, None, None),
    ("<answer>A</answer> or <answer>D</answer>", None, None, None, None),  # joined: "a d"
    ("D\n\nBecause the vessels of the retina are seen.", True, False, None, None),
    ("The retina is seen.\n\nD", True, False, None, None),
    ("The retina is seen.\n\nD. Fundus imaging", True, False, None, None),
    ("Option: D", False, True, None, None),  # the blank after the colon stays, so it is not a letter
    ("答案:D", True, False, False, None),
    ("E", False, True, False, 0),  # the E of "PET scan"
    ("", False, True, False, None),
    ("   ", False, True, None, None),
    ("PET scan, CT scan, Blood test, Fundus imaging", None, True, None, None),
]

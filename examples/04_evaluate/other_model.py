"""Answers of another model, as any script would write them: one line per question. This one always says the same.

python other_model.py QUESTIONS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

for file in sorted(Path(sys.argv[1], "QA_information").rglob("*.json")):
    for question in json.loads(file.read_text()):
        print(json.dumps({"question_id": question["question_id"], "prediction": "The answer is A."}))

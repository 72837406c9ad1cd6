"""Ask an exported model about an image, with nothing but transformers.

python generate.py EXPORT IMAGE "Which modality is this?"
"""

from __future__ import annotations

import sys

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


def main(folder: str, image: str, question: str) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[Image.open(image).convert("RGB")], text=prompt, return_tensors="pt").to(model.dtype)
    answer = model.generate(**inputs, max_new_tokens=32)[0, inputs["input_ids"].shape[1] :]
    print("answer:", processor.decode(answer, skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:])

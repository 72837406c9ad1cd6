"""Stand-ins for LLaVA-Med's and PubMedVision's files and for the bucket that holds LLaVA-Med's pictures, of phantoms.

python stand_ins.py make PHANTOMS OUT        OUT/llava_med, OUT/bucket, OUT/pubmedvision
python stand_ins.py serve BUCKET URL_FILE    serve the articles on this machine; the address is written to URL_FILE
"""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import json
import shutil
import sys
import urllib.parse
from pathlib import Path

from PIL import Image

RETRACTED, NO_DERIVATIVES = 1, 2
"""Numbers of the articles whose pictures may not be taken."""


def with_plain_picture(phantoms: Path) -> list[dict]:
    """The phantoms' dialogues about JPEG and PNG files, which are what papers show."""
    dialogues = json.loads((phantoms / "dialogues.json").read_text())
    return [row for row in dialogues if not row["image"].endswith(".dcm")]


def make(phantoms: Path, out: Path) -> None:
    """Two pictures to an article, named as in LLaVA-Med's list."""
    dialogues = with_plain_picture(phantoms)
    captions = [json.loads(line) for line in (phantoms / "captions.jsonl").read_text().splitlines()]
    caption_of = {row["image"]: row["caption"] for row in captions}
    lists = out / "llava_med"
    lists.mkdir(parents=True)
    alignment, instruct, urls = [], [], []
    for article in range(len(dialogues) // 2):
        name, media = f"PMC{7000000 + article}", {}
        for figure, row in enumerate(dialogues[2 * article : 2 * article + 2], 1):
            pair_id, file = f"{32000000 + article}_F{figure}", f"nihms-{article}-f{figure:04}.jpg"
            jpeg = io.BytesIO()
            Image.open(phantoms / row["image"]).convert("RGB").save(jpeg, "JPEG", quality=92)
            media[file] = jpeg.getvalue()
            tar = f"https://ftp.ncbi.nlm.nih.gov/pub/pmc/oa_package/00/00/{name}.tar.gz"
            urls.append({"pmc_tar_url": tar, "image_file_path": f"{name}/{file}", "pair_id": pair_id})
            both = {"id": pair_id, "image": f"{pair_id}.jpg"}
            asked = [{"from": "human", "value": "Describe the image.\n<image>"},
                     {"from": "gpt", "value": caption_of[row["image"]]}]  # fmt: skip
            alignment.append({**both, "conversatons": asked})  # the published file spells it so
            domain = {"chest_xray": row["modality"] == "X-Ray", "mri": row["modality"].startswith("MR")}
            instruct.append({**both, "domain": domain, "conversations": row["conversations"]})
        store(out / "bucket", f"{name}.1", media, article)
    (lists / "llava_med_alignment_500k.json").write_text(json.dumps(alignment))
    (lists / "llava_med_instruct_60k_inline_mention.json").write_text(json.dumps(instruct))
    (lists / "llava_med_image_urls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in urls))


def make_pubmedvision(phantoms: Path, out: Path) -> None:
    """Pictures in a list, and no mark in the text that says where they belong."""
    dialogues = with_plain_picture(phantoms)[:12]
    (out / "images").mkdir(parents=True)
    rows: dict[str, list[dict]] = {"Alignment": [], "InstructionTuning": []}
    for number, row in enumerate(dialogues):
        shutil.copy(phantoms / row["image"], out / "images" / f"pmc_{number}_0{Path(row['image']).suffix}")
        turns = [{**turn, "value": turn["value"].replace("<image>", "").strip()} for turn in row["conversations"]]
        shared = {"image": [f"images/pmc_{number}_0{Path(row['image']).suffix}"], "modality": row["modality"]}
        rows["Alignment"].append({**shared, "id": f"a{number}", "conversations": turns[:2]})
        rows["InstructionTuning"].append({**shared, "id": f"i{number}", "conversations": turns})
    for kind, records in rows.items():
        (out / f"PubMedVision_{kind}_VQA.json").write_text(json.dumps(records))


def store(bucket: Path, version: str, media: dict[str, bytes], article: int) -> None:
    """An article as the bucket holds it: its files in a folder of its version, and a record."""
    (bucket / "metadata").mkdir(parents=True, exist_ok=True)
    (bucket / version).mkdir()
    urls = []
    for file, content in media.items():
        (bucket / version / file).write_bytes(content)
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        urls.append(f"s3://pmc-oa-opendata/{version}/{file}?md5={md5}")
    record = {
        "license_code": "CC BY-NC-ND" if article == NO_DERIVATIVES else "CC BY", "is_pmc_openaccess": True,
        "is_retracted": article == RETRACTED, "is_manuscript": False, "media_urls": urls,
    }  # fmt: skip
    (bucket / "metadata" / f"{version}.json").write_text(json.dumps(record))


class Bucket(http.server.SimpleHTTPRequestHandler):
    """Files, and the list of the keys that begin with a prefix."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        asked = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        if "list-type" not in asked:
            return super().do_GET()
        keys = sorted(f"metadata/{path.name}" for path in (Path(self.directory) / "metadata").iterdir())
        listed = "".join(f"<Key>{key}</Key>" for key in keys if key.startswith(asked["prefix"][0])).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(listed)))
        self.end_headers()
        self.wfile.write(listed)

    def log_message(self, *_: object) -> None:
        """Silent."""


def serve(bucket: Path, url_file: Path) -> None:
    handler = functools.partial(Bucket, directory=str(bucket))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        url_file.write_text(f"http://127.0.0.1:{server.server_address[1]}")
        server.serve_forever()


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]), Path(sys.argv[3]))
        make_pubmedvision(Path(sys.argv[2]), Path(sys.argv[3]) / "pubmedvision")
    else:
        serve(Path(sys.argv[2]), Path(sys.argv[3]))

"""What the measurements are read against: each goal with the value that a run gave it, met, missed or not measured."""

from __future__ import annotations

from collections.abc import Iterable

WHOLE = "moe T=8192 H=2880 E=32 K=4 balanced"
FROZEN = "frozen T=8192 H=2880 E=32 K=4 balanced"
PRODUCTS = "products T=8192 H=2880 E=32 K=4 balanced"
MOVEMENT = "movement T=8192 H=2880 E=32 K=4"
CONVERSIONS = "conversions E=32 N=5760 K=2880"
PROJECTOR = "projector clip-336"
BESIDE_LIGER = "liger T=8192 H=2880 E=32 K=4 balanced"
LIGER = "liger (no bias, plain SwiGLU)"
ROUNDED = "ours fp8, weights rounded before"
RATIOS = (
    # case, part, ours, peer, how many times as fast
    (WHOLE, "forward", "ours bf16", "torch grouped_mm, eager", 1.5),
    (WHOLE, "forward", "ours bf16", "megatron-core order", 1.4),
    (WHOLE, "forward", "ours bf16", "torch grouped_mm, compiled", 1.1),
    (BESIDE_LIGER, "forward", "ours bf16", LIGER, 1.1),
    (WHOLE, "forward_backward", "ours bf16", "torch grouped_mm, eager", 1.4),
    (WHOLE, "forward", "ours fp8", "ours bf16", 1.4),
    (WHOLE, "forward_backward", "ours fp8", "ours bf16", 1.25),
    (WHOLE, "forward", ROUNDED, "ours bf16", 1.4),
    (WHOLE, "forward_backward", ROUNDED, "ours bf16", 1.25),
    (FROZEN, "forward", "mxfp4 in e4m3", "fp8", 0.97),
    (MOVEMENT, "forward", "ours index", "argsort and bincount", 3.0),
    (PROJECTOR, "forward_backward", "ours", "eager", 1.3),
    (PROJECTOR, "forward", "merge alone, index_copy", "merge alone, masked_scatter", 5.0),
)
RATES = (
    (PRODUCTS, "ours bf16", "tflop_s", 560.0),
    (PRODUCTS, ROUNDED, "tflop_s", 900.0),
)
CONVERTED = ("mxfp4 to bf16", "mxfp4 to e4m3", "bf16 to mxfp4")


def add_fractions(results: Iterable[dict], ceilings: dict[str, float]) -> None:
    """Give every row with a rate the share of this run's ceiling that it reaches."""
    for result in results:
        for part in ("forward", "forward_backward"):
            for name, row in result.get(part, {}).items():
                kind = "fp8" if "fp8" in name or "e4m3" in name else "bf16"
                ceiling = ceilings.get("copy_gb_s" if "gb_s" in row else f"{kind}_tflop_s")
                rate = row.get("gb_s", row.get("tflop_s"))
                if rate is not None and ceiling:
                    row["of_ceiling"] = rate / ceiling


def judge(results: Iterable[dict], ceilings: dict[str, float]) -> list[dict]:
    """One line for every goal: what, the goal, the value, met (None where it was not measured, or by kernels whose
    tests have not passed)."""
    by_case = {result["case"]: result for result in results if "tests" not in result}

    def row(case: str, part: str, name: str) -> dict:
        return by_case.get(case, {}).get(part, {}).get(name, {})

    def line(what: str, goal: float, value: float | None, *, at_most: bool = False) -> dict:
        met = None if value is None else value <= goal if at_most else value >= goal
        return {"what": what, "goal": goal, "at_most": at_most, "value": value, "met": met}

    lines = []
    for case, part, ours, peer, goal in RATIOS:
        a, b = row(case, part, ours).get("median_ms"), row(case, part, peer).get("median_ms")
        lines.append(line(f"{case}, {part}: {ours} over {peer}", goal, b / a if a and b else None))
    for case, name, rate, goal in RATES:
        lines.append(line(f"{case}: {name}, TFLOP/s", goal, row(case, "forward", name).get(rate)))
    copy = ceilings.get("copy_gb_s")
    moved, took = by_case.get(MOVEMENT, {}).get("combine_floor_bytes"), row(MOVEMENT, "forward", "ours combine")
    floor_ms = moved / copy / 1e6 if moved and copy else None
    share = took["median_ms"] / floor_ms if floor_ms and "median_ms" in took else None
    lines.append(line(f"{MOVEMENT}: combine over its floor", 1.25, share, at_most=True))
    index_ms = row(MOVEMENT, "forward", "ours index").get("median_ms")
    lines.append(line(f"{MOVEMENT}: index, us", 20.0, index_ms and index_ms * 1e3, at_most=True))
    for name in CONVERTED:
        found = [r["gb_s"] for n, r in by_case.get(CONVERSIONS, {}).get("forward", {}).items()
                 if n.startswith(name) and "gb_s" in r]  # fmt: skip
        value = max(found) / copy if found and copy else None
        lines.append(line(f"{CONVERSIONS}: {name} of copy bandwidth", 0.8, value))
    whole = by_case.get(WHOLE, {})
    kept, naive = whole.get("saved_bytes", {}).get("ours bf16"), whole.get("naive_saved_bytes")
    lines.append(line(f"{WHOLE}: saved bytes of naive", 0.5, kept / naive if kept and naive else None, at_most=True))
    return lines


def told(lines: Iterable[dict]) -> str:
    """The same as text."""
    words = {True: "met", False: "MISSED", None: "not measured"}
    return "\n".join(
        f"{words[item['met']]:12} {item['what']}: {'-' if item['value'] is None else format(item['value'], '.3g')}"
        f" (goal {'at most' if item['at_most'] else 'at least'} {item['goal']:g})"
        for item in lines
    )

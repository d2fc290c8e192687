"""The paper's twelve benchmarks (CoVFT, Table 1), from their official files under ``data_root``."""

from covft.evaluation import (
    AI2D,
    GQA,
    MME,
    MMVP,
    CVBench,
    MMBench,
    RealWorldQA,
    ScienceQA,
    TextVQA,
)

evaluation = dict(
    benchmarks=[
        dict(type=MME),
        dict(type=MMBench, lang="en"),
        dict(type=MMBench, lang="cn"),
        dict(type=GQA),
        dict(type=ScienceQA),
        dict(type=AI2D),
        dict(type=TextVQA),
        dict(type=MMVP),
        dict(type=RealWorldQA),
        dict(type=CVBench, source="COCO"),
        dict(type=CVBench, source="ADE20K"),
        dict(type=CVBench, source="Omni3D"),
    ],
    data_root="data",
    batch_size=16,
)

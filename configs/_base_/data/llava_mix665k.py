"""LLaVA-1.5's stage 2: 665,298 conversations (liuhaotian/LLaVA-Instruct-150K on the hub).

Its images are those of COCO, GQA, OCR-VQA, TextVQA and Visual Genome, in LLaVA's folders:
``coco/train2017``, ``gqa/images``, ``ocr_vqa/images``, ``textvqa/train_images``, ``vg/VG_100K`` and
``vg/VG_100K_2`` under ``image_root``. They are padded to a square.
"""

from covft.datasets import InstructDataset

train_dataset = dict(
    type=InstructDataset,
    annotations="data/llava_v1_5_mix665k.json",
    image_root="data",
    resize="pad",
    max_length=2048,
)
